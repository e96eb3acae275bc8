"""Tests shards.py, its index and its writer: webdataset's conventions, and never an image with another one's label."""

import errno
import importlib.util
import io
import os
import pickle
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossbatch.data.decode import BrokenImage, decode
from crossbatch.data.sources import describe_source, listing
from crossbatch.data.sources import shards as shards_module
from crossbatch.data.sources.image_folder import ImageFolder
from crossbatch.data.sources.shard_writer import UnreadableImage, write_shards
from crossbatch.data.sources.shards import INDEX, Shards, write_index
from crossbatch.data.sources.synthetic import Synthetic


def content(number: int, salt: bytes = b"") -> bytes:
    """Return bytes that stand for image `number`; reading does not decode."""
    return (b"image %d " % number + salt) * (10 + number)


SAMPLE = 4 * 512  # bytes of one of them in a shard: two headers, label, image


def write_tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def samples(numbers, salt: bytes = b"", start: int = 0) -> list[tuple[str, bytes]]:
    """Return the members of samples in webdataset's order: extensions sorted."""
    return [
        member
        for number in numbers
        for member in ((f"{number:04d}.cls", b"%d" % (number % 3)), (f"{number:04d}.jpg", content(number, salt)))
    ]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Write two shards of six images in three classes, with an index."""
    write_tar(tmp_path / "train/a-0.tar", samples(range(6)))
    write_tar(tmp_path / "train/a-1.tar", samples(range(6, 12)))
    write_index(tmp_path / "train", ["x", "y", "z"])
    return tmp_path / "train"


def assert_whole(source: Shards, numbers=range(12)):
    assert len(source) == len(numbers)
    for index, number in enumerate(numbers):
        assert source.read(index) == content(number) and source.labels[index] == number % 3


def assert_no_wrong_label(source: Shards, salt: bytes = b"") -> int:
    """Assert that what can be read has its own label, and return how many images can."""
    readable = 0
    for index in range(len(source)):
        try:
            number = int(source.read(index).split()[1])
        except BrokenImage:
            continue
        assert source.read(index) == content(number, salt) and source.labels[index] == number % 3
        readable += 1
    return readable


def test_images_by_index(folder):
    source = Shards(folder)
    assert_whole(source)
    assert source.class_names == ["x", "y", "z"] and source.has_class_names and source.labels.dtype == np.int64
    assert source.name(0) == "a-0.tar/0000.jpg" and source.name(11) == "a-1.tar/0011.jpg"
    assert_whole(pickle.loads(pickle.dumps(source)))


def test_threads_read_at_once_with_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("crossbatch.data.sources.shards._OPEN_FILES", 2)
    for shard in range(6):
        write_tar(tmp_path / f"train/{shard}.tar", samples(range(2 * shard, 2 * shard + 2)))
    source, failures = Shards(tmp_path / "train"), []

    def read(seed: int):
        for index in np.random.default_rng(seed).integers(0, 12, 200):
            if source.read(int(index)) != content(int(index)):
                failures.append(index)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    if Path("/proc/self/fd").exists():
        files = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        assert sum(file.startswith(str(tmp_path)) for file in files) <= 2


def test_without_an_index_the_headers_are_scanned_once(folder, tmp_path, monkeypatch):
    (folder / INDEX).unlink()
    hour_ago = time.time() - 3600
    for shard in folder.iterdir():
        os.utime(shard, (hour_ago, hour_ago))
    scans, original = [], shards_module._scan
    monkeypatch.setattr(shards_module, "_scan", lambda folder, name: scans.append(name) or original(folder, name))
    for _ in range(2):
        source = Shards(folder, cache=tmp_path / "cache")
        assert_whole(source)
        assert source.class_names == ["0", "1", "2"] and not source.has_class_names
    assert sorted(scans) == ["a-0.tar", "a-1.tar"]
    write_tar(folder / "a-1.tar", samples(range(6, 11)))
    assert_whole(Shards(folder, cache=tmp_path / "cache"), range(11))


def test_conventions(tmp_path):
    """Keys end at the first dot, with their folder; other members are passed over; either order; any case."""
    long = "folder" * 30 + "/name"
    members = [
        ("./d.0/e.JPEG", content(0)),
        ("./d.0/e.json", b"{}"),
        ("./d.0/e.cls", b" 7\n"),
        ("x.cls", b"1"),
        ("x.seg.png", b"no image: its extension is seg.png"),
        ("x.png", content(1)),
        ("x.webp", b"a second image of the same sample"),
        ("only.cls", b"3"),
        ("._x.jpg", b"macOS"),
        (f"{long}.cls", b"2"),
        (f"{long}.jpg", content(2)),
        ("ü.cls", b"0"),
        ("ü.webp", content(3)),
    ]
    for tar_format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        write_tar(tmp_path / "train/a.tar", members, format=tar_format)
        source = Shards(tmp_path / "train")
        assert [source.name(i) for i in range(len(source))] == [
            "a.tar/./d.0/e.JPEG", "a.tar/x.png", f"a.tar/{long}.jpg", "a.tar/ü.webp"
        ]  # fmt: skip
        assert source.labels.tolist() == [7, 1, 2, 0]
        assert [source.read(i) for i in range(4)] == [content(i) for i in range(4)]


def test_no_labels_at_all_is_one_class(tmp_path):
    write_tar(tmp_path / "train/a.tar", [("a.jpg", content(0)), ("a.txt", b"a caption"), ("b.jpg", content(1))])
    source = Shards(tmp_path / "train")
    assert source.labels.tolist() == [0, 0] and source.class_names == ["unlabelled"] and not source.has_labels
    assert source.read(1) == content(1)


def test_an_image_without_its_label_is_broken(tmp_path):
    members = samples(range(4))
    del members[2]
    source = Shards(write_tar(tmp_path / "train/a.tar", members).parent)
    assert source.labels.tolist() == [0, -1, 2, 0] and source.has_labels
    with pytest.raises(BrokenImage, match=r"no \.cls member"):
        source.read(1)
    assert assert_no_wrong_label(source) == 3


def test_a_shard_that_is_cut_off(folder):
    """Cut at every 100th byte, it is refused: by its size with an index, and without one unless only the end is missing."""
    index, whole = (folder / INDEX).read_bytes(), (folder / "a-1.tar").read_bytes()
    for size in range(0, 6 * SAMPLE + 1000, 100):
        (folder / "a-1.tar").write_bytes(whole[:size])
        (folder / INDEX).write_bytes(index)
        assert f"a-1.tar has {size} bytes in the folder and {len(whole)} in the index; remove" in rejected(folder)
        (folder / INDEX).unlink()
        if size < 6 * SAMPLE + 512:  # a block of zeros ends it
            assert "a-1.tar is cut off or damaged after byte " in rejected(folder)
        else:
            assert_whole(Shards(folder))


def test_a_shard_that_is_cut_off_while_it_is_open(folder):
    source = Shards(folder)
    os.truncate(folder / "a-1.tar", 2 * SAMPLE)
    with pytest.raises(BrokenImage, match="cut off"):
        source.read(8)
    assert assert_no_wrong_label(source) == 8


def test_a_hole_of_zeros_in_the_middle_is_not_the_end(folder):
    (folder / INDEX).unlink()
    whole = bytearray((folder / "a-0.tar").read_bytes())
    whole[2 * SAMPLE : 4 * SAMPLE] = bytes(2 * SAMPLE)
    (folder / "a-0.tar").write_bytes(whole)
    assert f"a-0.tar is cut off or damaged after byte {2 * SAMPLE} " in rejected(folder)


def test_exchanged_shards_are_noticed_at_each_read(tmp_path):
    """This is the worst case: same names, sizes and keys, other images and labels."""
    for number, salt in enumerate((b"p", b"q")):
        relabelled = [
            (name, b"%d" % number if name.endswith("cls") else data) for name, data in samples(range(6), salt)
        ]
        write_tar(tmp_path / f"train/a-{number}.tar", relabelled)
    write_index(tmp_path / "train", [])
    (tmp_path / "train/a-0.tar").rename(tmp_path / "x.tar")
    (tmp_path / "train/a-1.tar").rename(tmp_path / "train/a-0.tar")
    (tmp_path / "x.tar").rename(tmp_path / "train/a-1.tar")
    source = Shards(tmp_path / "train")
    for index in range(12):
        with pytest.raises(BrokenImage, match="does not match its index"):
            source.read(index)


def test_a_flipped_bit_in_a_label_is_noticed_with_an_index(folder):
    whole = bytearray((folder / "a-0.tar").read_bytes())
    assert whole[512:513] == b"0"
    whole[512] ^= 2
    (folder / "a-0.tar").write_bytes(whole)
    source = Shards(folder)
    with pytest.raises(BrokenImage, match=r"remove index\.npz"):
        source.read(0)
    assert assert_no_wrong_label(source) == 11


def rejected(folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        Shards(folder)
    return str(caught.value)


def test_an_index_beside_other_shards(folder):
    write_tar(folder / "a-2.tar", samples(range(3)))
    message = f"a-2.tar has {(folder / 'a-2.tar').stat().st_size} bytes in the folder and no in the index; remove"
    assert message in rejected(folder)
    (folder / "a-2.tar").unlink()
    write_tar(folder / "a-1.tar", samples(range(6, 40)))
    assert "is not the index of these shards: a-1.tar has" in rejected(folder)  # it has grown
    write_tar(folder / "a-1.tar", samples(range(6, 12), b"of the same size"))
    assert assert_no_wrong_label(Shards(folder)) == 6  # what only each read can notice
    (folder / "a-0.tar").unlink()
    assert "a-0.tar has no bytes in the folder" in rejected(folder)


def test_an_index_of_the_first_version_with_its_column_of_defects(folder):
    arrays = listing.load(folder / INDEX)
    listing.save(folder / INDEX, {**arrays, "defects": np.zeros(12, dtype=np.uint8)})
    assert_whole(Shards(folder))


def test_an_index_that_cannot_be_read_is_not_called_damaged(folder, monkeypatch):
    def gone(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(listing.Path, "read_bytes", gone)
    with pytest.raises(OSError, match="Stale"):
        listing.load(folder / INDEX)


def test_a_damaged_index(folder):
    whole = (folder / INDEX).read_bytes()
    for content_ in (b"", whole[:500], whole[:600] + b"?" + whole[601:]):
        (folder / INDEX).write_bytes(content_)
        assert "index.npz is damaged" in rejected(folder) and "remove it" in rejected(folder)
    (folder / INDEX).write_bytes(whole)
    arrays = listing.load(folder / INDEX)
    for change in ({"labels": arrays["labels"][1:]}, {"labels": arrays["labels"] + 10**7}, {"version": np.array(9)}):
        listing.save(folder / INDEX, {**arrays, **change})
        assert "index.npz is damaged" in rejected(folder)


@pytest.mark.parametrize("name", ["text", "empty", "gzip", "no images", "labels of text"])
def test_shards_of_which_nothing_can_be_used(tmp_path, name):
    path = write_tar(tmp_path / "train/a.tar", [("a.txt", b"hello"), ("b.cls", b"1")])
    if name == "text":
        path.write_text("no tar " * 500)
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "gzip":
        with tarfile.open(path, "w:gz"):
            pass
    elif name == "labels of text":
        write_tar(path, [("a.cls", b"cat"), ("a.jpg", content(0))])
    message = rejected(tmp_path / "train")
    expected = {
        "no images": "hold no images (they hold 1 .cls without an image, 1 .txt); allowed:",
        "labels of text": "the label of a.jpg is b'cat'; allowed: a whole number",
    }
    assert expected.get(name, "a.tar is cut off or damaged after byte 0 (") in message


def test_bytes_per_image(tmp_path):
    write_tar(tmp_path / "train/a.tar", samples(range(500)))
    assert len(pickle.dumps(Shards(tmp_path / "train"))) < 500 * (40 + len("0000.jpg")) + 2000


# ---- writing ----


@pytest.fixture
def images(tmp_path) -> ImageFolder:
    """Write a JPEG, a PNG under a JPEG's name, a BMP, a broken file and a text file: 5 images, 3 of them whole."""
    rng = np.random.default_rng(0)
    for number, (name, file_format) in enumerate((("a/1.jpg", "JPEG"), ("a/2.jpg", "PNG"), ("b/3.bmp", "BMP"))):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (5 + number, 7, 3), dtype=np.uint8)).save(path, file_format)
    (tmp_path / "images/b/4.jpg").write_bytes(b"")
    (tmp_path / "images/b/5.jpg").write_text("no image")
    return ImageFolder(tmp_path / "images")


