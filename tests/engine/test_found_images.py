"""What a run finds in a folder of images: said at its start, refused only where it is needed, and the same after a resume."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossbatch import InputError
from crossbatch.engine.datasets import labelled_sources, log_skipped_images
from crossbatch.engine.evaluation.probe_file import read_probe
from crossbatch.engine.pretrained.weights import PROBE, PROBE_FILE
from tests.small_runs import RESNET, run


def settings(data: Path | str, *more: str) -> list[str]:
    return [*RESNET, f"crossbatch.data.path={data}", "crossbatch.data.max_skipped_fraction=0.1", *more]


@pytest.fixture
def images(tmp_path) -> Path:
    """Write 24 images of two classes to train on, one of them broken, and 8 to evaluate on, one of them broken."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
        (folder / "01.png").write_bytes(b"no image")
        (folder / "x.txt").touch()
    return tmp_path / "images"


def recorder(file: str):
    """Return a `log_skipped_images` that writes what it is given to `file`."""

    def record(images: list[str], named: set[str]) -> None:
        with Path(file).open("a") as lines:
            lines.writelines(f"{image}\n" for image in images)

    return record


def test_field_a_run_says_what_it_found(images, tmp_path, one_rank):
    out, monitored = tmp_path / "run", "crossbatch.evaluate.knn_every_epochs=1"
    patches = (
        ("crossbatch.engine.evaluation.monitor.log_skipped_images", partial(recorder, str(tmp_path / "monitor"))),
    )
    overrides = settings(images, monitored, "crossbatch.evaluate.knn_k=30")
    assert one_rank.run(run, overrides, str(out), 6, "auto", (), patches) == [""]
    told = Path(f"{out}.told").read_text().splitlines()
    assert "training: 24 images, 2 classes (1 files passed over: 1 .txt) in train/" in told
    assert "evaluation: 8 images, 2 classes (1 files passed over: 1 .txt) in val/" in told
    assert "crossbatch.evaluate.knn_k: 30, but there are 24 training images; all of them vote" in told
    skipped = [line for line in told if line.startswith("skipped")]
    assert skipped == ["skipped a broken image: b/01.png (BrokenImage: not an image (UnidentifiedImageError, 8 bytes))"]
    monitor = Path(tmp_path / "monitor").read_text().splitlines()
    assert set(monitor) == {
        "b/01.png (BrokenImage: not an image (UnidentifiedImageError, 8 bytes))"
    }  # of train, of val


def test_field_an_evaluation_names_a_broken_image_once(capsys):
    named: set[str] = set()
    for _ in range(3):
        log_skipped_images(["a (cut off)", "b (no image)", "a (cut off)"], named)
    log_skipped_images((f"{number} (cut off)" for number in range(20)), named)
    said = capsys.readouterr().out.splitlines()
    assert (
        said[:2] == ["skipped a broken image: a (cut off)", "skipped a broken image: b (no image)"] and len(said) == 10
    )


def test_field_a_folder_that_is_not_needed_stops_no_run(images, tmp_path, one_rank):
    shutil.rmtree(images / "val/b")
    (images / "val/a").rename(images / "val/foreign")
    off, on = ([f"crossbatch.evaluate.knn_every_epochs={every}"] for every in (0, 1))
    (refused,) = one_rank.run(run, settings(images, *on), str(tmp_path / "run"), 1)
    assert refused.startswith("InputError: crossbatch.data.path: ") and "only in " in refused
    assert refused.endswith("or set crossbatch.evaluate.knn_every_epochs=0 to train without k-NN")
    assert one_rank.run(run, settings(images, *off), str(tmp_path / "run"), 1) == [""]
    for file in (images / "val/foreign").iterdir():  # ImageNet's, before it is sorted into classes
        file.rename(images / "val" / file.name)
    (images / "val/foreign").rmdir()
    assert one_rank.run(run, settings(images, *off), str(tmp_path / "flat"), 1) == [""]
    (images / "val").rename(images / "test")
    assert one_rank.run(run, settings(images, *off), str(tmp_path / "flat test"), 1) == [""]
    (refused,) = one_rank.run(run, settings(images, *on), str(tmp_path / "flat2"), 1)
    assert "has no class folders (it holds 4 .png outside class folders)" in refused
    (images / "test").rename(images / "evaluate")
    assert one_rank.run(run, settings(images, *on), str(tmp_path / "none"), 1) == [""]
    told = Path(f"{tmp_path / 'none'}.told").read_text()
    assert f"evaluation: none, as {images} has none of val/, validation/, test/ beside train/" in told


