"""The families of docs/coverage.md under Torch-Pruning, on terms as fair as we know how to make them.

    python benchmarks/peers_coverage.py                # every family, a process and a time limit for each question
    python benchmarks/peers_coverage.py --only BERT    # some of them, beside the answers that there are

Two questions for each family of ``tests/families.py``, both about half of every group of weights:

- **as it is used**: everything that it finds goes, the residual width too. Does the model still run, and are its
  outputs of the same shape? Whether they are right cannot be told: zeroing does not silence a position of a residual
  stream.
- **as can be checked**: groups that hold a normalisation over the features, an embedding or a bare parameter stay,
  which leaves heads, FFN units and channels. Then the outputs must be those of the model in which the weights around
  the removed positions are zero.

Its terms are those of its own examples: heads are declared (``num_heads``, whole heads go), packed gates are declared
(``out_channel_groups``), output layers are ignored, magnitude importance, and attributes that count heads are set
afterwards; of several ways to set them the one that gives the best outcome counts. Needs the extra ``benchmarks``.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import platform
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from benchmarks import coverage
from benchmarks.examination import PLAIN, Verdict, call, copied, difference, parameters_of, prepared
from lightning_compress.analysis import discover

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "peers_coverage.md", ROOT / "benchmarks" / "results" / "peers_coverage.json"
COMMAND = "python benchmarks/peers_coverage.py"

# How the families of the zoo call these things: what a user of each model would look up.
QUERY = r"(q_proj|query|q_lin|q|query_proj)$"
KEY_OR_VALUE = r"(k_proj|v_proj|key|value|k_lin|v_lin|k|v|key_proj|value_proj)$"
PACKED = r"(qkv|qkv_proj|to_qkv|packed|c_attn|query_key_value|Wqkv)$"
TWO_IN_ONE = r"(gate_up_proj|Wi|first|second|third|both)$"
HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads")
GROUPED = ("num_key_value_heads",)
TOTALS = ("all_head_size", "inner_dim", "embed_dim", "hidden_size", "split_size", "nf", "dim")


@dataclass
class Outcome:
    """What became of one model under one question.

    Args:
        result: "exact" or "shape kept", "wrong" or "other shape", "broken" (the forward raises afterwards), "raised"
            (so did the tool), "nothing pruned", "hung", "died", "not measured" (the question could not be put).
        saved: share of the parameters that went.
        seconds: for everything.
        note: what was raised and where, how large the error is.
        groups: pruned groups.
        heads: layers declared in ``num_heads``.
    """

    result: str
    saved: float = 0.0
    seconds: float = 0.0
    note: str = ""
    groups: int = 0
    heads: int = 0


# --------------------------------------------------------------------------------------------------- its terms


def number(module: nn.Module, names: Sequence[str]) -> int | None:
    """The first attribute of these names on a module, or on its configuration."""
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    return None


def declared(model: nn.Module) -> tuple[dict[nn.Module, int], dict[nn.Module, int]]:
    """(num_heads, out_channel_groups): what its examples declare by hand."""
    heads: dict[nn.Module, int] = {}
    groups: dict[nn.Module, int] = {}
    for parent in model.modules():
        count = number(parent, HEADS)
        if count is None and type(parent).__name__ == "PatchTransformer":
            count = 5
        for name, layer in parent.named_children():
            if not isinstance(layer, nn.Linear):
                continue
            if re.match(TWO_IN_ONE, name):
                groups[layer] = 2
            elif count and (re.match(QUERY, name) or re.match(PACKED, name)):
                heads[layer] = count
            elif count and re.match(KEY_OR_VALUE, name):
                heads[layer] = number(parent, GROUPED) or count
    return heads, groups


def output_layers(model: nn.Module, args: Any, kwargs: Any) -> list[nn.Module]:
    """Layers that make what the model returns, other than its hidden states."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    returned = {
        id(tensors[name])
        for family in discover(model, args, kwargs).pinned
        if family.kind != "hidden" and "it is returned by the model" in family.reasons
        for name in family.parameters
        if name in tensors
    }
    layers = (m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd))
    return [layer for layer in layers if id(layer.weight) in returned]


