"""FinalizeCompression beside callbacks of Lightning that keep weights, files, counters or schedules of their own."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from lightning_compress import FinalizeCompression, StructuredSparsity, count_parameters, load_from_checkpoint
from lightning_compress.surgery import SurgeryError
from tests.callbacks.modules import MLP, Classifier, Transformer, fit, loader, trainer

# Averaging

ZERO = {0: [1, 4, 7, 9], 2: [0, 3, 8]}  # units of the two hidden layers that are zero from the start


class HalfZero(Classifier):
    """In float64, with units that are zero and, without biases and weight decay, stay zero in a dense fit, too."""

    def __init__(self, interval: str = "step") -> None:
        super().__init__(MLP().double())
        self.interval = interval
        with torch.no_grad():
            for number, units in ZERO.items():
                self.model.layers[number].weight[units] = 0
                self.model.layers[number].bias[units] = 0
                self.model.layers[number + 2].weight[:, units] = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0].double(), batch[1]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self.model(batch[0].double()), batch[1])
        self.log("val", loss)
        self.losses.append(float(loss))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}


def kept_slices(name: str, finalize: FinalizeCompression, dense: Tensor) -> Tensor:
    """What the plan leaves of a tensor of the dense model."""
    assert finalize.plan is not None
    for (parameter, axis), positions in finalize.plan.kept_positions().items():
        if name == f"model.{parameter}":
            dense = dense.index_select(axis, positions)
    return dense


AVERAGES: dict[str, Any] = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "every second step": lambda: EMAWeightAveraging(decay=0.9, update_every_n_steps=2, update_starting_at_step=10),
    "equal weights": WeightAveraging,
    "swa before": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=4, annealing_epochs=2),
    "swa during": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=2, annealing_epochs=2),
    "swa from the start": lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_strategy="linear"),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", AVERAGES)
def test_the_average_of_small_models_is_the_average_of_large_ones_cut(name: str, first: bool) -> None:
    def run(*more: pl.Callback) -> tuple[HalfZero, pl.Trainer]:
        torch.manual_seed(0)
        module = HalfZero("epoch" if name.startswith("swa") else "step")
        average = AVERAGES[name]()
        fitting = trainer(*((average, *more) if first else (*more, average)))
        fitting.fit(module, loader(), loader())
        return module, fitting

    finalize = FinalizeCompression(units=15 / 22, at=0.5, report=False)
    small, _ = run(finalize)
    dense, _ = run()
    assert count_parameters(small) < count_parameters(dense)
    for (key, one), (_, other) in zip(small.named_parameters(), dense.named_parameters(), strict=True):
        torch.testing.assert_close(one, kept_slices(key, finalize, other), rtol=1e-10, atol=1e-12, msg=key)
    torch.testing.assert_close(small.losses, dense.losses, rtol=1e-10, atol=1e-12)


class Normed(Classifier):
    """With batch norms, whose statistics SWA collects in an epoch of its own after the last."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(
                nn.Linear(5, 12),
                nn.BatchNorm1d(12),
                nn.ReLU(),
                nn.Linear(12, 10),
                nn.BatchNorm1d(10),
                nn.ReLU(),
                nn.Linear(10, 3),
            )
        )


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("at", "step"), [(0.25, 8), (0.5, 16), (1.0, 32)])
def test_swa_with_batch_norm(at: float, step: int, first: bool) -> None:
    """The epoch in which statistics are collected has no steps, and is no part of the fit."""
    swa = StochasticWeightAveraging(1e-2, swa_epoch_start=2, annealing_epochs=2)
    finalize = FinalizeCompression(units=0.5, at=at)
    own: list[pl.Callback] = [StructuredSparsity(kinds=("ffn",), start=0.1), finalize]
    module = Normed()
    fit(module, *([swa, *own] if first else [*own, swa]), max_epochs=4)
    assert finalize.report is not None and finalize.report.step == step
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm1d)]
    assert [m.num_features for m in norms] == [m.running_mean.numel() for m in norms]  # type: ignore[union-attr]
    assert sum(m.num_features for m in norms) == 11
    x = torch.randn(64, 5)
    assert torch.isfinite(module.eval().model(x)).all()


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


