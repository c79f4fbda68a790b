"""Reading slices: real safetensors files, written by safetensors, against slices of the whole tensors cut by torch."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tp_runtime import checkpoint as reading
from tp_runtime.checkpoint import read_shards
from tp_runtime.plan import ParameterPlan, make_plan
from tp_runtime.preflight import check_checkpoint

SMALL = {
    "vocab_size": 53, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 4, "max_position_embeddings": 64, "num_experts_per_tok": 1,
}  # fmt: skip
LLAMA = {**SMALL, "model_type": "llama", "attention_bias": True, "mlp_bias": True}
TIED = {**SMALL, "model_type": "qwen2", "tie_word_embeddings": True}
MIXTRAL = {**SMALL, "model_type": "mixtral", "num_local_experts": 3}
QWEN3_MOE = {**SMALL, "model_type": "qwen3_moe", "num_experts": 2, "moe_intermediate_size": 11, "mlp_only_layers": [1]}
# Rows longer than a page and runs of 512 bytes and more, so that each run is read by itself.
LONG = {**LLAMA, "hidden_size": 516, "intermediate_size": 1302, "head_dim": 256, "num_hidden_layers": 1}
LONG_MIXTRAL = {**MIXTRAL, "hidden_size": 256, "intermediate_size": 1290, "num_hidden_layers": 1}


def write(folder: Path, config: dict, layout: str = "own", dtype=torch.float32, num_files: int = 1) -> dict:
    """Writes a random checkpoint; returns its whole parameters by Hugging Face's names.

    Args:
        layout: of the experts: `one by one`, as published; `own`, packed as in the live model; `transposed`, packed.
    """
    generator = torch.Generator().manual_seed(0)
    plan = make_plan(config, 1, dtype="float32")
    whole = {n: torch.randn(plan.parameter(n).shape, generator=generator).to(dtype) for n in plan.names()}
    stored = {}
    for name, tensor in whole.items():
        if ".experts." in name and layout == "one by one":
            is_mixtral = config["model_type"] == "mixtral"
            prefix = name.rsplit(".", 1)[0].replace(".mlp.", ".block_sparse_moe." if is_mixtral else ".mlp.")
            gate, up, down = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
            for e, expert in enumerate(tensor):
                parts = {down: expert} if name.endswith("down_proj") else dict(zip((gate, up), expert.chunk(2)))
                stored |= {f"{prefix}.{e}.{part}.weight": t.contiguous() for part, t in parts.items()}
        elif ".experts." in name and layout == "transposed":
            stored[name] = tensor.transpose(1, 2).contiguous()
        elif name.endswith(".mlp.gate.weight") and layout == "one by one" and config["model_type"] == "mixtral":
            stored[name.replace(".mlp.", ".block_sparse_moe.")] = tensor
        else:
            stored[name] = tensor
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": str(dtype).removeprefix("torch.")}))
    if num_files == 1:
        save_file(stored, folder / "model.safetensors")
    else:
        files = {name: f"model-{i % num_files}.safetensors" for i, name in enumerate(stored)}
        for file in set(files.values()):
            save_file({name: tensor for name, tensor in stored.items() if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return whole


def part(parameter: ParameterPlan, rank: int, whole: torch.Tensor) -> torch.Tensor:
    dim = parameter.dim or 0
    return torch.cat([whole.narrow(dim, a, b - a) for a, b in parameter.ranges[rank]], dim)


def check(folder: Path, whole: dict, tp_size: int, dtype=torch.float32, **options) -> None:
    """Reads each rank's shard into poisoned memory and compares it, bit for bit; and the bytes that were reported."""
    checkpoint = check_checkpoint(folder)
    plan = make_plan(checkpoint.config, tp_size, dtype=str(dtype).removeprefix("torch."))
    for rank in range(tp_size):
        targets = {n: torch.full(plan.parameter(n).local_shape(rank), torch.nan, dtype=dtype) for n in plan.names()}
        counts = []
        read_shards(checkpoint, plan, rank, targets, on_read=counts.append, **options)
        for name, target in targets.items():
            assert torch.equal(target, part(plan.parameter(name), rank, whole[name]).to(dtype)), (name, rank)
        assert sum(counts) == plan.weight_bytes(rank)


