"""Exit codes and the one line on stderr, in real processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from smallgpt import cli
from smallgpt.cli import interrupts

ROOT = Path(__file__).parent.parent
HEADER = """
import signal, sys
from smallgpt.cli import DeviceError, MismatchError, StoppedError, run
def main():
"""


def start(body: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Run `main`, whose body is given, in a process of its own."""
    command = [sys.executable, "-c", f"{HEADER}    {body}\nrun(main)\n"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("print('done')", 0, ""),
        ("return 0", 0, ""),
        ("return 5", 5, ""),
        ("raise FloatingPointError('the loss is nan')", 1, "error: the loss is nan\n"),
        ("raise ValueError('batch_size is 0')", 2, "error: batch_size is 0\n"),
        ("bytearray(2**62)", 2, "error: not enough memory\n"),
        (
            "import numpy; numpy.zeros(2**50, 'i1')",
            2,
            "error: not enough memory: Unable to allocate 1.00 PiB for an array with shape (1125899906842624,) and "
            "data type int8\n",
        ),
        (
            "import torch; torch.empty(2**50)",
            2,
            "error: not enough memory; lower batch_size, or the model's size or context\n",
        ),
        ("raise FileNotFoundError('x.txt does not exist')", 2, "error: x.txt does not exist\n"),
        ("open('/no/such/file')", 2, "error: /no/such/file: no such file or directory; name another path\n"),
        (
            "raise PermissionError(13, 'Permission denied', 'models')",
            2,
            "error: models: permission denied; give this user access to it or name another place\n",
        ),
        ("raise MismatchError('another hash')", 3, "error: another hash\n"),
        ("raise DeviceError('no CUDA')", 4, "error: no CUDA\n"),
        ("raise StoppedError('stopped by SIGINT', signal.SIGINT)", 130, "error: stopped by SIGINT\n"),
        ("raise StoppedError('stopped by SIGTERM', signal.SIGTERM)", 143, "error: stopped by SIGTERM\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("sys.exit(2)", 2, ""),
        ("import logging; logging.getLogger('smallgpt.x').info('read 3 files')", 0, "read 3 files\n"),
    ],
)
def test_exit_code_and_message(body: str, code: int, stderr: str) -> None:
    process = start(body)
    assert process.communicate() == ("done\n" if "done" in body else "", stderr)
    assert process.returncode == code


def test_two_threads_of_a_core_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 6}, raising=False)
    monkeypatch.setattr(cli, "PROCESSORS", tmp_path)
    assert cli.cores() == 5  # nothing is said
    for number, siblings in {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5", 6: "2,6"}.items():
        (tmp_path / f"cpu{number}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{number}/topology/thread_siblings_list").write_text(f"{siblings}\n")
    assert cli.cores() == 3


def test_a_fault_of_ours_keeps_its_traceback() -> None:
    process = start("raise RuntimeError('a bug')")
    stderr = process.communicate()[1]
    assert process.returncode == 1
    assert stderr.startswith("Traceback")
    assert stderr.endswith("RuntimeError: a bug\n")


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("for _ in range(100_000): print('a line of text')", 141, ""),  # breaks while it writes
        ("import time; time.sleep(0.5); print('text')", 141, ""),  # breaks in the last flush
        (
            "import time; print('text'); time.sleep(0.5); raise MismatchError('another hash')",
            3,
            "error: another hash\n",
        ),
    ],
)
def test_closed_pipe_is_quiet(body: str, code: int, stderr: str) -> None:
    reader, writer = os.pipe()
    process = start(body, stdout=writer)
    os.close(writer)
    if "range" in body:
        assert os.read(reader, 1) == b"a"  # what `| head -c 1` takes
    os.close(reader)
    assert process.communicate()[1] == stderr
    assert process.returncode == code  # 141 is what a shell shows for SIGPIPE


def test_closed_streams_are_empty() -> None:
    body = "print(sys.stdin.read(), 'text', sys.stdout.isatty()); raise ValueError('a wrong value')"
    command = ["sh", "-c", 'exec "$0" "$@" <&- >&-', sys.executable, "-c", f"{HEADER}    {body}\nrun(main)\n"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: a wrong value\n")


def test_control_c_waits_for_the_end_of_a_step() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with interrupts() as pressed:
            os.kill(os.getpid(), signal.SIGINT)
            assert pressed == [signal.SIGINT]
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        with interrupts() as pressed:
            assert pressed == []
    finally:
        signal.signal(signal.SIGINT, before)


def test_control_c_stays_ignored_where_it_was() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts() as pressed:
            os.kill(os.getpid(), signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert pressed == []
    finally:
        signal.signal(signal.SIGINT, before)
