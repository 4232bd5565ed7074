"""A LightningModule comes back from a checkpoint of its compressed self."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_compress import FinalizeCompression, StructuredSparsity, load_from_checkpoint
from tests.callbacks.modules import Classifier, Transformer, loader, trainer


class WithSettings(Classifier):
    def __init__(self, width: int = 16, lr: float = 1e-2) -> None:
        super().__init__(Transformer(width), lr)
        self.save_hyperparameters()
        self.loaded: list[str] = []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = sorted(checkpoint["hyper_parameters"])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[WithSettings, Path]:
    module, path = WithSettings(width=16), tmp_path_factory.mktemp("checkpoints") / "small.ckpt"
    own: list[pl.Callback] = [StructuredSparsity(start=0.0), FinalizeCompression(macs=0.4, at=0.5, report=False)]
    fitting = trainer(*own, max_epochs=2)
    fitting.fit(module, loader(sequences=True))
    fitting.save_checkpoint(path)
    return module, path


def test_it_has_the_shape_the_weights_and_the_class(fitted: tuple[WithSettings, Path]) -> None:
    module, path = fitted
    again = load_from_checkpoint(WithSettings, path)
    assert type(again) is WithSettings and again.hparams == module.hparams
    assert again.loaded == ["lr", "width"]  # the module's own hook is called
    for (name, one), (_, other) in zip(module.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, other), name
    x = torch.randn(2, 4, 5)
    assert torch.equal(again.model(x), module.model(x))
    trainer(max_epochs=1).fit(again, loader(sequences=True))  # training goes on
    overridden = load_from_checkpoint(WithSettings, path, lr=0.5, map_location="cpu")
    assert overridden.lr == 0.5


def test_a_checkpoint_without_a_compression_is_loaded_as_usual(tmp_path: Path) -> None:
    module = WithSettings()
    fitting = trainer(max_epochs=1)
    fitting.fit(module, loader(sequences=True))
    fitting.save_checkpoint(tmp_path / "dense.ckpt")
    again = load_from_checkpoint(WithSettings, tmp_path / "dense.ckpt")
    assert torch.equal(again.model.embed.weight, module.model.embed.weight)


def test_the_wrong_class_or_size_is_refused(fitted: tuple[WithSettings, Path]) -> None:
    _, path = fitted
    with pytest.raises(TypeError, match="Expected the class of a LightningModule, but got "):
        load_from_checkpoint(Transformer, path)  # type: ignore[type-var]
    with pytest.raises(ValueError, match="This is a plan for another model"):
        load_from_checkpoint(WithSettings, path, width=8)
