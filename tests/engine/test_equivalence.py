"""Sharding changes nothing: six steps of one process against two or three ranks, for every backend and optimizer allowed."""

import itertools
import math
from unittest import mock

import pytest
import torch

from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.runtime.distributed import mean_over_ranks
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.engine.tasks.build import build_model, connect
from crossbatch.models import ViewBatchNorm
from tests.small_runs import (
    ADAMW,
    BASE,
    LARS,
    RESNET,
    VIT,
    fsdp,
    losses,
    name_of,
    parameters,
    pretrainer,
    slow_unless,
    train,
    zero,
)
from tests.threads import this_rank

STEPS = 6  # four of warm-up, and two at the full rate


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, one_rank):
    """Losses, and parameters before and after, of the one-process run; computed once per model and optimizer."""
    known = {}

    def get(model, optimizer):
        key = (*model, *optimizer)
        if key not in known:
            start, out = tmp_path_factory.mktemp("start"), tmp_path_factory.mktemp("one")
            run = [*model, *optimizer, *zero(0), *seed(model, optimizer)]
            one_rank.run(train, [*run, "crossbatch.schedule.warmup_epochs=4"], str(start), 1)
            one_rank.run(train, run, str(out), STEPS)
            known[key] = losses(out), parameters(start), parameters(out)
        return known[key]

    return get


def seed(model, optimizer) -> list[str]:
    """Return a seed with which no ReLU is at zero but for rounding.

    With seed 0, on three ranks, AdamW and a ResNet meet 1.5e-7 in the sixth step, where one process has a gradient and three
    ranks have none. It shows in one channel of a bias, by 2e-4 of the 3e-6 that the bias moves.
    """
    return ["crossbatch.seed=1"] if (model, optimizer) == (RESNET, ADAMW) else []


BACKENDS = [zero(0), zero(1), zero(2), zero(3), zero(1, "cpu"), zero(3, "cpu"), fsdp(0), fsdp(1), fsdp(3)]


# Of all combinations, those that `make test` runs: every stage of both kinds but FSDP's 0, and none with offloading. Three
# ranks divide no tensor evenly, so partitions cut through tensors.
OFTEN = {
    (2, "LARS", "vit"): [zero(0), zero(1), fsdp(1)],
    (3, "LARS", "resnet"): [zero(2)],
    (3, "AdamW", "vit"): [fsdp(3)],
    (2, "AdamW", "vit"): [zero(3)],
}


def cases():
    for ranks, optimizer, model, backend in itertools.product((3, 2), (LARS, ADAMW), (RESNET, VIT), BACKENDS):
        names = name_of(optimizer), name_of(model)
        often = backend in OFTEN.get((ranks, *names), [])
        case = "-".join((str(ranks), *names, name_of(backend)))
        yield pytest.param(ranks, optimizer, model, backend, marks=slow_unless(often), id=case)


@pytest.mark.parametrize(("ranks", "optimizer", "model", "backend"), list(cases()))
def test_many_ranks_do_what_one_process_does(tmp_path, one_process, pools, ranks, optimizer, model, backend):
    want, start, end = one_process(model, optimizer)
    pools(ranks).run(train, [*model, *optimizer, *backend, *seed(model, optimizer)], str(tmp_path), STEPS)
    assert len(want) == STEPS
    assert losses(tmp_path) == pytest.approx(want, rel=1e-5)
    assert abs(want[0] - want[-1]) > 0.1  # something was trained
    assert worst_deviation(parameters(tmp_path), start, end) <= 1e-5


def worst_deviation(found: dict, start: dict, end: dict) -> float:
    """The largest |found - end| / |end - start| of a tensor, beyond two units in the last place of `end`: a batch norm's
    weight of 1 cannot change by less.
    """
    changed = {name for name in found if not end[name].equal(start[name])}
    assert len(changed) > 20 and all(found[name].equal(end[name]) for name in found.keys() - changed)
    return max(
        float((found[name] - end[name]).norm() - 2 * 2**-23 * end[name].norm())
        / float((end[name] - start[name]).norm())
        for name in changed
    )


RESUMED = [
    pytest.param(ADAMW, VIT, backend, marks=slow_unless(backend == fsdp(1))) for backend in BACKENDS[:4] + BACKENDS[6:]
]
RESUMED += [
    pytest.param(LARS, *case, marks=pytest.mark.slow)
    for case in ((RESNET, zero(1)), (VIT, zero(3, "cpu")), (VIT, zero(2)), (RESNET, fsdp(3)))
]


@pytest.mark.parametrize(("optimizer", "model", "backend"), RESUMED, ids=name_of)
def test_an_interrupted_run_continues_with_the_same_losses(tmp_path, pools, optimizer, model, backend):
    """With FSDP2 it evaluates before it saves: that leaves parameters gathered, and must not show in the checkpoint."""
    overrides = [*model, *optimizer, *backend, "crossbatch.batchformer.dropout=0.5"]
    if "crossbatch.sharding=fsdp" in backend:
        overrides.append("crossbatch.evaluate.knn_every_epochs=1")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pools(2).run(train, overrides, str(whole), 6)
    pools(2).run(train, overrides, str(cut), 3)
    pools(2).run(train, overrides, str(cut), 6)
    assert losses(cut) == losses(whole)


