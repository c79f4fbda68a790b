"""How a kernel leaves a note: read `lost` first."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_read(note_ptr):
    """Whether the host has read what was noted before; if not, that stays."""
    return tl.load(note_ptr, volatile=True) == 0


@triton.jit
def note(note_ptr, token, value, count):
    """For `lost_note`, by one program: the first lost token of a call."""
    tl.store(note_ptr + 2, tl.cast(count, tl.int64))
    tl.store(note_ptr + 1, tl.cast(value, tl.int64))
    tl.store(note_ptr, tl.cast(token + 1, tl.int64))
