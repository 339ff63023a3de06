"""What this process runs on, in words that name no person and no host."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from smallgpt.cli import DeviceError, cores

if TYPE_CHECKING:  # only `pick_device` needs PyTorch
    import torch


def describe_machine() -> str:
    """Processor and the number of its cores that this process may use, such as "2 cores of Intel(R) Xeon(R)"."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{cores()} cores of {name}"


def pick_device(name: str, setting: str = "training.device") -> "torch.device":
    """`auto` is CUDA where PyTorch has it; `cuda` without it raises DeviceError, which names the setting."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"{setting} is cuda, but PyTorch sees no CUDA device; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
