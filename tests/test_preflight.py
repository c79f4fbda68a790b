"""Pre-flight: good checkpoints pass in milliseconds, each fault of a board gives one line, torch stays unimported."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
from tiny_checkpoints import (
    CONFIG,
    GRANITEMOE,
    INDEX,
    K_PROJ,
    LLAMA,
    LLAMA4,
    MIXTRAL,
    OLMOE,
    Q_PROJ,
    QWEN2_MOE,
    QWEN3_MOE,
    SHARD_1,
    SHARD_2,
    SHARDS,
    edit_header,
    edit_index,
    edit_json,
    header_of,
    shapes_of,
    write_checkpoint,
    write_file,
)

from tp_runtime import preflight
from tp_runtime.preflight import check_checkpoint, check_config, check_device, check_prompt_tokens, check_tp_size

SPARSE = (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GRANITEMOE, LLAMA4)

# Times are the process's own, so that a busy machine fails no test.


@pytest.fixture(autouse=True)
def alarm():
    """Whoever opens the FIFO of a fault is interrupted instead of waiting for ever."""

    def ring(signum, frame):
        raise TimeoutError("a check waits for something")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


# -- good checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    "config, experts",
    [
        (LLAMA, "-"),
        ({**LLAMA, "tie_word_embeddings": True}, "-"),
        *((config, experts) for config in SPARSE for experts in ("published", "packed", "transposed")),
    ],
)
def test_good_checkpoints_pass_whole(tmp_path, config, experts, sharded):
    """Catches a layout of experts that is refused, and sources that leave a stored tensor unread or read it twice."""
    shapes = shapes_of(config, experts)
    checkpoint = check_checkpoint(write_checkpoint(tmp_path, config, shapes, sharded=sharded))
    assert {name: entry.shape for name, entry in checkpoint.tensors.items()} == shapes
    assert (checkpoint.unused, checkpoint.dtype, checkpoint.name) == ((), "bfloat16", tmp_path.name)
    if experts == "transposed":
        name = next(name for name in shapes if "1" in name and name.endswith("experts.gate_up_proj"))
        (source,) = checkpoint.sources(name, (shapes[name][0], shapes[name][2], shapes[name][1]))
        assert source.transposed and source.shape == shapes[name]


def test_entries_point_at_the_bytes(tmp_path):
    """Catches offsets that forget the eight bytes or the header before the data: every weight would be shifted."""
    check = check_checkpoint(write_checkpoint(tmp_path, LLAMA, sharded=False))
    file = tmp_path / "model.safetensors"
    entries = sorted(check.tensors.values(), key=lambda entry: entry.start)
    assert entries[0].start == 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert entries[-1].stop == file.stat().st_size and {entry.file for entry in entries} == {file.resolve()}


def test_both_layouts_at_once(tmp_path):
    """Catches a choice other than transformers' own, model.safetensors: the two would load different weights."""
    write_checkpoint(tmp_path, LLAMA)
    write_checkpoint(tmp_path, LLAMA, sharded=False)
    assert {entry.file.name for entry in check_checkpoint(tmp_path).tensors.values()} == {"model.safetensors"}


def test_extra_tensors_are_named_not_refused(tmp_path):
    """Old checkpoints store rotary_emb.inv_freq; a tied one may store lm_head.weight all the same."""
    extra = {**shapes_of(LLAMA), "model.layers.0.self_attn.rotary_emb.inv_freq": (2,)}
    checkpoint = check_checkpoint(write_checkpoint(tmp_path, {**LLAMA, "tie_word_embeddings": True}, extra))
    assert checkpoint.unused == ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq")


@pytest.mark.parametrize("named", ["dtype", "torch_dtype", None])
def test_dtype_is_the_configs_else_the_stored(tmp_path, named):
    config = {key: value for key, value in LLAMA.items() if key != "torch_dtype"}
    if named:
        config[named] = "torch.float32"
    checkpoint = check_checkpoint(write_checkpoint(tmp_path, config, dtype="F16"))
    assert checkpoint.dtype == ("float32" if named else "float16")


