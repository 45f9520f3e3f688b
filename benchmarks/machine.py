"""What a measurement was made with."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version

import torch


def describe_machine() -> dict[str, object]:
    """Machine, versions and command, for the head of a report."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
            "system": platform.platform(),
        },
        "versions": {name: version(name) for name in ("rheostat", "torch", "numpy", "numba")}
        | {"python": platform.python_version()},
        "command": " ".join(["python", "-m", "benchmarks." + os.path.basename(sys.argv[0]).removesuffix(".py")])
        + "".join(f" {argument}" for argument in sys.argv[1:]),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
