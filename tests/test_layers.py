"""The layout of docs/architecture.md, held: imports point down only, and every dependency has its place."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (  # from low to high: a module imports from its own layer and from those before it
    {
        "regularizers",
        "schedules",
        "shards",
        "polynomials",
        "progress",
        "selection",
        "distillation_losses",
        "example_call",
        "quantization_switch",
        "quantizers",
        "timing",
        "token_scores",
        "token_switch",
    },
    {"structures", "plan", "plan_format", "strict_json", "token_policies"},
    {"discovery", "importance", "costs", "unit_groups"},
    {"budget", "surgery", "latency", "tokens", "quantization"},
    {"analysis", "explanation", "report", "export", "saving", "vocabulary", "post_training"},
    {"callbacks"},
)
LAYER_OF = {name: number for number, layer in enumerate(LAYERS) for name in layer}
EXTRAS = {
    "datasets",
    "jinja2",
    "jsonargparse",
    "matplotlib",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "rich",
    "sklearn",
    "tensorboard",
    "tokenizers",
    "tqdm",
    "transformers",
    "wandb",
}


def imports(node: ast.AST, package: list[str], lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """Every imported name in full, and whether it is imported only when a function runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            source = package[: len(package) - child.level + 1] if child.level else []
            yield from ((".".join([*source, *filter(None, [child.module]), alias.name]), lazy) for alias in child.names)
        else:
            yield from imports(child, package, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def violations(path: Path, source: str) -> Iterator[str]:
    """What the module at ``path``, relative to the repository, imports against the rules."""
    own = path.with_suffix("").parts[1]
    if own not in LAYER_OF:
        yield f"{path}: enter the new module {own!r} in LAYERS"
        return
    for name, lazy in imports(ast.parse(source), list(path.parts[:-1])):
        top, *rest = name.split(".")
        if top == "lightning_compress":
            used = rest[0] if rest else "__init__"
            if LAYER_OF.get(used, len(LAYERS)) > LAYER_OF[own]:
                yield f"{path}: {own!r} is below {used!r} and must not import it"
        elif top in {"lightning", "pytorch_lightning", "lightning_fabric"} and own != "callbacks":
            yield f"{path}: lightning is imported under lightning_compress/callbacks/ only"
        elif top in EXTRAS and not lazy:
            yield f"{path}: {top} is an optional extra: import it inside the function that needs it"


MODULES = [p.relative_to(ROOT) for p in sorted((ROOT / "lightning_compress").rglob("*.py"))]


@pytest.mark.parametrize("path", [p for p in MODULES if p != Path("lightning_compress/__init__.py")], ids=str)
def test_imports_point_down(path: Path) -> None:
    assert list(violations(path, (ROOT / path).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("plan.py", "from lightning_compress.budget import make_plan", "'plan' is below 'budget'"),
        ("plan.py", "def f():\n    from .surgery import zero_units", "'plan' is below 'surgery'"),
        ("surgery/core.py", "from ..report import numbers", "'surgery' is below 'report'"),
        ("plan.py", "from lightning_compress import apply_plan", "'plan' is below 'apply_plan'"),
        ("budget.py", "import lightning as L", "under lightning_compress/callbacks/ only"),
        (
            "report/table.py",
            "try:\n    import wandb\nexcept ImportError:\n    wandb = None",
            "wandb is an optional extra",
        ),
        ("novelty.py", "", "enter the new module 'novelty'"),
        ("novelty/core.py", "", "enter the new module 'novelty'"),
    ],
)
def test_a_violation_is_found(path: str, source: str, complaint: str) -> None:
    assert any(complaint in found for found in violations(Path("lightning_compress") / path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("surgery/core.py", "from .slicing import cut\nfrom lightning_compress.plan import PruningPlan\nimport torch"),
        ("callbacks/finalize.py", "import lightning as L\ndef f():\n    import wandb"),
    ],
)
def test_allowed_imports_pass(path: str, source: str) -> None:
    assert list(violations(Path("lightning_compress") / path, source)) == []
