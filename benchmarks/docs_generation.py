"""`python -m benchmarks.docs_generation`: run the commands of docs/generation.md again and write down what they say.

A console block that follows the line `<!-- run -->` begins with `$ ` and a command, and holds what it wrote to stdout
and then to stderr. One that follows `<!-- session -->` is run in a terminal, where the lines after `> ` are typed, and
one that follows `<!-- http -->` asks a server, which is started for it.
"""

import os
import pty
import re
import select
import shlex
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

from benchmarks.serve import served

PAGE = Path("docs/generation.md")
BLOCK = re.compile(r"<!-- (run|session|http) -->\n```console\n\$ ((?:[^\n]*\\\n)*[^\n]*)\n(.*?)```\n", re.S)


def commands(page: str) -> list[str]:
    """The commands of all marked blocks, but not those that ask a server."""
    return [match[2] for match in BLOCK.finditer(page) if match[1] != "http"]


def requests(page: str) -> list[str]:
    """The commands that ask a server, at localhost:8080."""
    return [match[2] for match in BLOCK.finditer(page) if match[1] == "http"]


def refreshed(page: str, run: Callable[[str], str], session: Callable[[str, list[str]], str]) -> str:
    """The page with what `run` and `session` give in place of the old outputs."""

    def replace(match: re.Match[str]) -> str:
        kind, command, old = match.groups()
        typed = re.findall(r"^> (.*)$", old, re.M)
        new = session(command, typed) if kind == "session" else run(command)
        return f"<!-- {kind} -->\n```console\n$ {command}\n{new.rstrip()}\n```\n"

    return BLOCK.sub(replace, page)


def shell(command: str) -> str:
    """What a command writes to stdout, and below it what it writes to stderr; it may fail, if that is what it shows."""
    print(command, file=sys.stderr)
    done = subprocess.run(["bash", "-c", command], capture_output=True, encoding="utf-8")
    return done.stdout.rstrip("\n") + "\n" * bool(done.stdout) + done.stderr


def terminal(command: str, typed: list[str]) -> str:
    """What a terminal shows when lines are typed at the prompts of a command."""
    print(command, file=sys.stderr)
    keyboard, inside = pty.openpty()
    termios.tcsetwinsize(inside, (50, 1000))
    environment = {**os.environ, "TERM": "dumb"}
    process = subprocess.Popen(shlex.split(command), stdin=inside, stdout=inside, stderr=inside, env=environment)
    os.close(inside)
    shown, waiting = b"", list(typed)
    while select.select([keyboard], [], [], 60)[0]:
        try:
            shown += os.read(keyboard, 2**16)
        except OSError:  # the command has ended
            break
        if shown.endswith(b"\n> ") and waiting:
            os.write(keyboard, f"{waiting.pop(0)}\n".encode())
    os.close(keyboard)
    process.wait()
    return shown.decode().replace("\r\n", "\n")


if __name__ == "__main__":
    with served(["exports/fp32"]) as address:
        place = address.removeprefix("http://")
        text = refreshed(
            PAGE.read_text(encoding="utf-8"), lambda c: shell(c.replace("localhost:8080", place)), terminal
        )
    PAGE.write_text(text, encoding="utf-8")
