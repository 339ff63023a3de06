import json
from pathlib import Path

import pytest
import yaml

from smallgpt.cli import MismatchError
from smallgpt.config import load_config
from smallgpt.files import sha256_bytes, sha256_file, write_json
from smallgpt.results import add, main

TRAIN = "".join(chr(ord("a") + i * i % 23) for i in range(150)) + "\n"
VALID = "What the model was scored on.\n"
FENCED = "y" * 30 + "\n```\n" + "y" * 45


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What the stages leave behind, as small as it can be."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"training": {"seed": 7, "warmup_steps": 1, "max_steps": 9}}))
    config = load_config(tmp_path / "params.yaml")
    training = config.training.shaping() | {"precision": "bf16", "compile": True}  # what auto was
    figures = {"bits_per_byte": 2.25, "sliding_bits_per_byte": 2.125, "perplexity": 31.5, "context": 8, "stride": 4}
    figures["bytes"] = len(VALID)
    headers = {
        name: {"sha256": f"of {name}", "text_bytes": len(text), "text_sha256": sha256_bytes(text.encode())}
        for name, text in (("train", TRAIN), ("valid", VALID))
    }
    files = {
        "reports/prepare.json": {"source": "my.txt", "valid": {"sha256": sha256_bytes(VALID.encode())}},
        **{f"data/tokens/{name}.json": header for name, header in headers.items()},
        "reports/train/summary.json": {"parameters": 12_345, "seed": 7, "steps": 9, "tokens_seen": 900, "epochs": 1.5},
        "reports/evaluate/perplexity.json": {"valid": figures},
        "models/gpt/config.json": {
            "model": config.model.model_dump(),
            "training": training,
            "last_step": 9,
            "data_sha256": {name: header["sha256"] for name, header in headers.items()},
        },
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    weights = tmp_path / "models/gpt/model.safetensors"
    weights.write_bytes(b"weights")
    samples = "".join(f"\n## {i}\n\n```text\n{text}\n```\n" for i, text in enumerate((TRAIN[20:100], FENCED)))
    (tmp_path / "reports/evaluate/samples.md").write_text(
        f"# Samples\n\nPrompt 'a', seed 3.\n\nsha256 {sha256_file(weights)}.\n{samples}"
    )
    (tmp_path / "data/prepared").mkdir(parents=True)
    (tmp_path / "data/prepared/train.txt").write_text(TRAIN)
    (tmp_path / "data/prepared/valid.txt").write_text(VALID)
    return tmp_path


def write_weights(project: Path, weights: bytes) -> None:
    """Other weights, and samples of theirs."""
    path, page = project / "models/gpt/model.safetensors", project / "reports/evaluate/samples.md"
    before = sha256_file(path)
    path.write_bytes(weights)
    page.write_text(page.read_text().replace(before, sha256_file(path)))


def call(project: Path, action: str) -> None:
    places = {"--project": "", "--out": "rows", "--page": "page.md", "--cards": "cards"}
    main([action, *(part for option, name in places.items() for part in (option, str(project / name)))])


def test_a_row_holds_the_figures_of_the_files(project: Path) -> None:
    digest = sha256_file(project / "models/gpt/model.safetensors")
    facts = project / ".smallgpt/train/runs" / f"{digest[:16]}.json"
    facts.parent.mkdir(parents=True)
    facts.write_text(json.dumps({"hardware": "2 cores", "seconds": 61.2, "tokens_per_second": 7000.4}))
    row = json.loads(add(project, "params.yaml", project / "rows").read_text())
    assert (row["dataset"], row["split"], row["seed"]) == ("my.txt", "valid", 7)
    assert row["split_sha256"] == sha256_bytes(VALID.encode())
    assert (row["bits_per_byte"], row["tokens_seen"], row["seconds"]) == (2.25, 900, 61.2)
    assert row["model_sha256"] == digest


def test_a_preset_may_be_run_with_another_seed(project: Path) -> None:
    (project / "preset.yaml").write_text("training: {seed: 8, warmup_steps: 1, max_steps: 9}\n")
    row = json.loads(add(project, "preset.yaml", project / "rows").read_text())
    assert (row["config"], row["seed"]) == ("preset.yaml", 7)


def test_the_page_has_a_line_for_each_row(project: Path) -> None:
    call(project, "add")
    write_weights(project, b"others")
    call(project, "add")
    call(project, "add")  # the same model again replaces its row
    lines = [line for line in (project / "page.md").read_text().splitlines() if line.startswith("| my.txt")]
    assert len(lines) == 2
    assert "| valid | gpt2 | 12,345 | 10,000 | 1.5000 | 2.2500 | 2.1250 | - |" in lines[0]


@pytest.mark.parametrize(("hardware", "marked"), [("2 cores of a Xeon", True), ("NVIDIA H100", False)])
def test_the_page_says_whether_a_gpu_was_there(project: Path, hardware: str, marked: bool) -> None:
    call(project, "add")
    write_weights(project, b"others")
    digest = sha256_file(project / "models/gpt/model.safetensors")
    write_json(project / f".smallgpt/train/runs/{digest[:16]}.json", {"hardware": hardware})
    call(project, "add")
    assert ("No model was trained on a GPU yet." in (project / "page.md").read_text()) == marked


def test_the_card_shows_samples_and_how_much_of_them_was_read_in_training(project: Path) -> None:
    call(project, "add")
    [path] = (project / "cards").glob("*.md")
    card = path.read_text()
    assert card.startswith("# my.txt, gpt2, 12,345 parameters")
    assert f"```text\n{TRAIN[20:100]}\n```" in card
    # Each sample has 31 windows of 50 characters; those of the first stand in train.
    assert "Prompt 'a', seed 3. The first 2 of 2, none picked by hand.\n0.5000 of the samples' windows" in card
    assert "params.yaml, seed 7: 900 tokens, 1.5 passes" in card


def test_settings_that_were_not_trained_with_and_weights_that_were_not_scored_are_refused(project: Path) -> None:
    params = project / "params.yaml"
    for section in ({"seed": 7, "weight_decay": 0.2}, {"seed": 7, "precision": "fp32"}):
        params.write_text(yaml.safe_dump({"training": {"warmup_steps": 1, "max_steps": 9, **section}}))
        with pytest.raises(MismatchError, match="belong to different runs"):
            add(project, "params.yaml", project / "rows")
    params.write_text(yaml.safe_dump({"training": {"seed": 7, "warmup_steps": 1, "max_steps": 9, "threads": 3}}))
    add(project, "params.yaml", project / "rows")
    (project / "models/gpt/model.safetensors").write_bytes(b"others")
    with pytest.raises(MismatchError, match="belong to different runs"):
        add(project, "params.yaml", project / "rows")


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("data/prepared/train.txt", "a", "z", "data/tokens does not belong"),  # another corpus was prepared since
        ("data/tokens/train.json", "of train", "of others", "models/gpt does not belong"),
        ("reports/prepare.json", '"sha256": "', '"sha256": "0', r"reports/prepare\.json does not belong"),
        ("reports/prepare.json", '"valid"', '"test"', r"reports/prepare\.json does not belong"),
        ("reports/evaluate/perplexity.json", '"bytes": 30', '"bytes": 31', "reports/evaluate does not belong"),
    ],
)
def test_a_text_that_the_model_did_not_see_is_refused(
    project: Path, name: str, old: str, new: str, message: str
) -> None:
    text = (project / name).read_text()
    assert old in text
    (project / name).write_text(text.replace(old, new))
    with pytest.raises(MismatchError, match=message):
        add(project, "params.yaml", project / "rows")


def test_files_of_different_runs_are_refused(project: Path) -> None:
    summary = project / "reports/train/summary.json"
    summary.write_text(summary.read_text().replace('"steps": 9', '"steps": 10'))
    with pytest.raises(MismatchError, match="belong to different runs"):
        add(project, "params.yaml", project / "rows")
    summary.write_text(summary.read_text().replace('"steps": 10', '"steps": 9').replace('"seed": 7', '"seed": 6'))
    with pytest.raises(MismatchError, match="belong to different runs"):
        add(project, "params.yaml", project / "rows")
    (project / "other.yaml").write_text("training: {seed: 8, warmup_steps: 1, max_steps: 8}\n")
    with pytest.raises(MismatchError, match=r"other\.yaml differs from params\.yaml"):
        add(project, "other.yaml", project / "rows")
    summary.unlink()
    with pytest.raises(FileNotFoundError, match="the train stage writes it"):
        add(project, "params.yaml", project / "rows")
    with pytest.raises(FileNotFoundError, match="holds no rows"):
        call(project, "table")
