"""legacy_launch.py: the originals' command lines, what each flag starts, and what is refused because it would do nothing."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from crossbatch.launch import pretrain
from crossbatch.launch.legacy_launch import add_legacy_launch_flags, launched
from tests.commands import caller

TINY = ["-b", "16", "--epochs", "1", "-p", "1", "-j", "0", "--set", "crossbatch.data.image_size=16"]
ONE_CHUNK = ["--set", "train_micro_batch_size_per_gpu=8", "--set", "crossbatch.evaluate.knn_every_epochs=0"]
# Neither DeepSpeed nor, for OpenCV's colours, numba, which ranks of their own would import anew.
ONE_CHUNK += ["--set", "crossbatch.sharding=fsdp", "--set", "crossbatch.data.backend=torchvision"]
NET = [
    *(
        "--moco-dim",
        "16",
        "--moco-mlp-dim",
        "32",
        "--warmup-epochs",
        "0",
        "--set",
        "crossbatch.batchformer.group_size=8",
    ),
    *("--set", 'crossbatch.model.backbone_args={"width": 8}'),
]
DATA = "synthetic://32?size=20&classes=4"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launcher has started these tests, and what they put into the environment goes again."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != "RANK"})


call = caller(pretrain)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(*command: str) -> subprocess.Popen:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, nursery) -> tuple[Path, list[int], list[str]]:
    """Two nodes are two commands on this machine; returns --out, and exit code and output of each.

    BatchFormer's README has the line, without TINY, NET, ONE_CHUNK and --out.
    """
    out, logs = tmp_path_factory.mktemp("pretrained"), tmp_path_factory.mktemp("logs")
    line = f"--moco-m-cos --crop-min=.2 --dist-url tcp://localhost:{free_port()} --multiprocessing-distributed --world-size 2"
    flags = [*line.split(), "--add_bf", "1", *TINY, *NET, *ONE_CHUNK, "--out", str(out), DATA]
    nodes = [nursery.start(logs / rank, 1, "--rank", rank, *flags, ALONE="1") for rank in ("0", "1")]
    return out, [node.wait()[0] for node in nodes], [node.output() for node in nodes]


@pytest.mark.long
def test_the_pretraining_command_line_on_two_nodes(pretrained):
    out, codes, said = pretrained
    assert codes == [0, 0], "\n".join(said)
    config = json.loads((out / "config.json").read_text())
    assert (config["world_size"], config["train_batch_size"]) == (2, 16)
    ours = config["crossbatch"]
    assert (ours["model"]["arch"], ours["batchformer"]["loss"], ours["data"]["crop_min"]) == ("resnet50", "sum", 0.2)
    assert ours["momentum"]["cosine"] is True
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert len(losses) == 2
    assert ["next:" in text for text in said] == [True, False]  # one summary, on the node of rank 0


@pytest.mark.long
def test_the_linear_command_line(pretrained, nursery, tmp_path):
    """MoCo v3's README has the line, without TINY and --out."""
    line = f"-a resnet50 --dist-url tcp://localhost:{free_port()} --multiprocessing-distributed --world-size 1 --rank 0"
    out, weights = ["--out", str(tmp_path / "out")], ["--pretrained", str(pretrained[0])]
    node = nursery.start(tmp_path, 1, *line.split(), *weights, *TINY, *out, DATA, COMMAND="linear", ALONE="1")
    assert node.wait() == [0], node.output()
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["images"]["train"] == 32 and 0 <= results["top1"] <= 100


LAUNCHER = """
import os, sys, time
from pathlib import Path

if "RANK" in os.environ:
    line = " ".join([os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"], *sys.argv[1:]])
    Path(__file__).with_name("rank" + os.environ["RANK"]).write_text(line)  # a pipe would mix both ranks' words
    if os.environ["RANK"] == "0":
        time.sleep(60)
    time.sleep(1)
    os._exit(3)
import argparse
from crossbatch.launch.legacy_launch import add_legacy_launch_flags, launched

parser = argparse.ArgumentParser()
add_legacy_launch_flags(parser)
parser.add_argument("-j", type=int, dest="crossbatch.data.workers")
launched(parser.parse_args())
"""


