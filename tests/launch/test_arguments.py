"""arguments.py: what all commands' parsers have in common, and how flags become overrides."""

import ast
import sys
from pathlib import Path

import pytest

from crossbatch.engine.config import load_config
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.launch import convert, doctor, finetune, knn, linear, plan, pretrain, preview
from crossbatch.launch.arguments import ALIASES, ArgumentParser, add_config_flags, overrides

# Every command, with what it needs and a beginning of one of its flags.
SHORTENED = [
    (pretrain, ["--deepspeed_conf", "x"]),
    (finetune, ["--drop-p", "0"]),
    (linear, ["--cach"]),
    (knn, ["--enc", "online"]),
    (plan, ["--gpus", "1", "--gpu", "v100-32g", "--js"]),
    (preview, ["--data", "x", "--coun", "1"]),
    (doctor, ["--hel"]),
    (convert, ["shards", "--data", "x", "--output", "y", "--see", "1"]),
    (convert, ["import", "file", "--out", "x", "--deepspeed_conf", "x"]),
    (convert, ["export", "--checkpoint", "x", "--to", "timm", "--output", "y", "--enc", "online"]),
]


def refused(monkeypatch, capsys, main, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments"),
    SHORTENED,
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_shortened_flag_is_refused(monkeypatch, capsys, command, arguments):
    assert "unrecognized arguments: --" in refused(monkeypatch, capsys, command.main, *arguments)


def test_every_command_has_such_a_parser():
    making = {"ArgumentParser": set(), "argparse": set()}
    for file in Path("launch").glob("*.py"):
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            function = call.func
            if isinstance(function, ast.Attribute) and function.attr == "ArgumentParser":
                making["argparse"].add(file.stem)
            elif isinstance(function, ast.Name) and function.id == "ArgumentParser":
                making["ArgumentParser"].add(file.stem)
    assert making == {
        "ArgumentParser": {command.__name__.rpartition(".")[2] for command, _ in SHORTENED},
        "argparse": set(),
    }


def test_flags_are_keys(monkeypatch, capsys):
    parser = ArgumentParser()
    add_config_flags(parser)
    given = "-a vit_small -b 64 --optimizer adamw --lr 1e-3 --moco-dim 64 --add_bf 36 --moco-m-cos --data 2024"
    arguments = parser.parse_args([*given.split(), "--set", "train_batch_size=32"])
    config = load_config(None, overrides(arguments))
    crossbatch = config.crossbatch
    assert (config.train_batch_size, config.optimizer.type, config.optimizer.params.base_lr) == (32, "AdamW", 1e-3)
    assert (crossbatch.model.arch, crossbatch.model.projection_dim, crossbatch.batchformer.loss) == (
        "vit_small",
        64,
        "mean",
    )
    assert crossbatch.momentum.cosine and crossbatch.data.path == "2024"
    contradiction = ["--add_bf", "1", "--set", "crossbatch.batchformer.loss=none", "--dry-run"]
    message = refused(monkeypatch, capsys, pretrain.main, *contradiction)
    assert message.startswith("error: crossbatch.batchformer.loss: means 'none', but crossbatch.batchformer.add_bf")
    assert len({path for _, path, _ in ALIASES}) == len(ALIASES)
