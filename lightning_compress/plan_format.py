"""The JSON form of a pruning plan: what is written, and a reader that trusts nothing.

    {"format": "lightning_compress.plan", "version": 2, "verified": true,
     "shapes": {"up.weight": [64, 16], ...},
     "structures": [{"name": ..., "kind": ..., "units": ..., "tier": ..., "kept": [[0, 40], 43, [50, 64, 2]],
                     "sizes": [...], "slices": [...], "edits": [...], "floor": 1, "norms": [], "members": []}, ...]}

Integer sequences are lists of *ranges*: an integer is itself, ``[start, stop]`` and ``[start, stop, step]`` are those
of Python's ``range``. A table of positions is ``{"stride": s, "pattern": ranges}`` where unit u owns u * s + pattern
(nearly always the case: whole heads, head dims, packed projections), otherwise ``{"rows": [ranges, ...]}``. A
polynomial is a list of ``[coefficient, [variable, ...]]``. An edit is an object whose "edit" says which: "attribute",
"shim", "core", or "module" for a module that goes as a whole; its "passage" is ``{"form": "tuple", "items": [0, null],
"keys": []}``, what is returned in its place, or null. ``members`` are modules, one per unit; ``shapes`` holds what is
inside them too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_compress.polynomials import Polynomial
from lightning_compress.strict_json import StrictReader
from lightning_compress.structures import (
    KINDS,
    AttributeEdit,
    CoreEdit,
    Edit,
    ModuleEdit,
    Normalisation,
    Passage,
    Role,
    ShimEdit,
    Slice,
    Structure,
    Tier,
)

NAME = "lightning_compress.plan"
VERSION = 2

# A file may be hostile: no axis longer than this is read, so that a short file cannot ask for boundless memory.
LARGEST_AXIS = 2**26
LARGEST_RANK = 16

# Attributes that an edit may set: a plain name, possibly of an object that the module holds, possibly an item of a list
# or dict, or an argument that a functools.partial carries; in a member of a container a path; never a double
# underscore. See surgery/attribute_paths.py.
STEP = r"\[[0-9]{1,4}\]|\['[A-Za-z0-9_]{1,64}'\]|\((?!__)[A-Za-z0-9_]{1,64}\)"
ATTRIBUTE = re.compile(rf"((?!__)[A-Za-z_][A-Za-z0-9_]*\.)?((?!__)[A-Za-z_][A-Za-z0-9_]*)((?:{STEP}){{0,3}})")
PATH = re.compile(r"(?!__)\w+(\.(?!__)\w+)*", re.ASCII)


def encode_ranges(values: Sequence[int]) -> list[int | list[int]]:
    """Integers as ranges, in order: [0, 1, 2, 7, 10, 12, 14] -> [[0, 3], 7, [10, 16, 2]]."""
    ranges: list[int | list[int]] = []
    start = 0
    while start < len(values):
        stop = start + 1
        if stop < len(values) and (step := values[stop] - values[start]):
            while stop < len(values) and values[stop] - values[stop - 1] == step:
                stop += 1
            # a pair is shorter as a range only where the step need not be written
            if stop - start < (2 if step == 1 else 3):
                stop = start + 1
        if stop - start == 1:
            ranges.append(values[start])
        else:
            end = values[stop - 1] + (1 if step == 1 else step)
            ranges.append([values[start], end] if step == 1 else [values[start], end, step])
        start = stop
    return ranges


def encode_table(indices: Tensor) -> dict[str, Any]:
    """A table of positions, shape (units, positions), as stride and pattern where these say it all, else as rows."""
    stride = int(indices[1, 0] - indices[0, 0]) if indices.shape[0] > 1 and indices.shape[1] > 0 else 1
    if torch.equal(indices, torch.arange(indices.shape[0]).unsqueeze(1) * stride + indices[0]):
        return {"stride": stride, "pattern": encode_ranges(indices[0].tolist())}
    return {"rows": [encode_ranges(row) for row in indices.tolist()]}


def encode_polynomial(polynomial: Polynomial) -> list[list[Any]]:
    """A polynomial as a list of [coefficient, [variable, ...]]."""
    return [[coefficient, list(names)] for names, coefficient in polynomial]


def encode_edit(edit: Edit) -> dict[str, Any]:
    """An edit as an object whose "edit" says which."""
    match edit:
        case AttributeEdit(module, attribute, size):
            return {"edit": "attribute", "module": module, "attribute": attribute, "size": encode_polynomial(size)}
        case ShimEdit(module, side, dim):
            return {"edit": "shim", "module": module, "side": side, "dim": dim}
        case CoreEdit(module, axis):
            return {"edit": "core", "module": module, "axis": axis}
        case ModuleEdit(module, way, passage, numbers):
            form = passage and {"form": passage.form, "items": list(passage.items), "keys": list(passage.keys)}
            return {"edit": "module", "module": module, "way": way, "passage": form, "numbers": list(numbers)}


def encode_structure(structure: Structure, kept: Sequence[int]) -> dict[str, Any]:
    """A structure and its kept units."""
    return {
        "name": structure.name,
        "kind": structure.kind,
        "units": structure.units,
        "tier": structure.tier,
        "kept": encode_ranges(kept),
        "sizes": [encode_polynomial(size) for size in structure.sizes],
        "slices": [
            {
                "parameter": s.parameter,
                "axis": s.axis,
                "size": s.size,
                "role": s.role,
                "zero": s.zero,
                "indices": encode_table(s.indices),
            }
            for s in structure.slices
        ],
        "edits": [encode_edit(edit) for edit in structure.edits],
        "floor": structure.floor,
        "norms": [[norm.module, norm.dim] for norm in structure.norms],
        "members": list(structure.members),
    }


def dumps(
    structures: Iterable[Structure],
    kept: Mapping[str, Sequence[int]],
    shapes: Mapping[str, Sequence[int]],
    verified: bool = False,
) -> str:
    """The plan as JSON text, one structure per line."""
    lines = ",\n".join(json.dumps(encode_structure(s, kept[s.name]), separators=(",", ":")) for s in structures)
    header = json.dumps({name: list(shape) for name, shape in shapes.items()}, separators=(",", ":"))
    start = f'"format":"{NAME}","version":{VERSION},"verified":{json.dumps(verified)}'
    return f'{{{start},\n"shapes":{header},\n"structures":[\n{lines}\n]}}\n'


# The reader. Every function takes the key path of its value, so that an error says where: "structures[2].kept[0]".

_READER = StrictReader("pruning plan")
_refuse, _object, _items = _READER.refuse, _READER.object, _READER.items
_string, _integer, _boolean = _READER.string, _READER.integer, _READER.boolean


def loads(text: str) -> tuple[tuple[Structure, ...], dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], bool]:
    """Structures, kept units, shapes and whether that was verified, out of JSON text.

    Raises:
        ValueError: with the key path of what is wrong.
    """
    data = _object(_READER.parse(text), "plan", {"format", "version", "verified", "shapes", "structures"})
    if data["format"] != NAME:
        _refuse("format", repr(NAME), data["format"])
    if data["version"] != VERSION or isinstance(data["version"], bool):
        _refuse("version", f"{VERSION} (newer plans need a newer lightning_compress)", data["version"])
    verified = _boolean(data["verified"], "verified")
    if not isinstance(data["shapes"], dict):
        _refuse("shapes", "an object from parameter name to shape", data["shapes"])
    shapes = {name: _shape(shape, f"shapes[{name!r}]") for name, shape in data["shapes"].items()}
    structures: list[Structure] = []
    kept: dict[str, tuple[int, ...]] = {}
    for path, value in _items(data["structures"], "structures"):
        structure, units = _structure(value, path)
        if structure.name in kept:
            _refuse(f"{path}.name", "a name that no other structure has", structure.name)
        structures.append(structure)
        kept[structure.name] = units
    return tuple(structures), kept, shapes, verified


def _shape(value: Any, path: str) -> tuple[int, ...]:
    sizes = _items(value, path)
    if len(sizes) > LARGEST_RANK:
        _refuse(path, f"a list of at most {LARGEST_RANK} sizes", value)
    return tuple(_integer(n, where, 0, LARGEST_AXIS) for where, n in sizes)


def decode_ranges(value: Any, path: str, size: int, longest: int) -> list[int]:
    """At most ``longest`` integers in [0, size); counted before they are made."""
    values: list[int] = []
    for where, item in _items(value, path):
        if not isinstance(item, list):
            values.append(_integer(item, where, 0, size - 1))
        else:
            if len(item) not in (2, 3):
                _refuse(where, "an integer, [start, stop] or [start, stop, step]", item)
            start, stop, step = (_integer(n, f"{where}[{j}]", -size, 2 * size) for j, n in enumerate((*item, 1)[:3]))
            run = range(start, stop, step) if step else range(0)
            if not len(run) or min(run[0], run[-1]) < 0 or max(run[0], run[-1]) >= size:
                _refuse(where, f"a range of one or more integers from 0 to {size - 1}", item)
            if len(values) + len(run) > longest:
                _refuse(path, f"at most {longest} integers", value)
            values.extend(run)
    if len(values) > longest:
        _refuse(path, f"at most {longest} integers", value)
    return values


def _table(value: Any, path: str, units: int, size: int) -> Tensor:
    """Positions of each unit, int64 of shape (units, positions)."""
    if isinstance(value, dict) and "rows" in value:
        rows = _items(_object(value, path, {"rows"})["rows"], f"{path}.rows")
        if len(rows) != units:
            _refuse(f"{path}.rows", f"a list of {units} rows, one per unit", f"{len(rows)} rows")
        table = [decode_ranges(row, where, size, size // units) for where, row in rows]
        for (where, _), row in zip(rows, table, strict=True):
            if len(row) != len(table[0]):
                _refuse(where, f"{len(table[0])} positions like the first row", f"{len(row)} positions")
        return torch.tensor(table, dtype=torch.long).reshape(units, -1)
    value = _object(value, path, {"stride", "pattern"})
    stride = _integer(value["stride"], f"{path}.stride", -size, size)
    pattern = torch.tensor(decode_ranges(value["pattern"], f"{path}.pattern", size, size // units), dtype=torch.long)
    table_ = torch.arange(units).unsqueeze(1) * stride + pattern
    if table_.numel() and (int(table_.min()) < 0 or int(table_.max()) >= size):
        _refuse(path, f"positions from 0 to {size - 1}", [int(table_.min()), int(table_.max())])
    return table_


def _polynomial(value: Any, path: str) -> Polynomial:
    terms: dict[tuple[str, ...], float] = {}
    for where, term in _items(value, path):
        if not isinstance(term, list) or len(term) != 2:
            _refuse(where, "a list [coefficient, [variable, ...]]", term)
        coefficient = term[0]
        if not isinstance(coefficient, int | float) or isinstance(coefficient, bool) or not math.isfinite(coefficient):
            _refuse(f"{where}[0]", "a finite number", coefficient)
        names = tuple(_string(item, place) for place, item in _items(term[1], f"{where}[1]"))
        if names in terms or names != tuple(sorted(names)):
            _refuse(f"{where}[1]", "sorted variables that occur in no other term", term[1])
        terms[names] = float(coefficient)
    return Polynomial(terms)


def _edit(value: Any, path: str) -> Edit:
    if not isinstance(value, dict) or "edit" not in value:
        _refuse(path, 'an object with the key "edit"', value)
    name = _string(value["edit"], f"{path}.edit", ("attribute", "shim", "core", "module"))
    if name == "attribute":
        value = _object(value, path, {"edit", "module", "attribute", "size"})
        attribute = _string(value["attribute"], f"{path}.attribute")
        if not ATTRIBUTE.fullmatch(attribute):
            _refuse(f"{path}.attribute", 'an attribute name, possibly as "config.NAME" or "NAME[0]"', attribute)
        size = _polynomial(value["size"], f"{path}.size")
        return AttributeEdit(_string(value["module"], f"{path}.module"), attribute, size)
    if name == "shim":
        value = _object(value, path, {"edit", "module", "side", "dim"})
        side = _string(value["side"], f"{path}.side", ("output", "input"))
        dim = _integer(value["dim"], f"{path}.dim", -LARGEST_RANK, LARGEST_RANK)
        return ShimEdit(_string(value["module"], f"{path}.module"), side, dim)  # type: ignore[arg-type]
    if name == "module":
        return _module_edit(value, path)
    value = _object(value, path, {"edit", "module", "axis"})
    axis = _string(value["axis"], f"{path}.axis", ("heads", "qk_head_dim", "vo_head_dim", "width"))
    return CoreEdit(_string(value["module"], f"{path}.module"), axis)  # type: ignore[arg-type]


def _module_edit(value: Any, path: str) -> ModuleEdit:
    value = _object(value, path, {"edit", "module", "way", "passage", "numbers"})
    way = _string(value["way"], f"{path}.way", ("drop", "skip"))
    passage = None if value["passage"] is None else _passage(value["passage"], f"{path}.passage")
    if passage is None and way == "skip":
        _refuse(f"{path}.passage", "an object where the module is skipped", None)
    numbers = tuple(_string(item, where) for where, item in _items(value["numbers"], f"{path}.numbers"))
    for where, number in zip((w for w, _ in _items(value["numbers"], f"{path}.numbers")), numbers, strict=True):
        if not PATH.fullmatch(number):
            _refuse(where, "the path of an attribute", number)
    return ModuleEdit(_string(value["module"], f"{path}.module"), way, passage, numbers)  # type: ignore[arg-type]


def _passage(value: Any, path: str) -> Passage:
    value = _object(value, path, {"form", "items", "keys"})
    form = _string(value["form"], f"{path}.form", ("tensor", "tuple", "list", "dict"))
    keys = tuple(_string(item, where) for where, item in _items(value["keys"], f"{path}.keys"))
    items: list[int | str | None] = []
    for where, item in _items(value["items"], f"{path}.items"):
        if isinstance(item, str):
            items.append(_string(item, where))
        else:
            items.append(None if item is None else _integer(item, where, 0, LARGEST_RANK * LARGEST_RANK))
    if form == "tensor" and (len(items) != 1 or items[0] is None):
        _refuse(f"{path}.items", "one input", value["items"])
    if len(keys) != (len(items) if form == "dict" else 0):
        _refuse(f"{path}.keys", "a key for each item of a dict, else none", value["keys"])
    return Passage(form, tuple(items), keys)  # type: ignore[arg-type]


def _norm(value: Any, path: str) -> Normalisation:
    if not isinstance(value, list) or len(value) != 2:
        _refuse(path, "a list [module, dimension]", value)
    return Normalisation(_string(value[0], f"{path}[0]"), _integer(value[1], f"{path}[1]", -LARGEST_RANK, -1))


def _slice(value: Any, path: str, units: int) -> Slice:
    value = _object(value, path, {"parameter", "axis", "size", "role", "zero", "indices"})
    size = _integer(value["size"], f"{path}.size", 1, LARGEST_AXIS)
    return Slice(
        parameter=_string(value["parameter"], f"{path}.parameter"),
        axis=_integer(value["axis"], f"{path}.axis", 0, LARGEST_RANK - 1),
        size=size,
        indices=_table(value["indices"], f"{path}.indices", units, size),
        role=_string(value["role"], f"{path}.role", get_args(Role)),  # type: ignore[arg-type]
        zero=_boolean(value["zero"], f"{path}.zero"),
    )


def _structure(value: Any, path: str) -> tuple[Structure, tuple[int, ...]]:
    keys = {"name", "kind", "units", "tier", "kept", "sizes", "slices", "edits", "floor", "norms", "members"}
    value = _object(value, path, keys)
    units = _integer(value["units"], f"{path}.units", 1, LARGEST_AXIS)
    tier = value["tier"]
    if tier is not None:
        tier = _string(tier, f"{path}.tier", get_args(Tier))
    structure = Structure(
        name=_string(value["name"], f"{path}.name"),
        kind=_string(value["kind"], f"{path}.kind", KINDS),
        units=units,
        slices=tuple(_slice(item, where, units) for where, item in _items(value["slices"], f"{path}.slices")),
        sizes=tuple(_polynomial(item, where) for where, item in _items(value["sizes"], f"{path}.sizes")),
        tier=tier,
        edits=tuple(_edit(item, where) for where, item in _items(value["edits"], f"{path}.edits")),
        floor=_integer(value["floor"], f"{path}.floor", 0, units),
        norms=tuple(_norm(item, where) for where, item in _items(value["norms"], f"{path}.norms")),
        members=tuple(_string(item, where) for where, item in _items(value["members"], f"{path}.members")),
    )
    if structure.members and len(structure.members) != units:
        _refuse(f"{path}.members", f"a list of {units} module paths, one per unit", value["members"])
    return structure, tuple(decode_ranges(value["kept"], f"{path}.kept", units, units))
