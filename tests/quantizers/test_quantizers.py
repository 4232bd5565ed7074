"""Quantizers against closed forms: values, expectation, variance, idempotence, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_compress.quantizers import (
    SCALE_FREE_LOGITS,
    Binary,
    LearnedStep,
    Quantizer,
    Stochastic,
    Ternary,
    Uniform,
    quantizer_named,
    stochastic,
)

SCOPES = ("tensor", "row", "group:4")
EVERY: list[Quantizer] = [
    *(
        Uniform(bits, scope, symmetric)
        for bits in (*range(2, 9), 16)
        for scope in SCOPES
        for symmetric in (True, False)
    ),
    *(
        Stochastic(bits, norm, scope, strict)  # type: ignore[arg-type]
        for bits in (1, 2, 4, 8)
        for norm in ("l2", "max", "mse")
        for scope in SCOPES
        for strict in (True, False)
    ),
    *(Binary(scope, centred) for scope in SCOPES for centred in (True, False)),
    Binary.of_the_report(),
    *(Ternary(scope) for scope in SCOPES),
    *(LearnedStep(bits, scope) for bits in (2, 4, 8) for scope in SCOPES),
]


def weight(*shape: int, seed: int = 0, dtype: Any = torch.float64) -> Tensor:
    return torch.randn(shape or (5, 12), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def step_of(quantizer: Quantizer, value: Tensor) -> Tensor | None:
    return quantizer.first_step(value)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# What holds for all


@pytest.mark.parametrize("quantizer", EVERY, ids=str)
def test_the_integers_are_what_evaluation_computes_with(quantizer: Quantizer) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        value = weight(dtype=dtype)
        step = step_of(quantizer, value)
        stored = quantizer.quantize(value, step)
        output = quantizer(value, step=step)
        assert output.dtype == dtype
        assert torch.equal(stored.dequantized(), output)
        assert torch.equal(quantizer(value, step=step), output)  # evaluation knows no chance
        low, high = stored.grid.low, stored.grid.high
        assert high - low < 2**stored.bits
        assert low <= int(stored.integers.min()) and int(stored.integers.max()) <= high


@pytest.mark.parametrize("quantizer", EVERY, ids=str)
def test_a_weight_in_any_layout_is_quantized_alike(quantizer: Quantizer) -> None:
    value = weight(3, 4, 2, 2)
    other = value.to(memory_format=torch.channels_last)
    assert other.stride() != value.stride()
    turned = weight(12, 5).T
    for one, same in ((value, other), (turned.contiguous(), turned)):
        step = step_of(quantizer, one)
        assert torch.equal(quantizer(one, step=step), quantizer(same, step=step))
        assert torch.equal(quantizer.quantize(one, step).integers, quantizer.quantize(same, step).integers)


@pytest.mark.parametrize("quantizer", EVERY, ids=str)
def test_blocks_of_one_value_and_of_zeros_stay_finite(quantizer: Quantizer) -> None:
    for number in (0.0, 0.25, -3.0):
        value = torch.full((3, 4), number, dtype=torch.float64)
        output = quantizer(value, step=step_of(quantizer, value))
        assert output.isfinite().all()
        if number == 0 and quantizer != Binary.of_the_report():
            assert output.abs().max() < 1e-6
        if isinstance(quantizer, Uniform | Binary | Ternary) and quantizer != Binary.of_the_report():
            torch.testing.assert_close(output, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "quantizer",
    [q for q in EVERY if not (isinstance(q, Stochastic) and q.norm != "max")],
    ids=str,
)
def test_quantizing_again_changes_nothing(quantizer: Quantizer) -> None:
    value = weight()
    step = step_of(quantizer, value)
    once = quantizer(value, step=step)
    torch.testing.assert_close(quantizer(once, step=step), once, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("quantizer", EVERY, ids=str)
def test_bad_weights_are_refused(quantizer: Quantizer) -> None:
    value = weight()
    step = step_of(quantizer, value)
    value[1, 2], value[0, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"Expected finite weights, but 2 of the 60 elements of a weight of shape"):
        quantizer.quantize(value, step)
    with pytest.raises(ValueError, match=r"floating point numbers, but got torch.int8. It may be quantized already"):
        quantizer.quantize(torch.ones(3, 4, dtype=torch.int8), step)


# Uniform


@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform_is_its_formula(bits: int) -> None:
    value, high = weight(), 2 ** (bits - 1) - 1
    scale = value.abs().amax(1, keepdim=True) / high
    torch.testing.assert_close(Uniform(bits)(value), scale * (value / scale).round())
    assert (Uniform(bits)(value) - value).abs().max() <= scale.max() / 2 * (1 + 1e-12)

    value = value + 1.5  # mostly of one sign
    least, most = value.amin(1, keepdim=True).clamp(max=0), value.amax(1, keepdim=True)
    scale = (most - least) / (2**bits - 1)
    zero = (-least / scale).round()
    expected = scale * ((value / scale).round() + zero).clamp(0, 2**bits - 1) - scale * zero
    output = Uniform(bits, symmetric=False)(value)
    assert (output - expected).abs().max() <= scale.max() * (1 + 1e-9)  # a tie may go to either side
    assert (output != expected).double().mean() < 0.05 or torch.allclose(output, expected)
    value[:, 0] = 0
    assert (Uniform(bits, symmetric=False)(value)[:, 0] == 0).all()


def test_scopes_share_their_scale() -> None:
    value = torch.tensor([[1.0, -4.0, 2.0, 8.0], [0.5, 0.25, 16.0, 2.0]])
    scales = {
        scope: Uniform(4, scope).quantize(value).grid.scale.flatten() * 7 for scope in ("tensor", "row", "group:2")
    }
    assert scales["tensor"].tolist() == pytest.approx([16])
    assert scales["row"].tolist() == pytest.approx([8, 16])
    assert scales["group:2"].tolist() == pytest.approx([4, 8, 0.5, 16])


# Stochastic


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("norm", ["l2", "max"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("strict", [True, False])
def test_stochastic_is_unbiased_within_its_variance(bits: int, norm: Any, scope: str, strict: bool) -> None:
    quantizer, value, generator, draws = Stochastic(bits, norm, scope, strict), weight(3, 8), seeded(), 1000
    samples = torch.stack([quantizer(value, generator) for _ in range(draws)])
    grid = quantizer.quantize(value).grid
    step = quantizer.quantize(value).scope.split(torch.ones_like(value)) * grid.scale
    # between two levels an element has the variance of a coin: step^2 p (1 - p)
    part = grid.positions(quantizer.blocks(value)) % 1
    deviation = (step * (part * (1 - part)).sqrt()).reshape(value.shape)
    mean, error = samples.mean(0), samples - value
    assert ((mean - value).abs() <= 5 * deviation / math.sqrt(draws) + 1e-9).all()
    spread = (step.square() * (part * (1 - part)).sqrt() * (1 - 2 * part).abs()).reshape(value.shape)
    assert ((error.square().mean(0) - deviation.square()).abs() <= 5 * spread / math.sqrt(draws) + 1e-9).all()
    if norm == "l2" and not (strict and bits == 1):
        blocks, levels = quantizer.blocks(value), float(grid.high)
        number = blocks.shape[1]
        bound = min(number / levels**2, math.sqrt(number) / levels) * blocks.square().sum(1)
        found = error.square().mean(0).reshape(blocks.shape).sum(1)
        assert (found <= 1.1 * bound).all()


def test_stochastic_neighbours_and_levels() -> None:
    value = weight(4, 16)
    for bits, strict, levels in ((4, True, 7), (2, True, 1), (1, False, 1), (2, False, 3), (7, False, 127)):
        quantizer = Stochastic(bits, strict=strict)
        scale = value.abs().amax(1, keepdim=True) / levels
        rounded = quantizer(value, seeded()) / scale
        torch.testing.assert_close(rounded, rounded.round(), rtol=0, atol=1e-9)
        assert ((rounded - value / scale).abs() < 1 + 1e-9).all()
        assert int(quantizer.quantize(value).integers.abs().max()) == levels
    output = Stochastic(1)(value, seeded())
    assert sorted(set(output[0].tolist())) == pytest.approx([-float(value[0].abs().max()), float(value[0].abs().max())])


def test_stochastic_follows_its_seed() -> None:
    value = weight()
    first = Stochastic()(value, seeded(3))
    assert torch.equal(Stochastic()(value, seeded(3)), first)
    assert not torch.equal(Stochastic()(value, seeded(4)), first)


def test_the_norm_of_least_squares_is_better_than_the_largest_element() -> None:
    value = weight(8, 256)
    for bits in (1, 2, 3, 4):
        errors = {n: (Stochastic(bits, n)(value) - value).square().mean() for n in ("mse", "max", "l2")}  # type: ignore[arg-type]
        assert errors["mse"] < errors["max"] <= errors["l2"]


@pytest.mark.parametrize("cached", [1, 600, 10_000])
@pytest.mark.parametrize("shape", [(7, 256), (2000, 3), (1, 5)])
def test_the_norm_of_least_squares_does_not_depend_on_how_much_is_looked_at_together(
    shape: tuple[int, int], cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = weight(*shape)
    for scope in SCOPES if shape[1] % 4 == 0 else ("tensor", "row"):
        monkeypatch.setattr(stochastic, "CACHED", 10**9)
        whole = Stochastic(4, "mse", scope).quantize(value)
        monkeypatch.setattr(stochastic, "CACHED", cached)
        parts = Stochastic(4, "mse", scope).quantize(value)
        assert torch.equal(parts.integers, whole.integers)
        assert torch.equal(parts.grid.scale, whole.grid.scale)


def test_presets_are_the_literal_forms() -> None:
    value = weight(6, 64)
    assert Stochastic.of_the_report(4) == Stochastic(4, "l2", "tensor", strict=False)
    stored = Stochastic.of_the_code(7).quantize(value)
    assert (stored.bits, stored.grid.low, stored.grid.high) == (8, -127, 127)
    assert float(stored.grid.scale) == pytest.approx(float(value.abs().max()) / 127)
    # nearly all of a large tensor is rounded to 0, as the norm of the whole is far above its elements
    assert (Stochastic.of_the_report(2)(weight(64, 64)) == 0).double().mean() > 0.99


# Binary and ternary


def test_binary_has_the_least_error_for_its_signs() -> None:
    value = weight() + 0.3
    plain = Binary(centred=False)(value)
    torch.testing.assert_close(plain, value.abs().mean(1, keepdim=True) * value.sign())
    centred = Binary()(value)
    above = value >= value.mean(1, keepdim=True)
    for row, side, output in zip(value, above, centred, strict=True):
        torch.testing.assert_close(output, torch.where(side, row[side].mean(), row[~side].mean()))
    assert (centred - value).square().mean() < (plain - value).square().mean()


def test_the_sign_of_nothing_is_one() -> None:
    value = torch.tensor([[0.0, -0.5, 2.0, -3.0]])
    assert Binary.of_the_report()(value).tolist() == [[1.0, -1.0, 1.0, -1.0]]
    assert Binary(centred=False)(value)[0, 0] > 0


def test_small_queries_divide_logits_as_the_report_does() -> None:
    heads, dim = 3, 4
    x, queries, keys = weight(5, 12), weight(12, 12), weight(12, 12)
    signs = Binary.of_the_report()
    q, k = (x @ w.t() for w in (Binary.of_the_report(head_dim=dim)(queries), signs(keys)))
    large = x @ signs(queries).t()
    for head in torch.arange(12).view(heads, dim):
        logits = q[:, head] @ k[:, head].t() / math.sqrt(dim)
        torch.testing.assert_close(logits, large[:, head] @ k[:, head].t() / (SCALE_FREE_LOGITS * dim))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Binary.of_the_report(head_dim=0),
            "Expected head_dim, the dims of an attention head, to be at",
        ),
        (lambda: Binary(centred=False, scaled=False, size=-1.0), "Expected size, the magnitude of both values, to be"),
        (lambda: Binary(size=0.5), "Expected scaled=False with a size of the values, but got"),
    ],
)
def test_sizes_of_binary_weights_that_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_ternary_is_its_formula() -> None:
    value = weight()
    large = value.abs() > 0.7 * value.abs().mean(1, keepdim=True)
    size = (value.abs() * large).sum(1, keepdim=True) / large.sum(1, keepdim=True)
    torch.testing.assert_close(Ternary()(value), size * value.sign() * large)


# Gradients


@pytest.mark.parametrize("quantizer", [q for q in EVERY if not isinstance(q, LearnedStep)], ids=str)
def test_gradients_pass_straight_through(quantizer: Quantizer) -> None:
    value = weight().requires_grad_()
    outer = weight(seed=9)
    (quantizer(value, seeded()) * outer).sum().backward()
    expected = outer.clone()
    if quantizer == Binary.of_the_report():
        expected[value.detach().abs() > 1] = 0
    elif isinstance(quantizer, Stochastic) and quantizer.norm == "mse" and (quantizer.bits > 1 or not quantizer.strict):
        grid = quantizer.quantize(value.detach()).grid
        inside = grid.cut(grid.positions(quantizer.blocks(value.detach())))[1].reshape(value.shape)
        assert not inside.all() or quantizer.scope == "group:4" or grid.high >= 7
        expected[~inside] = 0
    assert torch.equal(value.grad, expected)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_learned_steps_have_the_gradients_of_the_paper(bits: int, scope: str) -> None:
    quantizer = LearnedStep(bits, scope)
    value, outer = weight().requires_grad_(), weight(seed=9)
    step = quantizer.first_step(value.detach())
    high = 2 ** (bits - 1) - 1
    torch.testing.assert_close(step, 2 * quantizer.blocks(value.detach()).abs().mean(1, keepdim=True) / math.sqrt(high))
    step = (0.6 * step).requires_grad_()
    (quantizer(value, step=step) * outer).sum().backward()
    blocks, gradient = quantizer.blocks(value.detach()), quantizer.blocks(outer)
    of_step = torch.zeros_like(step.detach())
    of_value = torch.zeros_like(blocks)
    for row in range(blocks.shape[0]):
        for column in range(blocks.shape[1]):
            position = float(blocks[row, column] / step.detach()[row])
            if position > high or position < -high:
                share = high if position > 0 else -high
            else:
                share = round(position) - position
                of_value[row, column] = gradient[row, column]
            of_step[row] += share * gradient[row, column] / math.sqrt(blocks.shape[1] * high)
    torch.testing.assert_close(step.grad, of_step)
    torch.testing.assert_close(value.grad, of_value.reshape(value.shape))
    if bits == 2:
        assert (of_value == 0).any()


def test_learned_steps_get_better() -> None:
    value, quantizer = weight(4, 64), LearnedStep(3)
    step = torch.nn.Parameter(quantizer.first_step(value))
    optimizer = torch.optim.Adam([step], lr=0.01)
    errors = []
    for _ in range(100):
        error = (quantizer(value, step=step) - value).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.9 * errors[0]


def test_a_step_that_fell_below_zero_does_no_harm() -> None:
    value = weight()
    output = LearnedStep(4)(value, step=torch.full((5, 1), -1.0, dtype=torch.float64))
    assert output.isfinite().all()
    with pytest.raises(ValueError, match=r"Expected the step of LearnedStep, but got none: begin with first_step"):
        LearnedStep(4)(value)
    with pytest.raises(ValueError, match=r"Expected the step of LearnedStep, but got none"):
        LearnedStep(4).quantize(value)


# Arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(9), r"bits of Uniform to be an integer from 2 to 8, or 16, but got 9"),
        (lambda: Uniform(1), r"bits of Uniform to be an integer from 2 to 8, or 16, but got 1"),
        (lambda: Uniform(True), r"bits of Uniform to be an integer from 2 to 8, or 16, but got True"),
        (lambda: Stochastic(0), r"bits of Stochastic to be an integer from 1 to 8, but got 0"),
        (lambda: LearnedStep(1), r"bits of LearnedStep to be an integer from 2 to 8, but got 1"),
        (lambda: Stochastic(4, "l1"), r"norm to be one of \['l2', 'max', 'mse'\], but got 'l1'"),  # type: ignore[arg-type]
        (lambda: Uniform(4, "column"), r"scope to be 'tensor', 'row' or 'group:K' .* but got 'column'"),
        (lambda: Ternary("group:0"), r"but got 'group:0'. For example: scope='group:64'"),
        (lambda: Binary(clip=0.0), r"clip, where gradients end, to be above 0, but got 0.0"),
        (lambda: Binary(scaled=False), r"centred=False with scaled=False"),
        (
            lambda: Uniform(4, "group:5")(weight()),
            r"multiple of 5, for scope='group:5', .*\(5, 12\) with rows of 12",
        ),
        (lambda: quantizer_named("int9"), r"'int8' to 'int2', 'lsq8' to 'lsq2', 'ternary', 'binary', but got 'int9'"),
        (lambda: quantizer_named("int1"), r"but got 'int1'. One bit is 'binary'"),
        (lambda: quantizer_named(8), r"but got 8"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_names() -> None:
    own = Stochastic(2)
    assert quantizer_named("int8") == Uniform(8)
    assert quantizer_named("lsq2") == LearnedStep(2)
    assert quantizer_named("binary") == Binary()
    assert quantizer_named("ternary") == Ternary()
    assert quantizer_named(own) is own
