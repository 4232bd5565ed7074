"""Progress: every long loop tells what it goes through, results are the same, and nothing is printed unasked."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_compress import (
    apply_plan,
    apply_plan_to_checkpoint,
    attach_quantizers,
    checkpoint_scores,
    convert,
    discover,
    explain,
    export_model,
    make_plan,
    measure_latency,
    measure_latency_table,
    progress_bars,
    prove_tokens,
    unit_norms,
    unit_scores,
    used_ids,
    weight_kinds,
)
from lightning_compress.latency.loop import ROUNDS
from lightning_compress.progress import as_long_as, phase, quiet, steps
from lightning_compress.quantizers import Uniform
from tests.latency.fake import CALL, Clock, Stack
from tests.recorded import Recorded

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def nothing_printed(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Any:
    """No test here prints but those of ``progress_bars``."""
    yield
    if "bars_of_tqdm" not in request.node.name:
        assert capsys.readouterr() == ("", "")


def mlp(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, 6), nn.GELU(), nn.Linear(6, 2))


# The ready-made bar, and the helpers of those who tell


def test_bars_of_tqdm_show_what_is_done_and_go(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bars([1, 2, 3], "adding up")) == [1, 2, 3]
    out, err = capsys.readouterr()
    assert out == "" and "adding up" in err and "/3 " in err and "\n" not in err
    assert list(progress_bars(iter("ab"), "unknown length")) == ["a", "b"]
    assert "unknown length: 0it" in capsys.readouterr().err


def test_without_tqdm_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"Expected tqdm for a progress bar, .* Install it: pip install tqdm\."):
        progress_bars([1], "adding up")


def test_quiet_changes_nothing() -> None:
    items = [1, 2]
    assert quiet(items, "anything") is items


def test_a_phase_is_a_bar_of_one_item_and_happens_whatever_the_bar_does() -> None:
    recorded = Recorded()
    with phase(recorded, "comparison"):
        assert recorded.open == 1 and recorded.bars == [("comparison", 1, 1)]
    assert recorded.of("comparison") == [(1, 1)]
    happened = False
    with phase(lambda items, what: [], "comparison"):
        happened = True
    assert happened
    with pytest.raises(RuntimeError, match="anything"), phase(recorded, "comparison"):
        raise RuntimeError("anything")
    assert recorded.open == 0


def test_steps_are_counted_and_the_bar_ends_with_them() -> None:
    recorded = Recorded()

    def failing() -> None:
        with steps(recorded, "runs") as step:
            step()
            step()
            raise RuntimeError("anything")

    with pytest.raises(RuntimeError, match="anything"):
        failing()
    assert recorded.of("runs") == [(None, 2)]
    with steps(quiet, "runs") as step:
        step()
    with steps(lambda items, what: [], "runs") as step:  # a bar that gives nothing
        step()


def test_a_loop_of_unknown_length() -> None:
    left = [1, 2, 3]
    assert [(number, left.pop()) for number in as_long_as(lambda: len(left) > 1)] == [(0, 3), (1, 2)]


# Who tells


def test_discovery_and_its_proof() -> None:
    recorded, model = Recorded(), mlp()
    found = discover(model, (X,), prove=True, progress=recorded)
    assert found == discover(model, (X,), prove=True)
    ((length, operations),) = recorded.of("operations traced")
    assert length is None and operations >= 5  # no less than the calls of layers
    assert recorded.of("weights in float64") == [(6, 6)]
    assert recorded.of("ways of removal") == [(2, 2)] == [(len(found), len(found))]
    assert recorded.of("removal of all together") == [(1, 1), (1, 1)]  # one unit of each, and every second
    assert len(recorded.bars) == 5


def test_layers_are_proven_one_by_one() -> None:
    recorded, model = Recorded(), Stack(8, 8, 8)
    found = discover(model, CALL, kinds=("layer",), prove=True, progress=recorded)
    assert found == discover(model, CALL, kinds=("layer",), prove=True) and len(found) == 3
    assert (3, 3) in recorded.of("layers")


class Signs(nn.Module):
    """Queries divided by their own magnitude, 0 / 0 where a unit of theirs is zero; and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(4, 5, bias=False), nn.Linear(4, 5, bias=False)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q = self.q(x)
        return self.down(torch.relu(self.up(x))), (q / q.abs()) @ self.k(x).transpose(0, 1)


