"""The shrinkage inside a real Trainer, against a training loop written out in the test."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import FinalizeCompression, StructuredSparsity
from lightning_compress.importance import unit_norms
from lightning_compress.regularizers import block_group_lasso_prox_, hoyer_square
from tests.callbacks.modules import MLP, Classifier, Transformer, fit, loader

STRENGTH = 2.0


def twins(**options: Any) -> tuple[Classifier, MLP]:
    """A module in float64, and a copy of its model for the reference."""
    torch.manual_seed(0)
    module = Classifier(MLP().double(), **options)
    reference = MLP().double()
    reference.load_state_dict(module.model.state_dict())
    return module, reference


def data64(**options: Any) -> Any:
    data = loader(**options)
    data.dataset.tensors = (data.dataset.tensors[0].double(), data.dataset.tensors[1])
    return data


def units_of(model: MLP) -> list[list[tuple[Tensor, Any]]]:
    """Members of every hidden unit of the MLP: rows of one layer, its bias, columns of the next."""
    first, second, third = (model.layers[i] for i in (0, 2, 4))
    return [
        [(a.weight, (u,)), (a.bias, (u,)), (b.weight, (slice(None), u))]
        for a, b in ((first, second), (second, third))
        for u in range(a.out_features)
    ]


def weights_of(model: MLP) -> list[float]:
    """sqrt(size * cost per scalar / its mean): a unit of (5 -> 12 -> 10 -> 3) saves inputs + outputs, has a bias."""
    sizes = [5 + 1 + 10] * 12 + [12 + 1 + 3] * 10
    density = [15 / 16] * 12 + [15 / 16] * 10
    mean = sum(density) / len(density)
    return [(size * d / mean) ** 0.5 for size, d in zip(sizes, density, strict=True)]


@torch.no_grad()
def shrink(model: MLP, step: float) -> None:
    """The proximal map of the group lasso, one unit after the other, with norms taken before anything is shrunk."""
    norms = [sum(t[at].square().sum() for t, at in unit).sqrt() for unit in units_of(model)]
    for unit, norm, weight in zip(units_of(model), norms, weights_of(model), strict=True):
        factor = max(0.0, 1 - step * weight / float(norm)) if norm > 0 else 0.0
        for tensor, at in unit:
            tensor[at] *= factor


def reference_fit(
    model: MLP,
    optimizer: torch.optim.Optimizer,
    data: Any,
    epochs: int = 2,
    accumulate: int = 1,
    clip: float | None = None,
    scheduler: Any = None,
    after_step: Callable[[int, float], None] = lambda step, lr: None,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """What Lightning does, without Lightning."""
    step = 0
    for _ in range(epochs):
        for number, (x, y) in enumerate(data, start=1):
            loss = F.cross_entropy(model(x), y)
            if penalty is not None:
                loss = loss + penalty()
            (loss / accumulate).backward()
            if number % accumulate:
                continue
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            after_step(step, optimizer.param_groups[0]["lr"])
            if scheduler is not None:
                scheduler.step()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, one), (_, other) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12, msg=name)


def sparsity(**options: Any) -> StructuredSparsity:
    return StructuredSparsity(**{"kinds": ("ffn",), "strength": STRENGTH, "start": 0.0, **options})


@pytest.mark.parametrize(
    ("options", "reference"),
    [({}, {}), ({"accumulate_grad_batches": 2}, {"accumulate": 2}), ({"gradient_clip_val": 0.1}, {"clip": 0.1})],
    ids=["plain", "accumulation", "clipping"],
)
def test_proximal_steps_follow_real_optimizer_steps(options: dict[str, Any], reference: dict[str, Any]) -> None:
    module, model = twins(optimizer="sgd")
    fit(module, sparsity(), data=data64(), max_epochs=2, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    reference_fit(model, optimizer, data64(), after_step=lambda step, lr: shrink(model, lr * STRENGTH), **reference)
    assert_same(module.model, model)


class Scheduled(Classifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def test_the_learning_rate_is_that_of_the_step() -> None:
    module, model = twins()
    module.__class__ = Scheduled
    fit(module, sparsity(), data=data64(), max_epochs=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    reference_fit(
        model, optimizer, data64(), scheduler=scheduler, after_step=lambda step, lr: shrink(model, lr * STRENGTH)
    )
    assert_same(module.model, model)


def test_steps_in_between_are_made_up_for() -> None:
    module, model = twins(optimizer="sgd")
    fit(module, sparsity(every_n_steps=4), data=data64(), max_epochs=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    reference_fit(
        model,
        optimizer,
        data64(),
        after_step=lambda step, lr: shrink(model, 4 * lr * STRENGTH) if step % 4 == 0 else None,
    )
    assert_same(module.model, model)


def test_bf16_mixed_keeps_full_precision_weights() -> None:
    torch.manual_seed(0)
    module = Classifier(optimizer="sgd")
    model = MLP()
    model.load_state_dict(module.model.state_dict())
    fit(module, sparsity(), max_epochs=1, precision="bf16-mixed")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for x, y in loader():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shrink(model, 1e-2 * STRENGTH)
    for one, other in zip(module.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class Manual(Classifier):
    """Two optimizers with different learning rates: the first layer's steps twice a batch, that of the rest once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        layers = self.model.layers
        rest = [*layers[2].parameters(), *layers[4].parameters()]
        return torch.optim.SGD(layers[0].parameters(), lr=1e-2), torch.optim.SGD(rest, lr=3e-2)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, rest = self.optimizers()
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        first.zero_grad()
        rest.zero_grad()
        self.manual_backward(loss)
        first.step()
        first.step()
        rest.step()


