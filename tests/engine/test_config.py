"""The configuration surface: what is refused, with which words; what "auto" becomes; that the documentation is complete."""

import functools
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
    user_input,
)
from crossbatch.engine.config.deepspeed_keys import KEYS, OTHERS
from crossbatch.engine.config.document import all_tables
from crossbatch.engine.config.evaluation import KnnConfig, LinearConfig
from crossbatch.engine.config.resolve import share_cores
from crossbatch.engine.config.schema import ZeroConfig
from crossbatch.engine.datasets import view_augmentations
from crossbatch.engine.nested import flatten, nest
from crossbatch.engine.tasks.build import deepspeed_config

ROOT = Path(__file__).parents[2]
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
        ('{"lr": 0.1}', ["lr: no such key", "did you mean optimizer.params.base_lr?"]),
        ('{"batchformer": {}}', ["batchformer", "did you mean crossbatch.batchformer?"]),
        ('{"crossbatch": {"epochs": 5}}', ["crossbatch.epochs", "did you mean crossbatch.schedule.epochs?"]),
        ('{"optimizer": {"type": "AdamW", "params": {"momentum": 0.9}}}', ["optimizer.params.momentum", "no such key"]),
        ('{"zero_optimization": {"stag": 1}}', ["zero_optimization.stag", "zero_optimization.stage"]),
        (
            '{"zero_optimization": {"stage": 4}}',
            ["zero_optimization.stage", "given 4", "a whole number (>= 0 and <= 3)"],
        ),
        ('{"zero_optimization": {"stage": true}}', ["zero_optimization.stage", "given True"]),
        ('{"optimizer": {"type": "SGD"}}', ["optimizer.type", "'SGD'", '"LARS" or "AdamW"']),
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
        ('{"fp16": {"enabled": 1}}', ["fp16", "crossbatch.precision"]),
        ('{"zero_allow_untested_optimizer": false}', ["zero_allow_untested_optimizer", "SGD"]),
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


def test_a_key_of_another_optimizer_is_not_recommended():
    with pytest.raises(
        InputError, match=r"momentum: no such key with optimizer.type AdamW; allowed here: base_lr, .*, decay_1d"
    ):
        load_config(None, ["optimizer.type=AdamW", "optimizer.params.momentum=0.9"])


def test_field_a_key_of_another_optimizer_names_the_type():
    with pytest.raises(
        InputError, match=r"no such key with optimizer.type AdamW; allowed .*; or change optimizer.type$"
    ):
        load_config(None, ["optimizer.type=AdamW", "optimizer.params.momentum=0.9"])


@pytest.mark.parametrize("name", ["2012", "true", "1e3", "[1]"])
def test_field_a_folder_may_be_called_like_a_number(name):
    assert load_config(None, [f"crossbatch.data.path={name}"]).crossbatch.data.path == name
    assert load_config(None, [f'crossbatch.data.path="{name}"']).crossbatch.data.path == name
    assert load_config(None, ['crossbatch.model.backbone_args={"width": 8}']).crossbatch.model.backbone_args == {
        "width": 8
    }


def test_field_a_whole_number_with_an_exponent(tmp_path):
    text = '{"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}, "train_batch_size": 1.6e1, "gradient_clipping": 1e0}'
    config = load_config(write(tmp_path, text), ["zero_optimization.allgather_bucket_size=2E8"])
    zero = config.zero_optimization
    assert (zero.reduce_bucket_size, zero.allgather_bucket_size, config.train_batch_size) == (5 * 10**8, 2 * 10**8, 16)
    assert isinstance(config.gradient_clipping, float)
    with pytest.raises(InputError, match=r"given 1\.5; allowed: a whole number"):
        load_config(None, ["zero_optimization.reduce_bucket_size=15e-1"])


# What DeepSpeed's examples and Hugging Face's recipes hold, and changes nothing that crossbatch promises.
HARMLESS = {
    "gradient_accumulation_steps": 1,
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": False},
    "amp": {"enabled": False, "opt_level": "O1"},
    "flops_profiler": {"enabled": False, "profile_step": 1},
    "wandb": {"enabled": False, "project": "x"},
    "comms_logger": {"enabled": True, "verbose": False},
    "prescale_gradients": False,
    "aio": {"enabled": False},
    "zero_optimization": {
        "stage": 1,
        "allgather_partitions": True,
        "stage3_param_persistence_threshold": 1e5,
        "stage3_gather_16bit_weights_on_model_save": True,
        "round_robin_gradients": False,
        "offload_param": {"device": "none"},
        "overlap_comm": True,
    },
}


