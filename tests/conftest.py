"""Set-up that every test shares: one thread, a fixed seed, no network; and what the markers `gpu` and `data` mean."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # tests run side by side in several processes


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
