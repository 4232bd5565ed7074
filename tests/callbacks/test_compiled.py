"""Fits of modules under torch.compile: equal to eager ones, compiled anew after a removal, or refused."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import (
    Distillation,
    FinalizeCompression,
    StructuredSparsity,
    apply_plan,
    count_parameters,
    discover,
    explain,
    make_plan,
    save_compressed,
)
from lightning_compress.surgery import SurgeryError
from tests.callbacks.modules import MLP, Classifier, Transformer, fit, loader

Compile = Callable[..., Any]


class Plain(Classifier):
    """Its step does nothing but compute: what is appended to a list would be compiled, too."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])


class Itself(Plain):
    """Calls itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Backend:
    """Runs graphs as they are, and notes after how many steps they were compiled."""

    def __init__(self) -> None:
        self.step = 0
        self.compiled: list[int] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.compiled.append(self.step)
        return graph.forward


class Watch(pl.Callback):
    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.backend.step = trainer.global_step


def whole(module: Any, backend: Any) -> Any:
    return torch.compile(module, backend=backend)


def child(module: Any, backend: Any) -> Any:
    module.model = torch.compile(module.model, backend=backend)
    return module


def in_place(module: Any, backend: Any) -> Any:
    module.model.compile(backend=backend)
    return module


def forward(module: Any, backend: Any) -> Any:
    module.model.forward = torch.compile(module.model.forward, backend=backend)
    return module


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    yield
    torch.compiler.reset()


def fitted(
    kind: type[Plain], compile: Compile | None, *more: pl.Callback, rounds: int = 1
) -> tuple[Plain, FinalizeCompression, list[int]]:
    torch.manual_seed(0)
    module, backend = kind(MLP()), Backend()
    finalize = FinalizeCompression(units=0.5, at=0.5, rounds=rounds, report=False)
    callbacks = [StructuredSparsity(kinds=("ffn",), start=0.1), finalize, *more, Watch(backend)]
    fit(module if compile is None else compile(module, backend), *callbacks, max_epochs=2)
    return module, finalize, backend.compiled


@pytest.mark.parametrize(
    ("kind", "compile", "more"),
    [
        (Plain, whole, []),
        (Plain, child, []),
        (Plain, in_place, []),
        (Plain, forward, []),
        (Itself, whole, []),
        (Itself, in_place, []),
        (Plain, child, [Distillation]),
        (Plain, forward, [Distillation]),
        (Plain, whole, [lambda: EMAWeightAveraging(decay=0.9)]),
        (Itself, whole, [lambda: EMAWeightAveraging(decay=0.9)]),
        (Plain, in_place, [lambda: EMAWeightAveraging(decay=0.9)]),
    ],
)
def test_a_compiled_fit_is_the_eager_fit(kind: Any, compile: Compile, more: list[Any]) -> None:
    """Bit by bit; and the smaller shapes are compiled, in the step after the removal, and no other step is."""
    eager, finalize, _ = fitted(kind, None, *(make() for make in more))
    module, again, compiled = fitted(kind, compile, *(make() for make in more))
    assert finalize.plan is not None and again.plan is not None and again.plan.kept == finalize.plan.kept
    assert count_parameters(module) < count_parameters(kind(MLP()))
    for one, other in zip(eager.parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other)
    assert sorted(set(compiled)) == [1, 8]  # the first step is watched, and runs as it is written


def test_many_removals_stay_compiled() -> None:
    """Torch recompiles a function a few times, then runs it eagerly; shapes that are gone do not count."""
    module, finalize, compiled = fitted(Plain, child, rounds=8)
    assert len(finalize.surgery_reports) >= 6
    # the first step, and the one after each round that removed something
    assert len(set(compiled)) == 1 + len(finalize.surgery_reports) and max(compiled) == 8
    assert module.model.layers[0].out_features + module.model.layers[2].out_features == 11  # type: ignore[index,union-attr]


def test_a_shim_is_compiled_with_the_rest() -> None:
    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)).view(-1, 12))

    losses = []
    for compile in (None, child):
        torch.manual_seed(0)
        module, backend = Plain(Literal()), Backend()
        finalize = FinalizeCompression(units=0.5, at=0.5, report=False)
        fit(module if compile is None else compile(module, backend), finalize, Watch(backend), max_epochs=2)
        assert finalize.plan is not None and [s.tier for s in finalize.plan.structures] == ["shim"]
        losses.append([p.sum().item() for p in module.parameters()])
    assert losses[0] == losses[1]


def test_the_same_class_compiled_before_is_seen_again() -> None:
    """Compiled code ignores hooks that come later, those that look for the call of the module among them."""
    fit(torch.compile(Itself(MLP()), backend="eager"), max_epochs=1)
    module = Itself(MLP())
    fit(torch.compile(module, backend="eager"), FinalizeCompression(units=0.5, report=False), max_epochs=2)
    assert count_parameters(module) < count_parameters(Itself(MLP()))


@pytest.mark.parametrize(
    ("compile", "callbacks", "message"),
    [
        (whole, [FinalizeCompression(units=0.5), Distillation()], r"but got torch.compile\(Plain\), where it cannot"),
        (in_place, [FinalizeCompression(units=0.5), Distillation()], r"but got model.compile\(\), where it cannot"),
        (
            child,
            [FinalizeCompression(units=0.5), Distillation(hidden=0.1)],
            r"Expected Distillation\(hidden=0.1\) of a model that is not compiled.*Set hidden=0.0",
        ),
        (
            child,
            [FinalizeCompression(units=0.5), StructuredSparsity(kinds=("hidden", "ffn"))],
            "Expected a model that is not compiled for StructuredSparsity.*Train without torch.compile",
        ),
    ],
    ids=["step", "in place", "hidden states", "residual width"],
)
def test_what_cannot_be_seen_inside_compiled_code_is_refused(
    compile: Compile, callbacks: list[pl.Callback], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(compile(Plain(Transformer()), "eager"), *callbacks, data=loader(sequences=True))


def test_a_wrapper_inside_the_module_that_is_compressed_is_refused_with_the_way_out() -> None:
    module = child(Itself(MLP()), "eager")
    dense = count_parameters(module)
    with pytest.raises(SurgeryError, match=r"got OptimizedModule at 'model'.* compile in place: module.compile\(\)"):
        fit(module, FinalizeCompression(units=0.5))
    assert count_parameters(module) == dense
    assert torch.compiler.is_compiling() is False


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_functions_refuse_what_is_compiled_or_scripted(tmp_path: Any) -> None:
    model, x = MLP(), torch.randn(4, 5)
    plan = make_plan(model, discover(model, (x,)), units=0.5)
    compiled, inside = torch.compile(model, backend="eager"), MLP()
    inside.layers = torch.compile(inside.layers, backend="eager")  # type: ignore[assignment]
    scripted = torch.jit.trace(model, x)
    for wrapped, message in (
        (compiled, r"got OptimizedModule\. Pass model\._orig_mod and compile it again afterwards"),
        (inside, r"got OptimizedModule at 'layers'\. Pass"),
        (scripted, r"got TopLevelTracedModule\. Remove units from the eager module and script the smaller one"),
    ):
        calls: list[Callable[[], Any]] = [
            lambda wrapped=wrapped: discover(wrapped, (x,)),
            lambda wrapped=wrapped: discover(wrapped, (x,), prove=True),
            lambda wrapped=wrapped: explain(wrapped, (x,)),
            lambda wrapped=wrapped: apply_plan(wrapped, plan, verify=((x,), {})),
            lambda wrapped=wrapped: save_compressed(wrapped, tmp_path / "saved"),
        ]
        for call in calls:
            with pytest.raises(SurgeryError, match=message):
                call()
    assert not (tmp_path / "saved").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_in_a_fit_is_refused_before_it_is_trained() -> None:
    class Scripted(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.model = torch.jit.script(MLP())

    module = Scripted()
    with pytest.raises(ValueError, match=r"(got RecursiveScriptModule|scripted)"):
        fit(module, FinalizeCompression(units=0.5))
    assert module.trainer.global_step == 0
