"""Strategies of the Trainer: which of them can be compressed under, and how one lets go of its module for a removal."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_compress.callbacks.plain_copy import is_sharded
from lightning_compress.shards import Part

# class name of a strategy -> what to do instead; by name because some of them cannot be imported everywhere
_SHARDED = (
    "Compress in a fit with strategy='ddp' and shard the smaller model afterwards; for a model that does not fit on "
    "one device, plan with lightning_compress.checkpoint_scores and cut its safetensors files with "
    "lightning_compress.apply_plan_to_checkpoint, then fine-tune it sharded."
)
_INSTEAD = {
    "DeepSpeedStrategy": f"its engine keeps flat copies of the weights that nothing can be cut out of. {_SHARDED}",
    "FSDPStrategy": f"its parameters are flat shards in which units have no place. {_SHARDED}",
    "XLAStrategy": "it has not been tried. Compress in a fit with strategy='ddp' on another accelerator.",
}


def check_strategy(trainer: pl.Trainer, pl_module: pl.LightningModule, owner: str, removes: bool) -> None:
    """Raise ValueError if what the strategy does to the module does not go together with compressing it.

    Args:
        trainer: the trainer, when its strategy has been set up.
        pl_module: the module.
        owner: name of the callback that asks.
        removes: whether units are going to be removed, or only driven to zero.
    """
    strategy: Any = trainer.strategy
    for base in type(strategy).__mro__:
        if base.__name__ in _INSTEAD:
            raise ValueError(
                f"Expected a strategy that keeps whole parameters in every process for {owner}, but got "
                f"{type(strategy).__name__}: {_INSTEAD[base.__name__]}"
            )
    if any(base.__name__ == "ModelParallelStrategy" for base in type(strategy).__mro__):
        _check_model_parallel(strategy, pl_module, owner)
        return
    if not removes or strategy.model is pl_module:
        if trainer.world_size > 1 and not isinstance(strategy, DDPStrategy):
            raise ValueError(_unknown(trainer, owner))
        return
    if (
        not isinstance(strategy, DDPStrategy)
        or type(strategy.model) is not DistributedDataParallel
        or strategy.model.module is not pl_module
    ):
        raise ValueError(_unknown(trainer, owner))
    _check_ddp(strategy, owner)
    for optimizer in trainer.optimizers:
        if any(base.__module__.startswith("torch.distributed") for base in type(optimizer).__mro__):
            raise ValueError(
                f"Expected optimizers with all of their state in every process for {owner}, but got "
                f"{type(optimizer).__name__}, which spreads it over the processes. Use the optimizer itself, without "
                "that wrapper."
            )


def _unknown(trainer: pl.Trainer, owner: str) -> str:
    return (
        f"Expected strategy='ddp' or one device for {owner}, but got {type(trainer.strategy).__name__} with "
        f"{trainer.world_size} process(es), around {type(trainer.strategy.model).__name__}: what wraps the module has "
        "recorded its shapes, and only DistributedDataParallel is known to be taken off and put back."
    )


def _check_model_parallel(strategy: Any, pl_module: pl.LightningModule, owner: str) -> None:
    mesh = strategy._device_mesh
    size = 1 if mesh is None else mesh["tensor_parallel"].size()
    if size > 1:
        raise ValueError(
            f"Expected ModelParallelStrategy(tensor_parallel_size=1) for {owner}, but got {size}: the parts of a "
            "tensor-parallel module compute with fewer units each, which no other process sees. Use "
            "ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1) with fully_shard in "
            "configure_model, or strategy='ddp'."
        )
    if not is_sharded(pl_module):
        raise ValueError(
            f"Expected configure_model of {type(pl_module).__name__} to shard its parameters for {owner}, but all of "
            "them are whole, and nothing averages their gradients. Call torch.distributed.fsdp.fully_shard(module, "
            "mesh=self.device_mesh['data_parallel']) there, or use strategy='ddp'."
        )
    for name, parameter in pl_module.named_parameters():
        Part.of(parameter, name)


def _check_ddp(strategy: DDPStrategy, owner: str) -> None:
    launched = getattr(strategy, "_start_method", "popen")
    if launched != "popen":
        raise ValueError(
            f"Expected strategy='ddp' for {owner}, but got a DDPStrategy that starts its processes by {launched!r}: "
            "the process that calls fit is none of them, and its module would not become small. Use strategy='ddp', "
            "which runs the script once for each device."
        )
    if getattr(strategy, "_ddp_comm_state", None) is not None:
        raise ValueError(
            f"Expected DDPStrategy without ddp_comm_state for {owner}, but got "
            f"{type(strategy._ddp_comm_state).__name__}: such a state belongs to gradients of the old shapes, or lets "
            "the weights of the processes differ. Leave it out, or use a ddp_comm_hook without state."
        )
    if strategy._ddp_kwargs.get("mixed_precision") is not None:
        raise ValueError(
            f"Expected DDPStrategy without mixed_precision for {owner}: it leaves copies of the weights in their old "
            "shapes in the module. Use Trainer(precision='bf16-mixed')."
        )


@contextmanager
def unwrapped(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """Take DistributedDataParallel off the module, in which shapes change, and put it on again.

    A reducer keeps the gradient accumulators of its parameters, which know the old shapes. So the old one goes before
    the shapes change, and a new one, made afterwards in all processes, starts from the weights of process 0. After an
    exception nothing is put on again: that would wait for processes that may not come.
    """
    strategy: Any = trainer.strategy
    wrapped = isinstance(strategy.model, DistributedDataParallel)
    if wrapped:
        strategy.model = pl_module
        gc.collect()
    yield
    renew_gradient_nodes(pl_module)
    if wrapped:
        if hasattr(strategy, "_pl_static_graph_delay_done"):
            strategy._pl_static_graph_delay_done = False  # a property of the reducer that has gone
        strategy.configure_ddp()


def renew_gradient_nodes(module: nn.Module) -> None:
    """Let every parameter forget the node of the autograd graph that accumulates its gradient and knows its old shape.

    Whoever keeps a graph alive, be it a reducer or a module that has stored its loss, keeps these nodes alive, too.
    """
    for parameter in module.parameters():
        data = parameter.data
        if not parameter.requires_grad or type(data) is not Tensor or data.layout != torch.strided:
            continue  # no node, or nothing that surgery cuts
        # the node is forgotten where data of another type is put into the parameter
        other = torch.float32 if data.dtype != torch.float32 else torch.float64
        gradient, parameter.grad = parameter.grad, None
        parameter.data = torch.empty(0, dtype=other, device=data.device)
        parameter.data = data
        parameter.grad = gradient
