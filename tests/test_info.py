"""python -m fusedopt and fusedopt.info(): true, complete, and alarmed when a backend is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedopt
from fusedopt import backends, build_record, core, present, selftest, variables
from fusedopt.__main__ import main

ROOT = Path(__file__).resolve().parent.parent


def run_page(*arguments: str, hide: str) -> subprocess.CompletedProcess[str]:
    """``python -m fusedopt`` in a process of its own, where a module can not be imported."""
    script = (
        f"import sys, runpy; sys.modules[{hide!r}] = None; "
        f"sys.argv = ['fusedopt', *{arguments!r}]; runpy.run_module('fusedopt', run_name='__main__')"
    )
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FUSEDOPT", "TRITON"))}
    command = [sys.executable, "-W", "error", "-c", script]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_page_has_every_part_and_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    page = capsys.readouterr().out
    for part in ("fusedopt 0.", "torch ", "Built", "Device cpu", "Self-test", "Environment", "To do"):
        assert part in page
    assert "FAILED" not in page
    assert max(map(len, page.splitlines())) <= present.WIDTH


def test_json_is_what_info_returns(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--no-test"]) == 0
    assert json.loads(capsys.readouterr().out) == fusedopt.info(test=False)


def test_help_names_the_options_and_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    for word in ("--json", "--no-test", "Exit status"):
        assert word in page


def test_info_prints_as_the_page() -> None:
    assert str(fusedopt.info(test=False)).startswith(f"fusedopt {fusedopt.__version__}\n")


def test_the_self_test_looks_at_every_backend_here() -> None:
    tested = {(outcome.device, outcome.backend) for outcome in selftest.self_test()}
    expected = {(str(device), name) for device in selftest.devices() for name in fusedopt.available_backends(device)}
    assert tested == expected - {("cpu", "reference")}


@pytest.mark.gpu
def test_a_gpu_is_described_and_its_backends_pass() -> None:
    page = fusedopt.info()
    gpu = page["devices"][1]
    assert gpu["device"] == "cuda:0"
    assert torch.cuda.get_device_name(0) in gpu["name"]
    assert gpu["uses"] in ("cuda", "triton")
    outcomes = [outcome for outcome in page["self_test"] if outcome["device"] == "cuda:0"]
    assert {outcome["backend"] for outcome in outcomes} >= {gpu["uses"], "reference"}
    assert all(outcome["passed"] for outcome in outcomes), outcomes


def test_the_self_test_checks_every_optimizer() -> None:
    exported = [each for each in vars(fusedopt).values() if isinstance(each, type)]
    classes = {each for each in exported if issubclass(each, torch.optim.Optimizer)}
    assert len(classes) >= 3
    assert {check.optimizer for check in selftest.every_check()} == classes


class OneBitOff(backends.Reference):
    """A backend that is wrong in the last bit of one element."""

    name = "off"

    def launch(self, table: Any, grad_scale: Any, found_inf: Any) -> None:
        super().launch(table, grad_scale, found_inf)
        with torch.no_grad():
            table.rows[2].param.view(-1)[:1].view(torch.uint8)[0] ^= 1


class Broken(backends.Reference):
    """A backend that raises."""

    name = "broken"

    def launch(self, table: Any, grad_scale: Any, found_inf: Any) -> None:
        raise RuntimeError("out of smoke")


@pytest.mark.parametrize(
    ("backend", "words"),
    [(OneBitOff(), "differ from the reference"), (Broken(), "RuntimeError: out of smoke")],
)
def test_a_wrong_backend_is_found_named_and_changes_the_exit_status(
    backend: Any, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(backends._ALL, backend.name, backend)
    assert main([]) == 1
    page = capsys.readouterr().out
    assert re.search(rf"FAILED +'{backend.name}' on cpu", page)
    assert words in page
    assert f"- {backend.name} on cpu fails the self-test" in page
    assert main(["--no-test"]) == 0


def test_an_install_without_extension_says_so_and_what_mends_it() -> None:
    result = run_page(hide="fusedopt._C")
    assert result.returncode == 0, result.stderr
    assert re.search(r"extension +none: ", result.stdout)
    assert "to mend:" in result.stdout
    assert "'reference'" in result.stdout
    assert "cpu uses the reference, which is slow" in result.stdout


def test_without_triton_it_says_how_to_install_it() -> None:
    result = run_page("--json", hide="triton")
    assert result.returncode == 0, result.stderr
    assert "pip install triton" in json.loads(result.stdout)["devices"][0]["backends"]["triton"]


@pytest.mark.parametrize(
    ("value", "uses", "because"),
    [
        ("reference", "reference", "FUSEDOPT_BACKEND=reference"),
        ("cuda", None, "FUSEDOPT_BACKEND=cuda, but it serves CUDA devices"),
        ("vulkan", None, "backend 'vulkan' is unknown (named by FUSEDOPT_BACKEND)"),
    ],
)
def test_a_backend_named_by_the_environment_is_told_with_its_reason(
    value: str, uses: str | None, because: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSEDOPT_BACKEND", value)
    page = fusedopt.info(test=False)
    assert page["environment"]["FUSEDOPT_BACKEND"] == value
    assert page["devices"][0]["uses"] == uses
    assert page["devices"][0]["because"].startswith(because)
    told = [line for line in page["advice"] if because in line]
    assert len(told) == (uses is None)
    assert all("to mend: unset the variable; FUSEDOPT_BACKEND may be " in line for line in told)


@pytest.mark.skipif(backends.compiled is None, reason="no compiled extension")
def test_an_instruction_set_that_is_not_here_is_told_by_the_page_and_refused_by_an_optimizer() -> None:
    env = {**os.environ, "FUSEDOPT_CPU_ISA": "avx1024"}
    step = (
        "import torch, fusedopt; p = torch.nn.Parameter(torch.ones(2)); o = fusedopt.SGD([p]); p.grad = p * 1; o.step()"
    )
    page, refused = (
        subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, cwd=ROOT, check=False)
        for words in (["-m", "fusedopt"], ["-c", step])
    )
    assert page.returncode == 0, page.stderr
    message = "FUSEDOPT_CPU_ISA is 'avx1024'; this build and processor have "
    assert f"no backend: {message}" in page.stdout
    assert refused.returncode == 1
    assert f"ValueError: {message}" in refused.stderr


def test_what_only_a_gpu_needs_is_told_so() -> None:
    page = fusedopt.info(test=False)
    if len(page["devices"]) > 1:
        pytest.skip("there is a GPU")
    assert next(line for line in page["advice"] if "torch" in line).startswith("only for a GPU: ")


RECORDS = {
    "nothing built": (None, [], ModuleNotFoundError("No module named 'fusedopt._C'"), "make build"),
    "no compiler": (
        {"extension": False, "reason": "no C++ compiler; to mend: apt-get install g++"},
        [],
        ModuleNotFoundError("x"),
        "no C++ compiler; to mend: apt-get install g++",
    ),
    "another Python": (
        {"extension": True},
        ["_C.cpython-399-x.so"],
        ModuleNotFoundError("x"),
        "_C.cpython-399-x.so is not for Python 3.",
    ),
    "does not load": ({"extension": True}, ["_C.so"], ImportError("GLIBC_9.9"), "does not load: GLIBC_9.9"),
}


@pytest.mark.parametrize(("record", "libraries", "error", "expected"), RECORDS.values(), ids=RECORDS)
def test_why_there_is_no_extension(
    record: Any, libraries: list[str], error: ImportError, expected: str, tmp_path: Path
) -> None:
    if record is not None:
        (tmp_path / "_build_info.json").write_text(json.dumps(record))
    for name in libraries:
        (tmp_path / name).touch()
    assert expected in build_record.why_no_extension(error, tmp_path)


def test_a_fallback_warns_once_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "compiled", None)
    monkeypatch.setattr(backends, "why_not_compiled", "no C++ compiler; to mend: apt-get install g++")
    monkeypatch.setattr(backends, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fusedopt.info(test=False)  # only looks
        for _ in range(3):
            assert backends.choose_backend(None, torch.device("cpu")).name == "reference"
    reason = "no compiled extension: no C++ compiler; to mend: apt-get install g++"
    expected = f"fusedopt uses 'reference' on cpu: 'cpu' can not serve it: {reason}"
    assert [str(warning.message) for warning in caught] == [expected]


def test_a_device_without_kernels_warns_that_the_reference_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(UserWarning, match="uses 'reference' on mps: there are no kernels for it"):
        backends.choose_backend(None, torch.device("mps"))


def test_every_variable_that_the_code_reads_is_in_the_table() -> None:
    """What stands in quotes after os.environ, env.get or as a setting, in the package and its build."""
    pattern = re.compile(r"[\"'](FUSEDOPT_[A-Z_]+|TRITON_INTERPRET|MAX_JOBS|CXX|CUDA_HOME|OMP_NUM_THREADS)[\"']")
    sources = [path for folder in ("fusedopt", "build_support") for path in (ROOT / folder).rglob("*.py")]
    private = {"FUSEDOPT_NVRTC", "FUSEDOPT_PTXAS", "FUSEDOPT_BUILD_PYTHON"}  # from one process of the build to another
    read = {
        name
        for path in sources
        if path.name not in ("variables.py", "try_installs.py")
        for name in pattern.findall(path.read_text())
    }
    listed = {variable.name for variable in variables.VARIABLES}
    assert read - private <= listed
    # OMP_NUM_THREADS is torch's to read, TRITON_INTERPRET Triton's.
    assert listed - read <= {"OMP_NUM_THREADS", "TRITON_INTERPRET"}


@pytest.mark.skipif(core.compiled is None, reason=f"no extension: {core.why_not_compiled}")
def test_what_was_built_is_told() -> None:
    build = fusedopt.info(test=False)["build"]
    assert build["extension"]
    assert build["usable_instruction_sets"]
    assert {image["rule"] for image in build["images"]} <= set(core.compiled.rules())  # type: ignore[union-attr]
