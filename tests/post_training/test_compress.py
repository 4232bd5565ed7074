"""compress_after_training: the whole way, what it refuses, and that nothing is left half-changed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress import (
    CalibratedImportance,
    FisherAccumulator,
    SurgeryError,
    compress_after_training,
    discover,
    load_compressed,
    make_plan,
    measure_latency_table,
    save_compressed,
    unit_scores,
)
from lightning_compress.post_training import compress as compress_module
from lightning_compress.post_training.calibration import default_loss
from lightning_compress.post_training.search import joint_loss
from tests.latency.fake import CALL, Clock, Stack, proven
from tests.zoo import MODELS

BATCHES = 6


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 4, 48, dropout=0.1, batch_first=True)
        self.embed, self.out = nn.Linear(5, 24), nn.Linear(24, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(self.embed(x)).mean(1))


def trained() -> tuple[Classifier, list[tuple[Tensor, Tensor]]]:
    """A model that knows which feature is the largest on average, and batches."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(32, 7, 5) + torch.randn(32, 1, 5)
        return x, x.mean(1)[:, :3].argmax(1)

    for _ in range(120):
        x, y = batch()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval(), [batch() for _ in range(BATCHES)]


TRAINED = trained()


@pytest.fixture
def case() -> tuple[Classifier, list[tuple[Tensor, Tensor]]]:
    return copy.deepcopy(TRAINED[0]), TRAINED[1]


