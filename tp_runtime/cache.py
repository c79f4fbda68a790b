"""Key/value cache of this rank's heads, allocated once for the whole run.

Hugging Face's DynamicCache concatenates at every step and so copies all it holds for each new token; here a new token
is written behind the last, and attention reads a view. In every other way a layer is Hugging Face's own cache layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer


class Room(NamedTuple):
    """The memory of a cache's layer, [B, H_kv, capacity, D], and where in it a new token of each sequence belongs."""

    keys: torch.Tensor
    values: torch.Tensor
    position: int | torch.Tensor  # one element, on the device
    counter: torch.Tensor | None = None

    def written(self) -> None:
        """The token is there: counts it as held where that is done on the device."""
        if self.counter is not None:
            self.counter.add_(1)


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
        held = self._take_room(new, key_states, value_states)
        self._key_room.narrow(2, held, new).copy_(key_states)
        self._value_room.narrow(2, held, new).copy_(value_states)
        return self.keys, self.values

    def next_room(self) -> Room:
        """Where one more token belongs, which counts as held from now on."""
        held = self._take_room(1, self.keys, self.values)
        return Room(self._key_room, self._value_room, held)

    def _take_room(self, new: int, like_keys: torch.Tensor, like_values: torch.Tensor) -> int:
        """Makes `new` tokens more part of `keys` and `values`; returns how many there were."""
        # Another tensor than ours is where Hugging Face's methods put one: after a reordering, a repetition, a reset.
        is_ours = self._last_keys is not None and self.keys is self._last_keys
        held = self.keys.shape[-2] if is_ours else self._move_in(like_keys, like_values)
        if held + new > self.capacity:
            self.capacity = max(held + new, 2 * self.capacity)
            self._move_in(like_keys, like_values)
        self.keys = self._last_keys = self._key_room.narrow(2, 0, held + new)
        self.values = self._value_room.narrow(2, 0, held + new)
        return held

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

    Attributes:
        masks_have_windows: whether it is known, during a forward pass, that the mask of each such layer does; then
            attention need not read what it hides.
    """

    def __init__(self, num_layers: int, capacity: int):
        super().__init__(layers=[_RoomyLayer(capacity) for _ in range(num_layers)])
        self.masks_have_windows = False


def next_room(cache: Cache, layer_index: int) -> Room | None:
    """Where one more token of each sequence belongs; the caller writes it, and says so (`Room.written`).

    None for a layer that does not keep its tokens where they are, as those that grow or roll, or that holds none yet.
    Of Hugging Face's, a static layer without a window does; it counts on the device, so the host waits for nothing.
    """
    if cache.offloading or layer_index >= len(cache.layers):
        return None
    layer = cache.layers[layer_index]
    if isinstance(layer, _RoomyLayer):
        return layer.next_room() if layer.is_initialized else None
    if type(layer) is StaticLayer and layer.is_initialized:
        return Room(layer.keys, layer.values, layer.cumulative_length, layer.cumulative_length)
    return None
