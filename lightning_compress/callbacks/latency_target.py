"""The latency that a fit is to meet: the call that is measured, and the table, measured once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_compress.budget import BudgetWarning
from lightning_compress.callbacks.example import ExampleCall
from lightning_compress.callbacks.session import CompressionSession
from lightning_compress.callbacks.sparsity_settings import check_count
from lightning_compress.latency import LatencyGoal, LatencyTable, measure_latency_table
from lightning_compress.latency.loop import TOLERANCE, LatencyMet
from lightning_compress.progress import Progress, quiet
from lightning_compress.report import CompressionReport
from lightning_compress.timing import measure_latency

SECONDS = 30.0


@dataclass
class LatencyTarget:
    """What `FinalizeCompression` measures.

    Args:
        examples: examples of the first batch in the measured call; None for all of it.
        seconds: bound on measuring, for the table and again for the removal.
        context: makes the context in which the Trainer runs a forward pass.
        progress: wraps what is gone through, for a progress bar.

    Attributes:
        met: how well the last plan met it, by the measurements before its removal; None where no plan was measured.
    """

    examples: int | None = None
    seconds: float = SECONDS
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    progress: Progress = quiet
    met: LatencyMet | None = field(default=None, repr=False)
    _table: LatencyTable | None = field(default=None, repr=False)

    @classmethod
    def of(cls, metric: str, examples: int | None, seconds: float | None) -> LatencyTarget | None:
        """The target, or None for a budget of another metric; raises ValueError for settings that do not fit."""
        for name, value in (("latency_batch", examples), ("latency_seconds", seconds)):
            if value is not None and metric != "latency":
                raise ValueError(
                    f"Expected {name} together with latency, for which something is measured, but got "
                    f"{name}={value!r} with {metric}. Give latency=0.5 in place of {metric}, or leave {name} out."
                )
        if metric != "latency":
            return None
        if examples is not None:
            check_count("latency_batch", examples)
        if seconds is not None and (isinstance(seconds, bool) or not seconds > 0):
            raise ValueError(f"Expected latency_seconds to be a positive number, but got {seconds!r}.")
        return cls(examples, SECONDS if seconds is None else float(seconds))

    def forget(self) -> None:
        """Begin a new fit."""
        self._table = self.met = None

    def call(self, session: CompressionSession) -> ExampleCall:
        """The call that is measured; raises ValueError if the first batch has too few examples."""
        batch = session.batch
        assert batch is not None
        if self.examples is None or batch.size == self.examples:
            return batch
        narrow = batch.narrowed(self.examples)
        if narrow is None:
            had = f"{batch.size} example(s)" if batch.size is not None else "tensors without a common leading size"
            raise ValueError(
                f"Expected a first batch of at least latency_batch={self.examples} examples, but it has {had}. Lower "
                "latency_batch, or leave it out to measure the batch as it is."
            )
        return narrow

    def table(self, session: CompressionSession) -> LatencyTable:
        """The table of the dense module, measured when it is first asked for."""
        if self._table is None:
            self._table = session.processes.first(
                "measure latency", lambda: self._measured(session), LatencyTable.to_json, LatencyTable.from_json
            )
        return self._table

    def _measured(self, session: CompressionSession) -> LatencyTable:
        assert session.traced is not None and session.structures is not None
        call = self.call(session)
        # a fit resumed after a removal has the table of its checkpoint
        assert session.version == 0, "the table is that of the dense module"
        with torch.inference_mode(False), torch.autocast(_device(session.traced), enabled=False):
            return measure_latency_table(
                session.traced,
                session.structures,
                call.args,
                call.kwargs,
                seconds=self.seconds,
                context=self.context,
                measure=measure_latency,
                progress=self.progress,
            )

    def goal(self, session: CompressionSession, fraction: float, dense: nn.Module | None) -> LatencyGoal:
        """What the last removal is to meet: ``fraction`` of the latency of ``dense``, the module before the first.

        Without it, in a fit resumed between removals, the latency of the module as it is now is what the table says.
        """
        call = self.call(session)
        if dense is None:
            assert session.structures is not None
            fraction = min(1.0, fraction / self.table(session).estimate(session.structures))
        return LatencyGoal(
            fraction,
            args=call.args,
            kwargs=call.kwargs,
            reference=dense,
            max_seconds=self.seconds,
            context=self.context,
            measure=measure_latency,
            progress=self.progress,
        )

    def check(self, session: CompressionSession, report: CompressionReport, fraction: float) -> None:
        """Warn if the finished module misses ``fraction`` of the dense latency, although its plan had met it.

        A plan that did not meet it was warned about when it was made.
        """
        size = self.call(session).size
        times = report.latency.get(f"batch of {size}" if size else "one call")
        if times is None or self.met is None or not self.met.met:
            return
        before, after = (latency.seconds for latency in times)
        ratio = after / before / fraction
        if abs(ratio - 1) > TOLERANCE:
            rank_zero_warn(
                f"Expected latency={fraction:g} of one call within {TOLERANCE:.0%}, as the plan measured before the "
                f"removal, but the finished module takes {after * 1e3:.3g} ms where the dense one takes "
                f"{before * 1e3:.3g} ms, {abs(ratio - 1):.0%} {'above' if ratio > 1 else 'below'} what was asked for. "
                "Measurements of one module differ by that much here: measure for longer (latency_seconds=...), when "
                "less else runs, or on an idle device.",
                category=BudgetWarning,
            )

    def to_json(self) -> str | None:
        """The table for a checkpoint."""
        return None if self._table is None else self._table.to_json()

    def load(self, text: str | None) -> None:
        """Take the table of a checkpoint."""
        self._table = None if text is None else LatencyTable.from_json(text)


def _device(module: nn.Module) -> str:
    return next((p.device.type for p in module.parameters()), "cpu")
