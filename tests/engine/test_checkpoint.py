"""What is found, what is refused, and what a crash leaves (exact resume is in test_equivalence.py)."""

import json
from pathlib import Path

import pytest
import torch

from crossbatch import InputError
from crossbatch.engine import checkpoint
from crossbatch.engine.telemetry import RunLog


def complete(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.pt").touch()
    (folder / "config.json").touch()
    return folder


def test_auto_takes_the_newest_complete_one(tmp_path):
    assert checkpoint.find(tmp_path, "auto") is None
    newest = complete(tmp_path, 20)
    complete(tmp_path, 3)
    (tmp_path / "checkpoints" / ".step-00000030.tmp").mkdir()  # a crash while writing
    (complete(tmp_path, 40) / "state.pt").unlink()
    assert checkpoint.find(tmp_path, "auto") == newest
    assert checkpoint.find(tmp_path / "new", str(tmp_path)) == newest
    assert checkpoint.find(tmp_path / "new", str(newest)) == newest


def test_none_does_not_overwrite_a_run(tmp_path):
    assert checkpoint.find(tmp_path, "none") is None
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="already holds a run"):
        checkpoint.find(tmp_path, "none")


def test_a_path_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such path"):
        checkpoint.find(tmp_path, str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no checkpoint in it"):
        checkpoint.find(tmp_path, str(tmp_path))


def test_an_unreadable_or_dangerous_file_is_refused(tmp_path):
    for content in (b"not a checkpoint", None):
        folder = complete(tmp_path / str(content), 1)
        if content is None:
            torch.save({"parameters": Path}, folder / "state.pt")  # a pickled class, which weights_only refuses
        else:
            (folder / "state.pt").write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as a checkpoint"):
            checkpoint.load(folder, None)  # pyright: ignore[reportArgumentType]


def test_a_crash_between_writing_and_renaming_leaves_the_old_text(tmp_path, monkeypatch):
    target = tmp_path / "latest"
    checkpoint.write_atomically(target, "old")
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(target, "new")
    assert target.read_text() == "old"


def test_metrics_after_the_checkpoint_and_torn_lines_are_dropped_on_resume(tmp_path):
    lines = [json.dumps({"step": step, "loss": float(step)}) for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')
    RunLog(tmp_path, first_step=2, last_step=10).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:2]
