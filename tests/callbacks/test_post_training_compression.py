"""PostTrainingCompression: at the end of a validate, with what the loop saw, and nothing half-changed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_compress import (
    CalibratedImportance,
    Distillation,
    FinalizeCompression,
    PostTrainingCompression,
    compress_after_training,
    load_compressed,
)
from lightning_compress.callbacks import post_training_compression as callback_module
from tests.callbacks.modules import Classifier, Transformer, fit, loader, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


class Whole(pl.LightningModule):
    """Has a forward of its own, logs in every step, and counts its training steps."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Transformer()
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        self.modes.append(self.training)
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        self.log_dict({"more": loss})
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def module() -> Classifier:
    torch.manual_seed(0)
    return Classifier(Transformer())


def state_is(module: pl.LightningModule, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_it_does_what_the_function_does() -> None:
    dense, data = module(), loader(sequences=True)
    plain = copy.deepcopy(dense.model)
    callback = PostTrainingCompression(macs=0.5, batches=6)
    trainer(callback).validate(dense, data, verbose=False)
    expected = compress_after_training(plain, data, macs=0.5, batches=6)
    assert callback.plan is not None and callback.report is not None and callback.result is not None
    assert callback.plan.kept == expected.plan.kept
    for own, other in zip(dense.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, other)
    assert callback.result.judged == pytest.approx(expected.judged)
    assert callback.report.macs_kept <= 0.5 and callback.report.error < 1e-9
    assert list(callback.report.latency) == ["batch of 2", "batch of 8"]
    assert not any(parameter.is_inference() for parameter in dense.parameters())


def test_a_second_validation_measures_the_small_model_and_compresses_nothing_more() -> None:
    whole, data = Whole(), loader(sequences=True)
    t = trainer(callback := PostTrainingCompression(macs=0.5))
    (first,) = t.validate(whole, data, verbose=False)
    assert set(first) == {"val_loss"}  # what training steps log for the gradients is nobody's metric
    assert whole.modes and not any(whole.modes) and "log" not in vars(whole)
    plan, count = callback.plan, sum(p.numel() for p in whole.parameters())
    (second,) = t.validate(whole, data, verbose=False)
    assert callback.plan is plan and sum(p.numel() for p in whole.parameters()) == count
    assert second["val_loss"] != first["val_loss"]
    assert not whole._forward_pre_hooks and not whole.model._forward_pre_hooks


def test_it_is_saved_and_trains_on(tmp_path: Path) -> None:
    small, data = module(), loader(sequences=True)
    trainer(PostTrainingCompression(params=0.6, folder=tmp_path / "small")).validate(small, data, verbose=False)
    again = load_compressed(tmp_path / "small", factory=Transformer)
    x = torch.randn(3, 4, 5)
    assert torch.equal(again.eval()(x), small.model.eval()(x))
    shapes = {n: p.shape for n, p in small.named_parameters()}
    fit(small, Distillation(teacher=module().model), data=data, max_epochs=1)
    assert {n: p.shape for n, p in small.named_parameters()} == shapes
    assert small.losses[-1] != small.losses[0]


def test_without_labels(tmp_path: Path) -> None:
    class Unlabelled(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            return None

    dense, data = Unlabelled(Transformer()), loader(sequences=True)
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(ValueError, match=r"Expected training_step of Unlabelled to return a loss .* got NoneType. Use"):
        trainer(PostTrainingCompression(macs=0.5, importance="fisher")).validate(dense, data, verbose=False)
    assert state_is(dense, before)
    trainer(callback := PostTrainingCompression(macs=0.5)).validate(dense, data, verbose=False)  # by its outputs
    assert callback.report is not None and callback.report.macs_kept <= 0.5


def test_nan_is_refused() -> None:
    dense, data = module(), loader(sequences=True)
    data.dataset.tensors[0][13, 2] = torch.nan
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(ValueError, match="Expected calibration data without NaN, but batch 1 holds it"):
        trainer(PostTrainingCompression(macs=0.5)).validate(dense, data, verbose=False)
    assert state_is(dense, before) and not dense.model._forward_pre_hooks


def test_a_removal_that_fails_gives_the_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(callback_module, "remove_units", fails)
    dense, data = module(), loader(sequences=True)
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(RuntimeError, match="the disk is full"):
        trainer(PostTrainingCompression(macs=0.5)).validate(dense, data, verbose=False)
    assert state_is(dense, before)


def test_in_a_fit_it_does_nothing_and_says_so() -> None:
    dense, data = module(), loader(sequences=True)
    t = trainer(callback := PostTrainingCompression(macs=0.5), max_epochs=1)
    with pytest.warns(UserWarning, match=r"PostTrainingCompression compresses in trainer.validate"):
        t.fit(dense, data, data)
    assert callback.result is None and callback.plan is None and callback.report is None


def test_one_process_only() -> None:
    t = trainer(PostTrainingCompression(macs=0.5))
    callback = t.callbacks[0]
    assert isinstance(callback, PostTrainingCompression)

    class Many:
        world_size = 2
        state = t.state

    t.state.fn = "validate"
    with pytest.raises(ValueError, match="Expected one process for PostTrainingCompression, but got 2"):
        callback.on_validation_start(Many(), module())  # type: ignore[arg-type]


def test_an_occupied_folder_is_found_before_the_loop(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("")
    with pytest.raises(FileExistsError, match=r"Expected .* to be empty or not to exist"):
        trainer(PostTrainingCompression(macs=0.5, folder=tmp_path)).validate(module(), loader(True), verbose=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Expected exactly one target"),
        ({"macs": 1.0}, "macs=1 is met already"),
        ({"macs": 0.5, "importance": "tailor"}, "Did you mean 'taylor'"),
        ({"macs": 0.5, "kinds": ("heads",)}, "Did you mean 'head'"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PostTrainingCompression(**options)


def test_finalize_compression_takes_calibrated_importance() -> None:
    data = loader(sequences=True)
    finalize = FinalizeCompression(macs=0.5, importance=CalibratedImportance(data, "fisher", batches=4), report=False)
    fit(Classifier(Transformer()), finalize, data=data, max_epochs=2)
    assert finalize.plan is not None and not finalize.plan.is_empty
