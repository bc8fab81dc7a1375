"""What only a GPU can show: very many tensors, groups and elements, CUDA graphs, streams, several GPUs, sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import fusedopt

from .running import Run, as_params
from .tensors import same_bits
from .test_sizes import MANY_BYTES, counters, step_counters, step_many

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent

each_run = pytest.mark.parametrize("run", as_params([Run("cuda", "cuda"), Run("triton", "cuda")]))

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"weight_decay": 0.1},
}
each_class = pytest.mark.parametrize("cls", OPTIMIZERS)
FEW = 5
MORE_THAN_RIDE_IN_A_LAUNCH = 400  # gradients; kInlineGrads in csrc/cuda/kernel.h ride


@each_run
def test_twenty_thousand_tensors_are_updated_in_one_launch(run: Run, settings: Run) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    step_counters([counters(k % 41, dtypes[k % 2], k % 7 == 0, "cuda") for k in range(20_000)], run, per_group=5_000)


@each_run
def test_two_thousand_groups_have_each_their_own_learning_rate(run: Run, settings: Run) -> None:
    params = [Parameter(torch.zeros(1 + k % 9, device="cuda")) for k in range(2_000)]
    groups = [{"params": [param], "lr": float(k)} for k, param in enumerate(params)]
    optimizer = fusedopt.SGD(groups, lr=1.0, backend=run.backend)
    for taken in (1, 2):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        firsts = torch.stack([param.detach()[0] for param in params]).cpu()
        assert torch.equal(firsts, -taken * torch.arange(2_000.0))


@each_run
def test_memory_that_held_poison_shows_in_no_result(run: Run, settings: Run) -> None:
    """States, tables and counters are made in memory that was full of NaN; parameters lie among it."""
    results = []
    for poisoned in (False, True):
        torch.cuda.empty_cache()
        if poisoned:
            held = [torch.full((1 << k,), float("nan"), device="cuda") for k in range(4, 25)]
            del held
        generator = torch.Generator().manual_seed(3)
        sizes = (1, 5, 2049, 70_001)
        params = [Parameter(torch.randn(n, generator=generator).cuda()) for n in sizes]
        optimizer = fusedopt.AdamW(params, lr=0.1, amsgrad=True, backend=run.backend)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).cuda()
            optimizer.step()
        results.append([*params, *(value for state in optimizer.state.values() for value in state.values())])
    for clean, dirty in zip(*results, strict=True):
        assert same_bits(clean.detach(), dirty.detach()).all()


@each_run
def test_optimizers_on_two_streams_at_once_do_not_disturb_each_other(run: Run, settings: Run) -> None:
    def make(seed: int) -> tuple[list[Parameter], Any]:
        generator = torch.Generator().manual_seed(seed)
        params = [Parameter(torch.randn(n, generator=generator).cuda()) for n in (1 << 20, 5, 2049)]
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).cuda()
        return params, fusedopt.AdamW(params, lr=0.01, backend=run.backend)

    alone = [make(seed) for seed in (0, 1)]
    for _, optimizer in alone:
        for _ in range(200):
            optimizer.step()
    torch.cuda.synchronize()
    beside = [make(seed) for seed in (0, 1)]
    streams = [torch.cuda.Stream() for _ in beside]
    torch.cuda.synchronize()
    for _ in range(200):
        for (_, optimizer), stream in zip(beside, streams, strict=True):
            with torch.cuda.stream(stream):
                optimizer.step()
    torch.cuda.synchronize()
    for (mine, _), (expected, _) in zip(beside, alone, strict=True):
        for one, other in zip(mine, expected, strict=True):
            assert same_bits(one.detach(), other.detach()).all()


def make_params(count: int = FEW, device: str = "cuda") -> list[Parameter]:
    """Parameters of two dtypes with gradients, equal at every call."""
    generator = torch.Generator().manual_seed(7)
    params = []
    for k in range(count):
        size, dtype = (1, 5, 2049, 31, 70_001)[k] if k < FEW else 3, (torch.float32, torch.bfloat16)[k % 2]
        params.append(Parameter(torch.randn(size, generator=generator).to(device, dtype)))
        params[-1].grad = torch.randn(size, generator=generator).to(device, dtype)
    return params


def change_gradients(params: list[Parameter]) -> None:
    """Other values in the same memory: a graph reads gradients where it found them."""
    torch._foreach_mul_([param.grad for param in params if param.grad is not None], -0.95)


def captured(optimizer: Optimizer) -> Callable[[], None]:
    """A step as a CUDA graph; the optimizer has taken one before, as a capture allocates and builds nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def everything(optimizer: Any) -> list[torch.Tensor]:
    """Parameters and states, and the keys of random bits among these, which are Python numbers."""
    params = [param.detach() for group in optimizer.param_groups for param in group["params"]]
    values = [value for param in params_of(optimizer) for value in optimizer.state[param].values()]
    return [*params, *map(torch.as_tensor, values)]


