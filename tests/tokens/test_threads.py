"""Calls of one model from many threads, calls inside calls, and calls that fail: each is what it is alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_compress.token_switch import tokens_off
from lightning_compress.tokens.errors import TokenPruningError
from lightning_compress.tokens.install import install_tokens, remove_tokens
from tests.tokens.agreement import EXACT, POLICY, agree, proven, run
from tests.tokens.encoders import CALLS, furthest, states


@pytest.fixture(params=["bert-tags-sdpa", "torch-post-all-padded"])
def pruned(request: Any) -> Iterator[tuple[str, nn.Module]]:
    model, proof = proven(request.param)
    runtime = install_tokens(model, proof.runtime(POLICY))
    runtime.worthwhile, runtime.saving = 0.0, 1
    yield request.param, model
    remove_tokens(model)


def test_threads(pruned: tuple[str, nn.Module]) -> None:
    """Many at once, each with a batch of its own size, one with pruning switched off in its context."""
    name, model = pruned
    calls = [CALLS[name](1 + seed, 7 + 2 * seed, seed=seed) for seed in range(5)]

    def alone(number: int) -> Any:
        with torch.no_grad():
            if number == len(calls):
                with tokens_off():
                    return model(**calls[0])
            return model(**calls[number])

    expected = [alone(number) for number in range(len(calls) + 1)]
    assert furthest(expected[0], expected[-1]) > 1e-3
    start, wrong = threading.Barrier(len(expected)), []

    def work(number: int) -> None:
        try:
            start.wait(timeout=30)
            for _ in range(8):
                if furthest(expected[number], alone(number)) > EXACT:
                    wrong.append(number)
        except BaseException as error:  # a test fails in its own thread only
            wrong.append(error)  # type: ignore[arg-type]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(expected))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong
    assert torch.backends.mha.get_fastpath_enabled()


class Broken(Exception):
    pass


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_forward_that_fails_leaves_nothing_behind(pruned: tuple[str, nn.Module], number: int) -> None:
    name, model = pruned
    call = CALLS[name](4)
    with torch.no_grad():
        expected = model(**call)
        layers: list[nn.Module] = [m for m in model.modules() if "Layer" in type(m).__name__ and "forward" in vars(m)]

        def fail(*_: Any) -> None:
            raise Broken

        handle = layers[number].register_forward_hook(fail)
        with pytest.raises(Broken):
            model(**call)
        handle.remove()
        assert furthest(expected, model(**call)) == 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_call_of_the_model_from_within_its_own_is_refused(pruned: tuple[str, nn.Module]) -> None:
    name, model = pruned
    call = CALLS[name](4)
    layer = next(m for m in model.modules() if "Layer" in type(m).__name__ and "forward" in vars(m))
    for register in (layer.register_forward_pre_hook, layer.register_forward_hook):
        running: list[int] = []

        def again(*_: Any, running: list[int] = running) -> None:
            if not running:
                running.append(1)
                model(**call)

        handle = register(again)
        with torch.no_grad(), pytest.raises(TokenPruningError, match="Expected the layers to be called in the order"):
            model(**call)
        handle.remove()
    with torch.no_grad():
        model(**call)


class Twice(nn.Module):
    """One pruned model after another, and inside another's layers: states are of one runtime each."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        handle = next(self.first.encoder.layers.children()).register_forward_pre_hook(self.inside)  # type: ignore[union-attr]
        try:
            return torch.cat((self.first(x, mask), self.between), -1)
        finally:
            handle.remove()

    def inside(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.between = self.second(args[0])


@torch.no_grad()
def test_two_models_at_work_in_each_other() -> None:
    (first, proof), (second, other) = proven("torch-post-all-padded"), proven("torch-pre-all-whole")
    call = states(4)
    expected = run(first, proof, call)[0], run(second, other, {"x": call["x"]})[0]
    install_tokens(first, proof.runtime(POLICY))
    install_tokens(second, other.runtime(POLICY))
    try:
        output = Twice(first, second)(**call)
    finally:
        remove_tokens(first)
        remove_tokens(second)
    assert furthest(expected, output.split(2, -1)) < EXACT


class Delegating(nn.Module):
    """An owner whose forward calls itself once."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layers = inner.encoder.layers  # type: ignore[union-attr]

    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        if again:
            return self(x, again=False)
        for layer in self.layers:
            x = layer(x)
        return x


def test_an_owner_may_call_itself() -> None:
    from lightning_compress.tokens.proof import prove_tokens

    model = Delegating(proven("torch-post-all-whole")[0]).eval()
    call = {"x": states(4)["x"]}
    counts = agree(model, prove_tokens(model, (), call), call)
    assert float(counts.entering[-1].sum()) < float(counts.real.sum())
