"""The resumable state: nothing is lost in it, damage is found, and only its own settings find it."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import configure, contents, copy, run_loop, same, streams, token_file

from smallgpt import state as state_module
from smallgpt.config import Config
from smallgpt.optim import optimizer_tensors
from smallgpt.state import TrainState, clear_states, fingerprint, load_state, new_state, save_state

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def fresh(config: Config, folder: Path) -> TrainState:
    """A new state after `load_state`."""
    state = new_state(config, CPU)
    load_state(folder, state)
    return state


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with states after steps 4 and 6 of a training of 8."""
    run_loop(configure(), tmp_path)
    assert states(tmp_path) == ["state-000000004", "state-000000006"]
    return tmp_path


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "adamw"}, {"optimizer": "muon", "ema_decay": 0.9, "precision": "fp16"}, {"precision": "bf16"}],
)
def test_everything_comes_back(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = configure(**settings)
    state = run_loop(config, tmp_path / "work")
    save_state(tmp_path / "saved", state)
    loaded = fresh(config, tmp_path / "saved")
    assert same(loaded.model.state_dict(), state.model.state_dict())
    assert same(loaded.ema, state.ema)
    assert same(loaded.best, state.best)
    tensors = optimizer_tensors(state.optimizers)
    assert len(tensors) > 20
    assert same(optimizer_tensors(loaded.optimizers), tensors)
    assert loaded.scaler.state_dict() == state.scaler.state_dict()
    for name in ("step", "best_loss", "best_step", "train_rows", "valid_rows"):
        assert getattr(loaded, name) == getattr(state, name), name
    assert loaded.step == 8
    # A second copy of it has the same bytes.
    save_state(tmp_path / "again", loaded)
    assert contents(tmp_path / "again" / "state-000000008") == contents(tmp_path / "saved" / "state-000000008")


def test_an_infinite_gradient_norm_comes_back(tmp_path: Path) -> None:
    state = new_state(configure(precision="fp16"), CPU)
    state.step, state.best_loss = 1, 5.5
    state.train_rows = [{"step": 1, "loss": 5.5, "learning_rate": 1e-3, "gradient_norm": float("inf")}]
    save_state(tmp_path, state)
    assert fresh(configure(precision="fp16"), tmp_path).train_rows == state.train_rows


def test_initial_weights_follow_the_seed() -> None:
    one, again, other = (new_state(configure(seed=seed, ema_decay=0.5), CPU) for seed in (1, 1, 2))
    assert same(one.model.state_dict(), again.model.state_dict())
    assert not same(one.model.state_dict(), other.model.state_dict())
    assert same(one.ema, one.model.state_dict())
    assert all(value is not one.model.state_dict()[name] for name, value in one.ema.items())
    assert not new_state(configure(), CPU).ema


def test_two_states_are_kept(tmp_path: Path) -> None:
    state = new_state(configure(), CPU)
    for step in (1, 2, 9, 10, 100):
        state.step = step
        save_state(tmp_path, state)
    assert states(tmp_path) == ["state-000000010", "state-000000100"]
    assert fresh(configure(), tmp_path).step == 100


def test_nothing_to_load_leaves_the_state_alone(tmp_path: Path) -> None:
    state = new_state(configure(), CPU)
    before = copy(state.model.state_dict())
    load_state(tmp_path / "nothing", state)
    assert state.step == 0
    assert same(state.model.state_dict(), before)


def truncate(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return damage


def flip(share: float) -> Callable[[Path], None]:
    """Turn over one bit at a share of the file's length."""

    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int((len(data) - 1) * share)] ^= 1
        path.write_bytes(data)

    return damage


DAMAGES = {f"cut at {share}": truncate(share) for share in (0.0, 0.001, 0.5, 0.99)}
DAMAGES |= {f"bit at {share}": flip(share) for share in (0.0, 0.01, 0.5, 1.0)}
DAMAGES |= {"gone": Path.unlink, "another kind of JSON": lambda path: path.write_text("[1]")}  # type: ignore[dict-item]


@pytest.mark.slow
@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "hashes.json"])
@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_state_falls_back_to_the_one_before(
    saved: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    DAMAGES[damage](saved / "state-000000006" / file)
    state = fresh(configure(), saved)
    if file == "hashes.json" and state.step == 6:  # a bit of white space means nothing in JSON
        assert damage in ("bit at 0.01", "bit at 1.0")
        return
    assert state.step == 4
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{saved / 'state-000000006'} is damaged and left aside: ")


def test_a_changed_number_in_the_state_is_found(saved: Path) -> None:
    path = saved / "state-000000006" / "state.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"step": 5}))
    assert fresh(configure(), saved).step == 4


def test_without_a_whole_state_training_starts_anew(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in saved.glob("state-*"):
        truncate(0.5)(folder / "state.safetensors")
    state, untouched = fresh(configure(), saved), new_state(configure(), CPU)
    assert (state.step, state.train_rows) == (0, [])
    assert same(state.model.state_dict(), untouched.model.state_dict())
    assert caplog.text.count("is damaged and left aside") == 2


def test_states_of_later_steps_were_damaged_and_go(saved: Path) -> None:
    for folder in saved.glob("state-*"):
        truncate(0.5)(folder / "state.json")
    state = fresh(configure(), saved)
    state.step = 2
    save_state(saved, state)
    assert [path.name for path in saved.glob("state-*")] == ["state-000000002"]
    assert fresh(configure(), saved).step == 2


def test_a_half_written_state_is_no_state(saved: Path) -> None:
    """What a kill in the middle of writing leaves has another name, and goes with the next one and with the rest."""
    (saved / "state-000000006").rename(saved / ".state-000000008.tmp")
    assert fresh(configure(), saved).step == 4
    save_state(saved, fresh(configure(), saved))
    assert [path.name for path in saved.glob("*state*")] == ["state-000000004"]
    (saved / "state-000000004").rename(saved / ".state-000000008.tmp")
    (saved / "speed.csv").write_text("step\n")
    clear_states(saved)
    assert [path.name for path in saved.iterdir()] == ["speed.csv"]


def test_a_state_of_another_source_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(configure(), streams(), CPU, 1)
    library = shutil.copytree(Path(state_module.__file__).parent, tmp_path / "smallgpt")
    monkeypatch.setattr(state_module, "__file__", str(library / "state.py"))
    assert fingerprint(configure(), streams(), CPU, 1) == before
    seen = {before}
    for name in state_module.SOURCES:
        with (library / f"{name}.py").open("a") as file:
            file.write("# another line\n")
        seen.add(fingerprint(configure(), streams(), CPU, 1))
    assert len(seen) == 1 + len(state_module.SOURCES)


def test_fingerprint_depends_on_all_that_shapes_the_result() -> None:
    data = streams()

    def key(config: Config, *, threads: int = 1, **files: Any) -> str:
        return fingerprint(config, data | files, CPU, threads)

    base = key(configure())
    assert base == key(configure())
    assert len(base) == 64
    others = {
        "gradient_accumulation_steps": 2,
        "batch_size": 5,
        "seq_len": 8,
        "optimizer": "muon",
        "learning_rate": 1e-3,
        "muon_learning_rate": 0.01,
        "weight_decay": 0.2,
        "beta1": 0.8,
        "beta2": 0.9,
        "warmup_steps": 1,
        "max_steps": 9,
        "lr_schedule": "linear",
        "gradient_clip": 2.0,
        "ema_decay": 0.9,
        "precision": "bf16",
        "compile": True,
        "eval_interval": 4,
        "log_interval": 2,
        "seed": 2,
    }
    free = {
        "resume": "never",
        "checkpoint_interval": 5,
        "device": "auto",
        "threads": 2,
    }  # the last two: as they are met
    assert others.keys() | free.keys() == configure().training.model_dump().keys()
    keys = [key(configure(**{name: value})) for name, value in others.items()]
    assert {key(configure(**{name: value})) for name, value in free.items()} == {base}
    keys += [key(configure({"dropout": 0.1})), key(configure({"architecture": "llama"})), key(configure(), threads=2)]
    keys += [key(configure(), train=data["valid"]), key(configure(), valid=data["train"])]
    keys += [key(configure(), train=dataclasses.replace(data["train"], tokenizer_sha256="cd" * 32))]
    assert len({base, *keys}) == len(keys) + 1
    assert key(configure(), train=token_file(data["train"].ids.copy())) == base
