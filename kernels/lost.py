"""What kernels have lost: a kernel cannot raise, and nobody waits for it, so it leaves the host a note.

    kind        a token is lost that                     then
    expert      is given an expert that does not exist   its row is NaN
    position    has no place in the cache                its key and value are written nowhere

The kernel that reads the indices notes the first such token of a call in memory of the host (`lost_note`), from a CUDA
graph as well. There `raise_lost` finds it at no cost, once the device has come so far: in the next call of such an op,
or where the next token is sampled.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

NO_SUCH_EXPERT = "expert {value}: there are experts 0 to {last}"
NO_SUCH_PLACE = "outside of a cache of {count} tokens: make it larger (max_cache_len)"
_TOLD = {
    "expert": f"token {{token}} is given {NO_SUCH_EXPERT}. That was an earlier call on {{device}}; its row is NaN",
    "position": f"position {{value}} is {NO_SUCH_PLACE}. That was token {{token}} of an earlier call on {{device}}; "
    "its key and value are lost",
}


class _Notes(NamedTuple):
    words: dict[str, torch.Tensor]  # int64 [3] of each kind, for kernels
    seen: ctypes.Array  # the same memory, all of it: a tensor takes the host a microsecond to read


_notes: dict[torch.device, _Notes] = {}


def lost_note(device: torch.device, kind: str) -> torch.Tensor:
    """int64 [3] in the host's memory, which the device writes by itself: of the first lost token of a call its number
    + 1, its expert or position, and how many there are of those. None of them is ever 0 where it is written (expert 0
    and position 0 exist), so 0 is what has not arrived yet, in whatever order they arrive.

    Raises:
        RuntimeError: it is the device's first, and the stream is being captured, when no memory can be pinned.
    """
    if device not in _notes:
        is_cuda = device.type == "cuda"
        if is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a kernel that notes what it loses runs once outside a CUDA graph before it is captured")
        with torch.inference_mode(False):  # what is made within it cannot be written outside
            words = torch.zeros(len(_TOLD), 3, dtype=torch.int64, pin_memory=is_cuda)
        seen = (ctypes.c_int64 * words.numel()).from_address(words.data_ptr())
        _notes.setdefault(device, _Notes(dict(zip(_TOLD, words)), seen))
    return _notes[device].words[kind]


def raise_lost(device: torch.device) -> None:
    """Raise where a kernel of an earlier call on `device` has lost a token, and forget it.

    Waits for nothing: what the device has not come to yet, a later call finds.

    Raises:
        ValueError: names the token, its place in that call, and its expert or position.
    """
    notes = _notes.get(device)
    if notes is None:
        return
    for kind, first in _PLACES:
        if notes.seen[first]:
            token, value, count = notes.seen[first : first + 3]
            if value and count:
                for word in (2, 1, 0):  # while the first stands no kernel writes another
                    notes.seen[first + word] = 0
                told = {"token": token - 1, "value": value, "count": count, "last": count - 1, "device": device}
                raise ValueError(_TOLD[kind].format(**told))


_PLACES = tuple(zip(_TOLD, range(0, 3 * len(_TOLD), 3)))  # kind, its first word
