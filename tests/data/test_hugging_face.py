"""Tests hugging_face.py with data sets that `datasets` wrote on this disk: saved ones, parquet, and its cache of the Hub's."""

import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crossbatch.data import TrainLoader
from crossbatch.data.sources import describe_source, has_evaluation_split, open_source, prepare
from crossbatch.data.sources.shard_writer import write_shards
from crossbatch.engine.datasets import checksum

pytest.importorskip("datasets.arrow_dataset", reason="datasets is not installed (the extra hf)")
datasets: Any = importlib.import_module("datasets")
NAMES = ["cat", "dog", "cow"]


def encoded(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), (10 * number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def images(labels, kind=None, column="image", offset=0):
    """Return a data set with an image of its own colour for each label, which are of the feature `kind`."""
    files = [{"bytes": encoded(offset + number), "path": f"{number}.png"} for number in range(len(labels))]
    kind = kind or datasets.ClassLabel(names=NAMES)
    features = datasets.Features({"id": datasets.Value("int64"), column: datasets.Image(), "label": kind})
    return datasets.Dataset.from_dict({"id": [*range(len(labels))], column: files, "label": labels}, features=features)


@pytest.fixture
def saved(tmp_path) -> Path:
    splits = {"train": images([0, 2, 1, 0]), "validation": images([1, 2], offset=10), "extra": images([0], offset=20)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def colours(source) -> list[int]:
    return [source.open(index).getpixel((0, 0))[0] // 10 for index in range(len(source))]


def test_a_saved_data_set(saved):
    path = f"hf://{saved}"
    train, evaluation = open_source(path), open_source(path, "eval")
    assert has_evaluation_split(path)
    for source in (train, pickle.loads(pickle.dumps(train))):
        assert colours(source) == [0, 1, 2, 3] and source.labels.tolist() == [0, 2, 1, 0]
        assert source.class_names == NAMES and source.read(2) == encoded(2) and source.name(1) == "00000001 (1.png)"
    assert colours(evaluation) == [10, 11] and evaluation.labels.tolist() == [1, 2] and evaluation.class_names == NAMES
    assert describe_source(train) == f"4 images, 3 classes in hf://{saved}, split train"
    other = open_source(f"{path}?split=train,eval=extra", "eval")
    assert colours(other) == [20] and len(open_source(f"{path}?per_class=1")) == 3


def test_images_are_not_read_before_they_are_asked_for(tmp_path):
    """What goes to a worker is where the Arrow files are, and not what is in them."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 100, 100, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": [*map(Image.fromarray, noise)]}, features=features).save_to_disk(
        tmp_path / "x"
    )
    assert sum(file.stat().st_size for file in (tmp_path / "x").iterdir()) > 1_000_000
    source = open_source(f"hf://{tmp_path}/x")
    assert (
        len(pickle.dumps(source)) < 10_000 and not source.has_labels and not has_evaluation_split(f"hf://{tmp_path}/x")
    )
    assert np.array_equal(np.asarray(source.open(17)), noise[17])


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_those_of_the_same_files_in_a_folder(saved, tmp_path, workers):
    """Also from worker processes: the same images in the same order give the same views."""
    for number in range(4):
        file = tmp_path / f"files/{number}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encoded(number))
    views = []
    for path in (f"hf://{saved}", str(tmp_path / "files")):
        with TrainLoader(open_source(path), batch_size=4, image_size=8, workers=workers) as loader:
            views.append(next(iter(loader.epoch(0))).views)
    assert views[0].equal(views[1])


def test_parquet_and_the_cache_of_the_hub(tmp_path, monkeypatch):
    """`datasets` keeps what it downloads as Arrow files; open_source opens them without the network, prepare would use it."""
    (tmp_path / "parquet").mkdir()
    images([2, 1], column="img").to_parquet(tmp_path / "parquet/train-00000.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = open_source(f"hf://{tmp_path}/parquet")
    assert colours(source) == [0, 1] and source.labels.tolist() == [2, 1] and source.class_names == NAMES
    (tmp_path / "cache/parquet").rename(tmp_path / "cache/somebody___animals")
    for file in tmp_path.glob("cache/somebody___animals/*/*/*/parquet-*"):
        file.rename(file.with_name(file.name.replace("parquet", "animals")))
    monkeypatch.setattr("datasets.load_dataset", None)
    assert colours(open_source("hf://somebody/animals")) == [0, 1]
    with pytest.raises(ValueError, match=r"hf://somebody/plants cannot be opened .*Couldn't find cache.*download=True"):
        open_source("hf://somebody/plants")
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *name: asked.append(name) or {})
    prepare("hf://somebody/plants?config=small")
    assert asked == [("somebody/plants", "small")]


LABELS = {
    "names": (["b", "a", "b", "c"], "string", [1, 0, 1, 2], ["a", "b", "c"]),
    "numbers": ([10, 2, 2, 0], "int32", [10, 2, 2, 0], [str(number) for number in range(11)]),
    "some": ([1, -1, None, 0], "int64", [1, -1, -1, 0], ["0", "1"]),
    "none": ([-1, -1, -1, -1], "int64", [0, 0, 0, 0], ["unlabelled"]),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels(tmp_path, kind):
    given, dtype, labels, names = LABELS[kind]
    images(given, datasets.Value(dtype)).save_to_disk(tmp_path / "x")
    source = open_source(f"hf://{tmp_path}/x")
    assert (source.labels.tolist(), source.class_names, source.has_labels) == (labels, names, kind != "none")
    if kind == "some":
        with pytest.raises(OSError, match="no label"):
            source.open(1)


def test_images_as_bytes_and_as_paths(tmp_path):
    (tmp_path / "1.png").write_bytes(encoded(1))
    files = {"photo": [encoded(0), None], "file": [None, str(tmp_path / "1.png")]}
    features = datasets.Features({"photo": datasets.Value("binary"), "file": datasets.Value("string")})
    datasets.Dataset.from_dict(files, features=features).save_to_disk(tmp_path / "x")
    photos, paths = (open_source(f"hf://{tmp_path}/x?image={column}") for column in files)
    assert photos.read(0) == encoded(0) and paths.read(1) == encoded(1)
    for source, index in ((photos, 1), (paths, 0)):
        with pytest.raises(OSError, match="no image"):
            source.read(index)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?split=test", r"hf://.*saved has no split 'test'; it has: train, validation, extra"),
        ("?eval=test", r"hf://.*saved has no split 'test'; it has: train, validation, extra"),
        ("?image=img", r"hf://.*saved, split train has no column 'img'; it has: id, image, label"),
        ("?label=breed", r"split train has no column 'breed'; it has: id, image, label"),
        ("?image=id", r"split train: column 'id' holds int64, but must hold images"),
        ("?image=label,label=image", r"split train: column 'label' holds int64, but must hold images"),
        ("?label=image", r"split train: column 'image' holds struct.*, but must hold labels: names or whole numbers"),
        ("?lable=x", r"unknown option 'lable'.*did you mean 'label'"),
        (
            "/nothing",
            r"hf://.*nothing cannot be opened \(.*; give a folder that save_to_disk wrote, a folder of parquet",
        ),
    ],
)
def test_what_cannot_be_opened(saved, query, message):
    with pytest.raises(ValueError, match=message):
        open_source(f"hf://{saved}{query}", "eval" if "eval" in query else "train")


def test_a_label_without_a_class(tmp_path):
    path = tmp_path / "x"
    data = images([0, 3], datasets.Value("int64"))
    data.info.features["label"] = datasets.ClassLabel(names=NAMES)
    data.save_to_disk(path)
    with pytest.raises(ValueError, match=r"column 'label' holds the label 3; allowed: 0 to 2, its classes"):
        open_source(f"hf://{path}")


def test_other_images_have_another_checksum(tmp_path):
    """At another path, or written in other pieces, the same images are the same."""
    paths = [tmp_path / name for name in "abc"]
    images([0, 1, 2]).save_to_disk(paths[0])
    images([0, 1, 2]).save_to_disk(paths[1], num_shards=3)
    images([0, 1, 2]).select([0, 2, 1]).save_to_disk(paths[2])
    first, again, other = (checksum(open_source(f"hf://{path}?label=id")) for path in paths)
    assert first == again != other


def test_shards_of_a_data_set(saved, tmp_path):
    written = write_shards(open_source(f"hf://{saved}"), tmp_path / "shards/train", images_per_shard=3)
    shards = open_source(tmp_path / "shards")
    assert written.images == 4 and shards.class_names == NAMES
    assert sorted(zip(colours(shards), shards.labels.tolist(), strict=True)) == [(0, 0), (1, 2), (2, 1), (3, 0)]