def repairs(model: nn.Module, before: Mapping[nn.Module, int], after: Mapping[nn.Module, int]) -> Iterator[None]:
    """Set the attributes that count heads, in one usual way after the other."""
    saved = [(m, dict(vars(m))) for m in model.modules()]
    for which in ((), HEADS, (*HEADS, *TOTALS), TOTALS, "config"):
        for module, attributes in saved:
            vars(module).update(attributes)
        for parent in model.modules():
            layer = next((m for m in parent.children() if m in before and before[m] != after[m]), None)
            if layer is None:
                continue
            old, new = before[layer], after[layer]
            width = max(m.out_features for m in parent.children() if m in before)  # of the pruned layer
            for name in HEADS + TOTALS:
                value = vars(parent).get(name)
                if name in which and isinstance(value, int):
                    if value == old:
                        setattr(parent, name, new)
                    elif name in TOTALS and value * new in (width * old, width // 3 * old):
                        setattr(parent, name, value * new // old)
            if which == "config" and hasattr(parent, "config"):
                parent.config = copy.copy(parent.config)
                parent.config.num_attention_heads = new
        yield


# --------------------------------------------------------------------------------------------------- one model


def is_checkable(group: Any, heads: Mapping[nn.Module, int], pruner: Any) -> bool:
    """Whether zeroing silences the group: heads, or no statistics over it, no embedding and no bare parameter."""
    targets = [dep.target.module for dep, _ in group]
    made = [dep.target.module for dep, _ in group if not pruner.DG.is_in_channel_pruning_fn(dep.handler)]
    if any(isinstance(target, nn.Linear) and target in heads for target in made):
        return not any(isinstance(target, nn.LayerNorm) for target in targets)
    return not any(
        isinstance(target, nn.LayerNorm | nn.GroupNorm | nn.Embedding | nn.Parameter)
        or ("Norm" in type(target).__name__ and "Batch" not in type(target).__name__)
        for target in targets
    )


@torch.no_grad()
def silence(group: Any, pruner: Any, names: Mapping[nn.Module, str], target: nn.Module) -> None:
    """In another copy of the model, zero the weights that make and those that read what ``group`` removes."""
    modules = dict(target.named_modules())
    for dep, idxs in group:
        layer = modules.get(names.get(dep.target.module, "?"))
        if not isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
            continue
        positions = torch.tensor([int(i) for i in idxs])
        groups, transposed = getattr(layer, "groups", 1), getattr(layer, "transposed", False)
        if not pruner.DG.is_in_channel_pruning_fn(dep.handler):
            if groups == 1 and not transposed:  # those that read it suffice
                layer.weight.index_fill_(0, positions, 0)
                if layer.bias is not None:
                    layer.bias.index_fill_(0, positions, 0)
        elif groups == 1:
            layer.weight.index_fill_(0 if transposed else 1, positions, 0)
        elif groups < layer.in_channels:
            inputs, outputs = layer.in_channels // groups, layer.out_channels // groups
            for position in positions.tolist():
                block = position // inputs
                layer.weight[block * outputs : (block + 1) * outputs, position % inputs] = 0


def answer(example: Any, checked: bool) -> Outcome:
    """One question about one model."""
    import torch_pruning as tp

    model = prepared(example.build)
    args, kwargs = copied(tuple(example.args)), copied(dict(example.kwargs or {}))
    size = parameters_of(model)
    with torch.no_grad():
        dense = call(model, args, kwargs, PLAIN)
    zeroed = copy.deepcopy(model)
    heads, groups = declared(model)
    before = dict(heads)
    names = {module: name for name, module in model.named_modules()}

    def total(outputs: Any) -> torch.Tensor:
        tensors = [t for _, t, own in coverage_outputs(outputs) if own and t.is_floating_point() and t.requires_grad]
        return sum(t.sum() for t in tensors)  # type: ignore[return-value]

    try:
        pruner = tp.pruner.BasePruner(
            model,
            example_inputs=(args, kwargs),
            forward_fn=lambda m, inputs: m(*inputs[0], **inputs[1]),
            output_transform=total,
            importance=tp.importance.MagnitudeImportance(p=2, group_reduction="mean"),
            pruning_ratio=0.5,
            ignored_layers=output_layers(model, args, kwargs),
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=0.5,
            out_channel_groups=groups,
        )
        pruned = 0
        for group in pruner.step(interactive=True):
            if checked:
                if not is_checkable(group, before, pruner):
                    continue
                silence(group, pruner, names, zeroed)
            group.prune()
            pruned += 1
    except Exception as failure:  # any exception is a finding
        return Outcome("raised", note=text_of(failure), heads=len(before))
    saved = 1 - parameters_of(model) / size
    if not saved:
        return Outcome("nothing pruned")
    with torch.no_grad():
        expected = call(zeroed, args, kwargs, PLAIN) if checked else dense
    best = Outcome("broken", saved, groups=pruned, heads=len(before))
    # what a group that stayed says about its heads has been changed all the same: count them anew
    after = {m: m.out_features * before[m] // _width(zeroed, names[m]) for m in before}
    for _ in repairs(model, before, after):
        try:
            with torch.no_grad():
                outputs = call(model, args, kwargs, PLAIN)
        except Exception as failure:  # the next way of setting attributes may do
            best.note = best.note or text_of(failure)
            continue
        shapes = [(path, t.shape) for path, t, own in outputs if own]
        if shapes != [(path, t.shape) for path, t, own in dense if own]:
            if best.result == "broken":
                best.result, best.note = "other shape", ""
        elif not checked:
            best.result, best.note = "shape kept", ""
            break
        else:
            error = difference(outputs, expected)
            best.result, best.note = "wrong", f"the outputs differ by {error:.0e}"
            if error <= PLAIN.equal:
                best.result, best.note = "exact", f"{error:.0e}"
                break
    return best


def text_of(failure: BaseException) -> str:
    where = traceback.extract_tb(failure.__traceback__)[-1]
    return (
        f"{type(failure).__name__}: {' '.join(str(failure).split())[:160]} ({Path(where.filename).name}:{where.name})"
    )


def _width(model: nn.Module, path: str) -> int:
    return int(model.get_submodule(path).out_features)  # type: ignore[arg-type]


def coverage_outputs(outputs: Any) -> list[Any]:
    from benchmarks.examination import outputs_of

    return list(outputs_of(outputs))


def _child(example: Any, checked: bool, pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        outcome = answer(example, checked)
    except Exception as failure:  # not its fault: our own part of the question
        outcome = Outcome("not measured", note=text_of(failure))
    pipe.send(asdict(outcome))
    pipe.close()


def asked(example: Any, checked: bool, timeout: float) -> Outcome:
    """The answer from a process of its own, or "hung"."""
    context = multiprocessing.get_context("fork")
    mine, other = context.Pipe(duplex=False)
    started = time.perf_counter()
    process = context.Process(target=_child, args=(example, checked, other), daemon=True)
    process.start()
    other.close()
    outcome = Outcome("hung", note=f"no answer within {timeout:g} s")
    try:
        if mine.poll(timeout):
            outcome = Outcome(**mine.recv())
    except EOFError:
        outcome = Outcome("died")
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        mine.close()
    outcome.seconds = time.perf_counter() - started
    return outcome


# --------------------------------------------------------------------------------------------------------- the page


def told(outcome: Mapping[str, Any]) -> str:
    """One answer as a cell."""
    kept = outcome["result"] in ("exact", "shape kept", "wrong", "other shape", "broken")
    return f"{outcome['result']}, {outcome['saved']:.1%}" if kept else str(outcome["result"])


def ours_told(verdict: Verdict) -> str:
    saved = 1 - verdict.after / max(1, verdict.before)
    exact, found = (sum(getattr(kind, what) for kind in verdict.kinds.values()) for what in ("exact", "found"))
    return ", ".join(verdict.flags) or f"exact, {saved:.1%}{'' if exact == found else f' ({found - exact} refused)'}"


def counted(answers: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{result} {n}" for result, n in Counter(a["result"] for a in answers).most_common())


def page_of(record: Mapping[str, Any]) -> str:
    """docs/peers_coverage.md from the record of a run."""
    families = record["families"]
    used, checked = ([family[key] for family in families.values()] for key in ("as_used", "as_checked"))
    verdicts = {name: Verdict.from_dict(family["ours"]) for name, family in families.items()}
    rows = [
        f"| {name} | {ours_told(verdicts[name])} | {told(family['as_checked'])} | {told(family['as_used'])} |"
        for name, family in families.items()
    ]
    notes = dict.fromkeys(
        f"- {name}: {o['result']}: {o['note']}"
        for name, family in families.items()
        for o in (family["as_checked"], family["as_used"])
        if o["note"] and o["result"] != "exact"
    )
    more = [
        name
        for name, family in families.items()
        if family["as_checked"]["result"] == "exact"
        and family["as_checked"]["saved"] > 1 - verdicts[name].after / max(1, verdicts[name].before) + 0.005
    ]
    return f"""# Coverage, side by side

Written by `{record["command"]}` ({", ".join(f"{k} {v}" for k, v in record["versions"].items())};
{record["machine"]}; {record["timeout"]:g} s for each question; raw answers in
[peers_coverage.json](../benchmarks/results/peers_coverage.json)).

The families of [coverage.md](coverage.md) under [Torch-Pruning](https://github.com/VainF/Torch-Pruning), half of
everything that it finds, on the terms of its own examples: heads and packed gates declared, whole heads go, output
layers ignored, magnitude importance, head counts set afterwards in the way that works best. Percentages are parameters
saved.

- *as can be checked*: residual width stays, so that zeroing is exact. *exact*: the outputs are those of the model with
  the removed weights zeroed; *broken*: the forward raises after the removal; *raised*: the tool itself does.
- *as used*: the residual width goes, too, which this library does not do by default. Only the shape of the outputs can
  be compared.
- This library is told nothing about the models. It removes Q/K and V/O dims besides heads; Torch-Pruning can do that in
  place of heads.

| family | this library | Torch-Pruning, as can be checked | Torch-Pruning, as used |
| --- | --- | --- | --- |
{chr(10).join(rows)}

This library: {coverage.totals_of(verdicts.values())}.

Torch-Pruning as can be checked: {counted(checked)}. As used: {counted(used)}.

Where it does well: whatever it removed without raising or breaking the forward was exact{_but(checked)}. On
convolutional networks it removes the same channels; it prunes residual width out of the box, which saves most where it
works.
{f"It saves more than this library in its checkable part on {', '.join(more)}.{chr(10)}" if more else ""}
What was raised, or where it stopped:

{chr(10).join(notes)}
"""


def _but(checked: Sequence[Mapping[str, Any]]) -> str:
    wrong = sum(o["result"] == "wrong" for o in checked)
    return f" but for {wrong} famil{'y' if wrong == 1 else 'ies'}" if wrong else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="families whose name matches this regular expression")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for one question (default: 60)")
    options = parser.parse_args()
    coverage.preload()
    import torch_pruning  # noqa: F401  before the forks

    families: dict[str, dict[str, Any]] = {}
    if options.only and RESULTS.exists():
        families = json.loads(RESULTS.read_text(encoding="utf-8"))["families"]
    models = coverage.models_of(str(ROOT / coverage.ZOO))
    for name, example in models.items():
        if not re.search(options.only, name):
            continue
        used, checked = (asked(example, question, options.timeout) for question in (False, True))
        ours = coverage.examined(name, example, options.timeout)
        families[name] = {"as_used": asdict(used), "as_checked": asdict(checked), "ours": ours.as_dict()}
        print(f"{name:32s} {ours_told(ours):24s} {told(asdict(checked)):24s} {told(asdict(used))}", flush=True)
    record = {
        "command": COMMAND,
        "versions": {name: version(name) for name in ("torch-pruning", "torch", "transformers")},
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} CPU cores, one thread, beside other work",
        "timeout": options.timeout,
        "families": {name: families[name] for name in models if name in families},
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page_of(record), encoding="utf-8")


if __name__ == "__main__":
    main()