def test_what_makes_nan_is_looked_for_one_by_one() -> None:
    recorded = Recorded()
    found = discover(Signs(), (X,), prove=True, progress=recorded)
    assert found == discover(Signs(), (X,), prove=True)
    assert [s.kind for s in found] == ["ffn"]
    assert any("hold NaN once a unit is zero" in reason for p in found.pinned for reason in p.reasons)
    assert recorded.of("removals without NaN") == [(2, 2)]
    assert recorded.of("weights in float64") == [(6, 6)] * 3  # together, one by one, those without


def test_an_explanation() -> None:
    recorded, model = Recorded(), mlp()
    assert str(explain(model, (X,), progress=recorded)) == str(explain(model, (X,)))
    assert recorded.of("ways of removal") == [(2, 2)]


def test_a_failing_trace_leaves_no_bar() -> None:
    recorded = Recorded()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        discover(mlp(), (torch.randn(3, 5),), progress=recorded)
    assert recorded.open == 0 and [what for what, _, _ in recorded.bars] == ["operations traced"]


def test_a_removal() -> None:
    models, recorded = (mlp(), mlp()), Recorded()
    plan = make_plan(models[0], discover(models[0], (X,)), units=0.5)
    shown = apply_plan(models[0], plan, verify=((X,), {}), progress=recorded)
    silent = apply_plan(models[1], plan, verify=((X,), {}))
    assert shown.plan == silent.plan and torch.equal(models[0](X), models[1](X))
    assert recorded.of("ways of removal") == [(2, 2)] and recorded.of("removal of all together") == [(1, 1)]
    assert recorded.of("weights in float64") == [(6, 6)] * 3  # perturbed, zeroed, small
    # a plan whose ways are known needs no search
    recorded = Recorded()
    apply_plan(mlp(), shown.plan, verify=((X,), {}), progress=recorded)
    assert recorded.of("ways of removal") == []


def test_scores() -> None:
    recorded, model = Recorded(), mlp()
    structures = discover(model, (X,))
    norms = unit_norms(model, structures, progress=recorded)
    scores = unit_scores(model, structures, lambda _, s: norms[s.name], progress=recorded)
    assert all(torch.equal(scores[name], norms[name]) for name in structures.counts)
    plan = make_plan(model, structures, units=0.5, progress=recorded)
    assert plan == make_plan(model, structures, units=0.5)
    assert recorded.bars == [("norms of units", 2, 2), ("scores of units", 2, 2), ("norms of units", 2, 2)]


def test_runs_that_are_timed() -> None:
    recorded = Recorded()
    models = {"one": mlp(), "other": mlp(2)}
    times = measure_latency(models, (X,), repeats=3, warmup=2, max_seconds=60, progress=recorded)
    assert [t.runs for t in times.values()] == [3, 3]
    assert recorded.bars == [("runs timed, for up to 60 s", None, 2 * (2 + 3))]
    recorded = Recorded()
    times = measure_latency(models, (X,), repeats=3, warmup=2, max_seconds=0, progress=recorded)
    assert [t.runs for t in times.values()] == [1, 1]
    assert recorded.bars == [("runs timed, for up to 0 s", None, 2 + 2)]


class Telling(Clock):
    """A clock that passes on what it is told to show."""

    def __call__(self, models: Any, args: Any, kwargs: Any, **options: Any) -> Any:
        list(options["progress"](models, "measured"))
        return super().__call__(models, args, kwargs, **options)


