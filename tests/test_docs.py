"""Every python and yaml block of the README and of docs/ runs; CONTRIBUTING.md explains the comments that steer it."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

SCANNER = re.compile(
    r"^<!--[ ]test:\s*(?P<comment>.*?)-->[ ]*\n(?P<gap>\s*)"
    r"|^(?P<indent>[ ]*)```(?P<language>[\w+-]*)[^\n]*\n(?P<code>.*?)^(?P=indent)```[ ]*$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    """A block of code: its language, its text, the number of its first line."""

    language: str
    code: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page that are to be run, hidden set-up included, from top to bottom."""
    skip_at = None  # where a block would begin that the comment just read skips
    for match in SCANNER.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        comment = match["comment"]
        if comment is None:
            if match["language"] in ("python", "yaml") and match.start() != skip_at:
                yield Block(match["language"], dedent(match["code"]), line + 1)
        elif re.fullmatch(r"skip because \S.*", comment.strip(), re.DOTALL):
            skip_at = match.end()
        elif comment.startswith("setup\n"):
            yield Block("python", comment.removeprefix("setup\n"), line + 1)
        else:
            raise ValueError(
                f"Expected `test: setup` above lines of code or `test: skip because REASON` at line {line}, "
                f"but got `test: {comment.strip()}`."
            )


def run_python(page: Path, block: Block, names: dict[str, Any]) -> None:
    padding = "\n" * (block.line - 1)  # so that a traceback shows the line of the page
    exec(compile(padding + block.code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli_callbacks: Callable[..., list[Any]]
) -> None:
    monkeypatch.chdir(tmp_path)  # what an example writes
    names: dict[str, Any] = {"__name__": "__example__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language == "python":
            run_python(page, block, names)
            continue
        content = yaml.safe_load(block.code)
        assert content, f"{page.name}, line {block.line}: the yaml block is empty"
        if isinstance(content, dict) and "callbacks+" in content.get("trainer", {}):
            (tmp_path / "block.yaml").write_text(block.code, encoding="utf-8")
            assert len(cli_callbacks(tmp_path / "block.yaml")) == len(content["trainer"]["callbacks+"])


def test_the_readme_has_its_example() -> None:
    code = "\n".join(block.code for block in blocks((ROOT / "README.md").read_text(encoding="utf-8")))
    for name in ("StructuredSparsity", "FinalizeCompression", "Distillation", "trainer.fit(model, datamodule)"):
        assert name in code


def test_blocks_come_in_order_with_their_lines() -> None:
    page = (
        "<!-- test: setup\na = 1\n-->\n\n```python\nb = a\n```\n\n  ```yaml\n  c: 1\n  ```\n\n```bash\nrm -r x\n```\n"
    )
    assert list(blocks(page)) == [("python", "a = 1\n", 2), ("python", "b = a\n", 6), ("yaml", "c: 1\n", 10)]


def test_a_skip_covers_one_block_and_needs_a_reason() -> None:
    page = "<!-- test: skip because it needs a GPU -->\n```python\na\n```\n\n```python\nb\n```\n"
    assert [block.code for block in blocks(page)] == ["b\n"]
    for comment in ("skip", "skip because", "skpi because x"):
        with pytest.raises(ValueError, match=rf"at line 3, but got `test: {comment}`"):
            list(blocks(f"\n\n<!-- test: {comment} -->\n```python\na\n```\n"))


def test_a_broken_example_fails_at_its_line() -> None:
    (block,) = blocks("\n\n```python\nx = 1\nundefined\n```\n")
    with pytest.raises(NameError) as error:
        run_python(Path("page.md"), block, {})
    assert error.traceback[-1].lineno + 1 == 5  # pytest counts from 0
