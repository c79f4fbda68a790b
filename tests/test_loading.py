"""A loaded model says what the saved one says, on every rank, whatever the files are like; a rank reads its part alone.

Ranks are threads, except in the last test.
"""

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gloo_ranks import run_gloo
from safetensors.torch import save_file
from tiny_models import CASES, EVERY_SIZE, TOLERANCE, answers, one_thread, reference, tiny  # noqa: F401 (a fixture)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    Llama4Config,
    Llama4ForConditionalGeneration,
)

import tp_runtime
from tp_runtime.comm import NullCommunicator
from tp_runtime.config import RuntimeConfig
from tp_runtime.loading import load_checkpoint
from tp_runtime.patching import local_views
from tp_runtime.preflight import check_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

SINGLE, SHARDED = "5GB", "150KB"  # largest file


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory) -> Callable[..., Path]:
    """(name, max_shard_size) -> folder of the checkpoint as Hugging Face writes it, written once."""
    folders: dict[tuple[str, str], Path] = {}
    writing = threading.Lock()  # ranks that are threads ask too

    def folder_of(name: str, max_shard_size: str = SHARDED) -> Path:
        with writing:
            if (name, max_shard_size) not in folders:
                folder = tmp_path_factory.mktemp("checkpoint")
                reference(name).model.save_pretrained(folder, max_shard_size=max_shard_size)
                folders[name, max_shard_size] = folder
            return folders[name, max_shard_size]

    return folder_of


def hf_model(folder: Path, dtype: torch.dtype = torch.float32):
    """The unsharded model, by Hugging Face."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


def loaded(comm, folder: Path, **config) -> torch.nn.Module:
    return tp_runtime.load(folder, comm, RuntimeConfig(**config))


def error_of(fn, *args) -> str:
    """What the ValueError of fn(*args) says."""
    with pytest.raises(ValueError) as error:
        fn(*args)
    return str(error.value)


def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


# Every other size for every other case: whoever reads its slices wrongly at one size does so in more than one case.
@pytest.mark.halved
@pytest.mark.parametrize(
    "name, tp_size",
    [
        pytest.param(name, n, marks=pytest.mark.slow if n in (1, 4) else ())
        for i, name in enumerate(CASES)
        for n in EVERY_SIZE[i % 2 :: 2]
    ],
)
def test_logits_and_greedy_tokens_are_those_of_the_saved_model(name, tp_size, folder_of):
    """Catches slices of another rank's rows, experts in another order, frequencies and rows that nobody filled."""
    whole = reference(name)
    folder = folder_of(name, SHARDED if tp_size % 2 else SINGLE)
    assert len(list(folder.glob("*.safetensors"))) > 2 * (tp_size % 2)
    ranks = tp_runtime.run_local(lambda comm: answers(loaded(comm, folder), whole.ids), tp_size)
    for logits, tokens in ranks:
        assert torch.equal(logits, ranks[0][0])
        assert (logits - whole.logits).abs().max() <= TOLERANCE
        assert torch.equal(tokens, whole.tokens)


def write_packed(name: str, folder: Path, transposed: bool) -> None:
    """A layer's experts in two tensors, [E, 2I, H] and [E, H, I]; transposed: the last two dimensions swapped."""
    model = reference(name).model
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    if transposed:
        state |= {key: value.transpose(1, 2).contiguous() for key, value in state.items() if value.dim() == 3}
    model.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tp_size", EVERY_SIZE)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "name", ["mixtral-14/2", "mixtral-400", "qwen3_moe-dense-first", "granitemoe-14/2", "llama4_text-9/3"]
)
def test_packed_experts_in_both_layouts(name, transposed, tp_size, tmp_path):
    """Catches gate and up read as one block, and a transposed tensor that is read row by row."""
    whole = reference(name)
    write_packed(name, tmp_path, transposed)
    for logits in tp_runtime.run_local(lambda comm: logits_of(loaded(comm, tmp_path), whole.ids), tp_size):
        assert (logits - whole.logits).abs().max() <= TOLERANCE


