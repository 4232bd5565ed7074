"""Whole layers in a fit: removed by FinalizeCompression, refused by StructuredSparsity."""

import pytest

from lightning_compress import FinalizeCompression, StructuredSparsity
from lightning_compress.report import count_parameters
from tests.callbacks.modules import Classifier, Transformer, fit, loader


def test_layers_go_in_a_fit() -> None:
    module = Classifier(Transformer(blocks=3))
    dense = count_parameters(module)
    finalize = FinalizeCompression(macs=0.334, at=0.5, kinds=("layer",))
    trainer = fit(module, finalize, data=loader(sequences=True))
    assert len(module.model.blocks) == 1 and count_parameters(module) < 0.4 * dense
    assert finalize.report is not None and finalize.report.macs_kept == pytest.approx(1 / 3)
    assert sum(s.kept for s in finalize.report.structures) == 1
    held = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert held == {id(p) for p in module.parameters()}


def test_layers_cannot_be_shrunk() -> None:
    with pytest.raises(ValueError, match=r"\['layer'\] cannot: no weight makes them silent"):
        StructuredSparsity(kinds=("layer", "ffn"))
