"""launch/finetune.py: recipes, results, DeiT's flags, and what it refuses."""

import json
import os
import pickle
import signal
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossbatch.data.augment import pil
from crossbatch.data.worker_batches import EvaluationDataset
from crossbatch.engine import checkpoint
from crossbatch.engine.config import Device, FinetuneConfig, load_config, resolve_finetune
from crossbatch.engine.runtime.world import World
from crossbatch.launch import finetune
from crossbatch.models import build_backbone
from tests.commands import caller

TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}
SMALL = [
    *("-a", "vit_small", "-b", "12", "--epochs", "4", "--warmup-epochs", "1", "-j", "0", "--input-size", "16"),
    *("--set", f"crossbatch.model.backbone_args={json.dumps(TINY)}", "--set", "crossbatch.log.every_steps=1"),
    *("--set", "crossbatch.sharding=fsdp"),  # DeepSpeed wants a process of its own
]


call = caller(finetune)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """As DeiT's converter writes them."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save({"model": build_backbone("vit_small", 16, backbone_args=TINY).state_dict()}, file)
    return file


def test_the_recipes_are_the_published_settings():
    want = {  # weight decay, drop path, mixup, CutMix, random erasing
        "cifar10": (0.1, 0.1, 0.8, 1.0, 0.0),
        "cifar100": (0.1, 0.1, 0.5, 1.0, 0.0),
        "flowers": (0.3, 0.1, 0.0, 0.0, 0.25),
        "pets": (0.1, 0.0, 0.8, 0.0, 0.0),
    }
    for name, numbers in want.items():
        config = load_config(f"ds_configs/finetune_{name}.json", [], FinetuneConfig)
        settings, params = config.crossbatch.finetune, config.optimizer.params
        found = (params.weight_decay, settings.drop_path, settings.mixup, settings.cutmix, settings.random_erasing)
        assert found == numbers and (config.train_batch_size, params.base_lr) == (128, 3e-4), name
        assert (config.crossbatch.schedule.epochs, config.crossbatch.schedule.warmup_epochs) == (100, 3)
        assert (config.crossbatch.data.crop_min, config.crossbatch.data.image_size) == (0.05, 224)
        assert settings.label_smoothing == 0.1


def test_a_run_learns_and_writes_results(monkeypatch, capsys, tmp_path, weights):
    flags = [
        "--pretrained",
        weights,
        "--data",
        "synthetic://96?size=20&classes=3",
        *SMALL,
        "--lr",
        "0.4",
        "--drop-path",
        "0.05",
    ]
    assert call(monkeypatch, *flags, "--mixup", "0", "--cutmix", "0", "--reprob", "0.1", "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "vit_small with 2 heads of" in said and "30 tensors loaded, none missing" in said
    results = json.loads((tmp_path / "run/results.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["top1"] for line in lines if "top1" in line}
    assert list(scores) == [8, 16, 24, 32] and results["top1"] == scores[32] and results["step"] == 32
    assert json.loads((tmp_path / "run/started_from.json").read_text())["loaded"] == results["loaded"]
    assert results["best_top1"] == max(scores.values()) and scores[results["best_step"]] == results["best_top1"]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2  # colours tell the classes apart
    assert results["best_top1"] > 50
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {"confusion.png", "accuracy.png"}
    other = tmp_path / "other.pth"
    torch.save({"model": build_backbone("vit_small", 16, backbone_args=TINY).state_dict()}, other)
    flags[1] = other
    assert call(monkeypatch, *flags, "--mixup", "0", "--cutmix", "0", "--reprob", "0.1", "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "started from other weights" in said and str(weights) in said and "--allow-change" in said


def test_wrong_weights(monkeypatch, capsys, tmp_path, weights):
    def refused(*arguments) -> str:
        code = call(monkeypatch, "--data", "synthetic://24?size=20", "--out", tmp_path / "run", *arguments)
        said = capsys.readouterr().err
        assert code == 2 and said.count("\n") == 1 and not (tmp_path / "run/metrics.jsonl").exists(), said
        return said

    assert "crossbatch.model.checkpoint: not given" in refused(*SMALL)
    truncated = tmp_path / "truncated.pth"
    truncated.write_bytes(weights.read_bytes()[:2000])
    assert str(truncated) in refused("--checkpoint", truncated, *SMALL)
    assert str(weights) in refused("--checkpoint", weights, *SMALL, "-a", "resnet18")
    probe = tmp_path / "probe.pth"
    torch.save({"state_dict": {"module.fc.weight": torch.zeros(3, 4), "module.fc.bias": torch.zeros(3)}}, probe)
    assert str(probe) in refused("--checkpoint", probe, *SMALL)
    code = tmp_path / "code.pth"
    code.write_bytes(pickle.dumps(_Touches(tmp_path / "executed")))
    assert str(code) in refused("--checkpoint", code, *SMALL)
    assert not (tmp_path / "executed").exists()


def test_wrong_images(monkeypatch, capsys, tmp_path, weights):
    for name in ("train/a/1.png", "train/b/2.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
    assert (
        call(monkeypatch, "--data", tmp_path / "images", "--checkpoint", weights, *SMALL, "--out", tmp_path / "run")
        == 2
    )
    assert "has none of val/, validation/, test/" in capsys.readouterr().err
    assert call(monkeypatch, "--data", "synthetic://24?size=20", "--drop-paht", "0.1") == 2
    assert "--drop-paht" in capsys.readouterr().err


@pytest.mark.skipif(
    "CROSSBATCH_REAL_DATA" not in os.environ, reason="CROSSBATCH_REAL_DATA names no folder with pets-sample.tar"
)
def test_pets(monkeypatch, tmp_path, weights):
    with tarfile.open(Path(os.environ["CROSSBATCH_REAL_DATA"], "pets-sample.tar")) as archive:
        archive.extractall(tmp_path, filter="data")
    path = f"pets://{tmp_path / 'pets'}"
    flags = [
        "--deepspeed_config",
        "ds_configs/finetune_pets.json",
        "--data",
        path,
        "--checkpoint",
        weights,
        *SMALL,
        "--lr",
        "0.4",
    ]
    assert call(monkeypatch, *flags, "--out", tmp_path / "run") == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (results["classes"], results["images"]) == (37, 60)
    assert results["top1"] > 10  # it names the three breeds that it has seen


RELEASED = (  # MoCo v3's transfer to CIFAR-10, DeiT's main.py; on 8 GPUs
    "--batch-size 128 --lr 3e-4 --epochs 100 --warmup-epochs 3 --weight-decay 0.1 --drop-path 0.1 --mixup 0.8 --cutmix 1 "
    "--reprob 0 --no-repeated-aug --no-pin-mem --eval-freq 5 --data-set cifar10 --data-path sets --model deit_base_patch16_224"
)


def loaded(monkeypatch, *arguments, ranks: int = 1):
    """Return the flags and the configuration of a command line."""
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, arguments)])
    given = finetune.parse_arguments()
    return given, finetune.load(given, World(0, ranks, 0, ranks))


def test_field_the_released_transfer_command(monkeypatch, tmp_path, weights, capsys):
    given, config = loaded(monkeypatch, *RELEASED.split(), "--resume", weights, "--output_dir", tmp_path / "run")
    recipe = load_config("ds_configs/finetune_cifar10.json", [], FinetuneConfig)
    assert config.optimizer == recipe.optimizer and config.crossbatch.finetune == recipe.crossbatch.finetune
    assert config.crossbatch.schedule == recipe.crossbatch.schedule and config.train_batch_size == 128
    assert (config.crossbatch.data.path, config.crossbatch.data.repeats) == ("cifar10://sets", 1)
    assert (config.crossbatch.model.checkpoint, config.crossbatch.model.arch) == (str(weights), "vit_base")
    assert config.crossbatch.evaluate.every_epochs == 5
    assert (given.resume, given.out) == ("auto", tmp_path / "run")
    assert capsys.readouterr().out == ""


def test_field_deits_batch_is_that_of_a_rank(monkeypatch, capsys):
    compat = ["--set", "crossbatch.schedule.deit_compat=true"]
    assert loaded(monkeypatch, "--batch-size", "128", ranks=8)[1].train_batch_size == 128
    assert capsys.readouterr().out.startswith("train_batch_size: 128, over all 8 ranks; in DeiT it is that of one")
    assert loaded(monkeypatch, "--batch-size", "128", *compat, ranks=8)[1].train_batch_size == 1024
    assert capsys.readouterr().out.startswith("train_batch_size: 1024, 128 for each of 8 ranks")
    assert loaded(monkeypatch, "-b", "128", *compat, ranks=8)[1].train_batch_size == 128
    given = ["--batch-size", "128", "--set", "train_batch_size=64", *compat]
    assert loaded(monkeypatch, *given, ranks=8)[1].train_batch_size == 64


def test_field_deits_flags_of_an_augmentation(monkeypatch):
    flags = "--aa rand-m9-mstd0.5-inc1 --train-interpolation bicubic --repeated-aug --model-ema-decay 0.99 --opt adamw"
    _, config = loaded(monkeypatch, *flags.split())
    data = config.crossbatch.data
    assert (data.auto_augment, data.interpolation, data.repeats) == ("rand-m9-mstd0.5-inc1", "bicubic", 3)
    assert config.crossbatch.finetune.ema_decay == 0.99
    data = loaded(monkeypatch, "--aa", "none", "--color-jitter", "0.3")[1].crossbatch.data
    assert (data.auto_augment, data.color_jitter) == (None, 0.3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--opt sgd", "given sgd; allowed here: adamw; fine-tuning uses AdamW"),
        ("--drop 0.3", "given 0.3; allowed here: 0; use --drop-path"),
        ("--world_size 8", "a flag of DeiT that does nothing here; start the ranks with torchrun"),
        ("--data-set INAT --data-path x", "invalid choice"),
        ("--data-path x --data y", "--data-path: given beside --data y; leave one of them out"),
        ("--resume {weights} --checkpoint x", "a file of weights beside --checkpoint x"),
        (
            "--aa rand-m9 --color-jitter 0.3",
            "crossbatch.data.color_jitter: given 0.3 with crossbatch.data.auto_augment",
        ),
        ("--aa rand-m9 --set crossbatch.data.backend=dali", "crossbatch.data.backend: given dali, which has neither"),
    ],
)
def test_field_deits_flags_that_mean_nothing_here(monkeypatch, capsys, weights, flags, words):
    assert call(monkeypatch, *flags.format(weights=weights).split()) == 2
    assert words in capsys.readouterr().err


def test_field_the_recipe_of_imagenet():
    config = load_config("ds_configs/finetune_imagenet.json", [], FinetuneConfig)
    cfg = resolve_finetune(config, 8, Device("cuda"))
    assert cfg.crossbatch.data.backend == "opencv"  # DALI has no RandAugment
    assert cfg.lr_peak == pytest.approx(5e-4 * 960 / 512)


def test_field_the_recipe_of_imagenet_trains(monkeypatch, tmp_path, weights):
    """A small network on few images, with everything else of the recipe."""
    policies, augmented = [], pil.automatically_augmented

    def recorded(pixels, augmentation, seed):
        policies.append(augmentation.auto_augment)
        return augmented(pixels, augmentation, seed)

    monkeypatch.setattr(pil, "automatically_augmented", recorded)
    flags = ["--deepspeed_config", "ds_configs/finetune_imagenet.json", "--checkpoint", weights, *SMALL, "--steps", "2"]
    assert call(monkeypatch, *flags, "--data", "synthetic://24?size=20&classes=3", "--out", tmp_path) == 0
    assert set(policies) == {"rand-m9-mstd0.5-inc1"} and len(policies) >= 2 * 12
    data = json.loads((tmp_path / "config.json").read_text())["crossbatch"]["data"]
    assert (data["interpolation"], data["repeats"]) == ("bicubic", 3)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(0 < loss < 3 for loss in losses)
    assert 0 <= json.loads((tmp_path / "results.json").read_text())["top1"] <= 100


def test_field_a_signal_during_an_evaluation(monkeypatch, tmp_path, weights):
    """The epoch is saved, the evaluation ends after the batch at hand, and the next start makes up for it."""
    read, sent = EvaluationDataset.__getitem__, []

    def interrupted(dataset, key):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return read(dataset, key)

    monkeypatch.setattr(EvaluationDataset, "__getitem__", interrupted)
    data = ["--checkpoint", weights, "--data", "synthetic://24?size=20&classes=3", "--out", tmp_path]
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, data), *SMALL, "--steps", "2"])
    for stopped in (True, False):
        finetune.main()
        assert [path.name for path in checkpoint.candidates(tmp_path, "auto")] == ["step-00000002"]
        assert (tmp_path / "stopped.json").exists() is stopped
        last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["step"] == 2 and "loss" in last and ("top1" in last) is not stopped


class _Touches:
    """What a pickle can do to whoever loads it."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")
