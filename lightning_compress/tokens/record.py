"""Token pruning as a JSON object, for files that nobody vouches for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lightning_compress.strict_json import StrictReader
from lightning_compress.token_policies import policy_from
from lightning_compress.tokens.install import install_tokens, token_runtime
from lightning_compress.tokens.runtime import FILLS, TokenRuntime
from lightning_compress.tokens.stack import TokenStack, TokenTail

MOST_CALLS, MOST_DIMS, LARGEST = 100_000, 8, 2**31
KEYS = ("owner", "layers", "state", "dims", "tokens", "width", "tail", "attention")
TAIL = ("first", "last", "base")


@dataclass(frozen=True)
class TokenRecord:
    """A runtime without the model that it is on.

    Args:
        module: path of the module that it is on.
        state: its stack, its policy and what else it decides with.
    """

    module: str
    state: dict[str, Any]

    def install(self, model: nn.Module) -> TokenRuntime:
        """Put the runtime on ``model``'s module.

        Raises:
            ValueError: if the model has no such module, or that module other layers.
        """
        modules = dict(model.named_modules())
        if self.module not in modules:
            raise ValueError(
                f"Expected the model to have a module {self.module!r}, whose tokens are pruned, but it has none. The "
                "factory must build the dense model that was compressed."
            )
        return install_tokens(modules[self.module], _runtime(self.state, "token_pruning"))


def token_records(model: nn.Module) -> tuple[TokenRecord, ...]:
    """Records of ``model`` and its sub-modules."""
    found = ((path, token_runtime(module)) for path, module in model.named_modules())
    return tuple(TokenRecord(path, _state(runtime)) for path, runtime in found if runtime is not None)


def read_token_record(value: object, path: str) -> TokenRecord:
    """The record of a JSON object, after every check that needs no model.

    Raises:
        ValueError: for anything else than what ``TokenRecord`` holds; the message says what was expected where.
    """
    read = StrictReader("token pruning record")
    data = read.object(value, path, ("module", "runtime"))
    module = read.string(data["module"], f"{path}.module")
    _runtime(data["runtime"], f"{path}.runtime")
    return TokenRecord(module, data["runtime"])


def _state(runtime: TokenRuntime) -> dict[str, Any]:
    stack = runtime.stack
    return {
        "stack": {
            "owner": stack.owner,
            "layers": list(stack.layers),
            "state": stack.state,
            "dims": {path: list(dims) for path, dims in stack.dims.items()},
            "tokens": stack.tokens,
            "width": stack.width,
            "tail": None if stack.tail is None else asdict(stack.tail),
            "attention": stack.attention,
        },
        "policy": runtime.policy.state(),
        "protected": list(runtime.protected),
        "min_keep": runtime.min_keep,
        "scatter": runtime.scatter,
        "fill": runtime.fill,
    }


def _tail(read: StrictReader, value: object, path: str) -> TokenTail:
    tail = read.object(value, path, TAIL)
    first, last, base = (read.string(tail[key], f"{path}.{key}") for key in TAIL)
    if base and not _is_argument(base):
        read.refuse(f"{path}.base", "args.NUMBER, kwargs.NAME or an empty string", base)
    return TokenTail(first, last, base)


def _is_argument(path: str) -> bool:
    kind, _, key = path.partition(".")
    return bool(kind == "kwargs" and key) or (kind == "args" and key.isdecimal() and len(key) < 4)


def _runtime(value: object, path: str) -> TokenRuntime:
    read = StrictReader("token pruning record")
    data = read.object(value, path, ("stack", "policy", "protected", "min_keep", "scatter", "fill"))
    stack = read.object(data["stack"], f"{path}.stack", KEYS)
    where = f"{path}.stack"
    layers = tuple(read.string(item, at) for at, item in read.items(stack["layers"], f"{where}.layers"))
    if not 2 <= len(layers) <= MOST_CALLS:
        read.refuse(f"{where}.layers", f"a list of 2 to {MOST_CALLS} paths", layers)
    state = read.string(stack["state"], f"{where}.state")
    if not _is_argument(state):
        read.refuse(f"{where}.state", "args.NUMBER or kwargs.NAME", state)
    dims = {}
    for name, found in read.mapping(stack["dims"], f"{where}.dims").items():
        items = read.items(found, f"{where}.dims[{name!r}]")
        if len(items) > MOST_DIMS:
            read.refuse(f"{where}.dims[{name!r}]", f"a list of at most {MOST_DIMS} dims", found)
        dims[name] = tuple(read.integer(item, at, -MOST_DIMS, -1) for at, item in items)
    protected = read.items(data["protected"], f"{path}.protected")
    return TokenRuntime(
        TokenStack(
            read.string(stack["owner"], f"{where}.owner"),
            layers,
            state,
            dims,
            read.integer(stack["tokens"], f"{where}.tokens", 1, LARGEST),
            read.integer(stack["width"], f"{where}.width", 1, LARGEST),
            None if stack["tail"] is None else _tail(read, stack["tail"], f"{where}.tail"),
            read.string(stack["attention"], f"{where}.attention"),
        ),
        policy_from(data["policy"], f"{path}.policy"),
        protected=tuple(read.integer(item, at, -LARGEST, LARGEST) for at, item in protected),
        min_keep=read.integer(data["min_keep"], f"{path}.min_keep", 1, LARGEST),
        scatter=read.boolean(data["scatter"], f"{path}.scatter"),
        fill="mean" if read.string(data["fill"], f"{path}.fill", FILLS) == "mean" else "state",
    )


__all__ = ["TokenRecord", "read_token_record", "token_records"]
