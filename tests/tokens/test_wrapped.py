"""Models that prune tokens, copied, cast, compiled, checkpointed, replicated: right, or refused with the way out."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_compress.tokens.errors import TokenPruningError
from lightning_compress.tokens.install import install_tokens, remove_tokens, token_runtime
from lightning_compress.tokens.proof import prove_tokens
from lightning_compress.tokens.runtime import TokenRuntime
from tests.tokens.agreement import EXACT, POLICY, proven
from tests.tokens.encoders import CALLS, Encoder, built, furthest, shaken, states

NAMES = ["bert-tags-sdpa", "torch-post-all-padded"]


def installed(name: str) -> tuple[nn.Module, TokenRuntime]:
    """A model of its own with a runtime."""
    model = built(name)
    runtime = install_tokens(model, proven(name)[1].runtime(POLICY))
    runtime.worthwhile, runtime.saving = 0.0, 1
    return model, runtime


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_has_a_runtime_of_its_own(name: str) -> None:
    model, runtime = installed(name)
    call = CALLS[name](4)
    expected = model(**call)  # with a graph, which no copy could take along
    other = copy.deepcopy(model)
    own = token_runtime(other)
    assert own is not None and own is not runtime and own.counts is None and own.policy == POLICY
    with torch.no_grad():
        assert furthest(expected, other(**call)) == 0
        for parameter in model.parameters():
            parameter.zero_()
        assert furthest(expected, other(**call)) == 0  # not with the weights of the original
        own.mode = "off"
        whole = other(**call)
        assert furthest(expected, whole) > 1e-3
        assert remove_tokens(other) is own and token_runtime(model) is runtime
        assert furthest(whole, other(**call)) == 0
    assert not any("forward" in vars(m) or m._forward_pre_hooks for m in other.modules())
    assert not any(m._forward_pre_hooks_with_kwargs for m in other.modules())


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_model(name: str) -> None:
    model, _ = installed(name)
    plain = built(name)
    assert model.state_dict().keys() == plain.state_dict().keys()
    call = CALLS[name](4)
    with torch.no_grad():
        expected = model(**call)
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        for parameter in model.parameters():
            parameter.zero_()
        model.load_state_dict(torch.load(file, weights_only=True))
        assert furthest(expected, model(**call)) == 0


def test_a_pickled_model_prunes_on() -> None:
    model, _ = installed("torch-post-all-padded")
    call = states(4)
    with torch.no_grad():
        assert furthest(model(**call), pickle.loads(pickle.dumps(model))(**call)) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_after_the_runtime_was_put_on(name: str, dtype: torch.dtype) -> None:
    """Lower precision: near the same decisions in float64, whose scores might fall on another side of a threshold."""
    model, runtime = installed(name)
    call = CALLS[name](4)

    def decide(layer: int, rows: Tensor | None, index: Tensor | None, active: Tensor) -> Tensor:
        table = (torch.arange(active.shape[1] if index is None else 64) % (3 - layer) != 1).expand(len(active), -1)
        return table if index is None else table.gather(1, index)

    runtime.decide = decide
    with torch.no_grad():
        expected = model(**call)
        model.to(dtype)
        lower = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}
        gathered = model(**lower)
        runtime.mode = "mask"
        masked = model(**lower)
        runtime.mode = "gather"
        tolerance = 64 * torch.finfo(dtype).eps
        assert next(iter(gathered.values()) if isinstance(gathered, dict) else iter([gathered])).dtype == dtype
        assert furthest(_wide(masked), _wide(gathered)) < tolerance
        assert furthest(expected, _wide(gathered)) < tolerance
        assert runtime.counts is not None and float(runtime.counts.entering[-1].sum()) < float(
            runtime.counts.real.sum()
        )
        runtime.decide = None
        assert all(bool(t.isfinite().all()) for t in _wide(model(**lower)))
        model.double()
        assert token_runtime(model) is runtime


def _wide(output: Any) -> list[Tensor]:
    return [t.double() for t in (output.values() if isinstance(output, dict) else [output])]


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str) -> None:
    model, runtime = installed(name)
    call = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in CALLS[name](4).items()}
    model.float()
    runtime.decide = lambda layer, rows, index, active: active & (torch.arange(active.shape[1]) != 3 - layer)
    with torch.no_grad():
        expected = model(**call)
        with torch.autocast("cpu", torch.bfloat16):
            lower = model(**call)
    assert 0 < furthest(_wide(expected), _wide(lower)) < 0.3
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        (_wide(model(**call))[0].square().mean()).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", NAMES)
def test_modes_follow_the_training_flag(name: str) -> None:
    model, runtime = installed(name)
    call = CALLS[name](4)
    with torch.no_grad():
        pruned = model(**call)
        runtime.mode = "off"
        whole = model(**call)
        runtime.mode, runtime.train_mode = "gather", "off"
        assert furthest(whole, model.train()(**call)) == 0
        assert furthest(pruned, model.eval()(**call)) == 0
    with torch.inference_mode():
        assert furthest(pruned, model(**call)) == 0
    assert furthest(pruned, model(**call)) < EXACT  # with gradients
    runtime.train_mode = "soft"
    with pytest.raises(TokenPruningError, match=r"settings of soft pruning, but got none: set runtime\.soft"):
        model.train()(**call)
    assert furthest(pruned, model.eval()(**call)) < EXACT


def test_the_flag_of_the_layers_decides() -> None:
    """A frozen encoder in evaluation mode inside a model that trains."""
    model, runtime = installed("bert-tags-sdpa")
    model.train()
    model.bert.encoder.eval()  # type: ignore[union-attr]
    runtime.train_mode = "off"
    call = CALLS["bert-tags-sdpa"](4)
    with pytest.raises(TokenPruningError, match="without output_hidden_states=True"):
        model(**call, output_hidden_states=True)
    runtime.mode, runtime.train_mode = "off", "gather"
    assert len(model(**call, output_hidden_states=True).hidden_states) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_around_the_model_are_right_and_around_layers_refused(reentrant: bool) -> None:
    model, runtime = installed("torch-post-all-padded")
    call = states(4)
    gradients = []
    for whole in (False, True):
        x = call["x"].clone().requires_grad_()
        output = checkpoint(model, x, call["mask"], use_reentrant=reentrant) if whole else model(x, call["mask"])
        output.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in model.parameters())])
        model.zero_grad()
    for one, other in zip(*gradients, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)
    layer = model.encoder.layers[1]  # type: ignore[union-attr,index]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(inner, *args, use_reentrant=reentrant, **kwargs)
    x = call["x"].clone().requires_grad_()
    if not reentrant:  # the other kind takes no keyword arguments
        with pytest.raises(TokenPruningError, match=r"'encoder.layers.1' to run once .*put it around the whole model"):
            model(x, call["mask"])
    layer.forward = inner
    runtime.train_mode = "off"
    model.train()(x, call["mask"])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpoints_of_transformers_are_refused_in_training_only() -> None:
    model, runtime = installed("bert-tags-sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    call = CALLS["bert-tags-sdpa"](4)
    model(**call)
    with pytest.raises(TokenPruningError, match=r"'bert.encoder.layer.0' to run once .*gradient_checkpointing_disable"):
        model.train()(**call)
    runtime.train_mode = "off"
    model(**call).logits.sum().backward()


def test_data_parallel() -> None:
    """On a processor, or one device, it calls the model itself; its copies would have the forwards of the original."""
    model, runtime = installed("bert-tags-sdpa")
    call = CALLS["bert-tags-sdpa"](4)
    with torch.no_grad():
        assert furthest(model(**call), nn.DataParallel(model)(**call)) == 0
        for mode in ("gather", "off"):
            runtime.mode = mode  # type: ignore[assignment]
            for part in (model, model.bert, model.bert.encoder):  # type: ignore[union-attr]
                replica = part._replicate_for_data_parallel()  # type: ignore[operator,union-attr]
                with pytest.raises(
                    TokenPruningError, match=r"DataParallel has copied it to several\. Use DistributedDataParallel"
                ):
                    replica(**call)


# torch.compile looks at the .grad of what a graph begins with, wherever a graph begins
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("how", ["wrapped", "in place, before", "a layer", "the owner's forward"])
def test_compiled(how: str) -> None:
    """What is around the layers is compiled; outputs, counts and gradients are those of the model as it is written."""
    name = "torch-post-all-padded"
    reference, expected = installed(name)
    calls = [CALLS[name](4, 9), CALLS[name](3, 12, seed=5)]
    model = built(name)
    runtime = proven(name)[1].runtime(POLICY)
    runtime.worthwhile, runtime.saving = 0.0, 1
    layer = model.get_submodule(runtime.stack.layers[1])
    called: Any = model
    if how == "in place, before":
        model.compile(backend="eager")
        model(**calls[0])
    elif how == "the owner's forward":
        owner = model.get_submodule(runtime.stack.owner)
        owner.forward = torch.compile(owner.forward, backend="eager")  # type: ignore[method-assign]
    install_tokens(model, runtime)
    if how == "wrapped":
        called = torch.compile(model, backend="eager")
    elif how == "a layer":
        layer.compile(backend="eager")
    for call in calls:
        with torch.no_grad():
            assert furthest(reference(**call), called(**call)) < EXACT
        assert runtime.counts is not None and expected.counts is not None
        assert torch.equal(runtime.counts.entering, expected.counts.entering)
    for each in (reference, called):
        output = each(**calls[0])
        (output if isinstance(output, Tensor) else output[0]).square().sum().backward()
    for one, other in zip(reference.parameters(), model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad, other.grad, rtol=0, atol=1e-9)  # type: ignore[arg-type]


def test_a_single_graph_is_refused_by_the_name_of_the_reason() -> None:
    model, _ = installed("torch-post-all-padded")
    with pytest.raises(Exception, match="_tokens_leave_outside_the_graph"):
        torch.compile(model, backend="eager", fullgraph=True)(**states(4))


def test_what_compile_wrapped_is_refused_with_the_way_out() -> None:
    name = "torch-post-all-padded"
    model = built(name)
    wrapped: Any = torch.compile(model, backend="eager")
    for refused in (lambda: prove_tokens(wrapped, (), states(4)), lambda: install_tokens(wrapped, _runtime(name))):
        with pytest.raises(
            TokenPruningError, match=r"got OptimizedModule\. Pass model\._orig_mod and compile it again"
        ):
            refused()
    install_tokens(wrapped._orig_mod, _runtime(name))


def _runtime(name: str) -> TokenRuntime:
    return proven(name)[1].runtime(POLICY)


def test_a_second_runtime_is_refused() -> None:
    model = shaken(Encoder(pooled=False))
    runtime = _runtime("torch-post-all-padded")
    install_tokens(model, runtime)
    with pytest.raises(TokenPruningError, match=r"has a runtime already\. Take it off first: remove_tokens"):
        install_tokens(model, runtime)
    with pytest.raises(TokenPruningError, match=r"but it has a runtime\. Call remove_tokens first"):
        prove_tokens(model, (), states(4))
    assert remove_tokens(model) is runtime
    assert remove_tokens(model) is None
