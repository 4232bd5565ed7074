"""Progress of what takes longer than a few seconds: whoever wants a bar wraps what is gone through.

    structures = discover(model, args, prove=True, progress=progress_bars)

Nothing here prints: by default loops go through what they have, and who shows it, and how, is the caller's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

# (items, what is done with them) -> the items. Items with a length are that many, unless something fails; where nobody
# knows how many there will be they come without one.
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def quiet(items: Iterable[Any], what: str) -> Iterable[Any]:
    """No bar."""
    return items


def progress_bars(items: Iterable[Any], what: str) -> Iterable[Any]:
    """A bar of tqdm, in a terminal or a notebook, that disappears when it is done: ``progress=progress_bars``.

    Any other function of the same two arguments serves as well.

    Args:
        items: what is gone through.
        what: what is done with them.

    Raises:
        ImportError: without tqdm, with what to install.

    >>> sum(progress_bars([1, 2, 3], "adding"))
    6
    """
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            f"Expected tqdm for a progress bar, but it cannot be imported ({error}). Install it: pip install tqdm. Or "
            "pass a function (items, what) of your own that returns the items, or leave progress out."
        ) from error
    return tqdm(items, desc=what, leave=False)


@contextmanager
def phase(progress: Progress, what: str) -> Iterator[None]:
    """One long step as a bar of a single item, which shows that something is going on."""
    items = iter(progress((what,), what))
    next(items, None)
    try:
        yield
    finally:
        next(items, None)
        _close(items)


def as_long_as(condition: Callable[[], bool]) -> Iterator[int]:
    """Numbers while a condition holds: the items of a loop whose length nobody knows.

    >>> left = [3, 4]
    >>> for number in as_long_as(lambda: bool(left)):
    ...     print(number, left.pop())
    0 4
    1 3
    """
    for number in count():
        if not condition():
            return
        yield number


@contextmanager
def steps(progress: Progress, what: str) -> Iterator[Callable[[], None]]:
    """A bar of unknown length for what is no loop of ours: under it, call what is yielded at every step."""
    items = iter(progress(count(), what))
    try:
        yield lambda: next(items, None)
    finally:
        _close(items)


def _close(items: Iterator[Any]) -> None:
    """End a bar early: it is a generator that stands between two items."""
    close = getattr(items, "close", None)
    if close is not None:
        close()


__all__ = ["Progress", "as_long_as", "phase", "progress_bars", "quiet", "steps"]