@pytest.mark.parametrize("optimizer", [pytest.param(ADAMW, marks=pytest.mark.slow), LARS], ids=name_of)
def test_a_checkpoint_fits_another_world_and_backend(tmp_path, pools, optimizer):
    overrides = [*VIT, *optimizer]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    pools(2).run(train, [*overrides, *zero(1)], str(whole), 5)
    pools(2).run(train, [*overrides, *zero(1)], str(moved), 2)
    pools(1).run(train, [*overrides, *fsdp(3)], str(moved), 3)
    pools(3).run(train, [*overrides, *zero(3)], str(moved), 4)
    pools(2).run(train, [*overrides, *fsdp(0)], str(moved), 5)
    assert losses(moved) == pytest.approx(losses(whole), rel=1e-5)


def buffers_of(overrides: list[str], out: str) -> list:
    """Trains three steps on this rank; its batch norms' buffers."""
    cfg = resolve(load_config(None, [*BASE, *overrides]), world_from_environment().size, Device("cpu"))
    with mock.patch("crossbatch.engine.step.INITIAL_LOSS_SCALE", 2.0**6):  # a step that overflows changes nothing
        trainer = pretrainer(cfg, out, "auto", 3)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(out))
    return [
        (name, str(buffer.dtype), buffer.tolist()) for name, buffer in trainer.state.step.backend.model.named_buffers()
    ]


@pytest.mark.parametrize(
    ("precision", "backend"),
    [
        pytest.param(precision, backend, marks=slow_unless(often), id=f"{precision}-{name_of(backend)}")
        for precision, backend, often in (
            ("bf16", zero(0), False),
            ("bf16", zero(2), True),
            ("bf16", zero(3), False),
            ("bf16", fsdp(3), False),
            ("fp16", zero(0), False),
            ("fp16", zero(2), False),
            ("fp16", zero(3), False),
            ("fp16", fsdp(3), True),
        )
    ],
)
@pytest.mark.parametrize("more", [[], pytest.param(["crossbatch.model.norm_ranks=1"], id="by-rank")])
def test_running_statistics_stay_equal_and_fp32(tmp_path, pools, backend, precision, more):
    overrides = [*RESNET, *LARS, *backend, f"crossbatch.precision={precision}", *more]
    ranks = pools(2).run(buffers_of, overrides, str(tmp_path))
    assert ranks[0] == ranks[1]
    assert {dtype for name, dtype, _ in ranks[0] if "running" in name} == {"torch.float32"}
    assert any(name.endswith("running_mean") and any(values) for name, _, values in ranks[0])


# Without BatchFormer, which computes in fp32.
IN_FLOAT64 = [*BASE, *RESNET, "crossbatch.batchformer.add_bf=0"]


def node_groups_in_float64() -> tuple:
    """On one of four ranks, two a "node": loss, gradients averaged over ranks, and running statistics after one step."""
    world = this_rank()
    config = load_config(None, [*IN_FLOAT64, "crossbatch.model.norm_ranks=node"])
    cfg = resolve(config, world.size, Device("cpu"), world.size // 2)
    torch.manual_seed(0)
    model = build_model(cfg).double()
    connect(model, cfg)
    views_VnCHW = torch.randn(2, cfg.train_batch_size, 3, 16, 16, dtype=torch.float64)
    mine = views_VnCHW.unflatten(1, (world.size, -1))[:, world.rank].flatten(0, 1)
    loss = model.loss(mine, 0, 0).loss
    loss.backward()
    model.average_running_stats()
    mean = {name: mean_over_ranks(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return mean_over_ranks(loss.detach()), mean, dict(model.named_buffers())


def normalise_by_group(
    norm: ViewBatchNorm, x: torch.Tensor, residual=None, relu: bool = False, defer: bool = False
) -> torch.Tensor:
    """Batch norm of one process that holds all 12 images, each view and each half of them by statistics of their own."""
    grouped = x.unflatten(0, (2, 2, 6))  # [view, node, image, C, ...]
    over = [2, *range(4, grouped.dim())]
    mean, var = grouped.mean(over, keepdim=True), grouped.var(over, keepdim=True, correction=0)
    count = grouped[0, 0, :, 0].numel()
    assert norm.running_mean is not None and norm.running_var is not None
    for running, of_views in ((norm.running_mean, mean), (norm.running_var, var * count / (count - 1))):
        for of_nodes in of_views.flatten(2):
            running.copy_(0.9 * running + 0.1 * of_nodes.mean(0))
    shape = (1, -1, *(1,) * (x.dim() - 2))
    weight, bias = (1.0, 0.0) if norm.weight is None else (norm.weight.view(shape), norm.bias.view(shape))
    y = ((grouped - mean) / (var + norm.eps).sqrt()).flatten(0, 2) * weight + bias
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def test_norms_of_nodes_are_those_of_one_process_that_normalises_group_by_group(threads, monkeypatch):
    ranks = threads(4).run(node_groups_in_float64)
    cfg = resolve(load_config(None, IN_FLOAT64), 1, Device("cpu"))
    torch.manual_seed(0)
    model = build_model(cfg).double()
    views = torch.randn(2, cfg.train_batch_size, 3, 16, 16, dtype=torch.float64).flatten(0, 1)
    monkeypatch.setattr(ViewBatchNorm, "forward", normalise_by_group)
    loss = model.loss(views, 0, 0).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for of_rank, means, buffers in ranks:  # the loss is fp32, and so are gradients in their precision
        assert torch.allclose(of_rank, loss, rtol=1e-6)
        assert means.keys() == gradients.keys() and len(gradients) > 60
        off = {name: float((means[name] - g).norm() / (g.norm() + 1e-6)) for name, g in gradients.items()}
        assert max(off.values()) < 1e-5, off
        for name, buffer in model.named_buffers():
            assert torch.equal(buffers[name], ranks[0][2][name])
            assert name.endswith("tracked") or torch.allclose(buffers[name], buffer, rtol=1e-9, atol=1e-12)
