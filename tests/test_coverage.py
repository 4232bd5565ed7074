"""docs/coverage.md is true: every family is examined again, and the page says what the code finds."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="needs the extra `hf`")

from benchmarks import coverage, examination, peers_coverage
from benchmarks.coverage import TITLES, cell, row_of
from benchmarks.examination import KindVerdict, Snapshot, Verdict, difference, examine
from tests.families import MODELS
from tests.zoo import Example

PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
ROWS = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
HEADER, TABLE = ROWS[0], {row[0]: row[1:] for row in ROWS[2:]}
COLUMNS = [next(k for k in (*TITLES, title) if TITLES.get(k, k) == title) for title in HEADER[1:-2]]

ATTENTION = {"head", "qk_dim", "vo_dim"}
WITHOUT_ATTENTION = {
    *("MLP", "LSTM", "ResNet", "depthwise CNN", "nn.Sequential", "ConvNeXt"),
    *("gates in one projection", "in-place operations"),
}
# Kinds of which a family has none that could be removed, and why.
LACKING = {
    "Qwen3": {"qk_dim"},  # queries and keys are normalised over their dims
    "list of heads": {"head"},  # one projection for each
}
# Where forward names a size and the weights are no layer's own, nothing can be put between them.
REFUSED = {"functional weights": ATTENTION, "functional weights, chunk(3)": {"qk_dim", "vo_dim"}}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_family(name: str) -> None:
    example = MODELS[name]
    verdict = examine(example.build, example.args, example.kwargs, name, kinds=coverage.PAGE_KINDS)
    assert not verdict.flags, verdict.notes
    assert verdict.smaller
    single = any("examined in float32" in note for note in verdict.notes)
    assert verdict.error is not None and verdict.error <= (1e-4 if single else 1e-6)
    assert verdict.effect is not None and verdict.effect > 1e-6  # zeroing did something
    assert row_of(verdict, COLUMNS)[1:-1] == TABLE[name][:-1], f"{PAGE.name}: run {coverage.COMMAND}"

    exact = {kind for kind, k in verdict.kinds.items() if k.exact and k.exact == k.found}
    refused = {kind for kind, k in verdict.kinds.items() if k.refused}
    assert refused == REFUSED.get(name, set())
    assert exact & {"ffn", "channel"} or "attention" in name or "heads" in name
    if not (name in WITHOUT_ATTENTION or name.startswith("ResNet")):
        assert ATTENTION - exact == LACKING.get(name, set()) | REFUSED.get(name, set())
    for kind in LACKING.get(name, set()) - {"head"}:
        assert cell(verdict.kinds[kind]).startswith("whole")  # with the reason


def test_the_page_lists_every_family() -> None:
    assert list(TABLE) == list(MODELS)


def test_the_page_beside_others_says_what_was_measured() -> None:
    record = json.loads(peers_coverage.RESULTS.read_text(encoding="utf-8"))
    assert list(record["families"]) == list(MODELS)
    assert peers_coverage.PAGE.read_text(encoding="utf-8") == peers_coverage.page_of(record)


# --------------------------------------------------------------------------------- the examination is no rubber stamp


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


BATCH = (torch.randn(5, 4, generator=torch.Generator().manual_seed(0)),)


def test_a_removal_that_changes_the_outputs_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(model, plan, optimizers=(), verify=None):  # type: ignore[no-untyped-def]
        report = apply_plan(model, plan, optimizers=optimizers, verify=verify)
        with torch.no_grad():
            model.down.weight.mul_(1 + 1e-4)
        return report

    apply_plan = examination.apply_plan
    monkeypatch.setattr(examination, "apply_plan", careless)
    verdict = examine(Pair, BATCH)
    assert verdict.flags == ["wrong"] and not verdict.smaller and not verdict.complete
    assert any("removed: the outputs differ by" in note for note in verdict.notes)


def test_an_optimizer_state_that_stays_behind_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(model, plan, optimizers=(), verify=None):  # type: ignore[no-untyped-def]
        report = apply_plan(model, plan, optimizers=optimizers, verify=verify)
        for optimizer in optimizers:
            for state in optimizer.state.values():
                state["exp_avg"].zero_()
        return report

    apply_plan = examination.apply_plan
    monkeypatch.setattr(examination, "apply_plan", forgetful)
    verdict = examine(Pair, BATCH)
    assert verdict.flags == ["wrong"]
    assert any("after a step: the outputs differ by" in note for note in verdict.notes)


def test_a_failure_that_leaves_a_trace_is_half_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def clumsy(model, plan, optimizers=(), verify=None):  # type: ignore[no-untyped-def]
        model.up.out_features = 5
        raise RuntimeError("no way")

    monkeypatch.setattr(examination, "apply_plan", clumsy)
    verdict = examine(Pair, BATCH)
    assert verdict.flags == ["error", "half-changed"]
    assert verdict.notes[-1] == "apply_plan raised and changed module 'up'"
    assert verdict.kinds["ffn"].exact == 0 and verdict.kinds["ffn"].refused


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.up.weight.data.mul_(1 + 1e-12),
        lambda m: setattr(m.up, "weight", nn.Parameter(m.up.weight.detach().clone())),
        lambda m: setattr(m.up, "out_features", 7),
        lambda m: m.up.register_forward_hook(lambda *_: None),
        lambda m: m.train(),
    ],
    ids=["bits", "object", "number", "hook", "mode"],
)
def test_a_snapshot_sees(change) -> None:  # type: ignore[no-untyped-def]
    model = Pair().double().eval()
    snapshot = Snapshot(model)
    assert snapshot.changes(model) == []
    change(model)
    assert snapshot.changes(model)


def test_difference() -> None:
    a = [("output.logits", torch.tensor([1.0, 4.0]), True), ("output.cache.keys", torch.zeros(3), False)]
    shrunk = [a[0], ("output.cache.keys", torch.zeros(2), False)]
    assert difference(a, shrunk) == 0
    assert difference(a, [("output.logits", torch.tensor([1.0, 5.0]), True)]) == pytest.approx(1 / 5)
    assert difference(a, [("output.logits", torch.tensor([1.0]), True)]) == float("inf")
    assert difference(a, [("output.other", torch.tensor([1.0, 4.0]), True)]) == float("inf")
    assert difference([("o", torch.tensor([1]), True)], [("o", torch.tensor([2]), True)]) == 1


class Sleeper(Pair):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(60)
        return super().forward(x)


class Crash(Pair):
    def forward(self, x: Tensor) -> Tensor:
        import os

        os._exit(3)


def test_a_process_for_each_model() -> None:
    hung = coverage.examined("sleeper", Example(Sleeper, BATCH), timeout=1)
    assert hung.flags == ["hung"] and hung.notes == ["no verdict within 1 s"]
    crashed = coverage.examined("crash", Example(Crash, BATCH), timeout=60)
    assert crashed.flags == ["error"] and crashed.notes == ["the process died (exit status 3)"]
    assert coverage.examined("pair", Example(Pair, BATCH), timeout=60).complete


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    zoo = tmp_path / "some_zoo.py"
    zoo.write_text(
        "from torch import nn\nimport torch\nfrom tests.zoo import Example\n"
        "def build():\n    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))\n"
        "MINE = {'one': Example(build, (torch.ones(2, 4),)), 'two': Example(build, (torch.ones(2, 4),))}\n"
    )
    arguments = ["--zoo", f"{zoo}:MINE", "--only", "one", "--json", str(tmp_path / "v.json"), "--here"]
    monkeypatch.setattr(sys, "argv", ["coverage.py", *arguments, "--markdown", str(tmp_path / "page.md")])
    coverage.main()
    (verdict,) = [Verdict.from_dict(v) for v in json.loads((tmp_path / "v.json").read_text())]
    assert verdict.name == "one" and verdict.complete and verdict.kinds["ffn"].exact == 1
    assert "| one | – | – | – | exact (1) | – | – |" in (tmp_path / "page.md").read_text()
    assert "1 models: 100.0% smaller, 100.0% with every structure exact; wrong 0" in capsys.readouterr().out


def test_cells() -> None:
    assert cell(None) == cell(KindVerdict(pinned={"it is returned by the model": 1})) == "–"
    assert cell(KindVerdict(3, native=2, shim=1)) == "exact (3, 1 by shim)"
    assert cell(KindVerdict(3, shim=2, refused={"why": 1})) == "exact (2 by shim), refused (1)"
    assert cell(KindVerdict(pinned={"it is normalised over": 2})) == "whole (2)"
