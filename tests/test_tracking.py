"""Tracking against real MLflow stores: an SQLite file, a server on loopback, broken ones, and no MLflow at all."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from smallgpt.cli import StoppedError
from smallgpt.tracking import MODEL_TAG, Tracker, start_run, tracking_uri

ROOT = Path(__file__).parents[1]
MODEL = "ab" * 32
ENVIRONMENT = (
    "DVC_EXP_BASELINE_REV",
    "DVC_EXP_NAME",
    "DVC_ROOT",
    "DVC_STAGE",
    "MLFLOW_DISABLE_TELEMETRY",
    "MLFLOW_EXPERIMENT_NAME",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_LOGGING_LEVEL",
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL",
    "MLFLOW_TRACKING_URI",
    "SMALLGPT_TRACKING",
)


@pytest.fixture(autouse=True)
def clean_environment() -> Iterator[None]:
    before = dict(os.environ)
    for name in ENVIRONMENT:
        os.environ.pop(name, None)
    os.environ["MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"] = "false"
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mlflow.db with its tables and the experiment: making one costs seconds, copying it nothing."""
    pytest.importorskip("mlflow")
    folder = tmp_path_factory.mktemp("migrated")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("DVC_ROOT", str(folder))
        environment.delenv("SMALLGPT_TRACKING", raising=False)
        start_run("prepare").close()
    return folder / "mlflow.db"


