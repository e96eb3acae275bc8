"""Every key with values that it may not have, every flag that names a file with what is no such file, and what a machine lacks.

A command ends with 0, 2 (wrong input: one message that names the key or the file) or 3 (it stopped itself), never a traceback.
"""

import contextlib
import ctypes
import importlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from crossbatch import InputError
from crossbatch.engine.config import Config, Device, key_paths, load_config, resolve
from crossbatch.engine.config.evaluation import ExportConfig, KnnConfig, LinearConfig
from crossbatch.engine.config.finetune import FinetuneConfig
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.models import build_backbone
from tests.small_runs import ADAMW, BASE, LARS, RESNET, VIT, fsdp

VALUES = [
    *("null", "true", "-1", "0", "1", "3", "0.5", "-0.5", "1e30", "1e400", "NaN", "9" * 20),
    *('""', "text", "auto", "none", '"/nonexistent/x"', "[]", "[0]", "[1, 2, 3]", "{}", '{"a": 1}'),
]
SCHEMAS = (Config, FinetuneConfig, LinearConfig, KnnConfig, ExportConfig)


def settings(key: str, value: str) -> list[str]:
    """Return those of a small run that uses `key`, and the value for it."""
    model = RESNET if key.rpartition(".")[2] in ("norm_ranks", "stem", "checkpoint_activations") else VIT
    optimizer = ADAMW if key.rpartition(".")[2] in ("beta1", "beta2", "variant") else LARS
    return [*BASE, *model, *optimizer, f"{key}={value}"]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_field_any_value_of_any_key_is_taken_or_refused_by_name(schema):
    refused = 0
    for key in key_paths(schema):
        for value in VALUES:
            given = settings(key, value) if schema is Config else [f"{key}={value}"]
            try:
                config = load_config(None, given, schema)
                if isinstance(config, Config):
                    resolve(config, 1, Device("cpu"))
            except InputError as error:
                assert key.rpartition(".")[2] in str(error)
                refused += 1
    assert refused > len(key_paths(schema)) * len(VALUES) / 2


@pytest.mark.slow
@pytest.mark.parametrize("key", key_paths(Config))
def test_field_a_run_with_any_value_that_is_taken_ends_in_order(key, tmp_path, nursery):
    for value in VALUES:
        try:
            config = load_config(None, settings(key, value))
            resolve(config, 1, Device("cpu"))
        except InputError:
            continue
        flags = [f"--set={setting}" for setting in settings(key, value)]
        job = nursery.start(tmp_path / "logs", 1, f"--out={tmp_path / value.strip('/')}", "--steps=1", *flags)
        ends_in_order(job, f"{key}={value}")


def ends_in_order(job, what: str) -> None:
    (code,) = job.wait()
    text = job.output()
    assert code in (0, 2, 3) and "Traceback" not in text, f"{what}: {code}\n{text}"
    if code:
        assert ("error: " if code == 2 else "stopped (rank 0): ") in text, f"{what}: {code}\n{text}"


