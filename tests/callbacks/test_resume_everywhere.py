"""A fit that is killed at any step, even while it writes a checkpoint, ends like one that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_compress import Distillation, FinalizeCompression, StructuredSparsity
from tests.callbacks.modules import Classifier, Transformer, trainer

STEPS, SPARSE, REMOVAL = 24, 4, 16


class ByStep(Classifier):
    """Its batch depends on the step alone, so that a fit may stop in the middle of an epoch; it has dropout."""

    def __init__(self) -> None:
        super().__init__(Transformer(), lr=5e-3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.global_step)
        x = torch.randn(8, 4, 5, generator=generator).to(self.dtype)
        # random numbers of the fit itself: their state must be resumed too
        loss = F.cross_entropy(self.model(F.dropout(x, 0.1)), (x.mean(1)[:, 0] > 0).long())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class RandomState(pl.Callback):
    """Lightning does not keep the state of random number generators in its checkpoints."""

    def state_dict(self) -> dict[str, Any]:
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = state_dict["torch"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if hasattr(self, "state"):
            torch.set_rng_state(self.state)


class Killed(Exception):
    pass


class Kill(pl.Callback):
    """Saves a checkpoint after a step, and falls over in the next."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise Killed


def run(
    *more: pl.Callback,
    resume: Path | None = None,
    every: int = 1,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[ByStep, pl.Trainer]:
    torch.manual_seed(0)
    module = ByStep().to(dtype)
    own: list[pl.Callback] = [
        Distillation(hidden=0.1),
        StructuredSparsity(start=SPARSE / REMOVAL, importance="taylor", every_n_steps=every),
        FinalizeCompression(macs=0.4, at_step=REMOVAL, rounds=2, report=False),
        RandomState(),
    ]
    # a generator of its own: an iterator draws a seed at the start of an epoch, and a resumed epoch has begun already
    data: DataLoader[Any] = DataLoader(range(6), generator=torch.Generator())  # type: ignore[arg-type]
    fitting = trainer(*own, *more, max_steps=STEPS, max_epochs=-1, **options)
    fitting.fit(module, data, ckpt_path=None if resume is None else str(resume))
    return module, fitting


def finalizer(fitting: Any) -> FinalizeCompression:
    return next(c for c in fitting.callbacks if isinstance(c, FinalizeCompression))


def assert_same(one: tuple[ByStep, pl.Trainer], other: tuple[ByStep, pl.Trainer]) -> None:
    for (name, a), (_, b) in zip(one[0].named_parameters(), other[0].named_parameters(), strict=True):
        assert torch.equal(a, b), name
    states = [list(fitting.optimizers[0].state.values()) for _, fitting in (one, other)]
    for first, second in zip(*states, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert one[1].optimizers[0].param_groups[0]["lr"] == other[1].optimizers[0].param_groups[0]["lr"]
    plans = [finalizer(fitting).plan for _, fitting in (one, other)]
    assert plans[0] is not None and plans[1] is not None and plans[0].kept == plans[1].kept
    assert other[0].losses == one[0].losses[-len(other[0].losses) :]


@pytest.fixture(scope="module")
def straight() -> tuple[ByStep, pl.Trainer]:
    return run()


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 23])
def test_killed_after_any_step(straight: tuple[ByStep, pl.Trainer], step: int, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with pytest.raises(Killed):
        run(Kill(path, step))
    assert_same(straight, run(resume=path))


def test_in_float64_every_bit_is_the_same_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.float64, "every": 3}
    straight = run(**options)
    assert next(straight[0].parameters()).dtype == torch.float64
    for step in (7, 9, 14, 18):  # with steps that are not acted on yet, and without
        with pytest.raises(Killed):
            run(Kill(tmp_path / "last.ckpt", step), **options)
        assert_same(straight, run(resume=tmp_path / "last.ckpt", **options))


# While a checkpoint is being written


def keep_checkpoints(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, save_last=True, every_n_train_steps=3, save_top_k=0)


def main(folder: str, writes: str) -> None:
    """Fit, and kill this process in the middle of the write number ``writes``."""
    from fsspec.implementations.local import LocalFileOpener

    left, write = [int(writes)], LocalFileOpener.write

    def torn(self: Any, data: bytes) -> Any:
        left[0] -= 1
        if left[0] == 0:
            write(self, data[: len(data) // 2])
            self.f.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, data)

    LocalFileOpener.write = torn
    run(keep_checkpoints(Path(folder)), enable_checkpointing=True)


@pytest.mark.parametrize("writes", [4, 7])  # before and after the last removal
def test_killed_by_the_system_while_a_checkpoint_is_being_written(
    straight: tuple[ByStep, pl.Trainer], writes: int, tmp_path: Path
) -> None:
    module = "tests.callbacks.test_resume_everywhere"
    command = [sys.executable, "-W", "ignore", "-m", module, str(tmp_path), str(writes)]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(command, cwd=root, capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert_same(straight, run(keep_checkpoints(tmp_path), resume=tmp_path / "last.ckpt", enable_checkpointing=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
