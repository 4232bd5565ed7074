"""A straight run equals one that crashes and is resumed, wherever the crash falls."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_compress import Distillation, FinalizeCompression, StructuredSparsity, count_parameters
from tests.callbacks.modules import Classifier, Transformer, loader, trainer


class Crash(pl.Callback):
    """Saves a checkpoint at the end of an epoch, and falls over in the next."""

    def __init__(self, path: Path, epoch: int) -> None:
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch - 1:
            trainer.save_checkpoint(self.path)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 3:
            raise RuntimeError("crash")


def callbacks(**options: Any) -> list[pl.Callback]:
    """Sparsifying in the epochs 1 to 4, removal after 4 of 6 (and after 2 or so, in rounds)."""
    return [
        Distillation(hidden=0.1),
        StructuredSparsity(start=1 / 6, **{k: v for k, v in options.items() if k != "rounds"}),
        FinalizeCompression(macs=0.4, at=4 / 6, rounds=options.get("rounds", 1)),
    ]


def run(
    *more: pl.Callback, resume: Path | None = None, reverse: bool = False, **options: Any
) -> tuple[Classifier, Any]:
    torch.manual_seed(0)
    module = Classifier(Transformer())
    own = callbacks(**options)
    fitting = trainer(*(reversed(own) if reverse else own), *more, max_epochs=6)
    fitting.fit(module, loader(sequences=True), ckpt_path=None if resume is None else str(resume))
    return module, own[2]


@pytest.mark.parametrize("epoch", [1, 3, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"importance": "taylor"},
        {"regularizer": "hoyer_square", "every_n_steps": 3},
        {"rounds": 2},
        {"kinds": ("hidden", "ffn")},
    ],
    ids=["norm", "taylor", "hoyer", "rounds", "hidden"],
)
def test_straight_equals_crash_and_resume(options: dict[str, Any], epoch: int, tmp_path: Path) -> None:
    straight, finalize = run(**options)
    path = tmp_path / "last.ckpt"
    with pytest.raises(RuntimeError, match="crash"):
        run(Crash(path, epoch), **options)
    resumed, again = run(resume=path, **options)
    assert again.plan.kept == finalize.plan.kept
    assert count_parameters(resumed) == count_parameters(straight)
    for (name, one), (_, other) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)
    assert again.report.params == finalize.report.params
    assert again.report.macs == finalize.report.macs


def test_the_order_of_callbacks_does_not_matter_to_a_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with pytest.raises(RuntimeError, match="crash"):
        run(Crash(path, 5), reverse=True)
    resumed, _ = run(resume=path, reverse=True)
    straight, _ = run(reverse=True)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


class WithTest(Classifier):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", (self.model(batch[0]).argmax(-1) == batch[1]).float().mean())


def test_a_checkpoint_of_the_small_model_is_tested_with_a_dense_module(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    with pytest.raises(RuntimeError, match="crash"):
        run(Crash(path, 5))
    module = WithTest(Transformer())
    for _ in range(2):  # the second time it is small already
        trainer(*callbacks()).test(module, loader(sequences=True), ckpt_path=str(path), verbose=False)
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert {n: p.shape for n, p in module.state_dict().items()} == {n: p.shape for n, p in weights.items()}
        assert "on_load_checkpoint" not in vars(module)
