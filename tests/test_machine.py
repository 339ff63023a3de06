import os
import platform
import subprocess
import sys

import pytest
import torch

from smallgpt.cli import DeviceError
from smallgpt.machine import describe_machine, pick_device


def test_the_description_names_the_processor_and_nobody() -> None:
    text = describe_machine()
    assert int(text.split(" cores of ")[0]) <= (os.cpu_count() or 1)
    assert len(text.split(" cores of ")[1]) > 2
    assert platform.node() not in text


def test_the_benchmarks_of_decoding_import_it_without_torch() -> None:
    program = "import sys; sys.modules['torch'] = None; from smallgpt.machine import describe_machine as d; print(d())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == describe_machine() + "\n", done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_devices_without_cuda() -> None:
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(
        DeviceError, match=r"^evaluation\.device is cuda, but PyTorch sees no CUDA device; use auto or "
    ):
        pick_device("cuda", "evaluation.device")
