"""The order of a step against the originals', and the moving average against its formula."""

import copy
import gc
import json
import math
import weakref
from collections import Counter
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from crossbatch.data import normalize
from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.optimizers import set_learning_rate
from crossbatch.engine.runtime.distributed import GroupCollective
from crossbatch.engine.runtime.timing import StepTimer
from crossbatch.engine.schedules import encoder_momentum, learning_rate
from crossbatch.engine.sharding import Backend, LocalShards
from crossbatch.engine.step import CLEAN_STEPS, Progress, TrainStep
from crossbatch.engine.tasks.build import build_backend, build_model, build_optimizer, connect, parameter_groups
from crossbatch.models import MoCo, lockstep
from tests.small_runs import ADAMW, BASE, LARS, RESNET, VIT, fsdp, pretrainer, zero

STEPS_PER_EPOCH = 2


class PlainBackend(Backend):
    """Train in one process, nothing sharded, nothing wrapped."""

    def __init__(self, model, run):
        self.model = model
        self.optimizer = build_optimizer(parameter_groups(model, run.config), run.config)

    def __call__(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def backward(self, loss, scale, is_last=True):
        (loss * scale).backward()

    def step(self, scale):
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        torch._foreach_div_(gradients, scale)
        norm = torch.nn.utils.get_total_norm(gradients).item()
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def local_parameter(self, parameter):
        return parameter.data

    def local_parameters(self) -> dict[str, LocalShards]:
        raise AssertionError

    def local_optimizer_state(self) -> dict[str, dict[str, LocalShards]]:
        raise AssertionError

    def sync_master_weights(self, updates):
        raise AssertionError


@pytest.fixture
def run():
    overrides = [
        "train_batch_size=8",
        "optimizer.type=AdamW",
        "optimizer.params.lr=0.1",
        "crossbatch.data.image_size=16",
        "crossbatch.model.arch=resnet18",
        "crossbatch.model.stem=small",
        'crossbatch.model.backbone_args={"width": 8}',
        "crossbatch.model.mlp_dim=16",
        "crossbatch.model.temperature=0.2",
        "crossbatch.batchformer.add_bf=1",
        "crossbatch.batchformer.mode=ema",
        "crossbatch.batchformer.group_size=4",
        "crossbatch.momentum.base=0.5",
        "crossbatch.momentum.cosine=true",
        "crossbatch.schedule.epochs=3",
        "crossbatch.schedule.warmup_epochs=1",
    ]
    return resolve(load_config(None, overrides), 1, Device("cpu"))


def views(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 256, (2, 8, 3, 16, 16), dtype=torch.uint8, generator=generator)


def test_losses_are_those_of_the_originals_order(run):
    """There the average moves at the start of a step, with that step's momentum, before the keys are computed."""
    torch.manual_seed(0)
    ours = build_model(run)
    theirs = copy.deepcopy(ours)
    step = TrainStep(PlainBackend(ours, run), run, torch.device("cpu"), STEPS_PER_EPOCH, 8)
    losses = [step(views(i)).output.loss.item() for i in range(5)]

    optimizer = build_optimizer(parameter_groups(theirs, run.config), run.config)
    expected = []
    for i in range(5):
        epoch = i / STEPS_PER_EPOCH
        with torch.no_grad():
            m = encoder_momentum(epoch, 0.5, 3, cosine=True)
            for _, online, average in theirs.momentum_pairs():
                average.mul_(m).add_(online, alpha=1 - m)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch, 0.1 * 8 / 256, 3, 1)
        contrast = theirs.loss(normalize(views(i).flatten(0, 1)), i, 0)
        optimizer.zero_grad()
        contrast.loss.backward()
        optimizer.step()
        expected.append(contrast.loss.item())
    assert losses == pytest.approx(expected, rel=1e-5)
    assert expected[0] != pytest.approx(expected[-1], rel=1e-4)  # something was trained


