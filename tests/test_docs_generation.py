"""docs/generation.md: every command in it is understood, and its outputs can be written again."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks.docs_generation import PAGE, commands, refreshed, shell, terminal
from smallgpt.options import SETTINGS, parse, settings
from smallgpt.sampling import GenerationConfig

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")


def arguments(command: str) -> list[str]:
    """What the command line of a block gets."""
    ours = re.search(r"-m smallgpt\.ort_generate (.*?)(?:;| \| |$)", command.replace("\\\n", " "), re.S)
    assert ours is not None, command
    return shlex.split(ours[1])


def test_all_commands_are_understood() -> None:
    found = commands(TEXT)
    assert len(found) > 20
    for command in found:
        options = parse(arguments(command))
        if "top-p 1.5" not in command:
            settings(options, GenerationConfig())


def test_the_outputs_are_those_of_the_default_model() -> None:
    rows = [json.loads(path.read_text()) for path in (ROOT / "reports/results").glob("stories-*.json")]
    default = {row["model_sha256"] for row in rows if row["config"] == "params.yaml"}
    assert set(re.findall(r'"model_sha256": "(\w+)"', TEXT)) == default


def test_every_feature_has_an_example() -> None:
    used = {word for command in commands(TEXT) for word in arguments(command) if word.startswith("-")}
    assert used >= {
        *("-p", "-s", "-n", "-e", "-i", "-q", "--echo", "--greedy", "--temp", "--top-k", "--min-p", "--stop"),
        *("--repetition-penalty", "--no-repeat-ngram-size", "--ignore-eos", "--context-overflow", "--truncate"),
        *("--num-return-sequences", "--batch-file", "--json", "--jsonl", "--logprobs", "--num-beams"),
        *("--speculate", "--score", "--print-config"),
    }
    known = {f"--{name.replace('_', '-').removesuffix('s')}" for name in SETTINGS}
    assert [name for name in known if name not in TEXT and name != "--early-stopping"] == []


@pytest.mark.parametrize("ending", ["", "\n"])
def test_outputs_are_replaced_and_the_rest_stays(ending: str) -> None:
    page = (
        "a\n<!-- run -->\n```console\n$ printf 'x' && \\\n    echo y >&2\nold\nolder\n```\n"
        "```console\n$ echo not marked\nstays\n```\n<!-- run -->\n```console\n$ false\n```\n" + ending
    )
    new = refreshed(page, shell, terminal)
    assert "$ printf 'x' && \\\n    echo y >&2\nx\ny\n```\n```console\n$ echo not marked\nstays\n```\n" in new
    assert new.endswith("<!-- run -->\n```console\n$ false\n\n```\n" + ending)
    assert refreshed(new, shell, terminal) == new


def test_a_session_is_typed_into_a_terminal() -> None:
    program = "print(); [print(input('> ') * 2) for _ in 'ab']; print(open(0).isatty())"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    page = f"<!-- session -->\n```console\n$ {command}\n> old\nold\n> new\n```\n"
    new = refreshed(page, shell, terminal)
    assert new.endswith("\n> old\noldold\n> new\nnewnew\nTrue\n```\n")
    assert refreshed(new, shell, terminal) == new
