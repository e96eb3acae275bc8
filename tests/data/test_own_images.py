"""Tests folders without classes, file_list.py and subset.py: own images, with or without labels, all of them or a part."""

import os
import pickle
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossbatch.data.sources import describe_source, has_evaluation_split, open_source, prepare
from crossbatch.data.sources.file_list import FileList
from crossbatch.engine.datasets import checksum


def write(folder: Path, *names: str) -> Path:
    """Write an image of its own colour under each name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (10 * number, 0, 0)).save(folder / name)
    return folder


def names(source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


NESTED = ("b.png", "a/x.png", "a/deep/er/y.JPEG", "2024/01/z.png")


@pytest.mark.parametrize("where", ["", "train"])
def test_images_without_classes(tmp_path, where):
    """Directly in a folder or in its train/; in any nesting only where there is no train/, as those would be classes."""
    flat = ("1.png", "2.png")
    write(tmp_path / where, *(flat if where else NESTED))
    source = pickle.loads(pickle.dumps(open_source(tmp_path)))
    assert names(source) == sorted(flat if where else NESTED)
    assert not source.has_labels and source.labels.tolist() == [0] * len(source)
    assert source.open(0).mode == "RGB" and not has_evaluation_split(tmp_path)
    name = where or tmp_path.name
    assert describe_source(source) == f"{len(source)} images, no labels in {name}/"


def test_a_folder_of_classes_stays_one(tmp_path):
    write(tmp_path / "train", "a/1.png", "b/1.png", "loose.png")
    source = open_source(tmp_path)
    assert source.has_labels and source.labels.tolist() == [0, 1]
    assert "1 files passed over: 1 .png outside class folders" in describe_source(source)


def test_shards_directly_in_a_folder(tmp_path):
    from crossbatch.data.sources.shard_writer import write_shards

    write_shards(open_source(write(tmp_path / "images", *NESTED)), tmp_path / "shards", images_per_shard=2)
    source = open_source(tmp_path / "shards")
    assert len(source) == 4 and not source.has_labels


def test_a_kept_listing_with_classes_is_not_taken_for_one_without(tmp_path):
    """As in a run that goes on with `--data DIR/train` instead of `--data DIR`."""
    write(tmp_path / "data/train", "a/1.png", "b/1.png")
    hour_ago = time.time() - 3600
    for folder in [*tmp_path.glob("data/**/")]:
        os.utime(folder, (hour_ago, hour_ago))
    for path, has_labels in 2 * [(tmp_path / "data", True), (tmp_path / "data/train", False)]:
        prepare(path, tmp_path / "cache")
        source = open_source(path, cache=tmp_path / "cache")
        assert (source.has_labels, source.labels.tolist()) == (has_labels, [0, int(has_labels)])
    assert names(open_source(tmp_path / "data/train", cache=tmp_path / "cache")) == ["a/1.png", "b/1.png"]


LISTS = {
    "text.txt": "a/1.png\tcat\n\nb 2.png\tdog\na/3.png\tcat\n",
    "table.csv": 'id,label,path\n7,cat,a/1.png\n8,dog,"b 2.png"\n\n9,cat,a/3.png\n',
    "table.tsv": "path\tlabel\na/1.png\tcat\nb 2.png\tdog\na/3.png\tcat\n",
    "byte_order_mark.csv": "\ufeffpath,label\r\na/1.png,cat\r\nb 2.png,dog\r\na/3.png,cat\r\n",
}
IMAGES = ("a/1.png", "b 2.png", "a/3.png", "unlisted.png")


@pytest.mark.parametrize("file", LISTS)
def test_lists(tmp_path, file):
    write(tmp_path, *IMAGES)
    (tmp_path / file).write_text(LISTS[file], newline="")
    source = pickle.loads(pickle.dumps(open_source(f"list://{tmp_path / file}")))
    assert names(source) == [*IMAGES[:3]]
    assert (source.class_names, source.labels.tolist()) == (["cat", "dog"], [0, 1, 0])
    assert source.open(1).getpixel((0, 0)) == (10, 0, 0)
    assert source.read(2) == (tmp_path / "a/3.png").read_bytes()
    assert describe_source(source) == f"3 images, 2 classes in {file}"


def test_a_list_in_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow  # pyright: ignore[reportMissingImports]

    write(tmp_path, *IMAGES)
    table = pyarrow.table({"file": IMAGES, "label": pyarrow.array(["x", "y", "x", "y"]).dictionary_encode()})
    parquet.write_table(table, tmp_path / "l.parquet")
    source = open_source(f"list://{tmp_path}/l.parquet?image=file")
    assert names(source) == [*IMAGES] and source.class_names == ["x", "y"] and source.labels.tolist() == [0, 1, 0, 1]
    for column, message in (("nose", "has no column 'nose'; it has: file, label"), ("path", "no column 'path'")):
        with pytest.raises(ValueError, match=message):
            open_source(f"list://{tmp_path}/l.parquet?image={column}")
    parquet.write_table(pyarrow.table({"path": [{"bytes": b"x", "path": "y"}]}), tmp_path / "inside.parquet")
    with pytest.raises(ValueError, match=r"column 'path' holds struct<.*give hf://"):
        open_source(f"list://{tmp_path}/inside.parquet")
    (tmp_path / "l.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"l.parquet cannot be read: "):
        open_source(f"list://{tmp_path}/l.parquet")


def test_a_list_in_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "l.parquet").touch()
    with pytest.raises(ValueError, match=r"needs pyarrow .*pip install 'crossbatch\[hf\]'"):
        open_source(f"list://{tmp_path}/l.parquet")


def test_numbers_in_a_list_are_labels_as_they_are(tmp_path):
    """As in ImageNet's lists for Caffe, with spaces; a path may hold spaces and a number, too."""
    write(tmp_path, "a.png", "b 7.png", "c.png")
    (tmp_path / "l.txt").write_text("a.png 10\nb 7.png   2\nc.png 10\n")
    source = open_source(f"list://{tmp_path}/l.txt")
    assert names(source) == ["a.png", "b 7.png", "c.png"] and source.labels.tolist() == [10, 2, 10]
    assert source.class_names == [str(number) for number in range(11)]


