"""What a fit has shown of itself: maps at the moments that matter, sparsity and metrics over training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_compress.report.maps import ModelMaps


@dataclass
class FitHistory:
    """The history of one fit, as plain numbers.

    Args:
        steps: optimizer steps at which the model was looked at, increasing; twice the same around a removal.
        sparsity: name of a matrix -> part of it that was gone or zero, at each of ``steps``.
        moments: what to show whole: the begin, before and after each removal, the end.
        metrics: name -> [(optimizer steps, value), ...] of what was logged.
        removals: optimizer steps of the removals.
    """

    steps: list[int] = field(default_factory=list)
    sparsity: dict[str, list[float]] = field(default_factory=dict)
    moments: list[tuple[str, ModelMaps]] = field(default_factory=list)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    removals: list[int] = field(default_factory=list)

    def add(self, maps: ModelMaps, moment: str | None = None) -> None:
        """Note what the model looks like; with a name, to be shown whole.

        A matrix that is new has nothing gone before; one that is missing stays as it was.
        """
        now = {m.name: m.sparsity for m in maps.matrices}
        for name in now:
            self.sparsity.setdefault(name, [0.0] * len(self.steps))
        for name, values in self.sparsity.items():
            values.append(now.get(name, values[-1] if values else 0.0))
        self.steps.append(maps.step)
        if moment is not None:
            self.moments.append((moment, maps))

    def add_metric(self, name: str, step: int, value: float) -> None:
        """Note a metric; a later value of the same step replaces the earlier one."""
        points = self.metrics.setdefault(name, [])
        if points and points[-1][0] == step:
            points.pop()
        points.append((step, value))

    def to_dict(self) -> dict[str, Any]:
        """The history as plain numbers, ready for JSON and checkpoints."""
        return {
            "steps": list(self.steps),
            "sparsity": {name: list(values) for name, values in self.sparsity.items()},
            "moments": [[moment, maps.to_dict()] for moment, maps in self.moments],
            "metrics": {name: [list(point) for point in points] for name, points in self.metrics.items()},
            "removals": list(self.removals),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FitHistory:
        """The inverse of ``to_dict``."""
        return cls(
            list(data["steps"]),
            {name: list(values) for name, values in data["sparsity"].items()},
            [(moment, ModelMaps.from_dict(maps)) for moment, maps in data["moments"]],
            {name: [(step, value) for step, value in points] for name, points in data["metrics"].items()},
            list(data["removals"]),
        )


__all__ = ["FitHistory"]
