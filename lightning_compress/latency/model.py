"""Latency as a function of the kept counts, out of measurements of each structure alone and of some together.

A call of the whole model takes 1. The multiply-accumulates say which structures share which work (a product of two
counts: what one removes, the other cannot save again); measurements say how long that work takes. So the model is the
cost polynomial with measured coefficients, in *effective* counts: a measured curve takes the kept count of each
structure to the count at which the polynomial gives the measured time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from lightning_compress.polynomials import Polynomial


@dataclass(frozen=True)
class Curve:
    """A piecewise linear function that does not fall; beyond its ends it goes on as its first and last pieces do.

    Args:
        points: (x, y), x strictly increasing, y not decreasing; one or more.
    """

    points: tuple[tuple[float, float], ...]

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Curve:
        """The nearest curve that does not fall, in the sense of least squares (pool adjacent violators)."""
        pools: list[tuple[float, list[float]]] = []  # (mean of y, the x of the pool)
        for x, y in sorted(dict(points).items()):
            pools.append((y, [x]))
            while len(pools) > 1 and pools[-2][0] >= pools[-1][0]:
                (b, right), (a, left) = pools.pop(), pools.pop()
                pools.append(((a * len(left) + b * len(right)) / (len(left) + len(right)), left + right))
        return cls(tuple((x, y) for y, xs in pools for x in xs))

    def __call__(self, x: float) -> float:
        """Value at ``x``."""
        if len(self.points) == 1:
            return self.points[0][1]
        i = min(max(bisect_left(self.points, x, key=lambda p: p[0]), 1), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[i - 1 : i + 1]
        return y0 + (y1 - y0) * (x - x0) / (x1 - x0)

    def inverse(self, y: float) -> float:
        """The largest x whose value is at most ``y``; the curve must begin in the origin."""
        for (x0, y0), (x1, y1) in reversed(list(pairwise(self.points))):
            if y >= y0:
                return x0 + (x1 - x0) * (y - y0) / (y1 - y0) if y1 > y0 else x1
        return 0.0


@dataclass(frozen=True)
class Saving:
    """What one structure alone was measured to save at some of its counts, as fractions of the dense latency.

    Args:
        units: all its units.
        points: (count, saved); without any, the structure gets the time of its multiply-accumulates.
        error: standard error of the measured values.
    """

    units: int
    points: tuple[tuple[int, float], ...] = ()
    error: float = 0.0


@dataclass(frozen=True)
class LatencyModel:
    """Estimated latency, as a fraction of that of the dense model.

    Args:
        polynomial: latency in the effective counts, 1 for the dense model.
        curves: structure name -> kept count to effective count.
        correction: from what the structures add up to, to what was measured when many were removed together.
    """

    polynomial: Polynomial
    curves: Mapping[str, Curve]
    correction: Curve = Curve(((0.0, 0.0), (1.0, 1.0)))

    def effective(self, name: str, count: float) -> float:
        """What ``count`` units of a structure count for in ``polynomial``."""
        return max(0.0, self.curves[name](count))

    def added(self, counts: Mapping[str, float]) -> float:
        """What the measurements of single structures add up to."""
        return self.polynomial.evaluate({n: self.effective(n, c) for n, c in counts.items() if n in self.curves})

    def estimate(self, counts: Mapping[str, float]) -> float:
        """Estimated latency with these kept counts."""
        return self.correction(self.added(counts))

    def corrected(self, measured: Sequence[tuple[Mapping[str, float], float]]) -> LatencyModel:
        """The model corrected so that it gives these measured latencies at these counts.

        Between the measurements the correction is linear, and below the smallest it keeps its proportion.
        """
        points = [(self.added(counts), seconds) for counts, seconds in measured]
        inside = [(x, y) for x, y in points if 0 < x < 1 and 0 < y < 1]
        return LatencyModel(self.polynomial, self.curves, Curve.through([(0.0, 0.0), *inside, (1.0, 1.0)]))


def build(
    macs: Polynomial,
    savings: Mapping[str, Saving],
    together: Sequence[tuple[Mapping[str, float], float]] = (),
) -> LatencyModel:
    r"""The model that these measurements make.

    A saving is measured with an error, which drowns that of a small structure. So it is weighed against what the MACs
    would predict at the pace :math:`\tau` of all structures together, taken to be right within a half:

    .. math:: \hat s = w s + (1 - w) \tau \Delta, \qquad w = \frac{(\tau \Delta / 2)^2}{(\tau \Delta / 2)^2 + e^2}

    Args:
        macs: multiply-accumulates in the kept counts.
        savings: by structure name.
        together: counts with many structures removed at once, and the latency measured there.
    """
    full = {name: float(s.units) for name, s in savings.items()}
    part = macs.restrict(set(full)).substitute({})  # a copy: its monomials are the shared work
    part = Polynomial({names: c for names, c in part if c > 0 and all(n in full for n in names)})
    whole = part.evaluate(full)

    def saved_macs(name: str, count: float) -> float:
        own = part.restrict({name})
        return own.evaluate(full) - own.evaluate({**full, name: count})

    pace = _pace(part, full, savings, together, saved_macs)
    smoothed: dict[str, dict[float, float]] = {}
    for name, saving in savings.items():
        points: dict[float, float] = {}
        for count, value in saving.points:
            prior = pace * saved_macs(name, count)
            if prior > 0:
                trust = (prior / 2) ** 2 / ((prior / 2) ** 2 + saving.error**2)
                points[float(count)] = trust * value + (1 - trust) * prior
            else:
                points[float(count)] = value if value > 2 * saving.error else 0.0
        smoothed[name] = points or {0.0: pace * saved_macs(name, 0.0)}

    # seconds per MAC of each structure, where it saves most; a monomial takes that of its slowest structure, so that
    # no structure can save more than its work
    rates = {}
    for name, points in smoothed.items():
        least = min(points)
        macs_there = saved_macs(name, least) if name in part.variables else 0.0
        rates[name] = max(points[least], 0.0) / macs_there if macs_there else 0.0
    terms = {names: c * max(rates[n] for n in names) for names, c in part}
    for name, points in smoothed.items():
        if name not in part.variables:
            least = min(points)
            terms[(name,)] = max(points[least], 0.0) / (full[name] - least)
    polynomial = Polynomial(terms)
    total = polynomial.evaluate(full)
    scale = min(1.0, 0.999 / total) if total > 0 else 1.0  # the structures cannot take more than all of the time
    polynomial = Polynomial({names: c * scale for names, c in polynomial})
    curves = {
        name: _effective_counts(polynomial.restrict({name}), full, name, points, scale)
        for name, points in smoothed.items()
    }
    constant = 1.0 - polynomial.evaluate(full)
    model = LatencyModel(polynomial + constant, curves)
    return model.corrected(together) if together and whole else model


def _pace(
    part: Polynomial,
    full: Mapping[str, float],
    savings: Mapping[str, Saving],
    together: Sequence[tuple[Mapping[str, float], float]],
    saved_macs: Callable[[str, float], float],
) -> float:
    """Latency per MAC of all structures: from the measurement together that says most, else from the single ones."""
    whole = part.evaluate(full)
    totals: list[tuple[float, float]] = [
        (whole - part.evaluate({**full, **counts}), 1.0 - latency) for counts, latency in together
    ]
    if totals and max(totals)[0] > 0:
        work, gain = max(totals)
        return max(gain, 0.0) / work
    macs = saved = 0.0
    for name, saving in savings.items():
        for count, value in saving.points:
            macs += saved_macs(name, count)
            saved += value
    return max(saved, 0.0) / macs if macs else (0.999 / whole if whole else 0.0)


def _effective_counts(
    part: Polynomial, full: Mapping[str, float], name: str, points: Mapping[float, float], scale: float
) -> Curve:
    """The curve at whose values ``part`` gives what was measured at ``points``."""
    # part in this one variable: power -> coefficient
    powers: dict[int, float] = {}
    for names, c in part:
        power = names.count(name)
        powers[power] = powers.get(power, 0.0) + c * prod(full[n] for n in names if n != name)

    def time(count: float) -> float:
        return sum(c * count**power for power, c in powers.items())

    # measurements first made monotone: fewer units never take longer
    left = Curve.through(
        [*((n, time(full[name]) - scale * s) for n, s in points.items()), (full[name], time(full[name]))]
    )
    result = []
    for count, seconds in left.points:
        low, high = 0.0, full[name]
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if time(middle) <= seconds else (low, middle)
        result.append((count, full[name] if count == full[name] else low))
    return Curve.through(result)
