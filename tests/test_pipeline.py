"""The pipeline as a whole: dvc.yaml against the code, and the five stages on a small corpus."""

import ast
import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from closure import ROOT, closure, imports

STAGES = ("prepare", "tokenize", "train", "evaluate", "export")

# Library files that a stage imports but that do not shape its outs.
NO_DEPS = {
    "tracking.py",  # a mirror of the run
    "cli.py",  # exit codes
    "machine.py",  # names the hardware for files outside DVC, and finds the one that a setting asks for
    "__init__.py",  # lazy names
}
NO_DEPS_OF = {
    # reached through GPTTrainer and SmallGPT.generate, which the stage does not call
    "train": {
        *("corpus.py", "download.py", "stories.py"),
        *("decode.py", "beams.py", "generation.py", "speculation.py", "sampling.py"),
    },
}

LEVELS = [
    {
        "files",
        "cli",
        "sampling",
        "stories",
        "tracking",
        "download",
        "score",
        "speculation",
        "metrics",
        "quantize",
        "attention",
    },
    {"config", "tokenizer", "bundle", "builder", "options", "machine", "openapi"},
    {"tokens", "checkpoint", "corpus", "optim", "distributed", "generation", "session"},
    {"beams", "runtime", "graph"},
    {"decode", "repl", "jobs"},
    {"model", "ort_generate", "completions", "scheduler"},
    {"evaluate", "state", "generate", "interop", "results", "web", "certificate"},
    {"loop", "export", "serve"},
    {"train"},
]


@pytest.fixture(scope="module")
def pipeline() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def paths(entries: list[Any]) -> set[str]:
    return {next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries}


def test_stages_are_the_five(pipeline: dict[str, Any]) -> None:
    assert tuple(pipeline) == STAGES
    for name, stage in pipeline.items():
        assert stage["cmd"] == f"python -m stages.{name}"
        assert stage["desc"].endswith(".")
        assert stage["desc"].count(".") == 1


@pytest.mark.parametrize("stage", STAGES)
def test_dependencies_are_the_imported_files(pipeline: dict[str, Any], stage: str) -> None:
    exempt = NO_DEPS | NO_DEPS_OF.get(stage, set())
    imported = {f"smallgpt/{path.name}" for path in closure(ROOT / f"stages/{stage}.py") if path.name not in exempt}
    declared = {path for path in paths(pipeline[stage]["deps"]) if path.startswith("smallgpt/")}
    assert declared == imported
    assert f"stages/{stage}.py" in paths(pipeline[stage]["deps"])


@pytest.mark.parametrize("stage", STAGES)
def test_default_paths_are_declared(pipeline: dict[str, Any], stage: str) -> None:
    declared = set().union(*(paths(pipeline[stage].get(kind, [])) for kind in ("deps", "outs", "metrics", "plots")))
    for name, parameter in inspect.signature(import_module(f"stages.{stage}").main).parameters.items():
        path = parameter.default
        assert name == "params" or path in declared or any(entry.startswith(path + "/") for entry in declared), path


@pytest.mark.parametrize("stage", STAGES)
def test_stages_are_thin(stage: str) -> None:
    source = (ROOT / f"stages/{stage}.py").read_text()
    assert len(source.splitlines()) <= 45
    assert "argparse" not in source


def test_imports_point_downwards() -> None:
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    files = {path.stem: path for path in (ROOT / "smallgpt").glob("*.py") if path.stem != "__init__"}
    assert files.keys() == level.keys()
    for name, path in files.items():
        for imported in imports(path) - {ROOT / "smallgpt/__init__.py"}:
            assert level[imported.stem] < level[name], f"{name} imports {imported.stem}"