def test_field_deepspeeds_keys_that_change_nothing(tmp_path):
    config = load_config(write(tmp_path, json.dumps(HARMLESS)))
    kept = {"steps_per_print": 2000, "comms_logger": {"enabled": True, "verbose": False}}
    plain = load_config(None, ["zero_optimization.stage=1", "zero_optimization.overlap_comm=true"])
    assert to_dict(config) == {**to_dict(plain), **kept}
    assert kept.items() <= deepspeed_config(resolve(config, 1, Device("cpu")), 100).items()
    config = config.model_copy(update={"crossbatch": config.crossbatch.model_copy(update={"sharding": "fsdp"})})
    with pytest.raises(InputError, match=r"^steps_per_print: given 2000 with crossbatch.sharding fsdp, .*remove it"):
        resolve(config, 1, Device("cpu"))


@pytest.mark.parametrize(
    ("section", "precision"),
    [
        ({"fp16": {"enabled": True, "initial_scale_power": 16}}, "fp16"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, "bf16"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "fp16"),
    ],
)
def test_field_deepspeeds_precision_is_ours(tmp_path, section, precision):
    recipe = write(tmp_path, json.dumps({**section, "crossbatch": {"precision": "auto", "seed": 3}}))
    assert load_config(recipe).crossbatch.precision == precision and load_config(recipe).crossbatch.seed == 3
    assert load_config(recipe, [f"crossbatch.precision={precision}"]).crossbatch.precision == precision
    with pytest.raises(InputError, match=r"crossbatch.precision: given fp32, but .*enabled means .*leave .* out"):
        load_config(recipe, ["crossbatch.precision=fp32"])


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("gradient_accumulation_steps", 4, "train_micro_batch_size_per_gpu"),
        ("scheduler", {"type": "WarmupLR"}, "set crossbatch.schedule"),
        ("zero_allow_untested_optimizer", False, "would turn LARS into SGD"),
        ("fp16", {"enabled": True, "loss_scale_window": 100}, "fp16.loss_scale_window: given 100; .*GradScaler"),
        ("wandb", {"enabled": True}, "TensorBoard files.*sync_tensorboard"),
        ("flops_profiler", {"enabled": True}, "--profile N"),
        ("wall_clock_breakdown", True, "--profile N"),
        ("prescale_gradients", True, "mean of the gradients"),
        ("communication_data_type", "fp16", "gradients travel in fp32"),
        ("elasticity", {"enabled": True}, "crossbatch has nothing like it; leave it out"),
        (
            "zero_optimization",
            {"zero_quantized_gradients": True},
            "zero_optimization.zero_quantized_gradients: given true",
        ),
        ("zero_optimization", {"offload_param": {"device": "cpu"}}, "parameters stay"),
        ("activation_checkpointing", {"cpu_checkpointing": True}, "crossbatch.model.checkpoint_activations"),
    ],
)
def test_field_deepspeeds_keys_that_cannot_be_followed(tmp_path, key, value, why):
    with pytest.raises(InputError, match=why) as error:
        load_config(write(tmp_path, json.dumps({key: value})))
    assert str(error.value).startswith(key) and "; a DeepSpeed key; " in str(error.value)


def test_field_every_key_of_deepspeeds_zero_is_known():
    """Neither a misspelling nor a key that is passed over: each is ours, or in the table."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    known = {*ZeroConfig.model_fields, *(path.partition(".")[2] for path in (*KEYS, *OTHERS))}
    assert names <= known


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


# --- former names --------------------------------------------------------------------------------------------------

DESIGN = """
{"train_batch_size": 4096, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 0.0,
 "optimizer": {"type": "LARS", "params": {"lr": 0.6, "momentum": 0.9, "weight_decay": 1e-6}},
 "zero_optimization": {"stage": 1},
 "crossbatch": {"model": {"arch": "resnet50"}, "batchformer": {"add_bf": 1, "group_size": 256},
                "momentum": {"base": 0.99, "cosine": true}, "schedule": {"epochs": 100, "warmup_epochs": 10},
                "data": {"path": "...", "backend": "auto", "crop_min": 0.2}, "sharding": "zero", "precision": "auto"}}
