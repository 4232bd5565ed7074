"""Proof that tokens can leave a model: with the same decisions, gathering gives what masking gives.

In float64, on perturbed weights, with random decisions and with the fewest tokens possible. What fails is refused with
the layer that does not bear it: positions that do not travel with their tokens, windows, attention that looks back
only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.progress import Progress, quiet, steps
from lightning_compress.surgery.errors import SurgeryError
from lightning_compress.surgery.precision import DoubleWeights
from lightning_compress.surgery.verify import Mismatch, Outputs, Rehearsal, difference
from lightning_compress.token_policies import KeepAll, TokenPolicy
from lightning_compress.tokens.arguments import output_state, with_state
from lightning_compress.tokens.errors import TokenPruningError
from lightning_compress.tokens.install import check_not_wrapped, install_tokens, remove_tokens, token_runtime
from lightning_compress.tokens.runtime import Fill, TokenRuntime
from lightning_compress.tokens.stack import TokenStack, TokenTail, record_calls, stack_of
from lightning_compress.tokens.tail import find_tails

TOLERANCE = 1e-9
TRIES = 32  # assignments of token dims to arguments whose sizes leave it open
SHORTEST = 4  # tokens of the longest row of an example
FEW = 4  # single tokens that a model reads, at most


@dataclass(frozen=True)
class ProvenTokens:
    """What a proof found.

    Args:
        stack: the layers, with the dims of arguments that run over tokens.
        scatter: whether what comes after the stack reads more than the protected tokens.
        read: positions of single tokens that what comes after the stack reads, None if it reads many.
        pooled: whether what comes after the stack reads nothing but the mean over all real tokens. Tokens that left
            have the mean of the others then, so that it is the mean of those that are left.
        protected: positions that stayed in the proof. Without scattering they must stay, because what comes after the
            stack finds them by their places.
        error: largest difference between gathering and masking, relative to max(1, largest output).
    """

    stack: TokenStack
    scatter: bool
    read: tuple[int, ...] | None
    pooled: bool
    protected: tuple[int, ...]
    error: float

    @property
    def fill(self) -> Fill:
        """What tokens that left have behind the layers."""
        return "mean" if self.pooled else "state"

    def runtime(self, policy: TokenPolicy, protected: tuple[int, ...] | None = None, **settings: Any) -> TokenRuntime:
        """A runtime for this stack that computes what was proven.

        Args:
            policy: which tokens go on.
            protected: positions that stay; None for those of the proof. If they lack any of those, all states are
                scattered back.
            settings: further arguments of `TokenRuntime`.
        """
        protected = self.protected if protected is None else tuple(protected)
        scatter = self.scatter or not set(self.protected) <= set(protected)
        return TokenRuntime(
            self.stack, policy, **{"protected": protected, "scatter": scatter, "fill": self.fill, **settings}
        )


def prove_tokens(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    protected: tuple[int, ...] | None = None,
    *,
    progress: Progress = quiet,
) -> ProvenTokens:
    """Find the stack of ``model`` and prove that tokens can leave it.

    The model is left as it was.

    Args:
        model: any module.
        args: positional arguments of an example.
        kwargs: keyword arguments of an example.
        protected: positions that will always stay; None for the first, and single ones that the model reads.
        progress: wraps what is gone through, for a progress bar, see ``progress_bars``. How many
            runs the proof takes is not known before.

    Raises:
        TokenPruningError: if there is no stack, or gathering is not masking; the message says where and why.
    """
    kwargs = dict(kwargs or {})
    check_not_wrapped(model)
    if token_runtime(model) is not None:
        raise TokenPruningError(
            "Expected a model without token pruning, but it has a runtime. Call remove_tokens first."
        )
    with (
        DoubleWeights(model, perturbed=True, progress=progress),
        Rehearsal(model, tokens=True) as rehearsal,
        steps(progress, "runs with pruned tokens") as step,
    ):
        stack, tails = _find(rehearsal, model, args, kwargs)
        try:
            full = rehearsal.reference(args, kwargs)
        except SurgeryError as failure:
            raise TokenPruningError(str(failure)) from failure
        trial = _Trial(rehearsal, model, args, kwargs, (0,) if protected is None else protected, step)
        trial.check_tap(stack, full)
        read, trial.pooled = trial.read(stack)
        if protected is None and read is not None:
            trial.protected = tuple(sorted({0, *read}))
        error, stack = trial.search(stack)
        # the first span that bears it: behind the attention, every token by itself
        tail = next((t for t in tails if trial.bears(replace(stack, tail=t), scatter=True)), None)
        if tail is not None:
            stack = replace(stack, tail=tail)
            error = max(error, trial.error(stack))
        # where a protected token is padding all states are scattered anyway, and nothing would be tried
        scatter = not trial.has_protected(stack) or not trial.bears(stack, scatter=False)
    return ProvenTokens(stack, scatter, read, trial.pooled, trial.protected, error)


def _find(
    rehearsal: Rehearsal, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[TokenStack, list[TokenTail]]:
    """The stack, and what may be the tail of its layers, found inside a rehearsal."""
    found: list[tuple[TokenStack, list[TokenTail]]] = []

    class Finding(nn.Module):
        def forward(self, *inner: Any, **named: Any) -> Tensor:
            calls = record_calls(model, inner, named)
            stack = stack_of(calls)
            found.append((stack, find_tails(model, calls, stack)))
            return torch.zeros(())

    rehearsal.run(Finding(), args, kwargs)
    return found[0]


class _Trial:
    """Runs of one model with one example."""

    def __init__(
        self,
        rehearsal: Rehearsal,
        model: nn.Module,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        protected: tuple[int, ...],
        step: Callable[[], None],
    ) -> None:
        self.step = step
        self.rehearsal, self.model, self.args, self.kwargs, self.protected = rehearsal, model, args, kwargs, protected
        self.pooled = False
        self.real: Tensor | None = None  # bool (batch, tokens), which tokens of the example are no padding; None: all

    @contextmanager
    def installed(self, stack: TokenStack, mode: Any, scatter: bool = True) -> Iterator[TokenRuntime]:
        runtime = TokenRuntime(stack, KeepAll(), protected=self.protected, scatter=scatter, mode=mode)
        runtime.worthwhile, runtime.saving = 0.0, 1
        runtime.fill = "mean" if self.pooled else "state"
        install_tokens(self.model, runtime)
        try:
            yield runtime
        finally:
            remove_tokens(self.model)

    def run(self, stack: TokenStack, mode: Any, decisions: Tensor, scatter: bool = True) -> Outputs:
        """Outputs with decisions bool (layers - 1, batch, tokens)."""

        def decide(layer: int, rows: Tensor | None, index: Tensor | None, active: Tensor) -> Tensor:
            rows = torch.arange(active.shape[0]) if rows is None else rows.cpu()
            table = decisions[layer, rows % len(decisions[layer])].to(active.device)
            table = table[:, : active.shape[1]] if index is None else table.gather(1, index)
            # of a row whose first token is padding the protected one is not there: its first real one stays
            first = active & (active.cumsum(1) == 1)
            return table | (first & ~(table & active).any(1, keepdim=True))

        self.step()
        with self.installed(stack, mode, scatter) as runtime:
            runtime.decide = decide
            return self.rehearsal.run(self.model, self.args, self.kwargs)

    def check_tap(self, stack: TokenStack, full: Outputs) -> None:
        """With all tokens kept the model computes what it computed; causal attention is refused here."""
        with self.installed(stack, "mask") as runtime:
            runtime.inspect = True
            outputs = self.rehearsal.run(self.model, self.args, self.kwargs)
        assert runtime.counts is not None
        self.real = runtime.counts.present[0][1]
        longest = int(runtime.counts.real.max())
        if longest < SHORTEST:
            raise TokenPruningError(
                f"Expected an example with a row of at least {SHORTEST} tokens, padding aside, but the longest has "
                f"{longest}: with fewer, positions that do not travel with their tokens go unnoticed."
            )
        # padding is left alone after the first layer, so only where there is none must the outputs agree
        if bool((runtime.counts.real == runtime.counts.tokens).all()):
            self._compare(full, outputs, f"the layers {stack.layers[0]!r} to {stack.layers[-1]!r}")

    def _compare(self, reference: Outputs, outputs: Outputs, where: str) -> float:
        try:
            error = difference(reference, outputs)
        except Mismatch as mismatch:
            raise TokenPruningError(f"Expected equal outputs with {where}, but {mismatch}.") from mismatch
        if error > TOLERANCE:
            raise TokenPruningError(f"Expected equal outputs with {where}, but they differ by {error:.1e}.")
        return error

    def decisions(self, stack: TokenStack, only_after: int | None = None) -> Iterator[Tensor]:
        """Random decisions, and the fewest tokens possible."""
        layers, generator = len(stack.layers) - 1, torch.Generator().manual_seed(0)
        batch = 1024  # further rows repeat them
        for share in (0.6, 0.0):
            table = torch.rand(layers, batch, stack.tokens, generator=generator) < share
            if share:  # a gap between tokens that stay: what looks at distances sees it
                table[:, :, 1], table[:, :, 2:4] = False, True
            if only_after is not None:
                table[[layer for layer in range(layers) if layer != only_after]] = True
            yield table

    def error(self, stack: TokenStack, scatter: bool = True, only_after: int | None = None) -> float:
        """Largest difference between gathering and masking.

        Raises:
            TokenPruningError: if outputs do not agree.
            Exception: whatever the model raises when tokens are missing.
        """
        worst = 0.0
        for decisions in self.decisions(stack, only_after):
            masked = self.run(stack, "mask", decisions)
            gathered = self.run(stack, "gather", decisions, scatter)
            worst = max(worst, self._compare(masked, gathered, "pruned tokens masked and gathered"))
        return worst

    def has_protected(self, stack: TokenStack) -> bool:
        """Whether the protected tokens of all rows of the example are real."""
        positions = [p for p in self.protected if -stack.tokens <= p < stack.tokens]
        return self.real is None or bool(self.real[:, positions].all())

    def bears(self, stack: TokenStack, scatter: bool) -> bool:
        """Whether gathering is masking."""
        try:
            self.error(stack, scatter)
        except Exception:  # foreign code may raise anything where tokens are missing
            return False
        return True

    def search(self, stack: TokenStack) -> tuple[float, TokenStack]:
        """The error, and the stack with the dims for which gathering is masking."""
        try:
            return self.error(stack), stack
        except Exception as failure:  # see above
            first = failure
        for dims in itertools.islice(_assignments(stack.dims), TRIES):
            other = replace(stack, dims=dims)
            if self.bears(other, scatter=True):
                return self.error(other), other
        raise TokenPruningError(self._refusal(stack, first)) from first

    def _refusal(self, stack: TokenStack, failure: Exception) -> str:
        guilty = stack.layers[-1]
        for layer in reversed(range(len(stack.layers) - 1)):  # what is missing after a layer is so in all that follow
            try:
                self.error(stack, only_after=layer)
            except Exception as own:  # see above
                guilty, failure = stack.layers[layer + 1], own
                break
        text = f"{type(failure).__name__}: {failure}" if not isinstance(failure, TokenPruningError) else str(failure)
        return (
            f"Expected the layer {guilty!r} to compute the same for tokens that stay, whether the others are masked or "
            f"gone, but it does not: {text} Positions must travel with their tokens: relative positions, windows and "
            "convolutions over tokens do not allow tokens to leave."
        )

    def read(self, stack: TokenStack) -> tuple[tuple[int, ...] | None, bool]:
        """Positions of single tokens that are read after the stack, None if many are; whether only their mean is."""
        holder: list[Tensor] = []
        calls = itertools.count()

        def last(module: nn.Module, args: Any, output: Any) -> Any:
            state = output_state(output)
            if next(calls) < total - 1 or state is None:
                return None
            leaf = state.detach().requires_grad_(True)
            holder.append(leaf)
            return with_state(output, leaf)

        name = stack.layers[-1]
        total = stack.layers.count(name)
        module = self.model.get_submodule(name)
        handle = module.register_forward_hook(last)
        try:
            with torch.enable_grad():
                outputs = self.rehearsal.run(self.model, self.args, self.kwargs)
                floating = [o.tensor for o in outputs.values() if o.tensor.requires_grad and not o.internal]
                generator = torch.Generator().manual_seed(0)
                total_sum = sum((t * torch.rand(t.shape, generator=generator).to(t)).sum() for t in floating)
                if not isinstance(total_sum, Tensor) or not holder:
                    return None, False
                gradient = torch.autograd.grad(total_sum, holder[0], allow_unused=True)[0]
        finally:
            handle.remove()
        if gradient is None:
            return None, False
        positions = (gradient.abs().amax((0, 2)) > 0).nonzero().flatten().tolist()
        if len(positions) <= min(FEW, stack.tokens // 2):
            return tuple(positions), False
        return None, self._is_mean(gradient)

    def _is_mean(self, gradient: Tensor) -> bool:
        """Whether the gradient (batch, tokens, width) is the same for all real tokens of a row, and zero for others."""
        real = self.real
        if real is None:
            real = torch.ones(gradient.shape[:2], dtype=torch.bool, device=gradient.device)
        if real.shape != gradient.shape[:2]:
            return False
        weights = real.unsqueeze(-1).to(gradient.dtype)
        mean = (gradient * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        return bool((gradient - mean * weights).abs().max() <= TOLERANCE * mean.abs().max())


def _assignments(dims: Mapping[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Other ways to tell which dims run over tokens: sizes may agree by chance. Small changes first."""
    open_paths = [path for path, found in dims.items() if found]
    subsets = {
        path: [s for n in range(len(dims[path]), -1, -1) for s in itertools.combinations(dims[path], n)]
        for path in open_paths
    }
    ways = [
        dict(zip(open_paths, chosen, strict=True)) for chosen in itertools.islice(
            itertools.product(*(subsets[path] for path in open_paths)), 256
        )
    ]  # fmt: skip
    ways.sort(key=lambda way: sum(len(dims[path]) - len(way[path]) for path in open_paths))
    for way in ways[1:]:
        yield {**dims, **way}


__all__ = ["ProvenTokens", "prove_tokens"]
