"""Heartbeats: what every rank is doing, in memory that the launcher reads without asking the rank.

One anonymous shared mapping, made before the ranks are forked, holds one 64-byte slot (a cache line) per rank. A rank
writes its own slot and nobody else's, with one `pack_into` and no lock or system call: 0.15 us, which the hot path can
afford once per collective. A reader may catch a slot half written: then a message
mixes two moments, and the next look is right again.

    rank       beat("decode", step=57)      enter("all_reduce")        (blocked, or dead, or stopped ...)
    launcher            look()       look()       look()       look()       look() -> still_s[rank] grows
"""

from __future__ import annotations

import mmap
import struct
from typing import NamedTuple

# beats, step, collectives, phase, last collective; native order, so that each number is stored in one piece.
_SLOT = struct.Struct("@QqQ16s24s")

START = "start"  # from the fork until the rank reports another phase
IDLE = "idle"  # waiting for a request: may last for ever
DONE = "done"  # the rank has nothing left to do


class Beat(NamedTuple):
    """One rank's slot as read: the number of beats, then the rank's own words for where it is."""

    beats: int
    step: int
    collectives: int  # entered so far: the sequence number of the last one
    phase: str
    collective: str  # name of the last one entered

    @property
    def resting(self) -> bool:
        """Whether standing still is no hang."""
        return self.phase in (IDLE, DONE)

    @property
    def joined(self) -> bool:
        """Whether the rank has got as far as meeting the others: the rendezvous counts as the first collective."""
        return self.collectives > 0 or self.phase != START

    def __str__(self) -> str:
        last = f"last collective {self.collective} number {self.collectives}"
        return f"{self.phase}, step {self.step}, {last if self.collectives else 'no collective yet'}"


class Heartbeat:
    """The writing end of one rank's slot."""

    def __init__(self, memory: mmap.mmap | bytearray, rank: int):
        self._memory = memory
        self._offset = rank * _SLOT.size
        self._beats = self._step = self._collectives = 0
        self._phase, self._collective = START.encode(), b""
        self._write()

    @classmethod
    def unwatched(cls) -> Heartbeat:
        """A slot that nobody reads, for ranks without a launcher of ours: their code needs no branch."""
        return cls(bytearray(_SLOT.size), 0)

    def beat(self, phase: str | None = None, step: int | None = None) -> None:
        """Says "still making progress"; a new phase (16 bytes of its name are kept) begins at step 0."""
        if phase is not None:
            self._phase, self._step = phase.encode(), 0
        if step is not None:
            self._step = step
        self._write()

    def enter(self, collective: str) -> None:
        """Says "about to call this collective" (24 bytes of its name are kept); the rendezvous is the first."""
        self._collectives += 1
        self._collective = collective.encode()
        self._write()

    def _write(self) -> None:
        self._beats += 1
        _SLOT.pack_into(
            self._memory, self._offset, self._beats, self._step, self._collectives, self._phase, self._collective
        )


class HeartbeatPage:
    """The launcher's side: every rank's slot, and for how long (seconds) each has not changed."""

    # The most that one look adds: a launcher that was itself suspended (Ctrl-Z, a frozen container) must not take the
    # time that it slept through, perhaps together with its ranks, for a hang.
    _LOOK_MAX_S = 1.0

    def __init__(self, world_size: int, now: float):
        self._memory = mmap.mmap(-1, world_size * _SLOT.size)
        self.heartbeats = [Heartbeat(self._memory, rank) for rank in range(world_size)]
        self.beats = [self._read(rank) for rank in range(world_size)]
        self.still_s = [0.0] * world_size
        self._looked_at = now

    def look(self, now: float) -> None:
        """Updates `beats` and `still_s`; call it several times a second with the monotonic time in seconds."""
        elapsed_s = min(now - self._looked_at, self._LOOK_MAX_S)
        self._looked_at = now
        for rank, last in enumerate(self.beats):
            self.beats[rank] = self._read(rank)
            self.still_s[rank] = self.still_s[rank] + elapsed_s if self.beats[rank] == last else 0.0

    def _read(self, rank: int) -> Beat:
        *numbers, phase, collective = _SLOT.unpack_from(self._memory, rank * _SLOT.size)
        return Beat(*numbers, *(text.rstrip(b"\0").decode(errors="replace") for text in (phase, collective)))