def test_manual_optimization_with_two_optimizers() -> None:
    module, model = twins()
    module = Manual(module.model)
    fit(module, sparsity(), data=data64(), max_epochs=2)
    layers = model.layers
    rest = [*layers[2].parameters(), *layers[4].parameters()]
    first, second = torch.optim.SGD(layers[0].parameters(), lr=1e-2), torch.optim.SGD(rest, lr=3e-2)
    for _ in range(2):
        for x, y in data64():
            first.zero_grad()
            second.zero_grad()
            F.cross_entropy(model(x), y).backward()
            first.step()
            first.step()
            second.step()
            with torch.no_grad():
                norms = [sum(t[at].square().sum() for t, at in unit).sqrt() for unit in units_of(model)]
                # the first twelve units have 6 scalars at two steps of 1e-2, and 10 at one step of 3e-2
                rates = [(6 * 2e-2 + 10 * 3e-2) / 16] * 12 + [3e-2] * 10
                for unit, norm, weight, rate in zip(units_of(model), norms, weights_of(model), rates, strict=True):
                    for tensor, at in unit:
                        tensor[at] *= max(0.0, 1 - rate * STRENGTH * weight / float(norm)) if norm > 0 else 0.0
    assert_same(module.model, model)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["group_lasso", "hoyer_square"])
def test_mode_loss_is_the_penalty_in_the_loss(name: str, accumulate: int, optimizer: str) -> None:
    module, model = twins(optimizer=optimizer)
    fit(
        module,
        sparsity(regularizer=name, mode="loss", strength=1e-2),
        data=data64(),
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
    )

    def penalty() -> Tensor:
        norms = torch.stack([sum(t[at].square().sum() for t, at in unit).sqrt() for unit in units_of(model)])
        weights = torch.tensor(weights_of(model), dtype=torch.float64)
        if name == "group_lasso":
            return 1e-2 * (weights * norms).sum()
        return 1e-2 * sum(hoyer_square(norms[s] / weights[s]) for s in (slice(0, 12), slice(12, 22)))

    make = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    own = make(model.parameters(), lr=1e-2)
    reference_fit(model, own, data64(), accumulate=accumulate, clip=0.5, penalty=penalty)
    assert_same(module.model, model)


@pytest.mark.parametrize("groups", ["rows", "columns"])
def test_single_rows_and_columns(groups: str) -> None:
    module, model = twins(optimizer="sgd")
    fit(module, sparsity(groups=groups, modules="layers.[02]", strength=STRENGTH), data=data64(), max_epochs=1)

    @torch.no_grad()
    def step(number: int, lr: float) -> None:
        for layer in (model.layers[0], model.layers[2]):
            lines = layer.weight if groups == "rows" else layer.weight.t()
            for line in lines:
                line *= max(0.0, 1 - lr * STRENGTH / float(line.norm()))

    reference_fit(model, torch.optim.SGD(model.parameters(), lr=1e-2), data64(), epochs=1, after_step=step)
    assert_same(module.model, model)


