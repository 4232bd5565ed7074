"""Models larger than memory: time and peak memory of discovery without weights and of surgery on files.

    python benchmarks/scale.py                  # everything; writes benchmarks/results/scale.json
    python benchmarks/scale.py --only bert      # one part; the figures of the others stay

- **llama**: a Llama of 70 billion parameters (80 layers), built on the meta device and discovered; then the choice of
  half of its FFN units by scores that are given.
- **bert**: BERT-base on the meta device in a fresh interpreter.
- **files**: a checkpoint of about 3 GB (bfloat16, 6 files) is scored and cut to half of its FFN units and heads.

Every figure is taken in a process of its own; memory is the high-water mark of the resident memory (``ru_maxrss``).
Goals: the Llama in at most 60 s and 4 GB, BERT-base in at most 3 s, files with about the memory of one of them. Needs
the extra `hf`, and 5 GB of disk for the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# The parent stays small, and imports torch in the children only: a child's high-water mark begins with its parent's.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
LLAMA_70B = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}
LLAMA_1B = {
    "num_hidden_layers": 22,
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 32000,
}
FILES = 6


def peak_gb() -> float:
    """High-water mark of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def llama_on_meta(config: dict[str, int]) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**config)).eval()


def llama(folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    import torch
    from transformers import LlamaForCausalLM  # noqa: F401

    from lightning_compress import discover, explain, make_plan

    imported = time.perf_counter()
    model = llama_on_meta(LLAMA_70B)
    built = time.perf_counter()
    call = {"input_ids": torch.arange(16).unsqueeze(0), "use_cache": False}  # (1, 16)
    processor = time.process_time()
    structures = discover(model, kwargs=call)
    discovered, processor = time.perf_counter(), time.process_time() - processor
    peak = peak_gb()
    explanation = explain(structures)
    explained = time.perf_counter()
    ffn = structures.of_kind("ffn")
    generator = torch.Generator().manual_seed(0)
    scores = {s.name: torch.rand(s.units, generator=generator) for s in ffn}
    plan = make_plan(model, ffn, macs=0.5, scores=scores)
    planned = time.perf_counter()
    return {
        "config": LLAMA_70B,
        "tokens": 16,
        "import_s": imported - started,
        "build_s": built - imported,
        "discover_s": discovered - built,
        "discover_cpu_s": processor,
        "discover_peak_gb": peak,
        "explain_s": explained - discovered,
        "plan_s": planned - explained,
        "peak_gb": peak_gb(),
        "structures": len(structures),
        "parameters": int(structures.params.evaluate(structures.counts)),
        "prunable_share": explanation.prunable / explanation.parameters,
        "structures_in_plan": len(plan.structures),
    }


BERT = """
import time
started = time.perf_counter()
import torch
import_torch = time.perf_counter()
from transformers import BertConfig, BertForSequenceClassification
import_transformers = time.perf_counter()
from lightning_compress import discover
imported = time.perf_counter()
with torch.device("meta"):
    model = BertForSequenceClassification(BertConfig())
built, processor = time.perf_counter(), time.process_time()
call = {"input_ids": torch.arange(16).unsqueeze(0), "attention_mask": torch.ones(1, 16, dtype=torch.long)}
structures = discover(model, kwargs=call)
discovered = time.perf_counter()
import json
print(json.dumps({
    "import_torch_s": import_torch - started,
    "import_transformers_s": import_transformers - import_torch,
    "import_lightning_compress_s": imported - import_transformers,
    "build_s": built - imported,
    "discover_s": discovered - built,
    "discover_cpu_s": time.process_time() - processor,
    "whole_cpu_s": time.process_time(),
    "structures": len(structures),
}))
"""


def bert(folder: Path) -> dict[str, Any]:
    """``python -c`` of the text above, started once before so that the files are in the page cache."""
    runs = []
    for _ in range(4):
        started = time.perf_counter()
        child = subprocess.run([sys.executable, "-c", BERT], check=True, capture_output=True, text=True, cwd=ROOT)
        runs.append({"process_s": time.perf_counter() - started, **json.loads(child.stdout.splitlines()[-1])})
    return min(runs[1:], key=lambda run: run["process_s"])


def write_files(folder: Path) -> dict[str, Any]:
    """Random weights, file by file."""
    import torch
    from safetensors.torch import save_file

    model = llama_on_meta(LLAMA_1B)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    total = sum(tensor.numel() for tensor in model.state_dict().values()) * 2
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}
    number, held = 1, 0
    for position, (name, shape) in enumerate(shapes.items()):
        part[name] = torch.randn(shape, generator=generator, dtype=torch.bfloat16) * 0.02
        held += part[name].numel() * 2
        if held >= total / FILES or position == len(shapes) - 1:
            file = f"model-{number:05d}-of-{FILES:05d}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(part, file))
            part, number, held = {}, number + 1, 0
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sizes = [path.stat().st_size / 1e9 for path in sorted(folder.glob("*.safetensors"))]
    return {"config": LLAMA_1B, "dtype": "bfloat16", "files_gb": sizes, "total_gb": sum(sizes)}


