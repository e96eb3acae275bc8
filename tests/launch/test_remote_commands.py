"""Every command that reads images does so from a web server, with the result that the same shards on a disk give."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch

from crossbatch.data import open_source, prepare
from crossbatch.data.sources.shard_writer import write_shards
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.models import build_backbone
from tests.served import Served
from tests.small_runs import ADAMW, BASE, RESNET, fsdp

pytest.importorskip("aiohttp", reason="aiohttp is not installed (the extra remote)")

SHAPE = ["--set=crossbatch.data.image_size=16", *(f"--set={setting}" for setting in (RESNET[0], RESNET[2]))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards for training and evaluation, and the weights of a small ResNet beside them."""
    folder = tmp_path_factory.mktemp("remote")
    path = f"shapes://{folder / 'images'}?train=40&val=24&size=24"
    prepare(path)
    for split, name in (("train", "train"), ("eval", "val")):
        write_shards(open_source(path, split), folder / "shards" / name, 16)
    weights = build_backbone("resnet18", 16, "small", backbone_args={"width": 8}).state_dict()
    torch.save(weights, folder / "weights.pth")
    return folder


@pytest.fixture(scope="module")
def url(folder):
    served = Served(folder / "shards")
    yield served.url
    served.stop()


def call(monkeypatch, command: str, *flags) -> None:
    monkeypatch.setattr(sys, "argv", [f"{command}.py", *map(str, flags)])
    run_main(importlib.import_module(f"crossbatch.launch.{command}").main)


def both(monkeypatch, folder, url, tmp_path, command: str, *flags) -> list:
    """Run a command on the disk and on the server, and return what `{out}` in its flags became."""
    outs = []
    for name, data in (("disk", folder / "shards"), ("server", url)):
        outs.append(tmp_path / name)
        call(monkeypatch, command, f"--data={data}", *(str(flag).replace("{out}", str(outs[-1])) for flag in flags))
    return outs


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("knn", ["--set=crossbatch.knn.k=[3]"]),
        pytest.param("linear", ["--epochs=2", "-b=8"], marks=pytest.mark.slow),
        pytest.param(
            "finetune",
            ["-b=8", "--epochs=1", "--warmup-epochs=0", "--drop-path=0", *(f"--set={one}" for one in fsdp(0))],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["knn", "linear", "finetune"],
)
def test_scores(monkeypatch, folder, url, tmp_path, command, flags):
    flags = [f"--checkpoint={folder / 'weights.pth'}", "-a=resnet18", *SHAPE, "-j=1", *flags, "--out={out}"]
    disk, server = both(monkeypatch, folder, url, tmp_path, command, *flags)
    scores = [json.loads((out / "results.json").read_text())["top1"] for out in (disk, server)]
    assert scores[0] == scores[1]


def test_features(monkeypatch, folder, url, tmp_path):
    flags = [f"--checkpoint={folder / 'weights.pth'}", "-a=resnet18", *SHAPE, "-j=1", "--output={out}.npy"]
    disk, server = both(monkeypatch, folder, url, tmp_path, "embed", *flags)
    features = [np.load(f"{out}.npy") for out in (disk, server)]
    assert features[0].shape[0] == 40 and np.array_equal(*features)
    assert disk.with_suffix(".csv").read_text() == server.with_suffix(".csv").read_text()


def test_pictures(monkeypatch, folder, url, tmp_path):
    disk, server = both(
        monkeypatch, folder, url, tmp_path, "preview", "--count=3", "--image-size=16", "--output={out}.png"
    )
    assert disk.with_suffix(".png").read_bytes() == server.with_suffix(".png").read_bytes()


def test_shards(monkeypatch, folder, url, tmp_path):
    def shards(data, name):
        call(monkeypatch, "convert", "shards", f"--data={data}", f"--output={tmp_path / name}")
        return {file.name: file.read_bytes() for file in (tmp_path / name).rglob("*.tar")}

    assert shards(folder / "shards", "disk") == shards(url, "server")


@pytest.mark.slow
def test_plans(monkeypatch, capsys, folder, url):
    settings = [f"--set={one}" for one in (*BASE, *RESNET, *ADAMW) if not one.startswith("crossbatch.data.path")]
    said = []
    for data in (folder / "shards", url):
        call(monkeypatch, "plan", "--gpus=1", "--gpu=h100-80g", f"--data={data}", *settings)
        said.append(capsys.readouterr().out.replace(str(data), "DATA"))
    assert said[0] == said[1]
