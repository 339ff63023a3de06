"""The command line on bundles of tiny models: its output, its errors, and how it ends."""

import base64
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from smallgpt.bundle import load_bundle, write_config
from smallgpt.cli import DeviceError, MismatchError
from smallgpt.config import EvaluationConfig
from smallgpt.decode import stream_text
from smallgpt.evaluate import evaluate_split
from smallgpt.files import write_json
from smallgpt.ort_generate import main
from smallgpt.runtime import CALLS, OrtGPT, check_golden
from smallgpt.sampling import GenerationConfig
from smallgpt.tokenizer import train_tokenizer
from smallgpt.tokens import TokenFile, write_tokens

ROOT = Path(__file__).parent.parent
SONG = "the dog sat 日本 🙂 happy"  # with characters that the tokenizer spells in bytes


@pytest.fixture(scope="module")
def random_bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_bundles(tmp_path_factory.mktemp("random"), tiny.random_model("llama"), ["fp32", "fp16"])


@pytest.fixture(scope="module")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that, without a prompt, always says SONG."""
    folder = tmp_path_factory.mktemp("parrot")
    return tiny.write_bundles(folder, tiny.parrot(SONG), ["fp32"], temperature=0, max_new_tokens=60) / "fp32"


@pytest.fixture
def damaged(random_bundles: Path, tmp_path: Path) -> Path:
    """A copy of a bundle, to be damaged by a test."""
    return Path(shutil.copytree(random_bundles / "fp32", tmp_path / "bundle"))


def run(*arguments: object, stdin: bytes = b"", before: str = "") -> subprocess.CompletedProcess[bytes]:
    """The command line in a process of its own; `before` is code that runs first."""
    program = ["-c", f"{before}\nfrom smallgpt.ort_generate import run\nrun()"] if before else []
    command = [sys.executable, *(program or ["-m", "smallgpt.ort_generate"]), *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT, timeout=60)


def error(result: subprocess.CompletedProcess[bytes]) -> tuple[int, str]:
    """Exit code and the only line on stderr; nothing may be on stdout."""
    lines = result.stderr.decode().splitlines()
    assert result.stdout == b""
    assert len(lines) == 1, lines
    return result.returncode, lines[0]


def test_golden_logits_catch_another_computation(random_bundles: Path, damaged: Path) -> None:
    count, largest = check_golden(OrtGPT(random_bundles / "fp32", threads=2))
    assert count == 3
    assert 0 < largest < 2e-5
    certificate = json.loads((damaged / "parity.json").read_text())
    logits = np.frombuffer(base64.b64decode(certificate["golden"][2]["logits"][1]), "<f4").copy()
    for wrong, said in ((logits[-1] + np.float32(0.01), "0.01"), (np.nan, "nan")):
        logits[-1] = wrong
        certificate["golden"][2]["logits"][1] = base64.b64encode(logits.tobytes()).decode()
        write_json(damaged / "parity.json", certificate)
        write_config(damaged, load_bundle(damaged, verify=False).config)
        code, line = error(run(damaged, "--verify"))
        assert code == 3
        assert f"logits differ by {said} from those in parity.json, limit 0.001" in line


def test_only_the_text_is_on_stdout(parrot: Path) -> None:
    result = run(parrot, "-p", "")
    assert result.returncode == 0
    assert result.stdout == SONG.encode()
    assert f"decode {len(tiny.tokenizer().encode(SONG)) + 1} tokens" in result.stderr.decode()
    assert b"ended by eos | fp32 on cpu" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert b"seed" not in result.stderr  # greedy draws nothing
    quiet = run(parrot, "-q", stdin=b"\n")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, SONG.encode(), b"")


def test_options_override_the_bundles_defaults(
    parrot: Path, random_bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(bundle: Path, *arguments: object) -> tuple[str, str]:
        assert main([str(bundle), "-t", "1", *map(str, arguments)]) == 0
        return capsys.readouterr()

    count = len(tiny.tokenizer().encode("the dog"))
    assert call(parrot, "-p", "", "-n", count)[0] == "the dog"
    assert call(parrot, "-p", "", "--stop", " sat", "--stop", "x")[0] == "the dog"
    assert len(call(parrot, "-p", "", "--ignore-eos")[0]) > len(SONG)
    bundle = random_bundles / "fp32"
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the", encoding="utf-8")
    options = ["-n", 20, "--temp", 1.5, "--top-k", 0]
    text, messages = call(bundle, "-f", prompt, "-s", 11, *options, "--echo")
    assert messages.startswith("seed: 11\n")
    assert text == "the" + call(bundle, "-p", "the", "-s", 11, *options, "-q")[0]
    assert text != "the" + call(bundle, "-p", "the", "-s", 12, *options, "-q")[0]
    text, messages = call(bundle, "-p", "the", *options, "-q")
    assert call(bundle, "-p", "the", *options, "-s", messages.removeprefix("seed: ").strip())[0] == text
    greedy = call(bundle, "-p", "the", "-n", 20, "--greedy", "-q")
    assert greedy == (call(bundle, "-p", "the", "-n", 20, "--top-k", 1, "-s", 1, "-q")[0], "")
    assert greedy[0] != call(bundle, "-p", "the", "-n", 20, "--greedy", "--repetition-penalty", 2)[0]


def test_serving_needs_only_the_base_install(parrot: Path) -> None:
    guard = (
        "import sys\n"
        "class Guard:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'torch', 'mlflow', 'dvc', 'onnx', 'yaml', 'pydantic', 'safetensors'}:\n"
        "            raise ImportError(f'{name} is not in the base install')\n"
        "sys.meta_path.insert(0, Guard())\n"
    )
    result = run(parrot, "-p", "", "--verify", before=guard)
    assert (result.returncode, result.stdout) == (0, SONG.encode()), result.stderr
    assert result.stderr.startswith(b"verified: 3 golden logits, largest difference ")
    assert b"not in the base install" in run("x", before=guard + "import torch").stderr  # the guard guards


def test_bundles_that_do_not_fit(damaged: Path) -> None:
    graph = (damaged / "model.onnx").read_bytes()
    (damaged / "model.onnx").write_bytes(graph[: len(graph) // 2])
    code, line = error(run(damaged, "-p", "x"))
    assert code == 3
    assert line.startswith(f"error: {damaged}/model.onnx does not have the sha256 in config.json")
    write_config(damaged, load_bundle(damaged, verify=False).config)  # now the hash is that of the cut file
    code, line = error(run(damaged, "-p", "x"))
    assert code == 3
    assert f"{damaged}/model.onnx cannot be loaded" in line
    (damaged / "model.onnx").unlink()
    code, line = error(run(damaged, "-p", "x"))
    assert code == 3
    assert line.startswith(f"error: {damaged}/model.onnx does not exist")
    settings = json.loads((damaged / "config.json").read_text())
    write_json(damaged / "config.json", settings | {"contract": 4})
    code, line = error(run(damaged, "-p", "x"))
    assert code == 3
    assert line.endswith("has contract 4, this smallgpt reads 3; upgrade smallgpt")


@pytest.mark.parametrize("change", [{"dtype": "float99"}, {"dtype": "float16"}, {"head_dim": 4}, {"num_kv_heads": 8}])
def test_a_configuration_of_another_cache_is_refused(damaged: Path, change: dict[str, object]) -> None:
    settings = json.loads((damaged / "config.json").read_text())
    if "dtype" in change:
        settings |= change
    else:
        settings["model"] |= change
    write_json(damaged / "config.json", settings)
    code, line = error(run(damaged, "-p", "x"))
    assert (code, line) == (3, f"error: {damaged}: the cache of the graph is not that of config.json")


def test_what_was_decoded_is_not_lost_where_nothing_can_follow(random_bundles: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the\ncat\n")
    options = ["--no-repeat-ngram-size", 1, "--ignore-eos", "--context-overflow", "slide", "-n", 3000, "--jsonl"]
    result = run(random_bundles / "fp32", "--batch-file", tmp_path / "prompts.txt", *options)
    assert result.returncode == 2
    assert result.stderr.decode().splitlines()[-1].startswith("error: no token is left: ")
    rows = [json.loads(line) for line in result.stdout.decode().splitlines()]
    assert [row["finish_reason"] for row in rows] == ["interrupted"] * 2
    assert all(200 < len(set(row["token_ids"])) == len(row["token_ids"]) for row in rows)


def test_a_foreign_tokenizer_is_refused(damaged: Path) -> None:
    (damaged / "tokenizer.model").write_bytes(train_tokenizer([tiny.text(0, 500)], vocab_size=310))
    write_config(damaged, load_bundle(damaged, verify=False).config)
    with pytest.raises(MismatchError, match=r"graph, tokenizer and config\.json do not belong together"):
        OrtGPT(damaged)


def test_a_foreign_graph_is_refused(damaged: Path, parrot: Path) -> None:
    shutil.copyfile(parrot / "model.onnx", damaged / "model.onnx")  # a gpt2 in a llama's bundle
    write_config(damaged, load_bundle(damaged, verify=False).config)
    with pytest.raises(MismatchError, match=r"graph, tokenizer and config\.json do not belong together"):
        OrtGPT(damaged)


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["-p", "cat " * 100], b"", "tokens; between 1 and 64 fit into the context"),
        (["-p", "x", "--top-p", "2"], b"", "top_p is 2.0; it must be between 0 and 1"),
        (["-p", "x", "-n", "-2"], b"", "max_new_tokens is -2; it must be between 0 and"),
        (["-p", "x", "-s", "-2"], b"", "seed is -2; it must be between 0 and"),
        (["-p", "x", "-t", "-1"], b"", "--threads is -1; it must be a whole number of at least 0"),
        (["-p", "x", "--device", "tpu"], b"", "--device is 'tpu'; it must be auto, cpu, cuda or cuda:N"),
        (["-p", "x", "--nope"], b"", "unrecognized arguments: --nope; --help lists the options"),
        (["-p", "x", "-f", "y"], b"", "argument -f/--file: not allowed with argument -p/--prompt"),
        (["-p", "x", "--json", "--jsonl"], b"", "argument --jsonl: not allowed with argument --json"),
        (["-p", "x", "--logprobs", "1"], b"", "--logprobs needs --json or --jsonl"),
        (["-p", "x", "--json", "--logprobs", "1", "--num-beams", "2"], b"", "--logprobs does not act in beam search"),
        (["-p", "x", "--speculate", "4", "--num-beams", "2"], b"", "--speculate does not act in beam search"),
        (["-p", "x", "--context-overflow", "slide", "--num-beams", "2"], b"", "slide does not act in beam search"),
        (["-p", "x", "--speculate", "4", "--num-samples", "2"], b"", "set --batch-size 1"),
        (["-p", "x", "--batch-size", "0"], b"", "argument --batch-size: 0 is no whole number of at least 1"),
        (["-p", "x", "--logit-bias", "5"], b"", "'5' is not ID=BIAS, such as 17=-2.5"),
        (["-p", "x", "--logit-bias", "320=1"], b"", "logit_bias names the token 320; the vocabulary has 0 to 319"),
        (["-p", "x", "--stop-token-id", "320"], b"", "stop_token_ids names the token 320"),
        (["-p", "x", "--early-stopping", "maybe"], b"", "'maybe' is not true, false or never"),
        (["-p", "x", "-o", "."], b"", "--output is ., which cannot be written"),
        (["-p", "x", "-m", "other"], b"", "the bundle is named twice"),
        (["-i"], b"", "--interactive needs a terminal"),
        (["-i", "--json"], b"", "--interactive writes to the terminal; leave --output, --json and --jsonl out"),
        (["-p", "x", "-t", "99999999999"], b"", "--threads is 99999999999; it must be a whole number"),
        (["--score", "nowhere.txt"], b"", "nowhere.txt"),
        (["--batch-file", os.devnull], b"", "/dev/null holds no prompt"),
        (["-f", "nowhere.txt"], b"", "nowhere.txt"),
        ([], b"ab\xff", "stdin line 1, byte 2: 0xff is not UTF-8; save the file as UTF-8"),
        ([b"-p", b"\xff"], b"", "lone surrogate"),
    ],
)
def test_wrong_input_is_one_line(random_bundles: Path, arguments: list[str], stdin: bytes, message: str) -> None:
    command = [sys.executable, "-m", "smallgpt.ort_generate", str(random_bundles / "fp32"), "-q", *arguments]
    code, line = error(subprocess.run(command, input=stdin, capture_output=True, cwd=ROOT))
    assert code == 2
    assert message in line


def test_a_missing_bundle_or_prompt_is_one_line(parrot: Path, tmp_path: Path) -> None:
    code, line = error(run(tmp_path / "no", "-p", "x"))
    assert code == 2
    assert "no/config.json does not exist; name a bundle such as exports/fp32" in line
    terminal, other = pty.openpty()
    command = [sys.executable, "-m", "smallgpt.ort_generate", str(parrot)]
    code, line = error(subprocess.run(command, stdin=other, capture_output=True, cwd=ROOT))
    os.close(terminal)
    os.close(other)
    assert (code, line) == (2, "error: there is no prompt; give one with -p, with -f FILE or on stdin")


def test_devices_are_not_swapped_silently(random_bundles: Path, caplog: pytest.LogCaptureFixture) -> None:
    code, line = error(run(random_bundles / "fp32", "-p", "x", "--device", "cuda"))
    assert code == 4
    assert line.endswith("is a fp32 bundle for cpu; take exports/fp16 for cuda")
    assert OrtGPT(random_bundles / "fp16", device="cpu", threads=1).device == "cpu"
    assert caplog.text == ""
    try:
        session = OrtGPT(random_bundles / "fp16", device="cuda").session
        assert session.get_providers()[0] == "CUDAExecutionProvider"
    except DeviceError:
        code, line = error(run(random_bundles / "fp16", "-p", "x", "--device", "cuda"))
        assert code == 4
        assert line.startswith("error: cuda cannot be used: ")
        auto = run(random_bundles / "fp16", "-p", "x", "-n", 5, "-s", 1, "-q")
        assert auto.returncode == 0
        assert auto.stdout
        reason = line.removeprefix("error: cuda cannot be used: ")
        assert auto.stderr.decode() == (
            f"warning: no GPU ({reason}): this fp16 bundle runs on the CPU, where fp32 is faster\n"
        )


def test_session_options_reach_onnxruntime(random_bundles: Path) -> None:
    entry = ("session.intra_op.allow_spinning", "0")
    session = OrtGPT(random_bundles / "fp32", threads=2, session=[entry]).session
    assert session.get_session_options().get_session_config_entry(entry[0]) == "0"
    plain = run(random_bundles / "fp32", "-p", "the", "-s", 1, "-q")
    assert run(random_bundles / "fp32", "-p", "the", "-s", 1, "-q", "--session-option", "=".join(entry)).stdout
    assert plain.stdout
    code, line = error(run(random_bundles / "fp32", "-p", "x", "--session-option", "spinning"))
    assert code == 2
    assert "'spinning' is not KEY=VALUE, such as session.intra_op.allow_spinning=0" in line


def test_only_so_many_shapes_of_calls_are_kept(random_bundles: Path) -> None:
    model = OrtGPT(random_bundles / "fp32", threads=1)
    model.reserve(12)
    first = model.fill(0, np.array([[3, 9, 40]])).copy()
    for rows in range(1, 13):
        for width in range(1, 13):
            model.fill(0, np.full((rows, width), 7))
    assert len(model._calls) == CALLS
    assert np.array_equal(model.fill(0, np.array([[3, 9, 40]])), first)


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """stdout and stderr of the command line in this process."""
    assert main(["-t", "1", *map(str, arguments)]) == 0
    return capsys.readouterr()


def test_json_says_it_all(random_bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = random_bundles / "fp32"
    options = ["-p", "the cat", "-n", 12, "-s", 5, "--num-samples", 3, "--logprobs", 2]
    whole = json.loads(call(capsys, bundle, *options, "--json")[0])
    assert len(whole["sequences"]) == 3
    for i, row in enumerate(whole["sequences"]):
        assert (row["prompt"], row["index"], row["seed"]) == ("the cat", i, 5)
        assert row["finish_reason"] in ("eos", "length")
        ids = [token for token in row["token_ids"] if token != 3]
        assert row["text"] == tiny.tokenizer().decode(ids)
        assert [entry["id"] for entry in row["logprobs"]] == row["token_ids"]
        assert all(len(entry["top"]) == 2 and entry["logprob"] <= entry["top"][0][1] for entry in row["logprobs"])
    assert whole["settings"]["max_new_tokens"] == 12
    assert GenerationConfig.from_dict(whole["settings"]).seed == 5
    assert (whole["variant"], whole["device"]) == ("fp32", "cpu")
    assert whole["model_sha256"] == load_bundle(bundle).config.lineage["model"]
    assert whole["prompt_tokens"] == len(tiny.tokenizer().encode("the cat")) + 1
    assert whole["tokens"] == sum(len(row["token_ids"]) for row in whole["sequences"])
    assert whole["seconds"].keys() == {"load", "first", "total"}
    lines = call(capsys, bundle, *options, "--jsonl")[0].splitlines()
    assert [json.loads(line) for line in lines] == whole["sequences"]
    # A sample is the same without its company, and as text.
    for i, row in enumerate(whole["sequences"]):
        if i == 0:
            assert call(capsys, bundle, *options[:6], "-q")[0] == row["text"]
    texts = call(capsys, bundle, *options[:8], "-q", "--echo")[0]
    assert texts == "\n---\n".join("the cat" + row["text"] for row in whole["sequences"]) + "\n"


def test_beams_with_scores(random_bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = random_bundles / "fp32"
    options = [bundle, "-p", "the cat", "-n", 12, "--num-beams", 4, "-q"]
    whole = json.loads(call(capsys, *options, "--num-return-sequences", 3, "--json")[0])
    rows = whole["sequences"]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert call(capsys, *options)[0] == rows[0]["text"]
    stopped = json.loads(call(capsys, *options, "--stop", rows[0]["text"][3:5], "--json")[0])["sequences"][0]
    assert (stopped["finish_reason"], rows[0]["text"][3:5] in stopped["text"]) == ("stop", False)
    none = json.loads(call(capsys, *options, "-n", 0, "--num-return-sequences", 3, "--json")[0])["sequences"]
    assert [(row["text"], row["finish_reason"]) for row in none] == [("", "length")]


def test_the_size_of_a_batch_does_not_change_the_digits_of_quantised_bundles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tiny.write_uncertified(tmp_path, tiny.random_model("llama", embed_dim=256, num_heads=4), "int8")
    prompts = ["the cat sat on", "", "a dog", "happy and sad and happy again, she said to the cat", "sad"]
    (tmp_path / "prompts.txt").write_text("\n".join([*prompts, ""]), encoding="utf-8")
    found = []
    for size in (1, 2, 3, 8):
        options = ["-n", 12, "-s", 3, "-q", "--batch-size", size, "--jsonl", "--logprobs", 0]
        lines = (
            call(capsys, bundle, "--batch-file", tmp_path / "prompts.txt", *options)[0].removesuffix("\n").split("\n")
        )
        found.append([json.loads(line)["logprobs"] for line in lines])
    assert len(found[0]) == len(prompts)
    assert found.count(found[0]) == len(found)


def test_a_large_batch_may_be_multiplied_in_another_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_uncertified(tmp_path, tiny.random_model("llama"), "int8")
    tiny.write_uncertified(tmp_path, tiny.random_model("llama"), "fp32")
    prompt = "the cat sat on a dog, happy and sad and happy again"
    options = ["-p", prompt, "-n", 6, "-s", 3, "-q", "--num-samples", 8, "--jsonl", "--logprobs", 0]

    def logprobs(variant: str, *more: str) -> list[list[float]]:
        lines = call(capsys, tmp_path / variant, *options, *more)[0].splitlines()
        return [[token["logprob"] for token in json.loads(line)["logprobs"]] for line in lines]

    expected, found = logprobs("int8"), logprobs("int8", "--no-batch-invariant")
    assert found != expected
    first = [row[0] for row in expected]  # after the prompt, which is read in one way
    assert [row[0] for row in found] == first
    assert logprobs("int8", "--batch-invariant") == logprobs("int8", "--no-batch-invariant", "--batch-size", "5")
    assert logprobs("fp32", "--no-batch-invariant") == logprobs("fp32")


def test_batch_files(random_bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, prompts = random_bundles / "fp32", ["the cat", "", "a dog\u2028sat", "happy", "sad and"]
    options = ["-n", 9, "-s", 3, "-q"]
    (tmp_path / "prompts.txt").write_bytes("\r\n".join([*prompts, ""]).encode())
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    alone = [call(capsys, bundle, "-p", prompt, *options)[0] for prompt in prompts]
    for name in ("prompts.txt", "prompts.jsonl"):
        for size in (1, 2, 8):
            more = ["--batch-file", tmp_path / name, "--batch-size", size, "--jsonl"]
            rows = [
                json.loads(line) for line in call(capsys, bundle, *options, *more)[0].removesuffix("\n").split("\n")
            ]
            assert [row["prompt"] for row in rows] == prompts
            assert [row["text"] for row in rows] == alone
    many = call(capsys, bundle, *options, "--batch-file", tmp_path / "prompts.txt", "--num-samples", 2, "--jsonl")[0]
    rows = [json.loads(line) for line in many.removesuffix("\n").split("\n")]
    assert [(row["prompt"], row["index"]) for row in rows] == [(prompt, i) for prompt in prompts for i in (0, 1)]
    assert [row["text"] for row in rows[::2]] == alone
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 2: expected a JSON object with a text `prompt`"):
        main([str(bundle), "--batch-file", str(tmp_path / "bad.jsonl")])


def test_output_goes_to_a_file(parrot: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "out.txt"
    assert call(capsys, parrot, "-p", "", "-q", "-o", path) == ("", "")
    assert path.read_bytes() == SONG.encode()
    call(capsys, parrot, "-p", "", "-q", "--json", "-o", path)
    assert json.loads(path.read_text(encoding="utf-8"))["sequences"][0]["text"] == SONG
    assert list(path.parent.iterdir()) == [path]


def test_score_is_what_the_evaluate_stage_says(
    random_bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [tiny.text(7, 90), "caf\u00e9 \u65e5\u672c \n", tiny.text(8, 30)]
    written = [documents[0], "", "caf\u00e9 \u65e5\u672c \r\n", " \n", documents[2]]  # read as the pipeline reads
    model = tiny.random_model("llama")
    assert model.tokenizer is not None
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\r\n" for text in written))
    (tmp_path / "one.txt").write_text("\ufeff" + documents[1].replace("\n", "\r\n"), encoding="utf-8", newline="")
    for name, texts in (("documents.jsonl", documents), ("one.txt", documents[1:2])):
        write_tokens(tmp_path / "tokens", "test", texts, model.tokenizer)
        expected, _ = evaluate_split(model, TokenFile.load(tmp_path / "tokens", "test"), EvaluationConfig(), None)
        found = json.loads(call(capsys, random_bundles / "fp32", "--score", tmp_path / name)[0])
        assert found == pytest.approx(expected, rel=1e-5)
        assert found.keys() == expected.keys()
    (tmp_path / "one.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"one\.txt holds no text"):
        main([str(random_bundles / "fp32"), "--score", str(tmp_path / "one.txt")])


def test_prompts_that_do_not_fit(random_bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = random_bundles / "fp32"
    prompt = "the cat sat under the mat, " * 20
    with pytest.raises(ValueError, match="between 1 and 64 fit into the context; --truncate left cuts its beginning"):
        main([str(bundle), "-p", prompt])
    ids = tiny.tokenizer().encode(prompt)
    text, messages = call(capsys, bundle, "-p", prompt, "-n", 10, "--greedy", "--truncate", "left", "-q")
    assert messages == f"the prompt has {len(ids) + 1} tokens; only <|eos|> and the last 53 are read\n"
    config = GenerationConfig(temperature=0, max_new_tokens=10)
    assert text == "".join(stream_text(tiny.random_model("llama"), [3, *ids[-53:]], config))
    row = json.loads(
        call(capsys, bundle, "-p", prompt, "-n", 100, "-s", 1, "--truncate", "left", "--ignore-eos", "--json")[0]
    )
    assert row["prompt_tokens"] == 32  # half of the context is left to go on
    assert row["sequences"][0]["finish_reason"] == "length"
    assert len(row["sequences"][0]["token_ids"]) == 33


def test_sliding_over_the_end_of_the_context(random_bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [random_bundles / "fp32", "-p", "the", "-n", 150, "-s", 1, "--ignore-eos", "--json"]
    stopped, slid = (json.loads(call(capsys, *options, "--context-overflow", to)[0]) for to in ("stop", "slide"))
    lengths = [len(whole["sequences"][0]["token_ids"]) for whole in (stopped, slid)]
    prompt = len(tiny.tokenizer().encode("the")) + 1
    assert lengths == [64 + 1 - prompt, 150]
    assert slid["sequences"][0]["token_ids"][: lengths[0]] == stopped["sequences"][0]["token_ids"]
    endless = json.loads(call(capsys, *options, "-n", -1)[0])
    assert len(endless["sequences"][0]["token_ids"]) == lengths[0]


def test_guessing_ahead_is_reported(random_bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [random_bundles / "fp32", "-p", "the cat sat, the cat sat, the", "--greedy", "--ignore-eos"]
    plain, messages = call(capsys, *options)
    assert "guessed" not in messages
    text, messages = call(capsys, *options, "--speculate", 6)
    assert text == plain
    assert " tokens guessed" in messages


def test_settings_and_their_origins(parrot: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("SMALLGPT_TOP_K", "7")
    monkeypatch.setenv("SMALLGPT_MIN_P", "0.5")
    monkeypatch.setenv("SMALLGPT_STOP", "")  # as if it were not there
    lines = call(capsys, parrot, "--print-config", "--min-p", 0.25)[0].splitlines()
    assert f'bundle = "{parrot}"  (command line)' in lines
    assert 'device = "auto"  (default)' in lines
    assert "threads = 1  (command line)" in lines
    assert "temperature = 0  (bundle)" in lines
    assert "max_new_tokens = 60  (bundle)" in lines
    assert "top_k = 7  (environment)" in lines
    assert "min_p = 0.25  (command line)" in lines
    assert "stop = []  (bundle)" in lines
    assert any(line.startswith("seed = ") and line.endswith("  (random)") for line in lines)
    assert len(lines) == 3 + len(GenerationConfig().to_dict())


def test_devices_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    cpu, cuda = call(capsys, "no/bundle/needed", "--list-devices")[0].splitlines()
    assert cpu == f"cpu: {len(os.sched_getaffinity(0))} processors"
    assert cuda.startswith("cuda: ")


def test_a_seed_that_was_drawn_is_always_said(random_bundles: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["-s", "-1"]):
        text, messages = call(capsys, random_bundles / "fp32", "-p", "the", "-n", 20, "-q", *more)
        seed = messages.removeprefix("seed: ").strip()
        assert seed.isdigit()
        assert call(capsys, random_bundles / "fp32", "-p", "the", "-n", 20, "-q", "-s", seed) == (text, "")


def test_version_and_verbose(parrot: Path) -> None:
    assert run("--version").stdout.startswith(b"smallgpt ")
    result = run(parrot, "-p", "", "-v", "--warmup")
    assert result.stdout == SONG.encode()
    assert b"fp32, gpt2, 2 layers, vocabulary 320, context 64, " in result.stderr.splitlines()[0]


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_endless(tmp_path_factory.mktemp("endless"))


def start(bundle: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "smallgpt.ort_generate",
        str(bundle),
        "-p",
        "the",
        "--ignore-eos",
        "-s",
        "1",
        *more,
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment,
    )


def test_control_c_ends_with_130(endless: Path) -> None:
    with start(endless) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert len(os.read(process.stdout.fileno(), 2**16)) < 2**10  # it streams: a full buffer has 8,192 bytes
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == b"seed: 1\n"


def test_json_after_control_c_has_what_there_is(endless: Path) -> None:
    with start(endless, "--json", "--num-samples", "2") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stderr.readline() == b"seed: 1\n"
        time.sleep(0.5)  # it is decoding; whether a token is there already does not matter
        process.send_signal(signal.SIGINT)
        whole = json.loads(process.stdout.read())
        assert process.wait(timeout=30) == 130
    assert [row["finish_reason"] for row in whole["sequences"]] == ["interrupted"] * 2
    for row in whole["sequences"]:
        assert row["text"] == tiny.tokenizer().decode(row["token_ids"])
    assert whole["tokens"] == sum(len(row["token_ids"]) for row in whole["sequences"])


def test_a_closed_pipe_ends_quietly(endless: Path) -> None:
    with start(endless) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(20)
        process.stdout.close()
        assert process.wait(timeout=30) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b"seed: 1\n"
