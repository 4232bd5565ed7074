"""One line for everything: the callbacks, their order, and a fit with all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_compress import (
    Distillation,
    FinalizeCompression,
    QuantizationAwareTraining,
    StructuredSparsity,
    TokenPruning,
    Uniform,
    compress,
    load_compressed,
    save_compressed,
    token_runtime,
    weight_quantizers,
)
from lightning_compress.quantization import packed_weights
from tests.callbacks.modules import trainer
from tests.callbacks.token_modules import Encoder, Reader, sentences


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"macs": 0.5}, [StructuredSparsity, Distillation, FinalizeCompression]),
        ({"tokens": 0.5}, [TokenPruning]),
        ({"weights": "int8"}, [Distillation, QuantizationAwareTraining]),
        ({"weights": "int8", "distillation": 0.0}, [QuantizationAwareTraining]),
        ({"modules": {"ffn": "int4"}, "tokens": 0.7}, [Distillation, TokenPruning, QuantizationAwareTraining]),
    ],
    ids=str,
)
def test_what_is_asked_for_is_there(options: dict[str, Any], kinds: list[type]) -> None:
    assert [type(callback) for callback in compress(**options)] == kinds


def test_settings_reach_the_callbacks() -> None:
    _, teach, finalize, tokens, quantize = compress(
        macs=0.4, tokens=0.6, weights="int4", at=0.3, modules="ffn", distillation=0.8, module="model"
    )
    assert isinstance(teach, Distillation)
    assert isinstance(finalize, FinalizeCompression)
    assert isinstance(tokens, TokenPruning)
    assert isinstance(quantize, QuantizationAwareTraining)
    assert teach.alpha == 0.8
    assert (tokens.macs, tokens.start) == (0.6, None)  # when units are gone
    assert (quantize.weights, quantize.modules, quantize.start) == ("int4", "ffn", 0.3)
    assert {callback.module for callback in (teach, finalize, tokens, quantize)} == {"model"}
    assert compress(tokens=0.5, at=0.3)[0].start == 0.3  # type: ignore[attr-defined]


@pytest.mark.parametrize("backend", [None, "packed", "native"])
def test_a_fit_with_all_of_it(backend: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Reader()
    activations = None if backend is None else "int8"
    callbacks = compress(macs=0.5, tokens=0.6, weights="int8", activations=activations, backend=backend, at=0.4)
    trainer(*callbacks, max_epochs=8).fit(module, sentences(), sentences(seed=2))
    _, _, finalize, tokens, quantize = callbacks
    assert isinstance(finalize, FinalizeCompression)
    assert isinstance(tokens, TokenPruning)
    assert isinstance(quantize, QuantizationAwareTraining)
    assert finalize.report is not None
    assert finalize.report.error < 1e-10
    assert finalize.report.prunable_macs[1] <= 0.5 * finalize.report.prunable_macs[0]
    assert tokens.relative_macs == pytest.approx(0.6, rel=0.01)
    assert token_runtime(module.model) is not None
    assert {q.quantizer for q in quantize.quantizers.values()} == {Uniform(8)}
    assert module.losses[-1] < module.losses[0]
    if backend is None:
        assert weight_quantizers(module.model) == quantize.quantizers
        return
    # saved with fewer units, fewer tokens and integers, and built again
    batch = next(iter(sentences(seed=3)))
    with torch.no_grad():
        output = module.model.eval()(batch["ids"], batch["mask"])
        save_compressed(module.model, tmp_path / "small", factory=Encoder)
        loaded = load_compressed(tmp_path / "small", factory=Encoder)
        assert torch.equal(loaded(batch["ids"], batch["mask"]), output)
    assert token_runtime(loaded) is not None
    assert set(packed_weights(loaded)) == set(quantize.quantizers)


def test_nothing_to_compress_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got neither macs, tokens nor weights. For example: compress\(macs=0.5"):
        compress()
    with pytest.raises(ValueError, match=r"units are removed, to be in \(0, 1\), got 1.0"):
        compress(macs=0.5, at=1.0)
