"""The search for a way to remove: every attempt is compared with the zeroed model, in float64, and rolled back.

    reference = outputs of the model with the units zeroed
    attempt   = outputs of the model with the units cut out and some edits made
    a way     = the first edits with max |attempt - reference| / max(1, max |reference|) <= tolerance

Attempts run on the innermost module that holds the structure, with the inputs that it had in the reference run; what
was found is confirmed on the whole model, all structures together. While a way of one structure is looked for, those
that share weights or sizes with it are whole: among silent dims, another number of heads may compute the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lightning_compress.progress import Progress, phase, quiet
from lightning_compress.structures import CoreEdit, Edit, ShimEdit, Slice, Structure, Tier, named_tensors, owner_path
from lightning_compress.surgery.attributes import (
    Candidate,
    anchor,
    candidates,
    core_edits,
    is_inside,
    selections,
)
from lightning_compress.surgery.depth import KIND as LAYER
from lightning_compress.surgery.depth import find_layer
from lightning_compress.surgery.edits import Removal, faced_side, install, module_edits, outside, shim_dim, zeroed_axes
from lightning_compress.surgery.modules import container_of
from lightning_compress.surgery.precision import (
    add_noise,
    add_tiled,
    read_positions,
    to_double,
    write_positions,
    zero_positions,
)
from lightning_compress.surgery.renumber import Renumbering
from lightning_compress.surgery.shim import Side
from lightning_compress.surgery.silence import silence
from lightning_compress.surgery.transaction import Transaction
from lightning_compress.surgery.verify import Mismatch, Outputs, Rehearsal, difference, flatten
from lightning_compress.surgery.ways import Found, edited, frozen_shims, harmonised, only_carried, without_companions

# Forward passes that the search for the attributes of one structure may take, per place where it looks.
ATTEMPTS = 64
# A way with a larger error than this is taken only if no other is better: rounding in float64 is smaller.
EXACT = 1e-11
NO_INFLUENCE = "its weights do not influence the outputs of the traced call, so that nothing can be verified"


@dataclass(frozen=True)
class Call:
    """What a module was called with in the reference run, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Outputs


@dataclass
class _Family:
    """Look-alike structures: the way that was found last, and why the others do not go."""

    found: Found | None = None
    refusals: Counter[str] = field(default_factory=Counter)


