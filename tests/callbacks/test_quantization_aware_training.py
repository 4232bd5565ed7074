"""Quantization in a fit: what the model computes with, when, what it composes with, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import (
    Binary,
    Distillation,
    FinalizeCompression,
    LearnedStep,
    ObservedRange,
    QuantizationAwareTraining,
    QuantizationError,
    Stochastic,
    StructuredSparsity,
    TokenPruning,
    Uniform,
    detach_input_quantizers,
    input_quantizers,
    load_from_checkpoint,
    weight_quantizers,
)
from lightning_compress.quantization import packed_weights
from tests.callbacks.modules import MLP, Classifier, Save, Transformer, loader, trainer
from tests.callbacks.processes import in_processes, parallel
from tests.callbacks.token_modules import Reader, sentences

BATCHES = 8  # of an epoch


def transformer(**options: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(Transformer(), **options)


def fit(module: pl.LightningModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    own = trainer(*callbacks, **options)
    own.fit(module, loader(sequences=True))
    return own


class Diary(pl.Callback):
    """What holds in every step."""

    def __init__(self) -> None:
        self.attached: list[int] = []
        self.mixes: list[float] = []
        self.weights: list[Tensor] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        found = weight_quantizers(pl_module.model)
        self.attached.append(len(found))
        self.mixes.append(next(iter(found.values())).mix if found else -1.0)


def _weight_read(model: nn.Module, name: str) -> Tensor:
    """What the module reads in the place of a parameter, in the mode in which it is."""
    path, _, key = name.rpartition(".")
    return getattr(model.get_submodule(path), key).detach()


def quantized_state(model: nn.Module) -> dict[str, Tensor]:
    """What evaluation reads in the place of every quantized weight."""
    found, parameters = weight_quantizers(model), dict(model.named_parameters())
    read = {name: (q.quantizer, parameters[name].detach(), q.step) for name, q in found.items()}
    return {name: quantizer(weight, None, step).detach() for name, (quantizer, weight, step) in read.items()}


def test_the_fit_computes_with_quantized_weights_from_start_on() -> None:
    module, callback, diary = transformer(), QuantizationAwareTraining("int4", start=0.2, full_at=0.6), Diary()
    fit(module, callback, diary, max_epochs=5)
    weights = 14  # six products in each of two blocks, one before and one behind them
    assert diary.attached == [0] * BATCHES + [weights] * (4 * BATCHES)
    expected = [n / (2 * BATCHES) for n in range(2 * BATCHES)] + [1.0] * (2 * BATCHES)
    assert diary.mixes[BATCHES:] == pytest.approx(expected)
    assert set(callback.quantizers) == set(weight_quantizers(module.model))
    assert len(callback.quantizers) == weights
    assert module.losses[-1] < module.losses[0]
    plain = Transformer()
    plain.load_state_dict(module.model.state_dict())  # names and shapes of the plain model
    x = next(iter(loader(sequences=True)))[0]
    full = plain(x)
    with torch.no_grad():
        for name, value in quantized_state(module.model).items():
            plain.get_parameter(name).copy_(value)
    output = module.model.eval()(x)
    assert torch.equal(output, plain.eval()(x))
    assert not torch.allclose(output, full)


@pytest.mark.parametrize("nearest_at", [None, 0.0, 0.6])
def test_from_nearest_at_on_training_reads_what_evaluation_reads(nearest_at: float | None) -> None:
    read: list[bool] = []

    class Look(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
            evaluated = quantized_state(pl_module.model)
            read.append(
                all(torch.equal(_weight_read(pl_module.model, name), value) for name, value in evaluated.items())
            )

    fit(transformer(), QuantizationAwareTraining(Stochastic(2), nearest_at=nearest_at), Look(), max_epochs=5)
    steps = 5 * BATCHES
    at_random = {None: steps, 0.0: 0, 0.6: 3 * BATCHES}[nearest_at]
    # the first step shows what is called: in it nothing is quantized yet
    assert read[1:] == [False] * max(0, at_random - 1) + [True] * (steps - max(1, at_random))


def test_training_learns_what_rounding_afterwards_loses() -> None:
    def loss(module: Classifier, weights: Any) -> float:
        if weights is not None:
            from lightning_compress import attach_quantizers, select_weights, weight_kinds

            kinds = weight_kinds(module.model, (next(iter(loader(sequences=True)))[0],))
            attach_quantizers(module.model, select_weights(kinds, weights, None))
        module.model.eval()
        with torch.no_grad():
            data = list(loader(sequences=True))
            return sum(float(nn.functional.cross_entropy(module.model(x), y)) for x, y in data) / len(data)

    after, during = transformer(), transformer()
    fit(after, max_epochs=20)
    fit(during, QuantizationAwareTraining("int2", start=0.3), max_epochs=20)
    assert loss(during, None) < 0.7 * loss(after, "int2")


def test_kinds_and_patterns_choose() -> None:
    module = transformer()
    callback = QuantizationAwareTraining(modules={"attention": "binary", "ffn": Stochastic(4), "blocks.1.up": "lsq8"})
    fit(module, callback, max_epochs=1)
    kinds = {name: type(quantizing.quantizer) for name, quantizing in callback.quantizers.items()}
    assert {name for name, kind in kinds.items() if kind is Binary} == {
        f"blocks.{n}.{key}.weight" for n in (0, 1) for key in "qkvo"
    }
    assert kinds["blocks.0.up.weight"] is Stochastic
    assert kinds["blocks.1.up.weight"] is LearnedStep
    assert "classify.weight" not in kinds


def test_learned_steps_are_learned_by_their_own_optimizer() -> None:
    module, callback = transformer(), QuantizationAwareTraining("lsq4", learning_rate=5e-3)
    first: dict[str, Tensor] = {}

    class Look(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
            for name, quantizing in callback.quantizers.items():
                first.setdefault(name, quantizing.step.detach().clone())
            held = {id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"]}
            assert not any(id(q.step) in held for q in callback.quantizers.values())

    fit(module, callback, Look(), max_epochs=2)
    assert len(first) == 14
    for name, quantizing in callback.quantizers.items():
        assert quantizing.step is not None
        moved = (quantizing.step.detach() - first[name]).abs().mean() / first[name].mean()
        assert 0 < moved < 5e-3 * 2 * BATCHES
        assert quantizing.step.grad is None


def test_activations_are_quantized_where_weights_are() -> None:
    module = transformer()
    callback = QuantizationAwareTraining("int8", activations="int8", modules=("attention", "ffn"))
    fit(module, callback, max_epochs=2)
    paths = {name.rpartition(".")[0] for name in callback.quantizers}
    assert set(callback.inputs) == set(input_quantizers(module.model)) == paths
    assert len(paths) == 12
    assert all(quantizing.calls for quantizing in callback.inputs.values())
    module.model.eval()
    x = next(iter(loader(sequences=True)))[0]
    output = module.model(x)
    detach_input_quantizers(module.model)
    assert not torch.equal(module.model(x), output)


def test_learned_ranges_are_learned_beside_learned_steps() -> None:
    module = transformer()
    callback = QuantizationAwareTraining("lsq8", activations="lsq8", modules="ffn", learning_rate=5e-3)
    first: dict[str, Tensor] = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            for path, quantizing in callback.inputs.items():
                if quantizing.state.signed is not None:
                    first.setdefault(path, quantizing.step.detach().clone())

    fit(module, callback, Look(), max_epochs=2)
    assert len(first) == 4
    for path, quantizing in callback.inputs.items():
        assert quantizing.step is not None
        moved = abs(float(quantizing.step.detach() - first[path])) / float(first[path])
        assert 0 < moved < 5e-3 * 2 * BATCHES


@pytest.mark.parametrize("backend", ["auto", "packed", "native"])
def test_the_fit_ends_in_integers(backend: str) -> None:
    module, plain = transformer(), transformer()
    callback = QuantizationAwareTraining("int8", activations="int8", backend=backend)
    fit(module, callback, FinalizeCompression(macs=0.5, at=0.5, report=False), max_epochs=3)
    assert callback.report is not None
    assert callback.report.backend in ("native", "packed", "unpacked")
    assert weight_quantizers(module.model) == {}
    assert set(packed_weights(module.model)) == set(callback.quantizers)
    assert not any(name.endswith("q.weight") for name, _ in module.model.named_parameters())
    assert callback.report.bytes_after < 0.6 * callback.report.bytes_before
    assert torch.isfinite(module.model.eval()(next(iter(loader(sequences=True)))[0])).all()
    assert plain.model(next(iter(loader(sequences=True)))[0]).shape == (8, 3)


# Composition


@pytest.mark.parametrize(("start", "at"), [(0.0, 0.5), (0.6, 0.3)], ids=["quantized first", "removed first"])
@pytest.mark.parametrize("weights", ["int8", "lsq4", Stochastic(4)], ids=str)
def test_structures_are_removed_in_the_same_fit(weights: Any, start: float, at: float) -> None:
    module = transformer()
    quantize = QuantizationAwareTraining(weights, start=start)
    sparsify, finalize = StructuredSparsity(), FinalizeCompression(macs=0.5, at=at)
    diary = Diary()
    fit(module, quantize, sparsify, finalize, diary, max_epochs=6)
    assert finalize.report is not None
    assert finalize.report.error < 1e-10
    assert finalize.report.params[1] < finalize.report.params[0]
    assert list(weight_quantizers(module.model)) == list(quantize.quantizers)
    assert len(quantize.quantizers) == 14
    for name, quantizing in quantize.quantizers.items():
        weight = dict(module.model.named_parameters())[name]
        assert torch.equal(quantizing.quantize(weight).dequantized(), quantized_state(module.model)[name])
        if quantizing.step is not None:
            assert quantizing.step.shape == (weight.shape[0], 1)
    assert all(map(torch.isfinite, map(torch.tensor, module.losses)))


def test_with_token_pruning_and_distillation() -> None:
    torch.manual_seed(0)
    module = Reader()
    quantize, tokens = QuantizationAwareTraining("int8", modules=("attention", "ffn")), TokenPruning(macs=0.6)
    teach = Distillation(alpha=0.5)
    finalize = FinalizeCompression(macs=0.7, at=0.2, report=False)
    trainer(quantize, tokens, teach, finalize, max_epochs=6).fit(module, sentences())
    assert tokens.relative_macs == pytest.approx(0.6, rel=0.01)
    assert len(quantize.quantizers) == 18


@pytest.mark.parametrize("sparsify", [False, True], ids=["copied before", "copied after"])
def test_the_teacher_computes_with_weights_as_they_are(sparsify: bool) -> None:
    module, seen = transformer(), []
    teach = Distillation(alpha=0.5)
    own = [StructuredSparsity(start=0.6), FinalizeCompression(macs=0.7, at=0.8, report=False)] if sparsify else []

    class Look(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
            if teach.teacher is not None:
                seen.append((len(weight_quantizers(teach.teacher)), len(input_quantizers(teach.teacher))))

    quantize = QuantizationAwareTraining("int2", activations="int8", start=0.4)
    fit(module, quantize, teach, *own, Look(), max_epochs=5)
    assert len(seen) >= (2 if sparsify else 3) * BATCHES
    assert set(seen) == {(0, 0)}


# Checkpoints


@pytest.mark.parametrize(
    ("weights", "removes", "epoch"),
    [
        ("lsq4", False, 1),
        (Stochastic(4), False, 2),
        (Stochastic(1), False, 5),
        ("lsq4", False, 3),
        ("lsq4", True, 4),
        ("int8", True, 2),
    ],
    ids=str,
)
def test_straight_equals_crash_and_resume(weights: Any, removes: bool, epoch: int, tmp_path: Path) -> None:
    activations = {"lsq4": "lsq8", "int8": ObservedRange(8)}.get(weights)
    path = tmp_path / "last.ckpt"

    def run(*more: pl.Callback, resume: Path | None = None) -> tuple[Classifier, QuantizationAwareTraining]:
        module = transformer()
        settings: dict[str, Any] = {"nearest_at": 0.5} if weights == Stochastic(1) else {}
        quantize = QuantizationAwareTraining(weights, start=0.2, full_at=0.7, activations=activations, **settings)
        removal = [FinalizeCompression(macs=0.5, at=0.5, report=False)] if removes else []
        own = trainer(quantize, *removal, *more, max_epochs=6)
        own.fit(module, loader(sequences=True), ckpt_path=None if resume is None else str(resume))
        return module, quantize

    straight, callback = run()
    with pytest.raises(RuntimeError, match="crash"):
        run(Save(path, epoch))
    resumed, again = run(resume=path)
    assert again.quantizers.keys() == callback.quantizers.keys()
    for name, quantizing in callback.quantizers.items():
        other = again.quantizers[name]
        assert (other.quantizer, other.seed, other.draw) == (quantizing.quantizer, quantizing.seed, quantizing.draw)
        if quantizing.step is not None:
            assert torch.equal(other.step, quantizing.step), name
    assert again.inputs.keys() == callback.inputs.keys()
    for path, observed in callback.inputs.items():
        state, same = observed.state, again.inputs[path].state
        assert same.signed == state.signed
        for one, two in ((state.range, same.range), (state.step, same.step)):
            assert (one is None and two is None) or torch.equal(one, two), path
    for (name, one), (_, other) in zip(straight.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)


def test_a_checkpoint_is_loaded_and_tested_with_its_quantizers(tmp_path: Path) -> None:
    path, module = tmp_path / "last.ckpt", transformer()
    quantize, finalize = QuantizationAwareTraining("lsq4"), FinalizeCompression(macs=0.5, at=0.3, report=False)
    fit(module, quantize, finalize, Save(path, 4), max_epochs=4)
    x = next(iter(loader(sequences=True)))[0]
    expected = module.model.eval()(x)
    loaded = load_from_checkpoint(Classifier, path, model=Transformer())
    assert torch.equal(loaded.eval().model(x), expected)
    fresh = transformer()
    for _ in range(2):  # the second time it has some already
        own = trainer(QuantizationAwareTraining("lsq4"), FinalizeCompression(macs=0.5, at=0.3))
        own.validate(fresh, loader(sequences=True), ckpt_path=str(path), verbose=False)
        assert torch.equal(fresh.eval().model(x), expected)


def test_a_second_fit_goes_on_with_the_same_quantizers() -> None:
    module = transformer()
    first, second = QuantizationAwareTraining("lsq4"), QuantizationAwareTraining("lsq4")
    fit(module, first, max_epochs=1)
    fit(module, second, max_epochs=1)
    assert all(second.quantizers[name] is quantizing for name, quantizing in first.quantizers.items())
    with pytest.raises(QuantizationError, match=r"has one: LearnedStep.*detach_quantizers"):
        fit(module, QuantizationAwareTraining("int8"), max_epochs=1)


def test_a_fit_that_breaks_off_leaves_the_module_as_it_was() -> None:
    class Crash(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            assert weight_quantizers(pl_module.model)
            raise RuntimeError("crash")

    module = transformer()
    with pytest.raises(RuntimeError, match="crash"):
        fit(module, QuantizationAwareTraining("int8"), Crash())
    assert weight_quantizers(module.model) == {}
    assert all(
        type(m).__name__ == type(n).__name__ and type(m) is type(n)
        for m, n in zip(module.model.modules(), Transformer().modules(), strict=True)
    )


# Several processes


def distributed() -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    module = transformer(optimizer="sgd").double()
    callback = QuantizationAwareTraining("lsq4", start=0.3, modules={"attention": Stochastic(4), "ffn": "lsq4"})
    own = trainer(callback, **parallel(), max_epochs=3)
    inputs, labels = loader(sequences=True).dataset.tensors  # type: ignore[attr-defined]
    own.fit(module, DataLoader(TensorDataset(inputs.double(), labels), 4))
    steps = {n: q.step.detach() for n, q in callback.quantizers.items() if q.step is not None}
    return {n: p.detach() for n, p in module.named_parameters()}, steps, module.losses


def test_processes_draw_and_learn_alike() -> None:
    one, other = in_processes(distributed)
    assert not isinstance(one, BaseException | int), one
    for mine, theirs in zip(one[:2], other[:2], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert len(one[1]) == 4


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int9"}, r"'int8' to 'int2'.* but got 'int9'"),
        ({"modules": {"ffn": "int1"}}, r"but got 'int1'. One bit is 'binary'"),
        ({"start": 1.0}, r"start, a fraction of the fit, to be in \[0, 1\), but got 1.0"),
        ({"start": 0.5, "full_at": 0.4}, r"full_at, a fraction of the fit, to be from start=0.5 to 1, but got 0.4"),
        (
            {"start": 0.5, "nearest_at": 0.4},
            r"nearest_at, a fraction of the fit, to be from start=0.5 to below 1, but got 0.4",
        ),
        ({"nearest_at": 1.0}, r"nearest_at, a fraction of the fit, to be from start=0 to below 1, but got 1.0"),
        ({"learning_rate": 0.0}, r"learning_rate of step sizes to be above 0, but got 0.0"),
        ({"activations": "int9"}, r"quantizer of activations or one of 'int8' to 'int2' and 'lsq8' to 'lsq2', but got"),
        (
            {"backend": "fast"},
            r"backend to be None or one of \['auto', 'native', 'packed', 'unpacked'\], but got",
        ),
        ({"seed": -1}, r"seed to be an integer of at least 0, but got -1"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizationAwareTraining(**options)


def test_what_fits_nothing_and_bad_weights_are_refused_in_the_fit() -> None:
    with pytest.raises(QuantizationError, match=r"'embedding' fits none. There are 8 of kind 'attention'"):
        fit(transformer(), QuantizationAwareTraining(modules="embedding"))
    with pytest.raises(QuantizationError, match=r"In 'blocks.0.up.weight': Expected rows that are a multiple of 7"):
        fit(transformer(), QuantizationAwareTraining(Uniform(4, "group:7"), modules="blocks.0.up"))
    with pytest.raises(ValueError, match=r"Expected one QuantizationAwareTraining in a Trainer, but got two"):
        fit(transformer(), QuantizationAwareTraining(), QuantizationAwareTraining(module="model"))


def test_compiled_modules_are_refused() -> None:
    module = transformer()
    module.model = torch.compile(module.model, backend="eager")
    with pytest.raises(ValueError, match=r"a module that is not compiled for QuantizationAwareTraining.*Compile after"):
        fit(module, QuantizationAwareTraining())


def test_fits_that_end_early_and_weights_that_nobody_reads_are_told() -> None:
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    with pytest.warns(UserWarning, match=r"ended at 40%, before QuantizationAwareTraining .*quantized from 0%, "):
        fit(transformer(), QuantizationAwareTraining(full_at=0.6), Stop())
    with pytest.warns(
        UserWarning, match=r"ended at 40%.*, all of them from 20%, to the nearest from 80%\). Train longer"
    ):
        fit(transformer(), QuantizationAwareTraining(full_at=0.2, nearest_at=0.8), Stop())

    class Sometimes(nn.Module):
        """Has a weight that it need not read."""

        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.extra, self.reads = MLP(), nn.Linear(5, 3), True

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x) + (self.extra(x) if self.reads else 0)

    class Change(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.model.reads = not weight_quantizers(pl_module.model)

    module = Classifier(Sometimes())
    quantize = QuantizationAwareTraining(modules=("ffn", "extra", "head"))
    with pytest.warns(UserWarning, match=r"'extra.weight' never was \(1 such weights\)"):
        trainer(quantize, Change(), max_epochs=1).fit(module, loader())
