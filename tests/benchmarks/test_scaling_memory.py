"""Bytes that autograd really saves, counted with hooks on a CPU, against those computed from shapes."""

import pytest
import torch
from torch import nn

from benchmarks.scaling.activations import kept, kept_by_backbone, largest_moment
from benchmarks.scaling.memory import GIB, backbone_kept, batch_wide_kept, step_memory
from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.tasks.build import build_model
from crossbatch.models.backbones import build_backbone

IMAGES = 3


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


def without_memory(arch, size, **options):
    with torch.device("meta"):
        return build_backbone(arch, size, **options)


@pytest.mark.parametrize(
    ("arch", "size", "options"),
    [
        ("resnet50", 64, {}),
        ("resnet50", 96, {}),
        ("vit_small", 64, {}),
        ("vit_small", 96, {}),
        ("vit_small", 64, {"stop_grad_conv1": True}),
        ("vit_conv_small", 64, {}),
        ("resnet18", 32, {"stem": "small"}),
    ],
)
def test_backbones(arch, size, options):
    backbone = build_backbone(arch, size, **options)
    really = saved(lambda: backbone(images(size)), backbone)
    computed = kept_by_backbone(without_memory(arch, size, **options), size, "fp32").bytes(IMAGES)
    assert computed == pytest.approx(really, rel=0.01)


def test_16_bits():
    """Under autocast a ResNet keeps half, and the weights once more."""
    backbone = build_backbone("resnet18", 64)
    with torch.autocast("cpu", torch.bfloat16):
        really = saved(lambda: backbone(images(64)), backbone)
    assert kept_by_backbone(without_memory("resnet18", 64), 64, "bf16").bytes(IMAGES) == pytest.approx(really, rel=0.02)


def blocks_of(backbone) -> list[nn.Module]:
    stages = [backbone.blocks] if hasattr(backbone, "blocks") else [getattr(backbone, f"layer{i}") for i in range(1, 5)]
    return [block for stage in stages for block in stage]


@pytest.mark.parametrize(("arch", "size"), [("resnet18", 64), ("vit_small", 32)])
def test_checkpointed_blocks(arch, size):
    """Their inputs and what is outside of them, and everything of the block that is being repeated."""
    backbone = build_backbone(arch, size)
    inputs = {}
    for block in blocks_of(backbone):
        block.register_forward_pre_hook(lambda block, args: inputs.setdefault(block, args[0].detach()))
    backbone(images(size))
    insides = [saved(lambda b=b, x=x: b(x.clone().requires_grad_()), b) for b, x in inputs.items()]
    backbone.checkpoint_activations()
    really = saved(lambda: backbone(images(size)), backbone) + max(insides)
    computed = kept_by_backbone(without_memory(arch, size), size, "fp32", checkpointed=True).bytes(IMAGES)
    assert computed == pytest.approx(really, rel=0.03)
    assert computed < 0.8 * kept_by_backbone(without_memory(arch, size), size, "fp32").bytes(IMAGES)


@pytest.mark.parametrize("add_bf", [0, 1, 37])
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
    with torch.device("meta"):
        computed = batch_wide_kept(build_model(run), run)
    assert computed == pytest.approx(really, rel=0.05)


def test_a_share_of_bs4096_fits_on_32_gib():
    run = resolve(load_config("ds_configs/bs4096.json"), 16, Device("cuda", False, "V100"))
    with torch.device("meta"):
        model = build_model(run)
    per_image = backbone_kept(model, run).per_image
    assert per_image / 2**20 == pytest.approx(83.5, rel=0.01)  # as measured on a CPU under bf16, README
    memory = step_memory(model, run, 256)
    assert 22 < memory.total / GIB < 28
    assert memory.fits(32) and not memory.fits(24)
    assert step_memory(model, run, 128).total < memory.total


def test_the_bucket_of_deepspeed_counts():
    """Where the backward pass is the peak, ZeRO's buffer of half a billion elements is part of it, and a smaller one helps."""
    totals = {}
    for size in ("500000000", "60000000"):
        overrides = [f"zero_optimization.reduce_bucket_size={size}"]
        run = resolve(load_config("ds_configs/vits_bs4096.json", overrides), 16, Device("cuda", False, "V100"))
        with torch.device("meta"):
            totals[size] = step_memory(build_model(run), run, 256).total
    assert totals["500000000"] - totals["60000000"] == pytest.approx(4 * 440e6, rel=0.2)


def test_any_layers():
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 4)).to("meta")
    found = kept(layers, torch.empty(1, 8, device="meta"), "fp32")
    assert found.per_image == 4 * (8 + 16) and found.fixed == 0
    assert kept(layers, torch.empty(1, 8, device="meta"), "fp16").fixed == 2 * (8 * 16 + 16 * 4)
    assert largest_moment(layers, torch.empty(1, 8, device="meta"), "fp32") == 4 * 2 * 16