def test_the_average_follows_every_trained_parameter_and_nothing_else(run):
    torch.manual_seed(0)
    backend = PlainBackend(build_model(run), run)
    assert isinstance(backend.model, MoCo)
    pairs = backend.model.momentum_pairs()
    assert {name.split(".")[0] for name, _, _ in pairs} == {"backbone", "projector", "batchformer"}
    with torch.no_grad():
        for _, online, _ in pairs:
            online.add_(torch.randn_like(online))
    want = {name: 0.9 * average.double() + 0.1 * online.double() for name, online, average in pairs}
    buffers = {name: buffer.clone() for name, buffer in backend.model.momentum.named_buffers()}
    backend.update_momentum(0.9)
    for name, _, average in pairs:
        torch.testing.assert_close(average.double(), want[name], rtol=1e-6, atol=1e-6)
    for name, buffer in backend.model.momentum.named_buffers():
        assert torch.equal(buffer, buffers[name]), name  # the momentum encoder keeps statistics of its own


def test_autocast_lowers_the_forward_pass_but_not_the_state(run):
    torch.manual_seed(0)
    lowered = resolve(run.config, 1, Device("cpu"))
    object.__setattr__(lowered, "precision", "bf16")
    model = build_model(run)
    seen = []
    model.online.backbone.layer1.register_forward_hook(lambda *call: seen.append(call[-1].dtype))  # pyright: ignore
    step = TrainStep(PlainBackend(model, lowered), lowered, torch.device("cpu"), STEPS_PER_EPOCH, 8)
    output = step(views(0)).output
    assert seen == [torch.bfloat16]
    assert output.loss.dtype == torch.float32
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("stage", [0, 2])
def test_deepspeed_leaves_the_precision_alone(tmp_path, one_rank, stage):
    """It switches off an autocast of its accelerator that its engine is called in."""
    one_rank.run(lowered_under_deepspeed, str(tmp_path), stage)


def lowered_under_deepspeed(out: str, stage: int) -> None:
    import deepspeed.runtime.torch_autocast  # noqa: F401

    precise = [*BASE, *RESNET, *LARS, *zero(stage), "crossbatch.precision=bf16"]
    run = resolve(load_config(None, precise), 1, Device("cpu"))
    seen, asked = [], torch.is_autocast_enabled
    trainer = pretrainer(run, out, "none", 1)
    backbone = trainer.state.step.backend.model.chunked_module
    backbone.layer1.register_forward_hook(lambda *call: seen.append(call[-1].dtype))  # pyright: ignore
    # Without an argument it answers for CUDA; as if this CPU were that.
    with mock.patch("torch.is_autocast_enabled", lambda device_type="cpu": asked(device_type)):
        trainer.train()
    assert seen == [torch.bfloat16]


def test_another_precision_finds_its_loss_scale_anew():
    progress = Progress(step=9, updates=8, loss_scale=2.0**9, clean_steps=5)
    assert progress.in_precision("fp16", before="fp16") == progress
    assert progress.in_precision("bf16", before="fp16") == Progress(9, 8, 1.0, 0)
    assert Progress(9, 9).in_precision("fp16", before="bf16") == Progress(9, 9, 2.0**16, 0)


def test_overflow_skips_the_step_and_halves_the_loss_scale(run):
    torch.manual_seed(0)
    lowered = resolve(run.config, 1, Device("cpu"))
    object.__setattr__(lowered, "precision", "fp16")
    backend = PlainBackend(build_model(run), lowered)
    step = TrainStep(backend, lowered, torch.device("cpu"), STEPS_PER_EPOCH, 8)
    step.progress.loss_scale = 2.0**60  # overflows fp16 for certain
    before = {name: tensor.clone() for name, tensor in backend.model.named_parameters()}
    norm = step(views(0)).grad_norm
    assert not math.isfinite(norm)
    assert step.progress == Progress(step=1, updates=0, loss_scale=2.0**59, clean_steps=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backend.model.named_parameters())
    assert not backend.optimizer.state
    step.progress.loss_scale, step.progress.clean_steps = 2.0**10, CLEAN_STEPS - 1
    step(views(1))
    assert step.progress == Progress(step=2, updates=1, loss_scale=2.0**11, clean_steps=0)
    assert {group["lr"] for group in backend.optimizer.param_groups} == {
        0.0
    }  # of update 0: the schedule has not moved on
    step(views(2))
    assert {group["lr"] for group in backend.optimizer.param_groups} == {step.learning_rate(1)} != {0.0}


