"""Fine-tuning: the formulas of DeiT, and that ranks, chunks, sharding and interruptions change nothing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from crossbatch import InputError
from crossbatch.data import open_source
from crossbatch.engine import checkpoint
from crossbatch.engine.config import Device, FinetuneConfig, load_config, resolve_finetune
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.engine.schedules import finetuning_rate
from crossbatch.engine.tasks.build import parameter_groups
from crossbatch.models import build_backbone
from crossbatch.models.classifier import Classifier
from tests.small_runs import ADAMW, RESNET, VIT, fsdp, losses, name_of, parameters, train, zero

BASE = [
    "train_batch_size=12",
    "optimizer.params.lr=0.3",
    "optimizer.params.eps=0.1",  # some gradients are 0 but for rounding, and Adam would blow that up
    "crossbatch.data.path=synthetic://48?size=20&classes=4",
    "crossbatch.data.image_size=16",
    "crossbatch.data.workers=0",
    "crossbatch.data.backend=torchvision",
    "crossbatch.schedule.epochs=5",
    "crossbatch.schedule.warmup_epochs=1",
    "crossbatch.log.every_steps=1",
]
TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4}  # VIT's
PLAIN = [f"crossbatch.finetune.{name}=0" for name in ("drop_path", "mixup", "cutmix")]
RANDOM = [
    "crossbatch.finetune.drop_path=0.3",
    "crossbatch.finetune.random_erasing=0.5",
    "crossbatch.finetune.average=0.9",
]


def finetune(overrides: list[str], out: str, steps: int | None = None) -> str:
    """One run on this rank of a pool; returns the message of wrong input."""
    from crossbatch.engine.start import build_trainer
    from crossbatch.engine.tasks.finetune import finetune_task

    world = world_from_environment()
    try:
        cfg = resolve_finetune(load_config(None, [*BASE, *overrides], FinetuneConfig), world.size, Device("cpu"))
        where = world, torch.device("cpu"), Path(out)
        build_trainer(finetune_task(cfg, *where), *where, "auto", steps).train()
    except InputError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, pools):
    """Run directories of a step of pretraining, by model."""
    found = {}
    for model in (VIT, RESNET):
        out = tmp_path_factory.mktemp(name_of(model))
        pools(1).run(train, [*model, *ADAMW], str(out), 1)
        found[name_of(model)] = f"crossbatch.model.checkpoint={out}"
    return found


@pytest.mark.parametrize(
    ("model", "backend"),
    [
        ("vit", fsdp(3)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("vit", zero(1)), ("vit", zero(3)), ("resnet", zero(2)), ("resnet", fsdp(0)))
        ),
    ],
    ids=lambda case: case if isinstance(case, str) else name_of(case),
)
def test_ranks_and_sharding_change_nothing(tmp_path, pools, pretrained, model, backend):
    settings = [pretrained[model], *PLAIN, "crossbatch.finetune.average=0.9"]
    pools(1).run(finetune, [*settings, *zero(0)], str(tmp_path / "one"), 6)
    pools(2).run(finetune, [*settings, *backend], str(tmp_path / "two"), 6)
    want = losses(tmp_path / "one")
    assert losses(tmp_path / "two") == pytest.approx(want, rel=1e-5)
    assert abs(want[0] - want[-1]) > 0.1  # something was trained
    end = parameters(tmp_path / "one")
    for name, tensor in parameters(tmp_path / "two").items():
        assert (tensor - end[name]).norm() <= 1e-5 * end[name].norm(), name
    one, two = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("one", "two"))
    assert one["top1"] == two["top1"] and one["average_top1"] == two["average_top1"]


@pytest.mark.parametrize(
    "backend", [zero(2), *(pytest.param(b, marks=pytest.mark.slow) for b in (zero(0), fsdp(3)))], ids=name_of
)
def test_chunks_change_nothing(tmp_path, pools, pretrained, backend):
    settings = [pretrained["vit"], "crossbatch.finetune.drop_path=0", *backend]  # mixed before it is cut
    pools(2).run(finetune, settings, str(tmp_path / "one"), 4)
    pools(2).run(finetune, [*settings, "train_micro_batch_size_per_gpu=2"], str(tmp_path / "three"), 4)
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("backend", [zero(1), pytest.param(fsdp(3), marks=pytest.mark.slow)], ids=name_of)
def test_an_interrupted_run_continues_with_the_same_losses(tmp_path, pools, pretrained, backend):
    settings = [pretrained["vit"], *RANDOM, *backend]
    pools(2).run(finetune, settings, str(tmp_path / "whole"), 5)
    pools(2).run(finetune, settings, str(tmp_path / "cut"), 3)
    pools(2).run(finetune, settings, str(tmp_path / "cut"), 5)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert (
        pools(2)
        .run(finetune, [*settings, "crossbatch.finetune.mixup=0.2"], str(tmp_path / "cut"), 6)[0]
        .startswith(
            f"--resume {tmp_path / 'cut'}/checkpoints/step-00000005: the configuration changed in a way that changes the run: "
            "crossbatch.finetune.mixup: was 0.8, is 0.2"
        )
    )


def test_the_weights_are_those_of_the_checkpoint_and_the_score_is_a_count(tmp_path, pools, pretrained):
    """At a rate of nothing: the backbone stays, and the head decides over the evaluation images one by one."""
    settings = [pretrained["vit"], *PLAIN, "optimizer.params.lr=1e-30", "crossbatch.schedule.warmup_epochs=4.9"]
    pools(1).run(finetune, settings, str(tmp_path), 1)  # the warm-up starts at 1e-6
    found = parameters(tmp_path)
    before = checkpoint.read(next(Path(pretrained["vit"].split("=")[1]).glob("checkpoints/step-*")), "parameters.")
    backbone = build_backbone("vit_small", 16, backbone_args=TINY)
    for name, _ in backbone.named_parameters():
        theirs, ours = before[f"online.backbone.{name}"], found[f"online.backbone.{name}"]
        assert (theirs - ours).abs().max() < 2e-6, name
    model = Classifier(backbone, 4)
    model.load_state_dict(found)
    source = open_source("synthetic://48?size=20&classes=4", "eval")
    right = 0
    for index in range(len(source)):
        image = source.open(index).resize((16, 16), 2)
        pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        logits = model.eval().logits(((pixels - mean[:, None, None]) / std[:, None, None])[None])
        right += int(logits.argmax() == source.labels[index])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["top1"] == pytest.approx(100 * right / len(source))
    assert results["loaded"]["arch"] == "vit_small" and results["images"] == len(source)


def test_a_step_is_adamw_on_smoothed_cross_entropy():
    """One step of a linear network, in float64: no decay of the bias, decay of the weight at the rate of that step."""
    from crossbatch.engine.optimizers import set_learning_rate
    from crossbatch.engine.tasks.build import build_optimizer

    torch.manual_seed(0)
    config = load_config(None, [*BASE, "optimizer.params.weight_decay=0.3"], FinetuneConfig)
    model = Classifier(build_backbone("resnet18", 16, "small", backbone_args={"width": 8}), 5)
    optimizer = build_optimizer(parameter_groups(model, config), config)
    set_learning_rate(optimizer, 0.01)
    x, labels = torch.randn(6, 64), torch.tensor([0, 1, 2, 3, 4, 0])
    head = model.online.head
    weight, bias = head.weight.detach().double(), head.bias.detach().double()
    probabilities = (x.double() @ weight.T + bias).softmax(1)
    wanted = 0.9 * F.one_hot(labels, 5).double() + 0.1 / 5
    gradient = (probabilities - wanted) / 6
    F.cross_entropy(head(x), labels, label_smoothing=0.1).backward()
    optimizer.step()
    for parameter, before, g, decay in (
        (head.weight, weight, gradient.T @ x.double(), 0.3),
        (head.bias, bias, gradient.sum(0), 0),
    ):
        want = before * (1 - 0.01 * decay) - 0.01 * g / (
            g.abs() + 0.1
        )  # the first step: both moments are the gradient's
        assert torch.allclose(parameter.double(), want, rtol=1e-5, atol=1e-7)


def test_what_decays():
    vit = build_backbone("vit_small", 16, backbone_args=TINY)
    model = Classifier(vit, 4, averaged=True)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decays = {
        names[parameter]: group["weight_decay"]
        for group in parameter_groups(model, load_config(None, [], FinetuneConfig))
        for parameter in group["params"]
    }
    assert all(name.startswith("online.") for name in decays) and len(decays) == len(list(model.online.parameters()))
    kept = {name for name, decay in decays.items() if decay == 0}
    assert kept == {
        n
        for n in decays
        if n.endswith(("bias", "norm.weight", "norm1.weight", "norm2.weight", "cls_token", "pos_embed"))
    }
    assert {decays[name] for name in decays.keys() - kept} == {0.1}


def test_the_rate():
    peak, epochs, warmup = 6e-4, 100, 3
    for epoch in (0, 0.5, 1, 2.9):
        assert finetuning_rate(epoch, peak, epochs, warmup, False) == pytest.approx(1e-6 + epoch / 3 * (peak - 1e-6))
    for epoch in (3, 40.5, 99.9):
        cosine = math.cos(math.pi * (epoch - 3) / 97)
        assert finetuning_rate(epoch, peak, epochs, warmup, False) == pytest.approx(
            1e-5 + (peak - 1e-5) * (1 + cosine) / 2
        )
    compat = [finetuning_rate(epoch, peak, epochs, warmup, True) for epoch in range(100)]
    assert compat[0] == compat[1] == 1e-6 and compat[2] == pytest.approx(1e-6 + (peak - 1e-6) / 3)
    assert compat[4] == pytest.approx(1e-5 + (peak - 1e-5) * (1 + math.cos(3 * math.pi / 100)) / 2)
    assert finetuning_rate(4.99, peak, epochs, warmup, True) == compat[4]


def test_the_average_follows_and_drop_path_grows():
    vit = build_backbone("vit_small", 16, backbone_args={**TINY, "depth": 3})
    model = Classifier(vit, 4, drop_path=0.2, averaged=True)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.online.backbone.blocks]  # pyright: ignore
    assert rates == pytest.approx([0, 0.1, 0.2])
    images = torch.randn(2, 3, 16, 16)
    model.eval()
    assert torch.equal(model.logits(images), model.average_logits(images))
    with pytest.raises(ValueError, match="a ResNet has no drop path; set it to 0"):
        Classifier(build_backbone("resnet18", 16, "small", backbone_args={"width": 8}), 4, drop_path=0.1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "crossbatch.model.checkpoint: not given; allowed: a run directory"),
        (["crossbatch.model.checkpoint=/nowhere"], "--checkpoint /nowhere"),
        (["crossbatch.data.repeats=5"], "crossbatch.data.repeats: given 5 for 12 images per rank; allowed: a divisor"),
        (["train_batch_size=11"], "mixup and CutMix need an even number"),
        (["crossbatch.data.path=null"], "crossbatch.data.path: not given"),
    ],
    ids=lambda case: case[0].split("=")[0] if isinstance(case, list) and case else "",
)
def test_wrong_input(tmp_path, pools, overrides, words):
    assert words in pools(1).run(finetune, overrides, str(tmp_path), 1)[0]


def test_repeated_augmentation_keeps_the_length_of_an_epoch(tmp_path, pools, pretrained):
    pools(1).run(
        finetune, [pretrained["vit"], "crossbatch.data.repeats=3", "crossbatch.schedule.epochs=2"], str(tmp_path)
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2]
    assert [line["step"] for line in lines if "top1" in line] == [4, 8]