def test_blocks() -> None:
    module, model = twins(optimizer="sgd")
    fit(module, sparsity(regularizer="block_group_lasso", block_grid=(2, 1)), data=data64(), max_epochs=1)

    def step(number: int, lr: float) -> None:
        for layer in (model.layers[0], model.layers[2], model.layers[4]):
            block_group_lasso_prox_(layer.weight, lr * STRENGTH, block_grid=(2, 1))

    reference_fit(model, torch.optim.SGD(model.parameters(), lr=1e-2), data64(), epochs=1, after_step=step)
    assert_same(module.model, model)


class Probe(pl.Callback):
    """Norms of all units, step by step, seen between the sparsity callback and the removal."""

    def __init__(self, callback: StructuredSparsity) -> None:
        self.callback = callback
        self.norms: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        session = self.callback._session
        assert session is not None
        if session.version == 0 and session.structures is not None:
            self.norms.append(unit_norms(session.traced, session.structures))


@pytest.mark.parametrize(
    "importance", ["norm", "taylor", lambda model, s: torch.arange(s.units) + 1.0], ids=["norm", "taylor", "own"]
)
@pytest.mark.parametrize("name", ["group_lasso", "hoyer_square"])
def test_the_strength_meets_the_budget_in_time(name: str, importance: Any) -> None:
    module = Classifier(Transformer())
    callback = StructuredSparsity(name, start=0.2, importance=importance)
    probe, finalize = Probe(callback), FinalizeCompression(macs=0.4, at=0.6, report=False)
    fit(module, callback, probe, finalize, data=loader(sequences=True, examples=128), max_epochs=5)
    assert finalize.plan is not None
    gone = {n: finalize.plan.removed(n) for n in finalize.plan.kept}
    last = probe.norms[-1]
    dead = sum(int((last[n][list(units)] == 0).sum()) for n, units in gone.items())
    removed = sum(len(units) for units in gone.values())
    assert removed > 10
    if name == "group_lasso":
        assert dead >= 0.9 * removed  # the last pick may exchange a unit or two
    else:
        assert dead >= 0.3 * removed  # the Hoyer square leaves alone what lies above its trim point
    # nothing was shrunk before the start
    first = probe.norms[0]
    assert all((norms > 0).all() for norms in first.values())


@pytest.mark.parametrize(
    "options",
    [
        {"regularizer": "block_group_lasso"},
        {"regularizer": "block_group_lasso", "block_shape": (4, 4)},
        {"groups": "rows"},
        {"groups": "columns"},
        {"trimmed": False},
        {"every_n_steps": 3},
    ],
    ids=str,
)
def test_every_form_works_with_a_budget(options: dict[str, Any]) -> None:
    module = Classifier(Transformer())
    callback, finalize = StructuredSparsity(**options), FinalizeCompression(macs=0.4, report=False)
    probe = Probe(callback)
    fit(module, callback, probe, finalize, data=loader(sequences=True))
    assert finalize.plan is not None
    removed, kept = ([], [])
    for name, last in probe.norms[-1].items():
        change = last / probe.norms[0][name]
        removed += [float(change[u]) for u in finalize.plan.removed(name)]
        kept += [float(change[u]) for u in finalize.plan.kept[name]]
    # what is removed has been shrunk, and more than what stays
    assert sum(removed) / len(removed) < 0.9 * min(1.0, sum(kept) / len(kept))


def test_units_that_stay_are_not_shrunk_unless_the_plain_form_is_asked_for() -> None:
    def mean_norm(trimmed: bool | None) -> float:
        torch.manual_seed(0)
        module = Classifier(Transformer(), lr=1e-3)
        callback = StructuredSparsity(start=0.0, trimmed=trimmed)
        probe, finalize = Probe(callback), FinalizeCompression(macs=0.4, at=0.6, report=False)
        fit(module, callback, probe, finalize, data=loader(sequences=True), max_epochs=5)
        assert finalize.plan is not None
        ratios = [
            float((probe.norms[-1][n][list(kept)] / probe.norms[0][n][list(kept)]).mean())
            for n, kept in finalize.plan.kept.items()
        ]
        return min(ratios)

    assert mean_norm(None) > 0.95
    assert mean_norm(False) < 0.7


