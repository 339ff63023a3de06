import base64
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from smallgpt.bundle import load_bundle, write_config
from smallgpt.cli import DeviceError, MismatchError
from smallgpt.decode import stream_text
from smallgpt.export import write_bundle
from smallgpt.files import write_json
from smallgpt.ort_generate import generate, main
from smallgpt.runtime import OrtGPT, check_golden
from smallgpt.sampling import GenerationConfig
from smallgpt.tokenizer import train_tokenizer

ROOT = Path(__file__).parent.parent
SONG = "the dog sat 日本 🙂 happy"  # with characters that the tokenizer spells in bytes
GREEDY = GenerationConfig(temperature=0)


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


def said(model: OrtGPT, config: GenerationConfig, **settings: bool) -> tuple[list[str], str | None]:
    """The pieces of the text that follows an empty prompt, and why it ended."""
    steps = [step[0] for step in generate(model, [[model.tokenizer.eos_id]], config, **settings)]
    assert [step.finish for step in steps[:-1]] == [None] * (len(steps) - 1)
    return [step.text for step in steps], steps[-1].finish


def test_text_streams_in_whole_characters(parrot: Path) -> None:
    pieces, finish = said(OrtGPT(parrot, threads=1), GREEDY)
    assert "".join(pieces) == SONG
    assert finish == "eos"
    assert len(pieces) == len(tiny.tokenizer().encode(SONG)) + 1
    assert pieces.count("日") == pieces.count("🙂") == 1
    assert pieces[pieces.index("🙂") - 3 : pieces.index("🙂")] == ["", "", ""]  # its first three bytes


def test_stop_strings_are_cut_also_across_tokens(parrot: Path) -> None:
    model = OrtGPT(parrot, threads=1)
    tokens = [model.tokenizer.decode([i]) for i in model.tokenizer.encode(SONG)]
    assert not any("g sat" in token for token in tokens)
    pieces, finish = said(model, GenerationConfig(temperature=0, stop=("g sat", "happy")))
    assert ("".join(pieces), finish) == ("the do", "stop")
    # What only begins like a stop string is held back and then given out.
    pieces, finish = said(model, GenerationConfig(temperature=0, stop=("the dig", "🙂 happy birthday")))
    assert ("".join(pieces), finish) == (SONG, "eos")
    assert pieces[0] == ""


def test_length_ends_a_text_without_cutting_a_character(parrot: Path) -> None:
    model = OrtGPT(parrot, threads=1)
    count = next(i for i, text in enumerate(said(model, GREEDY)[0]) if text == "日") - 1  # two of its three bytes
    pieces, finish = said(model, GenerationConfig(temperature=0, max_new_tokens=count + 1))
    assert ("".join(pieces), finish) == ("the dog sat \ufffd", "length")
    assert list(generate(model, [[3]], GenerationConfig(max_new_tokens=0))) == []


def test_the_context_ends_a_text(random_bundles: Path) -> None:
    model = OrtGPT(random_bundles / "fp32", threads=1)
    config = GenerationConfig(max_new_tokens=1000)
    for prompt, expected in ((1, 64), (63, 2), (64, 1)):
        steps = list(generate(model, [[5] * prompt], config, ignore_eos=True))
        assert len(steps) == expected
        assert steps[-1][0].finish == "length"
    for prompt in ([], [5] * 65):
        with pytest.raises(ValueError, match=f"the prompt has {len(prompt)} tokens; between 1 and 64 fit"):
            generate(model, [prompt], config)


def test_samples_do_not_depend_on_their_batch(random_bundles: Path) -> None:
    model = OrtGPT(random_bundles / "fp32", threads=1)
    config = GenerationConfig(temperature=1.2, top_k=0, top_p=0.95, max_new_tokens=30, repetition_penalty=1.1, seed=7)
    prompts = [[3, 9, 40], [3], [3, *range(10, 60)], [3, 77]]  # the third reaches the end of the context
    together: dict[int, list[int]] = {i: [] for i in range(4)}
    for step in generate(model, prompts, config):
        for piece in step:
            together[piece.sequence].append(piece.token)
    for i, prompt in enumerate(prompts):
        alone = [step[0].token for step in generate(model, [prompt], config, sequences=[i])]
        assert alone == together[i]
    assert len(together[2]) == 64 - 51 + 1  # the last one is drawn from a full context
    assert len({tuple(tokens[:10]) for tokens in together.values()}) == 4
    assert not {0, 1, 2} & {token for tokens in together.values() for token in tokens}