def only_with_torch(node: ast.AST) -> bool:
    """Whether a part of a module is for the type checker, or the one function of `score` that works on tensors."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef) and node.name == "score_stream"


@pytest.mark.parametrize(("module", "more"), [("ort_generate", set()), ("serve", {"starlette", "uvicorn"})])
def test_serving_modules_import_only_the_serving_install(module: str, more: set[str]) -> None:
    allowed = {"numpy", "onnxruntime", "sentencepiece", "smallgpt", *more, *sys.stdlib_module_names}
    for file in [ROOT / f"smallgpt/{module}.py", *closure(ROOT / f"smallgpt/{module}.py")]:
        tree = ast.parse(file.read_text())
        # What PyTorch alone calls may import it: `score.score_stream`.
        later = {node for part in ast.walk(tree) if only_with_torch(part) for node in ast.walk(part)}
        for node in set(ast.walk(tree)) - later:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert {name.split(".")[0] for name in names} <= allowed, file


def test_locked_dependencies_are_those_of_the_tree() -> None:
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    for name, stage in lock.items():
        for dependency in stage["deps"]:
            path = ROOT / dependency["path"]
            if path.suffix == ".py":
                text = path.read_bytes().replace(b"\r\n", b"\n")
                assert hashlib.md5(text).hexdigest() == dependency["md5"], f"{name}: {path.name}; run dvc repro"


def test_locked_parameters_are_those_of_params_yaml() -> None:
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage in lock.values():
        for key, value in stage.get("params", {}).get("params.yaml", {}).items():
            found = params
            for part in key.split("."):
                found = found[part]
            assert json.dumps(found, sort_keys=True).replace('"3e-3"', "0.003") == json.dumps(value, sort_keys=True)


def environment(**extra: str) -> dict[str, str]:
    quiet = {"DVC_NO_ANALYTICS": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONWARNINGS": "ignore"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **quiet, "PATH": path, **extra}


def run(*command: str, cwd: Path, code: int = 0, **extra: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with the tiny settings, its own git and DVC, run once."""
    root = tmp_path_factory.mktemp("project") / "smallgpt"
    root.mkdir()
    for name in (
        "smallgpt",
        "stages",
        "dvc.yaml",
        ".gitignore",
        ".dvcignore",
        "Makefile",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    (root / ".dvc").mkdir()
    for name in ("config", ".gitignore"):
        shutil.copy(ROOT / ".dvc" / name, root / ".dvc" / name)
    shutil.copy(ROOT / "configs/stories-tiny.yaml", root / "params.yaml")
    run("git", "init", "-q", cwd=root)
    run("git", "config", "user.name", "test", cwd=root)
    run("git", "config", "user.email", "test@example.org", cwd=root)
    run("git", "add", "-A", cwd=root)
    run("git", "commit", "-qm", "start", cwd=root)
    run("dvc", "repro", cwd=root, SMALLGPT_TRACKING="on")
    return root


@pytest.mark.slow
def test_second_repro_runs_nothing(project: Path) -> None:
    lock = (project / "dvc.lock").read_bytes()
    output = run("dvc", "repro", cwd=project)
    assert "Running stage" not in output
    assert (project / "dvc.lock").read_bytes() == lock


@pytest.mark.slow
def test_runs_are_mirrored_in_mlflow(project: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{project / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("smallgpt")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == set(STAGES)
    train = runs["train"]
    curve = client.get_metric_history(train.info.run_id, "train/loss")
    rows = (project / "reports/train/train.csv").read_text().splitlines()[1:]
    assert [(point.step, point.value) for point in curve] == [
        (int(r.split(",")[0]), float(r.split(",")[1])) for r in rows
    ]
    assert train.data.params["training.optimizer"] == "muon"
    for stage in ("evaluate", "export"):
        assert runs[stage].data.tags["mlflow.parentRunId"] == train.info.run_id
    bits = json.loads((project / "reports/evaluate/perplexity.json").read_text())["test"]["bits_per_byte"]
    assert runs["evaluate"].data.metrics["test/bits_per_byte"] == bits
    assert "perplexity.json" in [file.path for file in client.list_artifacts(runs["evaluate"].info.run_id)]


@pytest.mark.slow
def test_forced_repro_gives_the_same_lock(project: Path) -> None:
    lock = (project / "dvc.lock").read_bytes()
    output = run("dvc", "repro", "--force", cwd=project)
    assert all(f"Running stage '{stage}'" in output for stage in STAGES)
    assert (project / "dvc.lock").read_bytes() == lock


@pytest.mark.slow
def test_generation_alone_does_not_retrain(project: Path) -> None:
    params = project / "params.yaml"
    before = params.read_text()
    params.write_text(before.replace("temperature: 0.8", "temperature: 0.7"))
    assert params.read_text() != before
    output = run("dvc", "repro", cwd=project)
    params.write_text(before)
    assert "Running stage 'train'" not in output
    assert "Running stage 'evaluate'" in output
    assert "Running stage 'export'" in output
    assert json.loads((project / "exports/fp32/generation_config.json").read_text())["temperature"] == 0.7
    run("dvc", "repro", cwd=project)


@pytest.mark.slow
def test_experiments_metrics_and_plots(project: Path) -> None:
    assert "bits_per_byte" in run("dvc", "metrics", "show", cwd=project)
    run("dvc", "plots", "show", cwd=project)
    page = (project / "dvc_plots/index.html").read_text()
    assert "Training loss" in page
    run("git", "add", "-A", cwd=project)
    run("git", "commit", "-qm", "run", cwd=project)
    run("dvc", "exp", "run", "--temp", "-S", "training.weight_decay=0.3", cwd=project)
    assert "0.3" in run("dvc", "exp", "show", "--csv", cwd=project)


@pytest.mark.slow
def test_bad_parameters_lose_nothing(project: Path) -> None:
    params = project / "params.yaml"
    before, model = params.read_text(), (project / "models/gpt/model.safetensors").read_bytes()
    params.write_text(before.replace("num_heads:", "num_head:"))
    message = run("make", "-o", ".venv/.installed", "repro", cwd=project, code=2)
    assert "unknown parameter model.num_head; did you mean num_heads?" in message
    assert (project / "models/gpt/model.safetensors").read_bytes() == model
    params.write_text(before)


@pytest.mark.slow
def test_a_failing_stage_keeps_the_reports(project: Path) -> None:
    params, source = project / "params.yaml", project / "stages/evaluate.py"
    before, code = params.read_text(), source.read_text()
    reports = {path: path.read_bytes() for path in (project / "reports").rglob("*") if path.is_file()}
    source.write_text(code.replace("config = load_config(params)", "raise ValueError('cut off')"))
    params.write_text(before.replace("samples: ", "samples: 1"))
    assert source.read_text() != code
    assert params.read_text() != before
    message = run("make", "-o", ".venv/.installed", "repro", cwd=project, code=2)
    source.write_text(code)
    params.write_text(before)
    assert "error: cut off" in message
    assert {path: path.read_bytes() for path in (project / "reports").rglob("*") if path.is_file()} == reports
    assert "Running stage" not in run("dvc", "repro", cwd=project)


@pytest.mark.slow
def test_reports_that_a_killed_call_left_in_their_copy_come_back(project: Path) -> None:
    reports = {path: path.read_bytes() for path in (project / "reports").rglob("*") if path.is_file()}
    copy = project / ".smallgpt/reports"
    assert not copy.exists()
    shutil.copytree(project / "reports", copy)
    shutil.rmtree(project / "reports/train")
    output = run("make", "-o", ".venv/.installed", "repro", cwd=project)
    assert "Running stage" not in output
    assert {path: path.read_bytes() for path in (project / "reports").rglob("*") if path.is_file()} == reports
    assert not copy.exists()


@pytest.mark.slow
def test_serving_install_alone(project: Path, tmp_path: Path) -> None:
    """A new environment with the base install generates the same text, and nothing of the training install is in it."""
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    python = str(tmp_path / "venv/bin/python")
    run(python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(project), cwd=tmp_path)
    for name in ("torch", "mlflow", "dvc", "onnx", "pydantic", "yaml"):
        run(python, "-c", f"import {name}", cwd=tmp_path, code=1)
    command = ("-m", "smallgpt.ort_generate", str(project / "exports/fp32"), "-p", "Once", "--seed", "5", "--quiet")
    command += ("--min-new-tokens", "40")
    text = run(python, *command, cwd=tmp_path)
    assert len(text) > 20
    assert text == run(sys.executable, *command, cwd=tmp_path)
