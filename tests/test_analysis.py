import pytest
import torch
from torch import nn

from lightning_compress.analysis import discover, explain
from lightning_compress.surgery import SurgeryError
from tests.zoo import MODELS

X = torch.randn(3, 4)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_discover_proves_when_asked() -> None:
    assert [(s.kind, s.tier) for s in discover(mlp(), (X,))] == [("ffn", None)]
    assert [(s.kind, s.tier) for s in discover(mlp(), (X,), prove=True)] == [("ffn", "native")]
    assert [(s.kind, s.tier) for s in discover(mlp(), kwargs={"input": X}, prove=True)] == [("ffn", "native")]


def test_discover_only_some_kinds() -> None:
    example = MODELS["BERT"]
    model = example.model()
    found = discover(model, kwargs=example.kwargs, kinds=("head", "ffn"), prove=True)
    assert {s.kind for s in found} == {"head", "ffn"}
    assert discover(model, kwargs=example.kwargs, kinds="qk_dim").counts.keys().isdisjoint(found.counts)


def test_discover_refuses_unknown_kinds_and_wrapped_models() -> None:
    with pytest.raises(ValueError, match="Did you mean 'head'"):
        discover(mlp(), (X,), kinds="heads")
    with pytest.raises(SurgeryError, match="got DataParallel"):
        discover(nn.DataParallel(mlp()), (X,), prove=True)


def test_explain_shows_structures_and_what_stays_whole() -> None:
    example = MODELS["packed attention, literal sizes"]
    text = str(explain(example.model(), example.args))
    lines = text.splitlines()
    assert lines[0].split() == ["structure", "kind", "units", "removal", "parameters"] and set(lines[1]) == {"-", " "}
    assert lines[2].split(maxsplit=3)[:3] == ["body.head", "head", "5"] and "scatter/gather shim" in lines[2]
    assert "Stays whole:" in lines and "(60 units)" in text
    assert all(len(line) < 200 for line in lines)


def test_explain_takes_structures() -> None:
    text = str(explain(discover(mlp(), (X,))))
    assert text.splitlines()[2].split() == ["ffn", "ffn", "8", "not", "proven", "yet", "96.6%"]


def test_explain_says_that_nothing_can_go_and_why() -> None:
    text = str(explain(nn.Linear(4, 2), (X,)))
    assert text.startswith("No structure can be removed.")
    assert "it is returned by the model" in text
    assert "Of 10 parameters 0.0% belong to a structure" in text and "100.0% only to families that stay whole" in text


def test_explain_without_weights_is_not_proven() -> None:
    with torch.device("meta"):
        model = mlp()
    explanation = explain(model, (X,))
    assert [row.tier for row in explanation.structures] == [None] and "not proven yet" in str(explanation)
    with pytest.raises(SurgeryError, match="weights with values"):
        explain(model, (X,), prove=True)