def params_of(optimizer: Any) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_same(one: Any, other: Any) -> None:
    for mine, expected in zip(everything(one), everything(other), strict=True):
        assert same_bits(mine, expected).all()


@each_run
@each_class
@pytest.mark.parametrize("count", [FEW, MORE_THAN_RIDE_IN_A_LAUNCH])
def test_a_graph_replayed_under_a_schedule_is_the_eager_run_bit_for_bit(
    cls: str, count: int, run: Run, settings: Run
) -> None:
    """A learning rate on the device is read at each replay; the step count advances there."""
    optimizers = []
    for replays in (False, True):
        params = make_params(count, run.device)
        lr = torch.tensor(0.0625, device=run.device)
        optimizer = getattr(fusedopt, cls)(params, lr=lr, backend=run.backend, **OPTIMIZERS[cls])
        scheduler = LambdaLR(optimizer, lambda taken: 1.0 / (1.0 + taken))
        optimizer.step()
        step = captured(optimizer) if replays else optimizer.step
        for _ in range(100):
            change_gradients(params)
            scheduler.step()
            step()
        assert optimizer.param_groups[0]["lr"] is lr
        assert lr.item() == torch.tensor(0.0625 / 101).item()
        optimizers.append(optimizer)
    assert_same(*optimizers)
    if cls != "SGD":
        assert {state["step"].item() for state in optimizers[1].state.values()} == {101.0}


# Options of a step whose launch writes more than parameters and states, or reads more.
PHASES: dict[str, dict[str, Any]] = {
    "clipped": {"max_grad_norm": 0.5, "skip_nonfinite": True},
    "clipped by group, largest": {"max_grad_norm": 0.5, "norm_by_group": True, "norm_type": float("inf")},
    "averaged": {"ema_decay": 0.9, "ema_warmup": True},
    "reported": {"report": True, "max_grad_norm": 0.5},
    "in 8 bits": {"state_dtype": torch.int8, "rounding": "stochastic"},
    "exact": {"state_dtype": torch.float32, "master": "fp32", "ema_decay": 0.9},
}


@each_run
@pytest.mark.parametrize("phase", PHASES)
def test_a_graph_of_a_step_with_options_is_the_eager_run_bit_for_bit(phase: str, run: Run, settings: Run) -> None:
    optimizers: list[Any] = []
    for replays in (False, True):
        params = make_params(device=run.device)
        optimizers.append(fusedopt.AdamW(params, lr=0.0625, backend=run.backend, **PHASES[phase]))
        optimizers[-1].step()
        step = captured(optimizers[-1]) if replays else optimizers[-1].step
        for _ in range(20):
            change_gradients(params)
            step()
    assert_same(*optimizers)
    if "max_grad_norm" in PHASES[phase]:
        assert torch.equal(*(optimizer.grad_norm for optimizer in optimizers))
        assert torch.equal(*(optimizer.skipped_steps for optimizer in optimizers))
    if "report" in PHASES[phase]:
        one, other = (optimizer.report() for optimizer in optimizers)
        assert one.rows == other.rows


@each_run
@each_class
def test_a_first_step_within_a_capture_is_refused_and_whole_after_it(cls: str, run: Run, settings: Run) -> None:
    """What a capture records is not done: states would hold whatever their memory held."""
    optimizers = []
    for is_captured_first in (True, False):
        optimizer = getattr(fusedopt, cls)(make_params(), lr=0.5, backend=run.backend, **OPTIMIZERS[cls])
        if is_captured_first:
            with pytest.raises(RuntimeError, match="run one step like it before the capture"):
                captured(optimizer)
            assert not optimizer.state
        optimizer.step()
        optimizers.append(optimizer)
    assert_same(*optimizers)