"""
FORMER = [
    ("optimizer.params.lr", "optimizer.params.base_lr", 0.3, Config),
    ("crossbatch.model.dim", "crossbatch.model.projection_dim", 64, Config),
    ("crossbatch.evaluate.knn_images", "crossbatch.evaluate.knn_bank_size", 500, Config),
    ("optimizer.params.clip", "optimizer.params.clip_trust_ratio", True, Config),
    ("crossbatch.finetune.average", "crossbatch.finetune.ema_decay", 0.9, FinetuneConfig),
    ("optimizer.params.lr", "optimizer.params.base_lr", 3e-3, FinetuneConfig),
    ("optimizer.params.lr", "optimizer.params.base_lr", (0.1, 1.0), LinearConfig),
]


def at(config, path: str):
    return functools.reduce(getattr, path.split("."), config)


def test_the_first_recipe_of_the_design_is_bs4096(tmp_path):
    ours = load_config("ds_configs/bs4096.json", ["crossbatch.data.path=..."])
    assert load_config(write(tmp_path, DESIGN), ["zero_optimization.overlap_comm=true"]) == ours  # found out later
    assert resolve(ours, 16, CPU).lr_peak == 0.6 * 4096 / 256


@pytest.mark.parametrize(("former", "path", "value", "schema"), FORMER)
def test_a_former_name_means_its_key_wherever_it_is_written(tmp_path, former, path, value, schema):
    text, recipe = json.dumps(value), write(tmp_path, json.dumps(nest({former: value})))
    for config in (load_config(recipe, [], schema), load_config(None, [f"{former}={text}"], schema)):
        assert at(config, path) == value
        assert config == parse_config(nest({former: value}), schema) == load_config(None, [f"{path}={text}"], schema)
    section, _, name = former.rpartition(".")
    assert at(load_config(None, [f"{section}={json.dumps({name: value})}"], schema), path) == value
    assert former not in flatten(to_dict(config)) and path in flatten(to_dict(config))


ADD_BF = {0: "none", 1: "sum", 34: "sum", 36: "mean", 37: "mean_with_self", 2: "joint", 33: "joint"}


@pytest.mark.parametrize(("value", "want"), [("true", "blocks"), ("false", "none"), ("norms", "norms")])
def test_what_is_checkpointed_may_be_a_boolean_as_in_old_runs(value, want):
    config = load_config(None, [f"crossbatch.model.checkpoint_activations={value}"])
    assert config.crossbatch.model.checkpoint_activations == want
    with pytest.raises(InputError, match=r'activations: given 1; allowed: "none" or "norms" or "blocks"$'):
        load_config(None, ["crossbatch.model.checkpoint_activations=1"])


@pytest.mark.parametrize(("add_bf", "loss"), ADD_BF.items())
def test_add_bf_is_another_name_of_the_loss(add_bf, loss):
    config = load_config(None, [f"crossbatch.batchformer.add_bf={add_bf}"])
    assert config.crossbatch.batchformer.loss == loss


def test_two_names_of_a_key_must_not_contradict_each_other(tmp_path):
    both = {"crossbatch": {"batchformer": {"add_bf": 34, "loss": "sum"}}}
    assert parse_config(both).crossbatch.batchformer.loss == "sum"
    both["crossbatch"]["batchformer"]["loss"] = "mean"
    overrides = ["crossbatch.batchformer.loss=mean", "crossbatch.batchformer.add_bf=34"]
    for load in (lambda: load_config(write(tmp_path, json.dumps(both))), lambda: load_config(None, overrides)):
        with pytest.raises(
            InputError, match=r"^\S+loss: given twice, as '\w+' and as '\w+'; .* its former name is \S+add_bf$"
        ):
            load()
    replaced = ["crossbatch.model.dim=8", "crossbatch.model={}", "crossbatch.model.projection_dim=4"]
    assert load_config(None, replaced).crossbatch.model.projection_dim == 4
    recipe = write(tmp_path, '{"crossbatch": {"batchformer": {"loss": "sum"}}}')
    assert load_config(recipe, ["crossbatch.batchformer.add_bf=0"]).crossbatch.batchformer.loss == "none"


def test_errors_name_the_key_and_its_former_name(tmp_path):
    for load in (
        lambda: load_config(None, ["crossbatch.model.dim=0"]),
        lambda: load_config(write(tmp_path, '{"crossbatch": {"model": {"dim": 0}}}')),
    ):
        with pytest.raises(
            InputError, match=r"^\S+projection_dim: given 0; .*; its former name is crossbatch.model.dim$"
        ):
            load()
    with pytest.raises(
        InputError, match=r"^\S+projection_dim: no such key; .*its former name is crossbatch.model.dim$"
    ):
        load_config(None, ["crossbatch.model.dim=8"], FinetuneConfig)
    with pytest.raises(InputError, match=r"add_bf: given 'sum'; allowed: a whole number"):
        load_config(None, ["crossbatch.batchformer.add_bf=sum"])


def test_the_peak_follows_the_reference_batch():
    sizes = ["train_batch_size=1024", "optimizer.params.base_lr=0.5"]
    assert resolve(load_config(None, sizes), 1, CPU).lr_peak == 2.0
    assert resolve(load_config(None, [*sizes, "optimizer.params.reference_batch=1024"]), 1, CPU).lr_peak == 0.5
    assert resolve_finetune(load_config(None, sizes, FinetuneConfig), 1, CPU).lr_peak == 1.0


# --- meanings ------------------------------------------------------------------------------------------------------


def test_a_resolved_configuration_reads_like_a_recipe():
    cfg = resolve(load_config(None), 2, CPU)
    assert cfg.crossbatch is cfg.config.crossbatch and cfg.optimizer is cfg.config.optimizer
    assert cfg.train_batch_size == 4096


def test_wrong_arguments_become_wrong_keys_once():
    def failing(error: Exception, key: str = "crossbatch.data.path", **keys: str) -> str:
        with pytest.raises(InputError) as raised, user_input(key, **keys):
            raise error
        return str(raised.value)

    assert failing(ValueError("/images: no train/")) == "crossbatch.data.path: /images: no train/"
    assert failing(PermissionError("no access to x"), "--data") == "--data: no access to x; make it readable"
    assert failing(ValueError("arch is 'x'"), "crossbatch.model.") == "crossbatch.model.arch is 'x'"
    image_size = failing(ValueError("image_size is 3"), "crossbatch.model.", image_size="crossbatch.data.image_size")
    assert image_size == "crossbatch.data.image_size is 3"
    assert failing(InputError("seed: given -1")) == "seed: given -1"
    with pytest.raises(TypeError), user_input("crossbatch.model"):
        raise TypeError("a bug")


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
        (
            ["train_batch_size=100"],
            16,
            CPU,
            ["train_batch_size", "100 for 16 ranks", "a multiple of the number of ranks", "set it to 96"],
        ),
        (
            ["optimizer.params.clip_trust_ratio=true"],
            1,
            CPU,
            ["clip_trust_ratio", "moco-v3", "set the variant to larc"],
        ),
        (["optimizer.params.decay_after_momentum=true"], 1, CPU, ["decay_after_momentum", "set the variant to mlperf"]),
        (
            ["optimizer.params.eps=0.1"],
            1,
            CPU,
            ["optimizer.params.eps: given 0.1", "moco-v3", "set the variant to larc"],
        ),
        (
            ["crossbatch.sharding=fsdp", "zero_optimization.overlap_comm=false"],
            1,
            CPU,
            ["zero_optimization.overlap_comm", "no such setting"],
        ),
        (
            ["crossbatch.precision=bf16"],
            1,
            Device("cuda", False, "Tesla V100"),
            ["crossbatch.precision", "V100", "fp32"],
        ),
        (
            ["crossbatch.batchformer.loss=sum", "crossbatch.batchformer.group_size=100"],
            1,
            CPU,
            ["crossbatch.batchformer.group_size", "given 100", "set it to 128"],
        ),
        (["crossbatch.schedule.epochs=5"], 1, CPU, ["crossbatch.schedule.warmup_epochs", "10 of 5"]),
        (["crossbatch.model.cuda_graph=true"], 1, CPU, ["crossbatch.model.cuda_graph", "on a CPU", "set it to false"]),
        (["crossbatch.model.cuda_graph=true"], 2, Device("cuda"), ["with 2 ranks"]),
        (
            ["crossbatch.model.norm_ranks=3"],
            8,
            CPU,
            ["crossbatch.model.norm_ranks: given 3 for 8 ranks", "set it to 2"],
        ),
        (["crossbatch.model.norm_ranks=16"], 8, CPU, ["a divisor of 8", "set it to 8"]),
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
    assert resolve(config, 1, Device("cpu", has_amx=True)).precision == "bf16"
    assert resolve(config, 1, Device("cuda", True)).precision == "bf16"
    assert resolve(config, 1, Device("cuda", False)).precision == "fp16"


def test_group_size_is_cut_to_the_batch_and_may_span_ranks():
    config = load_config(None, ["crossbatch.batchformer.loss=sum", "train_batch_size=64"])
    assert resolve(config, 1, CPU).group_size == 64
    assert resolve(config, 4, CPU).group_size == 64
    assert resolve(load_config(None), 1, CPU).group_size is None


def test_ranks_that_share_statistics_follow_nodes():
    def norm_ranks(given: str | int, world: int, of_a_node: int) -> tuple[str | int, int]:
        cfg = resolve(
            load_config(None, ["train_batch_size=24", f"crossbatch.model.norm_ranks={given}"]), world, CPU, of_a_node
        )
        return to_dict(cfg.config)["crossbatch"]["model"]["norm_ranks"], cfg.norm_ranks

    assert norm_ranks("world", 8, 4) == ("world", 8)
    assert norm_ranks("node", 8, 4) == (4, 4)
    assert norm_ranks("node", 4, 4) == norm_ranks(4, 4, 2) == ("world", 4)  # a run of all ranks may go on with fewer
    assert norm_ranks(2, 8, 4) == (2, 2)
    with pytest.raises(InputError, match=r"given node, which has 4 ranks here, for 6 ranks.* set it to 3"):
        norm_ranks("node", 6, 4)


def test_a_bare_name_is_a_recipe_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("bs4096") == load_config("bs4096.json") == load_config(ROOT / "ds_configs" / "bs4096.json")
    (tmp_path / "bs4096").write_text('{"train_batch_size": 64}')
    assert load_config("bs4096").train_batch_size == 64  # a file of that name is meant where there is one
    with pytest.raises(InputError, match=r"no such file.*quickstart"):
        load_config("bs4097")


def documented_table() -> list[dict[str, str]]:
    """Rows of the table "What agrees" of the documentation."""
    lines = Path("docs/exactness.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| sharding | stage |"))
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    names, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_what_runs_is_what_the_documentation_says():
    walked = 0
    for row in documented_table():
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
            cells = [row[optimizer], row[precision]] + ([row["`offload_optimizer` cpu"]] if offload == "cpu" else [])
            if all(cell in ("exact", "yes") for cell in cells):
                assert resolve(load_config(None, overrides), 2, CPU).precision == precision
            else:
                with pytest.raises(InputError, match=r"zero_optimization.offload_optimizer.device: given cpu.*set "):
                    resolve(load_config(None, overrides), 2, CPU)
            walked += 1
    assert walked == 2 * 4 * 2 * 2 * 3  # sharding x stage x optimizer x offload x precision


def test_all_cores_of_a_rank_compute_on_a_cpu_beside_its_loader(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [share_cores("auto", CPU, ranks) for ranks in (1, 2, 8, 16)] == [(2, 8), (1, 4), (1, 1), (1, 1)]
    assert share_cores("auto", Device("cuda"), 1) == (7, 8)


def test_the_recipe_says_how_often_views_are_blurred():
    config = load_config("ds_configs/quickstart.json", ["crossbatch.data.blur_probability=[0.5, 0]"])
    assert [view.blur_probability for view in view_augmentations(config.crossbatch.data)] == [0.5, 0.0]