def loss_of(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    with torch.no_grad():
        return sum(float(nn.functional.cross_entropy(model.eval()(x), y)) for x, y in batches) / len(batches)


CRITERIA = ("outputs", "fisher", "taylor", "norm", "low_rank", "low_rank_fisher", "obs", "obs_loss")


@pytest.mark.parametrize("importance", CRITERIA)
def test_every_criterion_makes_the_model_smaller(case: Any, importance: str, tmp_path: Path) -> None:
    model, batches = case
    result = compress_after_training(model, batches, macs=0.6, importance=importance)
    assert 0.594 <= result.report.macs_kept <= 0.6
    assert result.report.error < 1e-9 and result.plan.verified
    assert result.judged is not None and result.judged[1] <= result.judged[0]
    assert sum(p.numel() for p in model.parameters()) == result.report.params[1] < result.report.params[0]
    assert list(result.seconds) == ["data", "discovery", "importance", "plan", "repair", "removal"]
    assert "without the repair" in str(result)
    save_compressed(model, tmp_path / "small", factory=Classifier)
    again = load_compressed(tmp_path / "small", factory=Classifier)
    assert torch.equal(again.eval()(batches[0][0]), model(batches[0][0]))


def test_the_repair_helps_where_much_is_gone(case: Any) -> None:
    model, batches = case
    losses = {}
    for repair in (None, "scales", "weights"):
        small = copy.deepcopy(model)
        compress_after_training(small, batches, macs=0.3, repair=repair)
        losses[repair] = loss_of(small, batches)
    assert losses["weights"] < losses["scales"] <= losses[None]
    assert losses["weights"] < 0.8 * losses[None]


def test_rearranging_costs_less_together(case: Any) -> None:
    model, batches = case
    plans = [
        compress_after_training(
            copy.deepcopy(model), batches, macs=0.5, importance="fisher", rearrange=r, repair=None
        ).plan
        for r in (False, True)
    ]
    structures = discover(model, batches[0][:1], kinds=("head", "ffn"))
    fisher = FisherAccumulator(model, structures, full=True)
    for batch in batches:
        fisher.update(batch, default_loss)
    losses = []
    for plan in plans:
        total = 0.0
        for name, matrix in fisher.matrices().items():
            gone = torch.zeros(len(matrix), dtype=torch.bool)
            gone[list(plan.removed(name))] = True
            total += joint_loss(matrix, gone)
        losses.append(total)
    assert losses[1] < losses[0]


def test_whole_layers_go_too(case: Any) -> None:
    model, batches = case
    result = compress_after_training(model, batches, macs=0.5, kinds=("layer",))
    assert len(model.encoder.layers) == 1 and result.report.error < 1e-9
    assert len(result.repairs) == 0 and model(batches[0][0]).shape == (32, 3)


def test_a_latency_is_a_budget_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("lightning_compress.budget.measure_latency", clock)
    model = Stack(512, 256)
    structures = proven(copy.deepcopy(model))
    table = measure_latency_table(model, structures, CALL, {}, measure=clock, cache=False)
    batches = [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(4)]
    result = compress_after_training(model, batches, latency=0.6, example=(CALL, {}), table=table, repair=None)
    assert not result.plan.is_empty
    assert clock.time(model) / clock.time(Stack(512, 256)) == pytest.approx(0.6, rel=0.05)


def test_a_family_with_padding_and_keyword_inputs() -> None:
    example = MODELS["BERT"]
    model = example.model()
    batches = [
        {**example.kwargs, "input_ids": torch.randint(3, 99, (2, 9)), "labels": torch.randint(2, (2,))}
        for _ in range(4)
    ]
    result = compress_after_training(model, batches, params=0.6)
    assert result.report.error < 1e-9 and len(result.repairs) in (0, 5)


def test_importance_for_make_plan_is_one_pass_over_the_data(case: Any) -> None:
    model, batches = case
    structures = discover(model, batches[0][:1])
    rounds = []

    class Loader:
        def __len__(self) -> int:
            return len(batches)

        def __iter__(self) -> Iterator[Any]:
            rounds.append(1)
            return iter(batches)

    importance = CalibratedImportance(Loader(), "fisher")
    scores = unit_scores(model, structures, importance)
    assert len(rounds) == 1
    torch.testing.assert_close(importance(model, structures[0]), scores[structures[0].name])
    assert make_plan(model, structures, macs=0.5, importance=importance).counts


# What is refused: nothing is changed then


class Endless:
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(self.batches)


def unlabelled(batches: list[Any]) -> list[Any]:
    return [x for x, _ in batches]


def with_nan(batches: list[Any]) -> list[Any]:
    x, y = batches[1]
    return [batches[0], (x.index_fill(0, torch.tensor([3]), torch.nan), y)]


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty": (lambda b: [], {}, "Expected calibration batches, but the loader is empty"),
    "endless": (
        Endless,
        {"batches": None},
        r"Expected batches=\.\.\., how many to take, because Endless has no length",
    ),
    "NaN": (
        with_nan,
        {},
        r"Expected calibration data without NaN, but batch 1 holds it in a tensor of shape \(32, 7, 5\)",
    ),
    "no labels": (
        unlabelled,
        {"importance": "fisher"},
        r"Expected calibration batches with labels, .* but got Tensor.*'outputs' or 'norm' or 'low_rank' or",
    ),
    "no labels, a mapping": (
        lambda b: [{"x": x} for x, _ in b],
        {"importance": "fisher"},
        r"Expected calibration batches with labels, .* but got dict of \['x'\]",
    ),
    "other labels": (
        lambda b: [(x, torch.zeros(32, 9)) for x, _ in b],
        {"importance": "fisher"},
        r"Expected integer labels .* but got torch.float32 of shape \(\d+, 9\) for outputs of shape \(\d+, 3\)",
    ),
    "met": (list, {"macs": 1.0}, "Expected a budget that removes something, but macs=1 is met already"),
    "no target": (
        list,
        {"macs": None},
        "Expected exactly one target among macs, params, units and latency, but got none",
    ),
    "two targets": (list, {"params": 0.5}, r"Expected exactly one target .* but got macs=0.5, params=0.5"),
    "outside": (list, {"macs": 70}, r"Expected macs, the fraction that is kept, to be in \(0, 1\], but got 70"),
    "criterion": (list, {"importance": "fischer"}, r"Expected importance to be one of .*Did you mean 'fisher'"),
    "repair": (list, {"repair": "weight"}, r"Expected repair to be one of .* or None, but got 'weight'"),
    "batches": (list, {"batches": 0}, "Expected batches to be an integer of at least 1, or None for all, but got 0"),
    "kinds": (
        list,
        {"kinds": ("channel",)},
        r"Expected structures of kinds \('channel',\) in Classifier, but found none",
    ),
    "one example": (
        lambda b: [(b[0][0][:1], b[0][1][:1])],
        {},
        "Expected at least two calibration examples for a repair",
    ),
    "not called": (
        list,
        {"call": lambda model, batch: model.forward(batch[0])},
        r"Expected call\(model, batch\) to call the model, but it did not",
    ),
    "no loss": (
        list,
        {"loss": lambda model, batch: 0.5, "importance": "fisher"},
        "Expected the loss .* finite scalar tensor, but got float",
    ),
    "floors": (list, {"macs": 0.01}, "Expected a budget within reach"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_that_nothing_was_changed(case: Any, name: str) -> None:
    model, batches = case
    change, options, message = REFUSED[name]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        compress_after_training(model, change(batches), **{"macs": 0.5, **options})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(before) and not model._forward_pre_hooks


def test_without_labels_other_criteria_do(case: Any) -> None:
    model, batches = case
    result = compress_after_training(model, unlabelled(batches), macs=0.5, importance="obs")
    assert result.judged is not None and result.judged[1] < result.judged[0] < 2  # relative errors of the outputs


def test_an_endless_loader_is_bounded(case: Any) -> None:
    model, batches = case
    result = compress_after_training(model, Endless(batches), macs=0.5, batches=3)
    assert result.report.macs_kept <= 0.5


@pytest.mark.parametrize("where", ["repair_readers", "apply_plan"])
def test_what_fails_late_gives_the_weights_back(case: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = case
    before = copy.deepcopy(model.state_dict())
    real = getattr(compress_module, where)

    def fails(*args: Any, **kwargs: Any) -> Any:
        if where == "repair_readers":
            real(*args, **kwargs)
            assert any(not torch.equal(v, before[n]) for n, v in model.state_dict().items())
        raise SurgeryError("the disk is full")

    monkeypatch.setattr(compress_module, where, fails)
    with pytest.raises(SurgeryError, match="the disk is full"):
        compress_after_training(model, batches, macs=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_repair_that_makes_it_worse_is_taken_back(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = case
    plain = copy.deepcopy(model)
    compress_after_training(plain, batches, macs=0.5, repair=None)
    real = compress_module.repair_readers

    def harms(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        done = real(model, *args, **kwargs)
        model.encoder.layers[0].linear2.weight.data *= -50
        return done

    monkeypatch.setattr(compress_module, "repair_readers", harms)
    result = compress_after_training(model, batches, macs=0.5)
    assert result.repairs == () and any("the repair was taken back" in note for note in result.notes)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
