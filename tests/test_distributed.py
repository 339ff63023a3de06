"""Several processes, really started with torchrun: the curve of one process, one writer, and a common end."""

import csv
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from small_run import ROOT, SEQ_LEN, chain, configure, contents, start, steps_done, wait_for, write_project

from smallgpt.cli import DeviceError
from smallgpt.config import Config
from smallgpt.distributed import Ranks, join_ranks
from smallgpt.tokenizer import Tokenizer
from smallgpt.tokens import batch

TEXT = "".join(
    f"{name} {verb} the {thing}.\n" for name in ("Ann", "Ben") for verb in ("saw", "lost") for thing in "abcdef"
)


def project(folder: Path, config: Config, tokenizer: Tokenizer) -> Path:
    write_project(folder, config, tokenizer)
    return folder


def torchrun(folder: Path, processes: int, module: str = "stages.train", *arguments: str) -> subprocess.Popen[str]:
    """Start the stage in one process without torchrun, or in several with it."""
    if processes == 1:
        return start(folder, module, *arguments)
    options = ("--standalone", "--nproc-per-node", str(processes), "-m", module, *arguments)
    return start(folder, "torch.distributed.run", *options, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")


def finish(process: subprocess.Popen[str]) -> str:
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode == 0, stderr
    return stderr


def rows(folder: Path, name: str = "train") -> list[dict[str, float]]:
    with (folder / "reports" / "train" / f"{name}.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def assert_same_curve(found: Path, expected: Path) -> None:
    for name in ("train", "valid"):
        one, other = rows(found, name), rows(expected, name)
        assert [row["step"] for row in one] == [row["step"] for row in other]
        assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in other], rel=1e-5)


def test_alone_nothing_is_exchanged() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)
    gradient, value = model.weight.grad, torch.tensor(3.0)
    with join_ranks(torch.device("cpu")) as ranks:
        assert ranks == Ranks()
        assert ranks.first
        assert ranks.average(model, value) is value
        assert ranks.largest(15) == 15
        ranks.wait()
    assert model.weight.grad is gradient
    assert not torch.distributed.is_initialized()


def test_more_processes_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "99", "LOCAL_WORLD_SIZE": "99", "LOCAL_RANK": "98", "RANK": "98"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        DeviceError, match=r"^99 processes were started, but PyTorch sees \d+ CUDA devices; start one a"
    ):
        join_ranks(torch.device("cuda")).__enter__()


def test_several_processes_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but this process has no LOCAL_RANK; start with torchrun"):
        join_ranks(torch.device("cpu")).__enter__()


