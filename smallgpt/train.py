"""Training: from token files to a model folder, resumable to the bit."""

import argparse
import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from smallgpt.checkpoint import save_checkpoint
from smallgpt.cli import MismatchError, StoppedError, processors, run
from smallgpt.config import Config, load_config, parse_config
from smallgpt.corpus import prepare, read_splits
from smallgpt.distributed import Ranks, join_ranks
from smallgpt.files import sha256_file, to_csv, write_atomic, write_json
from smallgpt.loop import loop, pick_compile, set_up_process
from smallgpt.machine import describe_machine, pick_device
from smallgpt.model import SmallGPT
from smallgpt.state import TrainState, clear_states, fingerprint, load_state, new_state
from smallgpt.tokenizer import Tokenizer
from smallgpt.tokens import TokenFile, batch, tokenize
from smallgpt.tracking import MODEL_TAG, Tracker, start_run

log = logging.getLogger(__name__)


def train(
    config: Config,
    tokenizer: Tokenizer,
    *,
    tokens: Path,
    out: Path,
    reports: Path,
    work: Path,
    track: bool = True,
    resume_only: bool = False,
) -> dict[str, Any]:
    """Train a model on token files and write the model folder `out` and the curves in `reports`.

    `work` holds the resumable state, in a folder named after everything that shapes the result; `track` mirrors the
    run in MLflow; `resume_only` refuses to start from the beginning, whatever training.resume is. Started by torchrun,
    the processes share each batch, and the first one writes. Returns the summary that also goes to
    reports/summary.json.

    Raises:
        ValueError: a corpus shorter than two windows, a batch that the processes cannot share evenly, or another
            training of the same thing is running.
        MismatchError: token files of another tokenizer, ids outside the vocabulary, or nothing to resume.
        DeviceError: CUDA was asked for and is not there.
        FloatingPointError: the loss or the gradient is not finite; nothing was updated with it.
        StoppedError: SIGINT or SIGTERM; the state was saved and the next call goes on from it.
    """
    device = pick_device(config.training.device)
    precision = pick_precision(config.training.precision, device)
    resume = "auto" if resume_only else config.training.resume
    picked = {"precision": precision, "compile": pick_compile(config.training), "resume": resume}
    settings = config.training.model_copy(update=picked)
    config = config.model_copy(update={"training": settings})
    threads = settings.threads or processors()
    data = {split: TokenFile.load(tokens, split) for split in ("train", "valid")}
    check_tokens(data, tokenizer, config)
    key = fingerprint(config, data, device, threads)
    folder = work / key[:16]
    unknown = MismatchError(
        f"{work} holds no stopped training with these settings, data, source, versions, threads and device; "
        "give it what it was started with, or use --out to start a new one"
    )
    if resume_only and not any(folder.glob("state-*")):
        raise unknown
    with join_ranks(device) as ranks, exclusive(folder, ranks):
        if settings.batch_size % ranks.size:
            raise ValueError(
                f"training.batch_size is {settings.batch_size}, which {ranks.size} processes cannot share evenly; "
                f"take a multiple of {ranks.size} or another number of processes"
            )
        set_up_process(max(1, threads // ranks.local_size))
        if settings.resume == "never" and ranks.first:
            clear_states(folder)  # they would be taken for newer than the ones to come
        state = new_state(config, device)
        ranks.wait()  # until the lock is held and old states are gone
        if settings.resume == "auto":
            load_state(folder, state)
        if ranks.largest(state.step) != state.step:
            raise MismatchError(
                f"the processes found different states in {work}; it must be one folder for all of them"
            )
        if resume_only and not state.step:
            raise unknown
        others = {str(saved.parent) for saved in work.glob("*/state-*")} - {str(folder)}
        if others and not state.step and ranks.first:
            log.info(
                "starting anew: the settings, data, source, versions, threads or device of %s are others",
                ", ".join(sorted(others)),
            )
        resume_key = key if settings.resume == "auto" else None
        with start_run("train", resume_key=resume_key) if track and ranks.first else Tracker() as tracker:
            tracker.log_params(config.model_dump(include={"model", "training"}))
            for split, file in data.items():
                tracker.log_dataset(split, file.text_sha256, context=split)
            started, before = time.perf_counter(), seconds_before(folder, state.step)
            try:
                loop(config, state, data, folder, tracker, ranks)
            except StoppedError:
                if ranks.first and before is not None:
                    stopped = {"step": state.step, "seconds": before + time.perf_counter() - started}
                    write_json(folder / "seconds.json", stopped)
                raise
            seconds = None if before is None else before + time.perf_counter() - started
            if ranks.first:
                summary = finish(config, state, data, tokenizer, out, reports)
                write_facts(work / "runs", out, summary, seconds, device, ranks)
                tracker.set_tags({MODEL_TAG: sha256_file(out / "model.safetensors")})
                tracker.log_artifact(reports)
        if ranks.first:
            clear_states(folder)
            (folder / "seconds.json").unlink(missing_ok=True)
        ranks.wait()
        return dict(json.loads((reports / "summary.json").read_text(encoding="utf-8")))


def seconds_before(folder: Path, step: int) -> float | None:
    """What the runs up to `step` took, if the last of them stopped right there; None if that is not known."""
    if not step:
        return 0.0
    try:
        saved = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
        return float(saved["seconds"]) if saved["step"] == step else None
    except (OSError, ValueError, KeyError, TypeError):  # not there after a kill, or damaged
        return None


@contextmanager
def exclusive(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the lock of a state folder; the first process does it for all."""
    if not ranks.first:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / "lock", timeout=0).acquire()
    except Timeout:
        raise ValueError(f"another process is training with these settings (it holds {folder / 'lock'})") from None
    with held:
        yield


def pick_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the processor or GPU multiplies matrices in it, and else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("amx_bf16") else "fp32"


def check_tokens(data: dict[str, TokenFile], tokenizer: Tokenizer, config: Config) -> None:
    """Refuse token files that this tokenizer did not write or that this model cannot read."""
    for split, file in data.items():
        if file.tokenizer_sha256 != tokenizer.sha256:
            raise MismatchError(f"the {split} tokens were written by another tokenizer; run the tokenize stage again")
        if int(file.ids.max()) >= config.model.vocab_size:
            raise MismatchError(
                f"the {split} tokens go up to id {int(file.ids.max())}; model.vocab_size is {config.model.vocab_size}"
            )
    # Raises with the remedy where the split is too short.
    batch(data["train"].ids, seed=config.training.seed, step=0, batch_size=1, seq_len=config.seq_len)


def finish(
    config: Config, state: TrainState, data: dict[str, TokenFile], tokenizer: Tokenizer, out: Path, reports: Path
) -> dict[str, Any]:
    """Write the model folder and the reports; nothing in them depends on the run, the time or the machine's speed."""
    per_step = config.training.batch_size * config.training.gradient_accumulation_steps * config.seq_len
    summary = {
        "parameters": state.model.num_parameters(),
        "seed": config.training.seed,
        "steps": state.step,
        "tokens_seen": state.step * per_step,
        "epochs": state.step * per_step / len(data["train"].ids),
        "train": {"loss": state.train_rows[-1]["loss"]},
        "valid": {"loss": state.valid_rows[-1]["loss"], "best_loss": state.best_loss, "best_step": state.best_step},
    }
    lineage = {
        "tokenizer_sha256": tokenizer.sha256,
        "data_sha256": {split: file.sha256 for split, file in data.items()},
        "training": config.training.shaping(),
        "step": state.best_step,
        "last_step": state.step,
    }
    save_checkpoint(out, config.model, state.best, lineage, tokenizer, last=state.weights())
    write_atomic(reports / "train.csv", to_csv(state.train_rows))
    write_atomic(reports / "valid.csv", to_csv(state.valid_rows))
    write_json(reports / "summary.json", summary)
    return summary


def write_facts(
    folder: Path, out: Path, summary: dict[str, Any], seconds: float | None, device: torch.device, ranks: Ranks
) -> None:
    """What depends on the machine and not on the settings, for `smallgpt.results`.

    A run whose time is not known does not take the place of one that made the same weights before.
    """
    path = folder / f"{sha256_file(out / 'model.safetensors')[:16]}.json"
    if seconds is None and path.is_file():
        return
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    if gpu and ranks.size > 1:
        gpu = f"{ranks.size} x {gpu}"
    facts = {
        "hardware": gpu or describe_machine(),
        "torch": torch.__version__,
        "seconds": seconds and round(seconds, 1),
        "tokens_per_second": seconds and round(summary["tokens_seen"] / seconds, 1),
    }
    write_json(path, facts)


class GPTTrainer:
    """Prepare, tokenize and train in one call, for notebooks and scripts.

    `config` is a `Config`, a path to a parameter file, or a dict of its sections. Everything is written below `work`:
    prepared/, tokenizer/, tokens/, reports/, and the model folder gpt/.
    """

    def __init__(self, config: Config | str | Path | dict[str, Any], *, work: str | Path = ".smallgpt/trainer") -> None:
        if isinstance(config, dict):
            config = parse_config(config, "the configuration")
        self.config = config if isinstance(config, Config) else load_config(config)
        self.work = Path(work)

    def train(self, corpus: str | Path, *, track: bool = False, resume_only: bool = False) -> SmallGPT:
        """Train on a corpus (anything `prepare.source` takes) and return the model, its tokenizer attached.

        A training that was stopped goes on where it was; see `train` for `track` and `resume_only`.
        """
        values = self.config.prepare.model_dump() | {"source": str(corpus)}
        config = self.config.model_copy(update={"prepare": parse_config({"prepare": values}, "the corpus").prepare})
        # What turns out not to be the stopped training's text must not take the place of that text.
        place = self.work / ".resume" if resume_only else self.work
        prepared, tokens, tokenizer = place / "prepared", place / "tokens", place / "tokenizer"
        with join_ranks(pick_device(config.training.device)) as ranks:
            try:
                if ranks.first:
                    prepare(config.prepare, out=prepared, report=place / "reports" / "prepare.json")
                    size, how = config.model.vocab_size, config.tokenizer
                    tokenize(read_splits(prepared), vocab_size=size, options=how, tokenizer=tokenizer, tokens=tokens)
                ranks.wait()
                train(
                    config,
                    Tokenizer.load(tokenizer),
                    tokens=tokens,
                    out=self.work / "gpt",
                    reports=self.work / "reports" / "train",
                    work=self.work / "state",
                    track=track,
                    resume_only=resume_only,
                )
            finally:
                if resume_only and ranks.first:
                    shutil.rmtree(place, ignore_errors=True)
        return SmallGPT.from_pretrained(self.work / "gpt")


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m smallgpt.train --config FILE --data FILE [--out FOLDER | --resume FOLDER]`."""
    parser = argparse.ArgumentParser(prog="python -m smallgpt.train", description="Train without a pipeline.")
    parser.add_argument("--config", default="params.yaml", help="parameter file (default: params.yaml)")
    parser.add_argument("--data", required=True, help="text file, .jsonl, folder, or stories|shakespeare|wikitext2")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--out", type=Path, default=Path(".smallgpt/trainer"), help="work folder")
    place.add_argument("--resume", type=Path, help="work folder of a training that was stopped")
    options = parser.parse_args(arguments)
    if options.resume and not any((options.resume / "state").glob("*/state-*")):
        raise FileNotFoundError(f"{options.resume} holds no training that was stopped; use --out to start one")
    trainer = GPTTrainer(options.config, work=options.resume or options.out)
    model = trainer.train(options.data, resume_only=bool(options.resume))
    log.info("%d parameters, trained; the model is in %s", model.num_parameters(), trainer.work / "gpt")
    return 0


if __name__ == "__main__":
    run(main)
