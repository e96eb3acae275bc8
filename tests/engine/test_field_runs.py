"""A run directory has one writer, ranks meet or say why not, an evaluation can be left, and odd weights are refused."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from crossbatch import InputError, RunStopped
from crossbatch.data.worker_batches import EvaluationDataset
from crossbatch.engine import checkpoint
from crossbatch.engine.config import load_config
from crossbatch.engine.evaluation.monitor import FeatureMonitor
from crossbatch.engine.pretrained.load import load_pretrained
from crossbatch.engine.runtime import run_lock
from crossbatch.engine.runtime.distributed import process_group
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.engine.runtime.run_lock import locked
from crossbatch.engine.runtime.world import World, world_from_environment
from crossbatch.launch import pretrain
from crossbatch.models import build_backbone
from tests.small_runs import LARS, RESNET, VIT, fsdp, run

# --- the lock ----------------------------------------------------------------------------------------------------------


def hold(out: str, ready) -> None:
    with locked(Path(out)):
        ready.set()
        time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(str(tmp_path / "run"), ready))
    process.start()
    assert ready.wait(60)
    yield process
    process.kill()
    process.join()


def test_field_a_second_writer_is_refused_until_the_first_is_gone(tmp_path, holder):
    out = tmp_path / "run"
    with (
        pytest.raises(InputError, match=f"process {holder.pid} on {socket.gethostname()} is writing into it"),
        locked(out),
    ):
        pass
    holder.kill()
    holder.join()
    with locked(out):  # the kernel has given it up; what the file says counts only for other hosts
        (out / "result").touch()
    assert [path.name for path in out.iterdir()] == ["result"]


def test_field_a_lock_leaves_nothing_where_nothing_was_written(tmp_path):
    with pytest.raises(InputError, match="bad data"), locked(tmp_path / "run"):
        raise InputError("bad data")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lives", [True, False])
@pytest.mark.parametrize("has_locks", [True, False])
def test_field_a_run_on_another_host(monkeypatch, tmp_path, lives, has_locks):
    """Where the kernel sees no lock (NFS with nolock, or no locks at all), a run that touches its file is alive."""
    monkeypatch.setattr(run_lock, "WATCH_S", 0.4)
    if not has_locks:
        monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks")))
    file = tmp_path / ".lock"
    file.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    if lives:
        monkeypatch.setattr(time, "sleep", lambda _: os.utime(file, ns=(0, time.monotonic_ns())))
        with pytest.raises(InputError, match="process 7 on elsewhere is writing into it"), locked(tmp_path):
            pass
    else:
        with locked(tmp_path):
            assert json.loads(file.read_text())["pid"] == os.getpid()


def test_field_a_lock_is_touched_for_as_long_as_it_is_held(monkeypatch, tmp_path):
    """Which is all that other hosts see of it where the kernel's lock does not reach them."""
    monkeypatch.setattr(run_lock, "BEAT_S", 0.01)
    with locked(tmp_path):
        before, end = (tmp_path / ".lock").stat().st_mtime_ns, time.monotonic() + 30
        while (tmp_path / ".lock").stat().st_mtime_ns == before:
            assert time.monotonic() < end
            time.sleep(0.01)


