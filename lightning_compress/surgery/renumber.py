"""Ids given anew: what the removal of vocabulary rows does to the inputs and outputs of a model.

Rows that a corpus never looks up can go if the ids that stay are numbered anew, in their old order:

    small(new_id[ids]) = full(ids)[..., kept]

where kept picks, from every output dimension that counts ids, those that stay. This equality is what the removal is
verified by; the example call must use kept ids only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_compress.discovery.tracer import output_tensors, trace
from lightning_compress.discovery.valueless import storage_key
from lightning_compress.surgery.edits import Removal
from lightning_compress.surgery.errors import SurgeryError
from lightning_compress.surgery.verify import Outputs


def new_numbers(removal: Removal) -> Tensor:
    """The new id of every old one, or -1; int64 of shape (units,)."""
    numbers = torch.full((removal.structure.units,), -1, dtype=torch.long)
    numbers[torch.tensor(removal.kept)] = torch.arange(len(removal.kept))
    return numbers


class Renumbering:
    """New ids in the inputs of one example call, and the outputs that answer in them.

    Args:
        model: the model before the removal.
        removals: what goes; only vocabularies matter here.
        args: positional arguments of the example call.
        kwargs: its keyword arguments.

    Raises:
        SurgeryError: if the example uses an id that goes.
    """

    def __init__(
        self, model: nn.Module, removals: Sequence[Removal], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        self._removals = {r.structure.name: r for r in removals if r.structure.kind == "vocab"}
        self._numbers: dict[int, tuple[str, Tensor]] = {}
        if not self._removals:
            return
        tables = {p: r for r in self._removals.values() for p in r.structure.parameters}
        inputs = {storage_key(tensor) for tensor in output_tensors((args, kwargs))}
        for look_up in trace(model, args, kwargs).look_ups:
            if look_up.table in tables and look_up.ids in inputs:
                removal = tables[look_up.table]
                self._numbers[look_up.ids] = (removal.structure.name, new_numbers(removal))
        tree_map(self._renumbered(set(self._removals)), (tuple(args), dict(kwargs)))  # ids that go are refused now

    def inputs(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], gone: Collection[str]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example call in new ids, for the vocabularies among ``gone``."""
        if not self._removals.keys() & set(gone):
            return tuple(args), dict(kwargs)
        new_args, new_kwargs = tree_map(self._renumbered(set(gone)), (tuple(args), dict(kwargs)))
        return new_args, new_kwargs

    def outputs(self, reference: Outputs, small: Outputs, gone: Collection[str]) -> Outputs:
        """``reference`` at the ids that stay, wherever ``small`` has that many in place of all."""
        result = dict(reference)
        for name in self._removals.keys() & set(gone):
            removal = self._removals[name]
            kept = torch.tensor(removal.kept)
            for path, output in result.items():
                if path not in small or small[path].tensor.dim() != output.tensor.dim():
                    continue
                tensor = output.tensor
                for dim, (before, after) in enumerate(zip(tensor.shape, small[path].tensor.shape, strict=True)):
                    if (before, after) == (removal.structure.units, len(removal.kept)) and before != after:
                        tensor = tensor.index_select(dim, kept.to(tensor.device))
                result[path] = replace(output, tensor=tensor)
        return result

    def _renumbered(self, gone: set[str]) -> Any:
        def change(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.is_floating_point():
                return value
            name, numbers = self._numbers.get(storage_key(value), (None, None))
            if numbers is None or name not in gone:
                return value
            ids = value.long()
            inside = (ids >= 0) & (ids < len(numbers))  # ignored labels lie outside
            new = torch.where(inside, numbers.to(ids.device)[ids.clamp(0, len(numbers) - 1)], ids)
            if bool((inside & (new < 0)).any()):
                lost = ids[inside & (new < 0)].unique().tolist()
                raise SurgeryError(
                    f"Expected the example call to use only ids that {name!r} keeps, but it uses {lost[:5]}. Keep "
                    "these, or pass an example out of the corpus that the ids come from."
                )
            return new.to(value.dtype)

        return change


__all__ = ["Renumbering", "new_numbers"]
