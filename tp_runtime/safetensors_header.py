"""The header of a safetensors file, read and checked with the standard library alone; no tensor is read.

    8 bytes     N, the length of the header, little-endian
    N bytes     JSON in UTF-8: {"lm_head.weight": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [0, 64]}, ...}
    the rest    the tensors, back to back; offsets count from here

Everything that the format forbids is refused with the file's name and the bytes that clash, before a reader trusts it.

Source: the format's description in the README of huggingface/safetensors.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from .checkpoint_folder import parse_json

DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}

MAX_HEADER_BYTES = 25_000_000
MAX_DIMENSIONS = 8
MAX_SIZE = 2**48  # of one dimension, and of a file in bytes


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies.

    Args:
        name: its name in the checkpoint.
        file: the real path of its file.
        dtype: safetensors' word, a key of `DTYPE_BYTES`.
        shape: its dimensions.
        start: first byte, counted from the start of the file.
        stop: the byte after its last one.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(file: Path, label: str, max_bytes: int = MAX_HEADER_BYTES) -> tuple[dict[str, TensorEntry], int]:
    """The tensors of a file by name, and the length of its header in bytes.

    Args:
        file: real path of the file.
        label: how messages call it.
        max_bytes: a longer header is refused before it is read.

    Raises:
        ValueError: the file is not a whole, well-formed safetensors file.
        OSError: it cannot be opened or read.
    """
    with open(file, "rb", buffering=0) as stream:
        file_bytes = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        if prefix == b"version ":
            raise ValueError(f"{label} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
        if len(prefix) < 8:
            raise ValueError(f"{label} has {file_bytes} bytes, too few for a safetensors file; download it again")
        header_bytes = int.from_bytes(prefix, "little")
        if 8 + header_bytes > file_bytes:
            raise ValueError(
                f"{label} has {file_bytes} bytes, its header alone claims {header_bytes}: "
                "it is cut off or corrupt; download it again"
            )
        if header_bytes > max_bytes:
            raise ValueError(
                f"{label} has a header of {header_bytes} bytes; this model needs no more than {max_bytes}: "
                "it is corrupt or another model's; download it again"
            )
        text = stream.read(header_bytes)
    if not text.startswith(b"{"):
        raise ValueError(f"{label} does not start with a safetensors header: it is corrupt; download it again")
    header = parse_json(text, f"the header of {label}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{label} has a header whose __metadata__ does not map names to strings; save it again")
    data_start = 8 + header_bytes
    tensors = {name: _entry(name, value, file, label, data_start) for name, value in header.items()}
    _check_back_to_back(tensors, label, data_start, file_bytes)
    return tensors, header_bytes


def _entry(name: str, value: object, file: Path, label: str, data_start: int) -> TensorEntry:
    """One entry of the header, checked by itself."""
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        fault = f"dtype {dtype!r:.40} is not one of {', '.join(DTYPE_BYTES)}"
    elif shape is None or len(shape) > MAX_DIMENSIONS:
        fault = f"{fields.get('shape')!r:.80} is not a shape"
    elif offsets is None or len(offsets) != 2:
        fault = f"{fields.get('data_offsets')!r:.80} are not two offsets"
    elif offsets[1] - offsets[0] != math.prod(shape) * DTYPE_BYTES[dtype]:
        needed = math.prod(shape) * DTYPE_BYTES[dtype]
        fault = f"{shape} in {dtype} takes {needed} bytes, not those from {offsets[0]} to {offsets[1]}"
    else:
        return TensorEntry(name, file, dtype, shape, data_start + offsets[0], data_start + offsets[1])
    raise ValueError(f"{label}, tensor {name!r:.200}: {fault}; the file is corrupt, download it again")


def _sizes(values: object) -> tuple[int, ...] | None:
    """A list of whole numbers from 0 to `MAX_SIZE`; None where it is anything else."""
    if not isinstance(values, list):
        return None
    for value in values:
        if type(value) is not int or not 0 <= value <= MAX_SIZE:
            return None
    return tuple(values)


def _check_back_to_back(tensors: dict[str, TensorEntry], label: str, data_start: int, file_bytes: int) -> None:
    """Raise ValueError unless the tensors fill the file from `data_start` to its end, each byte once."""
    end, previous = data_start, "the header"
    for entry in sorted(tensors.values(), key=lambda entry: (entry.start, entry.stop)):
        if entry.start != end:
            raise ValueError(
                f"{label}: tensor {entry.name!r:.200} starts at byte {entry.start}, {previous} ends at byte {end}: "
                f"{'they overlap' if entry.start < end else 'a gap'}; the file is corrupt, download it again"
            )
        end, previous = entry.stop, f"{entry.name!r:.200}"
    if end != file_bytes:
        raise ValueError(
            f"{label} has {file_bytes} bytes, its header describes {end}: "
            f"it is {'cut off' if file_bytes < end else 'too long'}; download it again"
        )