def test_a_list_without_labels_and_absolute_paths(tmp_path):
    write(tmp_path / "images", "a 7.png", "名.png")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/l.txt").write_text("".join(f"{tmp_path}/images/{name}\n" for name in ("名.png", "a 7.png")))
    source = open_source(f"list://{tmp_path}/lists/l.txt")
    assert not source.has_labels and source.open(0).getpixel((0, 0)) == (10, 0, 0)
    assert not has_evaluation_split(f"list://{tmp_path}/lists/l.txt")


def test_a_list_to_evaluate_on(tmp_path):
    """Its labels are those of training, by name: here `dog` is its first class and the second of training."""
    write(tmp_path, *IMAGES)
    (tmp_path / "train.csv").write_text("path,label\na/1.png,cat\nb 2.png,dog\n")
    (tmp_path / "val.txt").write_text("unlisted.png\tdog\n")
    path = f"list://{tmp_path}/train.csv?eval=val.txt"
    assert has_evaluation_split(path) and open_source(path, "eval").labels.tolist() == [1]
    assert open_source(path, "eval").class_names == ["cat", "dog"]
    (tmp_path / "val.txt").write_text("unlisted.png\tcow\n")
    with pytest.raises(
        ValueError, match=r"different classes \(only in .*train.csv: cat, dog; only in .*val.txt: cow\)"
    ):
        open_source(path, "eval")
    (tmp_path / "val.txt").write_text("unlisted.png 1\n")
    with pytest.raises(ValueError, match=r"has the numbers 1; names and numbers cannot be matched"):
        open_source(path, "eval")
    (tmp_path / "val.txt").write_text("unlisted.png\n")
    with pytest.raises(ValueError, match=r"the images in .*val.txt have no labels"):
        open_source(path, "eval")
    with pytest.raises(ValueError, match=r"name those to evaluate on: list://.*train.csv\?eval=FILE"):
        open_source(f"list://{tmp_path}/train.csv", "eval")