CASES = [(LLAMA, "own"), (TIED, "own"), (MIXTRAL, "one by one"), (MIXTRAL, "own"), (MIXTRAL, "transposed")]
CASES += [(QWEN3_MOE, "one by one"), (QWEN3_MOE, "own"), (QWEN3_MOE, "transposed")]
CASES += [(LONG, "own"), (LONG_MIXTRAL, "one by one"), (LONG_MIXTRAL, "own"), (LONG_MIXTRAL, "transposed")]


@pytest.mark.parametrize("config, layout", CASES, ids=lambda c: c if isinstance(c, str) else c["model_type"])
def test_shards_are_slices(tmp_path, config, layout):
    """Catches a wrong offset or pitch, in every layout, in one file and in three, for short runs and for long ones."""
    for num_files in (1, 3):
        folder = tmp_path / str(num_files)
        whole = write(folder, config, layout, num_files=num_files)
        for tp_size in (1, 2, 5):
            check(folder, whole, tp_size)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_conversion(tmp_path, stored, wanted):
    """Catches bytes taken for another dtype's, and a rounding that is not torch's."""
    whole = write(tmp_path, MIXTRAL, "transposed", stored)
    check(tmp_path, whole, 3, wanted)


@pytest.mark.parametrize("staging_bytes", [1, 100, 5000])
@pytest.mark.parametrize("config, layout", [(LLAMA, "own"), (MIXTRAL, "transposed"), (LONG_MIXTRAL, "one by one")])
def test_staging_in_pieces(tmp_path, monkeypatch, staging_bytes, config, layout):
    """Catches a piece of a staged slice at the wrong place: buffers smaller than a row, than a matrix."""
    monkeypatch.setattr(reading, "STAGING_BYTES", staging_bytes)
    whole = write(tmp_path, config, layout, torch.bfloat16)
    check(tmp_path, whole, 2, torch.bfloat16)
    check(tmp_path, whole, 3, torch.float32)


def test_staging_is_bounded(tmp_path, monkeypatch):
    """Catches a staging buffer as large as the slice: packed experts would be in memory twice."""
    whole = write(tmp_path, LONG_MIXTRAL, "transposed", torch.bfloat16)
    monkeypatch.setattr(reading, "STAGING_BYTES", 1 << 14)
    sizes, empty = [], torch.empty

    def recording_empty(*args, **kwargs):
        sizes.append((out := empty(*args, **kwargs)).nbytes)
        return out

    monkeypatch.setattr(torch, "empty", recording_empty)
    check(tmp_path, whole, 2, torch.float32)
    assert 0 < max(sizes) <= 1 << 14


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL], ids=lambda c: c["model_type"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_strided_targets(tmp_path, config, is_transposed):
    """Catches a target taken for contiguous, whether its rows lie apart or its columns do."""
    whole = write(tmp_path, config)
    checkpoint = check_checkpoint(tmp_path)
    plan = make_plan(checkpoint.config, 2, dtype="float32")
    targets, room = {}, {}
    for name in plan.names():
        *outer, columns = plan.parameter(name).local_shape(1)
        if is_transposed:
            room[name] = torch.full((columns, *outer, 2), torch.nan)
            targets[name] = room[name][..., 1].movedim(0, -1)
        else:
            room[name] = torch.full((*outer, columns + 1), torch.nan)
            targets[name] = room[name][..., 1:]
    read_shards(checkpoint, plan, 1, targets)
    for name, target in targets.items():
        assert torch.equal(target, part(plan.parameter(name), 1, whole[name])), name
        assert room[name][..., 0].isnan().all(), f"written beside {name}"


def test_several_threads(tmp_path):
    """Catches reads that share a buffer or a position: eight threads give the same bits, and all of them work."""
    whole = write(tmp_path, LONG_MIXTRAL, "one by one", torch.bfloat16, num_files=3)
    check(tmp_path, whole, 2, torch.float32, num_threads=8)

    threads = set()
    meeting = threading.Barrier(4, timeout=20)  # broken unless four reads are under way at once

    def on_read(num_bytes):
        if threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            meeting.wait()

    checkpoint = check_checkpoint(tmp_path)
    plan = make_plan(checkpoint.config, 1)
    targets = {n: torch.empty(plan.parameter(n).shape) for n in plan.names()}
    read_shards(checkpoint, plan, 0, targets, num_threads=4, on_read=on_read)
    assert len(threads) == 4


# At tp 12, runs of 440 bytes in rows of 5280.
WIDE = {**LLAMA, "num_attention_heads": 12, "head_dim": 192, "intermediate_size": 2640}


@pytest.mark.parametrize(
    "config, layout, tp_size",
    [(LONG, "own", 2), (LONG_MIXTRAL, "one by one", 2), (LONG_MIXTRAL, "own", 2), (WIDE, "own", 12)],
)
def test_a_rank_reads_its_shard_and_no_more(tmp_path, config, layout, tp_size):
    """Catches a rank that reads whole tensors to keep a slice: what the system handed over, against the plan."""
    write(tmp_path, config, layout, torch.bfloat16, num_files=2)
    checkpoint = check_checkpoint(tmp_path)
    plan = make_plan(checkpoint.config, tp_size)

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    for rank in range(tp_size):
        targets = {n: torch.empty(plan.parameter(n).local_shape(rank), dtype=torch.bfloat16) for n in plan.names()}
        before = bytes_read()
        read_shards(checkpoint, plan, rank, targets)
        own = bytes_read() - before
        assert plan.weight_bytes(rank) <= own <= 1.01 * plan.weight_bytes(rank) + 1000  # 1000: of reading the counter


def test_short_runs_take_few_system_calls(tmp_path, monkeypatch):
    """Catches one call for each row of a narrow slice: a column-cut matrix of short rows is one read."""
    write(tmp_path, LLAMA, dtype=torch.bfloat16)
    checkpoint = check_checkpoint(tmp_path)
    plan = make_plan(checkpoint.config, 2)
    calls, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: calls.append(args) or preadv(*args))
    targets = {n: torch.empty(plan.parameter(n).local_shape(0), dtype=torch.bfloat16) for n in plan.names()}
    read_shards(checkpoint, plan, 0, targets)
    assert len(calls) == len(plan.names())


