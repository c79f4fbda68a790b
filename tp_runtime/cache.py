"""Key/value cache of this rank's heads, allocated once for the whole run.

Hugging Face's DynamicCache concatenates at every step and so copies all it holds for each new token; here a new token
is written behind the last, and attention reads a view. In every other way a layer is Hugging Face's own cache layer.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, DynamicLayer


class _RoomyLayer(DynamicLayer):
    """keys and values [B, H_kv, S, D]: views of room for `capacity` tokens, which doubles when it is full."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity = capacity
        self._key_room = self._value_room = torch.empty(0)
        self._last_keys: torch.Tensor | None = None  # the view that `update` left in `keys`

    def update(self, key_states, value_states, *args, **kwargs):
        new = key_states.shape[-2]
        # Another tensor than ours is where Hugging Face's methods put one: after a reordering, a repetition, a reset.
        is_ours = self._last_keys is not None and self.keys is self._last_keys
        held = self.keys.shape[-2] if is_ours else self._move_in(key_states, value_states)
        if held + new > self.capacity:
            self.capacity = max(held + new, 2 * self.capacity)
            self._move_in(key_states, value_states)
        self._key_room.narrow(2, held, new).copy_(key_states)
        self._value_room.narrow(2, held, new).copy_(value_states)
        self.keys = self._last_keys = self._key_room.narrow(2, 0, held + new)
        self.values = self._value_room.narrow(2, 0, held + new)
        return self.keys, self.values

    def _move_in(self, key_states: torch.Tensor, value_states: torch.Tensor) -> int:
        """Makes room for `capacity` tokens, with what is held at its beginning; returns how many tokens that is."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = self.get_seq_length()
        self.capacity = max(self.capacity, held)
        self._key_room = self._roomy(self.keys if held else None, key_states)
        self._value_room = self._roomy(self.values if held else None, value_states)
        return held

    def _roomy(self, old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """Room for `capacity` tokens like `new`, with `old` at its beginning."""
        room = new.new_empty(*new.shape[:-2], self.capacity, new.shape[-1])
        if old is not None:
            room[:, :, : old.shape[-2]] = old
        return room


class KVCache(Cache):
    """A cache for `capacity` tokens a sequence, prompt included; it grows if there are more.

    Sliding-window layers keep all tokens too; the attention mask hides those that have left the window.
    """

    def __init__(self, num_layers: int, capacity: int):
        super().__init__(layers=[_RoomyLayer(capacity) for _ in range(num_layers)])