def no_files(folder) -> dict[str, str]:
    """Make what is no checkpoint, recipe, list of rows or folder of images; return the paths by what they are."""
    made = {"missing": folder / "missing", "below a file": folder / "text" / "x", "a device": "/dev/null"}
    contents = {
        "empty": b"",
        "text": b"hello\n",
        "json": b'{"a": [1, 2]}',
        "a list in json": b"[1]",
        "bytes": bytes(range(256)) * 40,
        "a pickle": pickle.dumps({"state_dict": {"weight": 1}}),
        "an end": b"PK\x05\x06" + bytes(18),
        "safetensors": (9).to_bytes(8, "little") + b'{"a": 1} ',
    }
    for name, content in contents.items():
        made[name] = folder / name.replace(" ", "-")
        made[name].write_bytes(content)
    for name, value in {
        "a tensor": torch.ones(3),
        "weights of nothing": {"model": {"layer.weight": torch.ones(3)}},
    }.items():
        made[name] = folder / f"{name.replace(' ', '-')}.pth"
        torch.save(value, made[name])
    saved = made["weights of nothing"].read_bytes()
    made["cut off"] = folder / "cut.pth"
    made["cut off"].write_bytes(saved[: len(saved) // 2])
    made["a tar"] = folder / "a.tar"
    with tarfile.open(made["a tar"], "w") as tar:
        member = tarfile.TarInfo("0.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    for name in ("an empty folder", "a folder of a folder"):
        made[name] = folder / name.replace(" ", "-")
        made[name].mkdir()
    (made["a folder of a folder"] / "train" / "class").mkdir(parents=True)
    (made["a folder of a folder"] / "config.json").write_text(json.dumps({"crossbatch": 1}))
    (made["a folder of a folder"] / "latest").write_text("step-1")
    return {name: str(path) for name, path in made.items()}


DATA = "--data=synthetic://48?size=20&classes=4"
RUN = [f"--set={setting}" for setting in (*BASE, *VIT, *LARS) if not setting.startswith("crossbatch.data.path=")]
PLAN = ["--gpus=1", "--gpu=h100-80g", DATA, *RUN]
FILES = [
    ("pretrain", ["--out=OUT", "--steps=1", *RUN], "--data"),
    ("pretrain", ["--out=OUT", "--steps=1", DATA, *RUN], "--resume"),
    ("pretrain", ["--steps=1", DATA, *RUN], "--out"),
    ("pretrain", ["--out=OUT", "--steps=1", DATA, *RUN], "--deepspeed_config"),
    ("knn", ["--out=OUT", DATA, "-a=vit_small"], "--checkpoint"),
    ("linear", ["--out=OUT", DATA, "-a=vit_small"], "--checkpoint"),
    ("finetune", ["--out=OUT", "--steps=1", DATA, "-a=vit_small"], "--checkpoint"),
    ("finetune", ["--out=OUT", "--steps=1", DATA, "-a=vit_small"], "--resume"),
    ("embed", ["--output=OUT.npy", DATA, "-a=vit_small"], "--checkpoint"),
    ("replay", ["--out=OUT", "--step=1"], "--run"),
    ("convert", ["export", "--to=timm", "--output=OUT", "-a=vit_small"], "--checkpoint"),
    ("convert", ["shards", "--output=OUT"], "--data"),
    ("convert", ["shards", DATA], "--output"),
    ("plan", PLAN, "--rows"),
    ("preview", ["--output=OUT", "--count=2", "--image-size=32"], "--data"),
    ("preview", [DATA, "--count=2", "--image-size=32"], "--output"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "flags", "flag"), FILES, ids=[f"{case[0]} {case[1][0]} {case[2]}" for case in FILES]
)
def test_field_a_command_ends_in_order_whatever_file_it_is_given(command, flags, flag, tmp_path, nursery):
    (tmp_path / "files").mkdir()
    for number, (what, path) in enumerate(no_files(tmp_path / "files").items()):
        given = [text.replace("OUT", str(tmp_path / f"out{number}")) for text in flags]
        ends_in_order(nursery.start(tmp_path / "logs", 1, *given, f"{flag}={path}", COMMAND=command), f"{flag}={what}")


# --- what a machine lacks, and weights that are no weights -------------------------------------------------------------

SMALL_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}  # VIT's
SHAPE = ["--set=crossbatch.data.image_size=16", *(f"--set={setting}" for setting in (RESNET[0], RESNET[2]))]
READING = ("pretrain", "finetune", "knn", "linear", "embed")  # the commands with workers that read images


@pytest.fixture(scope="module")
def resnet(tmp_path_factory) -> Path:
    """Write the weights of a small ResNet."""
    file = tmp_path_factory.mktemp("weights") / "resnet.pth"
    torch.save(build_backbone("resnet18", 16, "small", backbone_args={"width": 8}).state_dict(), file)
    return file


def flags_of(command: str, weights: Path, out: Path) -> list[str]:
    """Return those of a small run of a command, with a worker."""
    if command == "pretrain":
        more = ["crossbatch.data.workers=1", *fsdp(1)]
        return [*RUN, *(f"--set={setting}" for setting in more), "--steps=1", f"--out={out}"]
    flags = [f"--checkpoint={weights}", "-a=resnet18", *SHAPE, "-j=1"]
    if command == "finetune":
        flags += ["-b=2", "--epochs=1", "--warmup-epochs=0", "--drop-path=0", *(f"--set={one}" for one in fsdp(0))]
    return [*flags, f"--output={out}/features.npy" if command == "embed" else f"--out={out}"]


def refused(monkeypatch, capsys, command: str, *flags: str) -> str:
    """Run a command in this process, which has to end with 2 and one message; return the message."""
    monkeypatch.setattr(sys, "argv", [f"{command}.py", *flags])
    with pytest.raises(SystemExit) as stop:
        run_main(importlib.import_module(f"crossbatch.launch.{command}").main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


Disk = namedtuple("Disk", "total used free")


@pytest.mark.parametrize("command", READING)
def test_field_workers_that_could_pass_nothing_on_are_not_started(monkeypatch, capsys, tmp_path, resnet, command):
    flags = [*flags_of(command, resnet, tmp_path / "out"), DATA]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Disk(2**12, 0, 2**12))
        said = refused(patch, capsys, command, *flags)
        assert "crossbatch.data.workers: the data workers of this node hold up to " in said and "--shm-size=2g" in said
    monkeypatch.setattr(tempfile, "tempdir", f"/tmp/{'x' * 150}")
    assert "set TMPDIR to a path of at most 60 bytes" in refused(monkeypatch, capsys, command, *flags)


@pytest.mark.parametrize("command", ["pretrain", "knn"])
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK and MASTER_ADDR and MASTER_PORT are not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: given 'two' in the environment"),
        ({"WORLD_SIZE": "2", "RANK": "3"}, "RANK: given 3; allowed: 0 to 1"),
    ],
    ids=str,
)
def test_field_an_environment_that_cannot_be(monkeypatch, capsys, tmp_path, resnet, command, environment, words):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert words in refused(monkeypatch, capsys, command, *flags_of(command, resnet, tmp_path / "out"), DATA)


