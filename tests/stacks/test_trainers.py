"""Trainer, Accelerate, Lightning: each step is torch's but for rounding; what resumes ends with the same bits."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedopt

from .beside_torch import BesideTorch
from .team import on_ranks
from .twin import OPTIMIZERS, Twin, backward, make_model

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "stacks"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With more, torch's own sums may come in another order the next time."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def example(name: str, *packages: str) -> Any:
    """An example's module."""
    for package in (*packages, "sklearn"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'fusedopt[stacks]'")
    return importlib.import_module(name)


def assert_same_bits(one: nn.Module, other: nn.Module) -> None:
    for (name, ours), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


# ---- Hugging Face Trainer -------------------------------------------------------------------------------


def hf_run(module: Any, folder: Path, resume: bool, **options: Any) -> tuple[nn.Module, int]:
    """Six steps, saved after four, or the last two of them again. The model, and the steps compared."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        beside: BesideTorch

        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **rest: Any) -> None:
            self.beside = BesideTorch(getattr(optimizer, "optimizer", optimizer))

    watch = Watch()
    trainer = module.make_trainer(folder, steps=6, save_steps=4, logging_steps=1, **options)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
    assert all(math.isfinite(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry)
    return trainer.model, watch.beside.steps


@pytest.mark.parametrize("bf16", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("accumulate", [1, 2], ids=["", "accumulated"])
def test_the_trainer_clips_steps_saves_and_resumes(tmp_path: Path, bf16: bool, accumulate: int) -> None:
    module = example("hf_trainer", "transformers", "accelerate")
    options = {"bf16": bf16, "gradient_accumulation_steps": accumulate, "max_grad_norm": 0.5}
    straight, steps = hf_run(module, tmp_path, resume=False, **options)
    assert steps == 6
    resumed, steps = hf_run(module, tmp_path, resume=True, **options)
    assert steps == 2
    assert_same_bits(straight, resumed)


# ---- Lightning ------------------------------------------------------------------------------------------


def lightning_run(module: Any, folder: Path, epochs: int, resume: Path | None, **options: Any) -> tuple[Any, Any, int]:
    """Epochs of three batches. The module, its trainer, and the steps compared."""
    import lightning

    class Watch(lightning.Callback):
        beside: BesideTorch

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.beside = BesideTorch(trainer.optimizers[0])

    torch.manual_seed(0)
    net, watch = module.Perceptron(), Watch()
    usual: dict[str, Any] = {"limit_train_batches": 3, "max_epochs": epochs, "accelerator": "cpu"}
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_model_summary": False}
    trainer = module.make_trainer(folder, -1, callbacks=[watch], **usual, **quiet, **options)
    trainer.fit(net, module.data(), ckpt_path=resume)
    return net, trainer, watch.beside.steps


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true", "bf16-true"])
def test_lightning_clips_steps_saves_and_resumes(tmp_path: Path, precision: str) -> None:
    module = example("lightning_module", "lightning")
    options = {"precision": precision, "gradient_clip_val": 0.5}
    straight, _, steps = lightning_run(module, tmp_path, 2, None, **options)
    assert steps == 6
    _, trainer, _ = lightning_run(module, tmp_path, 1, None, **options)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _, steps = lightning_run(module, tmp_path, 2, tmp_path / "one.ckpt", **options)
    assert steps == 3
    assert_same_bits(straight, resumed)


def test_lightning_refuses_to_clip_for_an_optimizer_that_unscales_by_itself(tmp_path: Path) -> None:
    """As it does for torch's fused ones; docs/stacks.md says what to do. If this fails, it no longer needs to."""
    module = example("lightning_module", "lightning")

    class Default(module.Perceptron):  # type: ignore[misc, name-defined]
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return fusedopt.AdamW(self.parameters())

    trainer = module.make_trainer(tmp_path, 1, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        trainer.fit(Default(), module.data())


# ---- Accelerate -----------------------------------------------------------------------------------------


def accelerate_run(folder: Path, first: int, last: int, **options: Any) -> tuple[nn.Module, int]:
    """Steps first to last, resumed from the folder unless from 0, and saved there after the fourth."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # one process stands for several runs
    common = importlib.import_module("common")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
    model = common.network()
    plain = fusedopt.AdamW(model.parameters(), lr=3e-3)
    beside = BesideTorch(plain)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(plain, T_max=6)
    model, optimizer, scheduler = accelerator.prepare(model, plain, scheduler)
    if first:
        accelerator.load_state(str(folder))
    for step in range(first, last):
        for part in range(2):
            with accelerator.accumulate(model):
                images, labels = common.batch(2 * step + part)
                accelerator.backward(nn.functional.cross_entropy(model(images), labels))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        if step == 3 and not first:
            accelerator.save_state(str(folder))
    return model, beside.steps


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_accelerate_clips_accumulates_saves_and_resumes(tmp_path: Path, precision: str) -> None:
    example("common", "accelerate")
    straight, steps = accelerate_run(tmp_path, 0, 6, mixed_precision=precision)
    assert steps == 6
    resumed, steps = accelerate_run(tmp_path, 4, 6, mixed_precision=precision)
    assert steps == 2
    assert_same_bits(straight, resumed)


@pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed: pip install 'fusedopt[stacks]'"
)
@on_ranks(2)
def test_accelerate_puts_sharded_parameters_into_an_optimizer_that_exists() -> None:
    """What its FSDP2 does to the optimizer in `prepare`, which wants an accelerator: here by its own function."""
    from accelerate.utils import fsdp_utils
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    old: dict[str, Any] = {}
    for place, (name, param) in enumerate(model.named_parameters()):
        stand_in = torch.empty(1)
        stand_in.data_ptr = old[name] = param.data_ptr()  # type: ignore[method-assign, assignment]
        optimizer.param_groups[0]["params"][place] = stand_in
    fully_shard(model)
    mapping: dict[int, Tensor] = {old[name]: param for name, param in model.named_parameters()}
    fsdp_utils.fsdp2_switch_optimizer_parameters(optimizer, mapping)
    twin = Twin(model.parameters(), OPTIMIZERS["AdamW"])
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(3):
        optimizer.zero_grad()
        backward(model, number)
        twin.step()
        (step if number == 1 else optimizer.step)()
        twin.check(optimizer)
