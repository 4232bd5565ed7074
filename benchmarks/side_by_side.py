"""Runs of a benchmark, side by side in processes of their own, and what is written down of each."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol


class Run(Protocol):
    """One run: a name, the arguments with which the script makes it, and the file of its result."""

    @property
    def name(self) -> str: ...

    @property
    def arguments(self) -> Sequence[str]: ...

    @property
    def result(self) -> Path: ...


# to the C library: keep the memory of large tensors, which every step makes anew, instead of giving it back each time
KEPT_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}


def run_all(script: str, stages: Iterable[Iterable[Run]], jobs: int, data: str, logs: Path) -> None:
    """Every run without a result, each in a process with one thread; a stage begins when the one before has ended."""
    # threads that wait busily for their turn would take the cores of the other runs
    environment = {**KEPT_MEMORY, **os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    logs.mkdir(parents=True, exist_ok=True)

    def start(run: Run) -> None:
        command = [sys.executable, script, *run.arguments, "--data", data]
        with open(logs / f"{run.name}.log", "a") as log:
            code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
        print(f"{run.name}: {'done' if code == 0 else f'failed, see {log.name}'}", flush=True)

    for runs in stages:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(start, [run for run in runs if not run.result.is_file()]))


def parser(text: str | None, one: str, names: Sequence[str], threads: int = 2) -> tuple[argparse.ArgumentParser, Any]:
    """The command line that such benchmarks share, and its group of things to do.

    Args:
        text: of the module.
        one: option that names a single run.
        names: what it may be.
        threads: of ``--latency``.
    """
    found = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = found.add_mutually_exclusive_group(required=True)
    what.add_argument(one, choices=tuple(names), metavar="NAME", help=f"one run, of {', '.join(names)}")
    what.add_argument("--all", action="store_true", help="every run that has no result")
    what.add_argument("--latency", action="store_true", help="measure latency")
    what.add_argument("--table", action="store_true", help="write and print the table")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    found.add_argument("--threads", type=int, default=threads, help="of --latency")
    folder = os.environ.get("LIGHTNING_COMPRESS_DATA", str(Path(__file__).resolve().parents[2] / "shared" / "data"))
    found.add_argument("--data", default=folder)
    return found, what


def machine() -> str:
    """The machine in words: cores, processor, and what it has for small types."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = known.get("flags", "").split()
    wide = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else ""
    extras = [name for name, has in (("VNNI", "vnni"), ("bfloat16", "bf16")) if any(has in flag for flag in flags)]
    words = [f"{os.cpu_count()} CPU cores", known.get("model name", platform.machine()), " ".join([wide, *extras])]
    return ", ".join(word for word in words if word.strip())


def finish(
    script: str, run: Run, settings: dict[str, Any], train: Callable[[], dict[str, Any]], headline: str = "accuracy"
) -> None:
    """Make a run and write its result, unless that is there.

    Args:
        script: file name of the benchmark.
        run: the run.
        settings: what is to be written down of it besides command, versions and machine.
        train: makes it, and returns what came out.
        headline: what of it is printed.
    """
    import torch

    if run.result.is_file():
        print(f"{run.name}: result is there, nothing to do")
        return
    run.result.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **settings,
        "command": " ".join([f"python benchmarks/{script}", *run.arguments]),
        "versions": {name: version(name) for name in ("torch", "lightning", "transformers")},
        "machine": f"{machine()}, {torch.get_num_threads()} thread",
    }
    record |= train()
    run.result.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{run.name}: {record[headline]}", flush=True)
