"""Bytes that autograd really saves, counted with hooks on a CPU, against those of a network without memory."""

import json

import pytest
import torch
from torch import nn

from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.memory_model import GIB, StepMemory
from crossbatch.engine.sketch import kept_by_backbone, sketch, without_memory
from crossbatch.engine.tasks.build import build_model, deepspeed_config
from crossbatch.models.backbones import build_backbone

IMAGES = 3
V100 = Device("cuda", False, "V100")


def saved(call, *modules) -> int:
    """Bytes of different memory that is saved for backward; parameters and buffers are there anyway."""
    own = {
        t.untyped_storage().data_ptr()
        for module in modules
        for t in [*module.parameters(), *module.buffers()]
        if t.numel()
    }
    found, alive = {}, []  # or memory would be given out twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(call())
    return sum(found.values())


def images(size, count=IMAGES):
    x = torch.randn(2 * count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return x.to(memory_format=torch.channels_last)


def computed(arch, size, precision="fp32", checkpointed="none", **options) -> float:
    backbone = without_memory(lambda: build_backbone(arch, size, **options))
    backbone.checkpoint_activations(checkpointed)
    kept = kept_by_backbone(backbone, size, precision, checkpointed == "blocks")
    return kept.per_image * IMAGES + kept.fixed


@pytest.mark.parametrize(
    ("arch", "size", "options"),
    [
        ("resnet50", 64, {}),
        ("vit_small", 64, {}),
        ("vit_conv_small", 64, {}),
        ("resnet18", 32, {"stem": "small"}),
        pytest.param("resnet50", 96, {}, marks=pytest.mark.slow),
        pytest.param("vit_small", 96, {}, marks=pytest.mark.slow),
        pytest.param("vit_small", 64, {"stop_grad_conv1": True}, marks=pytest.mark.slow),
    ],
)
def test_backbones(arch, size, options):
    backbone = build_backbone(arch, size, **options)
    really = saved(lambda: backbone(images(size)), backbone)
    assert computed(arch, size, **options) == pytest.approx(really, rel=0.01)


def test_16_bits():
    """Under autocast a ResNet keeps half, and the weights once more."""
    backbone = build_backbone("resnet18", 64)
    with torch.autocast("cpu", torch.bfloat16):
        really = saved(lambda: backbone(images(64)), backbone)
    assert computed("resnet18", 64, "bf16") == pytest.approx(really, rel=0.02)


def blocks_of(backbone) -> list[nn.Module]:
    stages = [backbone.blocks] if hasattr(backbone, "blocks") else [getattr(backbone, f"layer{i}") for i in range(1, 5)]
    return [block for stage in stages for block in stage]


@pytest.mark.parametrize(("arch", "size"), [pytest.param("resnet18", 64, marks=pytest.mark.slow), ("vit_small", 32)])
def test_checkpointed_blocks(arch, size):
    """Their inputs and what is outside of them, and everything of the block that is being repeated."""
    backbone = build_backbone(arch, size)
    inputs = {}
    for block in blocks_of(backbone):
        block.register_forward_pre_hook(lambda block, args: inputs.setdefault(block, args[0].detach()))
    backbone(images(size))
    insides = [saved(lambda b=b, x=x: b(x.clone().requires_grad_()), b) - x.nbytes for b, x in inputs.items()]
    backbone.checkpoint_activations("blocks")
    really = saved(lambda: backbone(images(size)), backbone) + max(insides)
    assert computed(arch, size, checkpointed="blocks") == pytest.approx(really, rel=0.03)
    assert computed(arch, size, checkpointed="blocks") < 0.8 * computed(arch, size)


@pytest.mark.long
@pytest.mark.parametrize("arch", [pytest.param("resnet18", marks=pytest.mark.slow), "resnet50"])
def test_norms_that_are_computed_again(arch):
    backbone, size = build_backbone(arch, 64), 64
    backbone.checkpoint_activations("norms")
    really = saved(lambda: backbone(images(size)), backbone)
    assert computed(arch, size, checkpointed="norms") == pytest.approx(really, rel=0.01)


@pytest.mark.long
def test_what_an_image_keeps():
    """Of both views, at 224 px under bf16; docs/exactness.md has these figures."""
    mib = {}
    for what in ("none", "norms", "blocks"):
        backbone = without_memory(lambda: build_backbone("resnet50"))
        backbone.checkpoint_activations(what)
        mib[what] = kept_by_backbone(backbone, 224, "bf16", what == "blocks").per_image / 2**20
    assert mib == pytest.approx({"none": 83.5, "norms": 67.9, "blocks": 43.4}, rel=0.005)


@pytest.mark.long
def test_a_backbone_is_traced_once_for_each_of_what_it_depends_on():
    """The batch is not among that; two sketches of the same backbone share what was traced."""
    found = []
    for what, size, width, precision, batch in (
        ("none", 16, 24, "fp32", 16),
        ("blocks", 16, 24, "fp32", 16),
        ("none", 32, 24, "fp32", 16),
        ("none", 16, 48, "fp32", 16),
        ("none", 16, 24, "bf16", 16),
        ("none", 16, 24, "fp32", 32),
    ):
        args = {"embed_dim": width, "depth": 2, "num_heads": 2, "patch_size": 4}
        model = {"arch": "vit_small", "checkpoint_activations": what, "backbone_args": json.dumps(args), "mlp_dim": 16}
        overrides = [f"crossbatch.model.{key}={value}" for key, value in model.items()]
        overrides += [f"crossbatch.data.image_size={size}", f"crossbatch.precision={precision}"]
        overrides += [f"train_batch_size={batch}", "crossbatch.batchformer.group_size=4"]
        found.append(sketch(resolve(load_config(None, overrides), 1, Device("cpu"))).backbone)
        backbone = without_memory(lambda size=size, args=args: build_backbone("vit_small", size, backbone_args=args))
        backbone.checkpoint_activations(what)
        assert found[-1] == kept_by_backbone(backbone, size, precision, what == "blocks")
    assert len(set(found[:-1])) == len(found) - 1 and found[-1] is found[0]


@pytest.mark.parametrize(
    "add_bf", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(37, marks=pytest.mark.slow)]
)
def test_behind_the_backbone(add_bf):
    overrides = [
        "train_batch_size=12",
        "crossbatch.batchformer.group_size=6",
        f"crossbatch.batchformer.add_bf={add_bf}",
        "crossbatch.model.arch=resnet18",
        "crossbatch.data.image_size=32",
    ]
    run = resolve(load_config("ds_configs/bs4096.json", overrides), 1, Device("cpu"))
    model = build_model(run)
    width = model.online.backbone.num_features
    online, momentum = torch.randn(24, width, requires_grad=True), torch.randn(24, width)
    really = saved(lambda: model.contrast(online, momentum, 0, 0).loss, model)
    # At 12 images the statistics of the norms, which our norm keeps for each view, are 7 % of it; at 256, nothing.
    assert sketch(run).batch_wide == pytest.approx(really, rel=0.08)


