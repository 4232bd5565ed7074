"""Fits of two processes are fits of one with the same global batch, and no process waits for another for ever."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_compress import Distillation, FinalizeCompression, StructuredSparsity
from lightning_compress.callbacks import latency_target, removal
from lightning_compress.callbacks.moments import FitLength, Moment
from lightning_compress.callbacks.processes import Processes
from lightning_compress.callbacks.strategies import check_strategy, renew_gradient_nodes
from lightning_compress.report import count_parameters
from tests.callbacks.modules import MLP, Classifier, Transformer, loader, trainer
from tests.callbacks.processes import in_processes, parallel, processes, rank
from tests.callbacks.test_latency_target import Clock


def shared(sequences: bool = True) -> DataLoader[Any]:
    """Batches of which every process takes its part: together they are those of one process, in its order."""
    data = TensorDataset(*(t.double() if t.is_floating_point() else t for t in loader(sequences).dataset.tensors))
    return DataLoader(data, 8 // processes(), sampler=range(rank(), len(data), processes()))


@dataclass
class Outcome:
    """What is left of a fit."""

    kept: Mapping[str, tuple[int, ...]]
    weights: dict[str, Tensor]
    moments: list[Tensor]
    error: float
    strength: float
    steps: int


def compress(
    *callbacks: pl.Callback,
    ddp: dict[str, Any] | None = None,
    module: Callable[[], Classifier] | None = None,
    data: Callable[[], Any] = shared,
    importance: Any = "norm",
    distil: bool = False,
    resume: Path | None = None,
    removing: dict[str, Any] | None = None,
    **options: Any,
) -> Outcome:
    """Sparsify, remove and fine-tune in float64, in one process or in all those that call this."""
    torch.manual_seed(0)
    own = (module or usual)()
    sparsity = StructuredSparsity(importance=importance)
    finalize = FinalizeCompression(**{"macs": 0.4, "at": 0.6, "report": False, **(removing or {})})
    distillation = [Distillation(hidden=0.1)] if distil else []
    many = {} if ddp is None else {**parallel(**ddp), "use_distributed_sampler": False}
    fitting = trainer(sparsity, finalize, *distillation, *callbacks, **{"max_epochs": 3, **many, **options})
    fitting.fit(own, data(), ckpt_path=resume)
    assert finalize.plan is not None
    return Outcome(
        kept=finalize.plan.kept,
        weights={n: p.detach().clone() for n, p in own.named_parameters()},
        moments=[s["exp_avg"].clone() for s in fitting.optimizers[0].state.values()],
        error=max((r.error or 0.0 for r in finalize.surgery_reports), default=0.0),
        strength=sparsity.strength,
        steps=fitting.global_step,
    )


def usual() -> Classifier:
    return Classifier(Transformer(ffn=24), lr=5e-3).double()


class Manual(Classifier):
    """Optimizes by hand."""

    def __init__(self) -> None:
        super().__init__(Transformer(ffn=24), lr=5e-3)
        self.automatic_optimization = False
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Itself(Classifier):
    """Is called as a whole, in steps that the strategy sends through the same forward."""

    def __init__(self) -> None:
        super().__init__(Transformer(ffn=24), lr=5e-3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class KeepsItsLoss(Classifier):
    """Holds on to the graph of the last step."""

    def __init__(self) -> None:
        super().__init__(Transformer(ffn=24), lr=5e-3)
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.last = super().training_step(batch, batch_idx)
        return self.last


class KeepsTheWrapper(pl.Callback):
    """Holds on to DistributedDataParallel, and its reducer with it."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.wrapper = trainer.model


