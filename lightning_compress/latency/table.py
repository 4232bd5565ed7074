"""The latency table: what was measured, its JSON form with a reader that trusts nothing, and the model made of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lightning_compress.latency.model import LatencyModel, Saving, build
from lightning_compress.structures import Structures

NAME = "lightning_compress.latency"
VERSION = 1

# A file may be hostile or damaged: nothing larger than this is believed.
LARGEST_COUNT = 2**26
LARGEST_LIST = 100_000


@dataclass(frozen=True)
class LatencyRow:
    """What was measured of structures that look alike.

    Args:
        structures: their names.
        units: units of each.
        multiple: kept counts that are multiples of this run at full speed.
        points: (kept count, saved), the latter by one of them alone, as a fraction of the dense latency; by falling
            count. Empty for structures too small to be worth a measurement.
        error: standard error of the savings.
    """

    structures: tuple[str, ...]
    units: int
    multiple: int = 1
    points: tuple[tuple[int, float], ...] = ()
    error: float = 0.0


@dataclass(frozen=True)
class LatencyTable:
    """Latency of one call of one model on one device, at several widths of each structure.

    Made by ``measure_latency_table``; ``to_json`` and ``from_json`` are exact.

    Args:
        key: hash of what it depends on: the model, its structures, the call, the device, versions, threads.
        device: name of the device.
        call: the call in words.
        dense_seconds: median latency of the model with all units.
        noise: how much equal runs differed: half the distance between the quartiles, as a fraction of the median.
        rows: one for each family of look-alikes.
        together: kept counts of all structures, removed together, and the latency as a fraction of the dense one.
    """

    key: str
    device: str
    call: str
    dense_seconds: float
    noise: float
    rows: tuple[LatencyRow, ...]
    together: tuple[tuple[Mapping[str, int], float], ...] = ()

    @property
    def multiples(self) -> dict[str, int]:
        """The multiple of each structure by name."""
        return {name: row.multiple for row in self.rows for name in row.structures}

    @property
    def counts(self) -> dict[str, int]:
        """All units of each structure by name."""
        return {name: row.units for row in self.rows for name in row.structures}

    def model(self, structures: Structures) -> LatencyModel:
        """Estimated latency as a function of the kept counts of ``structures``.

        Args:
            structures: those of the measured model, or what is left of them after a removal; fewer kinds are fine.

        Raises:
            ValueError: if one of them was not measured, or has more units than the measured one.
        """
        units = self.counts
        for s in structures:
            if s.units > units.get(s.name, 0):
                had = f"{units[s.name]} units" if s.name in units else "no such structure"
                raise ValueError(
                    f"Expected a latency table of this model, but {s.name!r} has {s.units} units, and in the table "
                    f"there is {had}: measure the table with the structures that the plan is made for."
                )
        names = {s.name for s in structures}
        savings = {
            name: Saving(row.units, row.points, row.error)
            for row in self.rows
            for name in row.structures
            if name in names
        }
        # what was measured with other structures removed as well says nothing about these alone
        together = self.together if len(names) == len(units) else ()
        return build(structures.macs, savings, together)

    def estimate(self, structures: Structures, counts: Mapping[str, int] | None = None) -> float:
        """Estimated latency with these kept counts, as a fraction of that of the measured model.

        A structure that is not named keeps all units that ``structures`` has.
        """
        return self.model(structures).estimate({**structures.counts, **(counts or {})})

    def unit_seconds(self, structures: Structures) -> dict[str, float]:
        """Latency that the removal of one unit of each structure saves on average, all others being there."""
        model, counts = self.model(structures), structures.counts
        whole = model.added(counts)
        rows = {name: row for row in self.rows for name in row.structures}
        saved = {}
        for s in structures:
            least = min([count for count, _ in rows[s.name].points if count < s.units], default=0)
            part = whole - model.added({**counts, s.name: least})
            saved[s.name] = self.dense_seconds * part / (s.units - least)
        return saved

    def __str__(self) -> str:
        lines = [
            f"{self.call} on {self.device}: {self.dense_seconds * 1e3:.2f} ms, equal runs differ by {self.noise:.1%}"
        ]
        for row in self.rows:
            others = f" and {len(row.structures) - 1} like it" if len(row.structures) > 1 else ""
            multiple = f", multiples of {row.multiple}" if row.multiple > 1 else ""
            saved = ", ".join(f"{count}: -{saved:.1%}" for count, saved in row.points) or "not measured"
            lines.append(f"  {row.structures[0]}{others} ({row.units} units{multiple}): {saved}")
        return "\n".join(lines)

    # JSON

    def to_json(self) -> str:
        """The table as JSON text."""
        return json.dumps(
            {
                "format": NAME,
                "version": VERSION,
                "key": self.key,
                "device": self.device,
                "call": self.call,
                "dense_seconds": self.dense_seconds,
                "noise": self.noise,
                "rows": [
                    {
                        "structures": list(row.structures),
                        "units": row.units,
                        "multiple": row.multiple,
                        "points": [list(point) for point in row.points],
                        "error": row.error,
                    }
                    for row in self.rows
                ],
                "together": [{"counts": dict(counts), "latency": latency} for counts, latency in self.together],
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """The table that ``to_json`` has written; raises ValueError with the place of whatever is wrong in it."""
        try:
            data = json.loads(text, parse_constant=lambda name: _refuse("every number", "finite", name))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"Expected a latency table as JSON, but it cannot be parsed: {error}.") from None
        keys = {"format", "version", "key", "device", "call", "dense_seconds", "noise", "rows", "together"}
        data = _object(data, "the table", keys)
        if data["format"] != NAME:
            _refuse("format", repr(NAME), data["format"])
        if data["version"] != VERSION or isinstance(data["version"], bool):
            _refuse("version", str(VERSION), data["version"])
        rows = tuple(_row(row, f"rows[{i}]") for i, row in enumerate(_list(data["rows"], "rows")))
        names = [name for row in rows for name in row.structures]
        if len(set(names)) != len(names):
            _refuse("rows", "to name every structure once", sorted({n for n in names if names.count(n) > 1}))
        units = {name: row.units for row in rows for name in row.structures}
        together = []
        for i, entry in enumerate(_list(data["together"], "together")):
            where = f"together[{i}]"
            counts = _object(_object(entry, where, {"counts", "latency"})["counts"], f"{where}.counts", set(units))
            checked = {n: _integer(c, f"{where}.counts[{n!r}]", 0, units[n]) for n, c in counts.items()}
            together.append((checked, _number(entry["latency"], f"{where}.latency", 0.0, 1e3)))
        return cls(
            key=_string(data["key"], "key"),
            device=_string(data["device"], "device"),
            call=_string(data["call"], "call"),
            dense_seconds=_number(data["dense_seconds"], "dense_seconds", 1e-12, 1e6),
            noise=_number(data["noise"], "noise", 0.0, 1e6),
            rows=rows,
            together=tuple(together),
        )


def _row(value: Any, path: str) -> LatencyRow:
    value = _object(value, path, {"structures", "units", "multiple", "points", "error"})
    units = _integer(value["units"], f"{path}.units", 1, LARGEST_COUNT)
    points: list[tuple[int, float]] = []
    for j, point in enumerate(_list(value["points"], f"{path}.points")):
        where = f"{path}.points[{j}]"
        if not isinstance(point, list) or len(point) != 2:
            _refuse(where, "a pair [count, saved]", point)
        count = _integer(point[0], f"{where}[0]", 0, units - 1)
        if points and count >= points[-1][0]:
            _refuse(where, "of a smaller count than the one before", point)
        points.append((count, _number(point[1], f"{where}[1]", -1e3, 1.0)))
    structures = tuple(_string(n, f"{path}.structures") for n in _list(value["structures"], f"{path}.structures"))
    if not structures:
        _refuse(f"{path}.structures", "one or more names", [])
    multiple = _integer(value["multiple"], f"{path}.multiple", 1, units)
    return LatencyRow(structures, units, multiple, tuple(points), _number(value["error"], f"{path}.error", 0.0, 1e3))


def _refuse(path: str, expected: str, got: object) -> NoReturn:
    shown = repr(got)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise ValueError(f"Malformed latency table: expected {path} to be {expected}, but got {shown}.")


def _object(value: Any, path: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != keys:
        _refuse(path, f"an object with the keys {sorted(keys)}", value)
    return value


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > LARGEST_LIST:
        _refuse(path, f"a list of at most {LARGEST_LIST}", value)
    return value


def _string(value: Any, path: str) -> str:
    if not isinstance(value, str):
        _refuse(path, "a string", value)
    return value


def _integer(value: Any, path: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        _refuse(path, f"an integer from {low} to {high}", value)
    return value


def _number(value: Any, path: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(path, "a number", value)
    if not math.isfinite(value) or not low <= value <= high:
        _refuse(path, f"a number from {low:g} to {high:g}", value)
    return float(value)