def test_written_shards_hold_the_same_images_and_labels(images, tmp_path):
    done = []
    written = write_shards(images, tmp_path / "out/train", 2, seed=1, advance=done.append)
    assert (written.shards, written.images, sum(done)) == (2, 3, 5)
    assert sorted(line.split(":")[0] for line in written.skipped) == ["b/4.jpg", "b/5.jpg"]
    source = Shards(tmp_path / "out/train")
    assert source.class_names == ["a", "b"]
    by_size = {
        image.size[1]: (image, label) for image, label in zip(map(source.open, range(3)), source.labels, strict=True)
    }
    for index in range(3):
        image, label = by_size[5 + index]
        assert np.array_equal(np.asarray(image), np.asarray(images.open(index))) and label == images.labels[index]
    extensions = {source.open(i).size[1]: source.name(i).rsplit(".")[-1] for i in range(3)}
    assert extensions == {5: "jpg", 6: "png", 7: "png"}
    assert {source.read(i) for i in range(3)} > {images.read(0), images.read(1)}  # copied, not encoded again


def test_the_order_is_random_and_the_bytes_are_not(tmp_path):
    for out, seed in (("1", 0), ("2", 0), ("3", 1)):
        write_shards(Synthetic(40, 8), tmp_path / out / "train", 15, seed)
    first, again, other = (
        [shard.read_bytes() for shard in sorted((tmp_path / out / "train").glob("*.tar"))] for out in "123"
    )
    assert len(first) == 3 and first == again and first != other
    labels = Shards(tmp_path / "1/train").labels
    assert sorted(labels) == sorted(Synthetic(40, 8).labels) and labels.tolist() != Synthetic(40, 8).labels.tolist()


