"""Runs whose reader, terminal, disk or other half is gone: nothing that was computed gets lost, and all of them end."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossbatch.data import workers
from crossbatch.data.worker_batches import EvaluationDataset
from crossbatch.engine import checkpoint
from crossbatch.engine.evaluation import knn_evaluation, results
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.launch import finetune, knn, linear
from crossbatch.launch.__main__ import COMMANDS
from crossbatch.models import build_backbone
from tests.jobs import metrics
from tests.small_runs import BASE, LARS, RESNET, VIT, fsdp

ROOT = Path(__file__).parents[2]


def flags(out: Path, *settings: str) -> list[str]:
    """Flags of a run that goes on for longer than any test."""
    endless = ["crossbatch.schedule.epochs=5000", "crossbatch.checkpoint.every_steps=100000"]
    return [f"--out={out}", *(f"--set={setting}" for setting in (*BASE, *VIT, *LARS, *fsdp(1), *endless, *settings))]


def wait_for_steps(out: Path, steps: int) -> None:
    end = time.monotonic() + 300
    while not (out / "metrics.jsonl").exists() or len(metrics(out)) < steps:
        assert time.monotonic() < end
        time.sleep(0.05)


def assert_saved_by(out: Path, number: signal.Signals) -> None:
    last = metrics(out)[-1]["step"]
    assert checkpoint.candidates(out, "auto")[0].name == f"step-{last:08d}"
    assert json.loads((out / "stopped.json").read_text()) == {"signal": number.name, "step": last}


# --- output that goes nowhere, signals, two runs in one folder ---------------------------------------------------------


def test_field_a_reader_that_leaves_then_ctrl_c_and_a_second_run_meanwhile(tmp_path, nursery):
    """As `pretrain.py | tee log`, with a Ctrl-C that ends tee, too; then as `| head`. The lock survives a SIGKILL."""
    out, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    job = nursery.start(tmp_path / "logs", 1, *flags(out), STDOUT=str(pipe))
    with pipe.open() as reader:
        reader.readline()
    wait_for_steps(out, 3)
    second = nursery.start(tmp_path / "second", 1, *flags(out))
    assert second.wait() == [2]
    assert f"error: --out {out}: process {job.pids[0]} on " in second.output()
    seen = len(metrics(out))
    wait_for_steps(out, seen + 2)
    job.kill(signal.SIGINT)
    assert job.wait() == [0] and job.output() == ""
    assert_saved_by(out, signal.SIGINT)
    assert not (out / ".lock").exists()


@pytest.mark.long
def test_field_a_full_stdout_and_a_closed_terminal(tmp_path, nursery):
    out = tmp_path / "run"
    job = nursery.start(tmp_path / "logs", 1, *flags(out), STDOUT="/dev/full")
    wait_for_steps(out, 2)
    job.kill(signal.SIGKILL)
    job.wait()
    (out / "metrics.jsonl").unlink()
    job = nursery.start(tmp_path / "logs", 1, *flags(out), STDOUT="/dev/full")  # the lock is gone with the first
    wait_for_steps(out, 2)
    job.kill(signal.SIGHUP)
    assert job.wait() == [0], job.output()
    assert_saved_by(out, signal.SIGHUP)


SLOW_TORCH = "import time; print('importing', flush=True); time.sleep(60)"


def test_field_ctrl_c_during_the_imports_of_every_command(tmp_path):
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    for command in COMMANDS:
        process = subprocess.Popen(
            [sys.executable, f"launch/{command}.py"],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert (process.communicate(timeout=60)[1], process.returncode) == (
            "stopped: interrupted before it began\n",
            3,
        )


@pytest.mark.long
def test_field_a_result_that_is_printed_on_a_full_disk(tmp_path):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "launch/doctor.py"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300
        )
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "stopped (rank 0): standard output cannot be written: No space left on device" in done.stderr


# --- images that do not come -------------------------------------------------------------------------------------------


def images(root: Path, *classes: str) -> Path:
    """Writes three images of each class for training and for evaluation."""
    for split in ("train", "val"):
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for image in range(3):
                pixels = np.random.default_rng([number, image]).integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels // 4 + 48 * number).save(root / split / name / f"{image}.png")
    return root


@pytest.fixture
def stuck_data(tmp_path) -> Path:
    """A class folder with a named pipe among the images: reading it waits for ever, as on a disk that does not answer."""
    root = images(tmp_path / "data", "a", "b", "c", "d")
    os.mkfifo(root / "train/b/pipe.jpg")
    return root


def wait_for_reader(pipe: Path) -> int:
    """Waits until somebody reads `pipe`; returns a descriptor that keeps that reader waiting."""
    end = time.monotonic() + 300
    while True:
        with contextlib.suppress(OSError):
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.long
def test_field_sigterm_while_no_images_come(tmp_path, nursery, stuck_data):
    """The batch of 12 out of 13 images: soon the pipe is among them."""
    out = tmp_path / "run"
    data = [f"crossbatch.data.path={stuck_data}", "crossbatch.data.workers=1"]
    job = nursery.start(tmp_path / "logs", 1, *flags(out, *data))
    writer = wait_for_reader(stuck_data / "train/b/pipe.jpg")
    time.sleep(1)  # until the steps are done whose images have come
    job.kill(signal.SIGTERM)
    sent = time.monotonic()
    assert job.wait() == [0], job.output()
    assert time.monotonic() - sent < 60
    assert json.loads((out / "stopped.json").read_text())["signal"] == "SIGTERM"
    os.close(writer)


@pytest.mark.long
def test_field_no_images_for_longer_than_the_limit(tmp_path, nursery, stuck_data):
    data = [f"crossbatch.data.path={stuck_data}", "crossbatch.watch.timeout_s=6"]
    job = nursery.start(tmp_path / "logs", 1, *flags(tmp_path / "run", *data))
    writer = wait_for_reader(stuck_data / "train/b/pipe.jpg")
    assert job.wait() == [3], job.output()
    assert "stopped (rank 0): crossbatch.data: no images from " in job.output() and "came for 3 s" in job.output()
    assert "Traceback" not in job.output()
    os.close(writer)


@pytest.mark.parametrize("command", ["knn", pytest.param("linear", marks=pytest.mark.slow)])
def test_field_ctrl_c_in_an_evaluation_while_no_images_come(tmp_path, nursery, stuck_data, weights, command):
    size = "--set=crossbatch.data.image_size=16"
    flags = [*weights, f"--data={stuck_data}", f"--out={tmp_path / 'out'}", "-j=0", size, "-b=2"]
    job = nursery.start(tmp_path / "logs", 1, *flags, COMMAND=command)
    writer = wait_for_reader(stuck_data / "train/b/pipe.jpg")
    job.kill(signal.SIGINT)
    assert job.wait(within=60) == [3] and "Traceback" not in job.output(), job.output()
    assert "stopped (rank 0): interrupted; what was saved before is good: repeat the command" in job.output()
    os.close(writer)


# --- evaluations -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[str]:
    """Flags of a small ResNet in a file."""
    file = tmp_path_factory.mktemp("weights") / "resnet.pth"
    torch.save(build_backbone("resnet18", 16, "small", backbone_args={"width": 8}).state_dict(), file)
    return [f"--checkpoint={file}", "-a=resnet18", *(f"--set={setting}" for setting in (RESNET[0], RESNET[2]))]


def call(monkeypatch, main, *arguments) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    try:
        run_main(main)
    except SystemExit as stop:
        return stop.code
    return 0


def killed_as_by_the_kernel(dataset, key):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "command",
    [knn, *(pytest.param(command, marks=pytest.mark.slow) for command in (linear, finetune))],
    ids=lambda command: command.__name__.split(".")[-1],
)
def test_field_a_killed_worker_ends_an_evaluation_with_a_message(monkeypatch, capsys, tmp_path, weights, command):
    monkeypatch.setattr(workers, "start_method", lambda: "fork")
    monkeypatch.setattr(EvaluationDataset, "__getitem__", killed_as_by_the_kernel)
    data = images(tmp_path / "data", "a", "b")
    more = ["--set=crossbatch.data.image_size=16", "-j=1"]
    if command is finetune:
        more += ["-b=2", "--epochs=1", "--warmup-epochs=0", "--set=crossbatch.data.repeats=1", "--drop-path=0"]
        more += [f"--set={setting}" for setting in fsdp(0)]
    if command is linear:
        more += ["-b=2"]
    assert call(monkeypatch, command.main, *weights, f"--data={data}", f"--out={tmp_path / 'out'}", *more) == 3
    said = capsys.readouterr().err
    assert "was killed, as the kernel does when memory runs out; use fewer workers than 1" in said
    assert "Traceback" not in said


@pytest.mark.long
def test_field_names_that_are_no_utf8_no_markup_and_no_formula(tmp_path, nursery, weights):
    """Class names, the name of a broken image, and --out; the process that prints them is a real one."""
    names = ["$100_$50", r"$\frac{", os.fsdecode(b"caf\xe9"), "[/b]"]
    data = images(tmp_path / "data", *names)
    (data / "val" / names[2] / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
    out = tmp_path / "x" / "[" / "exp1]"
    job = nursery.start(
        tmp_path / "logs",
        1,
        *weights,
        f"--data={data}",
        f"--out={out}",
        "-j=0",
        "--set=crossbatch.data.image_size=16",
        COMMAND="knn",
    )
    assert job.wait() == [0], job.output()
    assert r"skipped a broken image: caf\udce9/\udcff.png" in job.output()
    assert str(out / "results.json") in "".join(line.strip("│ ") for line in job.output().splitlines())
    assert "warning" not in job.output()
    assert {"results.json", "confusion.png", "neighbours.png"} <= {path.name for path in out.iterdir()}


def test_field_a_picture_that_fails_loses_nothing(monkeypatch, capsys, tmp_path, weights):
    def failing(*_):
        raise RuntimeError("no such font")

    monkeypatch.setattr(knn_evaluation, "confusion_matrix", failing)
    data = images(tmp_path / "data", "a", "b")
    more = ["-j=0", "--set=crossbatch.data.image_size=16"]
    assert call(monkeypatch, knn.main, *weights, f"--data={data}", f"--out={tmp_path / 'out'}", *more) == 0
    said = capsys.readouterr()
    assert "warning: confusion.png is left out: RuntimeError: no such font" in said.err and "top-1, k = " in said.out
    assert (tmp_path / "out/results.json").exists() and (tmp_path / "out/neighbours.png").exists()


def test_field_results_that_find_no_room_are_told(monkeypatch, capsys, tmp_path, weights):
    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(results, "write_atomically", full)
    data = images(tmp_path / "data", "a", "b")
    more = ["-j=0", "--set=crossbatch.data.image_size=16"]
    assert call(monkeypatch, knn.main, *weights, f"--data={data}", f"--out={tmp_path / 'out'}", *more) == 3
    said = capsys.readouterr()
    assert "stopped (rank 0): top-1 is " in said.err and "No space left on device" in said.err
    assert "top-1, k = " in said.out and "Traceback" not in said.err


# --- a disk that is full from the start --------------------------------------------------------------------------------


def test_field_a_disk_that_is_full_at_the_start(tmp_path, nursery):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        with contextlib.suppress(OSError), (disk / "else").open("wb", buffering=0) as fill:
            while fill.write(bytes(4096)):
                pass
        job = nursery.start(tmp_path / "logs", 1, *flags(disk / "run"))
        assert job.wait() == [3], job.output()
        assert "No space left on device" in job.output() and "Traceback" not in job.output()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
