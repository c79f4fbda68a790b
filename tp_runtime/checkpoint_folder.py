"""The folder of a checkpoint: where it is, which files are its own, and the JSON in them. Standard library alone.

A file is opened only when its real path lies in the checkpoint: nothing that a name or a link in a checkpoint points at
outside is ever touched.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DEMO = Path(__file__).parent / "demo"
SUMS = "SHA256SUMS"


def resolve(
    path_or_id: str | os.PathLike, revision: str | None = None, download: bool = True, weights: bool = True
) -> Path:
    """The folder of a checkpoint: a folder, `demo:llama` or `demo:mixtral`, or a Hub id, fetched into the Hub's cache.

    Args:
        revision: branch, tag or commit of a Hub id.
        download: False: take what the Hub's cache holds and ask no network.
        weights: False: fetch the two configs alone, all that a plan needs.

    Raises:
        ValueError: it is none of these, or the Hub does not have it or cannot be reached.
    """
    name = os.fspath(path_or_id)
    if name.startswith("demo:"):
        demos = {f"demo:{config.parent.name}": config.parent for config in sorted(DEMO.glob("*/config.json"))}
        if name not in demos:
            raise ValueError(f"{name!r} is no embedded demo; choose one of: {', '.join(demos)}")
        return demos[name]
    if os.path.isdir(name):
        if revision:
            raise ValueError(f"revision {revision!r} chooses a version of a Hub repository, but {name!r} is a folder")
        return Path(name)
    if os.path.exists(name):
        raise ValueError(f"{name!r} is a file; give the folder that holds config.json and the safetensors files")
    if not re.fullmatch(r"(\w[\w.-]{0,95}/)?\w[\w.-]{0,95}", name, re.ASCII) or ".." in name or "--" in name:
        raise ValueError(f"{name!r} is neither a folder nor a Hub id such as 'mistralai/Mistral-7B-v0.1'")
    return _snapshot(name, revision, download, weights)


def _snapshot(repo_id: str, revision: str | None, download: bool, weights: bool) -> Path:
    """The folder of a Hub repository in the local cache, filled where `download` says so."""
    from huggingface_hub import errors, snapshot_download

    configs = ["config.json", "generation_config.json"]
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            local_files_only=not download,
            allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"] if weights else configs,
            # Some repositories hold their weights a second time, as `consolidated` or in a folder of their own.
            ignore_patterns=["consolidated*", "*/*"],
        )
    except errors.GatedRepoError:
        reason = "is gated: ask for access on its page, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "is neither a folder nor a repository of the Hub; correct it, or log in if it is private"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision!r} on the Hub; choose one that it has, or none"
    except errors.LocalEntryNotFoundError:
        reason = "is neither a folder nor whole in the Hub's cache, and the Hub is out of reach or switched off"
    except Exception as error:
        # Its text may quote the request's headers, the token among them: only the kind of error is passed on.
        reason = f"cannot be fetched from the Hub ({type(error).__name__}); try again, or give a folder"
    else:
        return Path(folder)
    raise ValueError(f"{repo_id!r} {reason}")


def hub_repository(folder: Path) -> Path | None:
    """The repository's place in the Hub's cache where `folder`, a real path, is a snapshot there; else None."""
    is_snapshot = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    return folder.parents[1] if is_snapshot else None


def file_in(folder: Path, name: str, named_by: str) -> Path | None:
    """The real path of a checkpoint's file, None where there is no such file. It is not opened.

    In the Hub's cache a file links to the repository's `blobs`, and from there perhaps to the cache's own `blobs`.

    Raises:
        ValueError: `name` leads out of the checkpoint, by itself or through a link; `named_by` says where it stands.
    """
    is_plain = re.fullmatch(r"[^/\\]{1,255}", name) and name not in (".", "..") and name.isprintable()
    root = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(root / name)) if is_plain else None
    repository = hub_repository(root)
    allowed = (root, repository / "blobs", repository.parent / "blobs") if repository else (root,)
    if real is None or not any(real.is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{named_by} names {name!r:.200}, which does not lie in {folder} and is not opened; "
            "put the file itself there"
        )
    return real if os.path.isfile(real) else None


@contextmanager
def reading(label: object) -> Iterator[None]:
    """Turn an OSError of the block into a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{label} cannot be read: {error.strerror}") from None


def read_json(folder: Path, name: str, max_bytes: int) -> dict | None:
    """The object in a checkpoint's JSON file, None where there is no such file.

    Raises:
        ValueError: it cannot be read, is longer than `max_bytes`, or is not what `parse_json` accepts.
    """
    file = file_in(folder, name, "the checkpoint")
    if file is None:
        return None
    with reading(folder / name), open(file, "rb") as stream:
        text = stream.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise ValueError(f"{folder / name} is longer than {max_bytes} bytes: it is corrupt or another model's")
    return parse_json(text, str(folder / name))


def parse_json(text: bytes, label: str) -> dict:
    """The JSON object in `text`, more strictly than the standard library: no name twice, no NaN, no infinity.

    Raises:
        ValueError: it is anything else; the message begins with `label`.
    """
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_names_once, parse_constant=_finite, parse_float=_finite
        )
    except RecursionError:
        raise ValueError(f"{label} is not usable JSON: it is nested too deeply; download it again") from None
    except ValueError as error:
        raise ValueError(f"{label} is not usable JSON: {error}; correct it or download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{label} is not usable JSON: {type(value).__name__} instead of object; download it again")
    return value


def _names_once(pairs: list[tuple[str, object]]) -> dict:
    """The object of these pairs; ValueError where a name comes twice, of which readers take either."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r:.200} is given twice")
    return values


def _finite(word: str) -> float:
    """The number that `word` spells; ValueError where it is NaN or beyond a float."""
    if not math.isfinite(float(word)):
        raise ValueError(f"{word:.40} is not a finite number")
    return float(word)


def verify_sums(path: str | os.PathLike) -> None:
    """Compare every file that the folder's SHA256SUMS lists with its SHA-256; reads them whole.

    Raises:
        ValueError: there is no SHA256SUMS, a line is not one of `sha256sum`, or a file is missing or has another sum.
    """
    for file, label, expected in listed_sums(Path(path)):
        digest = hashlib.sha256()
        with reading(label), open(file, "rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
        if digest.hexdigest() != expected:
            raise ValueError(
                f"{label} is damaged: its SHA-256 is {digest.hexdigest()}, {SUMS} says {expected}; "
                "install or copy it again"
            )


def listed_sums(folder: Path) -> list[tuple[Path, Path, str]]:
    """What SHA256SUMS lists: real path of the file, its path in the folder, its SHA-256."""
    sums = file_in(folder, SUMS, "the checkpoint")
    if sums is None:
        raise ValueError(f"{folder} holds no {SUMS}")
    with reading(folder / SUMS):
        lines = sums.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    listed = []
    for line in lines:
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        file = match and file_in(folder, match[2], SUMS)
        if not match or not file:
            raise ValueError(f"{folder / SUMS}: {line!r:.200} is not the sum of a file here; install or copy it again")
        listed.append((file, folder / match[2], match[1]))
    return listed
