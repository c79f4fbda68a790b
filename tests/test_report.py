"""Estimates against figures that are known, and the report against an example computed by hand."""

import json
import textwrap
from types import SimpleNamespace

import pytest

from tp_runtime.estimate import Device, decode_floor_ms, decode_read_bytes, find_device
from tp_runtime.plan import make_plan
from tp_runtime.report import plan_table, report_line, run_report

LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "dtype": "bfloat16",
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
LLAMA_70B = {
    **LLAMA_8B,
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
MIXTRAL = {**LLAMA_8B, "model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8}
QWEN3_30B = {
    **LLAMA_8B,
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "head_dim": 128,
    "num_key_value_heads": 4, "num_experts": 128, "moe_intermediate_size": 768, "intermediate_size": 6144,
}  # fmt: skip
# Elements of a rank of two: embedding 128, q 32, k 32, v 32, o 32, norms 24, gate 64, up 64, down 64, head 128: 600.
BY_HAND = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "dtype": "float32",
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
H200 = find_device("NVIDIA H200")


# -- estimates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, tp_size, batch, context, floor_ms",
    [
        (LLAMA_8B, 1, 1, 0, 3.13),
        (LLAMA_70B, 2, 1, 0, 14.5),
        (LLAMA_70B, 4, 1, 0, 7.24),
        (LLAMA_70B, 8, 1, 0, 3.62),
        (MIXTRAL, 1, 1, 0, 5.31),
        (MIXTRAL, 2, 1, 0, 2.66),
        (MIXTRAL, 8, 1, 0, 0.66),
        (LLAMA_8B, 1, 1, 1024, 3.15),
        (LLAMA_8B, 1, 16, 1024, 3.6),
        (LLAMA_8B, 1, 64, 1024, 4.9),
        (LLAMA_8B, 8, 1, 1024, 0.39),
        (LLAMA_70B, 8, 1, 1024, 3.63),
        (MIXTRAL, 1, 1, 1024, 5.34),
    ],
)
def test_known_floors_of_an_h200(config, tp_size, batch, context, floor_ms):
    """Catches an embedding table counted as read, all experts at batch 1, a cache forgotten, GB taken for GiB."""
    floor = decode_floor_ms(make_plan(config, tp_size), H200, batch, context, experts_per_token=2)
    decimals = len(str(floor_ms).split(".")[1])
    assert floor == pytest.approx(floor_ms, abs=0.6 * 10**-decimals)


def test_experts_hit_by_a_batch():
    """Catches more experts read than there are, and twice as many for two tokens: they overlap."""
    plan = make_plan(MIXTRAL, 1)
    one, two, many = (decode_read_bytes(plan, 0, batch, 0, experts_per_token=2) for batch in (1, 2, 1000))
    expert = 3 * 4096 * 14336 * 32 * 2  # bytes of one expert, all layers
    row = 4096 * 2  # of the embedding
    assert one == pytest.approx(25.5e9, rel=0.002)  # published: 2 experts
    assert two - one == pytest.approx(1.5 * expert + row, abs=2)  # 2 + 2 of 8: 3.5 different ones on average
    assert many == pytest.approx(one + 6 * expert + 999 * row, abs=2)  # and 93 GB when all are hit
    assert many == pytest.approx(93.2e9, rel=0.002)


def test_read_bytes_by_hand():
    """Catches a tied table that is not read at all: as lm_head it is read whole."""
    plan = make_plan(BY_HAND, 2)
    weights = (600 - 128 + 2 * 8) * 4  # of the embedding, the two rows of the batch
    assert decode_read_bytes(plan, 0, batch=2, context=6.5) == weights + 2 * 6.5 * 32
    assert decode_read_bytes(plan, 0, batch=1000, context=0) == 600 * 4  # rows of the table, at most
    tied = make_plan({**BY_HAND, "tie_word_embeddings": True}, 2)
    assert decode_read_bytes(tied, 1, batch=1, context=0) == (600 - 128) * 4


def test_the_slowest_rank_sets_the_floor():
    """Catches an average over ranks where the parts are uneven."""
    plan = make_plan({**BY_HAND, "intermediate_size": 20, "vocab_size": 30}, 2)
    device = Device("test", memory_gbps=1.0, bf16_tflops=1.0)
    reads = [decode_read_bytes(plan, rank, 1, 0) for rank in range(2)]
    assert reads[0] > reads[1]
    assert decode_floor_ms(plan, device, 1, 0) == pytest.approx(reads[0] / 1e9 * 1e3)


@pytest.mark.parametrize(
    "name, gbps",
    [
        ("NVIDIA H200", 4800),
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA B200", 8000),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("cpu", None),
    ],
)
def test_devices_by_their_drivers_name(name, gbps):
    """Catches a prediction from another board's bandwidth: better none."""
    device = find_device(name)
    assert (device and device.memory_gbps) == gbps


# -- the plan's table -------------------------------------------------------------------------------------------------


def test_table_of_an_uneven_plan():
    """Catches parts, replicas or an empty share that the table does not show. Read it: it must be easy to."""
    sizes = {"vocab_size": 6, "hidden_size": 12288, "intermediate_size": 21, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 2}
    plan = make_plan({**BY_HAND, **sizes, **heads}, 3)
    expected = """\
    llama, 3 ranks, float32, 2 layers, head size 2

    parameter                                       style                  full shape  a rank's part   MiB
    model.embed_tokens.weight                       embedding_rowwise      6 x 12288   0..4 x 12288   0.19
    model.layers.*.input_layernorm.weight           replicate              12288       all            0.09
    model.layers.*.self_attn.q_proj.weight          colwise                6 x 12288   2 x 12288      0.19
    model.layers.*.self_attn.k_proj.weight          colwise                2 x 12288   2 x 12288      0.19
    model.layers.*.self_attn.v_proj.weight          colwise                2 x 12288   2 x 12288      0.19
    model.layers.*.self_attn.o_proj.weight          rowwise                12288 x 6   12288 x 2      0.19
    model.layers.*.post_attention_layernorm.weight  replicate              12288       all            0.09
    model.layers.*.mlp.gate_proj.weight             colwise                21 x 12288  5..8 x 12288   0.75
    model.layers.*.mlp.up_proj.weight               colwise                21 x 12288  5..8 x 12288   0.75
    model.layers.*.mlp.down_proj.weight             rowwise                12288 x 21  12288 x 5..8   0.75
    model.norm.weight                               replicate              12288       all            0.05
    lm_head.weight                                  colwise_gather_output  6 x 12288   0..4 x 12288   0.19

    rank  query heads  KV heads  vocabulary  FFN    weights MiB  KV cache bytes/token
       0            0         0  0-3         0-7           3.61                    32
       1            1         0  4-5         8-15          3.42                    32
       2            2         0  none        16-20         2.39                    32
    weights: 8.20 MiB; all ranks together hold 9.42 MiB, 14.9% more

    collective  after                            times  bytes  for each
    all_reduce  model.embed_tokens                   1  49152  token
    all_reduce  model.layers.*.self_attn.o_proj      2  49152  token
    all_reduce  model.layers.*.mlp.down_proj         2  49152  token
    all_gather  lm_head                              1     24  sequence
    collectives per layer: 2
    """
    assert plan_table(plan) + "\n" == textwrap.dedent(expected)


@pytest.mark.parametrize("config", [LLAMA_70B, MIXTRAL, QWEN3_30B], ids=lambda c: c["model_type"])
@pytest.mark.parametrize("tp_size", [1, 3, 8, 32])
def test_table_fits_a_terminal(config, tp_size):
    """Catches lines that wrap: 120 columns hold the table of published models at every size."""
    plan = make_plan(config, tp_size)
    lines = plan_table(plan).splitlines()
    assert max(map(len, lines)) <= 120
    assert all(any(line.startswith(p.name) for line in lines) for p in plan.parameters)
    ranks = lines[next(i for i, line in enumerate(lines) if line.startswith("rank ")) + 1 :][:tp_size]
    assert [line.split()[0] for line in ranks] == [str(rank) for rank in range(tp_size)]
    assert [line.split()[-2] for line in ranks] == [f"{plan.weight_bytes(rank) / 2**20:.2f}" for rank in range(tp_size)]
    assert lines[-1] == f"collectives per layer: {2 if tp_size > 1 else 0}"


# -- the report -------------------------------------------------------------------------------------------------------


def report_by_hand(**changes) -> dict:
    timing = SimpleNamespace(prefill_s=0.5, decode_s=0.004, prompt_tokens=10, new_tokens=6, decode_steps=2)
    given = {
        "name": "tiny", "device": "NVIDIA H200", "load_s": 1.5, "timing": timing, "batch": 2, "experts_per_token": 0,
        "peak_memory_bytes": [3 * 2**20, 5 * 2**20], "collective_s": [0.1, 0.252],
        "overlap": {"mode": "auto", "chosen": []},
    }  # fmt: skip
    return run_report(make_plan(BY_HAND, 2), **{**given, **changes})


def test_figures_by_hand():
    """Catches a figure of the wrong unit, of the wrong rank, or that divides by tokens where it should by steps."""
    report = report_by_hand()
    reads = (600 - 128 + 2 * 8) * 4 + 2 * 6.5 * 32  # two sequences that hold 5 prompt tokens and half of 3 new ones
    floor_ms = reads / 4.8e12 * 1e3
    assert report.pop("predicted") == {
        "load_s": None,
        "prefill_tokens_per_s": None,
        "decode_ms_per_token": pytest.approx(floor_ms),
        "tokens_per_s": pytest.approx(2 * 1e3 / floor_ms),
        "weight_bytes": [2400, 2400],
        "kv_cache_bytes": [32 * 16, 32 * 16],
    }
    assert report == {
        "tp_size": 2,
        "model": "tiny",
        "dtype": "float32",
        "device": "NVIDIA H200",
        "load_s": 1.5,
        "prefill_tokens_per_s": 20.0,
        "decode_ms_per_token": 2.0,
        "tokens_per_s": pytest.approx(6 / 0.504),
        "read_gbps_per_rank": pytest.approx(reads / 2e-3 / 1e9),
        "collective_share": pytest.approx(0.5),
        "peak_memory_bytes": [3 * 2**20, 5 * 2**20],
        "overlap": {"mode": "auto", "chosen": []},
    }


def test_what_was_not_measured_is_not_said():
    """Catches a zero, or a division by it, where nothing was measured: one token, no collectives, a CPU."""
    timing = SimpleNamespace(prefill_s=0.5, decode_s=0.0, prompt_tokens=10, new_tokens=2, decode_steps=0)
    report = report_by_hand(device="cpu", collective_s=[], timing=timing)
    for key in ("decode_ms_per_token", "read_gbps_per_rank", "collective_share"):
        assert report[key] is None
    assert report["predicted"]["decode_ms_per_token"] is report["predicted"]["tokens_per_s"] is None
    assert json.loads(json.dumps(report)) == report
    assert report_line(report) == (
        "tp 2 | cpu | float32 | load 1.50 s | prefill 20 tok/s | 4.0 tok/s"
        " | weights 0.0 MiB, peak 5 MiB per rank | collectives not measured"
    )


def test_line_of_a_run():
    """Catches a figure that is missing from the last line, which is all that many will read."""
    plan_bytes = 16_060_522_496
    report = {
        "tp_size": 1, "device": "NVIDIA H200", "dtype": "bfloat16", "load_s": 6.04, "prefill_tokens_per_s": 21_234.4,
        "decode_ms_per_token": 3.6, "tokens_per_s": 270.26, "read_gbps_per_rank": 4169.4, "collective_share": 0.123,
        "peak_memory_bytes": [17 * 2**30], "overlap": {"mode": "lanes", "chosen": []},
        "predicted": {"decode_ms_per_token": 3.13, "weight_bytes": [plan_bytes]},
    }  # fmt: skip
    assert report_line(report) == (
        "tp 1 | NVIDIA H200 | bfloat16 | load 6.04 s | prefill 21234 tok/s | 3.60 ms/token (floor 3.13) | 270.3 tok/s"
        " | 4169.40 GB/s read per rank (87% of the peak) | weights 15316.5 MiB, peak 17408 MiB per rank"
        " | collectives 12% of the time, all exposed | overlap lanes"
    )


def test_line_tells_schedules_that_were_measured():
    """Catches a choice that nobody can see, and a share that stands for another schedule."""
    schedules = [("one-shot", 0.25), ("sequential", 0.0), ("one-shot", 0.5), ("2 column blocks", 0.125)]
    chosen = [{"schedule": name, "hidden_share": share} for name, share in schedules]
    line = report_line(report_by_hand(overlap={"mode": "auto", "chosen": chosen}))
    assert line.endswith(" | overlap: one-shot x2 hiding up to 50%, sequential x1, 2 column blocks x1 hiding up to 12%")