@each_run
def test_a_step_compiled_with_cuda_graphs_goes_by_the_learning_rate_of_now(run: Run, settings: Run) -> None:
    """Inductor's graphs, of mode="reduce-overhead", leave the step out."""
    optimizers, steps = [], []
    for compiles in (False, True):
        optimizers.append(fusedopt.AdamW(make_params(), lr=0.5, backend=run.backend))
        step = optimizers[-1].step
        steps.append(torch.compile(lambda step=step: step(), mode="reduce-overhead") if compiles else step)
    for lr in (0.5, 0.5, 0.5, 0.25, 0.125):
        for optimizer, step in zip(optimizers, steps, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            change_gradients(params_of(optimizer))
            step()
    assert_same(*optimizers)


@each_run
@pytest.mark.parametrize("option", ["copy_to", "zero_grads"])
def test_a_graph_writes_copies_and_clears_gradients_at_every_replay(option: str, run: Run, settings: Run) -> None:
    params = make_params(device=run.device)
    copies = [torch.zeros_like(param, dtype=torch.bfloat16) for param in params]
    options: dict[str, Any] = {"copy_to": copies} if option == "copy_to" else {"zero_grads": True}
    optimizer = fusedopt.SGD(params, lr=0.5, backend=run.backend, **options)
    optimizer.step()
    replay = captured(optimizer)
    for value in (1.0, 2.0):
        for param in params:
            assert param.grad is not None  # it keeps its memory
            param.grad.fill_(value)
        replay()
        for param, copy in zip(params, copies, strict=True):
            if option == "copy_to":
                assert same_bits(copy, param.detach().to(torch.bfloat16)).all()
            else:
                assert not torch.count_nonzero(param.grad)


@each_run
def test_a_graph_goes_on_where_it_was_captured_after_the_tables_were_made_anew(run: Run, settings: Run) -> None:
    """Norm, sums and report of a replay lie where they lay: nothing that is made later comes to lie there."""
    params = make_params(device=run.device)
    optimizer = fusedopt.AdamW(params, lr=0.5, max_grad_norm=0.5, report=True, backend=run.backend)
    optimizer.step()
    replay = captured(optimizer)
    optimizer.refresh()
    optimizer.add_param_group({"params": make_params(device=run.device)})
    optimizer.step()
    others = [torch.full((size,), 7.0, dtype=torch.float64, device=run.device) for size in range(1, 400)]
    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    assert all(bool((other == 7.0).all()) for other in others)


@each_run
@each_class
def test_python_numbers_keep_the_value_of_the_capture_until_they_are_synced(cls: str, run: Run, settings: Run) -> None:
    """Eager steps with the values that a replay must use, beside the replays."""
    optimizers, steps = [], []
    for replays in (False, True):
        params = make_params(device=run.device)
        groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "lr": 0.25}]
        optimizers.append(getattr(fusedopt, cls)(groups, lr=1.0, backend=run.backend, **OPTIMIZERS[cls]))
        optimizers[-1].step()
        steps.append(captured(optimizers[-1]) if replays else optimizers[-1].step)
    eager, graphed = optimizers
    for factor in (1.0, 0.5, 0.125):
        for group in graphed.param_groups:
            group["lr"] *= factor
        for is_synced in (False, True):
            if is_synced:
                graphed.sync_hyperparameters()
                for group, theirs in zip(eager.param_groups, graphed.param_groups, strict=True):
                    group["lr"] = theirs["lr"]
            for _ in range(3):
                for optimizer, step in zip(optimizers, steps, strict=True):
                    change_gradients(params_of(optimizer))
                    step()
            assert_same(graphed, eager)


@each_run
def test_syncing_after_a_gradient_moved_is_refused_by_name_and_fine_once_it_is_back(run: Run, settings: Run) -> None:
    params = make_params(device=run.device)
    optimizer = fusedopt.AdamW(params, lr=0.5, backend=run.backend)
    optimizer.step()
    replay = captured(optimizer)
    replay()
    seen = params[2].grad
    assert seen is not None
    for moved in (seen.clone(), None):
        params[2].grad = moved
        with pytest.raises(RuntimeError, match=rf"parameter 2 of group 0: 1 of {FEW} .*capture again"):
            optimizer.sync_hyperparameters()
    params[2].grad = seen
    optimizer.sync_hyperparameters()
    replay()
    torch.cuda.synchronize()


@each_run
def test_a_step_on_a_side_stream_is_ordered_there_and_leaves_the_current_one(run: Run, settings: Run) -> None:
    """Work before and after a step, on the step's stream, sees it in order."""
    optimizers = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        params = make_params(device=run.device)
        optimizer = fusedopt.AdamW(params, lr=0.5, backend=run.backend)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(20):
                change_gradients(params)
                optimizer.step()
                torch._foreach_mul_([param.detach() for param in params], 0.5)
            assert torch.cuda.current_stream() == stream
        torch.cuda.current_stream().wait_stream(stream)
        optimizers.append(optimizer)
    assert_same(*optimizers)


