"""Tests listing.py and its use by ImageFolder: what is kept is used while it is right, and only then."""

import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from crossbatch.data.sources import image_folder, listing
from crossbatch.data.sources.image_folder import ImageFolder
from crossbatch.data.sources.listing import Names


def test_names():
    names = ["", "a.jpg", "名前/ü.png", os.fsdecode(b"latin1-\xe9.jpg"), "a.jpg"]
    packed = listing.pack_names("x", names)
    assert Names(packed, "x").unpack() == names and len(Names(packed, "x")) == 5
    assert Names(listing.pack_names("x", []), "x").unpack() == []


@pytest.fixture
def root(tmp_path) -> Path:
    """Make two classes and a nested folder, all unchanged for an hour."""
    for name in ("a/1.jpg", "a/deep/2.jpg", "b/3.jpg"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).touch()
    age(tmp_path / "images")
    return tmp_path / "images"


def age(root: Path, seconds: float = 3600):
    """Set the times of change of all folders back, as if `seconds` had passed."""
    then = time.time() - seconds
    for folder in [root, *root.rglob("*/")]:
        os.utime(folder, (then, then))


def names(source: ImageFolder) -> list[str]:
    return [source.name(index) for index in range(len(source))]


@pytest.fixture
def listings(monkeypatch) -> list[str]:
    """Return a list that grows with every real listing."""
    calls, original = [], image_folder._list
    monkeypatch.setattr(image_folder, "_list", lambda root, *more: calls.append(root) or original(root, *more))
    return calls


def test_a_folder_is_listed_once(root, tmp_path, listings):
    cache = tmp_path / "cache"
    first, second = ImageFolder(root, cache=cache), ImageFolder(root, cache=cache)
    assert len(listings) == 1 and [file.suffix for file in cache.iterdir()] == [".npz"]
    assert names(first) == names(second) == ["a/1.jpg", "a/deep/2.jpg", "b/3.jpg"]
    assert first.class_names == second.class_names == ["a", "b"]
    assert second.labels.tolist() == [0, 0, 1] and second.labels.dtype == np.int64
    assert pickle.dumps(first) == pickle.dumps(second)


@pytest.mark.parametrize("change", ["a/new.jpg", "a/deep/new.jpg", "c/new.jpg"])
def test_a_new_file_is_noticed(root, tmp_path, change):
    ImageFolder(root, cache=tmp_path / "cache")
    (root / change).parent.mkdir(exist_ok=True)
    (root / change).touch()
    assert change in names(ImageFolder(root, cache=tmp_path / "cache"))


def test_a_removed_and_a_renamed_file_are_noticed(root, tmp_path):
    ImageFolder(root, cache=tmp_path / "cache")
    (root / "b/3.jpg").rename(root / "b/4.jpg")
    assert "b/4.jpg" in names(ImageFolder(root, cache=tmp_path / "cache"))
    age(root, 1800)
    ImageFolder(root, cache=tmp_path / "cache")
    (root / "a/deep/2.jpg").unlink()
    (root / "a/deep").rmdir()
    assert names(ImageFolder(root, cache=tmp_path / "cache")) == ["a/1.jpg", "b/4.jpg"]


def test_a_folder_that_just_changed_is_not_kept(root, tmp_path, listings):
    """Another file could come within the resolution of its timestamp."""
    (root / "a/new.jpg").touch()
    for expected in (1, 2):
        ImageFolder(root, cache=tmp_path / "cache")
        assert len(listings) == expected


def test_folders_do_not_share_a_listing(root, tmp_path):
    other = tmp_path / "other/images/z/9.jpg"
    other.parent.mkdir(parents=True)
    other.touch()
    age(tmp_path / "other")
    ImageFolder(root, cache=tmp_path / "cache")
    assert names(ImageFolder(tmp_path / "other/images", cache=tmp_path / "cache")) == ["z/9.jpg"]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_every_damaged_listing_is_made_again(root, tmp_path, listings):
    """The listing is right whatever lay in the cache: files truncated, flipped, emptied."""
    expected = names(ImageFolder(root, cache=tmp_path / "cache"))
    (file,) = (tmp_path / "cache").iterdir()
    whole, numbers = file.read_bytes(), np.random.default_rng(0)
    damaged = [b"", b"no zip", whole[: len(whole) // 2], whole[:-1], pickle.dumps({"labels": [1, 2, 3]})]
    for place in numbers.integers(0, len(whole), 60):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(numbers.integers(8))
        damaged.append(bytes(flipped))
    for content in damaged:
        file.write_bytes(content)
        assert names(ImageFolder(root, cache=tmp_path / "cache")) == expected
    assert len(listings) > 30  # some flips hit nothing that counts
    listing.save(file, {"version": np.array(1), "labels": np.zeros(2, np.int64)})
    assert names(ImageFolder(root, cache=tmp_path / "cache")) == expected


def test_a_listing_of_another_version_is_made_again(root, tmp_path, listings, monkeypatch):
    ImageFolder(root, cache=tmp_path / "cache")
    monkeypatch.setattr(image_folder, "_VERSION", 2)
    ImageFolder(root, cache=tmp_path / "cache")
    assert len(listings) == 2


def test_a_cache_that_cannot_be_written_is_reported_and_done_without(root, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert len(ImageFolder(root, cache=tmp_path / "file/cache")) == 3
    assert "cannot keep the listing" in caplog.text


def test_writing_leaves_whole_files_only(tmp_path, monkeypatch):
    listing.save(tmp_path / "x.npz", {"a": np.arange(3)})

    def fails(file, **arrays):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(listing.np, "savez", fails)
    with pytest.raises(OSError, match="disk full"):
        listing.save(tmp_path / "x.npz", {"a": np.arange(4)})
    assert listing.load(tmp_path / "x.npz")["a"].tolist() == [0, 1, 2] and len(list(tmp_path.iterdir())) == 1


def test_a_link_to_a_folder_above_counts_once(root):
    (root / "a/deep/again").symlink_to(root / "a")
    assert names(ImageFolder(root)) == ["a/1.jpg", "a/deep/2.jpg", "b/3.jpg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(root):
    (root / "a/deep").chmod(0)
    with pytest.raises(PermissionError, match="deep"):
        ImageFolder(root)
