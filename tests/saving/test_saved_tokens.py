"""A model that prunes tokens is saved and built again with its runtime."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_compress import PruningPlan, apply_plan, discover
from lightning_compress.saving import load_compressed, save_compressed
from lightning_compress.token_policies import Thresholds, TopK
from lightning_compress.tokens.install import install_tokens, remove_tokens, token_runtime
from lightning_compress.tokens.proof import prove_tokens
from lightning_compress.tokens.record import read_token_record, token_records
from lightning_compress.tokens.runtime import TokenRuntime
from tests.saving.test_fuzz import ODD, places

KWARGS = {"input_ids": torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0))}


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32, vocab_size=60)
    return BertForSequenceClassification(config).eval()


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = bert()

    def forward(self, **kwargs: Any) -> Any:
        return self.model(**kwargs).logits


def pruned(model: nn.Module, policy: Any) -> nn.Module:
    proven = prove_tokens(model, (), KWARGS)
    install_tokens(model, TokenRuntime(proven.stack, policy, min_keep=2, scatter=proven.scatter))
    return model


@pytest.mark.parametrize(
    "policy", [Thresholds((0.9, 1.05)), TopK((0.6, 0.3), accumulated=True)], ids=["learned", "top"]
)
@torch.no_grad()
def test_tokens_are_pruned_after_loading(policy: Any, tmp_path: Path) -> None:
    model = bert()
    structures = discover(model, (), KWARGS, prove=True)
    plan = PruningPlan.of(model, structures, {s.name: range(0, s.units, 2) for s in structures})
    apply_plan(model, plan, verify=((), KWARGS))
    pruned(model, policy)
    save_compressed(model, tmp_path / "small")
    again = load_compressed(tmp_path / "small")
    assert torch.equal(again(**KWARGS).logits, model(**KWARGS).logits)
    ours, theirs = token_runtime(model), token_runtime(again)
    assert ours is not None and theirs is not None and ours.counts is not None and theirs.counts is not None
    assert torch.equal(ours.counts.entering, theirs.counts.entering)
    assert float(theirs.counts.entering[-1].max()) < 12
    assert (theirs.policy, theirs.min_keep, theirs.stack) == (policy, 2, ours.stack)


@torch.no_grad()
def test_a_module_inside_keeps_its_runtime(tmp_path: Path) -> None:
    model = Wrapped().eval()
    pruned(model.model, Thresholds((1.0, 1.1)))
    save_compressed(model, tmp_path / "small", Wrapped)
    again = load_compressed(tmp_path / "small", Wrapped)
    assert torch.equal(again(**KWARGS), model(**KWARGS))
    assert token_runtime(again.model) is not None and token_runtime(again) is None


def changed(folder: Path, change: Any) -> None:
    path = folder / "compression.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data["token_pruning"][0])
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(module="elsewhere"), "a module 'elsewhere', whose tokens are pruned, but it has none"),
        (lambda t: t["runtime"]["stack"]["layers"].pop(), "one decision after each of the 2 layers but the last"),
        (lambda t: t["runtime"]["stack"].update(layers=["a"] * 3), r"modules \['a', 'a.attention.self', .*\] of the"),
        (lambda t: t["runtime"]["stack"].update(layers=["a"]), "layers to be a list of 2 to 100000 paths"),
        (lambda t: t["runtime"]["stack"].update(state="kwargs."), "state to be args.NUMBER or kwargs.NAME"),
        (lambda t: t["runtime"]["stack"]["dims"].update(x=[0]), "an integer from -8 to -1, but got 0"),
        (lambda t: t["runtime"]["stack"]["dims"].update(x=[-1] * 9), "a list of at most 8 dims"),
        (lambda t: t["runtime"]["policy"].update(values=[1.0, None]), r"policy.values\[1\] to be a number"),
        (lambda t: t["runtime"].update(min_keep=0), "min_keep to be an integer from 1"),
        (lambda t: t["runtime"].pop("scatter"), r"\['scatter'\] are missing"),
    ],
    ids=["module", "count", "names", "one", "state", "dim", "dims", "policy", "min_keep", "key"],
)
def test_a_manifest_that_does_not_fit_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    save_compressed(pruned(bert(), Thresholds((0.9, 1.05))), tmp_path / "small")
    changed(tmp_path / "small", change)
    with pytest.raises(ValueError, match=message):
        load_compressed(tmp_path / "small")


@pytest.mark.parametrize("part", range(10))
def test_exchanged_values_are_refused_or_harmless(part: int) -> None:
    model = pruned(bert(), Thresholds((0.9, 1.05)))
    record = token_records(model)[0]
    remove_tokens(model)
    for seed in range(50 * part, 50 * part + 50):
        choose, data = random.Random(seed), json.loads(json.dumps({"module": record.module, "runtime": record.state}))
        path = choose.choice(places(data))
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = choose.choice(ODD)
        try:
            read_token_record(data, "token_pruning[0]").install(model)
        except ValueError:
            assert token_runtime(model) is None
        else:
            remove_tokens(model)
    assert all("forward" not in vars(module) for module in model.modules())
