from __future__ import annotations

import os
from importlib import metadata

import torch


def pytest_benchmark_update_machine_info(config: object, machine_info: dict) -> None:
    """Add what decides a CPU timing to the JSON file, which has the commit and the date already."""
    machine_info |= {
        "cpu_model": machine_info.get("cpu", {}).get("brand_raw", machine_info["processor"]),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in ("torch", "triton", "numpy", "pytest-benchmark")},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # triton is not made for every platform
        return None
