"""The two dataclasses: what is out of range is refused with the value and the remedy, and flags are the fields."""

import dataclasses
import json
import math

import pytest

from tp_runtime.config import GenerationOptions, RuntimeConfig

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "name, value, remedy",
    [
        ("dtype", "float8", "choose one of auto, float32, bfloat16, float16"),
        ("dtype", None, "must be of type str"),
        ("device", "tpu", "choose one of auto, cpu, cuda"),
        ("backend", "mpi", "choose one of auto, nccl, gloo, local"),
        ("overlap", "rows", "choose one of auto, off, columns, lanes"),
        ("timeout_s", 0, "must be a number of seconds above 0"),
        ("timeout_s", -1.5, "must be a number of seconds above 0"),
        ("timeout_s", NAN, "must be a number of seconds above 0"),
        ("timeout_s", INF, "must be a number of seconds above 0"),
        ("timeout_s", "300", "must be of type float"),
        ("timeout_s", True, "must be of type float"),
        ("revision", 1, "must be of type str | None"),
        ("trust_remote_code", "no", "must be of type bool"),
    ],
)
def test_runtime_config_refuses(name, value, remedy):
    """Catches a typing error that surfaces in a rank, minutes later, or is taken for the default."""
    with pytest.raises(ValueError) as caught:
        RuntimeConfig(**{name: value})
    assert str(caught.value).startswith(f"{name}=") and str(value) in str(caught.value) and remedy in str(caught.value)


@pytest.mark.parametrize(
    "name, value, remedy",
    [
        ("max_new_tokens", 0, "must be at least 1"),
        ("max_new_tokens", 2.5, "must be of type int"),
        ("max_new_tokens", None, "must be of type int"),
        ("do_sample", 1, "must be of type bool | None"),
        ("temperature", -0.1, "must be 0 (greedy) or above"),
        ("temperature", NAN, "must be 0 (greedy) or above"),
        ("temperature", INF, "must be 0 (greedy) or above"),
        ("top_k", -1, "must be 0 (no limit) or above"),
        ("top_k", True, "must be of type int | None"),
        ("top_p", 0, "must be above 0 and at most 1"),
        ("top_p", 1.01, "must be above 0 and at most 1"),
        ("top_p", NAN, "must be above 0 and at most 1"),
        ("repetition_penalty", 0.0, "must be above 0"),
        ("repetition_penalty", INF, "must be above 0"),
        ("seed", -1, "must be between 0 and 2**63 - 1"),
        ("seed", 2**63, "must be between 0 and 2**63 - 1"),
        ("seed", 1.0, "must be of type int | None"),
        ("stop", ("\n", 5), "must be of type tuple[str, ...]"),
        ("eos_token_id", ("2",), "must be of type tuple[int, ...] | None"),
    ],
)
def test_generation_options_refuse(name, value, remedy):
    """Catches an option that no sampler can honour, NaN above all: it passes a careless comparison."""
    with pytest.raises(ValueError) as caught:
        GenerationOptions(**{name: value})
    shown = str(value[-1]) if isinstance(value, tuple) else str(value)
    assert str(caught.value).startswith(f"{name}=") and shown in str(caught.value) and remedy in str(caught.value)


def test_empty_stop_is_refused():
    """Catches a stop string that ends every text at once."""
    with pytest.raises(ValueError, match="stop: an empty text would end every answer at once"):
        GenerationOptions(stop=("\n", ""))


@pytest.mark.parametrize(
    "given, meant",
    [
        ({"stop": "END"}, {"stop": ("END",)}),
        ({"stop": ["\n", "END"]}, {"stop": ("\n", "END")}),
        ({"eos_token_id": 2}, {"eos_token_id": (2,)}),
        ({"eos_token_id": [2, 3]}, {"eos_token_id": (2, 3)}),
        ({"eos_token_id": []}, {"eos_token_id": ()}),
    ],
)
def test_tuples_of_what_people_write(given, meant):
    """Catches a stop string taken letter by letter, and options that cannot be hashed or compared."""
    assert GenerationOptions(**given) == GenerationOptions(**meant)
    assert hash(GenerationOptions(**given)) == hash(GenerationOptions(**meant))


def test_edges_are_allowed():
    """Catches a bound that excludes its own edge, and a whole number refused where a float stands."""
    RuntimeConfig(timeout_s=1)
    GenerationOptions(max_new_tokens=1, temperature=0, top_k=0, top_p=1, repetition_penalty=2, seed=0)
    GenerationOptions(temperature=0.0, top_p=1.0, seed=2**63 - 1, do_sample=False)


def test_defaults_are_valid_and_say_nothing():
    """Catches a default that overrides generation_config.json: what decides tokens is None unless asked for."""
    assert RuntimeConfig() == RuntimeConfig("auto", "auto", "auto", "auto", 300.0, None, False)
    options = dataclasses.asdict(GenerationOptions())
    assert {name for name, value in options.items() if value is not None} == {"max_new_tokens", "stop"}


@pytest.mark.parametrize("cls", [RuntimeConfig, GenerationOptions])
def test_frozen_and_serialisable(cls):
    """Catches a config changed behind the ranks' backs, and one that does not survive the way to them as JSON."""
    config = cls()
    name = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    assert cls(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("cls", [RuntimeConfig, GenerationOptions])
def test_every_flag_explains_itself(cls):
    """Catches a flag without help, without a name for its value, or with a default outside its own choices."""
    for field in dataclasses.fields(cls):
        if not field.metadata:
            continue
        assert field.metadata["help"]
        if field.metadata["choices"]:
            assert field.default in field.metadata["choices"]
        elif field.type != "bool":
            assert field.metadata["metavar"]
