"""Set-up that every test shares: one thread, a fixed seed, no network; and what the markers `gpu` and `data` mean."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # tests run side by side in several processes
settings.register_profile("shared", deadline=None)  # a busy machine is no failure
settings.load_profile("shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device"
    if not os.environ.get("LIGHTNING_COMPRESS_DATA"):
        missing["data"] = "needs LIGHTNING_COMPRESS_DATA, the path of a folder with the data sets"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def cli_callbacks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """``cli_callbacks(path, ...)``: the callbacks that a LightningCLI puts into its Trainer for these files."""
    monkeypatch.setattr("sys.argv", ["train.py"])  # LightningCLI warns of arguments there beside those it is given

    def instantiate(*configs: Path) -> list[Any]:
        from lightning.pytorch.cli import LightningCLI
        from lightning.pytorch.demos.boring_classes import BoringModel

        def callbacks(*arguments: str) -> list[Any]:
            quiet = {
                "accelerator": "cpu",
                "logger": False,
                "enable_checkpointing": False,
                "enable_model_summary": False,
            }
            cli = LightningCLI(
                BoringModel,
                run=False,
                save_config_callback=None,
                seed_everything_default=False,
                trainer_defaults=quiet,
                args=list(arguments),
            )
            return list(cli.trainer.callbacks)

        own = len(callbacks())  # the progress bar
        return callbacks(*(f"--config={path}" for path in configs))[: -own or None]

    return instantiate
