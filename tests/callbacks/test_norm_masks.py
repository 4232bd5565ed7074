"""Residual width in a fit: norms leave dead units out while training goes on, and the removal then changes nothing."""

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_compress import FinalizeCompression, StructuredSparsity, discover
from lightning_compress.callbacks.norm_masks import NormMasks
from tests.callbacks.modules import Classifier, Transformer, loader, trainer


class Watch(pl.Callback):
    """How many norms are masked before each step."""

    def __init__(self) -> None:
        self.masked: list[int] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.masked.append(sum("unmasked" in name for name, _ in pl_module.named_buffers()))


class Around(FinalizeCompression):
    """Looks at the outputs right before and right after the removal."""

    outputs: tuple[Tensor, Tensor]

    def _remove(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(5))
        model = pl_module.model
        with torch.no_grad():
            before = model.eval()(x)
            super()._remove(trainer, pl_module)
            self.outputs = before, model.eval()(x)
        model.train()


@pytest.fixture(scope="module")
def fitted() -> tuple[Classifier, Watch, Around]:
    torch.manual_seed(0)
    module, watch = Classifier(Transformer()), Watch()
    finalize = Around(params=0.5, at=4 / 6, kinds=("hidden",), report=False)
    # strong enough that nothing is left of a unit when it is removed
    sparsity = StructuredSparsity(kinds=("hidden",), start=1 / 6, schedule="constant", strength=2.0, trimmed=True)
    callbacks = [sparsity, finalize, watch]
    trainer(*callbacks, max_epochs=6).fit(module, loader(sequences=True))
    return module, watch, finalize


def test_a_fit_removes_residual_width(fitted: tuple[Classifier, Watch, Around]) -> None:
    module, _, finalize = fitted
    width = module.model.embed.out_features
    assert 2 <= width <= 9
    assert {norm.normalized_shape for norm in module.modules() if isinstance(norm, nn.LayerNorm)} == {(width,)}
    assert finalize.surgery_reports[0].error is not None
    assert finalize.surgery_reports[0].error < 1e-12


def test_norms_leave_dead_units_out_before_the_removal_and_are_free_after_it(
    fitted: tuple[Classifier, Watch, Around],
) -> None:
    module, watch, _ = fitted
    steps = len(watch.masked)
    assert watch.masked[: steps // 6] == [0] * (steps // 6)
    assert watch.masked[steps * 4 // 6 - 1] == 4
    assert watch.masked[-1] == 0
    assert not any("unmasked" in name for name, _ in module.named_buffers())


def test_the_removal_does_not_change_the_outputs(fitted: tuple[Classifier, Watch, Around]) -> None:
    before, after = fitted[2].outputs
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_masks_come_and_go() -> None:
    model = Transformer().eval()
    x = torch.randn(2, 4, 5)
    structures = discover(model, (x,), kinds=("hidden",))
    (hidden,) = structures
    dense, masks = model(x), NormMasks()
    dead = torch.zeros(16, dtype=torch.bool)
    masks.follow(model, structures, {hidden.name: dead})
    assert masks.gone == {}
    dead[3] = True
    masks.follow(model, structures, {hidden.name: dead})
    masked = model(x)
    assert not torch.allclose(masked, dense)
    copied = copy.deepcopy(model)
    masks.follow(model, structures, {hidden.name: torch.ones(16, dtype=torch.bool)})  # nothing would be left
    assert torch.equal(model(x), dense)
    masks.remove()
    assert torch.equal(copied(x), masked)  # a copy has masks of its own