class Workbench:
    """Attempts at the removal of units from one model, which must be in double precision (``DoubleWeights``).

    Args:
        rehearsal: of the model.
        model: the model.
        structures: all structures that are known of it.
        removals: those that lose units; of each only what lies outside removed layers and experts.
        args: positional arguments of the example call.
        kwargs: its keyword arguments.
        tolerance: largest error that counts as equal.
        progress: shows the structures whose ways are looked for.
    """

    def __init__(
        self,
        rehearsal: Rehearsal,
        model: nn.Module,
        structures: Iterable[Structure],
        removals: Sequence[Removal],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        tolerance: float,
        progress: Progress = quiet,
    ) -> None:
        self.model = model
        self._rehearsal = rehearsal
        self.structures = {s.name: s for s in structures}
        removals = outside(removals)
        self.removals = {r.structure.name: r for r in removals}
        self.counts = {s.name: float(s.units) for s in self.structures.values()}
        self.tolerance = tolerance
        self._progress = progress
        self.modules = dict(model.named_modules())
        self.tensors = named_tensors(model)
        self._owners: dict[int, list[str]] = {}
        for path, module in self.modules.items():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                self._owners.setdefault(id(tensor), []).append(path)
        self._args, self._kwargs = tuple(args), dict(kwargs)
        self._calls: dict[str, Call] = {}
        self._trusted: dict[str, bool] = {}
        self._unread_by_kind: dict[tuple[Any, ...], frozenset[str]] = {}
        self.hints: dict[str, Structure] = {}  # container of a stack -> a layer of it whose way is known

        self._renumbering = Renumbering(model, removals, args, kwargs)
        loose = {p.parameter for r in removals for p in r.structure.slices if p.zero and not self._sides(p)}
        self._unzeroed = {name: self.tensors[name].data.clone() for name in loose}
        self._near = {name: self._near_of(r.structure) for name, r in self.removals.items()}
        shared = set().union(*self._near.values())
        self._values = {n: read_positions(self.tensors, zeroed_axes([self.removals[n]])) for n in sorted(shared)}
        zero_positions(self.tensors, zeroed_axes(removals))
        self._stale = False
        with silence(self.modules, removals):
            self.reference = self._watched_run({self._place(r.structure) for r in removals if r.structure.tier is None})

    # Runs

    def _watched_run(self, anchors: set[str]) -> Outputs:
        """Outputs of the whole model; the first call of every anchor is kept."""
        handles = []
        inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        for path in anchors - {""}:

            def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                if path not in inputs:
                    inputs[path] = to_double((args, kwargs))  # a copy: the forward may write into its inputs

            def after(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                if path not in self._calls:
                    outputs = {k: replace(o, tensor=o.tensor.clone()) for k, o in flatten(output).items()}
                    self._calls[path] = Call(*inputs[path], outputs)

            module = self.modules[path]
            handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(after, with_kwargs=True))
        try:
            return self._rehearsal.reference(self._args, self._kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _compare(self, path: str, gone: Collection[str] = ()) -> float:
        """Error of the model as it is now at the anchor ``path``, "" for the whole model.

        What is to go is silent, except for the structures ``gone``, which are no longer there.
        """
        with silence(self.modules, (r for name, r in self.removals.items() if name not in gone)):
            if not path:
                args, kwargs = self._renumbering.inputs(self._args, self._kwargs, gone)
                outputs = self._rehearsal.run(self.model, args, kwargs)
                return difference(self._renumbering.outputs(self.reference, outputs, gone), outputs)
            call = self._calls[path]
            return difference(call.outputs, self._rehearsal.run(self.modules[path], call.args, call.kwargs))

    def _place(self, structure: Structure) -> str:
        """The innermost module around ``structure`` that can be called at all: a list of modules cannot."""
        path = "" if structure.kind == "vocab" else anchor(structure)  # ids are those of the whole model's call
        while path and type(self.modules[path]).forward is nn.Module.forward:
            path = owner_path(path)
        return path

    def _place_to_try(self, structure: Structure) -> str:
        """The innermost module around ``structure`` if it can be run alone, else the whole model."""
        path = self._place(structure)
        if path not in self._calls or not self._calls[path].outputs:
            return ""
        if path not in self._trusted:
            try:
                self._trusted[path] = self._compare(path) <= self.tolerance
            except Exception:  # whatever goes wrong in foreign code: the module cannot be run alone
                self._trusted[path] = False
            if self._trusted[path]:
                unread = self._unread(path)
                call = self._calls[path]
                outputs = {key: output for key, output in call.outputs.items() if key not in unread}
                self._calls[path] = replace(call, outputs=outputs)
        return path if self._trusted[path] else ""

    def _unread(self, path: str) -> frozenset[str]:
        """Outputs of the module ``path`` and its kind that nothing reads (attention weights, often).

        A removal may change them. They are those that can be spoilt in all these modules together without a trace in
        what the model returns.
        """
        keys = [key for key, output in self._calls[path].outputs.items() if output.tensor.is_floating_point()]
        kind = (type(self.modules[path]), *keys)
        if kind not in self._unread_by_kind:
            unread = {key for key in keys[1:] if not self._is_read(type(self.modules[path]), key)}
            self._unread_by_kind[kind] = frozenset(unread)
        return self._unread_by_kind[kind]

    def _is_read(self, kind: type[nn.Module], key: str) -> bool:
        def spoil(module: nn.Module, args: Any, output: Any) -> None:
            tensor = flatten(output)[key].tensor
            tensor.add_(torch.linspace(1, 2, tensor.numel(), dtype=tensor.dtype, device=tensor.device).view_as(tensor))

        handles = [self.modules[path].register_forward_hook(spoil) for path in self._calls_of(kind)]
        try:
            return self._compare("") > self.tolerance
        except Exception:  # it cannot be spoilt, or foreign code noticed
            return True
        finally:
            for handle in handles:
                handle.remove()

    def _calls_of(self, kind: type[nn.Module]) -> list[str]:
        return [path for path in self._calls if type(self.modules[path]) is kind]

    def error_of(self, removals: Sequence[Removal], path: str = "") -> float:
        """Error with ``removals`` carried out, then rolled back; raises what the forward or the edits raise."""
        if not path:
            self._renew("")
        names = {r.structure.name for r in removals}
        bystanders = [s for s in self.structures.values() if s.name not in names]
        transaction = Transaction(self._touched([*removals, *(self.removals[n] for n in names)]))
        try:
            self._unzero(removals)
            install(self.modules, removals, self.tensors, bystanders, gradients=False)
            return self._compare(path, names)
        finally:
            transaction.rollback()

    def _unzero(self, removals: Sequence[Removal]) -> None:
        """Give tensors their values back that ``removals`` leave whole although their structure was found with them."""
        now = {r.structure.name: r for r in removals}
        whole = {
            piece.parameter
            for name, removal in now.items()
            for piece in self.removals[name].structure.slices
            if piece.zero and piece not in removal.structure.slices and piece.parameter in self._unzeroed
        }
        zeroed = zeroed_axes({**self.removals, **now}.values())
        for name in whole:
            self.tensors[name].data = self._unzeroed[name].clone()
        zero_positions(self.tensors, {place: positions for place, positions in zeroed.items() if place[0] in whole})

    def _touched(self, removals: Sequence[Removal]) -> list[nn.Module]:
        """The modules that carrying out ``removals`` changes."""
        parameters = {id(self.tensors[p]) for r in removals for p in r.structure.parameters}
        paths = {path for identity in parameters for path in self._owners.get(identity, ())}
        paths |= {owner_path(f"{path}.") for path in paths}  # a parametrized layer knows its sizes, too
        paths |= {edit.module for r in removals for edit in r.structure.edits}
        paths |= {norm.module for r in removals for norm in r.structure.norms}
        # a new core changes its output projection, too
        cores = {e.module for r in removals for e in r.structure.edits if isinstance(e, CoreEdit)}
        paths |= {path for path in self.modules if any(is_inside(path, core) for core in cores)}
        # a removed module leaves its container, whose other members may be numbered anew
        for edit in (e for r in removals for e in module_edits([r])):
            outer = container_of(edit.module)
            paths |= {path for path in self.modules if is_inside(path, outer)} if edit.numbers else {outer}
        return [self.modules[path] for path in paths if path in self.modules]

    def attempt(self, removals: Sequence[Removal], path: str = "") -> str | None:
        """None if ``removals`` leave the outputs equal, else the reason in words."""
        outcome = self._outcome(removals, path)
        return None if isinstance(outcome, float) else outcome

    def _outcome(self, removals: Sequence[Removal], path: str, limit: float | None = None) -> float | str:
        """The error of ``removals`` if it is within ``limit`` (the tolerance), else the reason in words."""
        try:
            error = self.error_of(removals, path)
        except Mismatch as mismatch:
            return str(mismatch)
        except Exception as failure:  # the user's forward may raise anything when sizes do not fit
            return f"{type(failure).__name__}: {' '.join(str(failure).split())[:160]}"
        within = error <= (self.tolerance if limit is None else limit)
        return error if within else f"the outputs differ by {error:.1e}"

    def influences(self, structure: Structure, path: str) -> bool:
        """Whether the weights that silence the units of ``structure`` have a say in what the module ``path`` returns.

        A layer does where passing it by changes anything.

        All units are asked together: a single one may be dead on the example, and removing it is none the worse for
        that.
        """
        if not path:
            self._renew("")
        if structure.kind == LAYER:
            return self._compare(path, {structure.name}) > self.tolerance
        saved = {piece.parameter: self.tensors[piece.parameter].data for piece in structure.slices if piece.zero}
        if not saved:
            return True  # nothing makes its units silent; they are compared as they are
        noise = torch.randn(127, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        try:
            for name, data in saved.items():
                changed = data.clone()
                if data.dtype == torch.bool:
                    changed = ~changed
                else:
                    add_tiled(noise.to(data.device), changed)
                self.tensors[name].data = changed
            return self._compare(path) > self.tolerance
        except Exception:  # it makes a difference to foreign code, too
            return True
        finally:
            for name, data in saved.items():
                self.tensors[name].data = data

    # The search

    def _near_of(self, structure: Structure) -> frozenset[str]:
        """The other removals that share weights or sizes with ``structure``."""
        weights = set(structure.parameters)
        counted = set().union(*(size.variables for size in structure.sizes))
        return frozenset(
            name
            for name, removal in self.removals.items()
            if name != structure.name and (name in counted or not weights.isdisjoint(removal.structure.parameters))
        )

    @contextmanager
    def _alone(self, structure: Structure, place: str) -> Iterator[None]:
        """Context in which what shares weights or sizes with ``structure`` is whole, in the reference too.

        It stays silent where the module ``place`` does not bear it whole.
        """
        near = self._near.get(structure.name, frozenset())
        before = (self.removals, self.reference, self._calls)
        alone = {name: removal for name, removal in self.removals.items() if name not in near}
        if near:
            for name in near:
                write_positions(self.tensors, self._values[name])
            zero_positions(self.tensors, zeroed_axes(alone.values()))
            self.removals, self._calls, self._stale = alone, dict(self._calls), True
            try:
                self._renew(place)
            except Exception:  # foreign code, or NaN
                self._silent_again(*before)
        try:
            yield
        finally:
            if self.removals is alone:
                inputs = self._calls.get(place)
                self._silent_again(*before)
                if inputs is not None and inputs.args is not self._calls[place].args:
                    with suppress(Exception):  # the inputs that were found to say more, see _enlivened
                        self._calls[place] = self._answered(place, inputs)

    def _silent_again(self, removals: dict[str, Removal], reference: Outputs, calls: dict[str, Call]) -> None:
        zero_positions(self.tensors, zeroed_axes(removals.values()))
        self.removals, self.reference, self._calls, self._stale = removals, reference, calls, False

    def _renew(self, place: str) -> None:
        """Bring the reference of ``place`` up to date; that of the whole model only when it is asked for."""
        if place and place in self._calls:
            call = self._calls[place]
            new = self._answered(place, call)
            if difference(new.outputs, new.outputs) == 0:
                self._calls[place] = new
            return
        if self._stale:
            with silence(self.modules, self.removals.values()):
                self.reference = self._rehearsal.reference(self._args, self._kwargs)
            self._stale = False

    def _answered(self, place: str, call: Call) -> Call:
        """``call`` with the outputs that the module ``place`` returns now."""
        with silence(self.modules, self.removals.values()):
            outputs = self._rehearsal.run(self.modules[place], call.args, call.kwargs)
        return replace(call, outputs={key: output for key, output in outputs.items() if key in call.outputs})

    def find(self, removal: Removal) -> Found | str:
        """The first way in which ``removal`` goes alone, or the reasons why none does."""
        place = self._place_to_try(removal.structure)
        with self._alone(removal.structure, place):
            return self._find(removal, place)

    def _find(self, removal: Removal, place: str) -> Found | str:
        if not self.influences(removal.structure, place) and not self._enlivened(removal.structure, place):
            return self._find_silent(removal, place)
        if removal.structure.kind == "expert":
            return self._find_experts(removal, place)
        native = self._find_native(removal, place)
        if isinstance(native, Found):
            return native
        shim = self._find_shim(removal, place)
        return shim if isinstance(shim, Found) else f"native removal: {native}; scatter/gather shim: {shim}"

    def _enlivened(self, structure: Structure, place: str) -> bool:
        """Whether ``structure`` influences the module ``place`` on other inputs than those of the example.

        Its inputs may all be equal or zero (the queries that a decoder starts from). The module is then compared on
        perturbed inputs from now on.
        """
        if not place:
            return False
        before = self._calls[place]
        args, kwargs = add_noise((before.args, before.kwargs))
        try:
            with silence(self.modules, self.removals.values()):
                outputs = self._rehearsal.run(self.modules[place], args, kwargs)
            outputs = {key: output for key, output in outputs.items() if key in before.outputs}
            self._calls[place] = Call(args, kwargs, outputs)
            if difference(outputs, outputs) == 0 and self.influences(structure, place):
                return True
        except Exception:  # foreign code, and inputs that it does not expect
            pass
        self._calls[place] = before
        return False

    def _find_silent(self, removal: Removal, place: str) -> Found | str:
        """A removal that is exact whatever the inputs are: zeros in the place of rows that are zero.

        Where all slices make units whose silence means that they are zero, scattering the output of the smaller layer
        into zeros is what the zeroed layer computes. No influence is needed to know that.
        """
        structure = without_companions(removal.structure)
        edits = self._shim_edits(structure)
        if (
            isinstance(edits, str)
            or any(edit.side == "input" for edit in edits)
            or not all(piece.zero for piece in structure.slices)
        ):
            return NO_INFLUENCE
        found = self._find_shim(replace(removal, structure=structure), place)
        return found if isinstance(found, Found) else NO_INFLUENCE

    def as_like(self, found: Found, removal: Removal) -> Removal | None:
        """``removal`` in the way that was found for a look-alike, or None where it has no such candidates."""
        assert found.structure.tier is not None
        if found.structure.tier == "shim":
            parts = len(found.structure.slices)
            alike = [s for s in self._shim_variants(removal.structure) if len(s.slices) == parts]
            removal = replace(removal, structure=alike[0] if alike else removal.structure)
            base: tuple[Edit, ...] | str = self._shim_edits(removal.structure)
            if isinstance(base, str):
                return None
        else:
            base = core_edits(removal.structure, self.modules)
        chosen: list[Candidate] = []
        for holders in (False, True):
            if any(("." in key[3]) == holders for key in found.keys):
                mine = {c.key: c for c in candidates(removal, self.modules, self.counts, holders=holders)}
                wanted = [key for key in found.keys if ("." in key[3]) == holders]
                if any(key not in mine for key in wanted):
                    return None
                chosen += [mine[key] for key in wanted]
        return edited(removal, found.structure.tier, base, chosen)

    def _find_native(self, removal: Removal, place: str) -> Found | str:
        base = core_edits(removal.structure, self.modules)
        plain = candidates(removal, self.modules, self.counts)
        inner = [c for c in plain if all(is_inside(path, place) for path in c.modules)]
        pools = [(place, inner, ATTEMPTS)]
        if len(inner) < len(plain):
            pools.append(("", plain, ATTEMPTS // 4))
        deep = candidates(removal, self.modules, self.counts, holders=True)
        if deep:
            local = all(is_inside(path, place) for c in deep for path in c.modules)
            pools.append((place if local else "", inner + deep, ATTEMPTS // 2))
        if place:  # what the module returns may be read by weights of the structure itself, outside of the module
            pools.append(("", inner, ATTEMPTS // 8))
        return self._search(removal, "native", base, pools)

    def _find_experts(self, removal: Removal, place: str) -> Found | str:
        """Natively, with all counts beside the weights where that works: another kernel may read those it spares now.

        There is no shim: a score of zero is no removal.
        """
        owners = {owner_path(piece.parameter) for piece in removal.structure.slices}
        beside = [c for c in candidates(removal, self.modules, self.counts) if owners.issuperset(c.modules)]
        if beside:
            way = edited(removal, "native", (), beside)
            if self.attempt([way], place) is None:
                return Found(way.structure, tuple(c.key for c in beside))
        return self._find_native(removal, place)

    def _find_shim(self, removal: Removal, place: str) -> Found | str:
        reasons = []
        for structure in self._shim_variants(removal.structure):
            base = self._shim_edits(structure)
            if isinstance(base, str):
                reasons.append(base)
                continue
            shimmed = {edit.module for edit in base}
            trial = replace(removal, structure=structure)
            own = [c for c in candidates(trial, self.modules, self.counts) if all(m in shimmed for m in c.modules)]
            found = self._search(trial, "shim", base, [(place, own, ATTEMPTS // 4)])
            if isinstance(found, Found):
                return found
            reasons.append(found)
        return reasons[0]

    def _shim_variants(self, structure: Structure) -> list[Structure]:
        """What of ``structure`` a shim may cut: everything, its weights, its weights in layers; no part twice."""
        variants = [structure, without_companions(structure)]
        variants += [only_carried(variant, lambda piece: bool(self._sides(piece))) for variant in variants]
        return [v for v in dict.fromkeys(variants) if any(piece.zero for piece in v.slices)]

    def _sides(self, piece: Slice) -> tuple[Side, ...]:
        """Sides of the layer around ``piece`` that carry its units; none if it belongs to no layer."""
        module = self.modules[owner_path(piece.parameter)]
        nested = any(name != "parametrizations" for name, _ in module.named_children())
        if nested or isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            return ()
        return faced_side(module, piece)

    def _shim_edits(self, structure: Structure) -> tuple[ShimEdit, ...] | str:
        edits: dict[ShimEdit, None] = {}
        for piece in structure.slices:
            sides = self._sides(piece)
            if not sides:
                return f"{piece.parameter!r} belongs to no layer whose output or input carries the units"
            own = owner_path(piece.parameter)
            # a parameter that several modules share is cut for all of them
            sharers = (p.partition(".parametrizations")[0] for p in self._owners[id(self.tensors[piece.parameter])])
            for path in dict.fromkeys((own, *sharers)):
                if type(self.modules[path]) is not type(self.modules[own]):
                    return f"{piece.parameter!r} is shared by layers of different classes"
                for side in sides:
                    edits.setdefault(ShimEdit(path, side, shim_dim(self.modules[path])))
        return tuple(edits)

    def _search(
        self, removal: Removal, tier: Tier, base: tuple[Edit, ...], pools: Sequence[tuple[str, list[Candidate], int]]
    ) -> Found | str:
        reasons: Counter[str] = Counter()
        tried: set[tuple[str, frozenset[Candidate]]] = set()
        inexact: Found | None = None
        for place, pool, limit in pools:
            for selection in selections(pool, limit):
                if (place, frozenset(selection)) in tried:
                    continue
                tried.add((place, frozenset(selection)))
                error = self._outcome([edited(removal, tier, base, selection)], place)
                if isinstance(error, str):
                    reasons[error] += 1
                    continue
                if error > EXACT and inexact is not None:
                    continue
                needed = list(selection)
                for candidate in selection:
                    fewer = [c for c in needed if c is not candidate]
                    outcome = self._outcome([edited(removal, tier, base, fewer)], place, max(error, EXACT))
                    if isinstance(outcome, float):
                        needed = fewer
                way = edited(removal, tier, base, needed)
                if place and self._shared_beyond(removal.structure, place):
                    beyond = self.attempt([way])
                    if beyond is not None:
                        reasons[beyond] += 1
                        continue
                found = Found(way.structure, tuple(c.key for c in needed))
                if error <= EXACT:
                    return found
                inexact = found
        return inexact or f"{reasons.most_common(1)[0][0]} ({sum(reasons.values())} attempts)"

    def _shared_beyond(self, structure: Structure, place: str) -> bool:
        """Whether a module outside ``place`` shares a tensor of ``structure``, which a run of ``place`` cannot see."""
        touched = {id(self.tensors[name]) for name in structure.parameters}
        return any(id(tensor) in touched and not is_inside(name, place) for name, tensor in self.tensors.items())

    # All structures together

    def resolve(self) -> tuple[dict[str, Removal], dict[str, str]]:
        """Ways of all removals that work together, and the reasons for those without one."""
        ways = {name: r for name, r in self.removals.items() if r.structure.tier is not None}
        failures: dict[str, str] = {}
        groups: dict[Any, list[tuple[_Family, Removal]]] = {}
        for removal in self.removals.values():
            if removal.structure.tier is None and removal.structure.kind != LAYER:
                group = groups.setdefault(self._signature(removal.structure), [])
                group.append((group[0][0] if group else _Family(), removal))
        unknown = [member for group in groups.values() for member in group]
        for family, removal in self._progress(unknown, "ways of removal") if unknown else ():
            self._resolve_member(family, removal, ways, failures)
        ways = harmonised(ways)
        if ways and not self._fit_together(list(ways.values())):
            self._resolve_one_by_one(ways, failures)
        self._resolve_layers(ways, failures)
        return frozen_shims(ways), failures

    def _fit_together(self, ways: Sequence[Removal]) -> bool:
        with phase(self._progress, "removal of all together"):
            return self.attempt(ways) is None

    def _resolve_layers(self, ways: dict[str, Removal], failures: dict[str, str]) -> None:
        """Add the layers, one after the other, behind everything else."""
        known: dict[str, Structure] = {}
        layers = [r for r in self.removals.values() if r.structure.kind == LAYER and r.structure.tier is None]
        for removal in self._progress(layers, "layers") if layers else ():
            structure, name = removal.structure, removal.structure.name
            if not self.influences(structure, ""):
                failures[name] = NO_INFLUENCE
                continue
            stack = container_of(structure.members[0])
            hint = known.get(stack, self.hints.get(stack))
            found = find_layer(self, removal, list(ways.values()), hint)
            if isinstance(found, str):
                failures[name] = found
            else:
                known[stack] = found
                ways[name] = replace(removal, structure=found)

    def _resolve_member(
        self, family: _Family, removal: Removal, ways: dict[str, Removal], failures: dict[str, str]
    ) -> None:
        name, found = removal.structure.name, family.found
        way = None if found is None else self.as_like(found, removal)
        if found is not None and way is not None:
            # where the first of them could be run alone, so can this one
            local = self._place(removal.structure) if self._place_to_try(found.structure) else ""
            if self.influences(removal.structure, local if local in self._calls else ""):
                ways[name] = way
                return
        if family.refusals and max(family.refusals.values()) > 1:  # look-alikes failed alike: the others would, too
            failures[name] = family.refusals.most_common(1)[0][0]
            return
        result = self.find(removal)
        if isinstance(result, Found):
            family.found = result
            ways[name] = replace(removal, structure=result.structure)
        else:
            failures[name] = result
            family.refusals[result] += result != NO_INFLUENCE

    def _resolve_one_by_one(self, ways: dict[str, Removal], failures: dict[str, str]) -> None:
        """Add structures one after the other; one that does not fit gets another way, or goes to ``failures``."""
        pending = dict(ways)
        accepted: dict[str, Removal] = {}
        for name, way in self._progress(pending.items(), "removal one by one"):
            reason = self.attempt(list(harmonised({**accepted, name: way}).values()))
            if reason is not None:
                reason, way = self._other_way(way, accepted, reason)
            if reason is None:
                accepted[name] = way
            else:
                failures[name] = reason
        ways.clear()
        ways.update(harmonised(accepted))

    def _other_way(self, way: Removal, accepted: dict[str, Removal], reason: str) -> tuple[str | None, Removal]:
        if way.structure.kind == LAYER:
            layer = find_layer(self, way, list(accepted.values()), None)
            if isinstance(layer, str):
                return f"it does not fit together with the other structures: {layer}", way
            return None, replace(way, structure=layer)
        given = self.removals.get(way.structure.name, way)
        bare = replace(given, structure=replace(given.structure, tier=None, edits=()))
        place = self._place_to_try(bare.structure)
        # its edits may come from elsewhere, from a look-alike: look for them here, too
        searches: list[Callable[[Removal, str], Found | str]] = [self._find_native, self._find_shim]
        for search in searches:
            with self._alone(bare.structure, place):
                found = search(bare, place)
            if isinstance(found, str):
                continue
            other = replace(bare, structure=found.structure)
            if self.attempt(list(harmonised({**accepted, way.structure.name: other}).values())) is None:
                return None, other
        return f"it does not fit together with the other structures: {reason}", way

    def _signature(self, structure: Structure) -> Any:
        variables: dict[str, str] = {structure.name: "own"}
        for size in structure.sizes:
            for key, _ in size:
                for name in key:
                    variables.setdefault(name, f"v{len(variables)}")
        sizes = tuple(
            tuple(sorted((tuple(sorted(variables[n] for n in key)), c) for key, c in size)) for size in structure.sizes
        )
        pieces = tuple(
            (p.axis, p.size, p.role, p.zero, tuple(p.indices.shape), type(self.modules[owner_path(p.parameter)]))
            for p in structure.slices
        )
        return structure.kind, structure.units, pieces, sizes