@pytest.fixture
def project(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with a database; the cwd is elsewhere."""
    folder = tmp_path / "a project"
    folder.mkdir()
    shutil.copy(migrated, folder)
    os.environ["DVC_ROOT"] = str(folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def mlflow_client() -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri())


def read_run(tracker: Tracker) -> Any:
    return mlflow_client().get_run(tracker.run_id)


def history(run_id: str | None, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in mlflow_client().get_metric_history(run_id, key)]


def artifact(tracker: Tracker, name: str, folder: Path) -> bytes:
    return Path(mlflow_client().download_artifacts(tracker.run_id, name, str(folder))).read_bytes()


def train_run(model: str = MODEL) -> Tracker:
    with start_run("train") as tracker:
        tracker.set_tags({MODEL_TAG: model})
    return tracker


def run_python(code: str, cwd: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=env, check=False)


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited for a minute")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.slow
def test_everything_that_was_logged_is_read_back(project: Path, tmp_path: Path) -> None:
    (tmp_path / "samples.md").write_text("Once upon a time\n")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "loss.png").write_bytes(b"\x89PNG")
    with start_run("train") as tracker:
        tracker.log_params({"model": {"embed_dim": 256, "ffn_dim": None}, "generation": {"stop": [], "prompt": ""}})
        for step in range(0, 2500, 10):
            tracker.log_metrics({"loss": 5.0 - step / 1000, "lr": 1e-3}, step)
        tracker.log_table("perplexity", [{"split": "valid", "bits": 1.5}, {"split": "test", "bits": 1.25, "floor": 1}])
        tracker.log_artifact(tmp_path / "samples.md")
        tracker.log_artifact(tmp_path / "pictures")
        tracker.log_dataset("tokens/train", "c0ffee" * 10 + "beef", "train")
        tracker.set_tags({MODEL_TAG: MODEL})

    run = read_run(tracker)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "train"
    assert run.data.params == {
        "model.embed_dim": "256",
        "model.ffn_dim": "None",
        "generation.stop": "[]",
        "generation.prompt": "",
    }
    assert history(tracker.run_id, "loss") == [(step, 5.0 - step / 1000) for step in range(0, 2500, 10)]
    assert history(tracker.run_id, "lr") == [(step, 1e-3) for step in range(0, 2500, 10)]
    assert json.loads(artifact(tracker, "perplexity.json", tmp_path)) == {
        "columns": ["split", "bits", "floor"],
        "data": [["valid", 1.5, None], ["test", 1.25, 1.0]],
    }
    assert json.loads(run.data.tags["mlflow.loggedArtifacts"]) == [{"path": "perplexity.json", "type": "table"}]
    (tmp_path / "back").mkdir()
    assert artifact(tracker, "samples.md", tmp_path / "back") == b"Once upon a time\n"
    assert artifact(tracker, "pictures/loss.png", tmp_path / "back") == b"\x89PNG"
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("tokens/train", "c0ffee" * 6)
    assert json.loads(dataset.dataset.source) == {"tags": {"digest": "c0ffee" * 10 + "beef"}}
    assert [(tag.key, tag.value) for tag in dataset.tags] == [("mlflow.data.context", "train")]
    assert run.data.tags["smallgpt.stage"] == "train"
    assert run.data.tags[MODEL_TAG] == MODEL


def test_points_arrive_while_the_run_goes_on(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smallgpt.tracking.FLUSH_SECONDS", 0.1)
    with start_run("train") as tracker:
        tracker.log_metrics({"loss": 2.0}, 0)
        wait_until(lambda: bool(history(tracker.run_id, "loss")))
        assert history(tracker.run_id, "loss") == [(0, 2.0)]
        assert read_run(tracker).info.status == "RUNNING"


def test_each_evaluation_is_a_child_of_the_newest_training_of_its_model(project: Path, tmp_path: Path) -> None:
    train_run()
    newest = train_run()
    train_run("cd" * 32)
    evaluations = []
    for _ in range(2):
        with start_run("evaluate", model_sha256=MODEL) as tracker:
            tracker.log_metrics({"test/bits_per_byte": 1.25})
            tracker.log_metrics({"loss_by_position": 4.0}, 0)
            tracker.log_metrics({"loss_by_position": 3.0}, 1)
            tracker.log_table("perplexity", [{"split": "test", "bits_per_byte": 1.25}])
        evaluations.append(tracker)
    first, second = evaluations
    assert first.run_id != second.run_id
    for tracker in evaluations:
        tags = read_run(tracker).data.tags
        assert tags["mlflow.parentRunId"] == newest.run_id
        assert tags[MODEL_TAG] == MODEL
        assert json.loads(artifact(tracker, "perplexity.json", tmp_path))["data"] == [["test", 1.25]]
    # The results, not the curve, stand at the parent too, once.
    assert set(read_run(newest).data.metrics) == {"evaluate/test/bits_per_byte"}
    assert history(newest.run_id, "evaluate/test/bits_per_byte") == [(0, 1.25)]
    assert read_run(newest).info.status == "FINISHED"


def test_without_a_training_run_the_evaluation_stands_alone(project: Path) -> None:
    for _ in range(2):  # the first is no parent of the second
        with start_run("evaluate", model_sha256=MODEL) as tracker:
            tracker.log_metrics({"bits_per_byte": 1.25})
        run = read_run(tracker)
        assert "mlflow.parentRunId" not in run.data.tags
        assert run.data.tags[MODEL_TAG] == MODEL
        assert run.data.metrics == {"bits_per_byte": 1.25}


def test_a_resumed_training_goes_on_in_its_run_without_double_points(project: Path) -> None:
    def train_to_step_35(tracker: Tracker) -> None:
        with tracker:
            tracker.log_params({"training": {"max_steps": 60, "log_interval": 10}})
            for step in range(0, 40, 10):
                tracker.log_metrics({"loss": float(step)}, step)
            tracker.log_metrics({"valid_loss": 7.0}, 20)
            raise StoppedError("stopped at step 35", 15)

    stopped = start_run("train", resume_key="f00d")
    with pytest.raises(StoppedError):
        train_to_step_35(stopped)
    assert read_run(stopped).info.status == "KILLED"

    with start_run("train", resume_key="f00d") as resumed:  # from the checkpoint of step 20
        assert read_run(resumed).info.status == "RUNNING"
        resumed.log_params({"training": {"max_steps": 60, "log_interval": 5}, "new": 1})
        for step in range(20, 60, 5):
            resumed.log_metrics({"loss": float(step)}, step)
        resumed.log_metrics({"valid_loss": 7.0}, 20)
        resumed.log_metrics({"valid_loss": 6.0}, 40)
    assert resumed.run_id == stopped.run_id
    run = read_run(resumed)
    assert run.info.status == "FINISHED"
    assert history(resumed.run_id, "loss") == [(s, float(s)) for s in (0, 10, 20, 30, 35, 40, 45, 50, 55)]
    assert history(resumed.run_id, "valid_loss") == [(20, 7.0), (40, 6.0)]
    assert run.data.params == {"training.max_steps": "60", "training.log_interval": "10", "new": "1"}
    assert run.data.tags["changed.training.log_interval"] == "5"
    assert "changed.training.max_steps" not in run.data.tags

    with start_run("train", resume_key="f00d") as again:  # the run is finished: a new one
        pass
    with start_run("train") as unkeyed:
        pass
    assert len({resumed.run_id, again.run_id, unkeyed.run_id}) == 3


def test_the_run_of_a_process_that_vanished_is_reopened(project: Path) -> None:
    vanished = start_run("train", resume_key="dead")  # never closed, as after kill -9
    with start_run("train", resume_key="dead") as reopened:
        assert reopened.run_id == vanished.run_id


def test_points_that_are_sent_again_are_stored_once(project: Path) -> None:
    with start_run("train") as tracker:
        for _ in range(2):  # the answer to the first sending was lost
            tracker._send(tracker.run_id, points=[("loss", 1.0, 1000, 1), ("loss", 2.0, 1000, 2)])
    assert history(tracker.run_id, "loss") == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("bad"), "FAILED"), (KeyboardInterrupt(), "KILLED"), (StoppedError("stopped", 15), "KILLED")],
)
def test_how_a_run_ends(project: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), start_run("train", resume_key="beef") as tracker:
        raise error
    assert read_run(tracker).info.status == status
    with start_run("train", resume_key="beef") as reopened:
        assert reopened.run_id == tracker.run_id


@pytest.mark.slow
def test_system_metrics_of_a_training_run(project: Path) -> None:
    os.environ["MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"] = "0.1"
    del os.environ["MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"]
    with start_run("train") as tracker:
        time.sleep(1)
    metrics = read_run(tracker).data.metrics
    assert 0 <= metrics["system/cpu_utilization_percentage"] <= 100
    assert metrics["system/system_memory_usage_megabytes"] > 0
    with start_run("tokenize") as other:
        time.sleep(0.3)
    assert read_run(other).data.metrics == {}


def test_commit_dirty_flag_and_dvc_names(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_run("prepare") as outside:
        pass
    assert {"mlflow.source.git.commit", "git.dirty", "dvc.stage"}.isdisjoint(read_run(outside).data.tags)

    repository = tmp_path / "repository"
    (repository / "reports").mkdir(parents=True)
    for name in ("code.py", "dvc.lock", "reports/prepare.json"):
        (repository / name).write_text("1\n")
    identity = ("-c", "user.name=Nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "First")):
        subprocess.run(["git", *command], cwd=repository, check=True)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=repository, text=True).strip()
    monkeypatch.chdir(repository / "reports")
    monkeypatch.setenv("DVC_STAGE", "prepare")
    monkeypatch.setenv("DVC_EXP_NAME", "sweep-1")

    (repository / "dvc.lock").write_text("2\n")  # outs of the pipeline itself do not count
    (repository / "reports" / "prepare.json").write_text("2\n")
    (repository / "notes.txt").write_text("untracked\n")
    with start_run("prepare") as clean:
        pass
    tags = read_run(clean).data.tags
    assert tags["mlflow.source.git.commit"] == head
    assert tags["git.dirty"] == "false"
    assert (tags["dvc.stage"], tags["dvc.exp_name"]) == ("prepare", "sweep-1")

    (repository / "code.py").write_text("2\n")
    with start_run("prepare") as dirty:
        pass
    assert read_run(dirty).data.tags["git.dirty"] == "true"


def test_the_store_stays_with_the_project_whatever_the_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "repository"
    (repository / ".git").mkdir(parents=True)
    (repository / "sub" / "folder").mkdir(parents=True)
    (repository / "nested" / ".dvc").mkdir(parents=True)
    monkeypatch.chdir(repository / "sub" / "folder")
    assert tracking_uri() == f"sqlite:///{repository}/mlflow.db"
    monkeypatch.chdir(repository / "nested")
    assert tracking_uri() == f"sqlite:///{repository}/nested/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    assert tracking_uri() == f"sqlite:///{tmp_path}/main/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking.example.org")
    assert tracking_uri() == "http://tracking.example.org"


def test_artifacts_lie_beside_the_database_and_follow_a_moved_project(project: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("moved")
    with start_run("evaluate") as tracker:  # the cwd is elsewhere, the database was copied from another folder
        tracker.log_artifact(tmp_path / "note.txt")
    assert [path.read_text() for path in project.glob("mlartifacts/*/artifacts/note.txt")] == ["moved"]
    assert not list(Path.cwd().iterdir())

    project.rename(tmp_path / "renamed")
    os.environ["DVC_ROOT"] = str(tmp_path / "renamed")
    with start_run("evaluate") as second:
        second.log_artifact(tmp_path / "note.txt")
    assert not project.exists()
    assert len(list((tmp_path / "renamed").glob("mlartifacts/*/artifacts/note.txt"))) == 2
    (tmp_path / "back").mkdir()
    assert artifact(tracker, "note.txt", tmp_path / "back") == b"moved"


def test_user_settings_stay(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_run("prepare").close()
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="false", MLFLOW_HTTP_REQUEST_MAX_RETRIES="5")
    os.environ["MLFLOW_EXPERIMENT_NAME"] = "mine"
    with start_run("prepare") as tracker:
        pass
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "5"
    assert mlflow_client().get_experiment(read_run(tracker).info.experiment_id).name == "mine"


def own_records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name.startswith("smallgpt")]


def use(tracker: Tracker, tmp_path: Path) -> None:
    """Every method once; none may raise."""
    with tracker:
        tracker.log_params({"a": {"b": 1}})
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker.log_metrics({"result": 1.0})
        tracker.log_table("table", [{"a": 1}])
        tracker.log_artifact(tmp_path)
        tracker.log_artifact(tmp_path / "missing.txt")
        tracker.log_dataset("data", "00", "train")
        tracker.set_tags({"a": "b"})
    tracker.close()


def test_turned_off(project: Path, tmp_path: Path) -> None:
    os.environ["SMALLGPT_TRACKING"] = "off"
    use(start_run("train"), tmp_path)
    del os.environ["SMALLGPT_TRACKING"]
    with start_run("prepare") as tracker:
        pass
    client = mlflow_client()
    runs = client.search_runs([read_run(tracker).info.experiment_id], "tags.`smallgpt.stage` = 'train'")
    assert runs == []


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["a folder", "garbage", "a closed port", "a silent server", "a file store"])
def test_a_broken_store_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str) -> None:
    database = tmp_path / "mlflow.db"
    if broken == "a folder":
        database.mkdir()
    elif broken == "garbage":
        database.write_bytes(b"no database" * 1000)
    with socket.create_server(("127.0.0.1", 0)) as silent, caplog.at_level(logging.INFO, logger="smallgpt"):
        uris = {
            "a closed port": f"http://me:secret@127.0.0.1:{free_port()}",
            "a silent server": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "a file store": f"file://{tmp_path}/mlruns",
        }
        os.environ["MLFLOW_TRACKING_URI"] = uris.get(broken, f"sqlite:///{database}")
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "1"
        tracker = start_run("train")
        use(tracker, tmp_path)
    assert tracker.run_id is None
    (record,) = own_records(caplog)
    assert record.levelname == "WARNING"
    assert record.message.startswith("no MLflow tracking: ")
    assert {"a folder": "unable to open", "garbage": "not a database"}.get(broken, "") in record.message
    assert "\n" not in record.message
    assert "secret" not in record.message


def test_after_three_failures_only_the_end_is_sent(project: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="smallgpt"), start_run("evaluate") as tracker:
        tracker.log_artifact(project / "missing.txt")
        tracker.log_artifact(project / "missing.txt")
        tracker.set_tags({"second": "yes"})  # a success starts the count anew
        for _ in range(3):
            tracker.log_artifact(project / "missing.txt")
        tracker.set_tags({"third": "yes"})
    (record,) = own_records(caplog)
    assert record.levelname == "WARNING"
    assert "missing.txt" in record.message
    run = read_run(tracker)
    assert run.info.status == "FINISHED"
    assert run.data.tags["second"] == "yes"
    assert "third" not in run.data.tags


def test_points_outlive_an_outage(
    project: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smallgpt.tracking.FLUSH_SECONDS", 0.05)
    database = project / "mlflow.db"
    with caplog.at_level(logging.INFO, logger="smallgpt"), start_run("train") as tracker:
        database.rename(project / "hidden.db")
        database.mkdir()
        tracker._client._tracking_client.store.engine.dispose()  # else SQLite writes on into the renamed file
        tracker.log_metrics({"loss": 1.0}, 1)
        wait_until(lambda: tracker._failures >= 3)
        database.rmdir()
        (project / "hidden.db").rename(database)
        wait_until(lambda: tracker._failures == 0)
        tracker.set_tags({"after": "yes"})
    (record,) = own_records(caplog)
    assert "unable to open database file" in record.message
    assert history(tracker.run_id, "loss") == [(1, 1.0)]
    assert read_run(tracker).data.tags["after"] == "yes"


def test_without_mlflow_everything_runs(tmp_path: Path) -> None:
    code = """
import logging, sys
from pathlib import Path
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mlflow":
            raise ModuleNotFoundError("No module named 'mlflow'", name="mlflow")
sys.meta_path.insert(0, Block())
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
from smallgpt.tracking import start_run
with start_run("train", resume_key="f00d") as tracker:
    tracker.log_params({"a": {"b": 1}})
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.log_metrics({"result": 1.0})
    tracker.log_table("table", [{"a": 1}])
    tracker.log_artifact(Path("missing"))
    tracker.log_dataset("data", "00", "train")
    tracker.set_tags({"a": "b"})
print(tracker.run_id)
"""
    done = run_python(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "None\n")
    assert done.stderr == "INFO no MLflow tracking: No module named 'mlflow'\n"
    assert list(tmp_path.iterdir()) == []


def test_importing_tracking_imports_neither_mlflow_nor_the_rest_of_the_library(tmp_path: Path) -> None:
    code = """
import sys
import smallgpt
before = set(sys.modules)
import smallgpt.tracking
new = set(sys.modules) - before
print(sorted(n for n in new if n.split(".")[0] not in sys.stdlib_module_names))
"""
    assert run_python(code, tmp_path).stdout == "['smallgpt.tracking']\n"


@pytest.mark.slow
def test_two_processes_may_be_the_first(tmp_path: Path) -> None:
    code = "from smallgpt.tracking import start_run\nwith start_run('prepare') as t: print(t.run_id)"
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(run_python, code, tmp_path, DVC_ROOT=str(tmp_path)) for _ in range(2)]
        results = [run.result() for run in runs]
    assert [result.stderr for result in results] == ["", ""]
    os.environ["DVC_ROOT"] = str(tmp_path)
    found = [mlflow_client().get_run(result.stdout.strip()) for result in results]
    assert len({run.info.run_id for run in found}) == 2
    assert len({run.info.experiment_id for run in found}) == 1


@pytest.fixture
def server(project: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a real `mlflow server` over the project's database."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", tracking_uri(), "--artifacts-destination", str(tmp_path / "served")]
    log = tmp_path / "server.log"
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command, *stores], stdout=file, stderr=file, cwd=tmp_path, env=env, start_new_session=True
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait()


@pytest.mark.slow
def test_a_server_over_the_same_file_shows_the_run(project: Path, tmp_path: Path, server: str) -> None:
    (tmp_path / "samples.md").write_text("Once upon a time\n")
    parent = train_run()
    with start_run("evaluate", model_sha256=MODEL) as local:
        local.log_params({"evaluation": {"stride": 128}})
        local.log_metrics({"test/bits_per_byte": 1.25})
        local.log_metrics({"loss_by_position": 3.0}, 7)
        local.log_table("perplexity", [{"split": "test", "bits_per_byte": 1.25}])
        local.log_artifact(tmp_path / "samples.md")

    os.environ["MLFLOW_TRACKING_URI"] = server
    run = read_run(local)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"evaluation.stride": "128"}
    assert run.data.metrics == {"test/bits_per_byte": 1.25, "loss_by_position": 3.0}
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    assert history(local.run_id, "loss_by_position") == [(7, 3.0)]
    assert json.loads(artifact(local, "perplexity.json", tmp_path))["data"] == [["test", 1.25]]
    # The page in the browser fetches artifacts from the server, not from the folder.
    for name, content in {
        "samples.md": b"Once upon a time\n",
        "perplexity.json": b'{"columns":["split","bits_per_byte"],"data":[["test",1.25]]}',
    }.items():
        with urllib.request.urlopen(f"{server}/get-artifact?run_id={local.run_id}&path={name}") as response:
            assert response.read() == content

    # A training logged through the server, into an experiment whose artifacts the server keeps.
    os.environ["MLFLOW_EXPERIMENT_NAME"] = "remote"
    with start_run("train", resume_key="f00d") as remote:
        remote.log_params({"training": {"max_steps": 3}})
        for step in range(3):
            remote.log_metrics({"loss": float(step)}, step)
        remote.log_dataset("tokens/train", "00", "train")
        remote.log_table("perplexity", [{"split": "test"}])
        remote.log_artifact(tmp_path / "samples.md")
    assert read_run(remote).info.artifact_uri.startswith("mlflow-artifacts:/")
    assert history(remote.run_id, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert len(list((tmp_path / "served").rglob("samples.md"))) == 1
    assert artifact(remote, "samples.md", tmp_path) == b"Once upon a time\n"
    assert read_run(remote).inputs.dataset_inputs[0].dataset.name == "tokens/train"
