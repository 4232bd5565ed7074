"""Which structures of which models can be removed, proven by removing half of them.

    python benchmarks/coverage.py                                  # every family
    python benchmarks/coverage.py --zoo PATH.py:NAME --only REGEX  # the models of another file

A zoo is a Python file with ``MODELS: dict[str, Example]`` (see tests/zoo.py). Every model runs in a process of its own
with a time limit; ``examination.py`` says what is examined.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.examination import KindVerdict, Verdict, examine

ROOT = Path(__file__).resolve().parents[1]
ZOO = "tests/zoo.py:MODELS"


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


def _child(name: str, example: Any, pipe: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    pipe.send(examine(example.build, example.args, example.kwargs, name).as_dict())
    pipe.close()


def examined(name: str, example: Any, timeout: float) -> Verdict:
    """The verdict on one model, from a forked process that gets ``timeout`` seconds."""
    context = multiprocessing.get_context("fork")
    mine, other = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, example, other), daemon=True)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", default=str(ROOT / ZOO), help="PATH.py[:NAME] (default: the families of the tests)")
    parser.add_argument("--only", default="", help="models whose name matches this regular expression")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one model (default: 120)")
    parser.add_argument("--json", type=Path, help="write every verdict here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--quiet", action="store_true", help="no reasons below the lines")
    parser.add_argument("--here", action="store_true", help="in this process, without a time limit, to debug")
    options = parser.parse_args()
    preload()
    models: Mapping[str, Any] = models_of(options.zoo)
    verdicts: list[Verdict] = []
    started = time.perf_counter()
    for name, example in models.items():
        if not re.search(options.only, name):
            continue
        if options.here:
            verdict = examine(example.build, example.args, example.kwargs, name)
        else:
            verdict = examined(name, example, options.timeout)
        verdicts.append(verdict)
        print(line_of(verdict), flush=True)
        if not options.quiet:
            print(*details_of(verdict), sep="\n", end="\n" if [*details_of(verdict)] else "", flush=True)
        if options.json:
            options.json.write_text(json.dumps([v.as_dict() for v in verdicts], indent=1) + "\n", encoding="utf-8")
    print(totals_of(verdicts), f"({time.perf_counter() - started:.0f} s)")


__all__ = ["KindVerdict", "Verdict", "examine", "examined", "line_of", "models_of", "totals_of"]

if __name__ == "__main__":
    main()
