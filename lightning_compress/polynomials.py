"""Exact costs as polynomials in the numbers of kept units.

A matrix product of shape (m, k) x (k, n) costs m * k * n multiply-accumulates. Where k is, say, heads * head_dim and
both are structures, that cost is a monomial in the two kept counts; a packed projection is a sum of monomials. The cost
of a whole model is therefore one polynomial in the kept counts, exact for every plan and cheap to evaluate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod


class Polynomial:
    """A polynomial with real coefficients in named variables: sum over monomials of c * x_1 * x_2 * ...

    Args:
        terms: coefficient of each monomial; a monomial is the sorted tuple of its variable names, a square names its
            variable twice.

    >>> heads, width = Polynomial.variable("heads"), Polynomial.variable("width")
    >>> cost = 3 * heads * width + 10
    >>> cost.evaluate({"heads": 4, "width": 8})
    106.0
    """

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[tuple[str, ...], float] | None = None) -> None:
        self.terms: dict[tuple[str, ...], float] = {key: float(c) for key, c in (terms or {}).items() if c != 0}

    @classmethod
    def constant(cls, value: float) -> Polynomial:
        """The polynomial that is ``value`` everywhere."""
        return cls({(): value})

    @classmethod
    def variable(cls, name: str) -> Polynomial:
        """The polynomial that is the variable ``name``."""
        return cls({(name,): 1.0})

    @property
    def variables(self) -> frozenset[str]:
        """Names of all variables that occur."""
        return frozenset(name for key in self.terms for name in key)

    def evaluate(self, values: Mapping[str, float]) -> float:
        """Value at ``values``; raises KeyError for a variable without a value."""
        return float(sum(c * prod(values[name] for name in key) for key, c in self.terms.items()))

    def derivative(self, name: str) -> Polynomial:
        """Partial derivative in the variable ``name``: the marginal cost of one of its units."""
        terms: dict[tuple[str, ...], float] = {}
        for key, c in self.terms.items():
            power = key.count(name)
            if power:
                rest = list(key)
                rest.remove(name)
                terms[tuple(rest)] = terms.get(tuple(rest), 0.0) + c * power
        return Polynomial(terms)

    def substitute(self, values: Mapping[str, float]) -> Polynomial:
        """The polynomial with some variables fixed."""
        terms: dict[tuple[str, ...], float] = {}
        for key, c in self.terms.items():
            for name in key:
                if name in values:
                    c *= values[name]
            rest = tuple(name for name in key if name not in values)
            terms[rest] = terms.get(rest, 0.0) + c
        return Polynomial(terms)

    def restrict(self, names: frozenset[str] | set[str]) -> Polynomial:
        """Only the monomials that contain at least one of ``names``.

        The part of a cost that those variables can change.
        """
        return Polynomial({key: c for key, c in self.terms.items() if any(name in names for name in key)})

    def __iter__(self) -> Iterator[tuple[tuple[str, ...], float]]:
        return iter(self.terms.items())

    def __add__(self, other: Polynomial | float) -> Polynomial:
        other = other if isinstance(other, Polynomial) else Polynomial.constant(other)
        terms = dict(self.terms)
        for key, c in other.terms.items():
            terms[key] = terms.get(key, 0.0) + c
        return Polynomial(terms)

    def __mul__(self, other: Polynomial | float) -> Polynomial:
        other = other if isinstance(other, Polynomial) else Polynomial.constant(other)
        terms: dict[tuple[str, ...], float] = {}
        for key_a, a in self.terms.items():
            for key_b, b in other.terms.items():
                key = tuple(sorted(key_a + key_b))
                terms[key] = terms.get(key, 0.0) + a * b
        return Polynomial(terms)

    __radd__ = __add__
    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Polynomial) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(frozenset(self.terms.items()))

    def __repr__(self) -> str:
        return "Polynomial(" + (" + ".join("*".join((f"{c:g}", *key)) for key, c in self.terms.items()) or "0") + ")"
