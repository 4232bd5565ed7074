import torch

from lightning_compress.polynomials import Polynomial
from lightning_compress.structures import AttributeEdit, CoreEdit, Edit, ShimEdit, Slice, Structure
from lightning_compress.surgery.attributes import Candidate
from lightning_compress.surgery.edits import Removal
from lightning_compress.surgery.ways import edited, frozen_shims, harmonised, without_companions

H, QK, VO = (Polynomial.variable(name) for name in ("h", "qk", "vo"))


def way(name: str, tier: str, *edits: Edit, units: int = 4) -> Removal:
    return Removal(Structure(name, "head", units, (), tier=tier, edits=edits), (0,))  # type: ignore[arg-type]


def edits_of(ways: dict[str, Removal]) -> dict[str, tuple[Edit, ...]]:
    return {name: w.structure.edits for name, w in ways.items()}


def test_an_attribute_that_two_structures_change_gets_the_size_that_depends_on_both() -> None:
    core = CoreEdit("m", "heads")
    ways = {
        "vo": way("vo", "native", AttributeEdit("m", "total", H * VO)),
        "h": way("h", "native", core, AttributeEdit("m", "total", H * QK), AttributeEdit("n", "total", H * QK)),
    }
    assert edits_of(harmonised(ways)) == {
        "vo": (AttributeEdit("m", "total", H * VO),),
        "h": (core, AttributeEdit("m", "total", H * VO), AttributeEdit("n", "total", H * QK)),
    }


def test_sizes_that_cannot_be_reconciled_are_left_for_verification_to_judge() -> None:
    ways = {
        "qk": way("qk", "native", AttributeEdit("m", "total", H * QK)),
        "vo": way("vo", "native", AttributeEdit("m", "total", H * VO)),
    }
    assert edits_of(harmonised(ways)) == edits_of(ways)


def test_shimmed_counts_become_constants_everywhere_but_in_the_shimmed_layers() -> None:
    ways = {
        "h": way("h", "native", AttributeEdit("m", "total", H * QK), AttributeEdit("m.q", "out", H * QK)),
        "qk": way("qk", "shim", ShimEdit("m.q", "output", -1), AttributeEdit("m.q", "out", H * QK), units=12),
    }
    assert edits_of(frozen_shims(ways)) == {
        "h": (AttributeEdit("m", "total", 12 * H), AttributeEdit("m.q", "out", H * QK)),
        "qk": (ShimEdit("m.q", "output", -1), AttributeEdit("m.q", "out", H * QK)),
    }


def test_edited_puts_base_and_candidates_together() -> None:
    base = (CoreEdit("m", "heads"),)
    found = Candidate(("c", (), True, "heads", 0), ("a", "b"), "heads", H)
    result = edited(way("h", "shim"), "native", base, [found]).structure
    assert result.tier == "native"
    assert result.edits == (*base, AttributeEdit("a", "heads", H), AttributeEdit("b", "heads", H))


def test_without_companions() -> None:
    table = torch.arange(4).unsqueeze(1)
    pieces = tuple(Slice(role, 0, 4, table, role) for role in ("producer", "companion", "consumer"))  # type: ignore[arg-type]
    assert without_companions(Structure("s", "ffn", 4, pieces)).parameters == ("producer", "consumer")
