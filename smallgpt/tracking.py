"""MLflow as a mirror of the runs; the files in reports/ are the record.

A tracking failure is one warning and never fails a stage. Only explicit MlflowClient calls are used: the fluent API
keeps a global stack of active runs, which leaks between tests and notebook cells. MLflow is imported by `start_run`.
"""

import json
import logging
import os
import re
import sqlite3
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

MODEL_TAG = "smallgpt.model_sha256"  # a training run gets it at its end
STAGE_TAG = "smallgpt.stage"
RESUME_TAG = "smallgpt.resume_key"
FLUSH_SECONDS = 3.0

_log = logging.getLogger(__name__)


class Tracker:
    """One run, as a context manager. `Tracker()` drops everything: a stage gets it when there is no tracking."""

    def __init__(self, client: Any = None, run: Any = None, *, stage: str = "", parent: Any = None) -> None:
        """`client` is an MlflowClient, `run` and `parent` are mlflow.entities.Run."""
        self.run_id = run.info.run_id if run else None
        self._client, self._stage, self._parent = client, stage, parent
        self._params = dict(run.data.params) if run else {}
        self._last_step = {
            key: max(point.step for point in client.get_metric_history(self.run_id, key))
            for key in (run.data.metrics if run else ())
            if not key.startswith("system/")
        }
        # Points (key, value, milliseconds, step). A long outage loses some; it does not fill the memory.
        self._queue: deque[tuple[str, float, int, int]] = deque(maxlen=100_000)
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._monitor: Any = None
        self._failures = 0
        self._warned = False

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log nested settings as flat `section.key` parameters.

        Parameters of a run cannot change: in a re-opened run the first value stays, and a tag `changed.section.key`
        holds the new one.
        """
        flat = _flatten(params)
        new = {key: value for key, value in flat.items() if key not in self._params}
        changed = {f"changed.{key}": value for key, value in flat.items() if self._params.get(key, value) != value}
        self._params |= new
        self._try("parameters", lambda: self._send(self.run_id, params=new, tags=changed))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log points of curves at `step`, or results where `step` is None.

        Points are queued and sent by a background thread every few seconds. A metric has one point a step: those that a
        resumed training repeats are dropped. Results are sent at once, and a child run copies them to its parent as
        `stage/name`, which makes trained models sortable by their evaluation.
        """
        now = int(time.time() * 1000)
        if self._client is None:
            return
        if step is None:
            self._try("metrics", lambda: self._send_results([(key, value, now, 0) for key, value in metrics.items()]))
            return
        new = [key for key in metrics if step > self._last_step.get(key, -1)]
        self._last_step.update(dict.fromkeys(new, step))
        self._queue.extend((key, metrics[key], now, step) for key in new)
        if self._thread is None:
            self._thread = threading.Thread(target=self._flush_regularly, name="smallgpt-tracking", daemon=True)
            self._thread.start()

    def log_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log `rows` as the artifact `name`.json, which MLflow shows as a table; a second call would append to it."""
        columns = dict.fromkeys(column for row in rows for column in row)
        data = {column: [row.get(column) for row in rows] for column in columns}
        self._try(f"table {name}", lambda: self._client.log_table(self.run_id, data, f"{name}.json"))

    def log_artifact(self, path: Path) -> None:
        """Copy a file, or a folder under its own name, into the run."""
        if path.is_dir():
            self._try(f"folder {path}", lambda: self._client.log_artifacts(self.run_id, str(path), path.name))
        else:
            self._try(f"file {path}", lambda: self._client.log_artifact(self.run_id, str(path)))

    def log_dataset(self, name: str, digest: str, context: str) -> None:
        """Name a data set the run reads. MLflow shows 36 characters of the digest; its source holds all of them."""

        def send() -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            source = json.dumps({"tags": {"digest": digest}})
            dataset = Dataset(name=name, digest=digest[:36], source_type="code", source=source)
            self._client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

        self._try(f"data set {name}", send)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a value that is there already is replaced."""
        self._try("tags", lambda: self._send(self.run_id, tags=tags))

    def close(self, status: str = "FINISHED") -> None:
        """Send what is queued and end the run as FINISHED, FAILED or KILLED. A second call does nothing."""
        if self._closing.is_set() or self._client is None:
            return
        self._closing.set()
        if self._monitor is not None:
            self._try("system metrics", self._monitor.finish)
        if self._thread is not None:
            self._thread.join()
        self._flush()
        if self._queue:
            _log.warning("MLflow lacks the last %d metric points; the files in reports/ have them", len(self._queue))
        self._try("end of the run", lambda: self._client.set_terminated(self.run_id, status), insist=True)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        # Ctrl-C and SystemExit are no Exception; cli.StoppedError, raised once the state is saved, has a signum.
        stopped = not isinstance(error, Exception) or hasattr(error, "signum")
        self.close("FINISHED" if error is None else "KILLED" if stopped else "FAILED")

    def watch_system(self, uri: str) -> None:
        """Log the use of processor, memory, disk and network every 10 s, of GPUs where nvidia-ml-py is installed."""

        def start() -> None:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=uri)
            self._monitor.start()

        self._try("system metrics", start)

    def _send(self, run_id: str | None, *, points: Sequence[tuple] = (), params: Any = (), tags: Any = ()) -> None:
        from mlflow.entities import Metric, Param, RunTag

        self._client.log_batch(
            run_id,
            metrics=[Metric(key, float(value), *when) for key, value, *when in points],
            params=[Param(key, params[key]) for key in params],
            tags=[RunTag(key, str(tags[key])) for key in tags],
            synchronous=True,
        )

    def _send_results(self, points: Sequence[tuple]) -> None:
        self._send(self.run_id, points=points)
        if self._parent is not None:
            known = self._parent.data.metrics  # the same evaluation again adds no second point
            points = [(f"{self._stage}/{key}", *rest) for key, *rest in points]
            self._send(self._parent.info.run_id, points=[point for point in points if known.get(point[0]) != point[1]])

    def _flush_regularly(self) -> None:
        while not self._closing.wait(FLUSH_SECONDS):
            self._flush()

    def _flush(self) -> None:
        """Send the queue. A batch that failed goes back; MLflow drops the points of it that it had stored."""
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(len(self._queue), 1000))]
            if not self._try("metrics", partial(self._send, self.run_id, points=batch), insist=True):
                self._queue.extendleft(reversed(batch))
                return

    def _try(self, what: str, call: Callable[[], object], *, insist: bool = False) -> bool:
        """Run `call`, warn about the first failure; after three in a row only calls that `insist` are made."""
        if self._client is None or (self._failures >= 3 and not insist):
            return False
        try:
            call()
        except Exception as error:
            level = logging.DEBUG if self._warned else logging.WARNING
            _log.log(level, "MLflow did not take the %s: %s; the run goes on", what, _one_line(str(error)))
            self._failures, self._warned = self._failures + 1, True
            return False
        self._failures = 0
        return True