def test_a_step_returns_the_rates_that_it_used(run):
    """The schedules count updates, so a skipped step repeats the learning rate and moves no average."""
    torch.manual_seed(0)
    used = []

    class Recording(PlainBackend):
        def step(self, scale):
            norm = super().step(scale if len(used) != 2 else math.nan)  # the third step is skipped
            used.append([self.optimizer.param_groups[0]["lr"], None])
            return norm

        def update_momentum(self, momentum):
            used[-1][1] = momentum
            super().update_momentum(momentum)

    step = TrainStep(Recording(build_model(run), run), run, torch.device("cpu"), STEPS_PER_EPOCH, 8)
    found = [step(views(i)) for i in range(5)]
    assert [[result.rates["lr"], result.rates["momentum"]] for result in found] == used
    assert [math.isfinite(result.grad_norm) for result in found] == [True, True, False, True, True]
    epochs = [updates / STEPS_PER_EPOCH for updates in (0, 1, 2, 2, 3)]
    assert [lr for lr, _ in used] == [learning_rate(epoch, 0.1 * 8 / 256, 3, 1) for epoch in epochs]
    after = [1 / STEPS_PER_EPOCH, 2 / STEPS_PER_EPOCH, None, 3 / STEPS_PER_EPOCH, 4 / STEPS_PER_EPOCH]
    assert [m for _, m in used] == [None if e is None else encoder_momentum(e, 0.5, 3, cosine=True) for e in after]


def recorded_rates(out: str) -> list[list[float | None]]:
    """Return the rates that a run in fp16 used on this rank; its first steps overflow."""
    used: list[list[float | None]] = []
    update = Backend.update_momentum

    def set_rate(optimizer, lr, updates):
        used.append([lr, None])
        set_learning_rate(optimizer, lr, updates)

    def spy(self, momentum):
        used[-1][1] = momentum
        update(self, momentum)

    cfg = resolve(load_config(None, [*BASE, *VIT, *LARS, *zero(1), "crossbatch.precision=fp16"]), 1, Device("cpu"))
    with (
        mock.patch("crossbatch.engine.step.set_learning_rate", set_rate),
        mock.patch.object(Backend, "update_momentum", spy),
    ):
        pretrainer(cfg, out, "none", 8).train()
    return used


