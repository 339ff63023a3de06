"""The interactive session, in a real terminal."""

import contextlib
import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from smallgpt.decode import stream_text
from smallgpt.sampling import GenerationConfig

ROOT = Path(__file__).parent.parent
SONG = "the dog sat \u65e5\u672c \U0001f642 happy"


class Terminal:
    """`ort_generate -i` with a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.keyboard, inside = pty.openpty()
        termios.tcsetwinsize(inside, (50, 1000))  # no line is wrapped
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "smallgpt.ort_generate", "-i", "-t", "1", *map(str, arguments)],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            cwd=ROOT,
            env={**os.environ, "TERM": "dumb", "PYTHONUTF8": "1"},
            preexec_fn=self._own,
        )
        os.close(inside)

    @staticmethod
    def _own() -> None:
        """Make the terminal the one whose Ctrl-C reaches the process."""
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def type(self, text: str) -> None:
        os.write(self.keyboard, text.encode())

    def read_until(self, pattern: str) -> str:
        """Everything up to a match; fails with what there is after a minute."""
        deadline = time.monotonic() + 60
        data = b""
        while time.monotonic() < deadline:
            found = re.search(pattern, self.text, re.S)
            if found:
                text, self.text = self.text[: found.end()], self.text[found.end() :]
                return text
            if select.select([self.keyboard], [], [], 0.2)[0]:
                try:
                    data += os.read(self.keyboard, 2**16)
                except OSError:  # the other end is closed
                    break
                try:
                    self.text += data.decode().replace("\r\n", "\n")
                    data = b""
                except UnicodeDecodeError:  # a character is not whole yet
                    pass
        raise AssertionError(f"no {pattern!r} in {self.text!r}")

    def answer(self, line: str) -> str:
        """Type a line at the prompt; what comes up to the next prompt, the echo of the line left out."""
        self.type(line + "\n")
        return self.read_until(r"\n> $").removesuffix("\n> ").removeprefix(line).removeprefix("\n")

    def close(self) -> None:
        os.close(self.keyboard)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


@pytest.fixture
def terminal(request: pytest.FixtureRequest) -> Iterator[type[Terminal]]:
    """Makes terminals and closes them."""
    opened = []

    class Opened(Terminal):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            opened.append(self)

    yield Opened
    for each in opened:
        each.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_bundles(tmp_path_factory.mktemp("random"), tiny.random_model("llama"), ["fp32"]) / "fp32"


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parrot")
    return tiny.write_bundles(folder, tiny.parrot(SONG), ["fp32"], temperature=0, max_new_tokens=60) / "fp32"


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_endless(tmp_path_factory.mktemp("endless"))


def expected(text: str, turn: int, **settings: float) -> str:
    """What the model says after a text."""
    config = GenerationConfig.from_dict({"max_new_tokens": 8, "ignore_eos": True, **settings})
    return "".join(stream_text(tiny.random_model("llama"), text, config, sequence=turn))


def test_a_session(terminal: type[Terminal], parrot: Path, tmp_path: Path) -> None:
    session = terminal(parrot)
    assert f"{parrot} | seed " in session.read_until("> $")
    assert session.answer("") == f"{SONG}\n(the text is complete; /reset begins another one)"
    assert "/save FILE" in session.answer("/help")
    tokens = len(tiny.tokenizer().encode(SONG)) + 1
    stats = session.answer("/stats")
    assert stats.startswith(f"{tokens} of 64 tokens in the context | {tokens} generated, ")
    assert session.answer(f"/save {tmp_path / 'text.txt'}") == f"{len(SONG.encode())} bytes in {tmp_path / 'text.txt'}"
    assert (tmp_path / "text.txt").read_text(encoding="utf-8") == SONG
    assert session.answer("/save") == "error: /save needs the name of a file"
    assert session.answer("/save /dev/null/x").startswith("error: ")
    assert session.answer("/reset") == "the text is empty"
    assert session.answer("/set stop g sat") == "stop = ('g sat',)"
    assert session.answer("/regen") == "the do"
    assert session.answer("/set stop") == "stop = ()"
    assert session.answer("/regen").startswith(f"{SONG}\n")
    assert session.answer("/jump") == "unknown command /jump; /help lists them"
    session.type("/exit\n")
    assert session.process.wait(timeout=30) == 0


def test_settings_of_a_session(terminal: type[Terminal], bundle: Path) -> None:
    session = terminal(bundle, "-n", 8, "-s", 5, "--ignore-eos")
    session.read_until("> $")
    first = session.answer("the")
    assert first == expected("the", 0, seed=5)
    second = session.answer("")
    assert second == expected("the" + first, 1, seed=5)
    assert session.answer("/regen") == expected("the" + first, 2, seed=5)
    assert session.answer("/set temp 0") == "temperature = 0.0"
    assert session.answer("/regen") == expected("the" + first, 0, temperature=0)
    assert session.answer("/set top_k 3") == "top_k = 3"
    assert session.answer("/seed 9") == "seed = 9"
    assert session.answer("/set temperature 1.5") == "temperature = 1.5"
    session.answer("/reset")
    assert session.answer("a cat") == expected("a cat", 0, seed=9, top_k=3, temperature=1.5)
    for line, message in (
        ("/set temperature hot", "error: temperature is 'hot', which is no value for it"),
        ("/set temperature 1000", "error: temperature is 1000.0; it must be between 0 and 100"),
        ("/set temprature 1", "error: unknown parameter temprature; did you mean temperature?"),
    ):
        assert session.answer(line) == message
    assert "top_k = 3\n" in session.answer("/set")
    assert session.answer("/set num_beams 3") == "num_beams = 3"
    assert session.answer("/regen") == expected("a cat", 0, num_beams=3, top_k=3)
    session.type("\x04")  # Ctrl-D
    assert session.process.wait(timeout=30) == 0


def test_control_c_stops_a_continuation_and_leaves_at_the_prompt(terminal: type[Terminal], endless: Path) -> None:
    session = terminal(endless, "--ignore-eos", "-s", 1)
    session.read_until("> $")
    session.type("the\n")
    session.read_until(r"the\n.{20}")  # it runs
    session.type("\x03")
    session.read_until(r"\n> $")
    assert session.process.poll() is None
    generated = re.search(r"\| (\d+) generated", session.answer("/stats"))
    assert generated is not None
    assert 5 < int(generated[1]) < 50_000
    session.type("\n")  # it goes on from there
    session.read_until(r".{20}")
    session.type("\x03")
    session.read_until(r"\n> $")
    for _ in range(10):  # CPython's readline can miss one that comes right after it wrote the prompt
        session.type("\x03")
        with contextlib.suppress(subprocess.TimeoutExpired):
            session.process.wait(timeout=3)
            break
    assert session.process.poll() == 0
    assert "Traceback" not in session.text


def test_the_end_of_the_context(terminal: type[Terminal], bundle: Path, tmp_path: Path) -> None:
    session = terminal(bundle, "-n", 8, "-s", 5)
    session.read_until("> $")
    words = "the cat sat under the mat, " * 10
    session.answer("the cat")
    session.answer(f"/save {tmp_path / 'before.txt'}")
    before = (tmp_path / "before.txt").read_text()
    count = len(tiny.tokenizer().encode(before + words)) + 1
    message = f"error: the text would have {count} tokens, the context 64; /reset begins an empty one"
    assert session.answer(words) == message
    session.answer(f"/save {tmp_path / 'after.txt'}")
    assert (tmp_path / "after.txt").read_text() == before  # which can go on
    session.type("/exit\n")
    assert session.process.wait(timeout=30) == 0
    session = terminal(bundle, "-n", 80, "-s", 5, "--ignore-eos", "--context-overflow", "slide", "--speculate", 4)
    session.read_until("> $")
    session.answer(words)
    assert "80 generated" in session.answer("/stats")
    assert session.answer("/set num_beams 2").endswith("num_beams 1 does again")
    assert session.answer("/set num_beams 1") == "num_beams = 1"


def test_line_ends_can_be_typed_as_escapes(terminal: type[Terminal], bundle: Path, tmp_path: Path) -> None:
    session = terminal(bundle, "-e", "-n", 0)
    session.read_until("> $")
    session.answer(r"one\ntwo")
    session.answer(f"/save {tmp_path / 'text.txt'}")
    assert (tmp_path / "text.txt").read_bytes() == b"one\ntwo"
    assert "error: " in session.answer(r"\ud800")  # no text in UTF-8, and nothing of it stays
    session.answer(r"\tthree")
    session.answer(f"/save {tmp_path / 'text.txt'}")
    assert (tmp_path / "text.txt").read_bytes() == b"one\ntwo\tthree"
