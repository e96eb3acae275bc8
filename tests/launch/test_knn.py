"""launch/knn.py: from a run to numbers and pictures, the same on two ranks, and what it refuses."""

import io
import json
import multiprocessing
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from crossbatch.data import open_source, prepare
from crossbatch.engine.config import load_config
from crossbatch.engine.config.evaluation import KnnConfig
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.launch import knn
from tests.commands import caller


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> str:
    path = f"shapes://{tmp_path_factory.mktemp('knn') / 'images'}?train=64&val=24&size=16"
    prepare(path)
    return path


call = caller(knn)


def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def vary(picture: Path) -> None:
    """Check that a picture shows something."""
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(float)
    assert pixels.shape[0] > 200 and pixels.std() > 20


def test_a_run_is_scored(monkeypatch, capsys, tiny_runs, shapes, tmp_path):
    out = tmp_path / "knn"
    arguments = ["--checkpoint", tiny_runs("resnet"), "--data", shapes, "--out", out, "-j", 0]
    assert call(monkeypatch, *arguments, "--set=crossbatch.knn.k=[5,1,200]") == 0
    said = capsys.readouterr().out
    assert "120 tensors loaded, none missing" in said and "next:" in said and "launch/linear.py" in said
    assert "training: 64 images, 8 classes in train/\nevaluation: 24 images, 8 classes in val/\n" in said
    results = results_of(out)
    assert results["notes"] == ["crossbatch.knn.k: 200, but there are 64 training images; all of them vote"]
    assert results["notes"][0] in said
    assert results["command"] == "knn" and results["k"] == 5 and list(results["top1_by_k"]) == ["5", "1", "200"]
    assert results["top1"] == results["top1_by_k"]["5"]
    assert results["images"] == {"train": 64, "evaluation": 24, "skipped": 0} and results["classes"] == 8
    assert results["pretrained"]["arch"] == "resnet18" and results["pretrained"]["tensors"] == 120
    assert results["config"]["crossbatch"]["model"]["checkpoint"] == str(tiny_runs("resnet"))
    for name in ("neighbours.png", "confusion.png"):
        vary(out / name)
    events = EventAccumulator(str(out)).Reload()
    assert sorted(events.Tags()["images"]) == ["confusion", "neighbours"]
    assert results["top1"] == pytest.approx(by_scikit_learn(tiny_runs("resnet"), shapes, 5))
    assert call(monkeypatch, *arguments, "--encoder", "momentum") == 0  # over its own results it may write
    assert "momentum encoder" in results_of(out)["pretrained"]["from"]


def train_here(settings: list[str], out: str) -> tuple[str, int]:
    """Train two steps on this rank; return why that stopped, and how many processes it has left."""
    from tests.small_runs import run

    # Not by a fork server of its own, which would import torch again.
    with mock.patch("crossbatch.data.workers.start_method", lambda: "fork"):
        return run(settings, out, 2), len(multiprocessing.active_children())


@pytest.mark.long
@pytest.mark.usefixtures("no_figures")
def test_a_checkpoint_scores_as_it_did_in_training(monkeypatch, shapes, one_rank, tmp_path):
    from tests.small_runs import LARS, RESNET

    evaluate = ["crossbatch.evaluate.knn_every_epochs=1", "crossbatch.evaluate.knn_k=5", "crossbatch.data.workers=1"]
    settings = [*RESNET, *LARS, f"crossbatch.data.path={shapes}", *evaluate]
    assert one_rank.run(train_here, settings, str(tmp_path / "run")) == [("", 0)]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scores = [line["knn_top1"] for line in lines if "knn_top1" in line]
    assert len(scores) == 2  # before the first step, and now
    arguments = ["--checkpoint", tmp_path / "run", "--data", shapes, "--out", tmp_path / "knn", "-j", 0]
    assert call(monkeypatch, *arguments, "--set=crossbatch.knn.k=[5]") == 0
    assert results_of(tmp_path / "knn")["top1"] == scores[-1]


def test_a_figure_that_fails_does_not_lose_the_numbers(monkeypatch, tiny_runs, shapes, tmp_path):
    def fail(*arguments) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("crossbatch.engine.evaluation.evaluation.save_figures", fail)
    arguments = ["--checkpoint", tiny_runs("resnet"), "--data", shapes, "--out", tmp_path, "-j", 0]
    with pytest.raises(OSError, match="No space left"):
        call(monkeypatch, *arguments)
    assert results_of(tmp_path)["images"] == {"train": 64, "evaluation": 24, "skipped": 0}


@torch.no_grad()
def by_scikit_learn(checkpoint: Path, shapes: str, k: int) -> float:
    """Read, resize, normalise, embed and vote, written out."""
    from crossbatch.engine.pretrained.load import load_pretrained

    backbone = load_pretrained(checkpoint).backbone.eval()
    found = []
    for split in ("train", "eval"):
        source = open_source(shapes, split)
        pixels = (
            torch.stack([torch.from_numpy(np.array(source.open(i))) for i in range(len(source))]).movedim(-1, 1) / 255
        )
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        found.append((F.normalize(backbone((pixels - mean) / std), dim=1).double().numpy(), source.labels))
    classifier = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))  # pyright: ignore
    classifier.fit(*found[0])
    return 100 * classifier.score(*found[1])


