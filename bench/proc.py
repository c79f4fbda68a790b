"""What the Linux kernel knows about this process: memory and bytes read."""

from __future__ import annotations

import re
from pathlib import Path

_PROC = Path("/proc/self")


def reset_peak() -> None:
    """The peak of resident memory begins anew, at what is resident now."""
    (_PROC / "clear_refs").write_text("5")


def memory_bytes() -> dict[str, int]:
    """Resident memory: `peak` since `reset_peak`, `now`, and what of now maps no file (`anon`)."""
    fields = dict(re.findall(r"^(\w+):\s+(\d+) kB$", (_PROC / "status").read_text(), re.MULTILINE))
    names = {"peak": "VmHWM", "now": "VmRSS", "anon": "RssAnon"}
    return {name: int(fields[field]) * 1024 for name, field in names.items()}


def read_bytes() -> int:
    """Bytes that read() and its kin have returned so far, from wherever."""
    return int(re.search(r"^rchar: (\d+)$", (_PROC / "io").read_text(), re.MULTILINE)[1])


def mapped_bytes(folder: Path) -> int:
    """Resident bytes of mapped files in `folder`: the pages touched, and neighbours that the kernel maps along."""
    total, is_ours = 0, False
    for line in (_PROC / "smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = str(folder) in line
        elif is_ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total
