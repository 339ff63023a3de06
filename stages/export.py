"""DVC stage `export`: write the serving bundles, each certified against PyTorch."""

from pathlib import Path

from smallgpt.checkpoint import model_sha256
from smallgpt.cli import run
from smallgpt.config import load_config
from smallgpt.export import export
from smallgpt.tracking import start_run


def main(
    params: str = "params.yaml",
    model: str = "models/gpt",
    tokens: str = "data/tokens",
    out: str = "exports",
    report: str = "reports/export.json",
) -> None:
    config = load_config(params)
    with start_run("export", model_sha256=model_sha256(model)) as tracker:
        results = export(
            Path(model), Path(tokens), config.export, config.generation, out=Path(out), report=Path(report)
        )
        tracker.log_params(config.model_dump(include={"export"}))
        for variant, figures in results.items():
            numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
            tracker.log_metrics({f"{variant}/{key}": value for key, value in numbers.items()})
        tracker.log_artifact(Path(report))


if __name__ == "__main__":
    run(main)