@pytest.mark.parametrize("epoch", [1, 3, 5])
@pytest.mark.parametrize("name", AVERAGES)
def test_a_fit_with_an_average_is_resumed(name: str, epoch: int, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"

    def run(*more: pl.Callback, resume: Path | None = None) -> HalfZero:
        torch.manual_seed(0)
        module = HalfZero("epoch" if name.startswith("swa") else "step")
        own = [
            StructuredSparsity(kinds=("ffn",), start=0.1),
            FinalizeCompression(units=0.5, at=0.5, rounds=2, report=False),
        ]
        fitting = trainer(AVERAGES[name](), *own, *more, max_epochs=6)
        fitting.fit(module, loader(), ckpt_path=None if resume is None else str(resume))
        return module

    straight = run()
    with pytest.raises(RuntimeError, match="crash"):
        run(Crash(path, epoch))
    resumed = run(resume=path)
    assert count_parameters(straight) < count_parameters(HalfZero())
    for (key, one), (_, other) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14, msg=key)


def test_an_average_that_cannot_follow_leaves_everything_as_it_was() -> None:
    """One transaction: where the copy fails, the module that was cut already is whole again."""

    class Spoil(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 19:
                average._average_model.module.model.layers[2].weight.data[3, 3] = float("nan")  # type: ignore[union-attr]

    average = EMAWeightAveraging()
    module = Classifier()
    dense = {name: parameter.shape for name, parameter in module.named_parameters()}
    with pytest.raises(SurgeryError, match="In the averaged weights of EMAWeightAveraging: Expected finite weights"):
        fit(module, Spoil(), FinalizeCompression(units=0.5, at=0.5), average)
    assert {name: parameter.shape for name, parameter in module.named_parameters()} == dense
    assert {n: p.shape for n, p in average._average_model.module.named_parameters()} == dense  # type: ignore[union-attr]
    optimizer = module.trainer.optimizers[0]
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in module.parameters())