def test_field_images_without_labels_train_without_knn(images, tmp_path, one_rank):
    """In nested folders without train/, directly in train/ beside a val/ with classes, and from a list."""
    monitored = "crossbatch.evaluate.knn_every_epochs=1"
    nested = images.rename(tmp_path / "nested") / "train"
    files = [file for file in sorted(nested.rglob("*.png")) if file.name != "01.png"]
    (tmp_path / "flat/train").mkdir(parents=True)
    for number, file in enumerate(files):
        shutil.copy(file, tmp_path / f"flat/train/{number}.png")
    (nested.parent / "val").rename(tmp_path / "flat/val")
    (tmp_path / "list.txt").write_text("".join(f"{file}\n" for file in files))
    for number, path in enumerate((nested, tmp_path / "flat", f"list://{tmp_path}/list.txt")):
        out = tmp_path / f"run{number}"
        assert one_rank.run(run, settings(path, monitored), str(out), 2) == [""]
        told = Path(f"{out}.told").read_text()
        assert (
            " images, no labels" in told
            and f"evaluation: none, as the images of {path} have no labels; k-NN is off" in told
        )
        assert "knn_top1" not in (out / "metrics.jsonl").read_text()
        with pytest.raises(
            InputError, match=r"crossbatch.data.path: .* have no labels, which evaluation and fine-tuning"
        ):
            labelled_sources(str(path))


def test_field_a_list_without_images_to_evaluate_on(images, tmp_path, one_rank):
    lines = {
        split: [f"{file}\t{file.parent.name}\n" for file in sorted((images / split).rglob("*.png"))]
        for split in ("train", "val")
    }
    for split, listed in lines.items():
        (tmp_path / f"{split}.txt").write_text("".join(listed))
    path, out = f"list://{tmp_path}/train.txt", str(tmp_path / "run")
    monitored = "crossbatch.evaluate.knn_every_epochs=1"
    assert one_rank.run(run, settings(path, monitored), out, 2) == [""]
    assert f"evaluation: none, as {path} has no option eval=FILE" in Path(f"{out}.told").read_text()
    with pytest.raises(InputError, match=r"crossbatch.data.path: .* has no option eval=FILE, .*; add it"):
        labelled_sources(path)
    assert one_rank.run(run, settings(f"{path}?eval=val.txt", monitored), out, 4) == [""]
    assert "evaluation: 8 images, 2 classes in val.txt" in Path(f"{out}.told").read_text()
    assert "knn_top1" in Path(out, "metrics.jsonl").read_text()
    with (tmp_path / "train.txt").open("a") as file:
        file.write("\n")  # the same images, but another list
    (refused,) = one_rank.run(run, settings(path), out, 6)
    assert "crossbatch.data.path: holds as many images, 24, but others" in refused


def test_field_a_run_does_not_go_on_with_other_images(images, tmp_path, one_rank):
    out = str(tmp_path / "run")
    assert one_rank.run(run, settings(images), out, 2) == [""]
    images = images.rename(tmp_path / "moved")
    assert one_rank.run(run, settings(images), out, 4) == [""]  # the same images at another path
    (images / "train/a/03.png").rename(images / "train/a/other.png")
    (refused,) = one_rank.run(run, settings(images), out, 6)
    assert "crossbatch.data.path: holds as many images, 24, but others, or in another order or other classes" in refused
    assert "accept it with --allow-change crossbatch.data.path" in refused
    assert one_rank.run(run, settings(images), out, 6, "auto", ("crossbatch.data.path",)) == [""]
    (images / "train/a/04.png").rename(images / "train/a/another.png")
    assert one_rank.run(run, settings(images), out, 8, "auto", ("crossbatch.data",)) == [""]  # its section


def test_field_a_probe_does_not_go_on_with_other_images(tmp_path):
    kept = {"images": 3, "checksum of names and labels": 5}
    torch.save({"kind": PROBE, "identity": kept, "backbone": "x", "history": []}, tmp_path / PROBE_FILE)
    assert read_probe("auto", tmp_path, kept, "x") is not None
    with pytest.raises(InputError, match="another probe: checksum of names and labels: was 5, is 6"):
        read_probe("auto", tmp_path, {**kept, "checksum of names and labels": 6}, "x")
    del kept["checksum of names and labels"]  # as an earlier version saved it
    torch.save({"kind": PROBE, "identity": kept, "backbone": "x", "history": []}, tmp_path / PROBE_FILE)
    assert read_probe("auto", tmp_path, {**kept, "checksum of names and labels": 6}, "x") is not None
