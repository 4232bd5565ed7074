"""The algebra of tensor dimensions: atoms, products and concatenations under union-find.

Every dimension of every traced tensor is an `Axis`. An axis is an *atom*, or is known to be a *product* (a flattened
(heads, head_dim) dimension) or a *concatenation* (a packed q | k | v dimension) of smaller axes. What a dimension is
made of is learned late: a weight starts with one fresh atom per dimension and is refined when an activation made by it
is viewed or split, so the axis object itself is rewritten and everybody who holds it learns.

    weight (96, 32)  --linear-->  (batch, 96)  --view-->  (batch, 3, 4, 8)
    Axis(96) atom                                          Axis(96) = Axis(3) x Axis(4) x Axis(8)

Dimensions of size 1 carry no axis: they are None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Literal

Form = Literal["atom", "product", "concat"]

# Where the operation that is being traced happens, appended to every reason: " (softmax in encoder.layers.0)".
PLACE: ContextVar[str] = ContextVar("PLACE", default="")


class AxisMismatch(Exception):
    """Two axes cannot be aligned; the caller pins what it has touched."""


class Axis:
    """One dimension, or a part of one; see the module docstring.

    Attributes:
        size: number of positions.
        form: "atom", "product" or "concat".
        parts: the smaller axes of a product (outermost first) or of a concatenation.
        reasons: why the positions of this atom cannot be removed; empty while they can.
        marks: what operations did to this atom ("contracted", "batched", ...).
        origin: the product that this axis was first split out of.
    """

    __slots__ = ("copies", "form", "forward", "marks", "origin", "parts", "reasons", "size", "touched")

    def __init__(self, size: int, reasons: Iterable[str] = (), form: Form = "atom", parts: Sequence[Axis] = ()) -> None:
        self.size = size
        self.form: Form = form
        self.parts = list(parts)
        self.reasons = {reason + PLACE.get() for reason in reasons}
        self.marks: set[str] = set()
        self.forward: Axis | None = None
        self.origin: Axis | None = None
        self.copies: list[Axis] | list[dict[int, Axis]] | None = None
        self.touched = False

    def __repr__(self) -> str:
        axis = find(self)
        if axis.form == "atom":
            return f"{axis.size}{'!' if axis.reasons else ''}"
        return "(" + ("x" if axis.form == "product" else "+").join(map(repr, axis.parts)) + ")"


def find(axis: Axis) -> Axis:
    """The representative of an axis.

    An axis whose copies were told apart by `select` is joined again when used as a whole.
    """
    while True:
        if axis.forward is not None:
            root = axis.forward
            if root.forward is not None:
                axis.forward = root.forward  # halve the path, so that long chains stay cheap
            axis = root
        elif axis.copies is not None and isinstance(axis.copies[0], Axis):
            copies = axis.copies
            axis.copies = None
            for other in copies[1:]:
                unify(copies[0], other)
            axis.forward = copies[0]
        else:
            return axis


def atoms(axis: Axis | None) -> Iterator[Axis]:
    """The atoms that an axis is made of, left to right, repetitions included."""
    if axis is None:
        return
    axis = find(axis)
    if axis.form == "atom":
        yield axis
    else:
        for part in axis.parts:
            yield from atoms(part)


def pin(axis: Axis | None, reason: str) -> None:
    """Never remove positions of this axis, for this reason."""
    reason += PLACE.get()
    for atom in atoms(axis):
        atom.reasons.add(reason)
        atom.touched = True


def mark(axis: Axis | None, *marks: str) -> None:
    """Note what an operation did to the atoms of this axis."""
    for atom in atoms(axis):
        atom.marks.update(marks)
        atom.touched = True


def flat(axis: Axis, form: Form) -> list[Axis]:
    """The parts of an axis read as a product (or concatenation), nested ones opened."""
    axis = find(axis)
    if axis.form == form:
        return [leaf for part in axis.parts for leaf in flat(part, form)]
    return [axis]


def product(axes: Iterable[Axis | None]) -> Axis | None:
    """The axis obtained by flattening several dimensions into one, outermost first."""
    # An only part is handed on as it is: opening it would join copies that a later select tells apart.
    given = [axis for axis in axes if axis is not None]
    if len(given) < 2:
        return given[0] if given else None
    parts = [part for axis in given for part in flat(axis, "product")]
    return Axis(math.prod(part.size for part in parts), form="product", parts=parts)


def concat(axes: Sequence[Axis]) -> Axis:
    """The axis obtained by concatenating several dimensions."""
    if len(axes) == 1:
        return axes[0]
    parts = [part for axis in axes for part in flat(axis, "concat")]
    return Axis(sum(part.size for part in parts), form="concat", parts=parts)


def _refine(atom: Axis, form: Form, parts: list[Axis]) -> None:
    """Rewrite an atom as made of parts; what is known about it holds for them."""
    for part in parts:
        for leaf in atoms(part):
            leaf.reasons |= atom.reasons
            leaf.marks |= atom.marks
    atom.form, atom.parts = form, parts


def split(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Read an axis as a product of the given sizes (all > 1, outermost first), refining it where needed."""
    if len(sizes) == 1:
        return [axis]
    axis = find(axis)
    if axis.form == "atom":
        parts = [Axis(size) for size in sizes]
        _refine(axis, "product", parts)
        for part in parts:
            part.origin = axis
        return parts
    if axis.form == "product":
        return regroup(flat(axis, "product"), sizes)
    # a concatenation: every segment must consist of whole inner blocks, which are then one axis shared by all segments
    block = math.prod(sizes[1:])
    segments = flat(axis, "concat")
    if any(segment.size % block for segment in segments):
        raise AxisMismatch(f"segments {[s.size for s in segments]} do not consist of blocks of {block}")
    outer, inner = [], []
    for segment in segments:
        if segment.size == block:
            outer.append(Axis(1, ["it is one of several concatenated blocks"]))
            inner.append(segment)
        else:
            first, second = split(segment, [segment.size // block, block])
            outer.append(first)
            inner.append(second)
    for other in inner[1:]:
        _unify(inner[0], other)
    axis.form, axis.parts = "product", [concat(outer), find(inner[0])]
    return [axis.parts[0], *split(axis.parts[1], sizes[1:])]


def regroup(axes: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    """Read a sequence of axes, flattened, as a sequence of dimensions of the given sizes."""
    queue = list(axes)
    result: list[Axis] = []
    for size in sizes:
        taken: list[Axis] = []
        need = size
        while need > 1:
            if not queue:
                raise AxisMismatch("dimensions do not line up")
            # An axis that fits whole is taken as it is: looking inside would join copies that a later select tells
            # apart.
            if queue[0].size == need and not taken:
                taken.append(queue.pop(0))
                break
            head = find(queue[0])
            if head.form == "product":
                queue[0:1] = flat(head, "product")
            elif need % head.size == 0:
                taken.append(head)
                need //= head.size
                queue.pop(0)
            elif head.size % need == 0:
                first, second = split(head, [need, head.size // need])
                taken.append(first)
                queue[0] = second
                need = 1
            else:
                raise AxisMismatch(f"a dimension of {head.size} does not line up with {need}")
        merged = product(taken)
        assert merged is not None
        result.append(merged)
    return result


def unify(a: Axis | None, b: Axis | None) -> None:
    """State that two axes are the same: position i of one is position i of the other.

    Where they cannot be lined up both stay whole.
    """
    if a is None or b is None:
        return
    try:
        _unify(a, b)
    except AxisMismatch as mismatch:
        for axis in (a, b):
            pin(axis, f"it does not line up with what it meets: {mismatch}")


def _unify(a: Axis, b: Axis) -> None:
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        raise AxisMismatch(f"sizes {a.size} and {b.size} differ")
    if a.form != "atom" and b.form == "atom":
        a, b = b, a
    if a.form == "atom":
        for atom in atoms(b):
            atom.reasons |= a.reasons
            atom.marks |= a.marks
            atom.touched = True
        a.forward = b
    elif a.form == b.form == "product":
        _unify_products(a, b)
    elif a.form == b.form == "concat":
        _unify_concats(a, b)
    else:
        packed, factored = (a, b) if a.form == "concat" else (b, a)
        split(packed, [part.size for part in flat(factored, "product")])
        _unify(packed, factored)


def _unify_products(a: Axis, b: Axis) -> None:
    left, right = flat(a, "product"), flat(b, "product")
    while left and right:
        x, y = find(left[0]), find(right[0])
        if x.form == "product":
            left[0:1] = flat(x, "product")
        elif y.form == "product":
            right[0:1] = flat(y, "product")
        elif x.size == y.size:
            _unify(x, y)
            left.pop(0)
            right.pop(0)
        elif x.size % y.size == 0:
            left[0:1] = split(x, [y.size, x.size // y.size])
        elif y.size % x.size == 0:
            right[0:1] = split(y, [x.size, y.size // x.size])
        else:
            raise AxisMismatch(f"factors {x.size} and {y.size} do not line up")
    if find(a) is not find(b):
        find(a).forward = find(b)


def _unify_concats(a: Axis, b: Axis) -> None:
    left, right = flat(a, "concat"), flat(b, "concat")
    while left and right:
        x, y = find(left[0]), find(right[0])
        if x.form == "concat":
            left[0:1] = flat(x, "concat")
        elif y.form == "concat":
            right[0:1] = flat(y, "concat")
        elif x.size == y.size:
            _unify(x, y)
            left.pop(0)
            right.pop(0)
        else:
            longer, queue = (x, left) if x.size > y.size else (y, right)
            cut = min(x.size, y.size)
            pieces = [take(longer, 0, cut), take(longer, cut, longer.size)]
            if find(longer).form != "concat":
                raise AxisMismatch(f"segments {x.size} and {y.size} do not line up")
            queue[0:1] = pieces
    if find(a) is not find(b):
        find(a).forward = find(b)


def take(axis: Axis, start: int, stop: int) -> Axis:
    """The contiguous positions start..stop of an axis, which is refined into pieces where needed."""
    if start == 0 and stop == axis.size:
        return axis
    axis = find(axis)
    if axis.form == "atom":
        pieces = []
        wanted = None
        for low, high in ((0, start), (start, stop), (stop, axis.size)):
            if high > low:
                piece = Axis(high - low)
                pieces.append(piece)
                if low == start and high == stop:
                    wanted = piece
        _refine(axis, "concat", pieces)
        assert wanted is not None
        return wanted
    if axis.form == "concat":
        offset, pieces = 0, []
        for segment in flat(axis, "concat"):
            low, high = max(start, offset), min(stop, offset + segment.size)
            if high > low:
                pieces.append(take(segment, low - offset, high - offset))
            offset += segment.size
        return concat(pieces)
    outer = flat(axis, "product")[0]
    block = axis.size // outer.size
    if start % block == 0 and stop % block == 0:
        rest = flat(axis, "product")[1:]
        if stop - start == block:  # one position of the outermost factor: what is left of it is no axis
            pin(outer, "single positions of it are taken by index")
            whole = product(rest)
            assert whole is not None
            return whole
        whole = product([take(outer, start // block, stop // block), *rest])
        assert whole is not None
        return whole
    raise AxisMismatch(f"positions {start}:{stop} cut through blocks of {block}")


def select(dims: Sequence[Axis | None], dim: int, index: int) -> list[Axis | None]:
    """Dimensions of ``tensor.select(dim, index)``.

    A packed dimension that was viewed as (3, heads, head_dim) and is then indexed along the 3 is really a concatenation
    of three dimensions that need not have anything in common. If nothing has used the inner factors yet, they are told
    apart: every index gets its own copy, and the packed dimension becomes the concatenation of the copies.
    """
    rest = [axis for position, axis in enumerate(dims) if position != dim]
    chosen = dims[dim]
    if chosen is None:
        return rest
    if chosen.copies is None and not _tell_apart(chosen, rest):
        # of a dimension that was cut into segments before, only the position that is read has to stay
        segments = find(chosen).form == "concat"
        pin(take(chosen, index, index + 1) if segments else chosen, "single positions of it are taken by index")
        return rest
    copy: dict[int, Axis] = chosen.copies[index]  # type: ignore[index, assignment]
    return [axis if axis is None else copy.get(id(axis), axis) for axis in rest]


def _tell_apart(chosen: Axis, rest: Sequence[Axis | None]) -> bool:
    packed = chosen.origin
    if (
        packed is None
        or packed.forward is not None
        or chosen.forward is not None
        or chosen.form != "atom"
        or chosen.touched
        or chosen.reasons
    ):
        return False
    if packed.form != "product" or not any(part is chosen for part in packed.parts):
        return False
    position = next(i for i, part in enumerate(packed.parts) if part is chosen)
    inner = packed.parts[position + 1 :]
    present = {id(axis) for axis in rest}
    pristine = all(
        part.form == "atom"
        and part.forward is None
        and part.copies is None
        and not part.touched
        and id(part) in present
        for part in inner
    )
    if not inner or not pristine:
        return False
    copies: list[dict[int, Axis]] = []
    for _ in range(chosen.size):
        fresh = {id(part): Axis(part.size) for part in inner}
        for part in inner:
            fresh[id(part)].marks |= part.marks
            fresh[id(part)].reasons |= part.reasons
        copies.append(fresh)
    segments = []
    for fresh in copies:
        segment = product([fresh[id(part)] for part in inner])
        assert segment is not None
        segments.append(segment)
    chosen.copies = copies
    for part in inner:
        part.copies = [fresh[id(part)] for fresh in copies]
    packed.parts = [*packed.parts[:position], concat(segments)]
    if len(packed.parts) == 1:
        packed.form, packed.parts = "concat", flat(packed.parts[0], "concat")
    return True
