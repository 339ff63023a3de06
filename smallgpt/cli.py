"""What every command line shares: one line for an error, and the exit codes.

0 done, 1 a failure that is not the caller's, 2 wrong usage, parameters or input, 3 a bundle, tokenizer or hash that
does not fit, 4 a device that is not there, 130 and 143 stopped by SIGINT or SIGTERM.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

DEVICES = r"auto|cpu|cuda(:\d+)?"  # what a device of ONNX Runtime may be called
PROCESSORS = Path("/sys/devices/system/cpu")


class MismatchError(ValueError):
    """Files that do not belong together or were changed: exit code 3."""


class DeviceError(RuntimeError):
    """The device that was asked for cannot be used: exit code 4."""


class StoppedError(RuntimeError):
    """A signal stopped the work after its state was saved: exit code 128 + signal."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


def processors() -> int:
    """Processors this process may use; where the system does not say, all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores() -> int:
    """Physical cores of those processors, where the system says which share one; else each counts."""
    if not hasattr(os, "sched_getaffinity"):
        return processors()
    found = set()
    for number in os.sched_getaffinity(0):
        siblings = PROCESSORS / f"cpu{number}/topology/thread_siblings_list"
        found.add(siblings.read_text(encoding="ascii") if siblings.is_file() else str(number))
    return len(found)


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C in the list that is yielded, so that work can end between two steps; a second one is raised."""
    pressed: list[int] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signum)

    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # a job in the background
    if ignored or threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command line's `main` and leave with its exit code; expected errors become one line on stderr."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started this, as with `<&-` in a shell
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        code = main() or 0
        sys.stdout.flush()
    except MismatchError as error:
        code = _report(error, 3)
    except DeviceError as error:
        code = _report(error, 4)
    except StoppedError as error:
        code = _report(error, 128 + error.signum)
    except FloatingPointError as error:
        code = _report(error, 1)
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except PermissionError as error:
        code = _report(f"{error.filename}: permission denied; give this user access to it or name another place", 2)
    except OSError as error:
        named = error.filename is not None and error.strerror
        code = _report(f"{error.filename}: {named.lower()}; name another path" if named else error, 2)
    except MemoryError as error:
        code = _report(f"not enough memory: {error}" if str(error) else "not enough memory", 2)
    except ValueError as error:
        code = _report(error, 2)
    except RuntimeError as error:  # as PyTorch says that memory is short
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        code = _report("not enough memory; lower batch_size, or the model's size or context", 2)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    try:
        sys.stdout.flush()
    except OSError:  # a closed pipe: the interpreter's own last flush would complain and change the exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def _report(error: Exception | str, code: int) -> int:
    sys.stderr.write(f"error: {error}\n")  # in one piece, also among several processes
    return code