def start_run(stage: str, *, model_sha256: str | None = None, resume_key: str | None = None) -> Tracker:
    """Start, or re-open, the run of one stage.

    With `resume_key` (a training's fingerprint) the newest run with that key that did not finish is re-opened; without
    the argument (`resume: never`) the run is new. With `model_sha256` the run is a child of the newest training run
    whose MODEL_TAG, set at its end, has this value, or a run of its own where there is none (a fresh clone).
    Returns a Tracker that does nothing, and logs why, when MLflow is absent, unreachable or turned off by
    SMALLGPT_TRACKING=off.
    """
    if os.environ.get("SMALLGPT_TRACKING", "").lower() in ("off", "0", "false"):
        return Tracker()
    uri = tracking_uri()
    try:
        return _open_run(uri, stage, model_sha256, resume_key)
    except ImportError as error:
        _log.info("no MLflow tracking: %s", error)
    except Exception as error:
        _log.warning("no MLflow tracking: %s; the run goes on", _one_line(f"{uri}: {error}"))
    return Tracker()


def tracking_uri() -> str:
    """Where runs go: MLFLOW_TRACKING_URI, else mlflow.db at $DVC_ROOT, at the project's root above the cwd, or in it.

    DVC_ROOT is the main workspace also in the temporary copies in which `dvc exp run --temp` and its queue work.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    here = Path.cwd()
    # os.path, which takes a folder that this user may not read for none; .git is a file in a worktree.
    found = (folder for folder in (here, *here.parents) if any(map(os.path.exists, (folder / ".dvc", folder / ".git"))))
    return f"sqlite:///{Path(os.environ.get('DVC_ROOT') or next(found, here)).absolute().as_posix()}/mlflow.db"


def _open_run(uri: str, stage: str, model_sha256: str | None, resume_key: str | None) -> Tracker:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")  # 7, MLflow's default, hold a stage for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")  # its errors also come as exceptions, without a traceback
    from mlflow.tracking import MlflowClient

    path = uri.removeprefix("sqlite:///").split("?")[0]
    database = Path(path).absolute() if uri.startswith("sqlite:///") and path not in ("", ":memory:") else None
    with _locked(database) if database else nullcontext():
        client = MlflowClient(tracking_uri=uri)
        experiment = _experiment(client, database)
    tags = {STAGE_TAG: stage, **_origin_tags()}
    run = parent = None
    if resume_key:
        tags[RESUME_TAG] = resume_key
        run = _newest_run(client, experiment, f"tags.`{RESUME_TAG}` = '{resume_key}' and status != 'FINISHED'")
    if model_sha256:
        tags[MODEL_TAG] = model_sha256
        trained = f"tags.`{MODEL_TAG}` = '{model_sha256}' and tags.`{STAGE_TAG}` = 'train'"
        parent = _newest_run(client, experiment, trained)
        tags |= {"mlflow.parentRunId": parent.info.run_id} if parent else {}
    if run is not None:
        client.update_run(run.info.run_id, status="RUNNING")
    tracker = Tracker(client, run or client.create_run(experiment, run_name=stage), stage=stage, parent=parent)
    tracker.set_tags(tags)
    if stage == "train" and os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in ("true", "1"):
        tracker.watch_system(uri)
    return tracker


@contextmanager
def _locked(database: Path) -> Iterator[None]:
    """Let one process at a time open `database`, and fail at once when it cannot be opened.

    MLflow does not guard the first creation of its tables, and tries for 100 s to open a file. The lock is an
    SQLite transaction on an empty file beside it: it works on every system and ends with the process.
    """
    database.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(f"{database}.lock", timeout=60)) as lock:
        lock.execute("BEGIN EXCLUSIVE")
        sqlite3.connect(database).close()
        yield


def _experiment(client: Any, database: Path | None) -> str:
    """The id of the experiment, made on first use.

    Beside an SQLite file the artifact root is explicit (MLflow's default follows the current directory); a server
    chooses its own. MLflow stores absolute paths, so a project that was moved or copied gets its new root here.
    """
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "smallgpt"
    root = (database.parent / "mlartifacts").as_uri() if database else None
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=root))
        except Exception:
            found = client.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    old = found.artifact_location
    if database and root != old and old.startswith("file:") and old.endswith("/mlartifacts"):
        moved = "UPDATE runs SET artifact_uri = ?1 || substr(artifact_uri, length(?2) + 1) WHERE artifact_uri GLOB ?3"
        with closing(sqlite3.connect(database, timeout=20)) as connection, connection:
            connection.execute("UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?", (root, old))
            connection.execute(moved, (root, old, f"{old}/*"))
    return str(found.experiment_id)


def _newest_run(client: Any, experiment: str, condition: str) -> Any | None:
    runs = client.search_runs([experiment], condition, max_results=1, order_by=["attributes.start_time DESC"])
    return runs[0] if runs else None


def _origin_tags() -> dict[str, str]:
    """Commit and dirty flag of the code in the cwd, and what DVC says about the stage it runs."""
    names = {"DVC_STAGE": "dvc.stage", "DVC_EXP_NAME": "dvc.exp_name", "DVC_EXP_BASELINE_REV": "dvc.exp_baseline"}
    tags = {tag: os.environ[name] for name, tag in names.items() if os.environ.get(name)}
    if commit := _git("rev-parse", "HEAD"):
        # A pipeline rewrites its own outs while it runs; they do not make the code dirty.
        outs = (":(top,exclude)dvc.lock", ":(top,exclude)reports")
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", *outs)
        tags |= {"mlflow.source.git.commit": commit, "git.dirty": "true" if changes else "false"}
    return tags


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", *arguments]  # a status must not disturb the user's own commit
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": str(value)[:6000]}  # MLflow's limit
    return flat


def _one_line(message: str) -> str:
    """The beginning of a message without the password of an address."""
    return re.sub(r"//[^/@\s]*@", "//", " ".join(message.split()))[:400]