def test_dead_units_stay_dead_and_lose_their_momentum() -> None:
    module = Classifier(Transformer())
    callback = StructuredSparsity(start=0.0, strength=20.0)
    trainer = fit(module, callback, data=loader(sequences=True), max_epochs=2)
    session = callback._session
    assert session is not None and session.structures is not None
    norms = unit_norms(module.model, session.structures)
    assert sum(int((n == 0).sum()) for n in norms.values()) == sum(n.numel() for n in norms.values())
    for name in ("blocks.0.up.weight", "blocks.1.o.weight"):
        state = trainer.optimizers[0].state[module.model.get_parameter(name)]
        assert state["exp_avg"].abs().max() == 0


def test_several_instances_coexist() -> None:
    module = Classifier(Transformer())
    heads = StructuredSparsity(kinds=("head",), start=0.0, every_n_steps=2)
    ffn = StructuredSparsity("hoyer_square", kinds=("ffn",), start=0.0)
    finalize = FinalizeCompression(macs=0.5, at=0.5, report=False)
    assert heads.state_key != ffn.state_key
    trainer = fit(module, heads, ffn, finalize, data=loader(sequences=True))
    assert {"strength", "strength/1", "sparsity", "macs_kept"} <= set(trainer.callback_metrics)
    assert finalize.plan is not None
    assert {s.kind for s in finalize.plan.structures} == {"head", "ffn"}


def test_progress_is_logged() -> None:
    module = Classifier(Transformer())
    trainer = fit(module, StructuredSparsity(), FinalizeCompression(macs=0.4), data=loader(sequences=True))
    assert 0.39 < float(trainer.progress_bar_metrics["macs_kept"]) <= 0.4
    assert 0 < float(trainer.progress_bar_metrics["sparsity"]) < 1
    assert "strength" in trainer.progress_bar_metrics