def test_the_log_reports_the_rates_that_were_used(tmp_path, one_rank):
    (used,) = one_rank.run(recorded_rates, str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [[line["lr"], line["momentum"]] for line in lines] == used
    skipped = [line["grad_norm"] is None for line in lines]
    assert any(skipped) and not all(skipped)
    assert [line["momentum"] is None for line in lines] == skipped


def test_a_step_lets_go_of_its_backend(run):
    """A run that is out of memory drops the backend before it builds a smaller one."""
    cpu = torch.device("cpu")
    step = TrainStep(PlainBackend(build_model(run), run), run, cpu, STEPS_PER_EPOCH, 4, StepTimer(cpu))
    step(views(0))
    backend, backbone = weakref.ref(step.backend), weakref.ref(step.backend.model.chunked_module)
    del step.backend
    gc.collect()
    assert backend() is None and backbone() is None


def one_after_the_other(first, second):
    features = first()
    with torch.no_grad():
        return features, second()


def steps_in_lockstep_and_without(overrides: list[str]) -> list:
    """On this rank: losses, parameters and statistics of three steps, of a model in lockstep and of one that is not."""
    found = []
    for run_both in (lockstep.in_lockstep, one_after_the_other):
        cfg = resolve(load_config(None, [*BASE, *RESNET, *overrides]), dist.get_world_size(), Device("cpu"))
        torch.manual_seed(0)
        model = build_model(cfg)
        connect(model, cfg)
        step = TrainStep(build_backend(model, cfg), cfg, torch.device("cpu"), STEPS_PER_EPOCH, cfg.chunk)
        torch.manual_seed(dist.get_rank())
        batches = torch.randint(0, 256, (3, 2, cfg.local_batch, 3, 16, 16), dtype=torch.uint8)
        with mock.patch("crossbatch.models.moco.in_lockstep", side_effect=run_both) as both:
            losses = [step(views).output.loss.item() for views in batches]
        assert both.call_count == 3 * (1 + step.chunks)  # features of every chunk, and heads
        state = {**step.backend.local_parameters(), **step.backend.local_buffers()}
        tensors = {name: [part.local.tolist() for part in shards.slices] for name, shards in state.items()}
        found.append((losses, tensors))
    return found


DROPOUT = ["crossbatch.batchformer.group_size=6", "crossbatch.batchformer.dropout=0.5"]


@pytest.mark.parametrize(
    "overrides",
    [
        # It takes small parameters away, too.
        pytest.param(
            [*LARS, *zero(3), "zero_optimization.stage3_param_persistence_threshold=0"], marks=pytest.mark.slow
        ),
        pytest.param([*LARS, *fsdp(3)], marks=pytest.mark.slow),
        pytest.param([*LARS, *zero(3), "train_micro_batch_size_per_gpu=3"], marks=pytest.mark.slow),
        [*ADAMW, *fsdp(1), "train_micro_batch_size_per_gpu=3", *DROPOUT],
        [*ADAMW, *zero(1), "crossbatch.model.checkpoint_activations=true", "crossbatch.precision=bf16"],
        pytest.param([*LARS, *zero(0), *DROPOUT], marks=pytest.mark.slow),
    ],
    ids=["zero3", "fsdp3", "zero3-chunks", "fsdp1-chunks-dropout", "checkpointed-bf16", "dropout"],
)
def test_lockstep_changes_no_bit(pools, overrides):
    """Submodules of both encoders take turns under the hooks of ZeRO-3 and FSDP2; groups of BatchFormer span both ranks."""
    for together, alone in pools(2).run(steps_in_lockstep_and_without, overrides):
        assert together == alone
        assert together[0][0] != together[0][2]


def collectives_of_a_step(loss) -> tuple[dict[str, int], dict[str, int]]:
    """Count how often two ranks speak in the forward and backward pass of a ResNet-50 (narrow: only the layers count)."""
    counts: list[str] = []

    class Counting(GroupCollective):
        def all_gather(self, tensor):
            counts.append("all_gather")
            return super().all_gather(tensor)

        def all_reduce(self, tensor):
            counts.append("all_reduce")
            return super().all_reduce(tensor)

        def reduce_scatter(self, tensor):
            counts.append("reduce_scatter")
            return super().reduce_scatter(tensor)

    sizes = {"backbone_args": {"width": 8}, "projection_dim": 8, "mlp_dim": 16}
    model = MoCo("resnet50", **sizes, batchformer_loss=loss, group_size=4, dropout=0.0)
    model.set_collective(Counting())
    contrast = model.loss(torch.randn(2 * 4, 3, 32, 32), 0, 0)
    forward = dict(Counter(counts))
    counts.clear()
    contrast.loss.backward()
    return forward, dict(Counter(counts))


@pytest.mark.parametrize("loss", ["none", "sum"])
def test_a_step_of_resnet50_speaks_seldom(threads, loss):
    """Norms gather once for both views of both encoders, and all keys once. torch's SyncBatchNorm, by view, needs 222 and 112.

    53 norms in a backbone (those of the 4 shortcuts share a message with their block's last one), 2 in a projector, 1 in the
    predictor. BatchFormer's groups fit a rank here and send nothing.
    """
    for forward, backward in threads(2).run(collectives_of_a_step, loss):
        assert forward == {"all_gather": 53 - 4 + 2 + 1 + 1}
        assert backward == {"all_reduce": 53 - 4 + 2 + 1}
