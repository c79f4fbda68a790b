"""Which kernel runs a shape on this device, as it was measured there: a table that `python -m bench.tune` writes.

    lookup("gemm", x, n, k, m)  ->  {"kernel": "decode", "block_n": 64, ..., "us": 9.1, "torch_us": 12.6},
                                    {"kernel": "torch", ...} where torch was faster, None where nobody measured.

A row belongs to an op, a dtype, N, K and a bucket of M: the next power of two, at which it was measured. All M above
`LARGEST_BUCKET` share one bucket: there every choice fills the chip. Without a row the caller runs torch, and one log
line for each op and N x K names the command that measures it. Nothing is ever measured here, so none of it can happen
inside a CUDA graph.

Rows come from the user's file, `$XDG_CACHE_HOME/tp_runtime/tuned/<device>.json` (or under ~/.cache), else from the file
of that name in `tuned_tables/` beside this one. A file that cannot be one is ignored with one log line.

**Triton versions.** Another compiler makes another kernel. A row is used from the Triton minor version that measured it
on, until a later one measures the shape again: what an old compiler compiles, a new one does; the reverse is not so. A
file keeps the rows of several versions side by side.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

TORCH = "torch"  # the kernel of a row that says: torch is faster here
LARGEST_BUCKET = 8192
SHIPPED = Path(__file__).parent / "tuned_tables"

Row = dict[str, Any]
Candidates = Mapping[str, Sequence[Any]]  # kernel -> its configurations, NamedTuples

_log = logging.getLogger("tp_runtime")
_lock = threading.Lock()
_chosen: dict[tuple, Row | None] = {}  # what `lookup` answered
_tables: dict[str, dict[Key, Row]] = {}  # device -> its rows, as read once
_told: set[tuple] = set()


class Key(NamedTuple):
    """What a row was measured for."""

    op: str
    dtype: str
    n: int
    k: int
    m: int  # bucket


def bucket(m: int) -> int:
    """M's place in the table: the next power of two, at most LARGEST_BUCKET."""
    return min(1 << max(m - 1, 0).bit_length(), LARGEST_BUCKET)


def lookup(op: str, x: torch.Tensor, n: int, k: int, m: int, candidates: Candidates | None = None) -> Row | None:
    """The row of this shape on x's device in x's dtype. Under a microsecond; files are read once a device.

    Args:
        x: any tensor of the call: its device and dtype count.
        candidates: the op's kernels and their configurations. With it, the row of a kernel holds its configuration
            under "config", ready to launch; a row that names none of them (another version's) counts as none.

    Returns:
        The row, the same object at each call, "kernel" in it; None where nobody measured: run torch.
    """
    asked = (op, x.get_device(), x.dtype, n, k, (m - 1).bit_length())
    try:
        return _chosen[asked]
    except KeyError:
        with _lock:
            row = _choose(device_name(asked[1]), Key(op, dtype_name(x.dtype), n, k, bucket(m)), candidates)
            _chosen[asked] = row
        return row


def forget() -> None:
    """Read the files again at the next lookup."""
    with _lock:
        for known in (_chosen, _tables, _told):
            known.clear()


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def device_name(index: int) -> str:
    """The name that the driver gives CUDA device `index`; `cpu` for -1."""
    return torch.cuda.get_device_name(index) if index >= 0 else "cpu"


def triton_minor() -> str:
    """`3.7` for Triton 3.7.1."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def user_file(device: str) -> Path | None:
    """Where this user's rows for a device lie; None for a user without a home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(cache if os.path.isabs(cache) else os.path.expanduser("~/.cache"))
    return folder / "tp_runtime" / "tuned" / _file_name(device) if folder.is_absolute() else None


def shipped_file(device: str) -> Path:
    """Where this version's own rows for a device lie, if it has any."""
    return SHIPPED / _file_name(device)