def test_a_latency_table_and_the_plan_made_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, model, clock = Recorded(), Stack(64, 32), Telling()
    structures = discover(model, CALL, kinds=("ffn",), prove=True)
    table = measure_latency_table(model, structures, CALL, cache=False, measure=clock, progress=recorded)
    assert table == measure_latency_table(model, structures, CALL, cache=False, measure=Telling())
    ((copies, made),) = recorded.of("smaller copies")
    assert copies == made and recorded.of("measured") == [(made + 2, made + 2)]  # and the dense model, twice
    recorded = Recorded()
    monkeypatch.setattr("lightning_compress.budget.measure_latency", clock)
    plan = make_plan(model, structures, latency=0.6, example=(CALL, {}), table=table, progress=recorded)
    assert plan == make_plan(model, structures, latency=0.6, example=(CALL, {}), table=table)
    ((rounds, measured),) = recorded.of("plans measured, at most")
    assert rounds == ROUNDS and 1 <= measured <= ROUNDS and len(recorded.of("measured")) == measured
    assert recorded.of("norms of units") == [(2, 2)]


def test_conversion() -> None:
    models, recorded = (mlp().eval(), mlp().eval()), Recorded()
    for model in models:
        attach_quantizers(model, {"0.weight": Uniform(8), "2.weight": Uniform(4)})
    example = ((X,), {})
    shown = convert(models[0], "auto", example, tolerance=1e6, seconds=1e-6, progress=recorded)
    silent = convert(models[1], "auto", example, tolerance=1e6, seconds=1e-6)
    assert set(shown.milliseconds) == set(silent.milliseconds) and shown.errors == silent.errors
    assert recorded.of("integers of weights") == [(2, 2)]
    assert recorded.of("backends compared") == [(2, 2)]  # packed and unpacked
    assert len(recorded.bars) == 3 and recorded.bars[-1][0].startswith("runs timed")


def test_kinds_of_weights() -> None:
    recorded, model = Recorded(), mlp()
    assert weight_kinds(model, (X,), progress=recorded) == weight_kinds(model, (X,))
    assert len(recorded.of("operations traced")) == 1


def test_the_proof_that_tokens_can_leave() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    tokens, recorded = torch.randn(2, 8, 16), Recorded()
    proof = prove_tokens(model, (tokens,), progress=recorded)
    assert proof == prove_tokens(model, (tokens,))
    ((length, runs),) = recorded.of("runs with pruned tokens")
    assert length is None and runs >= 4  # masked and gathered, for two decisions at least
    ((parameters, seen),) = recorded.of("weights in float64")
    assert parameters == seen == len(list(model.parameters()))


def test_an_export(tmp_path: Path) -> None:
    recorded = Recorded()
    result = export_model(mlp(), tmp_path / "model.pt2", "torch_export", ((X,), {}), progress=recorded)
    assert recorded.bars == [("calls compared", None, len(result.tried))] and recorded.open == 0


def test_files_of_a_checkpoint(tmp_path: Path) -> None:
    model, recorded = mlp(), Recorded()
    (tmp_path / "dense").mkdir()
    save_file(model.state_dict(), tmp_path / "dense" / "model.safetensors")
    structures = discover(model, (X,))
    scores = checkpoint_scores(structures, tmp_path / "dense", progress=recorded)
    silent = checkpoint_scores(structures, tmp_path / "dense")
    assert all(torch.equal(scores[name], silent[name]) for name in silent)
    plan = make_plan(model, structures, units=0.5, scores=scores)
    apply_plan_to_checkpoint(plan, tmp_path / "dense", tmp_path / "shown", progress=recorded)
    apply_plan_to_checkpoint(plan, tmp_path / "dense", tmp_path / "silent")
    assert recorded.of("tensors of model.safetensors") == [(6, 6), (6, 6)]
    shown, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("shown", "silent"))
    assert shown == other


def test_texts_of_a_corpus() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2, "?": 3}, unk_token="?"))
    recorded, texts = Recorded(), ["a", "c"]
    assert used_ids(tokenizer, texts, characters=False, progress=recorded) == (0, 2, 3)
    assert used_ids(tokenizer, iter(texts), characters=False, progress=recorded) == (0, 2, 3)
    assert recorded.of("texts tokenized") == [(2, 2), (None, 2)]