def test_what_cannot_be_written_leaves_nothing(images, tmp_path):
    (tmp_path / "out/train").mkdir(parents=True)
    with pytest.raises(FileExistsError):
        write_shards(images, tmp_path / "out/train", 2)

    def interrupt(done: int):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(images, tmp_path / "out/val", 2, advance=interrupt)
    (tmp_path / "images" / images.name(0)).unlink()
    with pytest.raises(UnreadableImage, match="No such file"):  # as from a disk that is gone: not a smaller data set
        write_shards(images, tmp_path / "out/val", 2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files open
@pytest.mark.skipif(importlib.util.find_spec("webdataset") is None, reason="webdataset is not installed")
def test_webdataset_reads_what_we_write_and_the_other_way_round(images, tmp_path):
    import webdataset  # pyright: ignore[reportMissingImports]

    write_shards(images, tmp_path / "ours/train", 10)
    ours = Shards(tmp_path / "ours/train")
    theirs = list(webdataset.WebDataset(str(tmp_path / "ours/train/train-000000.tar"), shardshuffle=False))
    assert [int(sample["cls"]) for sample in theirs] == ours.labels.tolist()
    read = [next(value for name, value in sample.items() if name in ("jpg", "png")) for sample in theirs]
    assert read == [ours.read(index) for index in range(len(ours))]

    (tmp_path / "theirs").mkdir()
    with webdataset.TarWriter(str(tmp_path / "theirs/0.tar")) as writer:
        for index in range(len(ours)):
            writer.write({"__key__": f"k{index}", "jpg": ours.read(index), "cls": int(ours.labels[index])})
    again = Shards(tmp_path / "theirs")
    assert again.labels.tolist() == ours.labels.tolist()
    assert decode(again.read(2)).size == ours.open(2).size


def test_field_members_are_read_by_their_last_extension_or_counted(tmp_path):
    members = [
        ("a.cls", b"1"), ("a.image.jpg", content(1)),  # the label of the key
        ("b.cls", b"2"), ("b.depth.png", b"depth"), ("b.jpg", content(2)), ("b.json", b"{}"),  # the image called like it
        ("v.1.cls", b"0"), ("v.1.jpg", content(0)), ("v.2.cls", b"1"), ("v.2.jpg", content(4)),  # a dot in names
        ("c.cls", b"2"), ("c.jpg", content(5)), ("c.cls", b"0"), ("c.jpg", content(3)),  # a repeated key
        ("d.cls", b"0"), ("d.psd", b"8BPS"), ("e.txt", b"3"), ("README", b""), ("._f.jpg", b""), ("x/._g.jpg", b""),
        ("w.1.jpg", content(7)), ("w.2.cls", b"1"),  # not the label of this image
    ]  # fmt: skip
    path = write_tar(tmp_path / "train/a.tar", members)
    with tarfile.open(path, "a") as tar:
        for name, kind in (("h.jpg", tarfile.LNKTYPE), ("s.jpg", tarfile.SYMTYPE), ("folder", tarfile.DIRTYPE)):
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "a.image.jpg"
            tar.addfile(header)
    (tmp_path / "train/b.tar.gz").touch()
    os.utime(path, (1e9, 1e9))
    for _ in range(2):
        source = Shards(tmp_path / "train", tmp_path / "cache")
        assert [source.name(i)[6:] for i in range(len(source))] == [
            "a.image.jpg", "b.jpg", "v.1.jpg", "v.2.jpg", "c.jpg", "w.1.jpg"
        ]  # fmt: skip
        assert source.labels.tolist() == [1, 2, 0, 1, 2, -1]
        assert [source.read(i) for i in range(5)] == [content(number) for number in (1, 2, 0, 4, 5)]
        assert dict(source.passed_over) == {
            "second image of a key": 2, "second .cls of a key": 1, ".json": 1, ".txt": 1, ".psd": 1, "no extension": 1,
            ".cls without an image": 2, "hard link": 1, "link": 1, ".tar.gz": 1
        }  # fmt: skip
    source = Shards(tmp_path / "train", tmp_path / "cache")
    assert describe_source(source).startswith(
        "6 images, 3 classes, 1 of them without a label (12 files passed over: 2 .cls"
    )
    write_index(tmp_path / "train", [])
    assert Shards(tmp_path / "train").passed_over == source.passed_over


def test_field_an_index_of_an_earlier_version(folder):
    index = dict(np.load(folder / INDEX))
    np.savez(folder / INDEX, **{name: array for name, array in index.items() if not name.startswith("passed_over")})
    assert_whole(Shards(folder))
    assert not Shards(folder).passed_over
