"""With what a report was made: versions and the device, nothing that tells whose machine it was."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("lightning-compress", "torch", "lightning", "transformers")


def environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Versions of Python and of the packages that are there, the device, and the number of threads.

    Args:
        device: on which the model was trained.

    >>> list(environment())[:2]
    ['Python', 'system']
    """
    found = {"Python": platform.python_version(), "system": f"{platform.system()}, {platform.machine()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {**found, "device": f"{device.type} {name}".strip(), "threads": str(torch.get_num_threads())}


__all__ = ["environment"]
