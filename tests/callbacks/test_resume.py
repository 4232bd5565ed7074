"""A straight run equals one that crashes and is resumed, wherever the crash falls."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_compress import (
    Distillation,
    FinalizeCompression,
    StructuredSparsity,
    count_parameters,
    load_from_checkpoint,
    make_plan,
)
from lightning_compress.callbacks import finalize_compression
from lightning_compress.callbacks.checkpoint import take_shape
from lightning_compress.plan import PruningPlan
from lightning_compress.structures import ShimEdit, Structure, owner_path
from lightning_compress.surgery.record import record_of
from lightning_compress.surgery.shim import shims_of
from tests.callbacks.modules import MLP, Classifier, Transformer, fit, loader, trainer


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


def by_shims(plan: PruningPlan) -> PruningPlan:
    """The same removal in another way."""

    def shimmed(structure: Structure) -> Structure:
        places = {(owner_path(p.parameter), "output" if p.role == "producer" else "input") for p in structure.slices}
        edits = tuple(ShimEdit(path, side, -1) for path, side in sorted(places))  # type: ignore[arg-type]
        return replace(structure, tier="shim", edits=edits)

    return replace(plan, structures=tuple(shimmed(s) for s in plan.structures))


@pytest.fixture
def two_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A checkpoint of a fit whose first round cuts, and whose second round leaves the width as it is then."""

    rounds = []

    def plan(*args: Any, **options: Any) -> PruningPlan:
        rounds.append(make_plan(*args, **options))
        return by_shims(rounds[-1]) if len(rounds) == 2 else rounds[-1]

    monkeypatch.setattr(finalize_compression, "make_plan", plan)
    path = tmp_path / "last.ckpt"
    with pytest.raises(RuntimeError, match="crash"):
        fit(small(), FinalizeCompression(macs=0.4, at_epoch=2, rounds=2, report=False), Crash(path, 3))
    return path


def small() -> Classifier:
    torch.manual_seed(0)
    return Classifier(MLP(16, 16))


def test_every_round_is_replayed_in_its_own_way(two_ways: Path) -> None:
    module, finalize = small(), FinalizeCompression(macs=0.4, at_epoch=2, rounds=2, report=False)
    trainer(finalize).fit(module, loader(), ckpt_path=str(two_ways), weights_only=False)
    loaded = load_from_checkpoint(Classifier, two_ways, model=MLP(16, 16))
    for model in (module.model, loaded.model):
        record = record_of(model)
        assert record is not None
        first, second = record.plans
        assert {s.tier for s in first.structures} == {"native"} and {s.tier for s in second.structures} == {"shim"}
        assert shims_of(model.layers[0])
        take_shape(model, record.plans)  # nothing is left to do
    assert finalize.plan is not None and finalize.plan.kept == first.compose(second).kept


def test_a_checkpoint_with_one_plan_for_all_rounds_still_loads(two_ways: Path) -> None:
    checkpoint = torch.load(two_ways, weights_only=True)
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("FinalizeCompression"))
    del checkpoint["callbacks"][key]["session"]["plans"]
    torch.save(checkpoint, two_ways)
    module = small()
    trainer(FinalizeCompression(macs=0.4, at_epoch=2, rounds=2, report=False)).fit(
        module, loader(), ckpt_path=str(two_ways), weights_only=False
    )
    assert {n: p.shape for n, p in module.state_dict().items()} == {
        n: p.shape for n, p in checkpoint["state_dict"].items()
    }


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
