"""DVC stage `evaluate`: score the model on every split, against the entropy floor where it is known."""

from pathlib import Path

from smallgpt.checkpoint import model_sha256
from smallgpt.cli import run
from smallgpt.config import load_config
from smallgpt.evaluate import evaluate, perplexity_rows, read_floors
from smallgpt.machine import pick_device
from smallgpt.model import SmallGPT
from smallgpt.tracking import start_run


def main(
    params: str = "params.yaml",
    model: str = "models/gpt",
    tokens: str = "data/tokens",
    prepare_report: str = "reports/prepare.json",
    train_reports: str = "reports/train",
    out: str = "reports/evaluate",
) -> None:
    config = load_config(params)
    device = pick_device(config.evaluation.device, "evaluation.device")
    digest = model_sha256(model)
    with start_run("evaluate", model_sha256=digest) as tracker:
        results = evaluate(
            SmallGPT.from_pretrained(model).to(device),
            Path(tokens),
            config.evaluation,
            config.generation,
            digest=digest,
            out=Path(out),
            floors=read_floors(Path(prepare_report)),
            train_reports=Path(train_reports),
        )
        tracker.log_params(config.model_dump(include={"evaluation"}) | {"generation": config.generation.to_dict()})
        for split, figures in results.items():
            tracker.log_metrics({f"{split}/{key}": value for key, value in figures.items()})
        tracker.log_table("perplexity", perplexity_rows(results))
        tracker.log_artifact(Path(out))


if __name__ == "__main__":
    run(main)