def test_groups_that_span_ranks():
    """A rank keeps keys and values of the whole group, as the ranks of test_equivalence compute them."""
    overrides = ["train_batch_size=64", "crossbatch.model.arch=resnet18", "crossbatch.data.image_size=32"]
    kept = {}
    for group in (8, 64):
        config = load_config("ds_configs/bs4096.json", [*overrides, f"crossbatch.batchformer.group_size={group}"])
        kept[group] = sketch(resolve(config, 8, Device("cpu"))).batch_wide
    rows, width = 2 * (64 - 8), 512
    assert kept[64] - kept[8] > rows * width * 3 * 4  # the others' features, their keys and values


def test_a_share_of_bs4096_fits_on_32_gib():
    run = resolve(load_config("ds_configs/bs4096.json"), 16, Device("cuda", False, "V100"))
    memory = StepMemory(run)
    assert memory.sketch.backbone.per_image / 2**20 == pytest.approx(83.5, rel=0.01)  # as measured on a CPU under bf16
    assert 22 < memory.at(256).total / GIB < 28
    assert memory.at(256).fits(32) and not memory.at(256).fits(24)
    assert memory.at(128).total < memory.at(256).total
    for budget in (4, 8, 16, 24):
        chunk = memory.largest_chunk(budget * GIB)
        assert memory.at(chunk).without_context <= budget * GIB
        fewer = -(-256 // (-(-256 // chunk) - 1)) if chunk < 256 else 257  # the chunk of one chunk less
        assert chunk == 256 or memory.at(fewer).without_context > budget * GIB
    assert memory.largest_chunk(0.5 * GIB) == 0


@pytest.mark.parametrize(
    ("stage", "given", "want"),
    [
        (1, {}, 60_000_000),
        (2, {"overlap_comm": False}, 60_000_000),
        (1, {"overlap_comm": True}, 25_000_000),
        (3, {}, 25_000_000),
        (3, {"overlap_comm": False}, 60_000_000),
        (2, {"overlap_comm": True, "reduce_bucket_size": 7}, 7),
        (1, {"reduce_bucket_size": 500_000_000}, 500_000_000),
    ],
)
def test_the_bucket_of_deepspeed_is_no_larger_than_the_gradients_unless_asked_for(stage, given, want):
    """Both what DeepSpeed is given and what is counted; its own default of half a billion elements takes 1.86 GiB."""
    zero = {"stage": stage, **given}
    overrides = [f"zero_optimization.{name}={json.dumps(value)}" for name, value in zero.items()]
    small = ["crossbatch.model.arch=resnet18", "crossbatch.data.image_size=32"]
    run = resolve(load_config(None, [*small, *overrides]), 16, V100)
    memory = StepMemory(run)
    memory._trained = 60_000_000
    assert deepspeed_config(run, 60_000_000)["zero_optimization"]["reduce_bucket_size"] == want
    (bucket,) = [part.bytes for part in memory._gradients() if part.name == "bucket"]
    assert bucket == 4 * want * (2 if given.get("overlap_comm") and stage < 3 else 1)


def test_the_bucket_of_deepspeed_counts():
    """Where the backward pass is the peak, ZeRO's buffer of half a billion elements is part of it, and a smaller one helps."""
    totals = {}
    for size in ("500000000", "60000000"):
        overrides = ["zero_optimization.overlap_comm=false", f"zero_optimization.reduce_bucket_size={size}"]
        run = resolve(load_config("ds_configs/vits_bs4096.json", overrides), 16, Device("cuda", False, "V100"))
        totals[size] = StepMemory(run).at(256).total
    assert totals["500000000"] - totals["60000000"] == pytest.approx(4 * 440e6, rel=0.2)


def test_a_copy_of_the_state_is_counted_where_one_is_made(monkeypatch):
    def parts(device: Device, *overrides: str) -> dict[str, float]:
        run = resolve(load_config("ds_configs/bs4096.json", list(overrides)), 16, device)
        return {part.name: part.bytes for part in StepMemory(run).at(8).parts}

    often = "crossbatch.checkpoint.memory_every_steps=1"
    assert "copy" not in parts(V100) and "copy" not in parts(Device("cpu"), often)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for found in (parts(V100), parts(V100, often)):
        assert found["copy"] == found["parameters"] + found["optimizer"]
    assert "copy" not in parts(V100, "crossbatch.checkpoint.memory_every_steps=0")


def test_what_is_sharded_is_less():
    """Of AdamW on 16 ranks: 16 bytes of a trained parameter and 4 of a momentum one, cut as the stage says."""
    totals = {}
    for sharding, stage in (("zero", 0), ("zero", 1), ("zero", 3), ("fsdp", 3)):
        overrides = [f"crossbatch.sharding={sharding}", f"zero_optimization.stage={stage}"]
        run = resolve(load_config("ds_configs/vitb_bs4096.json", overrides), 16, Device("cuda", True, "A100"))
        parts = {part.name: part.bytes for part in StepMemory(run).at(64).parts}
        totals[sharding, stage] = parts["parameters"], parts["optimizer"]
        trained = sum(p.numel() for p in sketch(run).model.parameters() if p.requires_grad)
        everything = sum(p.numel() for p in sketch(run).model.parameters())
    assert totals["zero", 0] == (4 * everything, 8 * trained)
    assert totals["zero", 1] == (4 * everything, 12 * trained / 16)  # with the fp32 copy that DeepSpeed steps on
    assert totals["zero", 3] == (4 * everything / 16, 12 * trained / 16)
    assert totals["fsdp", 3] == (4 * everything / 16, 8 * trained / 16)


def test_nothing_is_drawn_and_nothing_stays_patched():
    """A run that asks for its chunk starts from the same weights as one that does not, with CUDA graphs too."""
    before = torch.get_rng_state()
    overrides = ["crossbatch.model.arch=resnet18", "crossbatch.data.image_size=40", "crossbatch.model.cuda_graph=true"]
    StepMemory(resolve(load_config("ds_configs/bs4096.json", overrides), 1, Device("cuda", True, "A100")))
    assert torch.equal(torch.get_rng_state(), before)
    assert type(torch.empty(1)) is torch.Tensor and not torch.is_autocast_enabled("cpu")


@pytest.mark.long
def test_no_shape_travels_to_other_ranks(monkeypatch):
    """Where a process group is there, as when the chunk of a run on several ranks is computed."""
    from crossbatch.models import GroupCollective

    def refuse(*_):
        raise AssertionError("a collective")

    monkeypatch.setattr(GroupCollective, "world_size", 2)
    for name in ("all_gather", "all_reduce", "reduce_scatter"):
        monkeypatch.setattr(GroupCollective, name, refuse)
    overrides = ["train_batch_size=24", "crossbatch.batchformer.group_size=8", "crossbatch.data.image_size=40"]
    sketch(resolve(load_config(None, overrides), 2, Device("cpu")))