@pytest.mark.parametrize("size", [2, 4])
def test_shares_are_the_rows_of_the_batch(size: int) -> None:
    """What train_step asks `batch` for: smaller batches that together are the whole one."""
    ids = chain(1, 13 * SEQ_LEN)
    whole = batch(ids, seed=1, step=5, batch_size=8, seq_len=SEQ_LEN)
    shares = [batch(ids, seed=1, step=5 * size + r, batch_size=8 // size, seq_len=SEQ_LEN) for r in range(size)]
    for part in range(2):
        assert [list(row) for share in shares for row in share[part]] == [list(row) for row in whole[part]]


RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {"gradient_accumulation_steps": 2, "gradient_clip": 0.5, "ema_decay": 0.9},
    "muon": {"optimizer": "muon"},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_two_processes_have_the_curve_of_one(tmp_path: Path, tokenizer: Tokenizer, recipe: str) -> None:
    config = configure(max_steps=50, eval_interval=20, threads=2, **RECIPES[recipe])
    one, two = (project(tmp_path / name, config, tokenizer) for name in ("one", "two"))
    finish(torchrun(one, 1))
    stderr = finish(torchrun(two, 2))
    assert "error" not in stderr
    assert_same_curve(two, one)
    curve = rows(one)
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.5
    if recipe == "adamw":
        assert min(row["gradient_norm"] for row in curve) > 0.5  # every step was clipped
    norms = [row["gradient_norm"] for row in curve]
    assert [row["gradient_norm"] for row in rows(two)] == pytest.approx(norms, rel=1e-4)
    # One writer, and the same outs.
    assert steps_done(two) == list(range(1, 51))
    assert contents(two / "models" / "gpt").keys() == contents(one / "models" / "gpt").keys()
    summaries = [json.loads((folder / "reports" / "train" / "summary.json").read_text()) for folder in (one, two)]
    assert summaries[0]["tokens_seen"] == summaries[1]["tokens_seen"]
    # Again with two processes: the same to the byte.
    again = project(tmp_path / "again", config, tokenizer)
    finish(torchrun(again, 2))
    assert contents(again / "models" / "gpt", again / "reports") == contents(two / "models" / "gpt", two / "reports")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_stopped_training_goes_on_with_another_number(
    tmp_path: Path, tokenizer: Tokenizer, before: int, after: int
) -> None:
    config = configure(max_steps=300, eval_interval=100, checkpoint_interval=100, ema_decay=0.9, learning_rate=1e-3)
    folder, whole = (project(tmp_path / name, config, tokenizer) for name in ("stopped", "whole"))
    process = torchrun(folder, before)
    wait_for(lambda: len(steps_done(folder)) > 20, process)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    stops = [line for line in stderr.splitlines() if line.startswith("error: stopped by SIGTERM after step ")]
    assert len(stops) == before, stderr
    assert len(set(stops)) == 1, stderr  # every process says the same
    stopped_at = steps_done(folder)[-1]
    assert not (folder / "reports").exists()
    stderr = finish(torchrun(folder, after))
    assert stderr.count(f"resumed after step {stopped_at}\n") == 1
    assert steps_done(folder) == list(range(1, 301))
    assert list((folder / ".smallgpt").rglob("state-*")) == []
    finish(torchrun(whole, 1))
    assert_same_curve(folder, whole)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = configure(max_steps=100_000, checkpoint_interval=100_000, eval_interval=100_000)
    folder = project(tmp_path / "project", config, tokenizer)
    process = torchrun(folder, 2)
    wait_for(lambda: len(steps_done(folder)) > 5, process)
    workers = {child.environ()["RANK"]: child for child in psutil.Process(process.pid).children()}
    assert workers.keys() == {"0", "1"}
    workers["1"].send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    step = steps_done(folder)[-1]
    assert f"error: stopped by SIGINT after step {step}; " in stderr
    states = [path.name for path in (folder / ".smallgpt").rglob("state-*")]
    assert states == [f"state-{step:09d}"]


@pytest.mark.slow
def test_one_killed_process_ends_all_and_loses_no_state(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = configure(max_steps=100_000, checkpoint_interval=50, eval_interval=100_000)
    folder = project(tmp_path / "project", config, tokenizer)
    process = torchrun(folder, 2)
    wait_for(lambda: len(steps_done(folder)) > 60, process)
    workers = {child.environ()["RANK"]: child for child in psutil.Process(process.pid).children()}
    workers["1"].kill()
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    assert str(ROOT / "smallgpt") not in stderr, stderr  # torchrun shows a traceback of its own, we do not
    assert any(path.name.startswith("state-") for path in (folder / ".smallgpt").rglob("state-*"))


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = project(tmp_path / "project", configure(batch_size=3), tokenizer)
    process = torchrun(folder, 2)
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    assert "error: training.batch_size is 3, which 2 processes cannot share evenly; take a multiple of 2 or" in stderr
    assert not (folder / "models" / "gpt").exists()


@pytest.mark.slow
def test_the_command_line_prepares_once(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(TEXT)
    sections = configure({"vocab_size": 280}, max_steps=4).model_dump(include={"model", "training"})
    sections["prepare"] = {"valid_fraction": 0.2, "test_fraction": 0.2}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(sections))
    arguments = ("--config", "small.yaml", "--data", "corpus.txt", "--out", "work")
    stderr = finish(torchrun(tmp_path, 2, "smallgpt.train", *arguments))
    assert stderr.count("parameters, trained; the model is in work/gpt") == 1
    assert (tmp_path / "work" / "gpt" / "model.safetensors").is_file()
