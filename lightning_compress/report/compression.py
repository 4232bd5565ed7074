"""The report of a compression: what was there before, what is left, and how exact the removal was."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from lightning_compress.report.rounds import Round, rows, training_speedup
from lightning_compress.report.text import aligned, byte_size, milliseconds, ratio, si
from lightning_compress.report.tokens import TokenSummary
from lightning_compress.timing import Latency


@dataclass(frozen=True)
class StructureCount:
    """What is left of one structure.

    Args:
        name: its name.
        kind: its kind.
        units: units before.
        kept: units after.
        tier: how the removal was made: "native" or "shim".
    """

    name: str
    kind: str
    units: int
    kept: int
    tier: str | None


@dataclass(frozen=True)
class CompressionReport:
    """Numbers before and after a removal.

    Args:
        params: parameters of the compressed module, before and after.
        macs: multiply-accumulates of one example, before and after.
        prunable_macs: the part of ``macs`` that lies in the structures.
        bytes: size of the module as a safetensors file.
        structures: what is left of each structure.
        error: largest difference between the zeroed and the smaller model on the example, relative to the largest
            output: max |difference| / max(1, max |reference|), in float64; over all removals.
        latency: description of a call -> latency before and after; empty if it was not measured.
        pinned: families of units that stay whole.
        module: name of the compressed module.
        step: optimizer steps taken before the last removal.
        rounds: the removals, and how long training steps took before and after each; the steps after the last one are
            known when the fit ends.
        tokens: what token pruning leaves, measured last in the fit and known when it ends; None without it. Its numbers
            are of the layers at the real lengths of the examples, those above of the whole module on one example with
            its padding.
    """

    params: tuple[int, int]
    macs: tuple[float, float]
    prunable_macs: tuple[float, float]
    bytes: tuple[int, int]
    structures: tuple[StructureCount, ...]
    error: float
    latency: dict[str, tuple[Latency, Latency]]
    pinned: int = 0
    module: str = ""
    step: int = 0
    rounds: tuple[Round, ...] = ()
    tokens: TokenSummary | None = None

    @property
    def macs_kept(self) -> float:
        """Kept fraction of the prunable multiply-accumulates."""
        return self.prunable_macs[1] / self.prunable_macs[0] if self.prunable_macs[0] else 1.0

    @property
    def speedup(self) -> float | None:
        """Measured speed-up on the last call of ``latency`` (the largest batch); None if nothing was measured."""
        if not self.latency:
            return None
        before, after = list(self.latency.values())[-1]
        return before.seconds / after.seconds

    @property
    def training_speedup(self) -> float | None:
        """How many times faster training steps are after the last removal than before the first; None if not known."""
        return training_speedup(self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, ready for JSON."""
        return {
            **asdict(self),
            "tokens": None if self.tokens is None else self.tokens.to_dict(),
            "macs_kept": self.macs_kept,
            "speedup": self.speedup,
            "training_speedup": self.training_speedup,
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> CompressionReport:
        """The report that ``to_json`` has written."""
        data = json.loads(text)
        values = {f.name: data[f.name] for f in fields(cls) if f.name not in ("rounds", "tokens")}
        values["rounds"] = tuple(Round.from_dict(r) for r in data.get("rounds", ()))
        tokens = data.get("tokens")
        values["tokens"] = None if tokens is None else TokenSummary.from_dict(tokens)
        for name in ("params", "macs", "prunable_macs", "bytes"):
            values[name] = tuple(values[name])
        values["structures"] = tuple(StructureCount(**s) for s in values["structures"])
        values["latency"] = {call: tuple(Latency(**one) for one in pair) for call, pair in values["latency"].items()}
        return cls(**values)

    def metrics(self) -> dict[str, float]:
        """The headline numbers under flat names, as loggers take them."""
        values = {
            "compression/params": float(self.params[1]),
            "compression/params_ratio": self.params[0] / max(1, self.params[1]),
            "compression/macs": self.macs[1],
            "compression/macs_ratio": self.macs[0] / max(1.0, self.macs[1]),
            "compression/macs_kept": self.macs_kept,
            "compression/bytes": float(self.bytes[1]),
            "compression/error": self.error,
        }
        if self.speedup is not None:
            values["compression/speedup"] = self.speedup
        if self.training_speedup is not None:
            values["compression/training_speedup"] = self.training_speedup
        if self.tokens is not None:
            values.update(self.tokens.metrics())
        return values

    def __str__(self) -> str:
        rows = [
            ("", "before", "after", "ratio"),
            ("parameters", f"{self.params[0]:,}", f"{self.params[1]:,}", ratio(*self.params)),
            ("MACs of an example", si(self.macs[0]), si(self.macs[1]), ratio(*self.macs)),
            ("  in structures", si(self.prunable_macs[0]), si(self.prunable_macs[1]), ratio(*self.prunable_macs)),
            ("file", byte_size(self.bytes[0]), byte_size(self.bytes[1]), ratio(*self.bytes)),
        ]
        for call, (before, after) in self.latency.items():
            faster = ratio(before.seconds, after.seconds)
            rows.append((f"latency, {call}", milliseconds(before), milliseconds(after), faster))
        what = f" of {self.module!r}" if self.module else ""
        lines = [
            f"Compression{what} after {self.step} optimizer steps: {self.macs_kept:.1%} of the prunable MACs are left"
        ]
        lines += ["  " + line for line in aligned(rows)]
        lines.append(f"  largest difference between the zeroed and the smaller model, float64: {self.error:.1e}")
        if self.structures:
            table = [("structure", "kind", "kept", "tier")]
            table += [(s.name, s.kind, f"{s.kept} of {s.units}", s.tier or "") for s in self.structures]
            lines += ["  " + line for line in aligned(table)]
        if measured := self.rounds_text():
            lines.append(measured)
        if self.tokens is not None:
            lines += ["  " + line for line in str(self.tokens).splitlines()]
        if self.pinned:
            lines.append(f"  {self.pinned} more families of units stay whole; explain(...) says why")
        return "\n".join(lines)

    def rounds_text(self) -> str:
        """How long training steps took before and after each removal; empty before that is known."""
        return "\n".join("  " + line for line in aligned(rows(self.rounds)))
