"""Every flag in both spellings, its twin in the environment, and who wins."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smallgpt.options import SETTINGS, convert, json_fields, parse, read_prompts, settings, unescape
from smallgpt.sampling import GenerationConfig

BUNDLE = GenerationConfig(temperature=0.3, top_k=9, stop=("bundle",), seed=1)


def config(*arguments: str) -> GenerationConfig:
    return settings(parse(["x", *arguments]), BUNDLE)[0]


@pytest.mark.parametrize(
    ("spellings", "value", "name", "expected"),
    [
        (["-n", "--max-new-tokens", "--n-predict", "--predict"], "7", "max_new_tokens", 7),
        (["-n"], "-1", "max_new_tokens", 2**31),
        (["--min-new-tokens"], "3", "min_new_tokens", 3),
        (["--max-length"], "30", "max_length", 30),
        (["--temperature", "--temp"], "0.7", "temperature", 0.7),
        (["--top-k"], "11", "top_k", 11),
        (["--top-p"], "0.5", "top_p", 0.5),
        (["--min-p"], "0.05", "min_p", 0.05),
        (["--repetition-penalty", "--repeat-penalty"], "1.3", "repetition_penalty", 1.3),
        (["--presence-penalty"], "0.5", "presence_penalty", 0.5),
        (["--frequency-penalty"], "-0.5", "frequency_penalty", -0.5),
        (["--repeat-last-n"], "64", "repeat_last_n", 64),
        (["--no-repeat-ngram-size"], "3", "no_repeat_ngram_size", 3),
        (["--logit-bias"], "17=-2.5", "logit_bias", {17: -2.5}),
        (["--num-beams"], "4", "num_beams", 4),
        (["--length-penalty"], "2", "length_penalty", 2.0),
        (["--early-stopping"], "false", "early_stopping", False),
        (["--early-stopping"], "never", "early_stopping", "never"),
        (["--stop", "-r", "--reverse-prompt"], "end", "stop", ("end",)),
        (["--stop-token-id"], "5", "stop_token_ids", (5,)),
        (["--max-time"], "1.5", "max_time", 1.5),
        (["--num-return-sequences", "--num-samples"], "3", "num_return_sequences", 3),
        (["-s", "--seed"], "42", "seed", 42),
    ],
)
def test_settings_in_every_spelling(spellings: list[str], value: str, name: str, expected: Any) -> None:
    for spelling in spellings:
        assert getattr(config(spelling, value), name) == expected
        assert settings(parse(["x", spelling, value]), BUNDLE)[1][name] == "command line"
    assert getattr(config(), name) != expected or name == "stop"


def test_flags_without_a_value() -> None:
    assert config("--greedy").temperature == config("--no-sample").temperature == 0
    assert config("--greedy", "--temp", "0.5").temperature == 0.5  # the last one counts
    assert config("--ignore-eos").ignore_eos is True
    assert config("--stop", "a", "-r", "b").stop == ("a", "b")
    assert config("--stop-token-id", "5", "--stop-token-id", "6").stop_token_ids == (5, 6)
    assert config("--logit-bias", "5=1", "--logit-bias", "6=-1").logit_bias == {5: 1, 6: -1}


@pytest.mark.parametrize(
    ("spellings", "name", "expected"),
    [
        (["-p x", "--prompt x"], "prompt", "x"),
        (["-f x", "--file x"], "file", Path("x")),
        (["--batch-file x"], "batch_file", Path("x")),
        (["-i", "--interactive"], "interactive", True),
        (["--score x"], "score", Path("x")),
        (["-e", "--escape"], "escape", True),
        (["--truncate left"], "truncate", "left"),
        (["--context-overflow slide"], "context_overflow", "slide"),
        (["--speculate 4"], "speculate", 4),
        (["--no-stream"], "stream", False),
        (["--stream", ""], "stream", True),
        (["--echo", "--display-prompt"], "echo", True),
        (["-o x", "--output x"], "output", Path("x")),
        (["--json"], "json", True),
        (["--jsonl"], "jsonl", True),
        (["--json --logprobs 3"], "logprobs", 3),
        (["-q", "--quiet", "--no-perf"], "quiet", True),
        (["-v", "--verbose"], "verbose", True),
        (["--device cuda:1"], "device", "cuda:1"),
        (["-t 2", "--threads 2"], "threads", 2),
        (["--warmup"], "warmup", True),
        (["--batch-size 3"], "batch_size", 3),
        (["--verify"], "verify", True),
        (["--list-devices"], "list_devices", True),
        (["--print-config"], "print_config", True),
        (["-m x", "--model x", "x"], "bundle", Path("x")),
        ([""], "bundle", Path("exports/fp32")),
    ],
)
def test_other_options_in_every_spelling(spellings: list[str], name: str, expected: Any) -> None:
    for spelling in spellings:
        assert getattr(parse(spelling.split()), name) == expected


def test_the_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for name in SETTINGS:
        assert f"--{name.replace('_', '-').removesuffix('s')}" in text
    assert "SMALLGPT_TEMPERATURE=0.5" in text


TWINS = {
    "temperature": ("0.5", 0.5),
    "top_k": ("7", 7),
    "top_p": ("0.25", 0.25),
    "min_p": ("0.1", 0.1),
    "repetition_penalty": ("1.5", 1.5),
    "presence_penalty": ("1", 1.0),
    "frequency_penalty": ("-1", -1.0),
    "repeat_last_n": ("16", 16),
    "no_repeat_ngram_size": ("2", 2),
    "logit_bias": ("5=1,6=-2.5", {5: 1.0, 6: -2.5}),
    "num_beams": ("3", 3),
    "length_penalty": ("0", 0.0),
    "early_stopping": ("Never", "never"),
    "num_return_sequences": ("2", 2),
    "max_new_tokens": ("-1", 2**31),
    "min_new_tokens": ("2", 2),
    "max_length": ("40", 40),
    "max_time": ("2.5", 2.5),
    "stop": ("a, b", ("a, b",)),
    "stop_token_ids": ("5,6", (5, 6)),
    "ignore_eos": ("true", True),
    "seed": ("9", 9),
}


def test_every_setting_has_a_twin_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TWINS.keys() == set(SETTINGS)
    for name, (text, expected) in TWINS.items():
        with monkeypatch.context() as context:
            context.setenv(f"SMALLGPT_{name.upper()}", text)
            found, origin = settings(parse(["x"]), BUNDLE)
            assert getattr(found, name) == expected
            assert origin[name] == "environment"
            assert {origin[other] for other in SETTINGS if other not in (name, "seed")} == {"bundle"}
            context.setenv(f"SMALLGPT_{name.upper()}", "")  # as if it were not there
            assert settings(parse(["x"]), BUNDLE)[1][name] == ("random" if name == "seed" else "bundle")
            context.setenv(f"SMALLGPT_{name.upper()}", "?" if name != "stop" else "fine")
            if name != "stop":
                with pytest.raises(ValueError, match=rf"SMALLGPT_{name.upper()} is '\?', which is no value for it"):
                    settings(parse(["x"]), BUNDLE)


def test_the_command_line_beats_the_environment_beats_the_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALLGPT_TOP_K", "7")
    monkeypatch.setenv("SMALLGPT_TEMPERATURE", "0.7")
    found, origin = settings(parse(["x", "--temp", "0.9"]), BUNDLE)
    assert (found.temperature, found.top_k, found.stop) == (0.9, 7, ("bundle",))
    assert (origin["temperature"], origin["top_k"], origin["stop"]) == ("command line", "environment", "bundle")


def test_device_and_threads_have_twins_too(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = parse(["x"])
    assert (plain.device, plain.threads) == ("auto", 0)
    assert plain.origin == {"bundle": "command line", "device": "default", "threads": "default"}
    monkeypatch.setenv("SMALLGPT_DEVICE", "cpu")
    monkeypatch.setenv("SMALLGPT_THREADS", "3")
    found = parse(["--threads", "1"])
    assert (found.device, found.threads) == ("cpu", 1)
    assert found.origin == {"bundle": "default", "device": "environment", "threads": "command line"}
    monkeypatch.setenv("SMALLGPT_THREADS", "many")
    with pytest.raises(ValueError, match="--threads is many; it must be a whole number of at least 0"):
        parse(["x"])


def test_random_seeds_differ() -> None:
    seeds = {config(*arguments).seed for arguments in ([], [], ["-s", "-1"], ["--seed", "-1"])}
    assert len(seeds) == 4
    assert settings(parse(["x", "-s", "-1"]), BUNDLE)[1]["seed"] == "random"


def test_values_out_of_range_are_named() -> None:
    for arguments, message in (
        (["-n", "-2"], "max_new_tokens is -2; it must be between 0 and"),
        (["--top-p", "0"], "top_p is 0"),
        (["--temp", "nan"], "temperature is nan; it must be between"),
        (["--num-beams", "2", "--num-samples", "3"], "2 beams give no more than that"),
        (["--stop", ""], "none of them empty"),
    ):
        with pytest.raises(ValueError, match=message):
            config(*arguments)


def test_escapes() -> None:
    assert unescape(r"a\nb\tc\\n\u00e9\ud83d\ude42\x\r") == "a\nb\tc\\n\u00e9\U0001f642\\x\r"
    assert unescape("no escapes, \u65e5\u672c") == "no escapes, \u65e5\u672c"
    assert unescape(r"\ud83d") == "\ud83d"  # what is no text is said by the tokenizer
    assert parse(["-e", "-p", r"a\nb", "--stop", r"\n"]).stop == ["\n"]
    assert parse(["-p", r"a\nb"]).prompt == r"a\nb"
    assert parse(["-e", "-p", r"a\nb"]).prompt == "a\nb"


def test_convert_for_the_session() -> None:
    assert convert("temperature", "0.5") == 0.5
    assert convert("stop", "") == convert("stop_token_ids", "") == []
    assert convert("logit_bias", "") == {}
    assert convert("max_new_tokens", "-1") == 2**31
    assert convert("seed", "-1") >= 0
    with pytest.raises(ValueError, match="unknown parameter top_q; did you mean top_p"):
        convert("top_q", "1")


def prompts(*arguments: str) -> list[str]:
    return read_prompts(parse(["x", *arguments]))


def test_prompts(tmp_path: Path) -> None:
    assert prompts("-p", " a\n") == [" a\n"]
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"a\r\nb\n")
    assert prompts("-f", str(path)) == ["a\r\nb\n"]  # a file is taken as it is
    assert prompts("--batch-file", str(path)) == ["a", "b"]
    path.write_text("\na\n\n")
    assert prompts("--batch-file", str(path)) == ["", "a", ""]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\\nb"}\n\n{"prompt": "", "id": 3}\n')
    assert prompts("--batch-file", str(tmp_path / "p.jsonl")) == ["a\nb", ""]
    (tmp_path / "P.JSONL").write_text('\ufeff{"prompt": "a"}\n')
    assert prompts("--batch-file", str(tmp_path / "P.JSONL")) == ["a"]
    path.write_text("\ufeffOnce\n")
    assert prompts("--batch-file", str(path)) == ["Once"]
    for text in ('["a"]', "{", '{"prompt": 3}', '{"text": "a"}', "null", "[" * 100_000):
        with pytest.raises(ValueError, match="p, line 1: expected a JSON object with a text `prompt`"):
            json_fields(text, Path("p"), "prompt")


@pytest.mark.parametrize(("stdin", "expected"), [(b"a\n", "a"), (b"a\n\n", "a\n"), (b"a", "a"), (b"", "")])
def test_one_line_end_of_stdin_is_cut(stdin: bytes, expected: str) -> None:
    code = "from smallgpt.options import *; print(repr(read_prompts(parse(['x'])) + read_prompts(parse(['-p', '-']))))"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], input=stdin, capture_output=True, cwd=root, check=True)
    assert done.stdout.decode().strip() == repr([expected, ""])


def test_neither_pytorch_nor_onnxruntime_is_imported() -> None:
    code = (
        "import sys, smallgpt.options; print([m for m in ('torch', 'onnxruntime', 'numpy.random') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert "torch" not in done.stdout
    assert "onnxruntime" not in done.stdout


def test_a_namespace_holds_every_setting() -> None:
    options = parse(["x"])
    assert isinstance(options, argparse.Namespace)
    assert all(getattr(options, name) is None for name in SETTINGS)
    assert not [name for name in os.environ if name in {f"SMALLGPT_{setting.upper()}" for setting in SETTINGS}]
