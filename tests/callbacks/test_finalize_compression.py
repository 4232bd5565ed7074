"""One fit from a dense model to a smaller one: what is removed, what stays, what is reported, what is refused."""

import math
from itertools import pairwise
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_compress import (
    Distillation,
    FinalizeCompression,
    StructuredSparsity,
    count_parameters,
    discover,
    kept_fraction,
    load_compressed,
)
from tests.callbacks.modules import MLP, Classifier, Transformer, fit, loader


class Removals(pl.Callback):
    """Number of parameters after each batch, by optimizer step."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.sizes[trainer.global_step] = count_parameters(pl_module)

    @property
    def steps(self) -> list[int]:
        steps = list(self.sizes)
        return [b for a, b in pairwise(steps) if self.sizes[a] != self.sizes[b]]


def test_after_the_fit_the_model_is_the_small_model() -> None:
    module = Classifier(Transformer())
    dense = count_parameters(module)
    parameters = dict(module.named_parameters())
    finalize, removals = FinalizeCompression(macs=0.4, at=0.6), Removals()
    trainer = fit(module, StructuredSparsity(), finalize, Distillation(), removals, data=loader(sequences=True))
    assert removals.steps == [24]  # 60 % of 40 steps
    assert count_parameters(module) < 0.6 * dense
    # the very same Parameter objects, held by the very same optimizer, with moments of the new shapes
    assert all(p is parameters[n] for n, p in module.named_parameters())
    held = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert held == {id(p) for p in parameters.values()}
    for p in parameters.values():
        state = trainer.optimizers[0].state[p]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape
        assert float(state["step"]) == 40
    # training went on, and the sizes are those of the plan
    assert all(math.isfinite(v) for v in module.losses)
    assert finalize.plan is not None
    for name, shape in finalize.plan.new_shapes().items():
        assert tuple(module.model.get_parameter(name).shape) == shape


def test_the_small_model_is_saved_at_the_end_of_the_fit(tmp_path: Any) -> None:
    module, x = Classifier(Transformer()), torch.randn(3, 4, 5)
    finalize = FinalizeCompression(macs=0.4, at=0.6, report=False, folder=tmp_path / "small")
    fit(module, finalize, data=loader(sequences=True), max_epochs=2)
    assert finalize.saved == tmp_path / "small"
    torch.testing.assert_close(load_compressed(finalize.saved, Transformer)(x), module.eval().model(x))
    trained = Classifier(Transformer())
    with pytest.raises(FileExistsError, match="small' to be empty or not to exist"):
        fit(trained, FinalizeCompression(macs=0.4, at=0.6, folder=str(tmp_path / "small")), data=loader(sequences=True))
    assert not trained.losses


def test_the_report_says_what_can_be_counted(tmp_path: Any) -> None:
    module = Classifier(Transformer())
    x = torch.randn(1, 4, 5)
    dense = discover(module.model, (x,), kinds=("head", "ffn"))
    params = count_parameters(module)
    finalize = FinalizeCompression(macs=0.4, at=0.6)
    logger = CSVLogger(tmp_path)
    fit(module, StructuredSparsity(), finalize, data=loader(sequences=True), logger=logger, log_every_n_steps=1)
    report = finalize.report
    assert report is not None
    assert report.params == (params, count_parameters(module))
    counts = {s.name: s.kept for s in report.structures}
    assert counts == {s.name: s.units for s in discover(module.model, (x,), kinds=("head", "ffn"))}
    assert report.macs[0] == dense.macs.evaluate(dense.counts)  # of one example
    small = discover(module.model, (x,), kinds=("head", "ffn"))
    assert report.macs[1] == pytest.approx(small.macs.evaluate(small.counts))
    assert report.macs_kept == pytest.approx(kept_fraction(dense, counts, "macs"))
    assert 0.396 <= report.macs_kept <= 0.4
    assert report.error <= 1e-6
    assert list(report.latency) == ["batch of 2", "batch of 8"]
    assert report.step == 24
    assert report.module == "model"
    metrics = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "compression/params_ratio" in metrics
    assert "macs_kept" in metrics


@pytest.mark.parametrize(
    ("arguments", "fit_options", "steps"),
    [
        ({"at_epoch": 2}, {}, [16]),
        ({"at_step": 13}, {}, [13]),
        ({"at": 0.5}, {"accumulate_grad_batches": 4}, [5]),
        ({"at": 1.0}, {}, [40]),
        ({"at": 0.5}, {"max_epochs": -1, "max_steps": 30}, [15]),
        ({"at": 0.6, "rounds": 3, "schedule": "linear"}, {}, [8, 16, 24]),
    ],
    ids=str,
)
def test_removal_comes_when_it_is_due(arguments: dict[str, Any], fit_options: dict[str, Any], steps: list[int]) -> None:
    module, removals = Classifier(MLP(24, 20)), Removals()
    finalize = FinalizeCompression(units=0.5, report=False, **arguments)
    fit(module, finalize, removals, **fit_options)
    assert removals.steps == steps
    assert finalize.finished


@pytest.mark.parametrize("metric", ["macs", "params", "units"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_every_metric_and_number_of_rounds_meets_the_target(metric: str, rounds: int) -> None:
    module = Classifier(Transformer())
    finalize = FinalizeCompression(**{metric: 0.4}, rounds=rounds)
    fit(module, StructuredSparsity(), finalize, data=loader(sequences=True))
    session = finalize._session
    assert session is not None and session.dense is not None and finalize.plan is not None
    kept = kept_fraction(session.dense, finalize.plan.counts, metric)  # type: ignore[arg-type]
    assert 0.99 * 0.4 <= kept <= 0.4
    # the composed plan, in the coordinates of the original model, says what the model is now
    for name, shape in finalize.plan.new_shapes().items():
        assert tuple(module.model.get_parameter(name).shape) == shape
    assert len(finalize.surgery_reports) == rounds
    assert finalize.report is not None
    assert finalize.report.params[1] == count_parameters(module)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_the_order_of_the_callbacks_does_not_matter(order: int) -> None:
    torch.manual_seed(0)
    module = Classifier(Transformer(), optimizer="sgd")
    sparsity, finalize, distil = (
        StructuredSparsity(start=0.1),
        FinalizeCompression(macs=0.4, at=0.6, report=False),
        Distillation(),
    )
    callbacks: list[pl.Callback] = [sparsity, finalize, distil]
    fit(module, *callbacks[order:], *callbacks[:order], data=loader(sequences=True))
    assert finalize.plan is not None
    session = finalize._session
    assert session is not None and session.dense is not None
    assert 0.396 <= kept_fraction(session.dense, finalize.plan.counts, "macs") <= 0.4


def test_options_of_the_plan() -> None:
    module = Classifier(Transformer())
    finalize = FinalizeCompression(
        params=0.5,
        at=0.2,
        per_layer=True,
        round_to={"ffn": 4},
        min_units={"head": 3},
        importance="taylor",
        report=False,
    )
    with pytest.warns(UserWarning, match="Expected to keep params=0.5"):
        fit(module, finalize, data=loader(sequences=True), max_epochs=2)
    assert finalize.plan is not None
    counts = finalize.plan.counts
    assert counts["blocks.0.ffn"] == counts["blocks.1.ffn"]
    assert counts["blocks.0.ffn"] % 4 == 0
    assert counts["blocks.0.head"] >= 3


def test_what_is_trained_afterwards_is_the_small_model() -> None:
    """The steps after the removal are those of an optimizer that never knew another model."""
    torch.manual_seed(0)
    module = Classifier(MLP(24, 20).double(), optimizer="sgd")
    data = loader()
    data.dataset.tensors = (data.dataset.tensors[0].double(), data.dataset.tensors[1])
    finalize = FinalizeCompression(units=0.5, at=0.5, report=False)

    class Copy(pl.Callback):
        model: nn.Module | None = None

        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                first, second = pl_module.model.layers[0].out_features, pl_module.model.layers[2].out_features
                self.model = MLP(first, second).double()
                self.model.load_state_dict(pl_module.model.state_dict())

    copy = Copy()
    fit(module, finalize, copy, data=data, max_epochs=2)
    assert copy.model is not None
    optimizer = torch.optim.SGD(copy.model.parameters(), lr=1e-2)
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(copy.model(x), y).backward()
        optimizer.step()
    for one, other in zip(module.model.parameters(), copy.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_fast_dev_run_removes_or_says_that_it_skips() -> None:
    module = Classifier()
    size = count_parameters(module)
    fit(
        module,
        StructuredSparsity(kinds=("ffn",)),
        FinalizeCompression(units=0.5, report=False),
        Distillation(),
        fast_dev_run=True,
    )
    assert count_parameters(module) < size
    module = Classifier()
    with pytest.warns(UserWarning, match=r"fast_dev_run: FinalizeCompression\(at_step=600\) skips the removal"):
        fit(module, StructuredSparsity(kinds=("ffn",)), FinalizeCompression(units=0.5, at_step=600), fast_dev_run=True)
    assert count_parameters(module) == size


def test_several_fits_with_one_callback() -> None:
    finalize = FinalizeCompression(units=0.5, at=0.5, report=False)
    for _ in range(2):
        module = Classifier()
        fit(module, finalize, max_epochs=1)
        assert finalize.plan is not None
        assert count_parameters(module) < count_parameters(Classifier())


def test_a_fit_that_ends_early_says_so() -> None:
    module = Classifier()
    stop = EarlyStopping("val", patience=1, mode="min")

    class Stops(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", float(self.current_epoch))

    module = Stops()
    trainer = pl.Trainer(
        callbacks=[stop, FinalizeCompression(units=0.5, at=0.9)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=5,
    )
    with pytest.warns(
        UserWarning, match=r"The fit ended after 16 optimizer steps, before FinalizeCompression\(at=0.9\)"
    ):
        trainer.fit(module, loader(), loader())


class Diverging(Classifier):
    """The loss, or a weight, becomes NaN in the third epoch."""

    where = "loss"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.current_epoch == 2 and self.where == "loss":
            loss = loss + float("nan")
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 23 and self.where == "weight":
            with torch.no_grad():
                self.model.layers[2].weight[0, 0] = float("nan")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.where == "loss":
            for p in self.parameters():
                p.grad = torch.zeros_like(p)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("loss", "Expected a finite loss when units are removed, but it is nan after 24"),
        ("weight", "Expected finite weights .* but 'layers.[0-9].weight' holds NaN"),
    ],
)
def test_a_model_that_has_diverged_is_left_alone(where: str, message: str) -> None:
    module = Diverging(optimizer="sgd")
    module.where = where
    size = count_parameters(module)
    if where == "weight":
        # a NaN in the model gives a NaN loss: look at the weights alone
        module.training_step = lambda batch, batch_idx: module.model.layers[4].bias.sum()  # type: ignore[method-assign]
        module.forward = lambda x: module.model(x)  # type: ignore[method-assign]

        class Call(pl.Callback):
            def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
                pl_module.model(batch[0])

        with pytest.raises(ValueError, match=message):
            fit(module, Call(), FinalizeCompression(units=0.5, at=0.6, module="model"))
    else:
        with pytest.raises(ValueError, match=message):
            fit(module, FinalizeCompression(units=0.5, at=0.6))
    assert count_parameters(module) == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {},
            r"Expected exactly one target among macs, params, units and latency, but got none. For example: "
            r"FinalizeCompression\(macs=0.4\)",
        ),
        ({"macs": 0.4, "params": 0.5}, "but got macs=0.4, params=0.5"),
        (
            {"macs": 0.0},
            r"Expected macs, the fraction that is kept, to be in \(0, 1\], but got 0.0. To keep 40 %: macs=0.4",
        ),
        ({"macs": 40}, r"to be in \(0, 1\], but got 40"),
        ({"macs": 0.4, "at": 1.5}, r"to be in \(0, 1\], but got 1.5"),
        ({"macs": 0.4, "rounds": 0}, "Expected rounds to be an integer of at least 1, but got 0"),
        (
            {"macs": 0.4, "importance": "size"},
            "Expected importance to be 'norm', 'taylor' or a function, but got 'size'",
        ),
        ({"macs": 0.4, "kinds": ("heads",)}, "Did you mean 'head'"),
        ({"macs": 0.4, "schedule": "cubical"}, "Did you mean 'cubic'"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinalizeCompression(**arguments)


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        (
            [FinalizeCompression(macs=0.4, at_epoch=6)],
            {},
            r"Expected FinalizeCompression\(at_epoch=6\) to come within the fit, but it has 5 epochs",
        ),
        ([FinalizeCompression(macs=0.4, at_step=99)], {}, "but it has 40 optimizer steps"),
        (
            [FinalizeCompression(macs=0.4)],
            {"max_epochs": -1, "max_time": "00:00:01:00"},
            r"Set Trainer\(max_steps=...\)",
        ),
        ([FinalizeCompression(macs=0.001)], {}, "Expected a budget within reach, but macs=0.001 lies below macs="),
        (
            [FinalizeCompression(macs=0.4, kinds=("head",))],
            {},
            r"Expected structures of kinds \('head',\) in 'model', but found none",
        ),
        (
            [FinalizeCompression(macs=0.4), FinalizeCompression(macs=0.2)],
            {},
            "Expected one FinalizeCompression in a Trainer, but got two",
        ),
    ],
    ids=["epoch", "step", "time", "floors", "nothing", "two"],
)
def test_bad_fits_are_refused_at_their_start(
    callbacks: list[pl.Callback], options: dict[str, Any], message: str
) -> None:
    module = Classifier()
    size = count_parameters(module)
    with pytest.raises(ValueError, match=message):
        fit(module, *callbacks, **options)
    assert len(module.losses) <= 1
    assert count_parameters(module) == size


@pytest.mark.parametrize("distil", [False, True])
def test_a_module_that_is_compressed_itself(distil: bool) -> None:
    class Itself(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    module, finalize = Itself(Transformer()), FinalizeCompression(macs=0.4)
    more = [Distillation(hidden=0.1)] if distil else []
    fit(module, StructuredSparsity(), finalize, *more, data=loader(sequences=True))
    assert finalize.report is not None
    assert finalize.report.params[1] == count_parameters(module)
    assert "training_step" not in vars(module)


def test_nothing_prunable_says_what_was_pinned_and_why() -> None:
    class Shallow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(torch.sort(self.inner(x), dim=1).values)

    with pytest.raises(ValueError, match=r"(?s)found none that can be removed.\nPinned:\n.*sort"):
        fit(Classifier(Shallow()), FinalizeCompression(macs=0.4))