def test_the_text_model_of_one_that_also_sees(tmp_path):
    """Catches the published Llama 4 checkpoints, which all hold a vision model too, refused or read by other names."""
    whole = reference("llama4_text-14/2")
    sees = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 28, "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16}
    sizes["projector_output_dim"] = 16
    config = Llama4Config(text_config=whole.model.config.to_dict(), vision_config={**sees, **sizes})
    composite = Llama4ForConditionalGeneration(config).eval()
    composite.language_model.load_state_dict(whole.model.state_dict())
    composite.save_pretrained(tmp_path, max_shard_size=SHARDED)
    assert all("vision" in name or "projector" in name for name in check_checkpoint(tmp_path).unused)
    for logits, tokens in tp_runtime.run_local(lambda comm: answers(loaded(comm, tmp_path), whole.ids), 3):
        assert (logits - whole.logits).abs().max() <= TOLERANCE
        assert torch.equal(tokens, whole.tokens)
    assert tp_runtime.make_plan(config, 3).parameters == tp_runtime.make_plan(tmp_path, 3).parameters


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-9/3", "mixtral-400"])
@pytest.mark.parametrize("tp_size", [1, 3, 5])
def test_each_rank_reads_its_own_bytes(name, tp_size, folder_of):
    """Catches a rank that reads everything and cuts afterwards."""

    def run(comm):
        read: list[int] = []
        model = load_checkpoint(check_checkpoint(folder_of(name)), comm, RuntimeConfig(), on_read=read.append)
        return sum(read), tp_runtime.make_plan(model.config, comm.size).weight_bytes(comm.rank)

    for read, held in tp_runtime.run_local(run, tp_size):
        assert read == held


@pytest.mark.parametrize("name", ["llama-tied", "llama-biased", "mixtral-400", "gemma2-tied", "phi3-9/3"])
def test_nothing_is_left_as_it_was_allocated(name, folder_of):
    """Catches a parameter, a buffer or a row of zeros that is right by the luck of fresh memory."""
    whole = reference(name)

    def run(comm):
        model = loaded(comm, folder_of(name))
        assert not any(t.isnan().any() for t in (*model.parameters(), *model.buffers()))
        return logits_of(model, whole.ids)

    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        assert torch.empty(9).isnan().all()
        for logits in tp_runtime.run_local(run, 3):
            assert (logits - whole.logits).abs().max() <= TOLERANCE
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "stored, wanted", [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "float16"), ("float16", "auto")]
)
def test_dtype_is_the_asked_one_or_the_stored_one(stored, wanted, tmp_path):
    """Catches bytes of one dtype read as another, and frequencies that are rounded with the weights."""
    tiny("llama", dtype=getattr(torch, stored)).save_pretrained(tmp_path)
    dtype = getattr(torch, stored if wanted == "auto" else wanted)
    ids = reference("llama-12/2").ids

    def run(comm):
        model = loaded(comm, tmp_path, dtype=wanted)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert model.model.rotary_emb.rotary_emb.inv_freq.dtype == torch.float32
        ours = logits_of(model, ids)
        tp_runtime.unpatch(model)
        return ours, model

    want = hf_model(tmp_path, dtype)
    for ours, model in tp_runtime.run_local(run, 3):
        assert ours.dtype == dtype and (ours - logits_of(want, ids)).abs().max() <= 32 * torch.finfo(dtype).eps
        assert torch.equal(logits_of(model, ids), logits_of(want, ids))


@pytest.mark.parametrize(
    "name",
    [
        *("llama-biased", "llama-llama3", "llama-yarn", "qwen2-tied", "qwen3-9/3", "mixtral-tied"),
        *("qwen3_moe-dense-first", "gemma2-tied", "gemma3_text-ropes", "granite-9/3", "starcoder2-sliding"),
        *("phi3-tied", "smollm3-9/3", "olmo2-9/3", "cohere-biased"),
    ],
)
def test_unpatch_after_load_gives_the_whole_model(name, folder_of, tmp_path):
    """Catches parameters that stay on meta, and a rotary embedding whose frequencies were never computed."""
    whole = reference(name)

    def run(comm):
        model = loaded(comm, folder_of(name))
        answers(model, whole.ids)
        tp_runtime.unpatch(model)
        if hasattr(model.model.layers[-1].mlp, "experts"):
            model.set_experts_implementation("eager")
        assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
        state, want = model.state_dict(), whole.model.state_dict()
        assert state.keys() == want.keys() and all(torch.equal(state[key], want[key]) for key in want)
        model.save_pretrained(tmp_path / str(comm.rank))
        return answers(model, whole.ids)

    for rank, (logits, tokens) in enumerate(tp_runtime.run_local(run, 3)):
        assert torch.equal(logits, whole.logits) and torch.equal(tokens, whole.tokens)
        check_checkpoint(tmp_path / str(rank))


def on_meta(folder: Path):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()