def test_samples_equal_those_of_pytorch(random_bundles: Path) -> None:
    model = OrtGPT(random_bundles / "fp32", threads=1)
    for seed in range(5):
        config = GenerationConfig(temperature=0.7, max_new_tokens=40, seed=seed)
        expected = "".join(stream_text(tiny.random_model("llama"), "the cat", config))
        ids = [3, *model.tokenizer.encode("the cat")]
        assert "".join(step[0].text for step in generate(model, [ids], config)) == expected


def test_golden_logits_catch_another_computation(random_bundles: Path, damaged: Path) -> None:
    count, largest = check_golden(OrtGPT(random_bundles / "fp32", threads=2))
    assert count == 3
    assert 0 < largest < 2e-5
    certificate = json.loads((damaged / "parity.json").read_text())
    logits = np.frombuffer(base64.b64decode(certificate["golden"][2]["logits"]), "<f4").copy()
    logits[-1] += 0.01
    certificate["golden"][2]["logits"] = base64.b64encode(logits.tobytes()).decode()
    write_json(damaged / "parity.json", certificate)
    write_config(damaged, load_bundle(damaged, verify=False).config)
    code, line = error(run(damaged, "--verify"))
    assert code == 3
    assert "logits differ by 0.01 from those in parity.json, limit 0.001" in line


def test_only_the_text_is_on_stdout(parrot: Path) -> None:
    result = run(parrot, "-p", "")
    assert result.returncode == 0
    assert result.stdout == SONG.encode()
    assert f"decode {len(tiny.tokenizer().encode(SONG)) + 1} tokens" in result.stderr.decode()
    assert b"ended by eos | fp32 on cpu" in result.stderr
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
    assert code == 2
    assert line.startswith(f"error: {damaged}/model.onnx does not exist")
    settings = json.loads((damaged / "config.json").read_text())
    write_json(damaged / "config.json", settings | {"contract": 2})
    code, line = error(run(damaged, "-p", "x"))
    assert code == 3
    assert line.endswith("has contract 2, this smallgpt reads 1; upgrade smallgpt")


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
        (["-p", "x", "-n", "-1"], b"", "max_new_tokens is -1"),
        (["-p", "x", "-s", "-1"], b"", "seed is -1"),
        (["-p", "x", "-t", "-1"], b"", "threads is -1"),
        (["-f", "nowhere.txt"], b"", "nowhere.txt"),
        ([], b"ab\xff", "stdin is not UTF-8: byte 0xff at offset 2"),
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


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with room for more text than a test waits for; it has no certificate."""
    folder = tmp_path_factory.mktemp("endless")
    model = tiny.random_model(max_seq_len=50_000)
    model_dir, _ = tiny.write_project(folder, model)
    settings = write_bundle(folder / "fp32", "fp32", model, model_dir, GenerationConfig(max_new_tokens=50_000))
    write_json(folder / "fp32" / "parity.json", {})
    write_config(folder / "fp32", settings)
    return folder / "fp32"


def heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(bundle: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "smallgpt.ort_generate", str(bundle), "-p", "the", "--ignore-eos", "-s", "1"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment,
        # A job that a shell started in the background ignores SIGINT, and so would its children.
        preexec_fn=heed_interrupts,
    )


def test_control_c_ends_with_130(endless: Path) -> None:
    with start(endless) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert len(os.read(process.stdout.fileno(), 2**16)) < 2**10  # it streams: a full buffer has 8,192 bytes
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == b"seed: 1\n"


def test_a_closed_pipe_ends_quietly(endless: Path) -> None:
    with start(endless) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(20)
        process.stdout.close()
        assert process.wait(timeout=30) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b"seed: 1\n"
