"""Feeds all of damage.py to the sources, which give an image or a BrokenImage: no crash, no hang, no wrong label."""

import time
from pathlib import Path

import numpy as np
import pytest

from crossbatch.data.decode import BrokenImage
from crossbatch.data.sources.image_folder import ImageFolder
from crossbatch.data.sources.shards import INDEX, Shards, write_index
from tests.data import damage

SECONDS = 5  # for one file; the largest takes 0.3
READABLE = {"no_end.png", "exif_garbage.jpg", "taller_than_its_data.jpg"}  # damaged, but PIL shows what is there


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> ImageFolder:
    """Write all damaged files, in turn under three classes."""
    root = tmp_path_factory.mktemp("damaged")
    for number, (name, content) in enumerate(damage.damaged_files(340)):
        path = root / "abc"[number % 3] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return ImageFolder(root)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # PIL's
def test_files(folder):
    seen, slowest = {}, 0.0
    for index in range(len(folder)):
        name, start = folder.name(index), time.monotonic()
        try:
            image = folder.open(index)
            assert image.mode == "RGB" and image.getpixel((image.width - 1, image.height - 1)) is not None
            seen[name.split("/")[1]] = image.size
        except BrokenImage as error:
            assert "bytes)" in str(error), name
        slowest = max(slowest, time.monotonic() - start)
        assert folder.class_names[folder.labels[index]] == name[0]
    assert len(folder) == 340 and slowest < SECONDS
    assert {name: size for name, size in seen.items() if name in damage.WHOLE} == damage.WHOLE
    kinds = {name for name in seen if not name[0].isdigit()}
    assert kinds - damage.WHOLE.keys() == READABLE
    assert 30 < len(seen) - len(kinds) < 270  # of the random ones, some


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> bytes:
    """Return the index of shard(0) and shard(1) as they should be."""
    root = tmp_path_factory.mktemp("whole")
    for number, name in enumerate(("a.tar", "b.tar")):
        (root / name).write_bytes(damage.shard(number))
    write_index(root, [])
    return (root / INDEX).read_bytes()


def shards(root: Path, content: bytes, index: bytes | None) -> Shards:
    """Open `content` in the place of shard(0), beside the whole shard(1), with the index from before the damage or none."""
    (root / "a.tar").write_bytes(content)
    (root / "b.tar").write_bytes(damage.shard(1))
    if index is not None:
        (root / INDEX).write_bytes(index)
    return Shards(root)


IMAGES = [(which, number) for which in (0, 1) for number in range(damage.SAMPLES)]
PAYLOADS = np.array([np.frombuffer(damage.payload(*image), np.uint8) for image in IMAGES])


def nearest(read: bytes) -> tuple[int, int] | None:
    """Return (shard, number) of the payload that `read` was before some bytes were damaged; None if too many were."""
    if len(read) != PAYLOADS.shape[1]:
        return None
    distances = (np.frombuffer(read, np.uint8) != PAYLOADS).sum(axis=1)
    return IMAGES[int(distances.argmin())] if distances.min() < 20 else None


def label_is_damaged(content: bytes, number: int) -> bool:
    """Return whether the label's text of an image in shard(0) has changed. Without an index nothing can tell."""
    place = number * damage.SAMPLE_BYTES + 512
    return content[place : place + 1] != damage.shard(0)[place : place + 1]


@pytest.mark.parametrize("indexed", [True, False])
def test_shards(tmp_path, index, indexed):
    """Damage shows as an error when shards are opened or as a broken image, or the label is right."""
    refused, broken, fine = [], 0, 0
    for name, content in damage.damaged_shards(150):
        start = time.monotonic()
        try:
            source = shards(tmp_path, content, index if indexed else None)
        except ValueError as error:
            assert "a.tar" in str(error), name
            refused.append(name)
            continue
        for image in range(len(source)):
            try:
                found = nearest(source.read(image))
            except BrokenImage:
                broken += 1
                continue
            fine += 1
            if found is not None and (indexed or found[0] == 1 or not label_is_damaged(content, found[1])):
                assert source.labels[image] == damage.label_of(*found), (name, source.name(image))
        assert sum(source.name(image).startswith("b.tar/") for image in range(len(source))) == damage.SAMPLES
        assert time.monotonic() - start < SECONDS, name
    # With an index, another size is an error and other bytes are broken images; without one, so is a scan that breaks off.
    assert {"text", "two_in_one"} < set(refused) if indexed else {"text", "shifted_by_a_block"} < set(refused)
    sizes_differ = [name for name, content in damage.damaged_shards(150) if len(content) != len(damage.shard(0))]
    assert refused == sizes_differ if indexed else len(refused) > 50
    assert fine > 400 and (broken > 100 or not indexed)


def test_an_index_of_another_shard(tmp_path, index):
    """Keys, sizes and names are alike, and yet every image with another label is noticed."""
    source = shards(tmp_path, damage.shard(1), index)
    for image in range(damage.SAMPLES):
        assert damage.label_of(0, image) != damage.label_of(1, image)
        with pytest.raises(BrokenImage, match="does not match its index"):
            source.read(image)