def evaluate_on_this_rank(checkpoint: str, data: str, out: str) -> dict:
    from crossbatch.engine.evaluation.knn_evaluation import KnnEvaluation

    settings = [f"crossbatch.model.checkpoint={checkpoint}", f"crossbatch.data.path={data}"]
    config = load_config(None, [*settings, "train_micro_batch_size_per_gpu=7"], KnnConfig)
    return KnnEvaluation(config, world_from_environment(), torch.device("cpu"), 0, Path(out)).run()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.slow  # tests/engine/test_knn.py has the votes of two ranks
def test_two_ranks_find_the_same(monkeypatch, tiny_runs, two_ranks, shapes, tmp_path):
    alone = ["--checkpoint", tiny_runs("vit"), "--data", shapes, "--out", tmp_path / "alone", "-j", 0]
    assert call(monkeypatch, *alone) == 0
    want = results_of(tmp_path / "alone")
    both = two_ranks.run(evaluate_on_this_rank, str(tiny_runs("vit")), shapes, str(tmp_path / "both"))
    assert results_of(tmp_path / "both")["config"]["world_size"] == 2
    for results in (*both, results_of(tmp_path / "both")):
        assert {int(k): top1 for k, top1 in results["top1_by_k"].items()} == pytest.approx(
            {int(k): top1 for k, top1 in want["top1_by_k"].items()}
        )
        assert results["images"] == want["images"]


class Bomb:
    def __reduce__(self):
        return print, ("boom",)


def folder(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (number, 0, 0)).save(root / name)
    return root


def shards(root: Path, split: str, *labels: int) -> Path:
    (root / split).mkdir(parents=True)
    with tarfile.open(root / split / "0.tar", "w") as tar:
        for number, label in enumerate(labels):
            stream = io.BytesIO()
            Image.new("RGB", (9, 9)).save(stream, "PNG")
            for name, data in ((f"{number}.png", stream.getvalue()), (f"{number}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return root


@pytest.mark.usefixtures("no_figures")
def test_broken_images_are_named_and_left_out(monkeypatch, capsys, tiny_runs, tmp_path):
    prepare(f"shapes://{tmp_path / 'images'}?train=16&val=9&size=16")
    for name in ("train/star/00004.jpg", "val/disc/00002.jpg"):
        (tmp_path / "images" / name).write_bytes(b"")
    out = tmp_path / "out"
    arguments = ["--checkpoint", tiny_runs("resnet"), "--data", tmp_path / "images", "--out", out, "-j", 0]
    assert call(monkeypatch, *arguments) == 0
    said = capsys.readouterr().out
    assert "skipped a broken image: star/00004.jpg" in said and "skipped a broken image: disc/00002.jpg" in said
    assert results_of(out)["images"] == {"train": 15, "evaluation": 8, "skipped": 2}


def test_bad_input_gets_one_message_and_exit_code_2(monkeypatch, capsys, tiny_runs, shapes, tmp_path):
    good = {"--checkpoint": tiny_runs("resnet"), "--data": shapes, "--out": tmp_path / "out"}

    def refused(*flags, **change) -> str:
        arguments = {**good, **{f"--{name}": value for name, value in change.items()}}
        pairs = [str(part) for name, value in arguments.items() if value is not None for part in (name, value)]
        assert call(monkeypatch, *pairs, *flags) == 2
        said = capsys.readouterr()
        assert said.err.count("error: ") == 1 and "Traceback" not in said.err and "boom" not in said.out + said.err
        assert not (tmp_path / "out" / "results.json").exists()
        return said.err

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pth")
    torch.save({"a": torch.ones(100)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-200])
    assert "nothing of it was run" in refused(checkpoint=tmp_path / "bomb.pth")
    assert "cannot be read" in refused(checkpoint=tmp_path / "cut.pth")
    assert "holds a resnet18, but resnet50" in refused("-a", "resnet50")
    assert "--checkpoint" in refused(checkpoint=None)
    assert "crossbatch.data.path: not given" in refused(data=None)
    only_train = folder(tmp_path / "only", "train/a/1.png", "train/b/2.png")
    assert "has none of val/, validation/, test/" in refused(data=only_train)
    (only_train / "test").mkdir()
    assert "has no class folders" in refused(data=only_train)
    (only_train / "test/a").mkdir()
    (only_train / "test/b").mkdir()
    assert "2 of 2 class folders" in refused(data=only_train)
    beyond = shards(shards(tmp_path / "shards", "train", 0, 1, 2), "val", 0, 7)
    assert "have different classes (only in" in refused(data=beyond)
    assert "already holds a run" in refused(out=tiny_runs("resnet"))
    assert "did you mean crossbatch.knn.temperature" in refused("--set=crossbatch.knn.temprature=1")
    assert "allowed: a list of numbers (>= 1)" in refused("--set=crossbatch.knn.k=[]")
    assert (tiny_runs("resnet") / "metrics.jsonl").read_text().count("\n") == 2


def test_help_has_an_example(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    assert "python launch/knn.py --checkpoint runs/bs4096" in capsys.readouterr().out
