"""Files that were damaged at random, or on purpose: an error that says so, or the very model; never anything else."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_compress.saving import load_compressed, save_compressed
from tests.saving.test_saving import EXAMPLE, Net, cut, resealed

MUTATIONS = 500  # of each test
ODD = [None, True, -1, 0, 1, 3, 10**30, 1.5, "", "x", "../x", "__class__", [], {}, [[]], {"a": 1}, "NaN", 2**40]
FUZZ = settings(
    max_examples=MUTATIONS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = Net()
    cut(model, (1, 4, 6))
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    save_compressed(model, folder)
    return folder


@pytest.fixture(scope="module")
def expected(original: Path) -> torch.Tensor:
    return load_compressed(original, Net)(*EXAMPLE)


def outcome(folder: Path) -> torch.Tensor | str:
    """What the model answers, or the error; anything but a ValueError or a missing file is a failure of the test."""
    try:
        model = load_compressed(folder, Net)
    except (ValueError, FileNotFoundError) as error:
        return f"refused: {error}"
    return model(*EXAMPLE)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values inside nested JSON."""
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += places(child, (*path, key))
    return found


@FUZZ
@given(data=st.data())
def test_bytes_flipped_cut_or_added(original: Path, expected: torch.Tensor, data: st.DataObject) -> None:
    folder = original.parent / "bytes"
    shutil.copytree(original, folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["model.safetensors", "compression.json"]))
    content = bytearray((folder / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "insert", "repeat", "seal"])):
        case "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            del content[at:]
        case "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        case "repeat":
            content += content[at:]
        case "seal":  # damage that the checksum agrees with
            name = "model.safetensors"
            content = bytearray((folder / name).read_bytes())
            content[at % len(content)] ^= 1 << data.draw(st.integers(0, 7))
            resealed(folder, bytes(content))
    (folder / name).write_bytes(bytes(content))
    got = outcome(folder)
    if isinstance(got, torch.Tensor):
        # harmless: white space, a version, or weights that somebody has changed and signed anew
        assert got.shape == expected.shape


@FUZZ
@given(seed=st.integers(0, 2**32 - 1))
def test_values_of_the_manifest_exchanged(original: Path, expected: torch.Tensor, seed: int) -> None:
    folder = original.parent / "values"
    shutil.copytree(original, folder, dirs_exist_ok=True)
    data = json.loads((folder / "compression.json").read_text())
    choose = random.Random(seed)
    path = choose.choice(places(data))
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    match choose.randrange(4):
        case 0:
            parent[path[-1]] = choose.choice(ODD)
        case 1:
            del parent[path[-1]]
        case 2:
            other = choose.choice(places(data))
            value = data
            for key in other:
                value = value[key]
            parent[path[-1]] = value
        case 3:
            parent[path[-1]] = [parent[path[-1]]] * choose.choice([1, 2, 50])
    try:
        text = json.dumps(data)
    except (ValueError, RecursionError):  # a value put inside itself
        return
    (folder / "compression.json").write_text(text)
    got = outcome(folder)
    if isinstance(got, torch.Tensor):  # what is only information has changed: versions, sizes that no removal uses
        assert torch.equal(got, expected)