def _file_name(device: str) -> str:
    """`nvidia-h200.json` for NVIDIA H200."""
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def table(device: str) -> dict[Key, Row]:
    """A device's rows for this Triton, the user's over the shipped ones; a file that is no table is ignored."""
    rows: dict[Key, Row] = {}
    for file in (shipped_file(device), user_file(device)):
        try:
            rows |= usable(read_rows(file, device)) if file else {}
        except (OSError, ValueError) as error:
            _log.warning("tuned kernels: %s is ignored: %s", file, error)
    return rows


def usable(rows: Iterable[Row], minor: str | None = None) -> dict[Key, Row]:
    """Of each shape's rows the one of the latest Triton that is not after `minor`; None: the Triton that runs here."""
    limit = _as_numbers(minor or triton_minor())
    admitted = [row for row in rows if _as_numbers(row["triton"]) <= limit]
    return {key_of(row): row for row in sorted(admitted, key=lambda row: _as_numbers(row["triton"]))}


def key_of(row: Row) -> Key:
    return Key(*(row[field] for field in Key._fields))


def config_of(row: Row, candidates: Candidates) -> Any:
    """The candidate that a row names; None where it is none of them."""
    configs = candidates.get(row["kernel"], ())
    return next((config for config in configs if config._asdict().items() <= row.items()), None)


def _choose(device: str, key: Key, candidates: Candidates | None) -> Row | None:
    if device not in _tables:
        _tables[device] = table(device)
    row, why = _tables[device].get(key), "is not tuned"
    if row is not None and candidates is not None and row["kernel"] != TORCH:
        config = config_of(row, candidates)
        row = None if config is None else {**row, "config": config}
        why = "was tuned for kernels of another version"
    if row is None and (device, *key[:4]) not in _told:
        _told.add((device, *key[:4]))
        text = "%s %dx%d, %s, M=%d %s on %s: torch runs it; in a checkout, `python -m bench.tune %s` measures it"
        shape = f"--op {key.op} --shape {key.n}x{key.k} --dtype {key.dtype}"
        _log.warning(text, key.op, key.n, key.k, key.dtype, key.m, why, device, shape)
    return row


def _as_numbers(minor: str) -> tuple[int, ...]:
    return tuple(map(int, minor.split(".")))


def read_rows(file: Path, device: str) -> list[Row]:
    """The rows of a table, of all Triton versions; none where there is no file.

    Raises:
        ValueError: the file is no such table, or another device's.
    """
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    rows = content.get("rows") if isinstance(content, dict) and content.get("device") == device else None
    if not isinstance(rows, list):
        raise ValueError(f"it is not a table of tuned kernels for {device}")
    for row in rows:
        _check(row)
    return rows


def _check(row: Any) -> None:
    """Raise ValueError unless a row says what it was measured for, by which Triton, and which kernel to take."""
    kinds = {**dict.fromkeys(("op", "dtype", "kernel", "triton"), str), **dict.fromkeys(("n", "k", "m"), int)}
    is_row = isinstance(row, dict) and all(type(row.get(name)) is kind for name, kind in kinds.items())
    if not is_row or not re.fullmatch(r"\d{1,4}\.\d{1,4}", row["triton"]):
        raise ValueError(f"it holds a row that is none: {row!r:.200}")


def save_rows(file: Path, device: str, rows: Sequence[Row]) -> None:
    """Merge rows into a table: a row replaces the one of the same shape and Triton. Any number of processes may.

    Who reads meanwhile sees the file as it was before or as it is after.

    Raises:
        ValueError: what lies there is no table of this device (it is left as it is), or a row is none.
    """
    for row in rows:
        _check(row)
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed, or the process ends
        merged = {(*key_of(row), row["triton"]): row for row in [*read_rows(file, device), *rows]}
        lines = ",\n".join(json.dumps(merged[key]) for key in sorted(merged))
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        with os.fdopen(descriptor, "w") as out:
            out.write(f'{{"device": {json.dumps(device)}, "rows": [\n{lines}\n]}}\n')
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    finally:
        os.close(folder)