def test_short_reads_are_continued(tmp_path, monkeypatch):
    """Catches a partial result of the system call taken for all of it: 2 GiB is the most that one call returns."""
    whole = write(tmp_path, MIXTRAL, "one by one", torch.bfloat16)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:7]], offset))
    check(tmp_path, whole, 2, torch.bfloat16)


def test_file_cut_after_the_check(tmp_path):
    """Catches an endless loop, zeros for weights, or an error that names no file."""
    write(tmp_path, LLAMA, num_files=2)
    checkpoint = check_checkpoint(tmp_path)
    plan = make_plan(checkpoint.config, 1, dtype="float32")
    victim = checkpoint.tensors["model.norm.weight"]
    os.truncate(victim.file, victim.stop - 5)
    targets = {n: torch.empty(plan.parameter(n).shape) for n in plan.names()}
    descriptors = len(os.listdir("/proc/self/fd"))
    message = rf"{victim.file}, tensor '.*': it ends \d+ bytes early, .* cut after it was checked"
    with pytest.raises(OSError, match=message):
        read_shards(checkpoint, plan, 0, targets, num_threads=2)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_failing_disk_names_file_and_tensor(tmp_path, monkeypatch):
    """Catches a bare "Input/output error"."""
    write(tmp_path, LLAMA)
    checkpoint = check_checkpoint(tmp_path)
    plan = make_plan(checkpoint.config, 1, dtype="float32")

    def fail(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    targets = {n: torch.empty(plan.parameter(n).shape) for n in plan.names()}
    with pytest.raises(OSError, match=r"model.safetensors, tensor '.*': Input/output error"):
        read_shards(checkpoint, plan, 0, targets)


def test_target_of_another_shape(tmp_path):
    """Catches a slice written into a parameter of another rank's shape."""
    write(tmp_path, LLAMA)
    checkpoint = check_checkpoint(tmp_path)
    plan = make_plan(checkpoint.config, 2, dtype="float32")
    targets = {n: torch.empty(plan.parameter(n).shape) for n in plan.names()}
    with pytest.raises(AssertionError, match="embed_tokens"):
        read_shards(checkpoint, plan, 0, targets)
