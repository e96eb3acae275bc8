"""launch/embed.py: the features of every image, whatever the number of ranks and interruptions, and what it refuses."""

import csv
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from crossbatch.data import evaluation_share, open_source, prepare
from crossbatch.data.augment.parameters import normalize
from crossbatch.engine.config import load_config
from crossbatch.engine.config.evaluation import EmbedConfig
from crossbatch.engine.evaluation import embedding
from crossbatch.engine.pretrained.load import load_pretrained
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.launch import embed
from tests.commands import caller


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> str:
    path = f"shapes://{tmp_path_factory.mktemp('embed') / 'images'}?train=30&val=24&size=16"
    prepare(path)
    return path


call = caller(embed)


@torch.no_grad()
def by_hand(checkpoint: Path, shapes: str, split: str = "train") -> np.ndarray:
    source = open_source(shapes, split)
    pixels = [torch.from_numpy(np.array(source.open(i))).movedim(-1, 0) for i in range(len(source))]
    return load_pretrained(checkpoint).backbone.eval()(normalize(torch.stack(pixels))).numpy()


def test_every_image_has_its_row(monkeypatch, capsys, tiny_runs, shapes, tmp_path):
    output = tmp_path / "new" / "features.npy"
    arguments = ["--checkpoint", tiny_runs("resnet"), "--data", shapes, "--output", output, "-j", 0]
    assert call(monkeypatch, *arguments, "--split", "eval") == 0
    assert "24 features of 64 numbers" in capsys.readouterr().out
    np.testing.assert_allclose(np.load(output), by_hand(tiny_runs("resnet"), shapes, "eval"), atol=1e-5)
    rows = list(csv.reader(output.with_suffix(".csv").read_text().splitlines()))
    source = open_source(shapes, "eval")
    assert rows == [["index", "path"], *([str(i), source.name(i)] for i in range(24))]
    assert sorted(path.name for path in output.parent.iterdir()) == ["features.csv", "features.npy"]
    assert call(monkeypatch, *arguments) == 2
    assert "exists already" in capsys.readouterr().err
    output.unlink()  # the list of another table, maybe
    assert call(monkeypatch, *arguments) == 2
    assert f"--output: {output.with_suffix('.csv')} exists already" in capsys.readouterr().err


def every_nth(size: int, world_size: int, rank: int) -> np.ndarray:
    """Share images as a sampler would that deals them out, not in runs as `evaluation_share`."""
    return np.arange(rank, size, world_size)


def embed_here(checkpoint: str, data: str, output: str, parts: int | None, share: Any = evaluation_share) -> str:
    """Embed on this rank in parts of 8 images; with `parts`, end as a killed command would after so many."""
    settings = [f"crossbatch.model.checkpoint={checkpoint}", f"crossbatch.data.path={data}"]
    config = load_config(None, [*settings, "train_micro_batch_size_per_gpu=3"], EmbedConfig)
    folder, written, write = Path(output).with_name("parts"), [], embedding._write_part
    folder.mkdir(exist_ok=True)

    def counted(folder: Path, start: int, *arrays: np.ndarray) -> None:
        if parts == len(written):
            raise OSError(28, "No space left on device")
        written.append(start)
        write(folder, start, *arrays)

    embedding._write_part = counted
    try:
        with mock.patch("crossbatch.engine.evaluation.features.evaluation_share", share):
            embedding.embed(config, world_from_environment(), torch.device("cpu"), 0, Path(output), folder, "train", 8)
    except (embedding.RunStopped, embedding.InputError) as error:
        return str(error)
    finally:
        embedding._write_part = write
    return json.dumps(written)


def test_an_interrupted_command_goes_on_with_another_number_of_ranks(one_rank, two_ranks, tiny_runs, shapes, tmp_path):
    arguments = str(tiny_runs("resnet")), shapes, str(tmp_path / "features.npy")
    stopped = two_ranks.run(embed_here, *arguments, 2)
    assert all("No space left" in text and "repeat the command" in text for text in stopped)
    assert not (tmp_path / "features.npy").exists() and len(list((tmp_path / "parts").glob("part-*"))) == 2
    assert one_rank.run(embed_here, *arguments, None) == [
        json.dumps([16, 24])
    ]  # the first two parts are not done again
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), by_hand(tiny_runs("resnet"), shapes), atol=1e-5)
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("share", [evaluation_share, every_nth])
def test_rows_are_in_the_order_of_the_images_on_two_ranks(two_ranks, tiny_runs, shapes, tmp_path, share):
    output = tmp_path / "features.npy"
    two_ranks.run(embed_here, str(tiny_runs("resnet")), shapes, str(output), None, share)
    assert [row[0] for row in csv.reader(output.with_suffix(".csv").read_text().splitlines())][1:] == [
        str(i) for i in range(30)
    ]
    np.testing.assert_allclose(np.load(output), by_hand(tiny_runs("resnet"), shapes), atol=1e-5)


def embed_from(checkpoints: list[str], *arguments) -> str:
    return embed_here(checkpoints[world_from_environment().rank], *arguments)


def test_weights_that_one_rank_does_not_find_end_all(two_ranks, tiny_runs, shapes, tmp_path):
    checkpoints = [str(tiny_runs("resnet")), str(tmp_path / "absent")]
    said = two_ranks.run(embed_from, checkpoints, shapes, str(tmp_path / "features.npy"), None)
    assert len({*said}) == 1 and said[0].startswith("rank 1: ") and "absent" in said[0]


def test_parts_of_other_weights_are_refused(tmp_path):
    embedding._parts_left(tmp_path, {"backbone": "a", "images": 3}, range(0, 3, 2))
    with pytest.raises(embedding.InputError, match=r"features of another command \(different: backbone\)"):
        embedding._parts_left(tmp_path, {"backbone": "b", "images": 3}, range(0, 3, 2))


def test_parquet(monkeypatch, tiny_runs, shapes, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    output = tmp_path / "features.parquet"
    assert call(monkeypatch, "--checkpoint", tiny_runs("vit"), "--data", shapes, "--output", output, "-j", 0) == 0
    table = parquet.read_table(output)
    assert table.column_names == ["index", "path", "feature"] and table["index"].to_pylist() == list(range(30))
    features = np.array(table["feature"].to_pylist(), np.float32)
    np.testing.assert_allclose(features, by_hand(tiny_runs("vit"), shapes), atol=1e-5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--output", "x.txt"], "--output: given x.txt; allowed: a name that ends with .npy or .parquet"),
        (["--output", "{tmp}/x.npy"], "crossbatch.data.path: not given; give it with --data DIR"),
        (["--output", "{tmp}/x.npy", "--data", "{tmp}/none"], "crossbatch.data.path"),
        (["--output", f"{__file__}/x.npy", "--data", "x"], "is not a writable folder"),
    ],
)
def test_what_is_refused(monkeypatch, capsys, tiny_runs, tmp_path, given, message):
    arguments = [text.format(tmp=tmp_path) for text in given]
    assert call(monkeypatch, "--checkpoint", tiny_runs("resnet"), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error:") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_pyarrow_is_named(monkeypatch, capsys):
    monkeypatch.setattr(embed.importlib.util, "find_spec", lambda name: None)
    assert call(monkeypatch, "--checkpoint", "x", "--data", "y", "--output", "x.parquet") == 2
    assert "pip install pyarrow" in capsys.readouterr().err