def test_config_alone_needs_no_weights(tmp_path):
    """A plan is made before anything is downloaded."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "auto_map": {"AutoModelForCausalLM": "modeling.X"}}))
    (tmp_path / "generation_config.json").write_text('{"do_sample": true}')
    checkpoint = check_checkpoint(tmp_path, tensors=False)
    assert (checkpoint.model_type, checkpoint.tensors) == ("llama", {})
    assert checkpoint.generation_config == {"do_sample": True}


@pytest.mark.parametrize("shared", [False, True])
def test_links_of_the_hub_cache_are_followed(tmp_path, shared):
    """The Hub's cache links to blobs beside the snapshots; since huggingface_hub 2, from there to a shared store."""
    repository = tmp_path / "models--org--tiny"
    folder = write_checkpoint(repository / "snapshots" / "0123abc", LLAMA)
    blobs, store = repository / "blobs", tmp_path / "blobs" / "ab"
    blobs.mkdir()
    store.mkdir(parents=True)
    for file in list(folder.iterdir()):
        file.rename((store if shared else blobs) / file.name)
        if shared:
            (blobs / file.name).symlink_to(f"../../blobs/ab/{file.name}")
        file.symlink_to(f"../../blobs/{file.name}")
    checkpoint = check_checkpoint(folder)
    assert checkpoint.name == "org/tiny"
    assert {entry.file.parent for entry in checkpoint.tensors.values()} == {(store if shared else blobs).resolve()}


def least_cpu_seconds(work) -> float:
    """Of this thread, the least of three runs: a garbage collection of the whole suite's objects falls into one."""
    seconds = []
    for _ in range(3):
        start = time.thread_time()
        work()
        seconds.append(time.thread_time() - start)
    return min(seconds)


