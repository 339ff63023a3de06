"""Training as a whole: the same bytes after every kind of interruption, and refusals that change nothing."""

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from small_run import (
    SEQ_LEN,
    Watcher,
    chain,
    configure,
    contents,
    same,
    start,
    steps_done,
    streams,
    token_file,
    wait_for,
    write_project,
    write_tokens,
)

from smallgpt import GPTTrainer, SmallGPT, cli
from smallgpt.cli import DeviceError, MismatchError, StoppedError
from smallgpt.config import Config
from smallgpt.distributed import Ranks
from smallgpt.score import score_stream
from smallgpt.tokenizer import Tokenizer, train_tokenizer
from smallgpt.tokens import TokenFile
from smallgpt.train import main, train, write_facts

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "".join(
    f"{name} {verb} the {thing}.\n"
    for name in ("Ann", "Ben", "Zoë")
    for verb in ("saw", "lost")
    for thing in "abcdefgh"
)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(folder, tokenizer)
    return folder


class Runner:
    """Trains below `folder` on the same tokens again and again; `outs` are the bytes of all that a training wrote."""

    def __init__(self, folder: Path, tokens: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.tokens, self.tokenizer, self.monkeypatch = folder, tokens, tokenizer, monkeypatch
        self.folders = {name: folder / {"out": "gpt"}.get(name, name) for name in ("out", "reports", "work")}

    def __call__(self, config: Config, *, at: int = 0, call: Callable[[], None] | None = None, **options: Any) -> Any:
        """Train; `call` is called in the middle of step `at`."""

        def watch(metrics: dict[str, float], step: int) -> None:
            if call and step == at and "train/loss" in metrics:
                call()

        self.monkeypatch.setattr("smallgpt.train.Tracker", lambda: Watcher(watch))
        options = {"tokens": self.tokens, **options}
        return train(config, self.tokenizer, track=False, **options, **self.folders)

    @property
    def outs(self) -> dict[str, bytes]:
        return contents(self.folder / "gpt", self.folder / "reports")

    def states(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "work").glob("*/*state-*"))

    def clear(self) -> None:
        shutil.rmtree(self.folder)


@pytest.fixture
def runner(tmp_path: Path, tokens: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Runner:
    return Runner(tmp_path / "run", tokens, tokenizer, monkeypatch)


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def power_cut() -> None:
    raise RuntimeError("power cut")


NOISE = {"dropout": 0.2}  # on embeddings and residuals
RECIPES = {
    "adamw": configure(NOISE, ema_decay=0.9),
    "adamw, accumulation": configure(NOISE, ema_decay=0.9, gradient_accumulation_steps=2, batch_size=2),
    "muon": configure({"architecture": "llama", **NOISE}, ema_decay=0.9, optimizer="muon"),
    "muon, accumulation, bf16": configure(
        {"architecture": "llama", "num_kv_heads": 1, **NOISE},
        optimizer="muon",
        gradient_accumulation_steps=3,
        batch_size=2,
        precision="bf16",
    ),
    "fp16": configure(NOISE, precision="fp16", optimizer="muon"),
}


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_stopped_and_resumed_is_the_same_to_the_bit(runner: Runner, recipe: str) -> None:
    config = RECIPES[recipe]
    runner(config)
    expected = runner.outs
    assert len(expected) == 7
    # 12 windows are an epoch; a step takes 4 of them (6 with three passes): step 3 (4) ends one, step 5 is inside one.
    for stops in ([1], [3], [2, 5], [8]) if recipe == "adamw" else ([3], [4, 5]):
        runner.clear()
        for step in stops:
            with pytest.raises(StoppedError, match=f"after step {step};"):
                runner(config, at=step, call=send(signal.SIGTERM))
            assert runner.outs == {}
        runner(config)
        assert runner.outs == expected, stops
    assert runner.states() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
@pytest.mark.parametrize("recipe", list(RECIPES))
def test_on_a_gpu_too(runner: Runner, recipe: str) -> None:
    config = RECIPES[recipe]
    config = config.model_copy(update={"training": config.training.model_copy(update={"device": "cuda"})})
    runner(config)
    expected = runner.outs
    runner.clear()
    with pytest.raises(StoppedError):
        runner(config, at=3, call=send(signal.SIGTERM))
    runner(config)
    assert runner.outs == expected


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["adamw", "muon"])
@pytest.mark.parametrize("step", [1, 4, 5, 7])
def test_a_crash_goes_on_from_the_last_state(runner: Runner, recipe: str, step: int) -> None:
    config = RECIPES[recipe]
    runner(config)
    expected = runner.outs
    runner.clear()
    with pytest.raises(RuntimeError, match="power cut"):
        runner(config, at=step, call=power_cut)
    assert runner.states()[-1:] == [f"state-{(step - 1) // 2 * 2:09d}"][: step > 2]
    runner(config)
    assert runner.outs == expected


