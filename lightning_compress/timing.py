"""Latency of several models on the same call, measured so that they can be compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_compress.progress import Progress, quiet


@dataclass(frozen=True)
class Latency:
    """Times of one call of a model.

    Args:
        seconds: median.
        best: shortest.
        runs: number of timed runs.
        spread: half the distance between the quartiles, as a fraction of the median; 0 for fewer than three runs.
    """

    seconds: float
    best: float
    runs: int
    spread: float = 0.0

    @classmethod
    def of(cls, times: Sequence[float]) -> Latency:
        """What is said of these times, in seconds."""
        median = statistics.median(times)
        low, _, high = statistics.quantiles(times, method="inclusive") if len(times) > 2 else (median, median, median)
        return cls(median, min(times), len(times), (high - low) / 2 / median if median else 0.0)


def measure_latency(
    models: Mapping[str, nn.Module],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    repeats: int = 15,
    warmup: int = 2,
    max_seconds: float = 5.0,
    context: AbstractContextManager[Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = quiet,
) -> dict[str, Latency]:
    """Median time of a forward pass of each model, in evaluation mode, without gradients.

    The runs are interleaved, in turn forwards and backwards (a b b a ...), so that whatever else the machine does, and
    a clock that changes under load, fall on all models alike. CUDA work is waited for. Modes and random state are left
    as they were.

    Args:
        models: models by name, all called with the same arguments.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        repeats: timed runs of each model, at most.
        warmup: untimed runs of each model before.
        max_seconds: stop timing after about this long; each model is timed once at least.
        context: a context to run in, such as autocast; it must allow to be entered once.
        clock: what tells seconds. On a CPU that other work shares, ``time.process_time`` with one thread leaves out
            what others take.
        progress: wraps the runs, for a progress bar, see ``progress_bars``. How many there will be is not known before;
            nothing is drawn during a run.

    Returns:
        Latency by name.

    Raises:
        ValueError: if there is no model, or ``repeats`` is below 1.

    >>> from torch import nn
    >>> times = measure_latency({"small": nn.Linear(2, 2), "large": nn.Linear(2, 4)}, (torch.zeros(1, 2),), repeats=3)
    >>> times["small"].runs
    3
    """
    if not models:
        raise ValueError("Expected at least one model to measure, but got none.")
    if repeats < 1:
        raise ValueError(f"Expected repeats to be at least 1, but got {repeats}.")
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    training = {m: m.training for model in models.values() for m in model.modules()}
    devices = sorted({p.device.index or 0 for m in models.values() for p in m.parameters() if p.device.type == "cuda"})

    def run(model: nn.Module) -> float:
        for device in devices:
            torch.cuda.synchronize(device)
        begin = clock()
        model(*args, **(kwargs or {}))
        for device in devices:
            torch.cuda.synchronize(device)
        return clock() - begin

    def runs() -> Iterator[tuple[str, bool]]:
        """Whose turn it is, and whether the run counts."""
        begin = time.perf_counter()
        for _ in range(warmup):
            for name in names:
                yield name, False
                if time.perf_counter() - begin > max_seconds / 2:
                    break
        begin = time.perf_counter()
        for repeat in range(repeats):
            for name in names if repeat % 2 == 0 else reversed(names):
                yield name, True
            if time.perf_counter() - begin > max_seconds:
                break

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.inference_mode())
        stack.enter_context(context if context is not None else nullcontext())
        try:
            for model in models.values():
                model.eval()
            for name, timed in progress(runs(), f"runs timed, for up to {max_seconds:g} s"):
                seconds = run(models[name])
                if timed:
                    times[name].append(seconds)
        finally:
            for module, mode in training.items():
                module.training = mode
    return {name: Latency.of(t) for name, t in times.items()}
