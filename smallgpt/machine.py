"""What this process runs on, in words that name no person and no host."""

import platform
from pathlib import Path

from smallgpt.cli import processors


def describe_machine() -> str:
    """Processor and the number of its cores that this process may use, such as "2 cores of Intel(R) Xeon(R)"."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{processors()} cores of {name}"