def assert_close(one: Any, other: Any, tolerance: float) -> None:
    for outcome in (one, other):
        if isinstance(outcome, BaseException):
            raise outcome
    assert one.kept == other.kept
    assert one.steps == other.steps
    assert one.strength == pytest.approx(other.strength, rel=max(tolerance, 1e-12))
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, other.weights[name], rtol=0, atol=tolerance)
    for a, b in zip(one.moments, other.moments, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# Two processes do what one does


@pytest.mark.parametrize(
    "options",
    [
        {"removing": {"rounds": 2}, "importance": "taylor", "distil": True},
        {"accumulate_grad_batches": 2},
        {"ddp": {"find_unused_parameters": True}},
        {"ddp": {"static_graph": True, "gradient_as_bucket_view": True}, "removing": {"rounds": 2}},
        {"module": Manual, "ddp": {"static_graph": True}},
        {"module": Itself, "distil": True},
    ],
    ids=["rounds", "accumulation", "unused", "static", "manual", "itself"],
)
def test_two_processes_do_what_one_does_with_the_same_batches(options: dict[str, Any]) -> None:
    first, second = in_processes(compress, **{"ddp": {}, **options})
    assert_close(first, second, 0.0)
    assert_close(first, compress(**{**options, "ddp": None}), 1e-8)
    assert first.error <= 1e-10
    assert sum(p.numel() for p in first.weights.values()) < 0.8 * count_parameters(usual())


def narrow() -> Classifier:
    return Classifier(Transformer(ffn=24), lr=5e-3)


def narrow_data() -> DataLoader[Any]:
    data = loader(True).dataset
    return DataLoader(data, 8 // processes(), sampler=range(rank(), len(data), processes()))


@pytest.mark.parametrize("ddp", [{}, {"static_graph": True, "gradient_as_bucket_view": True}], ids=["plain", "static"])
def test_weights_in_float32_which_the_proof_holds_in_float64_for_a_while(ddp: dict[str, Any]) -> None:
    first, second = in_processes(compress, ddp=ddp, module=narrow, data=narrow_data, seconds=60.0)
    assert_close(first, second, 0.0)
    # Adam divides rounding by tiny gradients: what differs in the last digit takes steps of its own
    assert_close(first, compress(module=narrow, data=narrow_data), 2e-2)


def test_one_wrapped_process_does_what_one_without_a_wrapper_does() -> None:
    (wrapped,) = in_processes(compress, ddp={}, count=1)
    assert_close(wrapped, compress(), 1e-12)


def holding_on() -> Outcome:
    return compress(KeepsTheWrapper(), ddp={}, module=KeepsItsLoss, removing={"rounds": 2})


def test_whoever_holds_on_to_the_old_wrapper_or_a_graph_does_no_harm() -> None:
    first, second = in_processes(holding_on)
    assert_close(first, second, 0.0)
    assert_close(first, compress(module=KeepsItsLoss, removing={"rounds": 2}), 1e-8)


def test_gradient_nodes_are_renewed() -> None:
    layer, seen = nn.Linear(3, 2), []
    layer.weight.register_hook(lambda gradient: seen.append("gradient"))
    layer.weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("accumulated"))
    layer.bias.requires_grad_(False)
    layer.weight.grad = torch.ones(2, 3)
    loss = layer(torch.ones(1, 3)).sum()
    node = torch.autograd.graph.get_gradient_edge(layer.weight).node
    assert torch.autograd.graph.get_gradient_edge(layer.weight).node is node
    before = layer.weight.detach().clone()
    renew_gradient_nodes(layer)
    assert torch.autograd.graph.get_gradient_edge(layer.weight).node is not node
    assert torch.equal(layer.weight, before)
    layer(torch.ones(1, 3)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((2, 3), 2.0))
    assert seen == ["gradient", "accumulated"]
    assert loss.requires_grad


class Ragged(IterableDataset[Any]):
    """Batches of another size and another length in every process and every step."""

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(rank())
        for step in range(8):
            x = torch.randn(3 + rank() + step % 2, 4 + 3 * rank() + step % 3, 5, generator=generator)
            yield x.double(), (x.mean(1)[:, 0] > 0).long()


def ragged() -> DataLoader[Any]:
    return DataLoader(Ragged(), batch_size=None)


def without_layers(fails: bool) -> tuple[int, int, dict[str, Tensor]]:
    """Whole layers go: the number of blocks and of optimized parameters after the fit, and the weights."""
    torch.manual_seed(0)
    module = Classifier(Transformer(ffn=24, blocks=3), lr=5e-3).double()
    finalize = FinalizeCompression(macs=0.334, at=0.5, kinds=("layer",), report=False)
    fitting = trainer(finalize, **parallel(), use_distributed_sampler=False, max_epochs=2)
    original = removal.apply_plan

    def apply_plan(*args: Any, **kwargs: Any) -> Any:
        done = original(*args, **kwargs)
        if fails and rank() == 1:
            raise ValueError("not with this example")
        return done

    removal.apply_plan = apply_plan
    with pytest.raises((RuntimeError, ValueError), match="not with this example") if fails else nullcontext():
        fitting.fit(module, shared())
    groups = module.optimizers(use_pl_optimizer=False).param_groups
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    return len(module.model.blocks), sum(len(g["params"]) for g in groups), weights


@pytest.mark.parametrize("fails", [False, True])
def test_whole_layers_go_everywhere_or_nowhere(fails: bool) -> None:
    first, second = in_processes(without_layers, fails)
    assert first[:2] == second[:2] == ((3, 3 * 16 + 4) if fails else (1, 16 + 4))
    assert all(torch.equal(weight, second[2][name]) for name, weight in first[2].items())


def with_statistics() -> Outcome:
    def make() -> Classifier:
        model = nn.Sequential(nn.Linear(5, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3))
        return Classifier(model, lr=1e-2).double()

    return compress(ddp={}, module=make, data=lambda: shared(False), removing={"rounds": 2})


def test_running_statistics_that_differ_between_processes_are_cut_too() -> None:
    first, second = in_processes(with_statistics)
    assert_close(first, second, 0.0)
    assert first.weights["model.1.weight"].numel() < 24


def test_batches_may_differ_in_size_and_length() -> None:
    first, second = in_processes(compress, ddp={}, data=ragged)
    assert_close(first, second, 0.0)


# What is random, measured or the user's own is decided by process 0


def chance(model: nn.Module, structure: Any) -> Tensor:
    return torch.rand(structure.units, generator=torch.Generator().manual_seed(rank() + time.time_ns()))


def test_scores_of_the_user_are_those_of_process_0() -> None:
    first, second = in_processes(compress, ddp={}, importance=chance)
    assert_close(first, second, 0.0)


class Reports(pl.Callback):
    """Remembers the report, and whether it was printed."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.printed: list[str] = []
        pl_module.print = self.printed.append  # type: ignore[method-assign]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        finalize = next(c for c in trainer.callbacks if isinstance(c, FinalizeCompression))
        assert finalize.report is not None
        self.text = finalize.report.to_json()


def by_latency(folder: Path) -> tuple[Outcome, int, str]:
    """A budget in latency: what was measured in this process, and the report that it has."""
    os.environ["LIGHTNING_COMPRESS_CACHE"] = str(folder / str(rank()))
    clock, reports = Clock(), Reports()
    latency_target.measure_latency = clock  # type: ignore[assignment]
    removal.LATENCY_SECONDS = 0.05
    removing = {"macs": None, "latency": 0.4, "report": True}
    outcome = compress(
        reports, ddp={}, module=lambda: Classifier(MLP(48, 40)).double(), data=lambda: shared(False), removing=removing
    )
    return outcome, len(clock.calls), reports.text


def test_latency_is_measured_in_process_0_and_all_have_its_report(tmp_path: Path) -> None:
    one, other = in_processes(by_latency, tmp_path)
    assert_close(one[0], other[0], 0.0)
    assert one[1] > 1 and other[1] == 0
    assert one[2] == other[2]


# Checkpoints


class Save(pl.Callback):
    """Saves a checkpoint after a step, as all processes do together."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def saved_and_resumed(folder: Path) -> list[Outcome]:
    paths = {step: folder / f"{step}.ckpt" for step in (8, 16)}
    straight = compress(*(Save(path, step) for step, path in paths.items()), ddp={})
    return [straight, *(compress(ddp={}, resume=path) for path in paths.values())]


def test_a_fit_of_two_processes_is_resumed_before_and_after_the_removal(tmp_path: Path) -> None:
    first, second = in_processes(saved_and_resumed, tmp_path)
    assert_close(first[0], second[0], 0.0)
    assert_close(first[0], first[1], 1e-9)
    for outcome in (first[2], second[2]):
        assert_close(first[0], outcome, 0.0)
    assert_close(first[0], compress(resume=tmp_path / "16.ckpt"), 1e-8)  # in one process


# One process fails


class FailsAt(pl.Callback):
    """Something happens in process 1 after a step."""

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and rank() == 1:
            if self.how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("no such batch")


def falls_over(how: str) -> tuple[float, str, bool]:
    """Seconds that this process went on, what it ended with, and whether its module and its optimizer are dense."""
    began = [0.0]

    def importance(model: nn.Module, structure: Any) -> Tensor:
        if began[0]:
            return torch.arange(1.0, structure.units + 1)
        began[0] = time.monotonic()
        if rank() == 1 and how == "raises":
            raise KeyError("no scores here")
        if rank() == 1 and how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank() == 1 and how == "hangs":
            time.sleep(7)
        return torch.arange(1.0, structure.units + 1)

    original = removal.apply_plan

    def apply_plan(*args: Any, **kwargs: Any) -> Any:
        done = original(*args, **kwargs)
        if rank() == 1 and how == "refuses":
            raise ValueError("not with this example")
        return done

    removal.apply_plan = apply_plan
    module = usual()
    dense = count_parameters(module)
    callbacks = [FailsAt(3, how.removesuffix(" in a step"))] if how.endswith("in a step") else []
    own = {} if callbacks else {"importance": importance}
    try:
        compress(*callbacks, ddp={"seconds": 4.0 if how == "hangs" else 30.0}, module=lambda: module, removing=own)
    except Exception as error:
        seconds = time.monotonic() - began[0] if began[0] else 0.0
        states = module.optimizers(use_pl_optimizer=False).state
        whole = count_parameters(module) == dense and all(s["exp_avg"].shape == p.shape for p, s in states.items())
        return seconds, f"{type(error).__name__}: {error}", whole
    return 0.0, "went on", False


@pytest.mark.parametrize(
    ("how", "here", "there"),
    [
        ("raises", "Expected all 2 processes to score units, but process 1 failed.* KeyError", "KeyError"),
        ("refuses", "to remove the same units, but process 1 failed.* ValueError: not with", "ValueError: not with"),
        ("dies", "to score units, but process 0 did not hear from another one", None),
        ("hangs", "to score units, but process 0 did not hear from another one", "did not hear from another one"),
        ("raises in a step", "", "KeyError"),
        ("dies in a step", "", None),
    ],
)
def test_when_one_process_fails_the_others_end(how: str, here: str, there: str | None) -> None:
    first, second = in_processes(falls_over, how, seconds=60)
    seconds, text, whole = first
    assert re.search(here, text) and "Error: " in text
    assert whole  # nothing has been removed, not even where that went well
    assert seconds < 12
    if there is None:
        assert second == -signal.SIGKILL
    else:
        assert re.search(there, second[1])
        assert second[2]


class Two(Classifier):
    """Calls another of two models in every process."""

    def __init__(self) -> None:
        super().__init__(Transformer(ffn=24))
        self.other = Transformer(ffn=24)
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        called, rest = (self.model, self.other) if rank() == 0 else (self.other, self.model)
        return F.cross_entropy(called(batch[0]), batch[1]) + 0 * sum(p.sum() for p in rest.parameters())


class Gathers(Transformer):
    """Centers its outputs over all processes."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        mean = y.detach().mean(0)
        torch.distributed.all_reduce(mean)
        return y - mean / 2


def longer() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(32 + 8 * rank(), 4, 5).double(), torch.zeros(32 + 8 * rank())), 4)


def communicating() -> Classifier:
    return Classifier(Gathers(ffn=24)).double()


def out_of_step() -> list[str]:
    fitting = trainer(**parallel(seconds=10))
    fitting.strategy.setup_environment()
    group, errors = Processes(rank(), 2), []
    assert group.first("lead", lambda: 1 / (1 - rank()), pack=str, unpack=float) == 1.0
    for what, compute in (("lead", lambda: 1 / rank()), ("lead" if rank() else "follow", lambda: None)):
        try:
            group.first(what, compute)
        except (RuntimeError, ZeroDivisionError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


@pytest.mark.slow  # four fits of two processes
def test_processes_that_differ_are_told_so() -> None:
    for found in in_processes(compress, ddp={"seconds": 20.0}, module=Two):
        assert "Expected all processes to trace one sub-module of Two" in str(found)
        assert "['model', 'other'], process by process. Name it: module='model'" in str(found)
    for found in in_processes(compress, ddp={"seconds": 20.0}, module=communicating):
        assert "process 0 calls it alone to discover its structures, but Gathers calls c10d.allreduce_" in str(found)
    for found in in_processes(compress, ddp={"seconds": 20.0}, data=longer):
        assert "the same number of training batches, but they have [8.0, 10.0]" in str(found)
    first, second = in_processes(out_of_step)
    assert first[0] == "ZeroDivisionError: division by zero"
    assert "all 2 processes to lead, but process 0 failed" in second[0] and "There it was ZeroDiv" in second[0]
    assert "process 0 was about to follow, process 1 was about to lead" in first[1] == second[1]


# What is refused


class DeepSpeedStrategy:
    """Of this name: the real one cannot be imported without its package."""


def with_strategy(strategy: Any, optimizers: tuple[Any, ...] = (), wrap: bool = True) -> None:
    module = Classifier()
    wrapper: Any = module
    if wrap:
        wrapper = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
        nn.Module.__init__(wrapper)
        wrapper.module = module
    if isinstance(strategy, DDPStrategy):
        strategy._model = wrapper
    else:
        strategy.model = wrapper
    fake: Any = SimpleNamespace(world_size=2, strategy=strategy, optimizers=optimizers)
    check_strategy(fake, module, "FinalizeCompression", removes=True)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (DeepSpeedStrategy(), "got DeepSpeedStrategy: its engine keeps flat copies.* with strategy='ddp' and shard"),
        (FSDPStrategy(), "got FSDPStrategy: its parameters are flat shards.*apply_plan_to_checkpoint"),
        (SimpleNamespace(), "Expected strategy='ddp' or one device for FinalizeCompression, but got SimpleNamespace"),
        (DDPStrategy(start_method="spawn"), "starts its processes by 'spawn': the process that calls fit is none"),
        (DDPStrategy(ddp_comm_state=PowerSGDState(None)), "without ddp_comm_state .* got PowerSGDState"),
        (DDPStrategy(mixed_precision=object()), "without mixed_precision .*precision='bf16-mixed'"),
    ],
    ids=["deepspeed", "fsdp", "unknown", "spawn", "state", "mixed"],
)
def test_what_other_strategies_do_is_refused(strategy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_strategy(strategy)


def test_ddp_with_a_spread_optimizer_is_refused() -> None:
    spread = type("ZeroRedundancyOptimizer", (), {"__module__": "torch.distributed.optim.zero_redundancy_optimizer"})()
    with_strategy(DDPStrategy())
    with pytest.raises(ValueError, match=r"all of their state in every process .* got ZeroRedundancyOptimizer"):
        with_strategy(DDPStrategy(), (spread,))


@pytest.mark.parametrize("removes", [False, True])
def test_another_wrapper_is_refused(removes: bool) -> None:
    module = Classifier()
    strategy = SimpleNamespace(model=nn.Sequential(module))
    fake: Any = SimpleNamespace(world_size=2, strategy=strategy, optimizers=())
    with pytest.raises(
        ValueError, match=r"for StructuredSparsity, but got SimpleNamespace with 2 process\(es\), around"
    ):
        check_strategy(fake, module, "StructuredSparsity", removes)


def test_epochs_of_unknown_length_need_not_end_together() -> None:
    inf = float("inf")
    with pytest.raises(ValueError, match=r"in a fit of 2 processes to have a loader of known length.*at_step=\.\.\."):
        Moment(at_epoch=2).check(FitLength(inf, inf, 0, 5, inf, inf), "FinalizeCompression", processes=2)


# Lightning's own launcher


def main() -> None:
    torch.manual_seed(0)
    module, finalize = usual(), FinalizeCompression(macs=0.4)
    removal.LATENCY_SECONDS = 0.05
    fitting = trainer(StructuredSparsity(), finalize, max_epochs=2, devices=2, strategy="ddp")
    fitting.fit(module, shared())
    sys.stdout.write(f"process {fitting.global_rank}: {count_parameters(module)} parameters\n")


@pytest.mark.slow  # two interpreters that import everything
def test_a_script_with_strategy_ddp() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.callbacks.test_processes"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [line.split(": ")[1] for line in sorted(done.stdout.splitlines()) if line.startswith("process ")]
    assert len(sizes) == 2 and sizes[0] == sizes[1] != f"{count_parameters(usual())} parameters"
    assert done.stdout.count("Compression of 'model'") == 1


if __name__ == "__main__":
    main()
