"""arguments.py: what all commands' parsers have in common, and how flags become overrides."""

import ast
import sys
from pathlib import Path

import pytest

from crossbatch.engine.config import load_config
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.launch import __main__, convert, doctor, embed, finetune, knn, linear, plan, pretrain, preview, replay
from crossbatch.launch.__main__ import COMMANDS
from crossbatch.launch.arguments import ALIASES, ArgumentParser, add_config_flags, overrides

ROOT = Path(__file__).parents[2]

# Every command, with what it needs and a beginning of one of its flags.
SHORTENED = [
    (pretrain, ["--deepspeed_conf", "x"]),
    (finetune, ["--drop-p", "0"]),
    (linear, ["--cach"]),
    (knn, ["--enc", "online"]),
    (embed, ["--output", "x.npy", "--enc", "online"]),
    (plan, ["--gpus", "1", "--gpu", "v100-32g", "--js"]),
    (preview, ["--data", "x", "--coun", "1"]),
    (doctor, ["--hel"]),
    (replay, ["--run", "x", "--ste", "1"]),
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


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--crop-min", "1.5"], "--crop-min is 1.5; allowed: more than 0, at most 1"),
        (["--crop-min", "0"], "--crop-min is 0.0; allowed: more than 0, at most 1"),
        (["--blur-probability", "0", "-0.1"], "--blur-probability is (0.0, -0.1); allowed: two numbers from 0 to 1"),
    ],
)
def test_a_preview_of_impossible_views_is_refused(monkeypatch, capsys, flags, said):
    assert refused(monkeypatch, capsys, preview.main, "--data", "x", *flags) == f"error: {said}\n"


def test_field_no_parser_takes_the_beginning_of_a_flag():
    """`--drop 0.3` would be --drop-path. The commands' own class refuses it, any other parser has to say so."""
    lacking, found = [], 0
    for file in (
        path for folder in ("launch", "benchmarks", "engine", "data") for path in ROOT.glob(f"{folder}/**/*.py")
    ):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            name, words = ast.unparse(call.func), [ast.unparse(keyword) for keyword in call.keywords]
            found += name.endswith(("argparse.ArgumentParser", "parser_of"))  # of the benchmarks; it is checked, too
            if name.endswith("argparse.ArgumentParser") and "allow_abbrev=False" not in words:
                lacking.append(f"{file.relative_to(ROOT)}:{call.lineno}")
    assert not lacking and found > 5
    assert not ArgumentParser().allow_abbrev
    assert not ArgumentParser().add_subparsers().add_parser("x").allow_abbrev


def test_those_are_all_commands():
    assert {command.__name__.rpartition(".")[2] for command, _ in SHORTENED} == set(COMMANDS)


@pytest.mark.parametrize(("given", "word"), [(["pretrain", "--foo"], "--foo"), (["pretrian"], "'pretrian'")])
def test_misuse_gets_one_line_that_points_to_the_help(monkeypatch, capsys, given, word):
    said = refused(monkeypatch, capsys, __main__.main, *given)
    assert said.startswith("error: ") and word in said and said.endswith(" --help lists the flags\n")
    assert said.count("\n") == 1


def test_help_names_keys_as_they_are_called_now():
    parser = ArgumentParser()
    add_config_flags(parser)
    assert "batchformer.loss" in parser.format_help() and "batchformer.add_bf" not in parser.format_help()


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
    assert message.startswith("error: crossbatch.batchformer.loss: given twice, as 'sum' and as 'none'")
    assert message.endswith("its former name is crossbatch.batchformer.add_bf\n")
    assert len({path for _, path, _ in ALIASES}) == len(ALIASES)


def test_field_data_given_twice(monkeypatch, capsys):
    said = refused(monkeypatch, capsys, pretrain.main, "--dry-run", "--data", "a", "b")
    assert said == "error: DATA: given b beside --data a; allowed: one of the two; leave one out\n"
    secret = "https://me:verysecret@host/x?token=verysecret"
    said = refused(monkeypatch, capsys, pretrain.main, "--dry-run", "--data", secret, secret)
    assert said.startswith("error: DATA: given https://host/x beside --data https://host/x; ")
    said = refused(monkeypatch, capsys, pretrain.main, "--dry-run", "--data", secret)
    assert said.startswith("error: crossbatch.data.path: ") and "verysecret" not in said


def test_field_a_negative_add_bf(monkeypatch, capsys):
    said = refused(monkeypatch, capsys, pretrain.main, "--dry-run", "--add_bf", "-1")
    assert said.startswith("error: crossbatch.batchformer.add_bf: given -1; allowed: a whole number >= 0")


def test_field_deepspeed_as_its_help_shows_it():
    parser = ArgumentParser()
    add_config_flags(parser)
    arguments = parser.parse_args(["--deepspeed", "--deepspeed_config", "cifar10", "--data", "2012"])
    assert load_config(arguments.deepspeed_config, overrides(arguments)).crossbatch.data.path == "2012"