@each_run
def test_what_was_made_on_one_stream_is_not_given_away_while_another_uses_it(run: Run, settings: Run) -> None:
    """Tables and sums are replaced by steps on another stream, while the first asks for memory and overwrites it."""
    optimizers = []
    alone, one, other = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()
    for streams in ([alone], [one, other, other]):
        params = make_params(MORE_THAN_RIDE_IN_A_LAUNCH, run.device)
        optimizer = fusedopt.AdamW(params, lr=0.5, max_grad_norm=1.0, report=True, backend=run.backend)
        grads = [param.grad for param in params]
        for param in params[200:]:
            param.grad = None
        last = alone
        for k in range(30):
            stream = streams[k % len(streams)]
            stream.wait_stream(last)
            with torch.cuda.stream(stream):
                for param, grad in zip(params[:100], grads[:100], strict=True):
                    param.grad = grad if k % 3 == 2 else None
                for late in range(200 + 5 * k, 205 + 5 * k):  # more leaves than before
                    params[late].grad = grads[late]
                optimizer.step()
            with torch.cuda.stream(streams[0]):
                [torch.full((size,), 255, dtype=torch.uint8, device=run.device) for size in (512, 4096, 65536, 1 << 20)]
            last = stream
        torch.cuda.synchronize()
        optimizers.append(optimizer)
    assert_same(*optimizers)


@pytest.mark.gpu
def test_a_hyperparameter_on_the_gpu_asks_for_its_state_without_being_looked_at() -> None:
    """Of parameters on the CPU too, in a first step as in later ones."""
    param = Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    optimizer = fusedopt.SGD([param], lr=0.5, momentum=torch.tensor(0.0, device="cuda"))
    for _ in range(2):
        optimizer.step()
        assert list(optimizer.state[param]) == ["momentum_buffer"]
        optimizer.refresh()
    assert param.tolist() == [0.0] * 5


@each_run
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs 2 GPUs, there are {torch.cuda.device_count()}")
def test_parameters_on_two_gpus_are_updated_in_one_launch_on_each(run: Run, settings: Run) -> None:
    first, second = make_params(device="cuda:0"), make_params(device="cuda:1")
    together = fusedopt.AdamW([*first, *second], lr=0.5, backend=run.backend)
    alone = fusedopt.AdamW(make_params(device="cuda:0"), lr=0.5, backend=run.backend)
    for _ in range(5):
        for optimizer in (together, alone):
            change_gradients(params_of(optimizer))
        before = fusedopt.launch_count()
        together.step()
        assert fusedopt.launch_count() - before == 2
        alone.step()
    assert torch.cuda.current_device() == 0
    for param, other, expected in zip(first, second, params_of(alone), strict=True):
        for mine in (param, other):
            assert same_bits(mine.detach().cpu(), expected.detach().cpu()).all()
            for name, value in alone.state[expected].items():
                assert same_bits(together.state[mine][name].cpu(), value.cpu()).all()


@each_run
def test_more_than_two_to_the_31_elements(run: Run, settings: Run) -> None:
    if torch.cuda.mem_get_info()[0] < MANY_BYTES:
        pytest.skip(f"this GPU has no {MANY_BYTES:,} bytes free")
    step_many(run)


SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
# Only our kernels: what else torch launches is not looked at, which saves most of the time; but what it has written.
OURS = ("--kernel-name", "kns=fusedopt_")
OPTIONS = {
    "memcheck": ("--leak-check", "no", *OURS),
    "racecheck": OURS,
    "initcheck": (),
    "synccheck": OURS,
}


@pytest.mark.skipif(not os.access(SANITIZER, os.X_OK), reason="compute-sanitizer is not installed")
@pytest.mark.parametrize(
    ("tool", "part"), [*((tool, "steps") for tool in OPTIONS), ("memcheck", "graph")], ids=lambda value: value
)
def test_compute_sanitizer_finds_nothing(tool: str, part: str) -> None:
    command = [SANITIZER, "--tool", tool, *OPTIONS[tool], "--error-exitcode", "9"]
    command += [sys.executable, "-m", "tests.gpu_program", part]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if part == "steps":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that a tensor ends where its memory ends
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "0 errors" in result.stdout, result.stdout[-2000:]
