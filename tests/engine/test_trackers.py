"""Metrics reach the trackers of `crossbatch.log.to` under their names in metrics.jsonl; none can stop or delay a run."""

import importlib.util
import json
import signal
import sys
import threading
import time
import types
import warnings
from pathlib import Path
from unittest import mock

import pytest

from crossbatch import InputError, RunStopped
from crossbatch.engine import trackers
from crossbatch.engine.config import load_config
from crossbatch.engine.run_log import RunLog

FIRST = {"step": 1, "epoch": 0.5, "images_seen": 8, "loss": 2.5, "lr": 0.1, "loss_by_lr": {"0.1": 2.5}}
SECOND = {"step": 2, "epoch": 1.0, "images_seen": 16, "loss": 2.25, "lr": 0.1}


def log_two_steps(out: Path, *to: str, config: dict | None = None) -> list[str]:
    """Log a step, close, resume, and log the next one, as an interrupted run does; return the warnings."""
    warned = []
    with mock.patch.object(RunLog, "warn", lambda log, text: warned.append(text)):
        for first_step, line in ((0, FIRST), (1, SECOND)):
            log = RunLog(out, first_step, 2, to, config or {"train_batch_size": 8})
            log.record(line)
            log.record({**line, "knn_top1": 12.5 * line["step"]})
            log.close()
    return warned


class Recorder(trackers.Tracker):
    """Keeps what it is sent."""

    opened: list[str | None]
    sent: list[tuple[int, object]]

    def open(self, out, run, config):
        self.opened.append(run)
        return run or "theirs"

    def record(self, values, step):
        self.sent.append((step, values))

    def close(self, outcome):
        self.sent.append((-1, outcome))


@pytest.fixture
def recorder(monkeypatch) -> type[Recorder]:
    Recorder.opened, Recorder.sent = [], []
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Recorder)
    return Recorder


def test_names_are_those_of_the_metrics_and_a_resumed_run_is_the_same(recorder, tmp_path):
    assert log_two_steps(tmp_path, "wandb") == []
    assert recorder.opened == [None, "theirs"]
    assert [step for step, _ in recorder.sent] == [1, 1, -1, 2, 2, -1] and recorder.sent[-1][1] == "finished"
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    flat = {**line, "loss_by_lr/0.1": 2.5}
    del flat["loss_by_lr"]
    assert recorder.sent[1][1] == flat and flat["knn_top1"] == 12.5
    assert not list(tmp_path.glob("events*"))  # TensorBoard was not asked for
    RunLog(tmp_path, 0, 2, ["wandb", "tensorboard"], {}).close()
    assert recorder.opened[-1] is None  # a run that starts anew is another one


@pytest.mark.parametrize("broken", ["open", "record", "close"])
def test_a_tracker_that_fails_is_told_of_once(recorder, monkeypatch, tmp_path, broken):
    def fail(*arguments):
        raise SystemExit("the service is gone")  # wandb ends processes

    monkeypatch.setattr(recorder, broken, fail)
    warned = log_two_steps(tmp_path, "wandb")
    what = "does not take metrics" if broken == "record" else "gets no more metrics"
    assert len(warned) == 2 and all(f"wandb {what}: the service is gone; " in text for text in warned)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_tracker_that_comes_back_gets_what_waited_for_it(recorder, monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "LONGEST_PAUSE_S", 0.01)
    record, failures = recorder.record, iter(range(3))

    def fail_at_first(*arguments):
        if next(failures, None) is not None:
            raise ConnectionError("the service is gone")
        record(*arguments)

    monkeypatch.setattr(recorder, "record", fail_at_first)
    warned = []
    monkeypatch.setattr(RunLog, "warn", lambda log, text: warned.append(text))
    log = RunLog(tmp_path, 0, 2, ["wandb"], {})
    log.record(FIRST)
    log.record(SECOND)
    while len(recorder.sent) < 2:
        time.sleep(0.01)
    log.close()
    assert [step for step, _ in recorder.sent] == [1, 2, -1]
    assert len(warned) == 1 and "wandb does not take metrics: the service is gone; they are sent again" in warned[0]


