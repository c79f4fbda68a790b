"""safetensors -> this rank's slices, on its device. Reads the bytes of the shard and no others, never a full copy.

The files are read with `preadv`, straight into the parameter where its memory is the CPU's, in the order of the file
and of the stored dtype, else through a small staging buffer. Pre-flight has validated every offset: nothing is parsed.
Mapping the file instead (`safe_open(...).get_slice()`) took four times as long for row slices and as long for column
slices, and left the touched pages in the rank's resident memory (measured on two CPU cores, file in the page cache).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from .plan import Plan
from .preflight import Checkpoint, TensorEntry
from .shard import Copy, copies

STORED_DTYPE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Of a staging buffer: it stays in the core's cache. With 32 MiB, reading whole rows took ten times as long.
STAGING_BYTES = 1 << 20
# Runs shorter than this, in rows no longer than a page, are read with their rows: a system call for each takes longer.
SHORT_RUN_BYTES, PAGE_BYTES = 512, 4096


@dataclass(frozen=True)
class _Read:
    """Row i of `rows`, a matrix of any strides, lies in the file at `offset` + i * `pitch`."""

    entry: TensorEntry
    rows: torch.Tensor
    offset: int
    pitch: int


def read_shards(
    checkpoint: Checkpoint,
    plan: Plan,
    rank: int,
    targets: Mapping[str, torch.Tensor],
    *,
    num_threads: int = 1,
    on_read: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Fills this rank's part of every parameter.

    Args:
        checkpoint: validated by `preflight.check_checkpoint`.
        targets: parameter name -> this rank's part of it, of the plan's local shape, on any device, in any float dtype.
        num_threads: reads at a time.
        on_read: told the bytes of the targets that each finished read has filled; called from the reading threads.

    Raises:
        OSError: a file cannot be read, or it was cut after it was checked; the message names file and tensor.
    """
    reads: list[_Read] = []
    for name in plan.names():
        parameter, target = plan.parameter(name), targets[name]
        shape = parameter.local_shape(rank)
        assert tuple(target.shape) == shape, (name, tuple(target.shape), shape)
        filled = 0
        for source in checkpoint.sources(name, parameter.shape):
            for copy in copies(parameter, rank, source):
                part = target[copy.local_index]
                reads += _reads(checkpoint.tensors[source.name], copy, part)
                filled += part.numel()
        assert filled == target.numel(), f"{name}: {filled} of {target.numel()} elements have a source"

    reads.sort(key=lambda read: (read.entry.file, read.offset))
    with ExitStack() as stack:
        descriptors = {}
        for file in {read.entry.file for read in reads}:
            descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptors[file])

        def execute(read: _Read) -> None:
            try:
                _fill(descriptors[read.entry.file], read)
            except OSError as error:
                raise OSError(f"{read.entry.file}, tensor {read.entry.name!r}: {error.strerror or error}") from None
            on_read(read.rows.nbytes)

        pool = stack.enter_context(ThreadPoolExecutor(num_threads))
        for _ in pool.map(execute, reads):
            pass


def _reads(entry: TensorEntry, copy: Copy, target: torch.Tensor) -> Iterator[_Read]:
    """The reads of one slice of a stored tensor: one for each matrix of it."""
    if copy.transposed:
        target = target.transpose(-1, -2)  # into the order of the file
    item_bytes = STORED_DTYPE[entry.dtype].itemsize
    missing = 3 - len(entry.shape)
    _, num_rows, num_columns = (1,) * missing + entry.shape
    starts = [s.indices(size)[0] for s, size in zip(copy.stored_index, entry.shape, strict=True)]
    first, row, column = [0] * missing + starts
    for i, rows in enumerate(target[(None,) * missing]):
        position = ((first + i) * num_rows + row) * num_columns + column
        yield _Read(entry, rows, entry.start + position * item_bytes, num_columns * item_bytes)


def _fill(descriptor: int, read: _Read) -> None:
    """Executes one read."""
    rows, dtype, offset = read.rows, STORED_DTYPE[read.entry.dtype], read.offset
    if rows.device.type == "cpu" and rows.dtype == dtype and rows.stride(1) == 1:
        _read_rows(descriptor, rows, offset, read.pitch)
        return
    height = max(1, STAGING_BYTES // (rows.shape[1] * dtype.itemsize))
    for part in rows.split(height):
        staging = torch.empty(part.shape, dtype=dtype)
        _read_rows(descriptor, staging, offset, read.pitch)
        part.copy_(staging)
        offset += height * read.pitch


def _read_rows(descriptor: int, rows: torch.Tensor, offset: int, pitch: int) -> None:
    """File bytes at offset, offset + pitch, ... into the rows of a CPU matrix whose columns are adjacent."""
    out = rows.view(torch.uint8).numpy()
    count, run = out.shape
    if count == 1 or (pitch == run and rows.is_contiguous()):
        _read_exactly(descriptor, memoryview(out.reshape(-1)), offset)
    elif run < SHORT_RUN_BYTES and pitch <= PAGE_BYTES:
        height = max(1, STAGING_BYTES // pitch)
        for low in range(0, count, height):
            part = out[low : low + height]
            whole = torch.empty(len(part), pitch, dtype=torch.uint8).numpy()
            last = (len(part) - 1) * pitch + run
            _read_exactly(descriptor, memoryview(whole.reshape(-1))[:last], offset + low * pitch)
            part[:] = whole[:, :run]
    else:
        for i in range(count):
            _read_exactly(descriptor, memoryview(out[i]), offset + i * pitch)


def _read_exactly(descriptor: int, buffer: memoryview, offset: int) -> None:
    while len(buffer):
        num_bytes = os.preadv(descriptor, [buffer], offset)
        if num_bytes == 0:
            raise OSError(f"it ends {len(buffer)} bytes early, at byte {offset}: it was cut after it was checked")
        buffer, offset = buffer[num_bytes:], offset + num_bytes
