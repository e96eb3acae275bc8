"""The configuration surface: what is refused, with which words; what "auto" becomes; that the documentation is complete."""

import itertools
import json
from pathlib import Path

import pytest

from crossbatch import InputError
from crossbatch.engine.config import (
    Config,
    Device,
    FinetuneConfig,
    key_paths,
    load_config,
    parse_config,
    resolve,
    resolve_finetune,
    to_dict,
)
from crossbatch.engine.config.document import all_tables
from crossbatch.engine.config.evaluation import KnnConfig, LinearConfig

RECIPES = sorted(Path("ds_configs").glob("*.json"))
CPU = Device("cpu")


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.json"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"train_batch_sise": 8}', ["train_batch_sise", "did you mean train_batch_size?"]),
        ('{"crossbatch": {"modle": {}}}', ["crossbatch.modle", "crossbatch.model"]),
        ('{"crossbatch": {"schedule": {"epoch": 5}}}', ["crossbatch.schedule.epoch", "crossbatch.schedule.epochs"]),
        ('{"crossbatch": {"epochs": 5}}', ["crossbatch.epochs", "did you mean crossbatch.schedule.epochs?"]),
        ('{"optimizer": {"type": "AdamW", "params": {"momentum": 0.9}}}', ["optimizer.params.momentum", "no such key"]),
        ('{"zero_optimization": {"stag": 1}}', ["zero_optimization.stag", "zero_optimization.stage"]),
        ('{"zero_optimization": {"stage": 4}}', ["zero_optimization.stage", "given 4", "0 or 1 or 2 or 3"]),
        ('{"zero_optimization": {"stage": true}}', ["zero_optimization.stage", "given True"]),
        ('{"optimizer": {"type": "SGD"}}', ["optimizer.type", "'SGD'", "LARS, AdamW"]),
        (
            '{"optimizer": {"params": {"variant": "lamb"}}}',
            ["optimizer.params.variant", "'lamb'", '"moco-v3" or "larc"'],
        ),
        ('{"train_batch_size": 8, "train_batch_size": 16}', ["train_batch_size", "given twice"]),
        ('{"optimizer": {"params": {"lr": 1, "lr": 2}}}', ["optimizer.params.lr", "given twice"]),
        ('{"train_batch_size": "many"}', ["train_batch_size", "'many'", "a whole number"]),
        ('{"train_batch_size": 1}', ["train_batch_size", "given 1", ">= 2"]),
        ('{"crossbatch": {"model": {"temperature": 0}}}', ["crossbatch.model.temperature", "> 0"]),
        ('{"crossbatch": {"data": {"crop_min": 1.5}}}', ["crossbatch.data.crop_min", "<= 1"]),
        ('{"optimizer": {"params": {"lr": NaN}}}', ["optimizer.params.lr", "given nan"]),
        ('{"crossbatch": []}', ["crossbatch", "a JSON object"]),
        ('{"fp16": {"enabled": true}}', ["fp16", "crossbatch.precision"]),
        ('{"zero_allow_untested_optimizer": true}', ["zero_allow_untested_optimizer", "SGD"]),
        ('{"gradient_accumulation_steps": 4}', ["gradient_accumulation_steps", "train_micro_batch_size_per_gpu"]),
        ("[1]", ["one JSON object"]),
        ('{"a": ', ["line 1", "not JSON"]),
    ],
)
def test_bad_recipes_are_refused_with_the_remedy(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        load_config(write(tmp_path, text))
    for word in words:
        assert word in str(error.value)


def test_a_missing_recipe_lists_its_neighbours(tmp_path):
    write(tmp_path, "{}")
    with pytest.raises(InputError, match=r"no such file; there are .*recipe\.json"):
        load_config(tmp_path / "recipi.json")


@pytest.mark.parametrize("override", ["x", "=3", "train_batch_size.a=3", "crossbatch.modle.arch=x"])
def test_bad_overrides_are_refused(override):
    with pytest.raises(InputError):
        load_config(RECIPES[0], [override])


def test_overrides_apply_in_order_and_read_json_or_text():
    config = load_config(None, ["train_batch_size=8", "crossbatch.model.arch=vit_small", "train_batch_size=16"])
    assert (config.train_batch_size, config.crossbatch.model.arch) == (16, "vit_small")
    assert load_config(None, ["crossbatch.momentum.cosine=true"]).crossbatch.momentum.cosine is True


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_resolve_and_survive_a_round_trip(recipe):
    is_finetuning = recipe.stem.startswith("finetune_")
    config = load_config(recipe, [], FinetuneConfig) if is_finetuning else load_config(recipe)
    assert json.loads(recipe.read_text())["gradient_clipping"] == 0.0  # DeepSpeed's own default is 1.0
    resolved = (resolve_finetune if is_finetuning else resolve)(config, 2, CPU)  # pyright: ignore[reportArgumentType]
    assert "auto" not in (resolved.config.train_micro_batch_size_per_gpu, resolved.precision, resolved.workers)
    assert parse_config(json.loads(json.dumps(to_dict(resolved.config))), type(config)) == resolved.config


def test_the_table_for_users_is_that_of_the_schema():
    """If this fails: python -m crossbatch.engine.config.document, and paste its output into ds_configs/README.md."""
    text = Path("ds_configs/README.md").read_text()
    assert all_tables() in text
    for schema in (Config, FinetuneConfig, LinearConfig, KnnConfig):
        assert all(f"`{path}`" in text for path in key_paths(schema))


@pytest.mark.parametrize(
    ("overrides", "world", "device", "words"),
    [
        (["train_batch_size=100"], 16, CPU, ["train_batch_size", "100 for 16 ranks", "set it to 96"]),
        (["optimizer.params.clip=true"], 1, CPU, ["optimizer.params.clip", "moco-v3", "set the variant to larc"]),
        (["optimizer.params.decay_after_momentum=true"], 1, CPU, ["decay_after_momentum", "set the variant to mlperf"]),
        (
            ["crossbatch.sharding=fsdp", "zero_optimization.overlap_comm=true"],
            1,
            CPU,
            ["zero_optimization.overlap_comm", "no such thing"],
        ),
        (
            ["crossbatch.precision=bf16"],
            1,
            Device("cuda", False, "Tesla V100"),
            ["crossbatch.precision", "V100", "fp32"],
        ),
        (
            ["crossbatch.batchformer.add_bf=1", "crossbatch.batchformer.group_size=100"],
            1,
            CPU,
            ["crossbatch.batchformer.group_size", "given 100", "set it to 128"],
        ),
        (["crossbatch.schedule.epochs=5"], 1, CPU, ["crossbatch.schedule.warmup_epochs", "10 of 5"]),
        (["crossbatch.model.cuda_graph=true"], 1, CPU, ["crossbatch.model.cuda_graph", "on a CPU", "set it to false"]),
        (["crossbatch.model.cuda_graph=true"], 2, Device("cuda"), ["with 2 ranks"]),
        (
            ["crossbatch.model.cuda_graph=true", "zero_optimization.stage=3"],
            1,
            Device("cuda"),
            ["zero_optimization.stage 3"],
        ),
    ],
)
def test_what_cannot_run_is_refused_with_the_remedy(overrides, world, device, words):
    with pytest.raises(InputError) as error:
        resolve(load_config(None, overrides), world, device)
    for word in words:
        assert word in str(error.value)


def test_precision_auto_follows_the_device():
    config = load_config(None)
    assert resolve(config, 1, CPU).precision == "fp32"
    assert resolve(config, 1, Device("cuda", True)).precision == "bf16"
    assert resolve(config, 1, Device("cuda", False)).precision == "fp16"


def test_group_size_is_cut_to_the_batch_and_may_span_ranks():
    config = load_config(None, ["crossbatch.batchformer.add_bf=1", "train_batch_size=64"])
    assert resolve(config, 1, CPU).group_size == 64
    assert resolve(config, 4, CPU).group_size == 64
    assert resolve(load_config(None), 1, CPU).group_size is None


def readme_table() -> list[dict[str, str]]:
    """The table "What runs where"."""
    lines = Path("README.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| sharding | stage |"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_what_runs_is_what_the_readme_says():
    walked = 0
    for row in readme_table():
        stages = [int(stage) for stage in row["stage"].split(",")]
        for stage, optimizer, offload, precision in itertools.product(
            stages, ("LARS", "AdamW"), ("none", "cpu"), ("fp32", "bf16", "fp16")
        ):
            overrides = [
                f"crossbatch.sharding={row['sharding'].strip('`')}",
                f"zero_optimization.stage={stage}",
                f"optimizer.type={optimizer}",
                f"zero_optimization.offload_optimizer.device={offload}",
                f"crossbatch.precision={precision}",
            ]
            cells = [row[optimizer], row[precision]] + ([row["offload_optimizer cpu"]] if offload == "cpu" else [])
            if all(cell in ("exact", "yes") for cell in cells):
                assert resolve(load_config(None, overrides), 2, CPU).precision == precision
            else:
                with pytest.raises(InputError, match=r"zero_optimization.offload_optimizer.device: given cpu.*set "):
                    resolve(load_config(None, overrides), 2, CPU)
            walked += 1
    assert walked == 2 * 4 * 2 * 2 * 3  # sharding x stage x optimizer x offload x precision