def cut_files(folder: Path) -> dict[str, Any]:
    import torch

    from lightning_compress import apply_plan_to_checkpoint, checkpoint_scores, discover, make_plan

    model = llama_on_meta(LLAMA_1B)
    structures = discover(model, kwargs={"input_ids": torch.arange(16).unsqueeze(0), "use_cache": False})
    structures = structures.of_kind("head", "ffn")
    before, processor = peak_gb(), time.process_time()
    started = time.perf_counter()
    scores = checkpoint_scores(structures, folder)
    scored = time.perf_counter()
    peak_scores = peak_gb()
    plan = make_plan(model, structures, macs=0.5, scores=scores)
    planned = time.perf_counter()
    report = apply_plan_to_checkpoint(plan, folder, folder.parent / "small")
    return {
        "cpu_s": time.process_time() - processor,
        "peak_before_gb": before,
        "scores_s": scored - started,
        "scores_peak_gb": peak_scores,
        "cut_s": time.perf_counter() - planned,
        "peak_gb": peak_gb(),
        "added_gb": peak_gb() - before,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "tensors_cut": len(report.cut),
    }


def cut_files_only(folder: Path) -> dict[str, Any]:
    """The same without scores: a plan of every second unit."""
    import torch

    from lightning_compress import PruningPlan, apply_plan_to_checkpoint, discover

    model = llama_on_meta(LLAMA_1B)
    structures = discover(model, kwargs={"input_ids": torch.arange(16).unsqueeze(0), "use_cache": False})
    plan = PruningPlan.of(
        model, structures.of_kind("ffn"), {s.name: range(0, s.units, 2) for s in structures.of_kind("ffn")}
    )
    before = peak_gb()
    started = time.perf_counter()
    apply_plan_to_checkpoint(plan, folder, folder.parent / "every_second")
    return {"peak_before_gb": before, "cut_s": time.perf_counter() - started, "added_gb": peak_gb() - before}


PARTS = {"llama": llama, "bert": bert, "write": write_files, "cut": cut_files, "cut_only": cut_files_only}
GROUPS = {"llama": ("llama",), "bert": ("bert",), "files": ("write", "cut", "cut_only")}


def run_part(part: str, folder: Path) -> dict[str, Any]:
    """One part in a process of its own."""
    command = [sys.executable, __file__, "--part", part, "--folder", os.fspath(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return dict(json.loads(child.stdout.splitlines()[-1]))


def machine() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} CPU cores, {names[0] if names else platform.machine()}, {memory:.0f} GiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=GROUPS, help="one part; the figures of the others stay as they are")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.folder)))
        return
    results: dict[str, Any] = {}
    if options.only and options.results.exists():
        results = json.loads(options.results.read_text())
    results |= {
        "command": "python benchmarks/scale.py",
        "machine": machine(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }
    with tempfile.TemporaryDirectory() as folder:
        for group, parts in GROUPS.items():
            if options.only in (None, group):
                for part in parts:
                    load = os.getloadavg()[0]
                    results[part] = {"load_average_before": round(load, 1), **run_part(part, Path(folder) / "dense")}
                    print(part, json.dumps(results[part], indent=2), flush=True)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
