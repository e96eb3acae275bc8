"""Every key with values that it may not have, and every flag that names a file with what is no such file.

A command ends with 0, 2 (wrong input: one message that names the key or the file) or 3 (it stopped itself), never a traceback.
"""

import io
import json
import pickle
import tarfile

import pytest
import torch

from crossbatch import InputError
from crossbatch.engine.config import Config, Device, key_paths, load_config, resolve
from crossbatch.engine.config.evaluation import ExportConfig, KnnConfig, LinearConfig
from crossbatch.engine.config.finetune import FinetuneConfig
from tests.small_runs import ADAMW, BASE, LARS, RESNET, VIT

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
RUN = [f"--set={setting}" for setting in (*BASE, *VIT, *LARS)]
PLAN = ["--gpus=1", "--gpu=h100-80g", *RUN]
FILES = [
    ("pretrain", ["--out=OUT", "--steps=1", *RUN], "--data"),
    ("pretrain", ["--out=OUT", "--steps=1", *RUN], "--resume"),
    ("pretrain", ["--steps=1", *RUN], "--out"),
    ("pretrain", ["--out=OUT", "--steps=1", *RUN], "--deepspeed_config"),
    ("knn", ["--out=OUT", DATA, "-a=vit_small"], "--checkpoint"),
    ("linear", ["--out=OUT", DATA, "-a=vit_small"], "--checkpoint"),
    ("finetune", ["--out=OUT", "--steps=1", DATA, "-a=vit_small"], "--checkpoint"),
    ("finetune", ["--out=OUT", "--steps=1", DATA, "-a=vit_small"], "--resume"),
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