# --- an evaluation that is left ----------------------------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch):
    """A process group of this process alone."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with process_group(World(0, 1, 0, 1), "cpu"):
        yield


def test_field_a_signal_during_an_evaluation(monkeypatch, tmp_path, alone):
    """The epoch is saved, the evaluation ends after the batch at hand, and the next start makes up for it."""
    read, done, sent, saved = EvaluationDataset.__getitem__, [], [], []
    out, knn = tmp_path / "run", ["crossbatch.evaluate.knn_every_epochs=1", "crossbatch.evaluate.knn_k=3"]

    def interrupted(dataset, key):
        if len(done) == 1 and not sent:  # the evaluation before the first step is done
            end = time.monotonic() + 20  # the save that was begun before the evaluation does not need its end
            while not checkpoint.candidates(out, "auto") and time.monotonic() < end:
                time.sleep(0.05)
            saved.extend(path.name for path in checkpoint.candidates(out, "auto"))
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return read(dataset, key)

    scores = FeatureMonitor.scores

    def counted(self, *arguments):
        found = scores(self, *arguments)
        done.append(found)
        return found

    monkeypatch.setattr(EvaluationDataset, "__getitem__", interrupted)
    monkeypatch.setattr(FeatureMonitor, "scores", counted)
    # 4 steps an epoch
    settings = [*VIT, *LARS, *fsdp(1), *knn, "crossbatch.data.path=synthetic://48?size=20&classes=4"]
    assert run([*settings, "crossbatch.checkpoint.every_steps=4"], str(out), 8) == "" and saved == ["step-00000004"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4] and len(done) == 1
    assert "knn_top1" not in lines[4] and "loss" in lines[4]
    assert [path.name for path in checkpoint.candidates(out, "auto")] == ["step-00000004"]
    assert json.loads((out / "stopped.json").read_text()) == {"signal": "SIGTERM", "step": 4}

    assert run([*settings, "crossbatch.checkpoint.every_steps=4"], str(out), 8) == ""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(9))
    assert [line["step"] for line in lines if "knn_top1" in line] == [0, 4, 8]
    assert all("loss" in line for line in lines[1:])


def test_field_one_image_at_once_in_a_small_resnet(tmp_path, alone):
    """At 16 px and a stride of 32, the last layers see one value of a channel."""
    settings = [*RESNET[1:], *LARS, *fsdp(1), "crossbatch.model.stem=imagenet", "train_micro_batch_size_per_gpu=1"]
    said = run(settings, str(tmp_path / "run"), 2)
    assert said.startswith("InputError: train_micro_batch_size_per_gpu: given 1: ") and "raise it" in said


# --- ranks that meet ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT are not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: given 'two' in the environment; allowed: a whole number >= 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: given '0'"),
        ({"WORLD_SIZE": "2", "RANK": "3"}, "RANK: given 3; allowed: 0 to 1, as WORLD_SIZE is 2"),
        ({"RANK": "-1"}, "RANK: given '-1'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK: given 'x'"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
            "MASTER_PORT: given 'http'",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500"},
            "no-such-host.invalid, where the ranks shall meet, is unknown here",
        ),
        ({"MASTER_ADDR": "no-such-host.invalid"}, ""),
    ],
    ids=str,
)
def test_field_what_the_environment_says_of_ranks(monkeypatch, environment, said):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def join() -> None:
        with process_group(world_from_environment(), "cpu", timeout_s=60):
            pass

    if not said:
        join()  # alone, it needs no address
        return
    with pytest.raises(InputError) as refused:
        join()
    assert said in str(refused.value)


@pytest.fixture
def taken_port():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.mark.long
def test_field_a_port_that_is_taken(monkeypatch, capfd, taken_port):
    """By a rank that a launcher has started, and by the released code's flags."""
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": taken_port}.items():
        monkeypatch.setenv(name, str(value))
    said = f"port {taken_port} is taken on this machine; give another with --master_port, or in --dist-url"
    with pytest.raises(InputError, match=said), process_group(World(0, 2, 0, 2), "cpu", timeout_s=60):
        pass
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name)
    where = f"--dist-url=tcp://127.0.0.1:{taken_port}"
    flags = ["--multiprocessing-distributed", "--world-size=2", "--rank=0", where, "--nproc-per-node=1"]
    monkeypatch.setattr("sys.argv", ["launch/pretrain.py", *flags])
    with pytest.raises(SystemExit) as stop:
        run_main(pretrain.main)
    assert stop.value.code == 2 and said in capfd.readouterr().err


def test_field_a_second_rank_that_never_comes(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    said = f"not all ranks came to 127.0.0.1:{port}: "
    with pytest.raises(RunStopped, match=said), process_group(World(0, 2, 0, 2), "cpu", timeout_s=2):
        pass


# --- configuration and weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            [f"crossbatch.seed={2**70}"],
            "crossbatch.seed: given 1180591620717411303424; allowed: a whole number below 2^63",
        ),
        ([f"train_batch_size={2**64}"], "train_batch_size: given 18446744073709551616"),
        (['optimizer={"type": ["LARS"], "params": {"momentum": 0.9}}'], "optimizer.type: given ['LARS']; allowed: "),
    ],
)
def test_field_values_of_keys_that_nothing_can_hold(given, said):
    with pytest.raises(InputError) as refused:
        load_config(None, given)
    assert said in str(refused.value)


SMALL_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}


def saved(tmp_path: Path, **changes: torch.Tensor | None) -> Path:
    """The file of a small ViT with some tensors replaced, or without them."""
    state = build_backbone("vit_small", 16, backbone_args=SMALL_VIT).state_dict()
    state.update(changes)
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "vit.pth")
    return tmp_path / "vit.pth"


WEIGHT = "blocks.0.attn.proj.weight"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {WEIGHT: torch.zeros(24, 24).to(torch.float8_e4m3fn)},
            f"tensors that are not plain floating-point numbers: 1 ({WEIGHT} is float8_e4m3fn)",
        ),
        ({WEIGHT: torch.zeros(24, 24, device="meta")}, f"({WEIGHT} is meta, without values)"),
        (
            {"pos_embed": torch.zeros(1, 16, 24), "cls_token": None},
            "has 16 positions (no square",
        ),
        (
            {"pos_embed": torch.zeros(1, 21, 24), "reg_token": torch.zeros(1, 4, 24)},
            "has 21 positions (register tokens)",
        ),
    ],
    ids=["float8", "meta", "no class token", "register tokens"],
)
def test_field_weights_that_are_of_another_kind(tmp_path, changes, said):
    file = saved(tmp_path, **changes)
    with pytest.raises(InputError) as refused:
        load_pretrained(file, "vit_small", backbone_args=SMALL_VIT, image_size=16)
    assert said in str(refused.value)
