"""Token pruning at run time: tokens really leave the computation.

The forward of the owner of the stack and of every layer is replaced, on the instance, by one that carries the positions
of the tokens that are left. After the attention of a layer, the policy decides. Tokens that do not stay skip the tail
of that layer, its feed-forward part (`tail.py`), and from the next layer on the batch is repacked to the longest row
that is left. At the end states are scattered back: a token that left has the state with which it left, or, where only
the mean over all tokens is read, the mean of those that are left.

Four modes: ``"off"`` (the model as it is), ``"gather"`` (tokens leave), ``"mask"`` (the same decisions with all tokens
in place: no key sees a pruned token, and its state is frozen; what gathering is compared with), ``"soft"`` (in part
pruned, differentiable in the thresholds).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_compress.token_policies import TokenPolicy
from lightning_compress.token_scores import scores_among_rest, straight_through
from lightning_compress.token_switch import tokens_are_off
from lightning_compress.tokens.arguments import output_state, tensors_in, with_state, with_tensors
from lightning_compress.tokens.errors import TokenPruningError
from lightning_compress.tokens.forward import (
    Ask,
    Forward,
    LayerRun,
    Mode,
    SoftPruning,
    TokenCounts,
    entering_of,
    key_bias_of,
    query_weights_of,
    real_count_of,
    shape_of,
    summed,
)
from lightning_compress.tokens.gathering import (
    Repacking,
    RowGroup,
    gather_dims,
    gather_states,
    group_rows,
    repack,
    scatter_states,
    slots_worth_a_call,
)
from lightning_compress.tokens.stack import TokenStack, python_attention, sure_dims
from lightning_compress.tokens.tail import TailPass
from lightning_compress.tokens.tap import AttentionTap, Heard, graph_recording

MODES: tuple[Mode, ...] = ("off", "soft", "mask", "gather")
Fill = Literal["state", "mean"]
FILLS: tuple[Fill, ...] = ("state", "mean")
RECOMPUTED = (
    "Expected the layer {!r} to run once in a forward, but gradient checkpointing is to run it again in the backward, "
    "where it would see all tokens. Turn it off (in transformers, model.gradient_checkpointing_disable()), put it "
    'around the whole model, or set runtime.train_mode = "off".'
)
SURELY = 30.0  # a logit whose sigmoid is 1 in float32
FARTHEST = 1e30  # a finite logit, also where a few of them are added
# (layer, rows or None for all, positions of the present tokens or None for all, active) -> keep
Decide = Callable[[int, "Tensor | None", "Tensor | None", Tensor], Tensor]


class TokenRuntime:
    """What `install_tokens` puts on a model.

    Attributes:
        stack: where the layers are.
        policy: which tokens go on after each layer but the last.
        protected: positions that always stay (as long as they are real).
        protected_mask: bool (batch, tokens) for the next forward, tokens that always stay; None for none.
        min_keep: so many tokens of a row stay at least.
        scatter: whether the states of all tokens are put together after the last layer; without it the owner sees only
            the tokens that are left, which is enough where only protected tokens are read.
        fill: what tokens that left have after the last layer: "state", that with which they left; "mean", the mean of
            the tokens that are left, so that the mean over all is the mean over those.
        mode: what a forward in evaluation mode does.
        train_mode: what a forward in training mode does.
        soft: settings for the mode "soft".
        multiple: repacked batches have a multiple of so many slots (8 for half precision on GPUs).
        worthwhile: tokens only leave if at least this fraction of the slots is saved; otherwise they are masked.
        saving: rows are computed in groups of similar length where a cut saves at least so many slots; None for as many
            as take the time of one more call of the layer, which depends on its weights.
        decide: takes the place of the policy (in proofs).
        counts: what the last forward did.
    """

    def __init__(
        self,
        stack: TokenStack,
        policy: TokenPolicy,
        protected: tuple[int, ...] = (0,),
        min_keep: int = 1,
        scatter: bool = True,
        mode: Mode = "gather",
        train_mode: Mode | None = None,
        fill: Fill = "state",
    ) -> None:
        if policy.layers not in (None, len(stack.layers) - 1):
            raise TokenPruningError(
                f"Expected a policy with one decision after each of the {len(stack.layers)} layers but the last, "
                f"{len(stack.layers) - 1}, but got one for {policy.layers}."
            )
        if min_keep < 1:
            raise TokenPruningError(
                f"Expected min_keep, tokens that stay in every row, to be at least 1, got {min_keep}."
            )
        if mode not in MODES or train_mode not in (None, *MODES):
            raise TokenPruningError(f"Expected a mode of {list(MODES)}, but got {mode!r} and {train_mode!r}.")
        if fill not in FILLS:
            raise TokenPruningError(f"Expected fill to be one of {list(FILLS)}, but got {fill!r}.")
        self.stack = stack
        self.policy = policy
        self.protected = tuple(protected)
        self.protected_mask: Tensor | None = None
        self.min_keep = min_keep
        self.scatter = scatter
        self.fill: Fill = fill
        self.mode: Mode = mode
        self.train_mode: Mode = train_mode or mode
        self.soft: SoftPruning | None = None
        self.multiple = 1
        self.worthwhile = 0.05
        self.saving: int | None = None
        self.decide: Decide | None = None
        self.inspect = False
        self.counts: TokenCounts | None = None
        self._local = threading.local()

    @property
    def _forward(self) -> Forward | None:
        """The forward that is under way in this thread."""
        return getattr(self._local, "forward", None)

    # The owner

    def will_run(self, training: bool) -> Mode:
        """The mode of a forward in training or evaluation mode."""
        return self.train_mode if training else self.mode

    def begin(self, training: bool) -> Forward | None:
        """State of a new forward; None if it is to run as it is."""
        mode = self.will_run(training)
        if mode == "off" or tokens_are_off():
            return None
        if mode == "soft" and self.soft is None:
            raise TokenPruningError("Expected the settings of soft pruning, but got none: set runtime.soft.")
        return Forward(mode, graph_recording(), scatter=self.scatter)

    def run_owner(self, original: Callable[..., Any], training: bool, args: tuple[Any, ...], kwargs: Any) -> Any:
        """The forward of the owner."""
        if self._forward is not None:  # the owner calls itself
            return original(*args, **kwargs)
        state = self.begin(training)
        if state is None:
            return original(*args, **kwargs)
        self._local.forward = state
        try:
            with python_attention():
                output = original(*args, **kwargs)
        finally:
            self._local.forward = None
        if state.layer != len(self.stack.layers):
            raise TokenPruningError(
                f"Expected a forward through {len(self.stack.layers)} layers, as in the example that token pruning was "
                f"set up with, but {state.layer} were called. Set it up again for this model, or take it off "
                "(remove_tokens)."
            )
        return output

    def _wants_scores(self, state: Forward, number: int) -> bool:
        """Whether it depends on scores which tokens go on after a layer."""
        if state.mode == "soft" or self.decide is not None or self.inspect or self.policy.accumulated:
            return True
        keeps_all = getattr(self.policy, "keeps_all", None)  # policies from elsewhere may not say it
        return keeps_all is None or not keeps_all(number)

    # A layer

    def run_layer(
        self,
        layer: nn.Module,
        original: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The forward of a layer."""
        state = self._forward
        if state is None:
            return original(*args, **kwargs)
        number = state.layer
        if number >= len(self.stack.layers) or self.stack.layers[number] != name:
            raise TokenPruningError(
                f"Expected the layers to be called in the order {list(self.stack.layers)}, but {name!r} came as number "
                f"{number}."
            )
        hidden = self._hidden(args, kwargs, name)
        state.empty = state.empty or not hidden.shape[0] or not hidden.shape[1]
        if state.empty:
            state.layer, self.counts = number + 1, None
            return original(*args, **kwargs)
        if graph_recording() != state.recording:
            raise TokenPruningError(RECOMPUTED.format(name))
        if number == 0:
            state.batch, state.tokens = hidden.shape[0], hidden.shape[1]
            state.protected = self._protected(hidden)
            self._understand(state, args, kwargs)
        elif state.index is not None:
            args, kwargs = self._narrowed(state, hidden, args, kwargs)
        state.layer += 1
        last = state.layer == len(self.stack.layers)
        ask = Ask(number == 0, not last, not last and self._wants_scores(state, number), self.inspect)
        bias, weights = key_bias_of(state, hidden), query_weights_of(state, hidden)
        call, parts = (hidden, args, kwargs), None
        if state.counts is not None and state.valid is not None and self._by_rows(state, call):
            saving = self.saving
            if saving is None:
                saving = slots_worth_a_call(layer, hidden.shape[2], hidden.device)
            groups = group_rows(state.counts, saving)
            if len(groups) > 1:
                parts = self._in_groups(state, groups, original, name, call, bias, weights, ask)
        output, heard, decided = parts or self._listen(state, original, name, call, bias, weights, ask)
        new = output_state(output)
        assert new is not None
        if number == 0:
            state.real = heard.real
            if not state.scatter and state.real is not None:
                # what is read after the layers is found in its place only where it stays: padding does not
                read = [p for p in self.protected if -state.tokens <= p < state.tokens]
                state.scatter = not bool(state.real[:, read].all())
        changed = self._frozen(state, hidden, new)
        state.entering.append(entering_of(state, hidden))
        state.present.append((state.index, state.shown if number else state.real))
        if last:
            changed = self._finished(state, changed)
        else:
            changed = self._decided(state, heard, decided, changed)
        return output if changed is new else with_state(output, changed)

    def _in_groups(
        self,
        state: Forward,
        groups: list[RowGroup],
        original: Callable[..., Any],
        name: str,
        call: tuple[Tensor, tuple[Any, ...], dict[str, Any]],
        bias: Tensor | None,
        weights: Tensor | None,
        ask: Ask,
    ) -> tuple[Any, Heard, LayerRun] | None:
        """A layer called once for each group of rows; the parts put together again.

        None if it returns more than the state: what that has to do with rows is not known.
        """
        hidden, args, kwargs = call
        batch, slots = hidden.shape[:2]
        counts = state.counts or ()
        states, scores, keeps = [], [], []
        for group in groups:
            rows = torch.tensor(group.rows, device=hidden.device)

            def cut(value: Tensor, rows: Tensor = rows, width: int = group.slots) -> Tensor:
                return value.index_select(0, rows)[:, :width]

            part = cut(hidden)

            def visit(
                path: str, value: Tensor, rows: Tensor = rows, width: int = group.slots, part: Any = part
            ) -> Tensor:
                if value is hidden:
                    return part
                dims = self._dims(state, path, value, slots)
                if dims and value.shape[0] == batch:
                    value = value.index_select(0, rows)
                for dim in dims:
                    value = value.narrow(dim, 0, width)
                return value

            own_args, own_kwargs = with_tensors(args, kwargs, visit)
            masked = state.shown is not state.valid or any(counts[r] < group.slots for r in group.rows)
            output, heard, decided = self._listen(
                state,
                original,
                name,
                (part, own_args, own_kwargs),
                None if bias is None or not masked else cut(bias),
                None if weights is None or not masked else cut(weights),
                ask,
                rows,
            )
            new = output_state(output)
            assert new is not None
            if len(list(tensors_in((output,), {}))) > 1:
                return None
            states.append(nn.functional.pad(new, (0, 0, 0, slots - group.slots)))
            if heard.scores is not None:
                scores.append(nn.functional.pad(heard.scores, (0, slots - group.slots)))
            if decided.keep is not None:
                keeps.append(nn.functional.pad(decided.keep, (0, slots - group.slots)))
        order = torch.tensor([row for group in groups for row in group.rows], device=hidden.device).argsort()
        together = torch.cat(states).index_select(0, order)
        received = torch.cat(scores).index_select(0, order) if scores else None
        whole = LayerRun(decided.number, decided.decides, decided.tap, None, slots)
        whole.keep = torch.cat(keeps).index_select(0, order) if keeps else None
        return with_state(output, together), Heard(received), whole

    def _listen(
        self,
        state: Forward,
        original: Callable[..., Any],
        name: str,
        call: tuple[Tensor, tuple[Any, ...], dict[str, Any]],
        bias: Tensor | None,
        weights: Tensor | None,
        ask: Ask,
        rows: Tensor | None = None,
    ) -> tuple[Any, Heard, LayerRun]:
        """One call of a layer with the tap on its attention."""
        hidden, args, kwargs = call
        tap = AttentionTap(
            hidden.shape[0],
            hidden.shape[1],
            key_bias=bias,
            query_weights=weights,
            find_real=ask.real,
            wanted=ask.scores,
            inspect=ask.inspect,
        )
        state.call = decided = LayerRun(state.layer - 1, ask.decides, tap, rows, hidden.shape[1])
        try:
            # a mode costs time in every operation under it: it is on for the attention alone where that has a module
            with nullcontext() if self.stack.attention else tap:
                output = original(*args, **kwargs)
        finally:
            state.call = None
        if tap.recomputed:
            raise TokenPruningError(RECOMPUTED.format(name))
        heard = tap.one(name)
        new = output_state(output)
        if new is None or new.shape != hidden.shape:
            raise TokenPruningError(
                f"Expected the layer {name!r} to return a state of shape {tuple(hidden.shape)}, but got "
                f"{type(output).__name__ if new is None else tuple(new.shape)}."
            )
        return output, heard, decided

    def run_attention(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of the module that computes the attention of a layer."""
        state = self._forward
        if state is None or state.call is None:
            return original(*args, **kwargs)
        with state.call.tap:
            return original(*args, **kwargs)

    # The tail of a layer

    def run_tail(
        self, original: Callable[..., Any], name: str, ends: tuple[bool, bool], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """The forward of a module with which the tail of a layer begins, ends, or both."""
        state = self._forward
        call = None if state is None else state.call
        if state is None or call is None or not call.decides:
            return original(*args, **kwargs)
        begins, ends_here = ends
        if begins and len(call.tap.heard) == 1:
            self._enter_tail(state, call, call.tap.heard[0])
        tail = call.tail
        if tail is None:
            return original(*args, **kwargs)
        if ends_here:
            call.tail = None
        return tail.run(original, ends_here, args, kwargs, name)

    def _enter_tail(self, state: Forward, call: LayerRun, heard: Heard) -> None:
        """Decide, as far as the rest of the layer is concerned."""
        assert self.stack.tail is not None
        if state.mode == "soft":
            assert self.soft is not None and heard.scores is not None
            if self.soft.cumulative:  # as published a mask works at the end of its layer
                call.soft = self._soft_masks(state, call.number, heard)
                call.tail = TailPass(self.stack.tail, shape_of(heard.scores), soft=call.soft[0])
            return
        call.keep = self._keep(state, call, heard)
        if call.keep is None:
            return
        flat = None
        if state.mode == "gather":
            flat = call.keep.flatten().nonzero().squeeze(1)
            if flat.shape[0] > (1 - self.worthwhile) * call.keep.numel():
                flat = None
        call.tail = TailPass(self.stack.tail, shape_of(call.keep), keep=call.keep, flat=flat)

    def _understand(self, state: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Which dims of the arguments run over tokens; where that is open, all tokens stay in place in this forward."""
        for path, value in tensors_in(args, kwargs):
            if path == self.stack.state:
                continue
            dims = self.stack.dims.get(path)
            if dims is None:
                dims = sure_dims(value, state.batch, state.tokens)
            elif self._of_size(value, dims, state.tokens) and value.shape[0] not in (1, state.batch):
                dims = None
            if dims is None and state.mode == "gather":
                state.mode = "mask"
            state.dims[path] = dims or ()

    def _by_rows(self, state: Forward, call: tuple[Tensor, tuple[Any, ...], dict[str, Any]]) -> bool:
        """Whether it is known what of the arguments belongs to which row."""
        hidden, args, kwargs = call
        batch, slots = hidden.shape[:2]
        return all(
            value is hidden or not value.dim() or value.shape[0] != batch or self._dims(state, path, value, slots)
            for path, value in tensors_in(args, kwargs)
        )

    def _hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Tensor:
        kind, _, key = self.stack.state.partition(".")
        value = None
        if kind == "args" and int(key) < len(args):
            value = args[int(key)]
        elif kind == "kwargs":
            value = kwargs.get(key)
        if not isinstance(value, Tensor) or value.dim() != 3 or value.is_nested:
            raise TokenPruningError(
                f"Expected the hidden state (batch, tokens, width) at {self.stack.state} of the layer {name!r}, as in "
                f"the example, but got {tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__}."
            )
        return value

    def _protected(self, hidden: Tensor) -> Tensor | None:
        batch, tokens = hidden.shape[:2]
        positions = [p for p in self.protected if -tokens <= p < tokens]
        mask = self.protected_mask
        if mask is not None:
            of = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != (batch, tokens):
                raise TokenPruningError(f"Expected protected_mask to be bool of shape {(batch, tokens)}, but got {of}.")
        if not positions and mask is None:
            return None
        protected = torch.zeros(batch, tokens, dtype=torch.bool, device=hidden.device)
        if positions:
            protected[:, positions] = True
        return protected if mask is None else protected | mask.to(hidden.device)

    def _narrowed(
        self, state: Forward, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with what belongs to tokens that are gone taken out."""
        index = state.index
        assert index is not None

        def visit(path: str, value: Tensor) -> Tensor:
            if value is hidden:
                return value
            held = state.gathered.get(id(value))
            if held is not None and held[0] is value:
                return held[1]
            dims = self._dims(state, path, value, state.tokens)
            if not dims:
                return value
            gathered = gather_dims(value, dims, index)
            state.gathered[id(value)] = (value, gathered)
            return gathered

        return with_tensors(args, kwargs, visit)

    def _dims(self, state: Forward, path: str, value: Tensor, tokens: int) -> tuple[int, ...]:
        """Dims of an argument that run over ``tokens`` tokens."""
        dims = state.dims.get(path)
        if dims is None:
            dims = self.stack.dims.get(path, sure_dims(value, state.batch, state.tokens))
            if dims is None:
                raise TokenPruningError(
                    f"Expected the first layer to get every argument that runs over tokens, but {path} of shape "
                    f"{tuple(value.shape)} comes later, and its sizes leave open which of its dims does. Prove with an "
                    "example that has it (prove_tokens)."
                )
        return self._of_size(value, dims, tokens)

    def _of_size(self, value: Tensor, dims: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        return tuple(dim % value.dim() for dim in dims if -dim <= value.dim() and value.shape[dim] == tokens)

    def _frozen(self, state: Forward, hidden: Tensor, new: Tensor) -> Tensor:
        """Tokens that were pruned before this layer keep the state that they had."""
        if state.mode == "soft":
            if state.log_mask is None or state.mask is None:
                return new
            return hidden + state.mask.unsqueeze(-1).to(new.dtype) * (new - hidden)
        if state.frozen and state.shown is not None:
            return torch.where(state.shown.unsqueeze(-1), new, hidden)
        return new

    # Decisions

    def _decided(self, state: Forward, heard: Heard, call: LayerRun, hidden: Tensor) -> Tensor:
        if state.mode == "soft":
            assert heard.scores is not None
            state.mask, state.log_mask = call.soft or self._soft_masks(state, call.number, heard)
            state.masks.append(state.mask)
            return hidden if state.log_mask is not None else hidden * state.mask.unsqueeze(-1).to(hidden.dtype)
        keep = self._keep(state, call, heard) if call.keep is None else call.keep
        if keep is None or (heard.scores is None and call.number > 0):
            return hidden  # all that entered go on
        if self.policy.accumulated and heard.scores is not None:
            state.accumulated = summed(state.accumulated, heard.scores)
        if state.mode == "gather":
            packing = repack(keep, self.multiple)
            if sum(packing.counts) == keep.numel():
                return hidden  # none leaves
            if sum(packing.counts) <= (1 - self.worthwhile) * keep.numel():
                return self._gathered(state, packing, hidden)
        state.shown, state.frozen = keep, True
        return hidden

    def _keep(self, state: Forward, call: LayerRun, heard: Heard) -> Tensor | None:
        """Which of the tokens in a call stay, bool (rows, slots); None for all."""
        active = heard.real if call.number == 0 else None if state.shown is None else call.own(state.shown)
        if heard.scores is None:
            return active
        if active is None:
            active = torch.ones(heard.scores.shape, dtype=torch.bool, device=heard.scores.device)
        protected = None if state.protected is None else call.own(state.protected)
        if self.decide is not None:
            index = None if state.index is None else call.own(state.index)
            keep = self.decide(call.number, call.rows, index, active) & active
            return keep if protected is None else keep | (protected & active)
        scores = heard.scores.detach()
        if self.policy.accumulated:
            scores = summed(None if state.accumulated is None else call.own(state.accumulated), scores)
        return self.policy.keep(
            call.number, scores, active, real_count_of(state, heard, call), protected, self.min_keep
        )

    def _gathered(self, state: Forward, packing: Repacking, hidden: Tensor) -> Tensor:
        if state.scatter and self.fill == "state":
            state.stages.append((hidden, state.index, state.valid))
        state.index = packing.index if state.index is None else state.index.gather(1, packing.index)
        state.valid = state.shown = packing.valid
        state.counts = packing.counts
        state.frozen = False
        state.gathered.clear()
        if state.protected is not None:
            state.protected = state.protected.gather(1, packing.index)
        if state.accumulated is not None:
            state.accumulated = state.accumulated.gather(1, packing.index)
        return gather_states(hidden, packing)

    def _soft_masks(self, state: Forward, number: int, heard: Heard) -> tuple[Tensor, Tensor | None]:
        """The mask after a decision, and its logarithm if keys are to be masked with it, both (batch, tokens)."""
        soft, scores = self.soft, heard.scores
        assert soft is not None and scores is not None
        if soft.cumulative:
            # near a step the gradients of scores are as large as they are wrong: weights would suffer
            scores = scores.detach()
        if soft.among_rest:
            weights = torch.ones_like(scores) if state.mask is None else state.mask
            real = heard.real if number == 0 else state.real
            for away in (None if real is None else ~real, state.protected):
                weights = weights if away is None else weights.masked_fill(away, 0)
            scores = scores_among_rest(scores, weights)
        temperature = soft.temperature[number] if isinstance(soft.temperature, Tensor) else soft.temperature
        logits = (scores - soft.thresholds[number].to(scores.dtype)) / temperature
        logits = logits.clamp(-FARTHEST, FARTHEST)  # of an infinite threshold, whose straight-through form would be NaN
        if state.protected is not None:
            logits = logits.masked_fill(state.protected, SURELY)
        mask, log_mask = torch.sigmoid(logits), nn.functional.logsigmoid(logits)
        if not soft.cumulative:
            return mask, None
        if soft.straight_through:
            stays = logits.detach() >= 0
            mask = straight_through(mask, stays.to(mask.dtype))
            log_mask = straight_through(log_mask, torch.where(stays, 0.0, -SURELY))
        if state.mask is not None and state.log_mask is not None:
            mask, log_mask = state.mask * mask, (state.log_mask + log_mask).clamp(min=-2 * SURELY)
        return mask, log_mask

    # The end

    def _finished(self, state: Forward, hidden: Tensor) -> Tensor:
        self.counts = TokenCounts(
            torch.stack(state.entering), state.real_count(hidden), state.tokens, state.masks, state.present
        )
        if self.fill == "mean" and state.scatter:
            return self._with_mean(state, hidden)
        if not state.stages or state.index is None:
            return hidden
        full, fresh = state.stages[0][0], False
        for states, index, valid in (*state.stages[1:], (hidden, state.index, state.valid)):
            assert index is not None
            full, fresh = scatter_states(full, states, index, valid, fresh), True
        return full

    def _with_mean(self, state: Forward, hidden: Tensor) -> Tensor:
        """The states after the last layer, with their mean in the place of tokens that left."""
        if state.mode == "soft":
            stays = state.mask
            if stays is not None and state.real is not None:
                stays = stays * state.real
        else:
            stays = state.shown
            if stays is None and state.index is not None:
                stays = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if stays is None:
            return hidden
        weights = stays.unsqueeze(-1).to(hidden.dtype)  # (batch, present, 1)
        mean = (hidden * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)  # (batch, 1, width)
        if state.index is None:
            return mean + weights * (hidden - mean) if state.mode == "soft" else torch.where(weights > 0, hidden, mean)
        return scatter_states(mean.repeat(1, state.tokens, 1), hidden, state.index, state.valid, fresh=True)

    def places_after_layers(self) -> dict[str, list[tuple[Tensor | None, Tensor | None]]]:
        """Where the tokens in the outputs of each layer, call by call, were in the last forward.

        As in ``TokenCounts.present``: positions (batch, present) or None for all, and which of them take part.
        """
        places: dict[str, list[tuple[Tensor | None, Tensor | None]]] = {}
        if self.counts is not None:
            after = [*self.counts.present[1:], (None, None) if self.scatter else self.counts.present[-1]]
            for name, place in zip(self.stack.layers, after, strict=True):
                places.setdefault(name, []).append(place)
        return places

    # Copies have no forward under way, and no graph of the last one

    def __getstate__(self) -> dict[str, Any]:
        soft = None if self.soft is None else replace(self.soft, thresholds=self.soft.thresholds.detach())
        kept = {**vars(self), "counts": None, "protected_mask": None, "soft": soft}
        del kept["_local"]
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _local=threading.local())


__all__ = ["FILLS", "MODES", "Fill", "Mode", "TokenRuntime"]