def test_a_large_checkpoint_takes_milliseconds(tmp_path):
    """Catches mapped or read data, and work per tensor that grows: 30 shards of 140 GB, 723 tensors, sparse on disk."""
    config = {**CONFIG, "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80}
    config.update(num_attention_heads=64, num_key_value_heads=8, vocab_size=128256)
    shapes = shapes_of(config)
    names, weight_map = list(shapes), {}
    assert len(names) == 723
    try:
        for shard in range(30):
            part = names[shard::30]
            write_file(tmp_path / f"{shard}.safetensors", header_of({name: shapes[name] for name in part}))
            weight_map |= dict.fromkeys(part, f"{shard}.safetensors")
    except OSError:
        pytest.skip("this file system has no sparse files of gigabytes")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert least_cpu_seconds(lambda: check_checkpoint(tmp_path)) < 0.25  # 0.02 s when the machine is idle
    assert len(check_checkpoint(tmp_path).tensors) == 723


# -- the fault board --------------------------------------------------------------------------------------------------
# row and name -> what is done to a good llama in two shards, and what the one line must contain


def truncated(num_bytes: int):
    return lambda folder: os.truncate(folder / SHARD_2, num_bytes)


def longer(num_bytes: int):
    return lambda folder: os.truncate(folder / SHARD_2, os.path.getsize(folder / SHARD_2) + num_bytes)


def header_length(num_bytes: int):
    def fault(folder: Path) -> None:
        with open(folder / SHARD_2, "r+b") as stream:
            stream.write(num_bytes.to_bytes(8, "little"))

    return fault


def header_text(text: bytes):
    return lambda folder: (folder / SHARD_2).write_bytes(len(text).to_bytes(8, "little") + text)


def header(change):
    return lambda folder: edit_header(folder / SHARD_2, change)


def entry(name: str, **values):
    return header(lambda entries: entries[name].update(values))


def moved(name: str, num_bytes: int):
    """The tensor's bytes, shifted: it overlaps one neighbour and leaves a gap to the other."""

    def shift(entries: dict) -> None:
        entries[name]["data_offsets"] = [offset + num_bytes for offset in entries[name]["data_offsets"]]

    return header(shift)


def without_tensor(name: str):
    """The tensor is in neither header nor data nor index, all of them consistent."""

    def fault(folder: Path) -> None:
        write_checkpoint(folder, LLAMA, {n: shape for n, shape in shapes_of(LLAMA).items() if n != name})

    return fault


def with_tensor(name: str, shape: tuple[int, ...], dtype: str = "BF16"):
    """One tensor has another shape or dtype, all else is consistent."""

    def fault(folder: Path) -> None:
        header = header_of({**shapes_of(LLAMA), name: shape}, **{name: dtype})
        write_file(folder / "model.safetensors", header)

    return fault


def config_values(**values):
    return lambda folder: edit_json(folder / "config.json", **values)


def text(name: str, content: str | bytes):
    content = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(content)


def placed(place: object):
    """Where the index says that lm_head.weight is; `...`: nowhere."""
    return lambda folder: edit_index(folder, **{"lm_head.weight": place})


def gone(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def instead(name: str, make):
    """The file is gone, and something else, which `make(folder, file)` makes, stands in its place."""
    return lambda folder: ((folder / name).unlink(), make(folder, folder / name))


def relative_link(folder: Path, file: Path) -> None:
    file.symlink_to(os.path.relpath(outside(folder), folder))


def outside(folder: Path) -> Path:
    """A FIFO beside the checkpoint: whoever opens it waits for ever."""
    fifo = folder.parent / "outside.safetensors"
    if not fifo.exists():
        os.mkfifo(fifo)
    return fifo


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def pickled(name: str):
    def fault(folder: Path) -> None:
        gone(*SHARDS, INDEX)(folder)
        (folder / name).write_bytes(pickle.dumps(Canary(folder / "canary")))

    return fault


def sums(name: str):
    """SHA256SUMS of every file; that of `name` is wrong."""

    def fault(folder: Path) -> None:
        found = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir() if f.is_file()}
        found[name] = hashlib.sha256(b"").hexdigest()
        (folder / "SHA256SUMS").write_text("".join(f"{digest}  {file}\n" for file, digest in found.items()))

    return fault


def rope(**values):
    return config_values(rope_parameters=values)


NOT_JSON = "is not usable JSON"
FAULTS = {
    "C1 last byte gone": (longer(-1), SHARD_2, "bytes, its header describes", "cut off"),
    "C1 one byte more": (longer(1), SHARD_2, "bytes, its header describes", "too long"),
    "C2 100 bytes": (truncated(100), SHARD_2, "has 100 bytes", "header alone claims", "cut off"),
    "C2 empty": (truncated(0), SHARD_2, "has 0 bytes"),
    "C2 git lfs pointer": (text(SHARD_2, "version https://git-lfs.github.com/spec/v1\noid"), SHARD_2, "git lfs pull"),
    "C3 header of 2**40": (header_length(2**40), SHARD_2, str(2**40)),
    "C3 header of 2**64": (header_length(2**64 - 1), SHARD_2, str(2**64 - 1)),
    "C3 header of 0": (header_length(0), SHARD_2, "does not start with a safetensors header"),
    "C3 header cut": (header_length(50), SHARD_2, NOT_JSON),
    "C4 overlap": (moved(Q_PROJ, -32), SHARD_2, Q_PROJ, "overlap"),
    "C4 gap": (moved(Q_PROJ, 32), SHARD_2, Q_PROJ, "a gap"),
    "C4 two tensors on the same bytes": (header(lambda h: h.update({"copy": h[Q_PROJ]})), SHARD_2, "overlap"),
    "C4 too few bytes": (entry(Q_PROJ, shape=[16, 15]), SHARD_2, Q_PROJ, "(16, 15) in BF16 takes 480 bytes, not those"),
    "C4 negative offset": (entry(Q_PROJ, data_offsets=[-4, 508]), SHARD_2, Q_PROJ, "are not two offsets"),
    "C4 offsets back to front": (entry(Q_PROJ, data_offsets=[512, 0]), SHARD_2, Q_PROJ),
    "C4 three offsets": (entry(Q_PROJ, data_offsets=[0, 512, 512]), SHARD_2, Q_PROJ, "are not two offsets"),
    "C4 offset 1.0": (entry(Q_PROJ, data_offsets=[0.0, 512]), SHARD_2, Q_PROJ, "are not two offsets"),
    "C4 offset true": (entry(Q_PROJ, data_offsets=[True, 513]), SHARD_2, Q_PROJ, "are not two offsets"),
    "C4 shape of 2**62": (entry(Q_PROJ, shape=[2**62, 4]), SHARD_2, Q_PROJ, "is not a shape"),
    "C4 40 dimensions": (entry(Q_PROJ, shape=[1] * 40), SHARD_2, Q_PROJ, "is not a shape"),
    "C4 no shape": (entry(Q_PROJ, shape=None), SHARD_2, Q_PROJ, "is not a shape"),
    "C4 unknown dtype": (entry(Q_PROJ, dtype="Q4_K\n"), SHARD_2, Q_PROJ, r"'Q4_K\n'", "BF16"),
    "C4 an entry that is a list": (header(lambda h: h.update({Q_PROJ: []})), SHARD_2, Q_PROJ),
    "C4 metadata of numbers": (header(lambda h: h.update(__metadata__={"a": 1})), SHARD_2, "__metadata__"),
    "C4 a name twice": (header_text(b'{"a": {}, "a": {}}'), SHARD_2, NOT_JSON, "'a' is given twice"),
    "C4 not UTF-8": (header_text(b'{"\xff": {}}'), SHARD_2, NOT_JSON),
    "C5 shard missing": (gone(SHARD_2), SHARD_2, INDEX, "missing", "download"),
    "C5 shard is a folder": (instead(SHARD_2, lambda folder, file: file.mkdir()), SHARD_2, "missing"),
    "C5 tensor missing": (without_tensor(Q_PROJ), Q_PROJ, "config.json", "download"),
    "C5 lm_head missing": (without_tensor("lm_head.weight"), "'lm_head.weight'", "config.json"),
    "C5 index entry missing": (placed(...), INDEX, "does not name 'lm_head.weight'", SHARD_2),
    "C5 shard without the tensor": (placed(SHARD_1), SHARD_1, "lacks 'lm_head.weight'", INDEX),
    "C5 index without weight_map": (text(INDEX, "{}"), INDEX, "no weight_map"),
    "C5 empty weight_map": (text(INDEX, '{"weight_map": {}}'), INDEX, "no weight_map"),
    "C5 weight_map to a number": (placed(2), INDEX, "no weight_map"),
    "C5 malformed index": (text(INDEX, '{"weight_map": {'), INDEX, NOT_JSON),
    "C5 no weights": (gone(*SHARDS, INDEX), "holds neither model.safetensors nor", INDEX),
    "C6 transposed": (with_tensor(K_PROJ, (16, 8)), "model.safetensors", K_PROJ, "(16, 8)", "(8, 16)"),
    "C6 other vocabulary": (config_values(vocab_size=21), "model.embed_tokens.weight", "(20, 16)", "(21, 16)"),
    "C6 more layers": (config_values(num_hidden_layers=3), "'model.layers.2.input_layernorm.weight'"),
    "C6 int8": (with_tensor(K_PROJ, (8, 16), "I8"), "model.safetensors", K_PROJ, "I8", "BF16, F16, F32"),
    "C6 float64": (with_tensor(K_PROJ, (8, 16), "F64"), "model.safetensors", K_PROJ, "F64", "BF16, F16, F32"),
    "C7 dot dot": (lambda f: placed(f"../{outside(f).name}")(f), INDEX, "'../outside.safetensors'", "does not lie in"),
    "C7 absolute": (lambda f: placed(str(outside(f)))(f), INDEX, "outside.safetensors", "does not lie in"),
    "C7 link": (instead(SHARD_2, lambda f, file: file.symlink_to(outside(f))), INDEX, SHARD_2, "does not lie in"),
    "C7 relative link": (instead(SHARD_2, relative_link), INDEX, SHARD_2, "does not lie in"),
    "C7 folder": (placed("sub/model.safetensors"), INDEX, "does not lie in"),
    "C7 dot": (placed("."), INDEX, "does not lie in"),
    "C7 empty name": (placed(""), INDEX, "does not lie in"),
    "C7 null byte": (placed("a\0b"), INDEX, r"a\x00b", "does not lie in"),
    "C7 half a surrogate": (placed("\ud800"), INDEX, r"\ud800", "does not lie in"),
    "C7 name of 9999 letters": (placed("a" * 9999), INDEX, "does not lie in"),
    "C7 config is a link": (instead("config.json", relative_link), "config.json", "does not lie in"),
    "C7 link to itself": (instead(SHARD_2, lambda f, file: file.symlink_to(file)), SHARD_2, "missing"),
    "C7 a fifo inside": (instead(SHARD_2, lambda f, file: os.mkfifo(file)), SHARD_2, "missing"),
    "C8 nested lists": (header_text(b'{"a":' + b"[" * 400_000), SHARD_2, NOT_JSON, "nested too deeply"),
    "C8 nested config": (text("config.json", '{"a":' * 100_000), "config.json", NOT_JSON, "nested too deeply"),
    "C8 long config": (text("config.json", b" " * 1_000_001), "config.json", "longer than 1000000 bytes"),
    "C10 a flipped bit": (sums(SHARD_1), SHARD_1, "is damaged", hashlib.sha256(b"").hexdigest()),
    "C10 a file that is not there": (sums("tokenizer.json"), "SHA256SUMS", "tokenizer.json"),
    "C10 sums that are none": (text("SHA256SUMS", "hello\n"), "SHA256SUMS", "'hello'"),
    "C10 sums of files outside": (text("SHA256SUMS", f"{'0' * 64}  ../outside.safetensors\n"), "does not lie in"),
    "C11 pickle": (pickled("pytorch_model.bin"), "'pytorch_model.bin'", "pickle", "save_pretrained"),
    "C11 pickle .pth": (pickled("consolidated.00.pth"), "'consolidated.00.pth'", "pickle"),
    "config missing": (gone("config.json"), "holds no config.json"),
    "config is a list": (text("config.json", "[1]"), "config.json", "list instead of object"),
    "config is empty": (text("config.json", ""), "config.json", NOT_JSON),
    "config with NaN": (text("config.json", '{"rms_norm_eps": NaN}'), "config.json", "NaN is not a finite number"),
    "config with 1e999": (text("config.json", '{"rms_norm_eps": 1e999}'), "1e999 is not a finite number"),
    "config with a name twice": (text("config.json", '{"a": 1, "a": 2}'), "config.json", "'a' is given twice"),
    "config of another family": (config_values(model_type="gpt2"), "config.json", "'gpt2'", "llama, mistral, mixtral"),
    "config without family": (config_values(model_type=...), "config.json", "not supported; supported: llama"),
    "config with a list for a family": (config_values(model_type=["llama"]), "config.json", "not supported"),
    "quantised": (config_values(quantization_config={"quant_method": "gptq"}), "'gptq'", "not supported yet"),
    "no hidden_size": (config_values(hidden_size=...), "config.json", "hidden_size is missing"),
    "hidden_size null": (config_values(hidden_size=None), "config.json", "hidden_size is missing"),
    "hidden_size 16.0": (config_values(hidden_size=16.0), "hidden_size is 16.0", "a whole number from 1"),
    "vocab_size true": (config_values(vocab_size=True), "vocab_size is True", "a whole number from 1"),
    "num_hidden_layers 0": (config_values(num_hidden_layers=0), "num_hidden_layers is 0", "from 1 to 4096"),
    "num_hidden_layers 10**9": (config_values(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "num_attention_heads -4": (config_values(num_attention_heads=-4), "num_attention_heads is -4"),
    "heads 4, kv heads 3": (config_values(num_key_value_heads=3), "num_attention_heads=4", "num_key_value_heads=3"),
    "hidden 16, heads 6": (config_values(num_attention_heads=6), "hidden_size=16", "num_attention_heads=6"),
    "head_dim 5": (config_values(head_dim=5), "head_dim=5 is not even"),
    "rms_norm_eps 1": (config_values(rms_norm_eps=1), "rms_norm_eps is 1;", "a decimal number from 0 to 1"),
    "mlp_bias null": (config_values(mlp_bias=None), "mlp_bias is None", "true or false"),
    "dtype {}": (config_values(dtype={}), "dtype '{}' is not supported"),
    "tie_word_embeddings 'no'": (config_values(tie_word_embeddings="no"), "must be true or false"),
    "rms_norm_eps '1e-5'": (config_values(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'", "a decimal number"),
    "dtype float64": (config_values(torch_dtype="float64"), "dtype 'float64'", "bfloat16, float16, float32"),
    "hidden_act sily": (config_values(hidden_act="sily"), "hidden_act 'sily'", "silu"),
    "layer_types of 1": (config_values(layer_types=["full_attention"]), "layer_types", "num_hidden_layers=2"),
    "layer_types odd": (config_values(layer_types=["full_attention", {}]), "layer type {}", "sliding_attention"),
    "mlp_only_layers 1": (config_values(mlp_only_layers=1), "mlp_only_layers 1"),
    "pad_token_id 20": (config_values(pad_token_id=20), "pad_token_id is 20", "vocabulary of 20"),
    "eos_token_id 'x'": (config_values(eos_token_id=["x"]), "eos_token_id is ['x']"),
    "rope is a number": (config_values(rope_scaling=8), "rope_parameters 8 is not an object"),
    "rope_type unknown": (rope(rope_type="spiral"), "rope_type 'spiral'", "llama3"),
    "rope without factor": (rope(rope_type="yarn"), "rope_type 'yarn' needs factor"),
    "rope factor -1": (rope(rope_type="linear", factor=-1), "factor is -1", "a number from"),
    "generation_config malformed": (text("generation_config.json", "{"), "generation_config.json", NOT_JSON),
}  # fmt: skip


def refusal(folder: Path) -> str:
    """The one line with which the checkpoint is refused."""
    with pytest.raises(ValueError) as caught:
        check_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable() and len(message) < 700
    return message


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_gives_one_line_in_half_a_second(tmp_path, fault):
    """Catches a fault that passes, hangs, raises something else, or is reported without file, values or remedy."""
    folder = write_checkpoint(tmp_path / "model", LLAMA)
    break_it, *parts = FAULTS[fault]
    break_it(folder)
    message = refusal(folder)
    assert least_cpu_seconds(lambda: refusal(folder)) < 0.5
    assert [part for part in parts if part not in message] == [], message
    assert str(folder) in message


@pytest.mark.parametrize("experts", ["published", "packed"])
def test_a_missing_expert_is_named(tmp_path, experts):
    """Catches random experts: an absent one must be named by what is stored, or would be."""
    shapes = shapes_of(MIXTRAL, experts)
    one = "block_sparse_moe.experts.2.w3.weight" if experts == "published" else "mlp.experts.down_proj"
    del shapes[f"model.layers.1.{one}"]
    assert f"model.layers.1.{one}" in refusal(write_checkpoint(tmp_path, MIXTRAL, shapes))
    with_too_many = {**MIXTRAL, "num_experts_per_tok": 4}
    assert "num_experts_per_tok=4 exceeds the 3 experts" in refusal(write_checkpoint(tmp_path, with_too_many))


@pytest.mark.parametrize(
    "config, change, message",
    [
        (
            OLMOE,
            {"head_dim": 8},
            "num_attention_heads=4 of head_dim=8 are 32 wide, the norm of all heads hidden_size=16",
        ),
        (OLMOE, {"clip_qkv": 0}, "clip_qkv is 0; it must be a number from"),
        (GRANITEMOE, {"logits_scaling": 0.0}, "logits_scaling is 0.0; it must be a number from"),
        (GRANITEMOE, {"residual_multiplier": None}, "residual_multiplier is None"),
        (QWEN2_MOE, {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0"),
        (QWEN2_MOE, {"hidden_act": "relu"}, "hidden_act of experts 'relu' is not supported; supported: silu"),
        (QWEN2_MOE, {"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
        (LLAMA4, {"moe_layers": 1}, "moe_layers 1 is not a list of whole numbers"),
        (LLAMA4, {"no_rope_layers": [1]}, "no_rope_layers [1] says nothing of some of 2 layers"),
        (LLAMA4, {"attention_chunk_size": None}, "attention_chunk_size is None"),
        (LLAMA4, {"layer_types": ["sliding_attention"] * 2}, "layer type 'sliding_attention' is not supported"),
        (LLAMA4, {"model_type": "llama4"}, "model type 'llama4' is not supported"),
    ],
)
def test_configs_of_experts_that_make_no_sense(config, change, message):
    """Catches a width, a norm or a layer list with which transformers fails in some layer, or gives something else."""
    check_config(config)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_config({**config, **change})


def blanks(file: Path) -> None:
    file.write_bytes((100_000_000).to_bytes(8, "little") + b"{" + b" " * 99_999_999)


def many_entries(file: Path) -> None:
    body = ",".join([f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1_200_000)])
    file.write_bytes((len(body) + 2).to_bytes(8, "little") + b"{" + body.encode() + b"}")


def short_of_25_mb(file: Path) -> None:
    file.write_bytes((24_900_000).to_bytes(8, "little") + b"{" + b" " * 24_899_999)


def small_objects(file: Path) -> None:
    text = b'{"a":[' + b"{}," * 160_000 + b"{}]}"
    file.write_bytes(len(text).to_bytes(8, "little") + text)


def padded_shards(file: Path) -> None:
    """Each header would do by itself."""
    for shard in SHARDS:
        content = (file.parent / shard).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = content[8:end] + b" " * 300_000
        (file.parent / shard).write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def index_entries(file: Path) -> None:
    weight_map = {f"t{i}": "model-00001-of-00002.safetensors" for i in range(400_000)}
    (file.parent / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("bomb", [blanks, many_entries, short_of_25_mb, small_objects, padded_shards, index_entries])
def test_header_bombs_cost_little(tmp_path, bomb):
    """C8. Catches a header or index that is read or parsed before its size is compared with what the model needs."""
    folder = write_checkpoint(tmp_path, LLAMA)
    bomb(folder / SHARD_2)
    seconds = least_cpu_seconds(lambda: refusal(folder))
    tracemalloc.start()
    refusal(folder)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 0.5 and peak_bytes < 50e6


def mutated(text: bytes, rng: random.Random) -> bytes:
    """A flipped bit, a cut, a deleted key or a changed value."""
    kind = rng.choice(["flip", "flip", "cut", "delete", "change", "change"])
    if kind == "flip":
        at = rng.randrange(len(text))
        return text[:at] + bytes([text[at] ^ 1 << rng.randrange(8)]) + text[at + 1 :]
    if kind == "cut":
        return text[: rng.randrange(len(text))]
    value = json.loads(text)
    inner = value
    while True:
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if not isinstance(inner[key], (dict, list)) or not inner[key] or rng.random() < 0.2:
            break
        inner = inner[key]
    if kind == "delete":
        del inner[key]
    else:
        odd = [None, True, "", "x", [], {}, 0, -1, 1, 7, 10**6, 2**40, 2**70, 0.5, 1e300, [[]], ["a"], {"a": 1}]
        inner[key] = rng.choice(odd)
    return json.dumps(value).encode()


@pytest.mark.parametrize("config", [LLAMA, *SPARSE], ids=lambda config: config["model_type"])
@pytest.mark.parametrize("what", ["config.json", INDEX, SHARD_2])
def test_mutations_give_one_line_or_the_same_tensors(tmp_path, config, what):
    """C12 in small. Catches any exception but a one-line ValueError, and a broken header that is believed."""
    folder = write_checkpoint(tmp_path, config)
    good, content = check_checkpoint(folder), (folder / what).read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    rng, num_refused = random.Random(f"{config['model_type']} {what}"), 0
    for _ in range(100):
        if what == SHARD_2:
            header = mutated(content[8 : 8 + header_bytes], rng)
            change = len(header).to_bytes(8, "little") + header + content[8 + header_bytes :]
        else:
            change = mutated(content, rng)
        (folder / what).write_bytes(change)
        try:
            checkpoint = check_checkpoint(folder)
        except ValueError as error:
            assert type(error) is ValueError and str(error).isprintable(), change
            num_refused += 1
        else:
            stored = {name: (entry.dtype, entry.shape) for name, entry in checkpoint.tensors.items()}
            used = {name: stored.get(name) for name in good.tensors if name not in checkpoint.unused}
            assert what == "config.json" or used == {n: (e.dtype, e.shape) for n, e in good.tensors.items()}, change
    assert num_refused >= 50


def test_torch_is_not_imported_and_nothing_outside_is_opened(tmp_path):
    """Catches a check that needs a second of imports, and C7 and C11: the board runs with every open() recorded."""
    script = f"""
import sys
from pathlib import Path
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
import test_preflight as board
from tp_runtime.preflight import check_checkpoint, count_gpus, check_device
root = Path({str(tmp_path)!r})
check_checkpoint(board.write_checkpoint(root / "good", board.LLAMA))
check_device("auto", 1)
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
for number, (break_it, *_) in enumerate(board.FAULTS.values()):
    folder = board.write_checkpoint(root / str(number) / "model", board.LLAMA)
    break_it(folder)
    opened.clear()
    try:
        check_checkpoint(folder)
        raise SystemExit(f"fault {{number}} passed")
    except ValueError:
        stray = [file for file in opened if Path(file).resolve().parent != folder.resolve()]
        pickles = [file for file in opened if file.endswith((".bin", ".pth"))]
        assert not stray and not pickles, (number, stray, pickles)
    assert not (folder / "canary").exists()
print({{"torch", "transformers", "safetensors", "numpy"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp_size", [0, -1, 9, 10**30, 2.0, True, "2", None])
def test_tp_size_is_one_to_the_query_heads(tp_size):
    config = {**LLAMA, "num_attention_heads": 8}
    for good in range(1, 9):
        check_tp_size(config, good)
    with pytest.raises(ValueError, match=re.escape(f"tp_size={tp_size!r} ") + ".*; choose 1 to 8$"):
        check_tp_size(config, tp_size)


@pytest.mark.parametrize(
    "rope, context",
    [
        ({}, 64),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 128),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32}}, 128),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
            64,
        ),
        ({"max_position_embeddings": ...}, None),
    ],
)
def test_prompts_fit_the_context(rope, context):
    """Catches an off-by-one at the last position, and a stretched context that is taken for the short one."""
    config = {key: value for key, value in {**LLAMA, **rope}.items() if value is not ...}
    check_config(config)
    check_prompt_tokens(1, config)
    with pytest.raises(ValueError, match="the prompt is empty"):
        check_prompt_tokens(0, config)
    check_prompt_tokens(context or 10**9, config)
    if context:
        with pytest.raises(ValueError, match=f"has {context + 1} tokens, the model's context {context}; shorten"):
            check_prompt_tokens(context + 1, config)
        check_prompt_tokens(context - 3, config, max_new_tokens=3)
        with pytest.raises(ValueError, match=f"max_new_tokens=4 exceed .* of {context}; choose max_new_tokens up to 3"):
            check_prompt_tokens(context - 3, config, max_new_tokens=4)


UUIDS = ["GPU-5ecb5a3c-1111-4222-8333-0123456789ab", "GPU-77aa0000-1111-4222-8333-0123456789ab"]


@pytest.fixture
def gpus(tmp_path, monkeypatch):
    """A function that makes this machine look as if it had so many GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(preflight, "_torch_has_cuda", lambda: True)

    def pretend(devices: int, proc: int = 0):
        for folder in ("dev", "proc"):
            monkeypatch.setattr(preflight, {"dev": "DEVICES", "proc": "PROC_GPUS"}[folder], tmp_path / folder)
            (tmp_path / folder).mkdir(exist_ok=True)
        for name in [f"nvidia{i}" for i in range(devices)] + ["nvidiactl", "nvidia-uvm", "null"]:
            (tmp_path / "dev" / name).touch()
        for i in range(proc):
            (tmp_path / "proc" / f"0000:0{i}:00.0").mkdir()
            (tmp_path / "proc" / f"0000:0{i}:00.0" / "information").write_text(f"Model: X\nGPU UUID: \t {UUIDS[i]}\n")

    return pretend


def test_gpus_are_counted_from_the_drivers_files(gpus):
    """Catches nvidiactl counted as a GPU, and a machine whose driver shows its GPUs under /proc alone."""
    gpus(0)
    assert preflight.count_gpus() == 0
    gpus(0, proc=2)
    assert preflight.count_gpus() == 2
    gpus(3)
    assert preflight.count_gpus() == 3


@pytest.mark.parametrize(
    "visible, count",
    [
        *{"0": 1, "1,0": 2, "0, 1": 2, "0,1,2,3": 2, "0,5,1": 1, "0,-1,1": 1, "0,x,1": 1, "1x": 1}.items(),
        *{"": 0, "-1": 0, "NoDevFiles": 0, "7": 0, "0,0": 0, " ": 0}.items(),
        *{UUIDS[0]: 1, "GPU-5ecb": 1, f"{UUIDS[1]},{UUIDS[0]}": 2, f"{UUIDS[1]},GPU-0,{UUIDS[0]}": 1}.items(),
        *{"GPU-dead": 0, "MIG-1": 1, "MIG-1,MIG-2": 1}.items(),
    ],
)
def test_cuda_visible_devices_as_cuda_reads_it(gpus, monkeypatch, visible, count):
    """Catches words after the first invalid one being counted: CUDA stops there."""
    gpus(2, proc=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert preflight.count_gpus() == count


def test_device(gpus, monkeypatch, caplog):
    """R14. Catches a silent fall to the CPU where GPUs are too few, and CUDA asked for where there is none."""
    gpus(0)
    assert (check_device("auto", 2), check_device("cpu", 99)) == ("cpu", "cpu")
    with pytest.raises(ValueError, match="device cuda, but no GPU is visible here; choose --device cpu"):
        check_device("cuda", 1)
    with pytest.raises(ValueError, match="device 'tpu' is not supported; choose auto, cpu or cuda"):
        check_device("tpu", 1)
    gpus(2)
    assert [check_device(device, 2) for device in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    for device in ("auto", "cuda"):
        with pytest.raises(ValueError, match="3 ranks .* visible are 2; choose --tp 2 or --device cpu"):
            check_device(device, 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check_device("auto", 3) == "cpu"
    with pytest.raises(ValueError, match="no GPU is visible here through CUDA_VISIBLE_DEVICES=''"):
        check_device("cuda", 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(preflight, "_torch_has_cuda", lambda: False)
    with pytest.raises(ValueError, match="torch is built without CUDA"):
        check_device("cuda", 1)
    assert check_device("auto", 1) == "cpu" and "built without CUDA" in caplog.text


def test_torch_build_is_read_without_importing_torch():
    """Catches another form of torch's version file."""
    torch = pytest.importorskip("torch")
    assert preflight._torch_has_cuda() == (torch.version.cuda is not None)
