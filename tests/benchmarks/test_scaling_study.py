"""Rows of a scaling study: measured on real ranks, read back, fitted, and what is wrong with others."""

import argparse
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks.measure import append
from benchmarks.rows import read
from benchmarks.scaling import command
from benchmarks.scaling.rank import measure, row_of, whole_bytes
from crossbatch import InputError
from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.planning.plan import Question, plan
from crossbatch.engine.runtime.world import World, world_from_environment

TINY = [
    "train_batch_size=8",
    "crossbatch.batchformer.group_size=4",
    "crossbatch.model.arch=resnet18",
    "crossbatch.model.stem=small",
    'crossbatch.model.backbone_args={"width": 8}',
    "crossbatch.model.mlp_dim=16",
    "crossbatch.model.dim=8",
    "crossbatch.data.image_size=8",
]


def row_on_this_rank():
    world = world_from_environment()
    run = resolve(load_config("ds_configs/bs4096.json", TINY), world.size, Device("cpu"))
    times, traffic = measure(run, torch.device("cpu"), 2)
    given = argparse.Namespace(recipe="ds_configs/bs4096.json", set=TINY, strong=True)
    return row_of(run, world, given, times, traffic)


@pytest.mark.long
def test_rows_of_real_ranks(pools, tmp_path, capsys):
    for ranks in (1, 2):
        append(tmp_path / "scaling.jsonl", "scaling", [pools(ranks).run(row_on_this_rank)[0]])
    one, two = read(tmp_path).rows
    for row, ranks in ((one, 1), (two, 2)):
        facts = row["settings"]
        assert (facts["ranks"], facts["mode"], facts["predicted"]) == (ranks, "strong", False)
        assert row["unit"] == "images/s" and row["p50"] == pytest.approx(8000 / facts["step_ms"], rel=1e-6)
        assert facts["collectives"].keys() == facts["collectives_predicted"].keys()
        for kind, counted in facts["collectives"].items():
            assert counted["bytes"] == pytest.approx(facts["collectives_predicted"][kind]["bytes"], rel=0.02)
        assert facts["config"]["train_batch_size"] == 8
    assert one["settings"]["collectives"] == {} and two["settings"]["collectives"]["all-reduce"]["calls"] > 10
    command.main(["efficiency", str(tmp_path)])
    said = capsys.readouterr().out
    calls = sum(kind["calls"] for kind in two["settings"]["collectives"].values())
    assert "100 %" in said and f"{calls}, " in said and "collectives" in said


def written(folder: Path, rates: dict[int, float], gpu: str | None = None, mode: str = "weak") -> Path:
    """Rows as a study of these sizes would write them."""
    path = folder / "scaling.jsonl"
    for ranks, rate in rates.items():
        facts = {
            "recipe": "ds_configs/bs4096.json",
            "overrides": [],
            "mode": mode,
            "ranks": ranks,
            "nodes": 1,
            "predicted": False,
            "step_ms": 1000 * 32 * ranks / rate,
            "collectives": {} if ranks == 1 else {"all-reduce": {"calls": 100, "bytes": 10**7}},
            "config": {"train_batch_size": 32 * ranks},
        }
        machine = {"cpu": "a CPU", "cores": 4, "threads": 1, "gpus": [gpu] * ranks if gpu else []}
        row = {"version": 2, "stage": "scaling", "case": f"{ranks} ranks", "machine": machine, "settings": facts}
        row |= {"p20": rate, "p50": rate, "p80": rate, "n": 5, "unit": "images/s", "baseline": None, "ratio": None}
        with path.open("a") as file:
            file.write(json.dumps({**row, "time": None, "effort": "full"}) + "\n")
    return path


@pytest.mark.parametrize(
    ("card", "known"),
    [pytest.param("Tesla V100-SXM2-32GB", True, marks=pytest.mark.slow), ("NVIDIA Unheard-of", False)],
)
def test_gpus_of_the_catalogue_are_predicted_as_a_plan_would(monkeypatch, card, known):
    monkeypatch.setattr("crossbatch.engine.planning.plan._helps", lambda *_: ())  # each is a plan of its own
    overrides = ["train_batch_size=512", "train_micro_batch_size_per_gpu=256"]
    run = resolve(load_config("ds_configs/bs4096.json", overrides), 2, Device("cuda", False, card))
    given = argparse.Namespace(recipe="ds_configs/bs4096.json", set=overrides, strong=True)
    facts = row_of(run, World(0, 2, 0, 2), given, [1.5, 1.6], Counter()).settings
    assert ("images_per_s_predicted" in facts) == known
    if known:
        planned = plan(Question(given.recipe, tuple(overrides), "v100-32g", 2)).images_per_s[1]
        assert facts["images_per_s_predicted"] == pytest.approx(planned)


def test_rows_that_cannot_be_read(tmp_path, capsys):
    path = written(tmp_path, {1: 100.0, 2: 98.0})
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 4])  # cut off in the middle of a line
    command.main(["efficiency", str(path)])
    assert "cut off or damaged, left out" in capsys.readouterr().out
    path.write_text(whole.replace('"version": 2', '"version": 99'))
    with pytest.raises(InputError, match="a row of version 99"):
        command.main(["efficiency", str(path)])
    with pytest.raises(InputError, match="no such file or folder"):
        command.main(["efficiency", str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "-2"], "--ranks: given -2; allowed: a whole number >= 1"),
        (["--ranks", "2", "--recipe", "nowhere.json"], "no such file: nowhere.json"),
        (["--ranks", "1", "3", "--strong", "--set", "train_batch_size=4"], "train_batch_size: given 4 for 3 ranks"),
    ],
)
def test_studies_that_cannot_be(arguments, said, tmp_path):
    with pytest.raises(InputError, match=said):
        command.main([*arguments, "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_no_steps(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--ranks", "2", "--steps", "0"])
    assert stop.value.code == 2 and "argument --steps: given 0; allowed: a whole number >= 1" in capsys.readouterr().err


def test_studies_are_kept_apart(tmp_path):
    written(tmp_path, {1: 100.0, 2: 98.0})
    written(tmp_path, {1: 50.0, 2: 70.0}, mode="strong")
    written(tmp_path, {2: 97.0})  # measured again
    found = command.studies(read(tmp_path).rows)
    rates = {name: {ranks: row["p50"] for ranks, row in sizes.items()} for (name, *_), sizes in found.items()}
    assert rates == {"bs4096, weak": {1: 100.0, 2: 97.0}, "bs4096, strong": {1: 50.0, 2: 70.0}}


def test_lists_of_tensors_count_as_a_whole():
    outputs, inputs = [torch.zeros(4), torch.zeros(4)], [torch.zeros(4)]
    assert whole_bytes((outputs, inputs, "a group")) == 32
