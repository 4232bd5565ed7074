"""Running a function in several processes with a deadline."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

# started from one server that has imported everything: a fresh interpreter would need seconds for that
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.callbacks.processes", "lightning_compress"])


def in_processes(
    work: Callable[..., Any], *args: Any, seconds: float = 120.0, count: int = 2, **kwargs: Any
) -> list[Any]:
    """What ``work`` returns or raises in each of ``count`` processes; the exit code of one that ends in silence.

    Raises:
        TimeoutError: if one is still running after so many seconds. None is left behind.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    task = pickle.dumps(functools.partial(work, *args, **kwargs))
    ends, running = [], []
    for rank in range(count):
        here, there = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_start, args=(task, rank, count, port, there), daemon=True)
        process.start()
        there.close()
        ends.append(here)
        running.append(process)
    deadline = time.monotonic() + seconds
    try:
        results = []
        for rank, (end, process) in enumerate(zip(ends, running, strict=True)):
            if not end.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"process {rank} is still running after {seconds} s")
            try:
                results.append(pickle.loads(end.recv_bytes()))
            except EOFError:
                process.join(5)
                results.append(process.exitcode)
        return results
    finally:
        for process in running:
            process.join(1)
            process.kill()
            process.join()


def _start(task: bytes, rank: int, count: int, port: int, end: Any) -> None:
    # as a cluster that starts the processes itself tells them
    os.environ.update(
        LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", NODE_RANK="0"
    )
    global COUNT
    COUNT = count
    torch.set_num_threads(1)
    try:
        result = pickle.loads(task)()
    except BaseException as error:
        result = error
    if torch.distributed.is_initialized() and not isinstance(result, BaseException):
        torch.distributed.destroy_process_group()
    try:
        data = pickle.dumps(result)
    except Exception:
        data = pickle.dumps(RuntimeError(repr(result)))
    end.send_bytes(data)
    end.close()
    os._exit(0)


COUNT = 1


def processes() -> int:
    """Number of processes."""
    return COUNT


def rank() -> int:
    """Number of this process."""
    return int(os.environ.get("LOCAL_RANK", 0))


def parallel(seconds: float = 60.0, **options: Any) -> dict[str, Any]:
    """Options of a Trainer for these processes."""
    strategy = DDPStrategy(timeout=timedelta(seconds=seconds), process_group_backend="gloo", **options)
    return {"strategy": strategy, "devices": processes()}


def sharding(seconds: float = 60.0, **options: Any) -> dict[str, Any]:
    """Options of a Trainer whose module is sharded over these processes."""
    chosen = {"data_parallel_size": processes(), "tensor_parallel_size": 1, **options}
    strategy = ModelParallelStrategy(process_group_backend="gloo", timeout=timedelta(seconds=seconds), **chosen)
    return {"strategy": strategy, "devices": processes()}
