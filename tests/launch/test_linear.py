"""launch/linear.py: the originals' defaults, results, resuming, several ranks and rates, and what it refuses."""

import json
import shlex
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from crossbatch import InputError
from crossbatch.data import prepare
from crossbatch.data.augment.parameters import crop_and_flip
from crossbatch.engine.config import Device, load_config
from crossbatch.engine.config.evaluation import LinearConfig
from crossbatch.engine.config.resolve import resolve_training
from crossbatch.engine.evaluation import linear_evaluation
from crossbatch.engine.evaluation.linear_evaluation import base_learning_rates
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.launch import finetune, linear
from tests.commands import caller

SHORT = ["-b", "32", "--epochs", "3", "-j", "0", "-p", "1"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> str:
    path = f"shapes://{tmp_path_factory.mktemp('linear') / 'images'}?train=64&val=24&size=16"
    prepare(path)
    return path


call = caller(linear)


def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_the_defaults_are_the_originals():
    config = load_config(None, [], LinearConfig)
    assert (config.train_batch_size, config.crossbatch.schedule.epochs) == (1024, 90)
    params = config.optimizer.params
    assert (params.momentum, params.weight_decay, config.crossbatch.precision) == (0.9, 0.0, "fp32")
    assert base_learning_rates(config, "resnet50") == (0.1,)
    assert base_learning_rates(config, "vit_base") == (3.0,)
    assert linear.number_or_list(".1") == 0.1 and linear.number_or_list("[0.1, 1]") == [0.1, 1]
    view = crop_and_flip(224, config.crossbatch.data.crop_min)
    assert (view.crop_scale, view.crop_ratio, view.flip_probability) == ((0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    chances = (view.jitter_probability, view.grayscale_probability, view.blur_probability, view.solarize_probability)
    assert chances == (0, 0, 0, 0)


def test_a_run_is_probed(monkeypatch, capsys, tiny_runs, shapes, tmp_path):
    out = tmp_path / "linear probe"
    assert call(monkeypatch, "--pretrained", tiny_runs("resnet"), "-a", "resnet18", *SHORT, shapes, "--out", out) == 0
    said = capsys.readouterr().out
    assert "120 tensors loaded" in said and "unchanged, to the bit" in said
    assert shlex.join(["tensorboard", "--logdir", str(out)]) in said
    (typed,) = (shlex.split(line) for line in said.splitlines() if "launch/finetune.py" in line)
    monkeypatch.setattr(sys, "argv", [*typed[1:], "-b", "32", "--steps", "1", "--out", str(tmp_path / "finetuned")])
    run_main(finetune.main)
    assert results_of(tmp_path / "finetuned")["step"] == 1
    results = results_of(out)
    assert results["command"] == "linear" and results["lr"] == 0.1 and results["backbone_unchanged"]
    assert results["images"] == {"train": 64, "evaluation": 24, "evaluation_skipped": 0, "train_replaced": 0}
    lines = lines_of(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    # 0.1 per 256 images, half a cosine over three epochs of two steps.
    peak = 0.1 * 32 / 256
    want = [peak * 0.5 * (1 + np.cos(np.pi * epoch / 3)) for epoch in (0, 0, 1, 1, 2, 2)]
    assert [line["lr"] for line in lines] == pytest.approx(want)
    top1 = [line["top1"] for line in lines if "top1" in line]
    assert len(top1) == 3 and results["top1"] == top1[-1] and results["best_top1"] == max(top1)
    assert results["by_lr"][0]["best_epoch"] == top1.index(max(top1)) + 1
    assert all((24 * value / 100) == pytest.approx(round(24 * value / 100)) for value in top1)
    for name in ("accuracy.png", "confusion.png"):
        assert np.asarray(Image.open(out / name).convert("RGB")).std() > 20
    assert call(monkeypatch, "--checkpoint", out, "--data", shapes, *SHORT, "--out", tmp_path / "again") == 2
    assert "is the folder of a linear probe" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_cached_features_and_several_rates(monkeypatch, capsys, tiny_runs, shapes, tmp_path):
    arguments = [
        "--checkpoint",
        tiny_runs("vit"),
        "--data",
        shapes,
        *SHORT,
        "--cache",
        "--set=crossbatch.linear.norm=true",
    ]
    assert call(monkeypatch, *arguments, "--lr", "[0.01, 1]", "--out", tmp_path / "two") == 0
    assert "best rate are selected on the" in capsys.readouterr().out
    for lr in ("0.01", "1"):
        assert call(monkeypatch, *arguments, "--lr", lr, "--out", tmp_path / lr) == 0
    both, alone = results_of(tmp_path / "two"), [results_of(tmp_path / lr) for lr in ("0.01", "1")]
    assert both["by_lr"] == [one["by_lr"][0] for one in alone]
    assert both["top1"] == max(one["top1"] for one in alone) and both["lr"] in (0.01, 1)
    last = lines_of(tmp_path / "two")[-1]
    assert last["top1_by_lr"] == {"0.01": alone[0]["top1"], "1": alone[1]["top1"]}
    assert last["top1"] == both["top1"] and both["classes"] == 8


def resolved(checkpoint, data: str, *settings: str):
    settings = (f"crossbatch.model.checkpoint={checkpoint}", f"crossbatch.data.path={data}", *settings)
    short = ["train_batch_size=32", "crossbatch.schedule.epochs=3", "crossbatch.data.workers=0"]
    return resolve_training(load_config(None, [*short, *settings], LinearConfig), 2, Device("cpu"), 2)


def test_a_batch_that_the_ranks_cannot_share():
    for batch in (4, 12):
        config = load_config(None, [f"train_batch_size={batch}"], LinearConfig)
        with pytest.raises(InputError, match=f"train_batch_size: given {batch} for 8 ranks; .*; set it to 8$"):
            resolve_training(config, 8, Device("cpu"), 8)


def probe_on_this_rank(checkpoint: str, data: str, out: str, *settings: str) -> dict:
    from crossbatch.engine.evaluation.linear_evaluation import LinearEvaluation

    run = resolved(checkpoint, data, *settings)
    return LinearEvaluation(run, world_from_environment(), torch.device("cpu"), Path(out), "auto").run()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("cache", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_ranks_end_where_one_ends(monkeypatch, tiny_runs, two_ranks, shapes, tmp_path, cache):
    flags = ["--cache"] if cache else []
    alone = ["--checkpoint", tiny_runs("resnet"), "--data", shapes, *SHORT, *flags, "--lr", "[1, 0.1]"]
    assert call(monkeypatch, *alone, "--out", tmp_path / "alone") == 0
    settings = [f"crossbatch.linear.cache={str(cache).lower()}", "optimizer.params.lr=[1, 0.1]"]
    both = two_ranks.run(probe_on_this_rank, str(tiny_runs("resnet")), shapes, str(tmp_path / "both"), *settings)
    want = results_of(tmp_path / "alone")
    for results in both:
        for ours, theirs in zip(results["by_lr"], want["by_lr"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert results["images"] == want["images"]
    heads = [torch.load(tmp_path / name / "probe.pt", weights_only=True)["heads"] for name in ("alone", "both")]
    for name, weight in heads[0].items():
        torch.testing.assert_close(heads[1][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("no_figures")
def test_an_interrupted_probe_continues_to_the_same_end(monkeypatch, capsys, tiny_runs, shapes, tmp_path):
    arguments = ["--checkpoint", tiny_runs("resnet"), "--data", shapes, *SHORT]
    assert call(monkeypatch, *arguments, "--out", tmp_path / "whole") == 0
    save = linear_evaluation.save_probe

    def dies_after_two_epochs(out, content, *arguments, **more):
        save(out, content, *arguments, **more)
        if len(content["history"]) == 2:
            raise KeyboardInterrupt

    with mock.patch.object(linear_evaluation, "save_probe", dies_after_two_epochs):
        assert call(monkeypatch, *arguments, "--out", tmp_path / "cut") == 3
    assert not (tmp_path / "cut/results.json").exists()
    capsys.readouterr()
    assert call(monkeypatch, *arguments, "--out", tmp_path / "cut") == 0
    assert "resumed after epoch 2" in capsys.readouterr().out
    clock = ("images_per_s", "data_wait_ms", "step_ms")
    lines = [
        [{k: v for k, v in line.items() if k not in clock} for line in lines_of(tmp_path / n)] for n in ("whole", "cut")
    ]
    assert lines[0] == lines[1]
    assert results_of(tmp_path / "cut")["by_lr"] == results_of(tmp_path / "whole")["by_lr"]
    # A finished one says its results again; another one is not mixed up with it.
    assert call(monkeypatch, *arguments, "--out", tmp_path / "cut") == 0
    assert call(monkeypatch, *arguments, "--seed", "1", "--out", tmp_path / "cut") == 2
    assert "crossbatch.seed: was 0, is 1" in capsys.readouterr().err
    assert call(monkeypatch, *arguments, "--encoder", "momentum", "--out", tmp_path / "cut") == 2
    assert "the weights of the backbone: differ" in capsys.readouterr().err
    assert call(monkeypatch, *arguments, "--seed", "1", "--resume", "none", "--out", tmp_path / "cut") == 0


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("cache", [False, True])
def test_broken_images_are_named_and_counted(monkeypatch, capsys, tiny_runs, tmp_path, cache):
    prepare(f"shapes://{tmp_path / 'images'}?train=33&val=9&size=16")
    for name in ("train/star/00004.jpg", "val/disc/00002.jpg"):
        (tmp_path / "images" / name).write_bytes(b"")
    flags = ["--cache"] if cache else ["--set=crossbatch.data.max_skipped_fraction=1"]
    arguments = ["--checkpoint", tiny_runs("resnet"), "--data", tmp_path / "images", *SHORT, *flags]
    assert call(monkeypatch, *arguments, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "skipped a broken image: star/00004.jpg" in said and "skipped a broken image: disc/00002.jpg" in said
    images = results_of(tmp_path / "out")["images"]
    assert images["train"] == 33 and images["evaluation"] == 8 and images["evaluation_skipped"] == 1
    assert images["train_replaced"] in ([1] if cache else [2, 3])  # of 3 epochs, each of which leaves one image out


def test_bad_input_gets_one_message_and_exit_code_2(monkeypatch, capsys, tiny_runs, shapes, tmp_path):
    good = ["--checkpoint", tiny_runs("resnet"), "--data", shapes, "--out", tmp_path / "out"]

    def refused(*flags) -> str:
        assert call(monkeypatch, *good, *flags) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error and not (tmp_path / "out/probe.pt").exists()
        return error

    assert "train_batch_size: `num_images` (=64) is smaller than `global_batch` (=1024)" in refused()
    assert "holds a resnet18, but vit_base" in refused(*SHORT, "-a", "vit_base")
    assert "no such file or folder" in refused(*SHORT, "--pretrained", tmp_path / "absent")
    assert "crossbatch.data.crop_min: given 0.2 with crossbatch.linear.cache" in refused(
        *SHORT, "--cache", "--set=crossbatch.data.crop_min=0.2"
    )
    assert "argument --lr/--learning-rate: invalid number_or_list value: 'fast'" in refused("--lr", "fast")
    assert "optimizer.params.base_lr: given -1" in refused("--lr=-1")
    assert "optimizer.type: given 'LARS'" in refused("--set=optimizer.type=LARS")
    assert "not a linear probe" in refused(*SHORT, "--resume", wrong_file(tmp_path))
    (tmp_path / "out/results.json").write_text('{"command": "knn"}')
    assert "already holds a run of another kind" in refused(*SHORT)


def wrong_file(folder: Path) -> Path:
    torch.save({"heads": {}}, folder / "other.pt")
    return folder / "other.pt"


@pytest.mark.usefixtures("no_figures")
def test_a_rate_that_is_too_high_stops_with_3_or_is_named(monkeypatch, capsys, tiny_runs, shapes, tmp_path):
    arguments = ["--checkpoint", tiny_runs("resnet"), "--data", shapes, *SHORT, "--cache", "--wd", "1e6"]
    assert call(monkeypatch, *arguments, "--lr", "1e6", "--out", tmp_path / "one") == 3
    assert "lower optimizer.params.base_lr" in capsys.readouterr().err
    assert call(monkeypatch, *arguments, "--lr", "[1e6, 1e-9]", "--out", tmp_path / "two") == 0
    results = results_of(tmp_path / "two")
    assert [one["diverged"] for one in results["by_lr"]] == [True, False] and results["lr"] == 1e-9


def test_help_has_an_example(monkeypatch, capsys):
    assert call(monkeypatch, "--help") == 0
    assert "python launch/linear.py -a vit_small --pretrained" in capsys.readouterr().out
