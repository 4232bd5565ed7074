"""Which structures of which models can be removed, proven by removing half of them.

    python benchmarks/coverage.py                                  # every family of tests/families.py
    python benchmarks/coverage.py --markdown docs/coverage.md      # and the page about them
    python benchmarks/coverage.py --zoo PATH.py:NAME --only REGEX  # the models of another file

A zoo is a Python file with ``MODELS: dict[str, Example]`` (see tests/zoo.py). Every model runs in a process of its own
with a time limit; ``examination.py`` says what is examined.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.examination import KindVerdict, Verdict, examine

ROOT = Path(__file__).resolve().parents[1]
ZOO = "tests/families.py:MODELS"
COMMAND = "python benchmarks/coverage.py --markdown docs/coverage.md"
TITLES = {
    "head": "heads",
    "qk_dim": "Q/K dims",
    "vo_dim": "V/O dims",
    "ffn": "FFN units",
    "channel": "channels",
    "hidden": "residual width",
}
PAGE_KINDS = tuple(TITLES)
SHOWN = 150  # characters of a reason


def models_of(zoo: str) -> dict[str, Any]:
    """The examples of a zoo file, PATH.py or PATH.py:NAME."""
    path, _, variable = zoo.partition(":")
    file = Path(path).resolve()
    name = file.stem
    if file.is_relative_to(ROOT):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise SystemExit(f"Expected a Python file, but got {path!r}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(file.parent))
    spec.loader.exec_module(module)
    return dict(getattr(module, variable or "MODELS"))


def preload() -> None:
    """Import what every child needs, once, before it is forked."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("torch._dynamo", "safetensors.torch", "transformers.modeling_utils"):
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)


def _child(name: str, example: Any, kinds: Sequence[str] | None, pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pipe.send(examine(example.build, example.args, example.kwargs, name, kinds=kinds).as_dict())
    pipe.close()


def examined(name: str, example: Any, timeout: float, kinds: Sequence[str] | None = None) -> Verdict:
    """The verdict on one model, from a forked process that gets ``timeout`` seconds."""
    context = multiprocessing.get_context("fork")
    mine, other = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, example, kinds, other), daemon=True)
    process.start()
    other.close()
    verdict = Verdict(name, seconds=timeout)
    try:
        if mine.poll(timeout):
            verdict = Verdict.from_dict(mine.recv())
        else:
            verdict.flag("hung", f"no verdict within {timeout:g} s")
    except EOFError:
        process.join(5)
        code = process.exitcode or 0
        died = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        verdict.flag("error", f"the process died ({died})")
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        mine.close()
    return verdict


def line_of(verdict: Verdict) -> str:
    """One verdict as a line."""
    kinds = [f"{name} {k.exact}/{k.found}" for name, k in verdict.kinds.items() if k.found]
    saved = 1 - verdict.after / verdict.before if verdict.before else 0.0
    parts = [
        f"{verdict.name:32s} {' '.join(kinds) or 'nothing found':44s}",
        f"-{saved:5.1%} {verdict.seconds:6.1f} s",
        "" if verdict.error is None else f"{verdict.error:.0e}",
        "complete" if verdict.complete else "smaller" if verdict.smaller else "whole",
        *(flag.upper() for flag in verdict.flags),
    ]
    return " ".join(part for part in parts if part)


def details_of(verdict: Verdict) -> Iterable[str]:
    """Why something was refused, pinned or flagged."""
    for name, kind in verdict.kinds.items():
        yield from (f"    refused {name} x{n}: {reason[:400]}" for reason, n in kind.refused.items())
        yield from (f"    pinned  {name} x{n}: {reason[:200]}" for reason, n in kind.pinned.items())
    yield from (f"    note: {note}" for note in verdict.notes)


def totals_of(verdicts: Iterable[Verdict]) -> str:
    verdicts = list(verdicts)
    count = max(1, len(verdicts))
    flags = {flag: sum(flag in v.flags for v in verdicts) for flag in ("wrong", "half-changed", "hung", "error")}
    return (
        f"{len(verdicts)} models: {sum(v.smaller for v in verdicts) / count:.1%} smaller, "
        f"{sum(v.complete for v in verdicts) / count:.1%} with every structure exact; "
        + ", ".join(f"{flag} {n}" for flag, n in flags.items())
    )


# --------------------------------------------------------------------------------------------------------- the page


def cell(kind: KindVerdict | None) -> str:
    """What became of one kind in one family."""
    if kind is None:
        return "–"
    parts = []
    if kind.exact:
        shim = "" if not kind.shim else " by shim" if kind.shim == kind.exact else f", {kind.shim} by shim"
        parts.append(f"exact ({kind.exact}{shim})")
    if kind.refused:
        parts.append(f"refused ({sum(kind.refused.values())})")
    if not parts and any(not _ends(reason) for reason in kind.pinned):
        parts.append(f"whole ({sum(n for reason, n in kind.pinned.items() if not _ends(reason))})")
    return ", ".join(parts) or "–"