class OwnAverage(Classifier):
    """Averages a part of itself, or all that it compresses, without a callback."""

    def __init__(self, part: bool = False) -> None:
        super().__init__(Transformer())
        original = self.model.blocks[0] if part else self.model
        self.average = AveragedModel(original, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
        self.average.requires_grad_(False)
        self.part = part

    def on_train_batch_end(self, *_: Any) -> None:
        self.average.update_parameters(self.model.blocks[0] if self.part else self.model)


def test_an_average_inside_the_module_is_cut_with_it() -> None:
    module = OwnAverage()
    fit(module, FinalizeCompression(macs=0.4, at=0.5, report=False), data=loader(sequences=True), max_epochs=2)
    shapes = {n: p.shape for n, p in module.model.named_parameters()}
    assert {n: p.shape for n, p in module.average.module.named_parameters()} == shapes
    assert module.average(torch.randn(2, 4, 5)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"but 'average' averages its part 'model.blocks.0' alone.*module='model.bl"):
        fit(OwnAverage(part=True), FinalizeCompression(macs=0.4), data=loader(sequences=True))


class Positions(nn.Module):
    """A head size that is a literal: what goes is behind a shim, whose positions are integers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 600), nn.Linear(600, 3)
        self.register_buffer("positions", torch.arange(600))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)).view(-1, 600))


@pytest.mark.parametrize("several", [False, True])
def test_integers_are_taken_over_and_not_averaged(several: bool) -> None:
    """0.9 * 7 + 0.1 * 7 = 6.9999995 would be position 6."""
    how = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if several else {"avg_fn": get_ema_avg_fn(0.9)}
    module = Classifier(Positions())
    finalize = FinalizeCompression(units=0.5, at=0.5)
    fit(module, WeightAveraging(**how), finalize)
    assert finalize.report is not None and [s.tier for s in finalize.report.structures] == ["shim"]
    assert torch.equal(module.model.positions, torch.arange(600))
    scattered = module.model.up._scatter_positions
    assert finalize.plan is not None
    assert scattered.tolist() == list(next(iter(finalize.plan.kept.values())))


# Best, last, and when to stop


class Measured(Classifier):
    """Logs a metric by epoch, whatever the weights are, and tests whatever it is."""

    def __init__(self, values: list[float] | None = None, width: int = 12) -> None:
        super().__init__(MLP(width))
        self.values = values or [0.0] * 6

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.values[min(self.current_epoch, 5)])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("outputs", self.model(batch[0]).sum())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(batch[0])


def small_fit(
    folder: Path, values: list[float], *more: pl.Callback, rounds: int = 1
) -> tuple[Measured, pl.Trainer, ModelCheckpoint]:
    """Six epochs, a removal after the third."""
    torch.manual_seed(0)
    keep = ModelCheckpoint(folder, "{epoch}", monitor="val", save_top_k=1, save_last=True)
    module = Measured(values)
    own = FinalizeCompression(units=0.5, at_epoch=3, rounds=rounds, report=False)
    fitting = trainer(own, keep, *more, max_epochs=6, enable_checkpointing=True)
    fitting.fit(module, loader(), loader())
    return module, fitting, keep


def test_the_best_checkpoint_is_the_best_of_the_small_models(tmp_path: Path) -> None:
    # validation of the third epoch comes after the removal, which is made with its last batch
    module, fitting, keep = small_fit(tmp_path, [1.0, 2.0, 9.0, 5.0, 3.0, 4.0])
    assert Path(keep.best_model_path).name == "epoch=4.ckpt" and float(keep.best_model_score) == 3.0  # type: ignore[arg-type]
    assert (tmp_path / "epoch=0.ckpt").exists()  # the best of the dense model
    for best in ("best", "last"):
        fitting.validate(module, loader(), ckpt_path=best, verbose=False)
        (tested,) = fitting.test(module, loader(), ckpt_path=best, verbose=False)
        predicted = fitting.predict(module, loader(), ckpt_path=best)
        path = keep.best_model_path if best == "best" else keep.last_model_path
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())
        assert predicted is not None
        assert tested["outputs"] == pytest.approx(sum(float(p.sum()) for p in predicted) / 8, abs=1e-4)


@pytest.mark.parametrize("epoch", [0, 2, 4])
@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_checkpoints_from_before_at_and_after_the_removal(what: str, epoch: int, tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"

    class Save(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == epoch and not trainer.sanity_checking:
                trainer.save_checkpoint(path)

    small, fitting, _ = small_fit(tmp_path, [1.0] * 6, Save())
    weights = torch.load(path, weights_only=True)["state_dict"]
    dense = Measured()
    options: dict[str, Any] = {} if what == "predict" else {"verbose": False}
    getattr(fitting, what)(dense, loader(), ckpt_path=str(path), **options)  # a dense module takes any of them
    assert {n: t.shape for n, t in dense.state_dict().items()} == {n: t.shape for n, t in weights.items()}
    assert all(torch.equal(weights[name], value) for name, value in dense.state_dict().items())
    if epoch:
        getattr(fitting, what)(small, loader(), ckpt_path=str(path), **options)
        assert all(torch.equal(weights[name], value) for name, value in small.state_dict().items())
        return
    before = {name: value.clone() for name, value in small.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"Expected a checkpoint of the small model, because that is what Measured is now, but this one was "
        r"written before units were removed, at step 8: 'model.layers.0.weight' has the shape \(12, 5\) there and ",
    ):
        getattr(fitting, what)(small, loader(), ckpt_path=str(path), **options)
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
    again = load_from_checkpoint(Measured, path)  # the way out
    assert all(torch.equal(weights[name], value) for name, value in again.state_dict().items())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_checkpoint_from_between_two_removals_is_not_for_the_small_model(tmp_path: Path) -> None:
    path = tmp_path / "between.ckpt"

    class Save(pl.Callback):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(path)

    small, fitting, _ = small_fit(tmp_path, [1.0] * 6, Save(), rounds=2)
    fitting.test(Measured(), loader(), ckpt_path=str(path), verbose=False)
    with pytest.raises(ValueError, match="Expected a checkpoint of the small model"):
        fitting.test(small, loader(), ckpt_path=str(path), verbose=False)
    with pytest.raises(ValueError, match="Expected a checkpoint of the small model"):
        fitting.fit(small, loader(), loader(), ckpt_path=str(path))
    # and the other way round: a module that is too small for the checkpoint's plan
    with pytest.raises(ValueError, match="This is a plan for another model"):
        fitting.test(Measured(width=11), loader(), ckpt_path=str(path), verbose=False)


def test_the_small_model_is_given_time_to_recover(tmp_path: Path) -> None:
    """Patience is counted anew: the metric of the large model is not one that the small model must reach."""
    stop = EarlyStopping("val", patience=2)
    module, fitting, _ = small_fit(tmp_path, [1.0, 0.9, 9.0, 8.0, 7.0, 6.0], stop)
    assert fitting.global_step == 48 and float(stop.best_score) == 6.0
    assert count_parameters(module) < count_parameters(Measured())
    with pytest.warns(UserWarning, match=r"The fit ended after 16 .* before FinalizeCompression\(at_epoch=3\)"):
        small_fit(tmp_path / "stopped", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], EarlyStopping("val", patience=1))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_monitors_are_resumed(tmp_path: Path) -> None:
    values = [1.0, 2.0, 9.0, 5.0, 3.0, 4.0]
    _, _, straight = small_fit(tmp_path / "straight", values)
    stop = EarlyStopping("val", patience=2)
    with pytest.raises(RuntimeError, match="crash"):
        small_fit(tmp_path / "resumed", values, stop, Crash(tmp_path / "last.ckpt", 4))
    keep = ModelCheckpoint(tmp_path / "resumed", "{epoch}", monitor="val", save_top_k=1, save_last=True)
    again = EarlyStopping("val", patience=2)
    own = FinalizeCompression(units=0.5, at_epoch=3, report=False)
    fitting = trainer(own, keep, again, max_epochs=6, enable_checkpointing=True)
    module = Measured(values)
    fitting.fit(module, loader(), loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert Path(keep.best_model_path).name == Path(straight.best_model_path).name
    fitting.test(module, loader(), ckpt_path="best", verbose=False)


def test_a_checkpoint_every_few_steps(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1, save_last="link")
    module = Measured()
    fitting = trainer(FinalizeCompression(units=0.5, at_step=18, report=False), keep, enable_checkpointing=True)
    fitting.fit(module, loader())
    sizes = {
        int(path.stem.split("=")[1]): sum(t.numel() for t in torch.load(path, weights_only=True)["state_dict"].values())
        for path in tmp_path.glob("step=*.ckpt")
    }
    dense = count_parameters(Measured())
    assert all((size < dense) == (step >= 18) for step, size in sizes.items()) and len(sizes) == 6
    fitting.test(module, loader(), ckpt_path="last", verbose=False)


# How many batches make a step


@pytest.mark.parametrize(
    ("moment", "step", "batch"),
    [
        ({"at": 0.45}, 17, 20),
        ({"at": 0.5}, 17, 20),
        ({"at": 0.6}, 18, 24),
        ({"at_step": 18}, 18, 24),
        ({"at_epoch": 4}, 20, 32),
    ],
)
def test_gradient_accumulation_that_changes(moment: dict[str, Any], step: int, batch: int) -> None:
    """Two epochs of 8 steps and three of 2: a removal waits for the end of a step."""

    class Record(pl.Callback):
        def __init__(self) -> None:
            self.found: tuple[int, int] | None = None

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, idx: int) -> None:
            if self.found is None and count_parameters(pl_module) < dense:
                self.found = (trainer.global_step, trainer.fit_loop.epoch_loop.total_batch_idx + 1)

    module, record = Classifier(), Record()
    dense = count_parameters(module)
    sparsity = StructuredSparsity(kinds=("ffn",), start=0.1)
    finalize = FinalizeCompression(units=0.5, report=False, **moment)
    fit(module, GradientAccumulationScheduler({2: 4}), sparsity, finalize, record)
    assert record.found == (step, batch)
    assert module.trainer.global_step == 22


def test_moments_beyond_a_fit_with_changing_accumulation_are_refused() -> None:
    with pytest.raises(ValueError, match="but it has 22 optimizer steps"):
        fit(Classifier(), GradientAccumulationScheduler({2: 4}), FinalizeCompression(units=0.5, at_step=23))
