"""ONNX Runtime's sessions: which device, which settings, and what is missing for a GPU."""

import contextlib
import ctypes
import io
import logging
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from smallgpt.bundle import Bundle
from smallgpt.cli import DEVICES, DeviceError, MismatchError, cores

log = logging.getLogger(__name__)

SCORES_BYTES = 2**28  # what the attention of one call may take for its scores


def open_session(bundle: Bundle, device: str, threads: int, entries: Sequence[tuple[str, str]]) -> tuple[Any, str, int]:
    """Open the graph on a device, and say on which one it really is, "cpu" or "cuda" and the number of the GPU."""
    if not re.fullmatch(DEVICES, device):
        raise ValueError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N")
    if threads < 0:
        raise ValueError(f"threads is {threads}; it must be at least 0")
    device, _, gpu = device.partition(":")
    number = int(gpu or 0)
    devices, variant = bundle.config.devices, bundle.config.variant
    if device == "cuda" and "cuda" not in devices:
        raise DeviceError(f"{bundle.folder} is a {variant} bundle for {', '.join(devices)}; take exports/fp16 for cuda")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or min(8, cores())
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # else each call computes the matrices' levels
    options.add_session_config_entry("session.x64quantprecision", str(int(products_overflow())))
    for key, value in entries:
        try:
            options.add_session_config_entry(key, value)
        except (RuntimeError, TypeError):  # too long, or no UTF-8
            raise ValueError(f"onnxruntime does not take {f'{key}={value}'[:80]!r} as a session option") from None
    options.log_severity_level = 4  # what goes wrong arrives as an exception or is asked for below
    if "cuda" in devices and device != "cpu":
        problem = missing_for_cuda()
        if not problem:
            cuda = ("CUDAExecutionProvider", {"device_id": number})
            session = _load(bundle, options, [cuda, "CPUExecutionProvider"])
            if "CUDAExecutionProvider" in session.get_providers():
                return session, "cuda", number
            problem = "onnxruntime could not start its CUDA provider on this GPU"
        if device == "cuda":
            raise DeviceError(f"cuda cannot be used: {problem}")
        log.warning("warning: no GPU (%s): this %s bundle runs on the CPU, where fp32 is faster", problem, variant)
    return _load(bundle, options, ["CPUExecutionProvider"]), "cpu", 0


def _load(bundle: Bundle, options: Any, providers: Sequence[Any]) -> Any:
    # Its attention that never holds all scores is the slower one where they fit into memory; it asks the environment.
    context = bundle.config.model["max_seq_len"]
    small = scores_bytes(bundle, context) * context <= SCORES_BYTES
    try:
        # It prints when a provider fails, which is checked instead.
        with (
            contextlib.redirect_stdout(io.StringIO()),
            _environment("ORT_GQA_DISABLE_FLASH_ATTENTION", str(int(small))),
        ):
            # It would put one operator for an addition and a norm, the slower way on a CPU.
            return onnxruntime.InferenceSession(
                bundle.graph, options, providers=providers, disabled_optimizers=["SkipLayerNormFusion"]
            )
    except Exception as error:  # its errors share no other base class
        raise MismatchError(f"{bundle.graph} cannot be loaded: {' '.join(str(error).split())}") from None


def scores_bytes(bundle: Bundle, capacity: int) -> int:
    """Bytes of the attention scores of one new token over a cache of `capacity` tokens."""
    return 4 * int(bundle.config.model["num_heads"]) * capacity


def products_overflow() -> bool:
    """Whether sums of two products of 8 bits may overflow: on an x86 processor that is not known to have VNNI.

    ONNX Runtime then has a slower way that is right.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    processors = Path("/proc/cpuinfo")
    flags = processors.read_text(encoding="utf-8").split() if processors.is_file() else []
    return "avx512_vnni" not in flags and "avx_vnni" not in flags


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable for a while, unless the user has."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)  # another thread may have been faster


def missing_for_cuda() -> str:
    """What keeps ONNX Runtime from using a GPU, in words; empty if nothing is known to."""
    windows = sys.platform == "win32"
    driver = "nvcuda.dll" if windows else "libcuda.so.1"
    provider = "onnxruntime_providers_cuda.dll" if windows else "libonnxruntime_providers_cuda.so"
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "this onnxruntime is built without CUDA; install onnxruntime-gpu in its place"
    try:
        ctypes.CDLL(driver)
    except OSError:
        return f"{driver} is missing; install the NVIDIA driver"
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it did not find; the first such is named below
        onnxruntime.preload_dlls(directory="")
    try:
        ctypes.CDLL(str(Path(onnxruntime.__file__).with_name("capi") / provider))
    except OSError as error:
        if "undefined symbol" not in str(error):  # all libraries are there; the rest comes with the session
            return f"{str(error).split(':')[0]} is missing; pip install 'smallgpt[cuda]'"
    return ""