AT_ONCE = """
import sys
sys.argv = ["pretrain.py"]
from crossbatch.launch.__main__ import run
try:
    run("pretrain")
finally:
    assert "torch" not in sys.modules
"""


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ("WORLD_SIZE=2", "MASTER_ADDR and MASTER_PORT are not set"),
        ("WORLD_SIZE=two", "given 'two' in the environment"),
        ("WORLD_SIZE=2 RANK=3", "RANK: given 3; allowed: 0 to 1"),
        ("WORLD_SIZE=2 RANK=1 MASTER_ADDR=node1 MASTER_PORT=port", "MASTER_PORT: given 'port'"),
        ("SLURM_STEP_NUM_TASKS=2", "SLURM_STEP_NUM_TASKS=2, but no SLURM_PROCID"),
        (
            "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=1",
            "no MASTER_ADDR says where they meet",
        ),
    ],
    ids=str,
)
def test_field_an_environment_that_cannot_be_is_refused_before_the_imports(environment, words):
    theirs = dict(part.split("=") for part in environment.split())
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "PMI"))}
    done = subprocess.run(
        [sys.executable, "-c", AT_ONCE], env={**ours, **theirs}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("command", [*READING, "convert"])
def test_field_a_folder_that_another_process_writes_into(monkeypatch, capsys, tmp_path, resnet, command):
    folder = tmp_path / "out" / ".features.npy.parts" if command == "embed" else tmp_path / "out"
    folder.mkdir(parents=True)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder / ".lock")], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        importing = ["import", str(resnet), f"--out={folder}", *RUN]
        flags = importing if command == "convert" else flags_of(command, resnet, tmp_path / "out")
        said = refused(monkeypatch, capsys, command, *flags, DATA)
    finally:
        holder.kill()
        holder.communicate()
    assert f"{folder}: another process is writing into it; wait for its end, or choose another folder" in said


