"""The examples run, write what they say they write, and what they write makes sense."""

from __future__ import annotations

import importlib
import json
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fusedopt

pytest.importorskip("matplotlib", reason="the examples draw with matplotlib: pip install 'fusedopt[examples]'")
pytest.importorskip("rich", reason="the examples print with rich: pip install 'fusedopt[examples]'")
pytest.importorskip("sklearn", reason="digits.py reads scikit-learn's: pip install 'fusedopt[examples]'")

EXAMPLES = Path(__file__).parent.parent / "examples"

TINY_MODEL = {"steps": 12, "warmup": 2, "batch": 8, "block": 32, "width": 32, "layers": 1, "heads": 2}
TINY_RUN = {**TINY_MODEL, "lr": 1e-2, "eval_every": 4, "text_size": 60_000}


def run_example(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs an example as a user does, with the fusedopt that the tests use."""
    package = str(Path(fusedopt.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def options(values: dict[str, Any]) -> list[str]:
    """The values as command-line options."""
    return [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def assert_is_picture(path: Path) -> None:
    """A PNG with something drawn in it, small enough for the documentation."""
    from PIL import Image

    assert path.stat().st_size < 150_000
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(1 << 24)) > 8


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports one of the examples' modules; as in `run_example`, torch has one thread: others test beside this one."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    torch.set_num_threads(threads)


# ---- train_charlm.py --------------------------------------------------------------------------------------


def test_charlm_trains_with_every_optimizer_and_writes_its_numbers(tmp_path: Path) -> None:
    done = run_example("train_charlm.py", "--optimizer", "all", "--out", tmp_path, *options(TINY_RUN))
    assert done.returncode == 0, done.stderr
    assert_is_picture(tmp_path / "charlm.png")
    record = json.loads((tmp_path / "charlm.json").read_text())
    names = {"torch", "fusedopt", "torch-foreach", "torch-loop"}
    assert set(record["results"]) == names
    assert set(record["summary"]["against_fusedopt"]) == names - {"fusedopt"}
    for name, result in record["results"].items():
        assert name in done.stdout
        assert [e["step"] for e in result["evaluations"]] == [0, 4, 8, 12]
        first, last = result["evaluations"][0], result["evaluations"][-1]
        # Untrained, all characters are about equally likely; a dozen steps learn at least their frequencies.
        assert first["val"] == pytest.approx(math.log(95), abs=0.3)
        assert last["val"] < first["val"] - 0.5
        assert len(result["losses"]) == len(result["optimizer_ms"]) == 12
        assert min(result["forward_ms"] + result["backward_ms"] + result["optimizer_ms"]) > 0
        assert result["losses"][0] == record["results"]["torch"]["losses"][0], "the same weights, the same batch"


def test_charlm_repeats_itself_to_the_last_bit(example: Any) -> None:
    charlm = example("charlm")
    config = charlm.Config(**TINY_RUN)
    first, second = (charlm.train(fusedopt.AdamW, config) for _ in range(2))
    assert first.losses == second.losses
    assert first.evaluations == second.evaluations


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_charlm_loss_curves_differ_from_torchs_by_no_more_than_rounding_explains(example: Any, dtype: str) -> None:
    charlm = example("charlm")
    config = charlm.Config(**TINY_RUN, dtype=dtype)
    results = charlm.train_together(
        {
            "torch": torch.optim.AdamW,
            "fusedopt": fusedopt.AdamW,
            **{f"nudged {seed}": nudged_adamw(seed) for seed in range(4)},
        },
        config,
    )
    curves = {name: torch.tensor(result.losses, dtype=torch.float64) for name, result in results.items()}
    strays = {name: (curve - curves["torch"]).abs() for name, curve in curves.items()}
    # Two sums of the same terms may differ by an ulp or two even where the weights are equal.
    floor = 4 * torch.finfo(getattr(torch, dtype)).eps * float(curves["torch"].max())
    bound = torch.stack([strays[f"nudged {seed}"] for seed in range(4)]).amax(0).cummax(0).values + floor
    assert strays["fusedopt"][0] == 0
    assert (strays["fusedopt"] <= bound).all(), f"{strays['fusedopt']} against {bound}"


def nudged_adamw(seed: int) -> Any:
    """AdamW of torch, its weights nudged at random after each step by as much as rounding could move them.

    An update is some 16 roundings of half an ulp, in theirs as in ours: together at most 16 ulps of the larger
    of the weight and its update, which is at most about lr. What such nudges do to a run is what another order
    of the same operations may do.
    """
    generator = torch.Generator().manual_seed(seed)

    def make(groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(groups, lr=lr)

        @torch.no_grad()
        def nudge(*_: object) -> None:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    sign = torch.randint(2, p.shape, generator=generator).to(p.dtype) * 2 - 1
                    p += 16 * torch.finfo(p.dtype).eps * sign * p.abs().clamp(min=group["lr"])

        optimizer.register_step_post_hook(nudge)
        return optimizer

    return make


def test_charlm_time_to_a_loss_is_the_time_of_the_steps_until_then(example: Any) -> None:
    charlm = example("charlm")
    result = charlm.train(fusedopt.AdamW, charlm.Config(**TINY_RUN))
    seen = [evaluation.val for evaluation in result.evaluations]
    assert result.seconds_to(seen[0]) == 0
    assert result.seconds_to(min(seen) - 1) is None
    step = next(e.step for e in result.evaluations if e.val <= min(seen))
    assert result.seconds_to(min(seen)) == pytest.approx(sum(result.step_ms[:step]) / 1e3)


def test_charlm_leaves_the_random_state_of_its_caller_alone(example: Any) -> None:
    charlm = example("charlm")
    before = torch.random.get_rng_state()
    charlm.train(fusedopt.AdamW, charlm.Config(**{**TINY_RUN, "steps": 1}))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("train_charlm", ["--width", "32", "--heads", "3"], "heads=3 and width=32"),
        ("train_charlm", ["--steps", "0"], "steps must be at least 1, got 0"),
        ("train_charlm", ["--warmup", "-1"], "warmup must not be negative, got -1"),
        ("train_charlm", ["--dtype", "float16"], "got 'float16'"),
        ("train_charlm", ["--device", "abacus"], "device must be cpu, cuda or cuda:N, got 'abacus'"),
        ("train_charlm", ["--text-size", "100"], "text_size=100 gives"),
        ("train_charlm", ["--backend", "abacus"], "'abacus'"),
        ("train_charlm", ["--optimizer", "sgd"], "'sgd'"),
        ("digits", ["--seeds", "0"], "--seeds must be at least 1, got 0"),
        ("trajectories", ["--examples", "3"], "at least the batch of 8, got 3"),
        ("phase", ["--steps", "3"], "--steps must be at least 4, got 3"),
    ],
)
def test_bad_options_are_refused_by_name_and_value(
    example: Any, module: str, arguments: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as exit_:
        sys.exit(example(module).main([*arguments, "--out", str(tmp_path)]))
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "package", "extra"),
    [
        ("train_charlm.py", "matplotlib", "examples"),
        ("trajectories.py", "rich", "examples"),
        ("digits.py", "scipy", "examples"),
        ("stacks/ddp.py", "sklearn", "stacks"),
        ("stacks/accelerate_loop.py", "accelerate", "hf"),
        ("stacks/hf_trainer.py", "transformers", "hf"),
        ("stacks/lightning_module.py", "lightning", "lightning"),
        ("stacks/deepspeed_zero.py", "deepspeed", "deepspeed"),
    ],
)
def test_an_example_names_the_extra_that_it_lacks(
    script: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str((EXAMPLES / script).parent))
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    for module in [name for name in sys.modules if name.startswith(f"{package}.") or name in ("figures", "common")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit, match=f"{package}.*: pip install 'fusedopt\\[{extra}\\]'"):
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")


@pytest.mark.parametrize("module", ["train_charlm", "digits", "trajectories", "phase"])
def test_help_tells_every_default(example: Any, module: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as exit_:
        example(module).main(["--help"])
    assert exit_.value.code == 0
    described = capsys.readouterr().out
    assert described.count("(default:") == described.count("\n  --")


# ---- trajectories.py --------------------------------------------------------------------------------------


def test_trajectories_draws_its_three_pictures(tmp_path: Path) -> None:
    done = run_example("trajectories.py", "--examples", 32, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("ravine", "bias_correction", "minibatch"):
        assert_is_picture(tmp_path / f"{name}.png")


@pytest.mark.parametrize("name", ["SGD", "SGD, momentum 0.9"])
def test_turning_the_ravine_turns_the_path_of_sgd_and_momentum(example: Any, name: str) -> None:
    trajectories = example("trajectories")
    angle, steps, lr = math.pi / 6, 20, 0.01
    straight, turned = (
        trajectories.descend(
            trajectories.MAKERS[name],
            trajectories.ravine(a),
            trajectories.turned(trajectories.START, a),
            steps,
            lr,
        )
        for a in (0.0, angle)
    )
    rotation = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
    )
    # lr times the curvature is at most 1/2, so no rounding grows: some ten roundings a step, each of at most
    # an ulp of the largest number there is, the steepest gradient.
    rounding = 10 * steps * torch.finfo(torch.float64).eps * trajectories.CURVATURE
    torch.testing.assert_close(straight @ rotation.T, turned, rtol=0, atol=rounding)


def test_without_bias_correction_adams_first_step_is_root_ten_times_too_long(example: Any) -> None:
    trajectories = example("trajectories")
    lr, eps = 0.1, 1e-8
    slope = {
        make: trajectories.descend(make, lambda point: point.sum(), [0.0], 1, lr)
        for make in (fusedopt.Adam, trajectories.UncorrectedAdam)
    }
    # (1 - 0.9) / √(1 - 0.999) = √10; eps shortens the steps by a relative eps at most, and by rounding.
    for make, expected in ((fusedopt.Adam, 1.0), (trajectories.UncorrectedAdam, math.sqrt(10))):
        assert float(-slope[make][1]) / lr == pytest.approx(expected, rel=2 * eps)


# ---- digits.py --------------------------------------------------------------------------------------------


def test_digits_reports_every_learning_rate_and_seed(tmp_path: Path) -> None:
    done = run_example("digits.py", "--seeds", 3, "--epochs", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert_is_picture(tmp_path / "digits.png")
    record = json.loads((tmp_path / "digits.json").read_text())
    assert record["verdict"] in done.stdout.replace("\n", " ").replace("  ", " ")
    for name, by_lr in record["runs"].items():
        best = by_lr[str(record["best_lr"][name])]
        validation = {lr: sum(run["val_accuracy"][-1] for run in runs) for lr, runs in by_lr.items()}
        assert sum(run["val_accuracy"][-1] for run in best) == max(validation.values())
        for run in best:
            assert len(run["train_loss"]) == 2
            assert run["train_loss"][1] < run["train_loss"][0]
            assert run["test_accuracy"][-1] > 0.5, "a tenth is chance"


def test_digits_parts_share_no_image(example: Any) -> None:
    digits = example("digits")
    parts = digits.split(seed=3)
    assert {part: len(labels) for part, (_, labels) in parts.items()} == digits.PARTS
    together = torch.cat([images for images, _ in parts.values()])
    torch.testing.assert_close(together.sum(0), digits.all_digits()[0].sum(0), rtol=1e-5, atol=0)


# ---- phase.py ---------------------------------------------------------------------------------------------


def test_phase_skips_the_broken_image_and_draws_what_the_reports_say(tmp_path: Path) -> None:
    done = run_example("phase.py", "--steps", 40, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert_is_picture(tmp_path / "phase.png")
    histories = json.loads((tmp_path / "phase.json").read_text())
    for history in histories.values():
        assert history["skipped"] == 1.0
        assert len(history["at_fault"]) == 6
        assert history["steps"] == [step for step in range(1, 41) if step != 20]
        assert min(history["accuracy"].values()) > 0.5, "a tenth is chance"
    assert max(histories["float32"]["lost"]) < min(histories["bfloat16"]["lost"])
