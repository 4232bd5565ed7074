"""Every preset and recipe configuration does what its first lines say: the command parses, callbacks add up."""

import inspect
import io
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "callbacks").rglob("*.yaml"))
PARTS = [preset for preset in PRESETS if preset.stem != "compress"]  # which has all of it and needs no other
CONFIGS = sorted((ROOT / "recipes").rglob("*.yaml"))
by_path = {"ids": lambda path: path.relative_to(ROOT).as_posix()}

CliCallbacks = Callable[..., list[Any]]


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def class_paths(preset: Path) -> list[str]:
    return [entry["class_path"].rpartition(".")[2] for entry in load(preset)["trainer"]["callbacks+"]]


def command(path: Path) -> list[str]:
    """The command in the comment at the top of the file, as arguments: ["recipes/NAME.py", ...]."""
    header = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
    assert header, f"{path.name}: expected a comment at the top with the command that runs it"
    lines = [line.removeprefix("#").strip() for line in header[0].splitlines()]
    first = next((n for n, line in enumerate(lines) if line.startswith("python ")), None)
    assert first is not None, (
        f"{path.name}: expected a line with `python recipes/NAME.py ...` in the comment at the top"
    )
    last = next(n for n in range(first, len(lines)) if not lines[n].endswith("\\"))
    return shlex.split(" ".join(line.removesuffix("\\") for line in lines[first : last + 1]))[1:]


def included(part: Any, whole: Any) -> bool:
    """Whether every setting of ``part`` is in ``whole``; callbacks that were added are among those that came out."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(
            any(included(entry, other) for entry in value for other in whole.get("callbacks") or [])
            if key == "callbacks+"
            else key in whole and included(value, whole[key])
            for key, value in part.items()
        )
    return part == whole


def test_there_are_presets_and_configurations() -> None:
    assert {path.stem for path in PRESETS} >= {
        "group_lasso",
        "hoyer_square",
        "block_group_lasso",
        "finalize",
        "distillation",
    }
    assert CONFIGS


@pytest.mark.parametrize("preset", PRESETS, **by_path)
def test_a_preset_makes_its_callbacks(preset: Path, cli_callbacks: CliCallbacks) -> None:
    assert set(load(preset)) == {"trainer"}
    assert set(load(preset)["trainer"]) == {"callbacks+"}, "a plain `callbacks:` would replace those of other files"
    assert [type(callback).__name__ for callback in cli_callbacks(preset)] == class_paths(preset)


@pytest.mark.parametrize(("first", "second"), list(permutations(PARTS, 2)), ids=lambda path: path.stem)
def test_two_presets_add_up(first: Path, second: Path, cli_callbacks: CliCallbacks) -> None:
    made = [type(callback).__name__ for callback in cli_callbacks(first, second)]
    assert made == class_paths(first) + class_paths(second)


def test_the_preset_for_all_of_it_is_the_one_line(cli_callbacks: CliCallbacks) -> None:
    from lightning_compress import compress

    def settings(callback: Any) -> dict[str, Any]:
        names = inspect.signature(type(callback)).parameters
        found = {name: getattr(callback, name) for name in names if hasattr(callback, name)}
        # what a callback makes of its arguments, whose types compare by value
        return found | {
            name: value for name, value in vars(callback).items() if name in ("fraction", "metric", "moment")
        }

    made = cli_callbacks(ROOT / "callbacks" / "compress.yaml")
    expected = compress(macs=0.5, tokens=0.5, weights="int8", activations="int8", backend="auto", at=0.6)
    assert [type(callback) for callback in made] == [type(callback) for callback in expected]
    for one, other in zip(made, expected, strict=True):
        assert len(settings(one)) > 3 and settings(one) == settings(other)


def test_all_presets_add_up(cli_callbacks: CliCallbacks) -> None:
    made = [type(callback).__name__ for callback in cli_callbacks(*PARTS)]
    assert made == [name for preset in PARTS for name in class_paths(preset)]


@pytest.mark.parametrize("config", CONFIGS + PRESETS, **by_path)
def test_the_command_at_the_top_parses(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = command(config)
    assert config.relative_to(ROOT).as_posix() in arguments, "the command must use the file"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*arguments, "--print_config"])
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        runpy.run_path(arguments[0], run_name="__main__")
    assert stop.value.code in (None, 0)
    assert included(load(config), yaml.safe_load(printed.getvalue()))