WEIGHT = "blocks.0.attn.proj.weight"
NO_WEIGHTS = {  # tensors to replace in a small ViT, and what is said of them
    "float8": (lambda: {WEIGHT: torch.zeros(24, 24).to(torch.float8_e4m3fn)}, f"{WEIGHT} is float8_e4m3fn"),
    "qint8": (
        lambda: {WEIGHT: torch.quantize_per_tensor(torch.zeros(24, 24), 0.1, 0, torch.qint8)},
        f"{WEIGHT} is qint8",
    ),
    "meta": (lambda: {WEIGHT: torch.zeros(24, 24, device="meta")}, f"{WEIGHT} is meta, without values"),
    "no class token": (lambda: {"pos_embed": torch.zeros(1, 16, 24), "cls_token": None}, "has 16 positions"),
    "register tokens": (
        lambda: {"pos_embed": torch.zeros(1, 21, 24), "reg_token": torch.zeros(1, 4, 24)},
        "has 21 positions (register tokens)",
    ),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_field_weights_that_no_command_can_use(monkeypatch, capsys, tmp_path, kind):
    changes, words = NO_WEIGHTS[kind]
    state = {**build_backbone("vit_small", 16, backbone_args=SMALL_VIT).state_dict(), **changes()}
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "vit.pth")
    network = f"--set=crossbatch.model.backbone_args={json.dumps(SMALL_VIT)}"
    flags = [f"--checkpoint={tmp_path / 'vit.pth'}", "-a=vit_small", network]
    for command in READING[1:]:
        output = f"--output={tmp_path}/x.npy" if command == "embed" else f"--out={tmp_path / command}"
        assert words in refused(monkeypatch, capsys, command, *flags, DATA, output, *SHAPE[:1])
    assert words in refused(monkeypatch, capsys, "convert", "export", "--to=timm", f"--output={tmp_path}/x", *flags)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (f"crossbatch.seed={2**70}", "crossbatch.seed: given 1180591620717411303424"),
        ('optimizer={"type": ["LARS"], "params": {"momentum": 0.9}}', "optimizer.type: given ['LARS']"),
    ],
)
def test_field_values_that_nothing_can_hold_end_a_command(monkeypatch, capsys, setting, words):
    assert words in refused(monkeypatch, capsys, "pretrain", "--dry-run", f"--set={setting}", DATA)


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    """Let this thread, if it is root's, obey the permissions of files: without its effective capabilities (capset(2))."""
    libc, header = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, of 32 capabilities each; twice
    assert libc.capget(header, before) == 0
    without = (ctypes.c_uint32 * 6)(*before)
    without[0] = without[3] = 0
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to be no root")
def test_field_folders_without_permission(monkeypatch, capsys, tmp_path, resnet):
    """Of images, of one class, of weights, and the one around --out."""
    good, closed = tmp_path / "images", {}
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (good / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(good / name / "0.png")
    for name in ("train", "train/a", "val"):
        shutil.copytree(good, tmp_path / f"no {name}")
        closed[name] = tmp_path / f"no {name}" / name, f"--data={tmp_path / f'no {name}'}"
    for name in ("held", "weights"):
        (tmp_path / name).mkdir()
    shutil.copy(resnet, tmp_path / "weights/file.pth")
    closed["out"] = tmp_path / "held", f"--out={tmp_path / 'held/out'}"
    closed["file"] = tmp_path / "weights", f"--checkpoint={tmp_path / 'weights/file.pth'}"
    closed["run"] = tmp_path / "weights", f"--checkpoint={tmp_path / 'weights'}"
    monitored = [f"train_{which}={number}" for which, number in (("batch_size", 2), ("micro_batch_size_per_gpu", 2))]
    monitored += ["crossbatch.evaluate.knn_every_epochs=1", "crossbatch.batchformer.group_size=2"]
    commands = {"pretrain": ("train", "train/a", "val", "out"), "knn": closed, "finetune": ("train/a", "val", "file")}
    for folder, _ in closed.values():
        folder.chmod(0)
    try:
        for command, names in commands.items():
            for name in names:
                path, flag = closed[name]
                flags = [*flags_of(command, resnet, tmp_path / f"{command} {name[-1]}"), f"--data={good}", flag]
                flags += [f"--set={setting}" for setting in monitored if command == "pretrain"]
                with as_another_user():
                    said = refused(monkeypatch, capsys, command, *flags)
                assert str(path) in said and "Permission denied" in said
    finally:
        for folder, _ in closed.values():
            folder.chmod(0o755)