CLASSES = 12  # more than ten: as text, 10 sorts before 2
SPELT = {
    "names": [f"class {number:02d}" for number in range(CLASSES)],
    "numbers": [str(number) for number in range(CLASSES)],
    "padded numbers": [f"{number:03d}" for number in range(CLASSES)],
}


@pytest.mark.parametrize("evaluation", SPELT)
@pytest.mark.parametrize("train", SPELT)
def test_field_an_image_has_one_label_in_every_pair_of_lists(tmp_path, train, evaluation):
    """The second list lacks the first class, so that positions say nothing; folders and shards are in test_sources.py."""
    write(tmp_path, *(f"{number}.png" for number in range(CLASSES)))
    for file, spelt, start in (("train.csv", train, 0), ("val.csv", evaluation, 1)):
        lines = [f"{number}.png,{label}\n" for number, label in enumerate(SPELT[spelt])]
        (tmp_path / file).write_text("path,label\n" + "".join(lines[start:]))
    path = f"list://{tmp_path}/train.csv?eval=val.csv"
    if "names" in (train, evaluation) and train != evaluation:
        with pytest.raises(ValueError, match=r"has the n.*class 0\d, .*; names and numbers cannot be matched"):
            open_source(path, "eval")
        return
    first, second = open_source(path), open_source(path, "eval")
    labels = {first.name(i): first.labels[i] for i in range(CLASSES)}
    assert len({*labels.values()}) == CLASSES and labels.pop("0.png") == 0
    assert {second.name(i): second.labels[i] for i in range(CLASSES - 1)} == labels
    assert first.class_names == second.class_names


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("l.txt", "", r"l.txt lists no images; allowed: one image a line"),
        ("l.txt", "a.png\na.png\n", r"l.txt, line 2: a.png is in line 1 already; remove one"),
        ("l.txt", "a.png\tx\nb.png\n", r"l.txt, line 2: b.png has no label, those before it have a label"),
        ("l.txt", "a.png\nb.png\tx\n", r"l.txt, line 2: b.png has a label, those before it have no label"),
        ("l.txt", "a.png 1\nb.png -3\n", r"line 2: b.png -3 has no label"),
        ("l.txt", "a.png\t1\nb.png\t-3\n", r"l.txt: labels out of range: 1, the first -3; allowed: .*0 to 999999"),
        ("l.txt", "a.png\t1000000\n", r"l.txt: labels out of range: 1, the first 1000000"),
        ("l.txt", "a.png\n\tx\n", r"l.txt, line 2: no path"),
        ("l.txt", "a\0.png\n", r"l.txt, line 1: a zero byte in the path"),
        ("l.txt", "nowhere/a.png\n", r"no such file: .*nowhere/a.png .paths looked for: 1, found: none.*relative to"),
        ("l.csv", "", r"l.csv has no column 'path'; it has: none"),
        (
            "l.csv",
            "file,label\na.png,x\n",
            r"l.csv has no column 'path'; it has: file, label; .*\?image=file,label=class",
        ),
        ("l.csv", "path,label\na.png\n", r"l.csv, line 2: 1 columns, but the first line has 2; correct"),
        ("l.csv", 'path\n"a.png\n', r"l.csv, line 2: unexpected end of data; correct"),
        ("l.csv?label=breed", "path,label\na.png,x\n", r"l.csv has no column 'breed'; it has: path, label"),
        ("l.txt?label=breed", "a.png\n", r"is a text file without columns; leave out image= and label="),
        ("l.csv/x", "path\na.png", "does not exist"),
        ("", "", "is a folder; give a text file"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, file, content, message):
    write(tmp_path, "a.png", "b.png")
    if file:
        (tmp_path / file[:5]).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_source(f"list://{tmp_path}/{file}")