def test_a_tracker_that_hangs_is_not_waited_for(recorder, monkeypatch, tmp_path):
    free = threading.Event()
    monkeypatch.setattr(recorder, "record", lambda *arguments: free.wait(60))
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    monkeypatch.setattr(trackers, "QUEUED", 3)
    warned = []
    monkeypatch.setattr(RunLog, "warn", lambda log, text: warned.append(text))
    log = RunLog(tmp_path, 0, 2, ["wandb"], {})
    for step in range(1, 9):
        log.record({**FIRST, "step": step})
    start = time.monotonic()
    log.close()
    free.set()
    assert time.monotonic() - start < 20 and "did not take the last metrics" in warned[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 8


def test_a_missing_package_is_refused_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    trackers.check_trackers(["tensorboard"])
    with pytest.raises(
        InputError, match=r"crossbatch.log.to: given trackio, which is not installed; pip install trackio"
    ):
        trackers.check_trackers(["tensorboard", "trackio"])


@pytest.mark.parametrize("to", [["wandb"], ["wandb", "tensorboard"]])
def test_the_last_table_names_tensorboard_where_it_was_written(recorder, capsys, tmp_path, to):
    RunLog(tmp_path, 0, 2, to).summary([("steps", "2")], [])
    assert ("tensorboard --logdir" in capsys.readouterr().out) == ("tensorboard" in to)


def test_another_name_is_refused():
    with pytest.raises(InputError, match=r'crossbatch.log.to.*wandbb.*a list of "tensorboard" or "wandb" or'):
        load_config(None, ['crossbatch.log.to=["wandbb"]'])


class Written(Recorder):
    """Writes what it is sent into the run directory, for runs in another process."""

    def open(self, out, run, config):
        self.file = out / "sent"
        return f"{run}, {config['train_batch_size']}"

    def record(self, values, step):
        with self.file.open("a") as file:
            file.write(f"{step} {' '.join(sorted(values))}\n")

    def close(self, outcome):
        with self.file.open("a") as file:
            file.write(f"{outcome}\n")


def train_here(out: str, is_installed: bool) -> str:
    """Train two steps on this rank of a pool, with Trackio in place or absent; return why that stopped."""
    from tests.small_runs import LARS, RESNET, run

    find = importlib.util.find_spec

    def found(name: str):
        return (find("json") if is_installed else None) if name == "trackio" else find(name)

    with mock.patch("importlib.util.find_spec", found), mock.patch.dict(trackers.TRACKERS, trackio=Written):
        return run([*RESNET, *LARS, 'crossbatch.log.to=["trackio"]'], out, 2)


def test_a_run_is_tracked(one_rank, tmp_path):
    assert one_rank.run(train_here, str(tmp_path / "run"), True) == [""]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    *sent, outcome = (tmp_path / "run/sent").read_text().splitlines()
    assert sent[-1].split()[0] == str(lines[-1]["step"]) and {"loss", "lr", "step_ms"} <= set(sent[-1].split())
    assert outcome == "finished"
    assert json.loads((tmp_path / "run/trackers.json").read_text()) == {"trackio": "None, 12"}
    assert not list((tmp_path / "run").glob("events*"))


def stop_here(out: str, how: str) -> str:
    """Train four steps on this rank of a pool, of which a signal or a failure ends the second; return why that stopped."""
    from crossbatch.engine.trainer import Trainer
    from tests.small_runs import LARS, RESNET, run

    train_on = Trainer._train_on

    def interrupted(self, batch):
        if self.num_steps == 1:
            if how == "failed":
                raise RunStopped("no more")
            take_in = signal.getsignal(signal.SIGTERM)
            assert callable(take_in)
            take_in(signal.SIGTERM, None)  # not by the kernel: a rank of a pool may have inherited that it is blocked
        return train_on(self, batch)

    with (
        mock.patch.object(Trainer, "_train_on", interrupted),
        mock.patch("crossbatch.engine.start.check_trackers"),
        mock.patch.dict(trackers.TRACKERS, trackio=Written),
    ):
        return run([*RESNET, *LARS, 'crossbatch.log.to=["trackio"]'], out, 4)


@pytest.mark.parametrize(("how", "message"), [("stopped", ""), ("failed", "RunStopped: no more")])
def test_a_tracker_is_told_how_a_run_ended(one_rank, tmp_path, how, message):
    assert one_rank.run(stop_here, str(tmp_path / "run"), how) == [message]
    assert (tmp_path / "run/sent").read_text().splitlines()[-1] == how


def test_a_run_without_the_package_stops_before_it_trains(one_rank, tmp_path):
    (message,) = one_rank.run(train_here, str(tmp_path / "run"), False)
    assert "pip install trackio" in message and not (tmp_path / "run/metrics.jsonl").exists()


@pytest.fixture
def quiet():
    """Let optional packages warn: they are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_a_local_mlflow(quiet, monkeypatch, tmp_path):
    mlflow: types.ModuleType = pytest.importorskip("mlflow", exc_type=ImportError)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    out = tmp_path / "run"
    out.mkdir()
    assert log_two_steps(out, "mlflow", config={"crossbatch": {"seed": 3}}) == []
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED" and run.data.params == {"crossbatch.seed": "3"}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")][-1] == (2, 2.25)
    assert {m.step for m in client.get_metric_history(run.info.run_id, "knn_top1")} == {1, 2}
    assert run.data.metrics["loss_by_lr/0.1"] == 2.5
    for outcome, status in (("stopped", "KILLED"), ("failed", "FAILED")):
        log = RunLog(out, 2, 4, ["mlflow"], {})
        getattr(log, outcome)(*(("SIGTERM", 2) if outcome == "stopped" else ()))
        log.close()
        assert client.get_run(run.info.run_id).info.status == status


def test_where_mlflow_cannot_write_is_refused_before_training(quiet, monkeypatch, tmp_path):
    mlflow: types.ModuleType = pytest.importorskip("mlflow", exc_type=ImportError)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")  # a server may come back
    trackers.check_trackers(["mlflow"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    if tuple(map(int, mlflow.__version__.split(".")[:2])) < (3, 17):
        pytest.skip("this version of MLflow writes to folders")
    with pytest.raises(InputError, match=r"crossbatch.log.to: mlflow cannot write to file:.*sqlite:///mlflow.db"):
        trackers.check_trackers(["mlflow"])
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    trackers.check_trackers(["mlflow"])


def test_wandb_offline(quiet, monkeypatch, tmp_path):
    pytest.importorskip("wandb", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert log_two_steps(tmp_path, "wandb") == []
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    number = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    assert runs and all(run.name.endswith(number) for run in runs)
    content = b"".join(file.read_bytes() for run in runs for file in run.glob("*.wandb"))
    assert b"knn_top1" in content and b"loss_by_lr/0.1" in content
    with mock.patch.object(RunLog, "warn") as warned:  # what wandb's service does with it shows online only
        log = RunLog(tmp_path, 2, 4, ["wandb"], {})
        log.stopped("SIGTERM", 3)
        log.close()
    warned.assert_not_called()


@pytest.mark.parametrize(
    ("outcome", "calls"),
    [
        ("finished", [mock.call.finish(exit_code=0)]),
        ("stopped", [mock.call.mark_preempting(), mock.call.finish(exit_code=1)]),  # "preempted" on the server
        ("failed", [mock.call.finish(exit_code=1)]),
    ],
)
def test_wandb_is_told_how_a_run_ended(outcome, calls):
    tracker = trackers._Wandb()
    tracker.run = mock.Mock()
    tracker.close(outcome)
    assert tracker.run.mock_calls == calls


def test_trackio_on_disk(quiet, monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    storage = pytest.importorskip("trackio.sqlite_storage", exc_type=ImportError).SQLiteStorage
    out = tmp_path / "run"
    out.mkdir()
    assert log_two_steps(out, "trackio") == []
    name = json.loads((out / "trackers.json").read_text())["trackio"]
    assert storage.get_runs("crossbatch") == [name] and name.startswith("run-")
    rows = storage.get_logs("crossbatch", name)
    assert [row["step"] for row in rows] == [1, 1, 2, 2]
    assert rows[-1]["knn_top1"] == 25.0 and rows[-1]["loss"] == 2.25 and rows[0]["loss_by_lr/0.1"] == 2.5
