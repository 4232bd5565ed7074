"""Tables on disk: exact round trip, found again only for the same thing, never believed when damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress import LatencyTable, measure_latency_table
from lightning_compress.latency import cache
from tests.latency.fake import CALL, Clock, Stack, proven


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGHTNING_COMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latency"


def table(clock: Clock, model: nn.Module | None = None, call: Any = CALL, **options: Any) -> LatencyTable:
    model = Stack(64, 32) if model is None else model
    return measure_latency_table(model, proven(model), call, measure=clock, **options)


def test_round_trip() -> None:
    made = table(Clock(), cache=False)
    assert LatencyTable.from_json(made.to_json()) == made


def test_a_second_request_measures_nothing(folder: Path) -> None:
    clock = Clock()
    first, second = table(clock), table(clock)
    assert first == second
    assert len(clock.calls) == 1
    assert [path.suffix for path in folder.iterdir()] == [".json"]


def test_the_folder_is_in_the_home_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_COMPRESS_CACHE", raising=False)
    assert cache.cache_folder() == Path.home() / ".cache" / "lightning_compress"


@pytest.mark.parametrize(
    "change",
    [
        lambda m, s: (m, s, (torch.zeros(5, 8),)),
        lambda m, s: (m, s.rebuilt([s[0]]), CALL),
        lambda m, s: (m.double(), s, CALL),
        lambda m, s: (m, s, (*CALL, True)),
        lambda m, s: (setattr(m, "kernel", "other"), (m, s, CALL))[1],
        lambda m, s: (m.append(nn.Identity()) if isinstance(m, nn.Sequential) else _with_child(m), s, CALL),
    ],
    ids=["shape", "structures", "dtype", "argument", "attribute", "module"],
)
def test_the_key_depends_on_what_latency_depends_on(change: Any) -> None:
    model = Stack(64, 32)
    structures = proven(model)
    before = cache.table_key(model, structures, CALL, {})
    assert cache.table_key(model.train(), structures, (torch.ones(4, 8),), {}) == before
    model, structures, call = change(model, structures)
    assert cache.table_key(model, structures, call, {}) != before


def _with_child(model: nn.Module) -> nn.Module:
    model.add_module("more", nn.Identity())
    return model


def test_threads_and_autocast_are_in_the_key() -> None:
    model = Stack(64)
    structures = proven(model)
    before = cache.table_key(model, structures, CALL, {})
    with torch.autocast("cpu", torch.bfloat16):
        assert cache.table_key(model, structures, CALL, {}) != before
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert cache.table_key(model, structures, CALL, {}) != before
    finally:
        torch.set_num_threads(threads)


DAMAGES: list[tuple[Any, str]] = [
    ("", "cannot be parsed"),
    ("{", "cannot be parsed"),
    ("[" * 100_000, "cannot be parsed"),
    ("[]", r"expected the table to be an object"),
    ({"format": "pickle"}, r"expected format to be 'lightning_compress\.latency', but got 'pickle'"),
    ({"version": 2}, "expected version to be 1, but got 2"),
    ({"key": "other"}, "expected the key"),
    ({"key": 3}, "expected key to be a string, but got 3"),
    ({"dense_seconds": 0}, "expected dense_seconds to be a number from"),
    ({"dense_seconds": float("nan")}, "expected every number to be finite, but got 'NaN'"),
    ({"noise": True}, "expected noise to be a number, but got True"),
    ({"rows": {}}, "expected rows to be a list"),
    ({"rows": []}, "expected the structures of this model|expected together"),
    (
        ["rows", 0, "points", [[64, 0.1]]],
        r"expected rows\[0\]\.points\[0\]\[0\] to be an integer from 0 to 63, but got 64",
    ),
    (["rows", 0, "points", [[8, 0.1], [9, 0.1]]], "of a smaller count than the one before"),
    (["rows", 0, "points", [[8]]], "a pair"),
    (["rows", 0, "multiple", 0], r"expected rows\[0\]\.multiple to be an integer from 1 to 64, but got 0"),
    (["rows", 0, "structures", []], "one or more names"),
    (["rows", 1, "structures", ["blocks.0.ffn"]], "to name every structure once"),
    (["together", 0, "latency", -1], r"expected together\[0\]\.latency to be a number from 0 to 1000"),
    (["together", 0, "counts", {}], r"expected together\[0\]\.counts to be an object with the keys"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda value: str(value)[:40])
def test_a_damaged_file_is_ignored_with_a_warning(damage: Any, message: str, folder: Path) -> None:
    clock = Clock()
    made = table(clock)
    (path,) = folder.iterdir()
    data = json.loads(path.read_text())
    if isinstance(damage, dict):
        damage = json.dumps({**data, **damage})
    elif isinstance(damage, list):
        *way, last, value = damage
        inner = data
        for step in way:
            inner = inner[step]
        inner[last] = value
        damage = json.dumps(data)
    path.write_text(damage)
    with pytest.warns(UserWarning, match=f"(?s)is ignored and measured anew, because it is damaged: .*({message})"):
        assert table(clock) == made
    assert len(clock.calls) == 2
    assert table(clock) == made  # and is repaired
    assert len(clock.calls) == 2


def test_a_large_file_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    table(clock)
    monkeypatch.setattr(cache, "LARGEST_FILE", 10)
    with pytest.warns(UserWarning, match="expected at most 10 bytes, but got"):
        table(clock)


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTNING_COMPRESS_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set LIGHTNING_COMPRESS_CACHE to a folder that can be written"):
        assert table(Clock()).rows