def test_ranks_of_one_node_and_their_exit_code(tmp_path):
    """Each rank gets the command line, and its part of the node's loader processes; the first that fails ends the others."""
    (tmp_path / "script.py").write_text(LAUNCHER)
    line = ["--multiprocessing-distributed", "--world-size", "1", "--rank", "0", "--nproc-per-node", "2", "-j", "5"]
    launcher = start(str(tmp_path / "script.py"), *line)
    said = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 3, said
    workers = ["--set", "crossbatch.data.workers=3"]
    for rank in ("0", "1"):
        assert (tmp_path / f"rank{rank}").read_text() == " ".join([rank, "2", *workers, *line])


LISTENERS = LAUNCHER.replace(
    """    if os.environ["RANK"] == "0":
        time.sleep(60)
    time.sleep(1)
    os._exit(3)
""",
    """    import signal
    heard = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: heard.append(signal.Signals(number).name))
    print("ready", flush=True)
    while len(heard) < 4:
        time.sleep(0.05)
    time.sleep(1)  # saves
    Path(__file__).with_name("rank" + os.environ["RANK"]).write_text(" ".join(heard))
    os._exit(0)
""",
)


@pytest.mark.long
def test_signals_to_the_command_reach_its_ranks_and_it_waits_for_them(tmp_path):
    (tmp_path / "script.py").write_text(LISTENERS)
    line = ["--multiprocessing-distributed", "--world-size", "1", "--rank", "0", "--nproc-per-node", "2"]
    launcher = start(str(tmp_path / "script.py"), *line)
    assert launcher.stdout is not None
    for _ in range(2):
        assert "ready" in launcher.stdout.readline()
    names = ["SIGUSR1", "SIGTERM", "SIGHUP", "SIGINT"]
    for name in names:
        launcher.send_signal(signal.Signals[name])
        time.sleep(0.5)
    said = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 0, said
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == [" ".join(names)] * 2


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_legacy_launch_flags(parser)
    return parser.parse_args(arguments)


def test_a_rank_by_hand():
    assert not launched(parse("--world-size", "4", "--rank", "2", "--dist-url", "tcp://[::1]:29500"))
    is_so = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")}
    assert is_so == {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "::1", "MASTER_PORT": "29500", "LOCAL_RANK": "0"}