def test_other_settings_give_other_bytes(runner: Runner) -> None:
    """The guard of the two tests before: they would also pass if all trainings were the same."""
    weights = []
    for config in (configure(), configure(seed=2), configure(max_steps=7), configure(NOISE), configure(ema_decay=0.9)):
        runner(config)
        weights.append(runner.outs["gpt/last.safetensors"])
    assert len(set(weights)) == 5


def test_a_damaged_newest_state_gives_the_same_bytes(runner: Runner, caplog: pytest.LogCaptureFixture) -> None:
    config = RECIPES["adamw"]
    runner(config)
    expected = runner.outs
    runner.clear()
    with pytest.raises(StoppedError):
        runner(config, at=7, call=send(signal.SIGTERM))
    assert runner.states() == ["state-000000006", "state-000000007"]
    newest = next((runner.folder / "work").glob("*/state-000000007")) / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    runner(config)
    assert "state-000000007 is damaged and left aside" in caplog.text
    assert runner.outs == expected


def test_without_a_whole_state_it_starts_anew(runner: Runner, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with pytest.raises(StoppedError):
        runner(configure(), at=4, call=send(signal.SIGTERM))
    for saved in (runner.folder / "work").glob("*/state-*/state.safetensors"):
        saved.write_bytes(b"")
    runner(configure())
    assert caplog.text.count("is damaged and left aside") == 2
    assert "starting anew" not in caplog.text  # which names trainings with other settings


def test_changed_settings_never_take_up_an_old_state(runner: Runner, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    runner(configure(seed=2))
    expected = runner.outs
    runner.clear()
    with pytest.raises(StoppedError):
        runner(configure(seed=1), at=4, call=send(signal.SIGTERM))
    assert "starting anew" not in caplog.text
    (stopped,) = (runner.folder / "work").glob("*/state-000000004")
    runner(configure(seed=2))
    assert (
        f"starting anew: the settings, data, source, versions, threads or device of {stopped.parent} are others"
        in caplog.text
    )
    assert runner.outs == expected
    assert runner.states() == ["state-000000002", "state-000000004"]  # they wait for the settings to come back


def test_resume_never_starts_anew(runner: Runner, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    runner(configure())
    expected = runner.outs
    runner.clear()
    with pytest.raises(StoppedError):
        runner(configure(), at=7, call=send(signal.SIGTERM))
    with pytest.raises(StoppedError):
        runner(configure(resume="never"), at=3, call=send(signal.SIGTERM))
    assert runner.states() == ["state-000000002", "state-000000003"]  # older ones with higher numbers are gone
    assert "resumed" not in caplog.text
    runner(configure())
    assert "resumed after step 3" in caplog.text
    assert runner.outs == expected


@pytest.mark.parametrize(("units", "precision"), [({"amx_bf16": True}, "bf16"), ({}, "fp32")])
def test_auto_is_bf16_where_the_processor_multiplies_in_it(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, units: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    runner(configure(precision="auto", max_steps=4))
    found = runner.outs
    runner.clear()
    runner(configure(precision=precision, max_steps=4))
    assert runner.outs == found
    runner.clear()
    runner(configure(precision={"bf16": "fp32", "fp32": "bf16"}[precision], max_steps=4))
    assert runner.outs["gpt/model.safetensors"] != found["gpt/model.safetensors"]


def test_a_compiled_training_is_not_continued_without_a_compiler(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    config = configure(compile="auto", max_steps=200, warmup_steps=1, eval_interval=200)
    with pytest.raises(StoppedError):
        runner(config, at=3, call=send(signal.SIGTERM))
    monkeypatch.setattr("smallgpt.loop.shutil.which", lambda name: None)
    with pytest.raises(StoppedError):
        runner(config, at=2, call=send(signal.SIGTERM))
    assert "no C++ compiler found" in caplog.text
    assert "starting anew" in caplog.text
    assert "resumed" not in caplog.text


def test_a_resumed_run_keeps_the_time_that_was_measured_for_the_same_weights(tmp_path: Path) -> None:
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt/model.safetensors").write_bytes(b"weights")

    def facts(seconds: float | None) -> dict[str, Any]:
        write_facts(tmp_path / "runs", tmp_path / "gpt", {"tokens_seen": 3000}, seconds, torch.device("cpu"), Ranks())
        [path] = (tmp_path / "runs").iterdir()
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    assert (facts(None)["seconds"], facts(None)["tokens_per_second"]) == (None, None)
    assert (facts(20.0)["seconds"], facts(20.0)["tokens_per_second"]) == (20.0, 150.0)
    assert facts(None)["seconds"] == 20.0
    (tmp_path / "gpt/model.safetensors").write_bytes(b"others")
    write_facts(tmp_path / "runs", tmp_path / "gpt", {"tokens_seen": 3000}, None, torch.device("cpu"), Ranks())
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_the_time_of_a_stopped_training_is_that_of_all_its_runs(runner: Runner) -> None:
    def stopped(**changes: float) -> Path:
        """Stop a new training after step 3 and change what it says of its time."""
        shutil.rmtree(runner.folder, ignore_errors=True)
        with pytest.raises(StoppedError):
            runner(configure(), at=3, call=send(signal.SIGTERM))
        [path] = (runner.folder / "work").glob("*/seconds.json")
        found = json.loads(path.read_text())
        assert found["step"] == 3
        assert found["seconds"] > 0
        path.write_text(json.dumps({**found, **changes}))
        return path

    def seconds() -> float | None:
        [path] = (runner.folder / "work/runs").iterdir()
        found: float | None = json.loads(path.read_text())["seconds"]
        return found

    path = stopped(seconds=1e6)
    with pytest.raises(StoppedError):
        runner(configure(), at=5, call=send(signal.SIGTERM))
    found = json.loads(path.read_text())
    assert found["step"] == 5
    assert 1e6 < found["seconds"] < 2e6
    runner(configure())
    assert found["seconds"] - 0.1 < (seconds() or 0) < 2e6  # to a tenth of a second
    assert not path.exists()
    stopped(step=2)  # of a run whose later ones were killed
    runner(configure())
    assert seconds() is None
    stopped().write_text("{")
    runner(configure())
    assert seconds() is None


def test_checkpoint_interval_does_not_change_the_result(runner: Runner) -> None:
    runner(RECIPES["adamw"])
    expected = runner.outs
    runner(RECIPES["adamw"].model_copy(update={"training": configure(ema_decay=0.9, checkpoint_interval=7).training}))
    assert runner.outs == expected


def test_outs_of_a_training(runner: Runner, tmp_path: Path, tokenizer: Tokenizer) -> None:
    # On a text with the same ids in an order of its own the loss first falls and then rises.
    data = streams() | {"valid": token_file(np.random.default_rng(0).permutation(chain(2, 100)))}
    write_tokens(tmp_path / "tokens", tokenizer, data)
    config = configure(max_steps=60, eval_interval=5, learning_rate=0.02, weight_decay=0.0)
    summary = runner(config, tokens=tmp_path / "tokens")
    assert sorted(runner.outs) == [
        "gpt/config.json",
        "gpt/last.safetensors",
        "gpt/model.safetensors",
        "gpt/tokenizer.model",
        "reports/summary.json",
        "reports/train.csv",
        "reports/valid.csv",
    ]
    assert json.loads(runner.outs["reports/summary.json"]) == summary
    curve = [line.split(",") for line in runner.outs["reports/valid.csv"].decode().splitlines()[1:]]
    best_step, best_loss = min(((int(step), float(loss)) for step, loss in curve), key=lambda row: row[1])
    assert 0 < best_step < 60
    assert summary == {
        "parameters": 320 * 32 + 16 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32,
        "seed": 1,
        "steps": 60,
        "tokens_seen": 60 * 4 * SEQ_LEN,
        "epochs": 60 * 4 / 13,
        "train": {"loss": summary["train"]["loss"]},
        "valid": {"loss": float(curve[-1][1]), "best_loss": best_loss, "best_step": best_step},
    }
    values = json.loads(runner.outs["gpt/config.json"])
    assert values["model"] == config.model.model_dump()
    assert values["tokenizer_sha256"] == tokenizer.sha256
    assert values["data_sha256"] == {split: data[split].sha256 for split in ("train", "valid")}
    assert (values["step"], values["last_step"]) == (best_step, 60)
    train_rows = runner.outs["reports/train.csv"].decode().splitlines()
    assert train_rows[0] == "step,loss,learning_rate,gradient_norm"
    assert [int(line.split(",")[0]) for line in train_rows[1:]] == list(range(1, 61))
    # The weights on disk have the losses that the reports say.
    for name, loss in (("model.safetensors", best_loss), ("last.safetensors", float(curve[-1][1]))):
        model = SmallGPT.from_pretrained(runner.folder / "gpt", weights=name)
        scores = score_stream(model, data["valid"].ids, context=SEQ_LEN, stride=SEQ_LEN, batch_size=4)
        assert float(scores.nats.mean()) == loss
    # Nothing of the machine or the moment is in them, and speed is kept in the work folder.
    assert not any(b"second" in content or str(runner.folder).encode() in content for content in runner.outs.values())
    assert len(next((runner.folder / "work").glob("*/speed.csv")).read_text().splitlines()) == 61


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(tmp_path: Path, runner: Runner, tokenizer: Tokenizer) -> None:
    config = RECIPES["muon"]
    write_project(tmp_path / "project", config, tokenizer)
    process = start(tmp_path / "project")
    runner(config)
    assert process.communicate()[1] == ""
    project = tmp_path / "project"
    assert contents(project / "models" / "gpt") == contents(runner.folder / "gpt")
    assert {Path(name).name: data for name, data in contents(project / "reports" / "train").items()} == {
        Path(name).name: data for name, data in contents(runner.folder / "reports").items()
    }


@pytest.mark.slow
def test_two_processes_give_the_same_bytes_compiled(tmp_path: Path, tokenizer: Tokenizer) -> None:
    shape = {"architecture": "llama", "num_layers": 1, **NOISE}
    config = configure(shape, compile=True, precision="bf16", optimizer="muon", threads=2)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        write_project(folder, config, tokenizer)
        # Each compiles for itself.
        process = start(folder, TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"))
        assert process.communicate()[1] == ""
    one, two = (contents(folder / "models" / "gpt", folder / "reports" / "train") for folder in folders)
    assert one == two
    assert len(list((tmp_path / "one" / "cache").rglob("*.so"))) > 0


@pytest.mark.slow
def test_signals_and_the_lock_in_real_processes(tmp_path: Path, tokenizer: Tokenizer, runner: Runner) -> None:
    config = configure(NOISE, max_steps=1000, eval_interval=250, checkpoint_interval=400)
    project = tmp_path / "project"
    write_project(project, config, tokenizer)
    (project / "models" / "gpt").mkdir()
    (project / "models" / "gpt" / "model.safetensors").write_text("from before")
    for signum, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = start(project)
        before = len(steps_done(project))
        wait_for(lambda before=before: len(steps_done(project)) > before + 5, process)  # type: ignore[misc]
        folders = {"out": tmp_path / "gpt", "reports": tmp_path / "reports", "work": project / ".smallgpt" / "train"}
        with pytest.raises(ValueError, match=r"^another process is training with these settings \(it holds .*lock\)$"):
            train(config, tokenizer, tokens=project / "data" / "tokens", track=False, **folders)
        process.send_signal(signum)
        lines = process.communicate()[1].splitlines()
        assert lines[-1].startswith(f"error: stopped by {signal.Signals(signum).name} after step ")
        assert process.returncode == code
        assert contents(project / "models" / "gpt") == {"gpt/model.safetensors": b"from before"}
        assert not (project / "reports").exists()
    assert lines[0].startswith("resumed after step ")
    process = start(project)
    assert process.communicate()[1].startswith("resumed after step ")
    assert process.returncode == 0
    runner(config)
    assert contents(project / "models" / "gpt") == contents(runner.folder / "gpt")
    assert (project / "reports" / "train" / "train.csv").read_bytes() == runner.outs["reports/train.csv"]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, tokenizer: Tokenizer, runner: Runner) -> None:
    config = configure({"architecture": "llama", **NOISE}, max_steps=150, checkpoint_interval=1, ema_decay=0.9)
    project = tmp_path / "project"
    write_project(project, config, tokenizer)
    for _ in range(5):
        process = start(project)
        before = len(steps_done(project))
        wait_for(lambda before=before: len(steps_done(project)) > before, process)  # type: ignore[misc]
        time.sleep(random.uniform(0, 0.15))
        process.kill()
        process.wait()
        assert not (project / "models" / "gpt").exists()
    process = start(project)
    assert process.communicate()[1].startswith("resumed after step ")
    assert process.returncode == 0
    runner(config)
    assert contents(project / "models" / "gpt") == contents(runner.folder / "gpt")
    assert (project / "reports" / "train" / "train.csv").read_bytes() == runner.outs["reports/train.csv"]
    assert list(project.rglob("*state-*")) == []


def test_a_loss_that_is_not_finite_leaves_earlier_outs_whole(
    runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner(configure())
    before = runner.outs
    for settings in ({"max_steps": 5, "eval_interval": 100}, {"max_steps": 1}):
        config = configure(learning_rate=1e20, warmup_steps=0, **settings)
        with pytest.raises(SystemExit) as caught:
            cli.run(lambda config=config: runner(config) and 0)  # type: ignore[misc]
        assert caught.value.code == 1
        stderr = capsys.readouterr().err
        assert stderr.startswith("error: step ")
        assert "Lower training.learning_rate" in stderr
        assert stderr.count("\n") == 1
    assert runner.outs == before


def test_one_training_at_a_time(runner: Runner) -> None:
    def second() -> None:
        runner.monkeypatch.undo()  # this one is not watched
        with pytest.raises(ValueError, match=r"^another process is training with these settings \(it holds .*lock\)$"):
            train(configure(), runner.tokenizer, tokens=runner.tokens, track=False, **runner.folders)
        finished.append(train(configure(seed=2), runner.tokenizer, tokens=runner.tokens, track=False, **runner.folders))

    finished: list[dict[str, Any]] = []
    runner(configure(), at=4, call=second)
    assert len(finished) == 1  # other settings are no obstacle


def with_files(runner: Runner, folder: Path, data: dict[str, TokenFile]) -> Any:
    write_tokens(folder, runner.tokenizer, data)
    return runner(configure(), tokens=folder)


def test_refusals(runner: Runner, tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = streams()
    ids = chain(3, 100)
    ids[50] = 320
    with pytest.raises(MismatchError, match=r"^the valid tokens go up to id 320; model\.vocab_size is 320$"):
        with_files(runner, tmp_path / "ids", data | {"valid": token_file(ids)})
    with pytest.raises(ValueError, match=r"has 31 tokens; sequences of 16 need at least 32: take .* to at most 15$"):
        with_files(runner, tmp_path / "short", data | {"train": token_file(chain(3, 31))})
    with_files(runner, tmp_path / "enough", data | {"train": token_file(chain(3, 32))})
    before = runner.outs
    (tmp_path / "enough" / "valid.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"valid\.bin does not exist; the tokenize stage writes it"):
        runner(configure(), tokens=tmp_path / "enough")
    other = Tokenizer(train_tokenizer([TEXT], vocab_size=300))
    runner.tokenizer = other
    with pytest.raises(MismatchError, match=r"^the train tokens were written by another tokenizer; run the tokenize s"):
        runner(configure())
    assert runner.outs == before
    assert tokenizer.sha256 != other.sha256


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_that_is_not_there(runner: Runner) -> None:
    with pytest.raises(DeviceError, match=r"^training\.device is cuda, but PyTorch sees no CUDA device; use auto or c"):
        runner(configure(device="cuda"))


def trainer_sections(**training: Any) -> dict[str, Any]:
    config = configure({"vocab_size": 290, "max_seq_len": 32}, **training)
    return {
        "prepare": {"valid_fraction": 0.2, "test_fraction": 0.0},
        **config.model_dump(include={"model", "training"}),
    }


def test_trainer_in_one_call(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(TEXT)
    sections = trainer_sections(max_steps=40, learning_rate=0.01)
    model = GPTTrainer(sections, work=tmp_path / "work").train(tmp_path / "corpus.txt")
    assert not model.training
    text = model.generate("Ann ", max_length=20, temperature=0)
    assert text.startswith("Ann ")
    assert len(text) > 8
    folders = ("gpt", "prepared", "reports", "state", "tokenizer", "tokens")
    assert tuple(sorted(path.name for path in (tmp_path / "work").iterdir())) == folders
    # A parameter file and a Config give the same bytes as the dict.
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(sections))
    GPTTrainer(str(tmp_path / "params.yaml"), work=tmp_path / "again").train(str(tmp_path / "corpus.txt"))
    assert contents(tmp_path / "again" / "gpt") == contents(tmp_path / "work" / "gpt")


def test_trainer_refuses_a_wrong_dict() -> None:
    with pytest.raises(ValueError, match=r"^the configuration: unknown parameter model\.heads; did you mean num_heads"):
        GPTTrainer({"model": {"heads": 3}})


def test_trainer_in_a_thread(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(TEXT)
    models: list[SmallGPT] = []
    trainer = GPTTrainer(trainer_sections(), work=tmp_path / "work")
    thread = threading.Thread(target=lambda: models.append(trainer.train(tmp_path / "corpus.txt")))
    thread.start()
    thread.join()
    assert models[0].config.vocab_size == 290


def stop_after_five_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next training that is not tracked interrupted."""
    monkeypatch.setattr(
        "smallgpt.train.Tracker", lambda: Watcher(lambda metrics, step: send(signal.SIGINT)() if step == 5 else None)
    )


def test_trainer_goes_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus.txt").write_text(TEXT)
    whole = GPTTrainer(trainer_sections(), work=tmp_path / "whole").train(tmp_path / "corpus.txt")
    stopped = GPTTrainer(trainer_sections(), work=tmp_path / "stopped")
    with monkeypatch.context() as context:
        stop_after_five_steps(context)
        with pytest.raises(StoppedError):
            stopped.train(tmp_path / "corpus.txt")
    model = stopped.train(tmp_path / "corpus.txt")
    assert same(model.state_dict(), whole.state_dict())
    assert contents(tmp_path / "stopped" / "gpt") == contents(tmp_path / "whole" / "gpt")


def test_tracking_can_be_turned_off(tokens: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SMALLGPT_TRACKING", "off")
    monkeypatch.chdir(tmp_path)
    folders = {"out": Path("gpt"), "reports": Path("reports"), "work": Path("work")}
    train(configure(max_steps=2), tokenizer, tokens=tokens, **folders)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt", "reports", "work"]


def test_command_line_refuses_to_resume_nothing(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(TEXT)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(trainer_sections()))
    arguments = ["--data", str(tmp_path / "corpus.txt"), "--config", str(tmp_path / "small.yaml")]
    with pytest.raises(FileNotFoundError, match=r"work holds no training that was stopped; use --out to start one"):
        main([*arguments, "--resume", str(tmp_path / "work")])
    assert not (tmp_path / "work").exists()
    (tmp_path / "work").mkdir()
    with pytest.raises(FileNotFoundError, match=r"work holds no training that was stopped; use --out to start one"):
        main([*arguments, "--resume", str(tmp_path / "work")])
    assert list((tmp_path / "work").iterdir()) == []  # nothing was prepared in vain
    with pytest.raises(SystemExit):
        main([*arguments, "--resume", str(tmp_path / "work"), "--out", str(tmp_path / "elsewhere")])
    with pytest.raises(ValueError, match=r"the corpus: prepare.source is ''; it should have at least 1 character"):
        main(["--data", "", *arguments[2:], "--out", str(tmp_path / "work")])
    assert list((tmp_path / "work").iterdir()) == []


def test_a_refused_resume_leaves_the_stopped_training_as_it_was(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "corpus.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    trainer = GPTTrainer(trainer_sections(), work=tmp_path / "work")
    with monkeypatch.context() as context:
        stop_after_five_steps(context)
        with pytest.raises(StoppedError):
            trainer.train(tmp_path / "corpus.txt")
    before = contents(tmp_path / "work")
    with pytest.raises(
        MismatchError,
        match=r"holds no stopped training with these settings, data, source, versions, threads and device",
    ):
        trainer.train(tmp_path / "other.txt", resume_only=True)
    assert contents(tmp_path / "work") == before
    assert len(list((tmp_path / "work" / "state").iterdir())) == 1
    trainer.train(tmp_path / "corpus.txt", resume_only=True)
    assert not (tmp_path / "work" / ".resume").exists()


def test_resuming_needs_the_settings_it_was_started_with(runner: Runner) -> None:
    with pytest.raises(StoppedError):
        runner(configure(), at=4, call=send(signal.SIGTERM))
    for changed in (configure(seed=2), configure({"num_layers": 1}), configure(max_steps=9)):
        with pytest.raises(MismatchError, match=r"give it what it was started with, or use --out to start a new one"):
            runner(changed, resume_only=True)
    runner(configure(resume="never"), resume_only=True)  # which is the stronger wish
    resumed = runner.outs
    runner.clear()
    runner(configure())
    assert runner.outs == resumed


@pytest.mark.slow
def test_command_line_stopped_and_resumed(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(TEXT)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(trainer_sections(max_steps=600, eval_interval=200)))
    arguments = ["--config", "small.yaml", "--data", "corpus.txt"]
    process = start(tmp_path, "smallgpt.train", *arguments, "--out", "stopped")
    wait_for(lambda: len(steps_done(tmp_path)) > 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[1].splitlines()[-1].startswith("error: stopped by SIGTERM after step ")
    assert process.returncode == 143
    process = start(tmp_path, "smallgpt.train", *arguments, "--resume", "stopped")
    stderr = process.communicate()[1]
    assert process.returncode == 0
    assert "resumed after step " in stderr
    assert stderr.splitlines()[-1].endswith("parameters, trained; the model is in stopped/gpt")
    config = trainer_sections(max_steps=600, eval_interval=200)
    GPTTrainer(config, work=tmp_path / "whole").train(tmp_path / "corpus.txt")
    assert contents(tmp_path / "stopped" / "gpt") == contents(tmp_path / "whole" / "gpt")
    process = start(tmp_path, "smallgpt.train", "--config", "small.yaml", "--data", "none.txt")
    assert process.communicate()[1].startswith("error: prepare.source is none.txt: no such file or folder")
    assert process.returncode == 2