def test_the_hash_of_a_list_is_in_the_checksum_of_the_data(tmp_path):
    """Also of a change that the images and labels do not show."""
    write(tmp_path, "a.png", "b.png")
    file = tmp_path / "l.csv"
    file.write_text("path,note\na.png,x\nb.png,y\n")
    first = checksum(FileList(file))
    assert checksum(FileList(file)) == first
    file.write_text("path,note\na.png,x\nb.png,z\n")
    assert checksum(FileList(file)) != first


@pytest.mark.parametrize("module", [None, types.ModuleType("datasets")], ids=["none", "a folder called datasets"])
def test_hugging_face_data_without_datasets(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "datasets", module)
    for function in (open_source, prepare, has_evaluation_split):
        with pytest.raises(ValueError, match=r"^hf:// needs `datasets` \(.*pip install 'crossbatch\[hf\]'"):
            function(f"hf://{tmp_path}")


@pytest.fixture
def unbalanced(tmp_path) -> Path:
    """Write 40 images of a class, 10 of another, and 3 of a third."""
    counts = {"many": 40, "some": 10, "few": 3}
    return write(
        tmp_path / "data/train", *(f"{name}/{i:02d}.png" for name, n in counts.items() for i in range(n))
    ).parent


def test_subsets_take_the_same_share_of_each_class(unbalanced):
    whole = open_source(unbalanced)
    tenth, half = (open_source(f"{unbalanced}?fraction={fraction}") for fraction in (0.1, 0.5))
    assert np.bincount(tenth.labels).tolist() == [1, 4, 1]  # few, many, some: at least one of each
    assert np.bincount(half.labels).tolist() == [2, 20, 5]
    assert tenth.class_names == whole.class_names and set(names(tenth)) < set(names(half)) < set(names(whole))
    assert names(half) == sorted(names(half))
    of_name = {whole.name(i): whole.open(i).getpixel((0, 0)) for i in range(len(whole))}
    assert all(half.open(i).getpixel((0, 0)) == of_name[half.name(i)] for i in range(len(half)))
    assert describe_source(half) == "27 images, 3 classes, chosen of 53 by fraction=0.5, seed=0 in train/"
    assert len(open_source(f"{unbalanced}?fraction=1")) == 53


def test_subsets_of_so_many_of_each_class(unbalanced):
    source = open_source(f"{unbalanced}?per_class=5,seed=3")
    assert np.bincount(source.labels).tolist() == [3, 5, 5]
    assert describe_source(source).endswith("chosen of 53 by per_class=5, seed=3; 1 classes have fewer in train/")
    others = {frozenset(names(open_source(f"{unbalanced}?per_class=5,seed={seed}"))) for seed in range(20)}
    assert len(others) == 20


def test_a_subset_is_the_same_on_every_machine():
    """The indices are written out: another order of the same numbers would change the data of published splits."""
    source = open_source("synthetic://200?classes=2,per_class=4,seed=1")
    assert source.labels.tolist() == [0, 0, 1, 0, 1, 0, 1, 1]
    assert [int(name[-3:]) for name in names(source)] == [50, 66, 69, 80, 115, 132, 141, 193]


def test_subsets_and_what_they_are_of(unbalanced, tmp_path):
    checksums = {checksum(open_source(f"{unbalanced}{query}")) for query in ("", "?per_class=2", "?per_class=2,seed=1")}
    assert len(checksums) == 3
    write(unbalanced / "val", "few/v.png", "many/v.png")
    assert len(open_source(f"{unbalanced}?per_class=1", "eval")) == 2  # all of them
    flat = write(tmp_path / "flat", *(f"{i}.png" for i in range(20)))
    assert len(open_source(f"{flat}?fraction=0.25")) == 5
    with pytest.raises(ValueError, match="per_class needs labels, and these images have none"):
        open_source(f"{flat}?per_class=2")
    (tmp_path / "is it?seed=1").mkdir()
    assert len(open_source(write(tmp_path / "is it?seed=1", "1.png"))) == 1
