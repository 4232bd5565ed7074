"""Reading JSON that nobody vouches for: every value is checked, and an error says where it lies in the file."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from math import inf, isfinite
from typing import Any, NoReturn

SHOWN = 80


class StrictReader:
    """Checks of parsed JSON; each takes the key path of its value, such as ``files["model.safetensors"].bytes``.

    Args:
        what: what is read, for messages: "compression manifest".
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def parse(self, text: str) -> Any:
        """Parsed JSON; no key may occur twice in an object, and no number may be NaN or infinite."""
        try:
            return json.loads(text, parse_constant=self._refuse_constant, object_pairs_hook=self._unique_keys)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"Expected a {self.what} as JSON, but it cannot be parsed: {error}.") from None

    def refuse(self, path: str, expected: str, got: object) -> NoReturn:
        """Raise ValueError for a malformed value."""
        shown = repr(got)
        shown = shown if len(shown) <= SHOWN else shown[: SHOWN - 3] + "..."
        raise ValueError(f"Malformed {self.what}: expected {path} to be {expected}, but got {shown}.")

    def object(self, value: Any, path: str, keys: Collection[str]) -> dict[str, Any]:
        """An object with exactly these keys."""
        if not isinstance(value, dict):
            self.refuse(path, f"an object with the keys {sorted(keys)}", value)
        if set(value) != set(keys):
            missing, unknown = sorted(set(keys) - set(value)), sorted(set(value) - set(keys))
            raise ValueError(
                f"Malformed {self.what}: expected {path} to have the keys {sorted(keys)}, but {missing} are missing "
                f"and {unknown} are unknown."
            )
        return value

    def mapping(self, value: Any, path: str) -> Mapping[str, Any]:
        """An object with any keys."""
        if not isinstance(value, dict):
            self.refuse(path, "an object", value)
        return value

    def items(self, value: Any, path: str) -> list[tuple[str, Any]]:
        """The items of a list, each with its key path."""
        if not isinstance(value, list):
            self.refuse(path, "a list", value)
        return [(f"{path}[{i}]", item) for i, item in enumerate(value)]

    def string(self, value: Any, path: str, choices: Sequence[str] | None = None) -> str:
        """A string, one of ``choices`` where there are any."""
        if not isinstance(value, str):
            self.refuse(path, "a string", value)
        if choices is not None and value not in choices:
            self.refuse(path, f"one of {tuple(choices)}", value)
        return value

    def integer(self, value: Any, path: str, low: int, high: int) -> int:
        """An integer from ``low`` to ``high``."""
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.refuse(path, f"an integer from {low} to {high}", value)
        return value

    def number(self, value: Any, path: str, low: float, high: float) -> float:
        """A finite number from ``low`` to ``high``."""
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            self.refuse(path, f"a number from {low} to {high}", value)
        try:
            number = float(value)
        except OverflowError:
            number = inf
        if not isfinite(number):
            self.refuse(path, "a finite number", value)
        return number

    def boolean(self, value: Any, path: str) -> bool:
        """True or False."""
        if not isinstance(value, bool):
            self.refuse(path, "true or false", value)
        return value

    def _refuse_constant(self, name: str) -> NoReturn:
        raise ValueError(f"Malformed {self.what}: expected finite numbers, but got {name}.")

    def _unique_keys(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) != len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"Malformed {self.what}: expected each key once in an object, but got {twice} twice.")
        return data


__all__ = ["StrictReader"]
