from itertools import product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_compress.polynomials import Polynomial

NAMES = ("a", "b", "c")
MONOMIALS = st.lists(st.sampled_from(NAMES), max_size=3).map(lambda names: tuple(sorted(names)))
POLYNOMIALS = st.dictionaries(MONOMIALS, st.integers(-5, 5), max_size=4).map(Polynomial)
POINTS = st.fixed_dictionaries({name: st.integers(-4, 4) for name in NAMES})


def test_a_hand_sized_cost() -> None:
    heads, dims = Polynomial.variable("heads"), Polynomial.variable("dims")
    cost = 3 * heads * dims + 10 + heads
    assert cost.terms == {("dims", "heads"): 3.0, (): 10.0, ("heads",): 1.0}
    assert cost.evaluate({"heads": 4, "dims": 8}) == 3 * 4 * 8 + 10 + 4
    assert cost.derivative("heads") == 3 * dims + 1
    assert cost.substitute({"dims": 2}) == 7 * heads + 10
    assert cost.restrict({"dims"}) == 3 * heads * dims
    assert cost.restrict({"heads"}) == 3 * heads * dims + heads
    assert cost.variables == {"heads", "dims"}
    assert dict(cost) == cost.terms
    assert repr(Polynomial.constant(2.5) + heads) == "Polynomial(2.5 + 1*heads)"
    assert repr(Polynomial()) == "Polynomial(0)"


def test_zero_coefficients_leave() -> None:
    x = Polynomial.variable("x")
    assert (x + x * -1).terms == {}
    assert (x * 0).terms == {}
    assert (x + -1 * x).variables == frozenset()


def test_a_variable_without_value_is_an_error() -> None:
    with pytest.raises(KeyError, match="x"):
        Polynomial.variable("x").evaluate({})


@given(POLYNOMIALS, POLYNOMIALS, POINTS)
def test_sums_and_products_are_those_of_the_values(p: Polynomial, q: Polynomial, at: dict[str, int]) -> None:
    assert (p + q).evaluate(at) == p.evaluate(at) + q.evaluate(at)
    assert (p * q).evaluate(at) == p.evaluate(at) * q.evaluate(at)
    assert p * q == q * p
    assert p + q == q + p
    assert hash(p + q) == hash(q + p)


@given(POLYNOMIALS, POINTS)
def test_a_product_of_variables_is_evaluated_monomial_by_monomial(p: Polynomial, at: dict[str, int]) -> None:
    assert p.evaluate(at) == sum(c * prod(at[n] for n in names) for names, c in p.terms.items())


@given(POLYNOMIALS, st.sampled_from(NAMES), POINTS)
def test_the_derivative_is_the_difference_quotient(p: Polynomial, name: str, at: dict[str, int]) -> None:
    # for degree at most 3 Richardson extrapolation of two central differences is exact
    def central(step: int) -> float:
        return (p.evaluate({**at, name: at[name] + step}) - p.evaluate({**at, name: at[name] - step})) / (2 * step)

    assert p.derivative(name).evaluate(at) == pytest.approx((4 * central(1) - central(2)) / 3, abs=1e-9)


@given(POLYNOMIALS, st.sets(st.sampled_from(NAMES)), POINTS)
def test_substitution_then_evaluation_is_evaluation(p: Polynomial, names: set[str], at: dict[str, int]) -> None:
    fixed = p.substitute({name: at[name] for name in names})
    assert not fixed.variables & names
    assert fixed.evaluate(at) == p.evaluate(at)


@given(POLYNOMIALS, st.sets(st.sampled_from(NAMES)))
def test_restriction_keeps_what_the_variables_can_change(p: Polynomial, names: set[str]) -> None:
    rest = p + p.restrict(names) * -1
    assert not rest.variables & names
    assert p.restrict(names).restrict(names) == p.restrict(names)
    for values in product((0, 1), repeat=len(NAMES)):
        at = dict(zip(NAMES, values, strict=True))
        if all(at[name] == 0 for name in names):
            assert p.restrict(names).evaluate(at) == 0


def test_a_polynomial_equals_nothing_but_a_polynomial() -> None:
    assert Polynomial.constant(1) != 1