@pytest.mark.parametrize("name", ["llama-tied", "mixtral-sliding"])
def test_a_model_built_on_meta_is_patched_and_filled(name, folder_of):
    """Catches memory for weights that nobody has read yet, and a second reading that is not allowed."""
    whole, folder = reference(name), folder_of(name)
    models = [on_meta(folder) for _ in range(3)]

    def run(comm):
        model = models[comm.rank]
        tp_runtime.patch(model, comm)
        assert all(parameter.is_meta for parameter in model.parameters())
        tp_runtime.unpatch(model)
        assert all(parameter.is_meta for parameter in model.parameters())
        tp_runtime.patch(model, comm)
        tp_runtime.load_weights(model, folder)
        first = answers(model, whole.ids)
        for view in local_views(model).values():
            view.zero_()
        tp_runtime.load_weights(model, check_checkpoint(folder))
        return first, answers(model, whole.ids)

    for first, second in tp_runtime.run_local(run, 3):
        assert (first[0] - whole.logits).abs().max() <= TOLERANCE and torch.equal(first[1], whole.tokens)
        assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_weights_of_another_model_are_refused(folder_of):
    """Catches a checkpoint that is read by another model's shapes: garbage, or the traceback of an assertion."""
    model = on_meta(folder_of("llama-12/4"))
    other, third = folder_of("llama-12/2"), folder_of("qwen3-12/4")
    assert error_of(tp_runtime.load_weights, model, other).startswith("the model is not patched: call tp_runtime.patch")
    tp_runtime.patch(model, NullCommunicator())
    k_proj, k_norm = (f"model.layers.0.self_attn.{name}.weight" for name in ("k_proj", "k_norm"))
    assert error_of(tp_runtime.load_weights, model, other) == (
        f"{other.name} is a checkpoint of another model: 4 parameters differ, first {k_proj}: "
        "(16, 48) in the checkpoint, (32, 48) in the model"
    )
    message = error_of(tp_runtime.load_weights, model, third)
    assert message.endswith(f"4 parameters differ, first {k_norm}: (8,) in the checkpoint, absent in the model")


def test_what_cannot_be_loaded_is_refused(folder_of):
    """Catches an option that is ignored, and an error that only the first rank finds."""
    errors = tp_runtime.run_local(lambda comm: error_of(tp_runtime.load, Path("/nowhere"), comm), 3)
    assert len(set(errors)) == 1 and "/nowhere" in errors[0]
    message = error_of(tp_runtime.load, folder_of("llama-12/4"), None, RuntimeConfig(device="cuda"))
    assert message == "device='cuda', but the group is on cpu; pass one of that device"


def test_generation_config_of_the_checkpoint_is_the_models(tmp_path):
    """Catches a model that never stops because the checkpoint's eos was left behind."""
    model, ids = reference("llama-12/4").copy(), reference("llama-12/4").ids[:1]
    last = reference("llama-12/4").tokens[0, 11].item()  # the third new token
    model.generation_config = GenerationConfig(eos_token_id=[last], pad_token_id=0, max_new_tokens=6)
    model.save_pretrained(tmp_path)
    assert all(
        out.tolist() == reference("llama-12/4").tokens[:1, :12].tolist()
        for out in tp_runtime.run_local(lambda comm: loaded(comm, tmp_path).generate(ids, do_sample=False), 2)
    )
    (tmp_path / "generation_config.json").unlink()
    assert loaded(NullCommunicator(), tmp_path).generation_config.eos_token_id != [last]


GLOO_CASES = ["llama-yarn", "qwen2-tied", "mixtral-14/2", "qwen3_moe-dense-first"]


def load_and_unpatch(comm) -> dict:
    """Each case loaded from files that rank 0 writes, then unpatched."""
    got = {}
    with tempfile.TemporaryDirectory() as own:
        root = Path(comm.gather_json(own)[0])
        for name in GLOO_CASES:
            if comm.rank == 0:
                reference(name).model.save_pretrained(root / name, max_shard_size=SHARDED)
            comm.barrier()
            model = tp_runtime.load(root / name)
            got[name] = answers(model, reference(name).ids)
            tp_runtime.unpatch(model)
            state, want = model.state_dict(), reference(name).model.state_dict()
            got[name, "whole"] = state.keys() == want.keys() and all(torch.equal(state[key], want[key]) for key in want)
        comm.barrier()
    return got


def test_processes_load_the_saved_model():
    """Catches what threads hide: a default group that is not taken, a rank that waits for files while others read."""
    for rank in run_gloo(load_and_unpatch, 3):
        for name in GLOO_CASES:
            logits, tokens = rank[name]
            assert (logits - reference(name).logits).abs().max() <= TOLERANCE
            assert torch.equal(tokens, reference(name).tokens)
            assert rank[name, "whole"]