def _ends(reason: str) -> bool:
    """Whether a family is whole merely because it is the model's own input or output."""
    return reason in ("it is returned by the model", "it is a dimension of the model's input")


def columns_of(verdicts: Iterable[Verdict]) -> list[str]:
    """Kinds that are found anywhere, the usual ones first."""
    kinds = dict.fromkeys(TITLES)
    for verdict in verdicts:
        kinds |= dict.fromkeys(name for name, kind in verdict.kinds.items() if kind.found)
    return list(kinds)


def row_of(verdict: Verdict, columns: Iterable[str]) -> list[str]:
    """One family in the table; the last cell is the only one with a figure that rounding decides."""
    saved = 1 - verdict.after / verdict.before if verdict.before else 0.0
    return [
        verdict.name,
        *(cell(verdict.kinds.get(kind)) for kind in columns),
        ", ".join(verdict.flags) or f"{saved:.1%}",
        "–" if verdict.error is None else f"{verdict.error:.0e}",
    ]


def shortened(reason: str) -> str:
    """A reason without the path of the module, and not too long."""
    reason = re.sub(r"\((\w+) in [^()]*\)", r"(`\1`)", reason)
    reason = re.sub(r"(buffer) \S+", lambda match: f"{match[1]} `{match[0].rpartition('.')[2]}`", reason)
    return reason if len(reason) <= SHOWN else f"{reason[:SHOWN].rstrip()} …"


def reasons_of(verdicts: Iterable[Verdict], which: str) -> Iterable[str]:
    """Lines "kind: reason (families)" for what was "refused" or "pinned"."""
    families: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts:
        for name, kind in verdict.kinds.items():
            for reason in getattr(kind, which):
                families.setdefault((name, shortened(reason)), []).append(verdict.name)
    for (name, reason), names in sorted(families.items()):
        names = list(dict.fromkeys(names))
        shown = ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:6])} and {len(names) - 6} more"
        yield f"- {TITLES.get(name, name)}: {reason} ({shown})"


def page_of(verdicts: Sequence[Verdict]) -> str:
    """docs/coverage.md."""
    columns = columns_of(verdicts)
    header = ["family", *(TITLES.get(kind, kind) for kind in columns), "parameters saved", "largest error"]
    rows = [header, ["---"] * len(header), *(row_of(verdict, columns) for verdict in verdicts)]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return f"""# Coverage

Written by `{COMMAND}` ({versions}); a test holds the table.

Tiny random models of many families, in float64. In each, half of all units that discovery finds free are zeroed in one
copy and removed from another. The two must return the same on the batch that was traced, on a second one, after an Adam
step on both, and after the smaller one was saved and rebuilt from its plan. The library has no code for any of these
families.

- *exact (n)*: n structures removed, outputs equal. *By shim*: between the cut weights a gather or scatter keeps the
  original width.
- *refused (n)*: found free, but no way to remove them was verified. *whole (n)*: pinned by discovery. Reasons: below.
- Residual width is compared with a model whose norms leave the removed positions out.
- *–*: there is nothing of the kind, or only the model's own input and output.

{chr(10).join(f"| {' | '.join(row)} |" for row in rows)}

{totals_of(verdicts)}.

## Refused

{chr(10).join(reasons_of(verdicts, "refused")) or "Nothing."}

## Whole, and why

{chr(10).join(reasons_of(verdicts, "pinned"))}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", default=str(ROOT / ZOO), help="PATH.py[:NAME] (default: the families of the tests)")
    parser.add_argument("--only", default="", help="models whose name matches this regular expression")
    parser.add_argument(
        "--kinds",
        nargs="+",
        help="kinds of structures (default: those that discover looks for; on the page residual width, too)",
    )
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one model (default: 120)")
    parser.add_argument("--json", type=Path, help="write every verdict here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--quiet", action="store_true", help="no reasons below the lines")
    parser.add_argument("--here", action="store_true", help="in this process, without a time limit, to debug")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    preload()
    models: Mapping[str, Any] = models_of(options.zoo)
    kinds = options.kinds or (PAGE_KINDS if options.markdown else None)
    verdicts: list[Verdict] = []
    started = time.perf_counter()
    for name, example in models.items():
        if not re.search(options.only, name):
            continue
        if options.here:
            verdict = examine(example.build, example.args, example.kwargs, name, kinds=kinds)
        else:
            verdict = examined(name, example, options.timeout, kinds)
        verdicts.append(verdict)
        print(line_of(verdict), flush=True)
        if not options.quiet:
            print(*details_of(verdict), sep="\n", end="\n" if [*details_of(verdict)] else "", flush=True)
        if options.json:
            options.json.write_text(json.dumps([v.as_dict() for v in verdicts], indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(page_of(verdicts), encoding="utf-8")
    print(totals_of(verdicts), f"({time.perf_counter() - started:.0f} s)")


__all__ = ["KindVerdict", "Verdict", "examine", "examined", "line_of", "models_of", "totals_of"]

if __name__ == "__main__":
    main()
