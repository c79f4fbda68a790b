"""Every kernel configuration, compiled for sm_80, sm_90 and sm_100 without a GPU; and the report of the same.

What is compiled stands in bench/compile_cases.py, with what is claimed of it. A second run takes a fraction of the
time of the first: Triton keeps what it compiled on disk. Most configurations are `slow`; `make kernel-tests` and
`python -m bench.compile_report` compile them all.
"""

import importlib
import json
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from bench import compile_cases, compile_report
from bench.compile_cases import OPS, cases, meta
from bench.compile_claims import Case, compile_all
from bench.compiled import CHIPS, recording

CASES = [case for op in OPS for arch in CHIPS for case in cases(arch, [op])]


def by_haste() -> Iterator:
    """The cases, of which the first of each kernel and chip are compiled at every run; and half of gemm's on sm_90, of
    prefill with everything that there is beside x and w, of the others with nothing."""
    first = {(case.op, case.kernel, case.arch): case.name for case in reversed(CASES)}
    for case in CASES:
        form = ["bias", "residual", "gelu"] if case.kernel == "prefill" else []
        is_of_gemm = (case.op, case.arch, case.shape.split()[3:]) == ("gemm", 90, form)
        is_first = first[case.op, case.kernel, case.arch] == case.name
        yield pytest.param(case, marks=() if is_first else pytest.mark.halved if is_of_gemm else pytest.mark.slow)


@pytest.fixture(scope="module")
def compiled(request):
    """Case -> its kernel, for the cases that were asked for (`-k`): compiled on all cores."""
    tests = [item for item in request.session.items if item.name.startswith("test_configuration")]
    asked = [test.callspec.params["case"] for test in tests]
    return dict(zip(asked, compile_all(asked)))


@pytest.mark.parametrize("case", list(by_haste()), ids=lambda case: case.name)
def test_configuration_is_what_it_claims(case, compiled):
    """Catches a spill, too much shared memory, older tensor cores, narrow loads of the weights, warp specialisation
    that Triton dropped in silence, and a launch that does not overlap."""
    if broken := case.broken_claims(compiled[case]):
        pytest.fail(", ".join(broken), pytrace=False)


@pytest.mark.parametrize("op", OPS)
def test_every_candidate_is_compiled_somewhere(op):
    """Catches a configuration that no chip has room for, or that the shapes of the cases never reach."""
    module = importlib.import_module(f"tp_runtime.kernels.{op}")
    wanted = {config for configs in getattr(module, "CANDIDATES", {}).values() for config in configs}
    assert wanted <= {case.config for case in CASES if case.op == op}


class Config(NamedTuple):
    num_warps: int = 4
    maxnreg: int | None = None


@triton.jit
def _copy_kernel(x_ptr, y_ptr, SIZE: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, x * tl.sum(x.to(tl.float32), 0).to(x.dtype))


def copy_case(arch=90, size=1024, config=None, pdl=True, launch_pdl=True, **claims):
    """A case of a kernel without tensor cores, asynchronous loads or specialisation."""
    config = config or Config()

    def launch():
        options = {"launch_pdl": True} if launch_pdl and arch >= 90 else {}
        x, y = meta(size, dtype=torch.bfloat16), meta(size, dtype=torch.bfloat16)
        _copy_kernel[(1,)](x, y, size, pdl and arch >= 90, **config._asdict(), **options)

    return Case("copy", "copy", arch, torch.bfloat16, f"N={size}", launch, config, **claims)


def broken(**options):
    case = copy_case(**options)
    return case.broken_claims(case.compile())


@pytest.mark.parametrize("arch", CHIPS)
def test_an_honest_case_has_no_broken_claims(arch):
    """Catches a check that fails what is right."""
    assert broken(arch=arch) == []
    assert broken(arch=arch, has_wide_loads=True) == []  # 8 elements of 16 bits a thread


def test_false_claims_are_broken():
    """Catches a check that passes whatever the compiler made."""
    assert broken(size=128, has_wide_loads=True) == ["loads 0 bytes by 16, 0 by less"]
    assert broken(tensor_cores="wgmma") == ["has no wgmma"]
    assert broken(is_specialized=True) == ["is not specialized"]
    assert broken(pdl=False) == ["has no griddepcontrol"]
    assert broken(launch_pdl=False) == ["was launched without launch_pdl"]
    assert broken(pdl=False, has_pdl=False) == []
    (spill,) = broken(size=65536, config=Config(maxnreg=32))
    assert spill.startswith("spills ")
    assert broken(size=65536, config=Config(maxnreg=32), may_spill=True) == []


def test_candidates_are_asked_of_the_chip(monkeypatch):
    """Catches a list of cases that was made for another chip than it is compiled for."""
    monkeypatch.setitem(OPS, "copy", lambda arch: [(arch, triton.runtime.driver.active.get_current_target().arch)])
    assert [cases(arch, ["copy"]) for arch in CHIPS] == [[(arch, arch)] for arch in CHIPS]


@pytest.fixture
def samples(monkeypatch):
    """The report of one kernel that is what it claims, one that is not and one that does not compile."""

    def sample_cases(arch):
        yield copy_case(arch)
        yield copy_case(arch, size=128, has_wide_loads=True)
        yield copy_case(arch, size=1000)  # not a power of two

    monkeypatch.setattr(compile_report, "OPS", {"copy": sample_cases})
    monkeypatch.setitem(compile_cases.OPS, "copy", sample_cases)


def test_report(samples, capsys):
    """Catches figures under the wrong head, and a broken claim or a failed compilation that nobody sees."""
    assert compile_report.main(["--arch", "90", "--op", "copy"]) == 1
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[1] == "copy copy, sm_90"
    head, _, good, narrow, failed = (line.strip("| ").split("|") for line in lines[3:8])
    good = {name.strip(): value.strip() for name, value in zip(head, good, strict=True)}
    with recording(90) as compiled:
        copy_case().launch()
    assert (good["num_warps"], good["registers"], good["PDL"]) == ("4", str(compiled[0].registers), "1")
    assert (good["shape"], good["ld 16 B"], good["spill"]) == ("N=1024", "1", "")
    assert "TMA" not in good
    assert len(narrow) == len(failed) == len(head)
    assert lines[8:] == [
        "  line 2: loads 0 bytes by 16, 0 by less",
        "  line 3: does not compile: _copy_kernel for sm_90: arange's range must be a power of 2",
    ]
    assert printed.err == "3 configurations compiled, 2 not as claimed\n"


def test_report_as_json(samples, capsys):
    """Catches a progress bar, or anything else, beside the one object on stdout."""
    assert compile_report.main(["--json", "--arch", "80", "90", "--op", "copy"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [(row["arch"], bool(row["broken"])) for row in report["rows"]] == [
        (arch, is_broken) for arch in (80, 90) for is_broken in (False, True, True)
    ]
    assert report["rows"][0]["instructions"]["ld 16 B"] == 1
    assert report["rows"][0]["occupancy"] >= 8
    assert "triton" in json.dumps(report)


def test_report_lists_what_can_be_asked(capsys):
    """Catches a traceback as the answer to an op or a chip that is unknown."""
    for arguments in (["--op", "no_such_op"], ["--arch", "75"]):
        with pytest.raises(SystemExit) as caught:
            compile_report.main(arguments)
        assert caught.value.code == 2
        assert "choose from" in capsys.readouterr().err
