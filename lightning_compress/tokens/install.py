"""Putting a runtime on a model, and taking it off: forwards are replaced on the instances, nothing else is touched."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_compress.surgery.errors import SurgeryError
from lightning_compress.surgery.guards import check_names
from lightning_compress.token_switch import tokens_are_off
from lightning_compress.tokens.errors import TokenPruningError
from lightning_compress.tokens.runtime import TokenRuntime
from lightning_compress.tokens.tail import tail_names

RUNTIME = "_token_runtime"
WHOLE = ("output_attentions", "output_hidden_states")


@torch._disable_dynamo
def _tokens_leave_outside_the_graph(function: Callable[..., Any], *args: Any) -> Any:
    """How many tokens stay is known at run time only: `torch.compile` compiles what is around the layers.

    With torch's own decorator: `torch.compiler.disable` takes seconds to import where nothing is compiled, too.
    """
    return function(*args)


@dataclass(eq=False)
class _CheckCall:
    """Forward pre-hook of the model, the owner, and modules between: a call that needs all tokens is refused."""

    runtime: TokenRuntime
    owner: nn.Module  # its training flag decides what runs
    names: list[str]  # of the module's arguments

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            _tokens_leave_outside_the_graph(self.check, module, args, kwargs)
        else:
            self.check(module, args, kwargs)

    def check(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):  # its forwards are those of the original, with weights elsewhere
            raise TokenPruningError(
                "Expected a model on one device for token pruning, but DataParallel has copied it to several. Use "
                "DistributedDataParallel, or take token pruning off (remove_tokens)."
            )
        if tokens_are_off() or self.runtime.will_run(self.owner.training) == "off":
            return
        config = getattr(module, "config", None)
        for name in WHOLE:
            value = args[self.names.index(name)] if name in self.names[: len(args)] else kwargs.get(name)
            if getattr(config, name, False) if value is None else value:
                raise TokenPruningError(
                    f"Expected a call without {name}=True, because with pruned tokens every layer has another number "
                    'of them. Set runtime.mode = "off" (token_runtime(model)) to look at the model with all tokens.'
                )


@dataclass(eq=False)
class _Forwarded:
    """What stands in for the forward of a module on the instance."""

    runtime: TokenRuntime
    module: nn.Module
    name: str
    previous: Any = None  # a forward that was set on the instance before

    def original(self) -> Callable[..., Any]:
        return self.previous if self.previous is not None else type(self.module).forward.__get__(self.module)

    def __post_init__(self) -> None:
        # callers that look at the signature of a forward do so in every call
        self.__signature__ = inspect.signature(self.original())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (
            _tokens_leave_outside_the_graph(self.run, args, kwargs)
            if torch.compiler.is_compiling()
            else self.run(args, kwargs)
        )

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class _OwnerForward(_Forwarded):
    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.runtime.run_owner(self.original(), self.module.training, args, kwargs)


class _LayerForward(_Forwarded):
    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.runtime.run_layer(self.module, self.original(), self.name, args, kwargs)


class _AttentionForward(_Forwarded):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.runtime.run_attention(self.original(), args, kwargs)


class _TailForward(_Forwarded):
    ends: tuple[bool, bool] = (False, False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.runtime.run_tail(self.original(), self.name, self.ends, args, kwargs)


def token_runtime(model: nn.Module) -> TokenRuntime | None:
    """The runtime that is installed on ``model``; None if there is none."""
    return vars(model).get(RUNTIME)


def check_not_wrapped(model: nn.Module) -> None:
    """Raise TokenPruningError for a scripted module, or one with the names of ``torch.compile``."""
    try:
        check_names(model)
    except SurgeryError as failure:
        raise TokenPruningError(str(failure)) from failure


def install_tokens(model: nn.Module, runtime: TokenRuntime) -> TokenRuntime:
    """Put a runtime on ``model``: from now on its forwards prune tokens.

    Args:
        model: the model that the stack was found in.
        runtime: its stack's modules must be there.

    Returns:
        The runtime.

    Raises:
        TokenPruningError: if the model has one already, or lacks a module of the stack; it is unchanged then.
    """
    check_not_wrapped(model)
    if token_runtime(model) is not None:
        raise TokenPruningError(
            "Expected a model without token pruning, but it has a runtime already. Take it off first: "
            "remove_tokens(model)."
        )
    modules = dict(model.named_modules())
    distinct = tuple(dict.fromkeys(runtime.stack.layers))
    tails = {path: ends for layer in distinct for path, *ends in tail_names(runtime.stack, layer)}
    attention = [f"{layer}.{runtime.stack.attention}" for layer in distinct] if runtime.stack.attention else []
    wanted = [runtime.stack.owner, *distinct, *attention, *tails]
    missing = [name for name in wanted if name not in modules]
    if missing:
        raise TokenPruningError(
            f"Expected a model with the modules {missing[:3]} of the stack, but {type(model).__name__} has none of "
            "these names."
        )
    for name in wanted:
        if isinstance(vars(modules[name]).get("forward"), _Forwarded):
            raise TokenPruningError(
                f"Expected a model without token pruning, but {name!r} in it has a runtime, installed on a part of the "
                "model. Take it off there first: remove_tokens(part)."
            )
    owner = modules[runtime.stack.owner]
    _replace(_OwnerForward(runtime, owner, runtime.stack.owner, vars(owner).get("forward")))
    for name in distinct:
        layer = modules[name]
        _replace(_LayerForward(runtime, layer, name, vars(layer).get("forward")))
    for name in attention:
        _replace(_AttentionForward(runtime, modules[name], name, vars(modules[name]).get("forward")))
    for name, (begins, ends) in tails.items():
        part = modules[name]
        forward = _TailForward(runtime, part, name, vars(part).get("forward"))
        forward.ends = (begins, ends)
        _replace(forward)
    vars(model)[RUNTIME] = runtime
    path = runtime.stack.owner.split(".") if runtime.stack.owner else []
    for name in (".".join(path[:depth]) for depth in range(len(path) + 1)):
        names = list(inspect.signature(modules[name].forward).parameters)
        modules[name].register_forward_pre_hook(_CheckCall(runtime, owner, names), with_kwargs=True)
    return runtime


def _replace(forward: _Forwarded) -> None:
    vars(forward.module)["forward"] = forward


def remove_tokens(model: nn.Module) -> TokenRuntime | None:
    """Take the runtime off ``model``: all tokens take part again. Returns it, or None if there was none."""
    runtime = vars(model).pop(RUNTIME, None)
    if runtime is None:
        return None
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, _Forwarded) and forward.runtime is runtime:
            del vars(module)["forward"]
            if forward.previous is not None:
                vars(module)["forward"] = forward.previous
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _CheckCall) and hook.runtime is runtime:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return runtime


__all__ = ["check_not_wrapped", "install_tokens", "remove_tokens", "token_runtime"]
