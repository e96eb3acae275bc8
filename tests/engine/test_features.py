"""Features of whole sources: every readable image once, with its own label, on any number of ranks."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crossbatch import InputError
from crossbatch.data import Source, open_source, prepare
from crossbatch.engine import datasets
from crossbatch.engine.datasets import labelled_sources
from crossbatch.engine.evaluation.features import EvalLoaderConfig, extract, gathered
from crossbatch.models.collective import Collective


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> str:
    """17 training images, of which 0, 8 to 11 and 16 cannot be read."""
    path = tmp_path_factory.mktemp("features") / "images"
    prepare(f"shapes://{path}?train=17&val=8&size=16")
    source = open_source(path, "train")
    for index in (0, 8, 9, 10, 11, 16):
        (path / "train" / source.name(index)).write_bytes(b"")
    return str(path)


def mean_colours(images: torch.Tensor) -> torch.Tensor:
    return images.mean((2, 3))


def features_on_this_rank(path: str) -> tuple[list[int], list[int], torch.Tensor, int, int]:
    """Return the features of all ranks, how many rows were this rank's, and how often it was asked."""
    from crossbatch.engine.runtime.distributed import GroupCollective

    collective, asked = GroupCollective(), []

    def embed(images: torch.Tensor) -> torch.Tensor:
        asked.append(len(images))
        return mean_colours(images)

    source = open_source(path, "train")
    mine = extract(embed, source, np.arange(17), EvalLoaderConfig(16, 4, 0, torch.device("cpu")), collective)
    rows = gathered(mine, collective)
    return rows.indices_N.tolist(), rows.labels_N.tolist(), rows.features_NC, len(mine), len(asked)


def test_every_readable_image_once(damaged, threads):
    source = open_source(damaged, "train")
    readable = [index for index in range(17) if index not in (0, 8, 9, 10, 11, 16)]
    rows = extract(mean_colours, source, np.arange(17), EvalLoaderConfig(16, 4, 0, torch.device("cpu")), Collective())
    assert rows.indices_N.tolist() == readable and len(rows.skipped) == 6
    assert rows.labels_N.tolist() == source.labels[readable].tolist()
    mean, std = (np.array(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    want = [(np.asarray(source.open(index)).mean((0, 1)) / 255 - mean) / std for index in readable]
    torch.testing.assert_close(rows.features_NC, torch.tensor(np.array(want)).float(), rtol=1e-4, atol=1e-5)
    both = threads(2).run(features_on_this_rank, damaged)
    for indices, labels, values, _, _ in both:
        assert (indices, labels) == (readable, rows.labels_N.tolist())
        torch.testing.assert_close(values, rows.features_NC)
    # 8 and 9 images in batches of 4, one of which is wholly broken: a sharded network must be called equally often.
    assert [count for *_, count, _ in both] == [7, 4] and both[0][-1] == both[1][-1] == 3


def source_with(labels: list[int], classes: int = 3) -> Source:
    fake = SimpleNamespace(labels=np.array(labels), class_names=["x"] * classes, name=lambda index: f"image {index}")
    fake.has_labels = True
    return fake  # pyright: ignore[reportReturnType]


def test_labels_must_have_a_class(monkeypatch, tmp_path):
    splits = {}
    monkeypatch.setattr(datasets, "open_source", lambda path, split, cache, remote: splits[split])
    monkeypatch.setattr(datasets, "has_evaluation_split", lambda path: True)

    def refused(train: list[int], evaluation: list[int]) -> str:
        splits.update(train=source_with(train), eval=source_with(evaluation))
        with pytest.raises(InputError) as error:
            labelled_sources("DIR")
        return str(error.value)

    assert "training images: 1 labels out of range, the first 3 of image 1; allowed: 0 to 2" in refused([0, 3], [0])
    assert "evaluation images: 2 labels out of range, the first 255 of image 0" in refused([0, 1], [255, -2])
    assert "evaluation images: none of them has a label" in refused([0, 1], [-1, -1])
    assert "evaluation images: none of them has a label" in refused([0, 1], [])
    splits.update(train=source_with([-1, 2]), eval=source_with([0]))
    assert labelled_sources("DIR")[0] is splits["train"]


def images_here(paths: list[str], cache: str) -> str:
    """Open the path that belongs to this rank, and return why that is refused."""
    from crossbatch.engine.config.schema import PathConfig
    from crossbatch.engine.datasets import labelled_images, training_images
    from crossbatch.engine.evaluation import embedding
    from crossbatch.engine.runtime.world import world_from_environment

    def to_embed(path: str, cache: Path) -> object:
        return embedding._open(PathConfig(path=path), "train", cache)

    path, said = paths[world_from_environment().rank], []
    for images in (labelled_images, training_images, to_embed):
        try:
            images(path, Path(cache))
        except InputError as error:
            said.append(str(error))
    return " | ".join(said)


def test_all_ranks_must_find_the_same_images(tmp_path, two_ranks):
    def folder(name: str) -> Path:
        prepare(f"shapes://{tmp_path / name}?train=16&val=8&size=8")
        return tmp_path / name

    whole, copy, less, other = (folder(name) for name in ("whole", "copy", "less", "other"))
    next(path for path in (less / "train").rglob("*") if path.is_file()).unlink()
    first = next((other / "train").iterdir())
    for split in ("train", "val"):
        (other / split / first.name).rename(other / split / f"{first.name}s")
    copies = {"copy": copy, "less": less, "other": other, "none": tmp_path / "none"}
    found = {
        name: two_ranks.run(images_here, [str(whole), str(path)], str(tmp_path / "cache"))
        for name, path in copies.items()
    }
    assert found["copy"] == ["", ""]
    for said in found["less"]:  # also the rank whose own images are as they should be
        assert "rank 1 finds 15 + 8 images, but rank 0 finds 16 + 8; give every node the same files" in said
        assert "rank 1 finds 15 images, but rank 0 finds 16; give every node the same files" in said
    assert all("rank 1 finds other files or labels than rank 0" in said for said in found["other"])
    assert all("rank 1: crossbatch.data.path" in said for said in found["none"])


def test_a_path_that_is_not_given():
    with pytest.raises(
        InputError,
        match=r"path: not given; allowed: a folder with train/.* or list://.*cifar10://.*shapes://; .*; give",
    ):
        labelled_sources(None)


def test_a_folder_without_evaluation_images(tmp_path):
    prepare(f"shapes://{tmp_path / 'images'}?train=8&val=8&size=8")
    Path(tmp_path / "images/val").rename(tmp_path / "images/elsewhere")
    with pytest.raises(InputError, match="has none of val/, validation/, test/"):
        labelled_sources(str(tmp_path / "images"))