def test_without_touching_random_numbers_or_training_before_the_start() -> None:
    class Noisy(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((F.dropout(batch[0], 0.3), batch[1]), batch_idx)

    def losses(*callbacks: pl.Callback) -> list[float]:
        torch.manual_seed(0)
        module = Noisy()
        fit(module, *callbacks, max_epochs=2)
        return module.losses

    assert losses(sparsity(start=0.99)) == losses()


@pytest.mark.parametrize("strategy", ["fine", "coarse", "naive"])
def test_strategies_choose_lines_by_what_they_do(strategy: str) -> None:
    module = Classifier(Transformer(blocks=2), optimizer="sgd", lr=1e-3)
    callback = StructuredSparsity(strategy=strategy, decoder="blocks.1", strength=1.0, start=0.0)
    fit(module, callback, data=loader(sequences=True), max_epochs=1)
    assert callback._session is not None
    session = callback._session
    from lightning_compress.callbacks.groups import chosen_groups

    lines = chosen_groups(session.parameters(), list(session.structures or []), "rows", None, strategy, ("blocks.1",))
    chosen = {(g.parameter, g.axis) for g in lines}
    coupled = {("q", 0), ("k", 0), ("v", 0), ("o", 1), ("up", 0), ("down", 1)}
    expected = {(f"blocks.{b}.{m}.weight", axis) for b in (0, 1) for m, axis in coupled}
    if strategy == "fine":
        expected = {(n, a) for n, a in expected if n.startswith("blocks.0.") or n.split(".")[2] in ("q", "k")}
    if strategy == "naive":
        expected |= {(n, 1 - a) for n, a in expected}
    assert chosen == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"regularizer": "group_laso"}, "group_lasso"),
        ({"kinds": ("heads",)}, "got 'heads'. Did you mean 'head'"),
        ({"mode": "prox"}, "Expected mode to be 'proximal' or 'loss', but got 'prox'"),
        ({"strength": -1.0}, "Expected strength to be 'auto' or a number of at least 0, but got -1.0"),
        ({"strength": "high"}, "Expected strength to be 'auto' or a number"),
        ({"mode": "loss"}, r"Call StructuredSparsity\('group_lasso', mode='loss', strength=1e-4\)"),
        ({"importance": "size"}, "Expected importance to be 'norm', 'taylor' or a function, but got 'size'"),
        ({"start": 1.0}, r"Expected start, a fraction of the fit, to be in \[0, 1\), but got 1.0"),
        ({"every_n_steps": 0}, "Expected every_n_steps to be an integer of at least 1, but got 0"),
        ({"groups": "row"}, "Expected groups to be one of"),
        ({"block_grid": (2, 2)}, r"Call StructuredSparsity\('block_group_lasso', block_grid=\(2, 2\)\)"),
        ({"modules": ("a",)}, "Expected modules with groups='rows', 'columns' or 'blocks' only"),
        (
            {"regularizer": "block_group_lasso", "groups": "rows"},
            "Expected 'block_group_lasso' to act on blocks, but got groups='rows'",
        ),
        ({"groups": "blocks"}, r"Expected a regularizer of blocks, one of \['block_group_lasso'\]"),
        ({"strategy": "finest"}, "fine"),
        ({"strategy": "fine", "groups": "rows"}, "Expected strategy or groups"),
        ({"schedule": "cubical"}, "Did you mean 'cubic'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructuredSparsity(**arguments)


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        ([StructuredSparsity()], {}, r"Expected a FinalizeCompression beside StructuredSparsity\(strength='auto'\)"),
        (
            [StructuredSparsity(start=0.7), FinalizeCompression(macs=0.5, at=0.6)],
            {},
            r"Expected sparsifying to start before the removal, but got start=0.7 and FinalizeCompression\(at=0.6\)",
        ),
        (
            [StructuredSparsity(kinds=("head",), start=0.0, strength=1.0)],
            {},
            r"Expected structures of kinds \('head',\) in 'model', but found none",
        ),
        ([sparsity(groups="rows", modules="layers.9")], {}, "'layers.9' matches none of"),
        ([sparsity(module="modle")], {}, "but got 'modle'.* Did you mean 'model'"),
        (
            [sparsity(module="model"), sparsity(kinds=("head",), module="model.layers")],
            {},
            "to name one module, but got 'model' and 'model.layers'",
        ),
    ],
    ids=["no budget", "too late", "nothing", "no match", "no module", "two modules"],
)
def test_bad_fits(callbacks: list[pl.Callback], options: dict[str, Any], message: str) -> None:
    module = Classifier()
    with pytest.raises(ValueError, match=message):
        fit(module, *callbacks, **options)
    assert len(module.losses) <= 1  # refused before anything was trained for long


def test_frozen_structures_are_refused() -> None:
    module = Classifier()
    module.model.requires_grad_(False)
    module.extra = nn.Linear(CLASSES_IN, 3)

    def step(batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(module.model(batch[0]) + module.extra(batch[0]), batch[1])

    module.training_step = step  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no optimizer of the Trainer holds one that requires a gradient"):
        fit(module, sparsity(module="model"))


CLASSES_IN = 5


def test_half_precision_weights_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="can represent in one step"):
        fit(Classifier(), sparsity(), precision="bf16-true", max_epochs=1)


def test_an_automatic_strength_of_the_naive_strategy_is_warned_about() -> None:
    def fitted(strategy: str, strength: Any) -> None:
        module = Classifier(Transformer(blocks=2), optimizer="sgd", lr=1e-3)
        callback = StructuredSparsity(strategy=strategy, strength=strength, start=0.0)
        finalize = FinalizeCompression(macs=0.9, at=0.5, report=False)
        fit(module, callback, finalize, data=loader(sequences=True), max_epochs=1)

    with pytest.warns(UserWarning, match=r"shrinks the inputs of all matrices.*Choose strategy='coarse', or give"):
        fitted("naive", "auto")
    fitted("naive", 1e-4)  # warnings are errors
    fitted("coarse", "auto")


def test_state_can_be_saved_and_loaded() -> None:
    module = Classifier(Transformer())
    callback = StructuredSparsity(importance="taylor", start=0.0, strength=3.0)
    fit(module, callback, data=loader(sequences=True), max_epochs=1, limit_train_batches=5)
    other = StructuredSparsity(importance="taylor", start=0.0, strength=1.0)
    other.load_state_dict(callback.state_dict())
    assert other.state_dict()["strength"] == 3.0