def test_one_gpu_of_several(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert not launched(parse("--gpu", "5"))
    assert os.environ["LOCAL_RANK"] == "5" and "RANK" not in os.environ


@pytest.mark.parametrize("flags", [[], ["--world-size", "-1", "--rank", "-1"], ["--start-epoch", "0"]])
def test_flags_that_ask_for_nothing(flags):
    before = dict(os.environ)
    assert not launched(parse(*flags)) and os.environ == before


def test_flags_that_say_what_is_so(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setitem(os.environ, name, value)
    assert not launched(parse("--world-size", "-1", "--dist-url", "env://", "--dist-backend", "gloo"))


NODES = ["--multiprocessing-distributed", "--dist-url", "tcp://node0:29500"]


@pytest.mark.parametrize(
    ("flags", "gpus", "ranks"),
    [
        ([*NODES, "--world-size", "2", "--rank", "1"], 0, 2),
        ([*NODES, "--world-size", "2", "--rank", "1"], 8, 16),
        ([*NODES, "--world-size", "2", "--rank", "0", "--nproc-per-node", "4"], 8, 8),
        (["--multiprocessing-distributed"], 4, 4),
        (["--world-size", "8", "--rank", "3", "--dist-url", "tcp://node0:29500"], 0, 8),
    ],
)
def test_a_dry_run_counts_them(monkeypatch, capsys, flags, gpus, ranks):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # it may ask `device_count`
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # nor is it a GPU that torch fails to see
    assert call(monkeypatch, "--dry-run", "-b", "32", *flags) == 0
    assert json.loads(capsys.readouterr().out)["world_size"] == ranks


BAD = [
    ([*NODES, "--world-size", "2"], 0, "--rank: given nothing; allowed: 0 to 1"),
    ([*NODES, "--world-size", "2", "--rank", "2"], 0, "--rank: given 2; allowed: 0 to 1"),
    ([*NODES, "--world-size", "0"], 0, "--world-size: given 0; allowed: >= 1, the number of nodes"),
    ([*NODES, "--gpu", "0"], 4, "--gpu: given 0; allowed: the number of one of this machine's 4 GPUs, without"),
    ([*NODES, "--nproc-per-node", "0"], 0, "--nproc_per_node: given 0; allowed: a whole number >= 1"),
    (["--nproc-per-node", "2"], 0, "without --multiprocessing-distributed"),
    (
        [*NODES[:1], "--world-size", "2", "--rank", "0"],
        0,
        "--dist-url: given nothing for 2 nodes; allowed: tcp://HOST:PORT",
    ),
    ([*NODES[:2], "tcp://[HOST]:[PORT]"], 0, "--dist-url: given tcp://[HOST]:[PORT]"),
    ([*NODES[:2], "file:///shared/x"], 0, "--dist-url: given file:///shared/x"),
    ([*NODES[:2], "env://"], 0, "--dist-url: given env://"),
    (NODES[1:], 0, "--dist-url: given tcp://node0:29500 for 1 ranks; allowed: tcp://HOST:PORT"),
    (["--rank", "1"], 0, "--rank: given 1; allowed: 0 to 0, as --world-size is 1 (ranks)"),
    (["--gpu", "0"], 0, "--gpu: given 0; allowed: the number of one of this machine's 0 GPUs"),
    (["--gpu", "2"], 2, "--gpu: given 2; allowed: the number of one of this machine's 2 GPUs"),
    (["--dist-backend", "nccl"], 0, "--dist-backend: given nccl; allowed here: gloo; leave it out"),
    (
        ["--start-epoch", "3"],
        0,
        "--start-epoch: given 3; allowed: 0; leave it out: a run continues from its checkpoint (see --resume)",
    ),
    (["--evaluate"], 0, "--evaluate: does nothing by itself; launch/linear.py with the --out of a finished probe"),
    (["--resume", "setup.py"], 0, "--resume: setup.py is a file"),
    (["--moco-t", "0", *NODES], 0, "crossbatch.model.temperature"),  # before anything is started
]


@pytest.mark.parametrize(("flags", "gpus", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input_gets_one_message_and_exit_code_2(monkeypatch, capsys, tmp_path, flags, gpus, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert call(monkeypatch, "--out", tmp_path / "run", *flags) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.long
def test_resume_with_nothing_starts_anew(monkeypatch, capsys, tmp_path):
    """As `--resume none` does, which does not write over a run."""
    (tmp_path / "metrics.jsonl").touch()
    assert call(monkeypatch, "--resume", "", "--out", tmp_path, *TINY, *NET, "--set", "train_batch_size=8", DATA) == 2
    assert "--resume none" in capsys.readouterr().err


BESIDE = {
    "--multiprocessing-distributed": [],
    "--world-size": ["3"],
    "--rank": ["0"],
    "--gpu": ["0"],
    "--nproc-per-node": ["2"],
    "--dist-url": ["tcp://node0:29500"],
}


@pytest.mark.parametrize(("flag", "value"), BESIDE.items(), ids=BESIDE)
def test_beside_another_launcher(monkeypatch, flag, value):
    for name, so in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setitem(os.environ, name, so)
    with pytest.raises(
        ValueError, match=f"{flag}: given, but a launcher has started this process as rank 1 of 2; leave"
    ):
        launched(parse(flag, *value))
