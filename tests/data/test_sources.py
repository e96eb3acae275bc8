"""Tests open.py and image_folder.py: what is opened, and what is said when it cannot be."""

import os
import pickle
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossbatch.data.decode import BrokenImage, decode
from crossbatch.data.sources import describe_source, has_evaluation_split, image_folder, open_source, prepare
from crossbatch.data.sources.image_folder import ImageFolder
from crossbatch.data.sources.shard_writer import write_shards


def write(path: Path, colour=(200, 30, 60), size=(6, 4), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


@pytest.fixture
def tree(tmp_path) -> Path:
    """Write two classes, b before a on disk, four formats, upper case, a nested folder, and things to ignore."""
    write(tmp_path / "train/b/2.PNG", (0, 0, 255))
    write(tmp_path / "train/b/10.bmp", (0, 255, 0))
    write(tmp_path / "train/a/z.webp", lossless=True)
    write(tmp_path / "train/a/deep/x.JPEG")
    write(tmp_path / "train/a/.hidden.png")
    write(tmp_path / "train/.ipynb_checkpoints/x.png")
    (tmp_path / "train/a/notes.txt").write_text("no image")
    (tmp_path / "train/readme.md").write_text("no class")
    write(tmp_path / "val/a/v.png")
    write(tmp_path / "val/b/v.png")
    return tmp_path


def test_image_folder(tree):
    source = open_source(tree, "train")
    assert source.class_names == ["a", "b"]
    assert source.labels.tolist() == [0, 0, 1, 1] and source.labels.dtype == np.int64
    assert [source.name(i) for i in range(len(source))] == ["a/deep/x.JPEG", "a/z.webp", "b/10.bmp", "b/2.PNG"]
    image = source.open(3)
    assert image.mode == "RGB" and image.size == (6, 4) and image.getpixel((0, 0)) == (0, 0, 255)


def test_an_opened_image_holds_no_file(tree):
    source = open_source(tree, "train")
    image = source.open(0)
    shutil.rmtree(tree)
    assert image.getpixel((1, 1)) is not None
    with pytest.raises(FileNotFoundError):
        source.open(0)


def test_names_beyond_ascii_and_pickling(tmp_path):
    write(tmp_path / "train/名前/ü.png")
    source = pickle.loads(pickle.dumps(open_source(tmp_path, "train")))
    assert source.name(0) == "名前/ü.png" and source.open(0).mode == "RGB"


def test_storage_is_compact(tmp_path):
    """The files' names weigh what their bytes weigh, not what Python strings weigh (50 bytes and more each)."""
    folder = tmp_path / "train/a"
    folder.mkdir(parents=True)
    for number in range(500):
        (folder / f"{number:04d}.jpg").touch()
    source = ImageFolder(tmp_path / "train")
    assert len(pickle.dumps(source)) < 500 * (8 + 8 + 8) + 1000


def test_evaluation_split_prefers_val_then_test(tree):
    assert has_evaluation_split(tree)
    assert open_source(tree, "eval").name(0) == "a/v.png"
    (tree / "val").rename(tree / "test")
    assert has_evaluation_split(tree) and len(open_source(tree, "eval")) == 2
    shutil.rmtree(tree / "test")
    assert not has_evaluation_split(tree)
    with pytest.raises(ValueError, match=r"no folder 'val' or 'validation' or 'test' \(it holds: train\)"):
        open_source(tree, "eval")


def test_read_gives_the_file(tree):
    source = open_source(tree, "train")
    for index in range(4):
        assert source.read(index) == (tree / "train" / source.name(index)).read_bytes()
    (tree / "train/b/2.PNG").write_bytes(b"")
    assert source.read(3) == b""
    with pytest.raises(BrokenImage, match="0 bytes"):
        source.open(3)


def test_synthetic():
    source, again = open_source("synthetic://50?size=24&classes=5", "train"), open_source("synthetic://50", "train")
    assert len(source) == 50 and len(source.class_names) == 5
    assert np.bincount(source.labels).tolist() == [10] * 5
    assert source.open(7).size == (24, 24) and source.open(7).mode == "RGB" and again.open(7).size == (64, 64)
    assert np.array_equal(np.asarray(source.open(7)), np.asarray(source.open(7)))
    assert not np.array_equal(np.asarray(source.open(7)), np.asarray(source.open(12)))  # same class
    evaluation = open_source("synthetic://50?size=24&eval=8", "eval")
    assert len(evaluation) == 8 and has_evaluation_split("synthetic://50")
    assert not np.array_equal(np.asarray(source.open(1)), np.asarray(evaluation.open(1)))


def test_synthetic_images_read_as_bmp():
    source = open_source("synthetic://5?size=24", "train")
    assert np.array_equal(np.asarray(decode(source.read(3))), np.asarray(source.open(3)))


def test_shapes_are_written_by_prepare_only(tmp_path):
    path = f"shapes://{tmp_path}/s?train=16&val=8&size=20"
    assert not has_evaluation_split(path)
    with pytest.raises(ValueError, match="does not exist"):
        open_source(path, "train")
    prepare(path)
    assert has_evaluation_split(path)
    train, evaluation = open_source(path, "train"), open_source(path, "eval")
    assert (len(train), len(evaluation)) == (16, 8) and train.open(0).size == (20, 20)
    assert train.class_names == evaluation.class_names and len(train.class_names) == 8


def test_shapes_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^cannot write .*choose a writable folder"):
        prepare(f"shapes://{tmp_path}/file/s?train=8&val=8")


def test_prepare_leaves_other_paths_alone(tmp_path):
    prepare("synthetic://10")
    prepare(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is empty"),
        ("synthetic://", "needs a number of images"),
        ("synthetic://0", "needs a number of images"),
        ("synthetic://many", "needs a number of images"),
        ("synthetic://10?sise=3", r"unknown option 'sise'.*did you mean 'size'.*allowed: size, classes, eval"),
        ("synthetic://10?size=big", "'size'.*is 'big'; it must be an integer >= 1"),
        ("synthetic://10?size=0", "'size'.*is '0'; it must be an integer >= 1"),
        ("synthetic://10?size", "'size'.*is ''"),
        ("synthetic://10?size=3&size=4", "given twice"),
        ("shapes://?train=9", "needs a folder"),
        ("shapes://x?trian=9", r"did you mean 'train'.*allowed: train, val, size, seed"),
        ("shape://x", r"unknown scheme.*did you mean 'shapes'"),
        ("ftp://bucket", r"unknown scheme.*allowed: a folder, synthetic://..., shapes://..., cifar10://..."),
        ("cifar10://", r"needs a folder, as in cifar10://datasets"),
        ("cifar10://x?size=3", r"unknown option 'size'.*allowed: fraction, per_class, seed"),
        ("cifar://x", r"did you mean 'cifar10'"),
        ("list://", r"needs a file, as in list://train.csv"),
        ("list://x?eval=", r"'eval'.*is ''; it must not be empty"),
        ("synthetic://10?fraction=0", r"'fraction'.*is '0'; it must be a number above 0 and at most 1"),
        ("synthetic://10?fraction=1.5", r"'fraction'.*is '1.5'; it must be a number above 0 and at most 1"),
        ("synthetic://10?fraction=nan", r"'fraction'.*is 'nan'; it must be a number"),
        ("synthetic://10?per_class=0", r"'per_class'.*is '0'; it must be an integer >= 1"),
        ("synthetic://10?per_class=1,fraction=0.5", r"both fraction and per_class; give one"),
        ("synthetic://10?seed=1", r"'seed'.*needs fraction or per_class"),
        ("somewhere?fractoin=0.1", r"unknown option 'fractoin'.*did you mean 'fraction'"),
    ],
)
def test_malformed_paths(path, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        open_source(path, "train")


@pytest.mark.parametrize("path", [None, 7])
def test_a_path_that_is_none(path):
    for function in (open_source, prepare, has_evaluation_split):
        with pytest.raises(
            TypeError, match=rf"`path` is a {type(path).__name__}; it must be a str or a Path; give a folder"
        ):
            function(path)


def rejected(path: Path, split: str = "train") -> str:
    with pytest.raises(ValueError) as caught:
        open_source(path, split)
    assert str(caught.value).startswith(f"{path}")
    return str(caught.value)


def test_missing_path(tmp_path):
    message = rejected(tmp_path / "absent")
    assert "does not exist" in message and "absent/train/<class>/<image>.jpg" in message
    assert "does not exist" in rejected(Path("~nobody-has-this-name/images"))


def test_path_is_a_file(tmp_path):
    (tmp_path / "images.tar").touch()
    assert "is a file; give a folder" in rejected(tmp_path / "images.tar")


def test_no_train_folder(tmp_path):
    root = tmp_path / "x"
    write(root / "val/cats/1.png")
    message = rejected(root)
    assert "no folder 'train' (it holds: val)" in message and "/train/<class>/" in message
    (root / "val").rename(root / "train")
    assert f"no folder 'train', but {root} has; give {root}" in rejected(tmp_path)


def test_empty_train_folder(tmp_path):
    (tmp_path / "train").mkdir()
    assert "has no class folders" in rejected(tmp_path)


def test_class_folders_without_images(tmp_path):
    write(tmp_path / "train/full/1.png")
    for number in range(7):
        (tmp_path / f"train/empty{number}").mkdir()
    with pytest.raises(ValueError, match=r"7 of 8 class folders.*: empty0, empty1, empty2, empty3, empty4, \.\.\.;"):
        open_source(tmp_path, "train")


def test_shards_and_folders_side_by_side(tree):
    (tree / "train/x.tar").touch()
    assert "train holds tar files (x.tar, ...) and folders (a, ...)" in rejected(tree)


def test_cifar_in_a_folder(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    assert f"give cifar100://{tmp_path}" in rejected(tmp_path)


def as_shards(tree: Path, split: str, with_names: bool):
    """Replace a split of the tree by shards."""
    images = (tree / split).rename(tree / "images")
    write_shards(ImageFolder(images), tree / split, images_per_shard=3)
    shutil.rmtree(images)
    if not with_names:
        (tree / split / "index.npz").unlink()


@pytest.mark.parametrize(
    ("splits", "with_names"),
    [(("train",), True), (("val",), True), (("train", "val"), True), (("train", "val"), False)],
)
def test_shards_in_place_of_folders(tree, splits, with_names):
    folder = open_source(tree, "train")
    expected = sorted(zip(map(folder.read, range(4)), folder.labels.tolist(), strict=True))
    for split in splits:
        as_shards(tree, split, with_names)
    train, evaluation = open_source(tree, "train"), open_source(tree, "eval")
    read = [train.open(i).getpixel((0, 0)) for i in range(4)]
    assert has_evaluation_split(tree) and len(evaluation) == 2
    assert sorted(zip(read, train.labels.tolist(), strict=True)) == sorted(
        (decode(encoded).getpixel((0, 0)), label) for encoded, label in expected
    )
    assert evaluation.class_names == (["0", "1"] if not with_names else ["a", "b"])


def test_shards_with_other_classes(tree):
    write(tree / "val/c/v.png")
    as_shards(tree, "val", with_names=True)
    with pytest.raises(ValueError, match=r"different classes \(only in .*val: c\)"):
        open_source(tree, "eval")
    as_shards(tree, "train", with_names=False)
    (tree / "val/index.npz").unlink()
    with pytest.raises(ValueError, match=r"different classes \(only in .*val: 2\)"):
        open_source(tree, "eval")


CLASSES = 12  # more than ten: as text, 10 sorts before 2
FORMS = {  # of a split: names of the class folders, and whether it is written as shards, with an index of the names
    "folders": ([f"class {number:02d}" for number in range(CLASSES)], False, True),
    "numbered folders": ([str(number) for number in range(CLASSES)], False, True),
    "padded folders": ([f"{number:03d}" for number in range(CLASSES)], False, True),
    "shards": ([f"class {number:02d}" for number in range(CLASSES)], True, True),
    "shards of numbered folders": ([str(number) for number in range(CLASSES)], True, True),
    "numbered shards": ([f"{number:03d}" for number in range(CLASSES)], True, False),
}


@pytest.fixture(scope="module")
def forms(tmp_path_factory) -> dict[str, Path]:
    """Write the same images, one of each class, in every form that a split can have."""
    root, folders = tmp_path_factory.mktemp("forms"), {}
    for form, (names, is_sharded, with_names) in FORMS.items():
        folders[form] = root / form
        for number, name in enumerate(names):
            write(root / "images" / form / name / "x.png", (20 * number, 0, 0))
        if is_sharded:
            write_shards(ImageFolder(root / "images" / form), folders[form], images_per_shard=5)
            if not with_names:
                (folders[form] / "index.npz").unlink()
        else:
            (root / "images" / form).rename(folders[form])
    return folders


@pytest.mark.parametrize("evaluation", FORMS)
@pytest.mark.parametrize("train", FORMS)
def test_field_an_image_has_one_label_in_every_pair_of_sources(forms, tmp_path, train, evaluation):
    (tmp_path / "train").symlink_to(forms[train])
    (tmp_path / "val").symlink_to(forms[evaluation])
    numbers, spelt = "numbered shards", (FORMS[train][0][3], FORMS[evaluation][0][3])
    kinds = {train, evaluation}
    if numbers in kinds and kinds & {"folders", "shards"}:
        with pytest.raises(ValueError, match=r"has the n.*class 00, .*; names and numbers cannot be matched") as caught:
            open_source(tmp_path, "eval")
        assert "the numbers 0, 1, 2, 3, 4, ..." in str(caught.value)
        return
    if numbers not in kinds and spelt[0] != spelt[1]:
        with pytest.raises(ValueError, match=r"different classes \(only in .*train: .*; only in .*val: "):
            open_source(tmp_path, "eval")
        return
    sources = open_source(tmp_path, "train"), open_source(tmp_path, "eval")
    trained, evaluated = (
        {source.open(i).getpixel((0, 0)): int(source.labels[i]) for i in range(len(source))} for source in sources
    )
    assert trained == evaluated and len(trained) == CLASSES
    assert sources[0].class_names == sources[1].class_names
    assert {source.name(0)[-3:] for source in sources} == {"png"}  # a file is still called as it is


def test_field_evaluation_images_of_some_classes(tree):
    shutil.rmtree(tree / "val/a")
    assert open_source(tree, "eval").labels.tolist() == [1] and open_source(tree, "eval").class_names == ["a", "b"]
    as_shards(tree, "val", with_names=True)
    assert open_source(tree, "eval").labels.tolist() == [1]


def test_field_two_names_that_are_one_number(tree):
    as_shards(tree, "val", with_names=False)
    for old, new in (("a", "1"), ("b", "01")):
        (tree / "train" / old).rename(tree / "train" / new)
    with pytest.raises(ValueError, match=r"the names 01, 1, .*two names are the same number; rename one"):
        open_source(tree, "eval")


def test_shards_without_labels_train_but_do_not_evaluate(tree):
    shutil.rmtree(tree / "train")
    (tree / "train").mkdir()
    with tarfile.open(tree / "train/x.tar", "w") as tar:
        tar.add(tree / "val/a/v.png", "0.png")
    assert open_source(tree, "train").open(0).mode == "RGB"
    with pytest.raises(ValueError, match=r"the images in .*train have no labels .*move the evaluation images away"):
        open_source(tree, "eval")


def test_prepare_lists_for_all_others(tree, tmp_path, monkeypatch):
    hour_ago = time.time() - 3600
    for folder in [*tree.rglob("*/"), tree]:
        os.utime(folder, (hour_ago, hour_ago))
    prepare(tree, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(image_folder, "_list", None)
    assert len(open_source(tree, "train", cache=tmp_path / "cache")) == 4
    assert len(open_source(tree, "eval", cache=tmp_path / "cache")) == 2


def test_different_classes_in_train_and_eval(tree):
    write(tree / "val/c/v.png")
    shutil.rmtree(tree / "val/b")
    with pytest.raises(ValueError, match=r"different classes \(only in .*train: b; only in .*val: c\)"):
        open_source(tree, "eval")


def test_a_split_that_is_none():
    with pytest.raises(ValueError, match="train, eval"):
        open_source("synthetic://10", "test")


def test_field_what_is_passed_over_is_counted(tree, tmp_path):
    """Of a folder: other formats, files outside of classes, links to other classes; from the kept listing, too."""
    for name in ("1.psd", "2.PSD", "3.svg", "4.ppm", "5.exr", "6.jfif", "7.jpe", "8.dng", "none"):
        (tree / "train/a" / name).touch()
    (tree / "train/flat.jpg").touch()
    (tree / "train/old.tar.gz").touch()
    (tree / "elsewhere/more").mkdir(parents=True)
    write(tree / "elsewhere/more/w.png")
    for name, target in (("part2", "elsewhere"), ("b", "train/b"), ("up", "train"), ("far up", ".")):
        (tree / "train/a" / name).symlink_to(tree / target)
    words = (
        "5 images, 2 classes (16 files passed over: 3 links out of a class folder, 2 .psd, 1 .dng, 1 .exr, 1 .jfif, 1 .jpe, "
        "1 .jpg outside class folders, 1 .md, 1 .ppm, 1 .svg, 1 .tar.gz, 1 .txt, 1 no extension) in train/"
    )
    hour_ago = time.time() - 3600
    for folder in [*tree.glob("**/"), tree / "elsewhere/more"]:
        os.utime(folder, (hour_ago, hour_ago))
    for _ in range(2):
        source = open_source(tree, cache=tmp_path / "cache")
        assert describe_source(source) == words
    source = open_source(tree, cache=tmp_path / "cache")
    assert [source.name(i) for i in range(5)][:3] == ["a/deep/x.JPEG", "a/part2/more/w.png", "a/z.webp"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1]
    shutil.rmtree(tree / "val/a")
    assert describe_source(open_source(tree, "eval")) == "1 images, 1 classes of 2 (none of a) in val/"


def test_field_a_folder_named_validation(tree):
    (tree / "val").rename(tree / "validation")
    assert has_evaluation_split(tree) and open_source(tree, "eval").name(0) == "a/v.png"


def test_field_what_a_folder_without_images_holds(tree):
    shutil.rmtree(tree / "train")
    (tree / "train").mkdir()
    for name in ("1.tar.gz", "2.tar.gz"):
        (tree / "train" / name).touch()
    assert "has no class folders and no images (it holds 2 .tar.gz); allowed" in rejected(tree)
    (tree / "train/a").mkdir()
    (tree / "train/a/1.psd").touch()
    said = rejected(tree)
    assert "hold no images (.jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff, .gif, .jp2, .avif" in said
    assert "): a; fill or remove them (passed over: 2 .tar.gz, 1 .psd)" in said


def test_field_other_files_have_another_checksum(tree):
    """Of as many images with the same labels; at another path the same files are the same."""
    first = ImageFolder(tree / "train").checksum
    (tree / "train").rename(tree / "moved")
    assert ImageFolder(tree / "moved").checksum == first
    (tree / "moved/a/z.webp").rename(tree / "moved/a/y.webp")
    assert ImageFolder(tree / "moved").checksum != first
