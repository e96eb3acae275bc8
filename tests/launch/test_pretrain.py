"""The command line: what --dry-run prints, what bad input gets, and the three ways to start the same run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crossbatch.launch import pretrain
from tests.commands import caller

TINY = [
    "--data=synthetic://64?size=20&classes=4",
    "--set=train_batch_size=16",
    "--set=train_micro_batch_size_per_gpu=16",  # at most; "auto" takes each rank longer than these steps
    "--set=crossbatch.data.image_size=16",
    "--set=crossbatch.precision=fp32",
    "--set=crossbatch.data.workers=0",
    "--set=crossbatch.data.backend=torchvision",
    '--set=crossbatch.model.backbone_args={"width": 8}',
    "--set=crossbatch.model.dim=16",
    "--set=crossbatch.model.mlp_dim=32",
    "--set=crossbatch.batchformer.group_size=8",
    "--set=crossbatch.schedule.epochs=2",
    "--set=crossbatch.schedule.warmup_epochs=1",
    "--set=crossbatch.log.every_steps=1",
]


call = caller(pretrain)


def dry_run(monkeypatch, capsys, *arguments) -> dict:
    assert call(monkeypatch, "--dry-run", *arguments) == 0
    return json.loads(capsys.readouterr().out)


FSDP = ["--set=crossbatch.sharding=fsdp"]  # without DeepSpeed, which takes every rank 5 s to import
WITHOUT_EVALUATION = ["--set=crossbatch.evaluate.knn_every_epochs=0", "--set=crossbatch.evaluate.every_epochs=0"]
BS4096 = ["--deepspeed_config", "ds_configs/bs4096.json", "--world-size-hint", "16", "--set=crossbatch.precision=fp32"]


def test_dry_run_of_the_main_recipe(monkeypatch, capsys):
    assert dry_run(monkeypatch, capsys, *BS4096) == {
        "world_size": 16,
        "train_batch_size": 4096,
        "local_batch": 256,
        "chunk": 256,
        "chunks": 1,
        "group_size": 256,
        "lr_peak": 9.6,
        "steps_per_epoch": None,
        "parameters_total": 93198464,
        "parameters_trainable": 60245056,
        "chance_loss": 133.08,
        "optimizer": "LARS",
        "sharding": "zero",
        "zero_stage": 1,
        "reduce_bucket_size": 25_000_000,
        "precision": "fp32",
        "device": "CPU",
    }


@pytest.mark.parametrize(
    ("flags", "want"),
    [
        (
            ["--set", "crossbatch.batchformer.mode=released"],
            {"parameters_total": 93198464, "parameters_trainable": 35058752},
        ),
        (
            ["--add_bf", "0"],
            {"parameters_total": 68012160, "parameters_trainable": 35058752, "chance_loss": 33.27, "group_size": None},
        ),
        (["--add_bf", "36"], {"chance_loss": 33.27}),
        (["--local_rank=1"], {"local_batch": 256}),  # as of DeepSpeed's launcher
        (["--data", "synthetic://10000"], {"steps_per_epoch": 2}),
        (
            ["-b", "512", "--lr", "0.3", "--set", "crossbatch.sharding=fsdp"],
            {"lr_peak": 0.6, "sharding": "fsdp", "local_batch": 32},
        ),
    ],
)
def test_dry_run_follows_the_flags(monkeypatch, capsys, flags, want):
    printed = dry_run(monkeypatch, capsys, *BS4096, *flags)
    assert {name: printed[name] for name in want} == want


def test_an_empty_recipe_and_the_originals_flags(monkeypatch, capsys):
    flags = "-a vit_small -b 1024 --optimizer adamw --lr 1.5e-4 --wd 0.1 --epochs 300 --warmup-epochs 40 --moco-m-cos"
    printed = dry_run(monkeypatch, capsys, *flags.split(), "--stop-grad-conv1", "--moco-t", "0.2", "synthetic://2048")
    assert printed["parameters_total"] == 84266752
    assert printed["lr_peak"] == pytest.approx(6e-4)
    assert (printed["optimizer"], printed["steps_per_epoch"]) == ("AdamW", 2)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    (tmp_path / "data" / "train" / "cat").mkdir(parents=True)
    return tmp_path / "data"


BAD = [
    (["--data", "nowhere"], ["crossbatch.data.path", "nowhere", "does not exist"]),
    (["--data", "{tmp}/data"], ["crossbatch.data.path", "cat"]),
    (["--data", "{tmp}"], ["crossbatch.data.path", "train"]),
    (["--set", "crossbatch.data.pth=x"], ["crossbatch.data.pth", "crossbatch.data.path"]),
    (["--set", "train_batch_size=4095", "--set", "crossbatch.batchformer.group_size=0"], ["group_size", ">= 1"]),
    (["-a", "resnet51"], ["crossbatch.model.arch", "resnet51", "resnet50"]),
    (["--set", "zero_optimization.stage=5"], ["zero_optimization.stage", "given 5", ">= 0 and <= 3"]),
    (["--deepspeed_config", "ds_configs/bs409.json"], ["bs409.json", "no such file", "bs4096.json"]),
    (["--out", "{tmp}/data/file"], ["--out", "not a writable folder"]),
    (["--resume", "{tmp}/none", *TINY], ["--resume", "no such path"]),
    (["--set", "crossbatch.sharding=fsdp", "--set", "zero_optimization.reduce_bucket_size=5"], ["no such setting"]),
    (["--set", "train_batch_size=128", *TINY[:1]], ["train_batch_size", "128", "64"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_bad_input_gets_one_message_and_exit_code_2(monkeypatch, capsys, tmp_path, image_folder, arguments, words):
    (image_folder / "file").write_text("")
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    out = [] if "--out" in arguments else ["--out", tmp_path / "run"]
    assert call(monkeypatch, "--deepspeed_config", "ds_configs/quickstart.json", *out, *arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for word in words:
        assert word in error
    left = {path.name for path in tmp_path.glob("run/*")}
    assert left <= {"data_index"} and (tmp_path / "run").exists() == bool(left)  # the listing of the images may stay


def start(launcher: list[str], out: Path, *arguments: str) -> list[dict]:
    """The run in processes of its own; returns the lines of its metrics."""
    binaries = Path(sys.executable).parent
    launcher = [str(binaries / launcher[0]), *launcher[1:]]
    command = [*launcher, "launch/pretrain.py", "--deepspeed_config", "ds_configs/quickstart.json", "--out", str(out)]
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*command, *TINY, *arguments], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"next:\n  python launch/linear.py --checkpoint {out} " in done.stdout
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, nursery):
    """Run directory and metrics of one process that no launcher has started."""
    out, logs = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("logs")
    job = nursery.start(logs, 1, "--deepspeed_config", "ds_configs/quickstart.json", f"--out={out}", *TINY, ALONE="1")
    assert job.wait() == [0], job.output()
    assert f"next:\n  python launch/linear.py --checkpoint {out} " in job.output()
    return out, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "sharding"),
    [
        pytest.param(["torchrun", "--nproc_per_node=2", "--master_port=29611"], FSDP, id="torchrun"),
        pytest.param(["deepspeed", "--num_gpus=2", "--master_port=29612"], [], id="deepspeed", marks=pytest.mark.slow),
    ],
)
def test_launchers_lose_the_same(tmp_path, alone, launcher, sharding):
    wanted = [line["loss"] for line in alone[1] if "loss" in line]
    assert len(wanted) == 8
    lines = start(launcher, tmp_path, *sharding, *WITHOUT_EVALUATION)
    assert [line["loss"] for line in lines if "loss" in line] == pytest.approx(wanted, rel=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["world_size"], config["train_micro_batch_size_per_gpu"]) == (2, 8)


def test_the_documented_run_directory(alone):
    out, lines = alone
    assert [line["step"] for line in lines if "knn_top1" in line] == [0, 8]
    assert set(lines[-1]) == {
        *(
            "step",
            "epoch",
            "images_seen",
            "skipped_steps",
            "loss",
            "lr",
            "momentum",
            "grad_norm",
            "images_per_s",
            "data_wait_ms",
            "step_ms",
            "stage_ms",
        ),
        *("feature_std", "positive_similarity", "negative_similarity", "knn_top1", "skipped_images", "loss_terms"),
        *("rankme", "effective_rank", "alignment", "uniformity"),
    }
    assert 0 < sum(lines[-1]["stage_ms"].values()) < lines[-1]["step_ms"]
    assert sum(lines[-1]["loss_terms"].values()) == pytest.approx(lines[-1]["loss"], rel=1e-6)
    assert (out / "checkpoints" / "latest").read_text().strip() == "step-00000008"
    assert list(out.glob("events.out.tfevents.*"))
