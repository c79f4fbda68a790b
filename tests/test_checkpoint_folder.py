"""Finding a checkpoint's folder, its links, its sums, and the Hub, of which nothing is really asked here."""

from __future__ import annotations

import hashlib
import importlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoints import INDEX, LLAMA, SHARD_1, write_checkpoint

from tp_runtime.checkpoint_folder import resolve, verify_sums
from tp_runtime.preflight import check_checkpoint


def test_every_flipped_bit_is_found_by_its_sum(tmp_path):
    """C10. Catches a file that verify_sums does not read to its end."""
    folder = write_checkpoint(tmp_path, LLAMA, sharded=False)
    files = ["config.json", "model.safetensors"]
    sums = "".join(f"{hashlib.sha256((folder / file).read_bytes()).hexdigest()}  {file}\n" for file in files)
    (folder / "SHA256SUMS").write_text(sums)
    verify_sums(folder)
    rng = random.Random(0)
    for i in range(20):
        file = folder / files[i % 2]
        good = file.read_bytes()
        at = rng.randrange(len(good))
        file.write_bytes(good[:at] + bytes([good[at] ^ 1 << rng.randrange(8)]) + good[at + 1 :])
        for check in (verify_sums, check_checkpoint):
            with pytest.raises(ValueError, match=f"{file.name} is damaged"):
                check(folder)
        file.write_bytes(good)
    check_checkpoint(folder)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="holds no SHA256SUMS"):
        verify_sums(folder)


def test_resolve_folders_and_demos(tmp_path, monkeypatch):
    """Catches a typing error in a path that is taken for a Hub id and answered with a network error."""
    demo = tmp_path / "demo"
    write_checkpoint(demo / "llama", LLAMA)
    monkeypatch.setattr("tp_runtime.checkpoint_folder.DEMO", demo)
    monkeypatch.setattr("tp_runtime.preflight.DEMO", demo)
    assert resolve("demo:llama") == demo / "llama"
    assert check_checkpoint(resolve("demo:llama")).name == "demo:llama"
    assert resolve(tmp_path) == tmp_path
    for name, message in {
        "demo:gpt": "'demo:gpt' is no embedded demo; choose one of: demo:llama",
        "demo:../demo/llama": "is no embedded demo",
        str(tmp_path / "no"): "is neither a folder nor a Hub id",
        "./no": "is neither a folder nor a Hub id",
        "~/no": "is neither a folder nor a Hub id",
        "a/b/c": "is neither a folder nor a Hub id",
        "org/na\nme": "is neither a folder nor a Hub id",
        "": "is neither a folder nor a Hub id",
        str(demo / "llama" / "config.json"): "is a file; give the folder",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            resolve(name)
        assert str(caught.value).isprintable()
    with pytest.raises(ValueError, match="revision 'main' chooses a version of a Hub repository"):
        resolve(tmp_path, revision="main")


TOKEN = "hf_plantedplantedplantedplantedplanted"


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("GatedRepoError", "is gated"),
        ("RepositoryNotFoundError", "is neither a folder nor a repository of the Hub"),
        ("RevisionNotFoundError", "has no revision 'v9'"),
        ("LocalEntryNotFoundError", "out of reach or switched off"),
        ("HfHubHTTPError", "cannot be fetched from the Hub (HfHubHTTPError)"),
    ],
)
def test_errors_of_the_hub_become_one_line_without_the_token(monkeypatch, kind, reason):
    """S2. Catches a request's text, which may quote the token, in the message or in a chained traceback."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    error = getattr(importlib.import_module("huggingface_hub.errors"), kind)
    error = error.__new__(error, f"401 for https://...\nAuthorization: Bearer {TOKEN}")

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError) as caught:
        resolve("org/name", revision="v9")
    message = str(caught.value)
    assert message.startswith("'org/name' ") and reason in message and message.isprintable() and TOKEN not in message
    assert caught.value.__cause__ is None and caught.value.__context__ is None


def test_the_hub_is_asked_for_safetensors_only(monkeypatch, tmp_path):
    """Catches pickles, a second copy of the weights, or any weights for a plan in the download."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def snapshot_download(*args, **options) -> str:
        asked.update(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    files = ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt", SHARD_1, INDEX, "chat_template.jinja"]
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/x.safetensors", "model.gguf", "modeling_x.py"]

    def fetched() -> set[str]:
        patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
        return set(filter_repo_objects(files + others, **patterns))

    assert resolve("org/name") == tmp_path
    assert fetched() == set(files) and asked["local_files_only"] is False
    resolve("org/name", download=False, weights=False)
    assert fetched() == {"config.json"} and asked["local_files_only"] is True


def test_offline_hub_gives_one_line(tmp_path):
    """The real huggingface_hub, switched off, with an empty cache and a planted token."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
    script = """
import sys
from tp_runtime.checkpoint_folder import resolve
for download in (True, False):
    try:
        resolve("org/name", download=download)
    except ValueError as error:
        print(error)
print({"torch", "transformers"} & set(sys.modules))
"""
    pytest.importorskip("huggingface_hub")
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=root, env=environment)
    line = "'org/name' is neither a folder nor whole in the Hub's cache, and the Hub is out of reach or switched off"
    assert (done.returncode, done.stdout.splitlines()) == (0, [line, line, "set()"]), done.stderr
    assert TOKEN not in done.stderr and done.stderr == ""
