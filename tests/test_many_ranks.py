"""What talks to other ranks, at 16 and 64 of them, against one process that holds the whole batch; all in float64.

DeepSpeed needs processes: ZeRO is compared with one process on gloo ranks (tests/engine/test_equivalence.py).
"""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.torch_version import TorchVersion

from crossbatch.engine.optimizers import LARS, Layout, Segment
from crossbatch.engine.runtime.distributed import consecutive_ranks
from crossbatch.engine.sharding.fsdp import FsdpBackend
from crossbatch.models import BatchFormer, MoCo, ViewBatchNorm
from crossbatch.models.collective import GroupCollective
from crossbatch.models.loss import LOSSES, loss_of_streams

N, C, VIEWS = 2, 6, 2  # images of a rank, features


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    """Let what asks for fp32 (the loss, BatchFormer) compute in float64, so that a slip cannot hide behind rounding."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture(params=[16, 64])
def ranks(request) -> int:
    return request.param


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mine(batch: torch.Tensor, dim: int) -> torch.Tensor:
    """This rank's images of the global batch."""
    return batch.chunk(dist.get_world_size(), dim)[dist.get_rank()].contiguous()


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def assert_equal(found, want):
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12)


def normalise_here(x, dy, sharing):
    """Norm of x [V, B, C, 2] on this rank, which shares statistics with `sharing` ranks."""
    norm = ViewBatchNorm(C, dtype=torch.float64)
    group = consecutive_ranks(sharing, 60)
    norm.collective = GroupCollective(group)
    own = mine(x, 1).flatten(0, 1).requires_grad_()
    y = norm(own)
    y.backward(mine(dy, 1).flatten(0, 1))
    parameters = gradient(norm.weight), gradient(norm.bias)
    return *(t.unflatten(0, (VIEWS, -1)) for t in (y.detach(), gradient(own))), parameters, norm


@pytest.mark.parametrize("nodes", [1, 4])
def test_norms_share_statistics_with_all_ranks_or_with_those_of_a_node(ranks, nodes, threads):
    x, dy = (normal(VIEWS, N * ranks, C, 2, seed=seed) * 3 + torch.arange(N * ranks).view(-1, 1, 1) for seed in (1, 2))
    ys, dxs, parameters, norms = zip(*threads(ranks).run(normalise_here, x, dy, ranks // nodes), strict=True)
    want_parameters = []
    for node, (x_node, dy_node) in enumerate(zip(x.chunk(nodes, 1), dy.chunk(nodes, 1), strict=True)):
        here = slice(node * ranks // nodes, (node + 1) * ranks // nodes)
        reference = nn.BatchNorm1d(C, dtype=torch.float64)
        for view in range(VIEWS):
            x_view = x_node[view].clone().requires_grad_()
            y = reference(x_view)
            y.backward(dy_node[view])
            assert_equal(torch.cat(ys[here], 1)[view], y.detach())
            assert_equal(torch.cat(dxs[here], 1)[view], gradient(x_view))
        want_parameters.append((gradient(reference.weight), gradient(reference.bias)))
        for norm in norms[here]:
            assert_equal(norm.running_mean, reference.running_mean)
            assert_equal(norm.running_var, reference.running_var)
    for found, want in zip(zip(*parameters, strict=True), zip(*want_parameters, strict=True), strict=True):
        assert_equal(sum(found), sum(want))


def contrast_here(q, k, kind):
    own = mine(q, 2).requires_grad_()
    loss, terms, signals = loss_of_streams(own, mine(k, 2), kind, 0.2, GroupCollective())
    loss.backward()
    return loss.detach(), terms, signals, gradient(own)


@pytest.mark.parametrize("kind", LOSSES)
def test_queries_meet_the_keys_of_all_ranks(ranks, kind, threads):
    streams = 1 if kind == "none" else 2
    q, k = (normal(VIEWS, streams, N * ranks, C, seed=seed) for seed in (3, 4))
    found = threads(ranks).run(contrast_here, q, k, kind)
    losses, terms, signals, gradients = zip(*found, strict=True)
    whole = q.clone().requires_grad_()
    loss, want_terms, want_signals = loss_of_streams(whole, k, kind, 0.2, GroupCollective())
    loss.backward()
    assert_equal(torch.stack(losses).mean(), loss.detach())
    assert_equal(torch.cat(gradients, 2) / ranks, gradient(whole))
    for values, want in ((terms, want_terms), (signals, want_signals)):
        for name in want:
            assert_equal(torch.stack([of_rank[name] for of_rank in values]).mean(), want[name])


def mix_here(layer, features, weight):
    """BatchFormer over the groups of the global batch [V, B, C], and its gradients for sum(weight * output)."""
    layer = copy.deepcopy(layer)
    own = mine(features, 1).requires_grad_()
    mixed = layer(own, 1, 2)
    (mixed * mine(weight, 1)).sum().backward()
    return mixed.detach(), gradient(own), [gradient(p) for p in layer.parameters()]


@pytest.mark.parametrize("ranks_of_a_group", [0.5, 1, 4, "all"])
def test_batchformer_mixes_groups_inside_and_across_ranks(ranks, ranks_of_a_group, threads):
    group_size = int(N * (ranks if ranks_of_a_group == "all" else ranks_of_a_group))
    layer = BatchFormer(C, group_size, num_heads=2, dropout=0.5, kernel="reference").double()
    features, weight = (normal(VIEWS, N * ranks, C, seed=seed) for seed in (5, 6))
    mixed, gradients, parameters = zip(*threads(ranks).run(mix_here, layer, features, weight), strict=True)
    whole = features.clone().requires_grad_()
    want = layer(whole, 1, 2)
    (want * weight).sum().backward()
    assert_equal(torch.cat(mixed, 1), want.detach())
    assert_equal(torch.cat(gradients, 1), gradient(whole))
    for found, p in zip(zip(*parameters, strict=True), layer.parameters(), strict=True):
        assert_equal(sum(found), gradient(p))


class Backbone(nn.Module):
    """Two convolutions with norms: their messages share those of the momentum encoder."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        )

    def forward(self, images):
        return self.layers(images).mean((2, 3))


def whole_loss_here(model, images):
    """A loss of MoCo with BatchFormer over groups of four ranks, and the mean over ranks of loss and gradients."""
    model, everyone = copy.deepcopy(model), GroupCollective()
    model.set_collective(everyone)
    loss = model.loss(mine(images, 1).flatten(0, 1), 3, 4).loss
    loss.backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    means = {name: everyone.all_reduce(grad) / everyone.world_size for name, grad in named.items()}
    return everyone.all_reduce(loss) / everyone.world_size, means, dict(model.named_buffers())


def test_the_whole_network_is_that_of_one_process(ranks, threads):
    torch.manual_seed(0)
    options = {"mlp_dim": 12, "projection_dim": 6, "temperature": 0.2, "batchformer_loss": "sum", "dropout": 0.5}
    model = MoCo(Backbone(), **options, group_size=4 * N, batchformer_kernel="reference").double()
    images = normal(VIEWS, N * ranks, 3, 8, 8)
    model.features(images[:, :4].flatten(0, 1), with_grad=False)  # shows that the encoders may run in lockstep
    assert model._can_interleave
    found = threads(ranks).run(whole_loss_here, model, images)
    loss = model.loss(images.flatten(0, 1), 3, 4).loss
    loss.backward()
    gradients = {name: gradient(p) for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) > 20
    for of_rank in (found[0], found[-1]):
        assert_equal(of_rank[0], loss.detach())
        assert of_rank[1].keys() == gradients.keys()
        for name, want in gradients.items():
            torch.testing.assert_close(of_rank[1][name], want, rtol=1e-9, atol=1e-10)
        for name, want in model.named_buffers():
            assert_equal(of_rank[2][name], want)


STEPS = 3
OPTIONS: dict[str, Any] = {"lr": 0.3, "weight_decay": 0.1, "trust_coefficient": 0.3}
VARIANTS: list[dict[str, Any]] = [
    {"variant": "moco-v3"},
    {"variant": "larc", "clip_trust_ratio": True},
    {"variant": "mlperf", "decay_after_momentum": True},
]
# Fewer rows than ranks, more, as many on each, a bias, one element; together no multiple of the ranks.
SHAPES = [(70, 3), (5, 4), (128, 2), (130,), (3,), (1, 1), (67, 2, 3)]


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(normal(*shape, seed=number)) for number, shape in enumerate(SHAPES)]


def gradients(step: int) -> list[torch.Tensor]:
    return [normal(*shape, seed=100 * step + number) for number, shape in enumerate(SHAPES, start=10)]


def trained(options: dict[str, Any]) -> list[nn.Parameter]:
    """The parameters after some steps of one process."""
    ours = parameters()
    optimizer = LARS(ours, **OPTIONS, **options)
    for step in range(STEPS):
        for p, grad in zip(ours, gradients(step), strict=True):
            p.grad = grad
        optimizer.step()
    return ours


def trained_on_a_partition(options: dict[str, Any]) -> torch.Tensor:
    """The same steps on this rank's part of all parameters in one flat tensor, as ZeRO 1 and 2 cut it, padded at the end."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = parameters()
    optimizer = LARS(whole, **OPTIONS, **options)
    starts = [0, *itertools.accumulate(p.numel() for p in whole)]
    share = -(-starts[-1] // ranks)

    def part(tensors: list[Any]) -> torch.Tensor:
        padding = torch.full((share * ranks - starts[-1],), 7.0, dtype=torch.float64)
        return torch.cat([*(t.detach().flatten() for t in tensors), padding])[rank * share :][:share].clone()

    flat = nn.Parameter(part(whole))
    ends = [
        (max(start - rank * share, 0), min(stop - rank * share, share)) for start, stop in itertools.pairwise(starts)
    ]
    segments = [Segment(number, start, stop) for number, (start, stop) in enumerate(ends) if start < stop]
    optimizer.param_groups[0]["params"] = [flat]
    does = [*optimizer.adapts.values()]
    optimizer.layout = Layout({flat: segments}, does, frozenset([flat]), GroupCollective().all_reduce)
    for step in range(STEPS):
        flat.grad = part(gradients(step))
        optimizer.step()
    return flat.detach()


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: options["variant"])
def test_lars_on_flat_partitions(ranks, options, threads):
    want = torch.cat([p.detach().flatten() for p in trained(options)])
    found = torch.cat(threads(ranks).run(trained_on_a_partition, options))
    assert_equal(found[: len(want)], want)
    assert found[len(want) :].eq(7).all()


in_threads = pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.14"),
    reason="FSDP2 crashes where ranks are threads (seen with torch 2.10 and 2.11)",
)


class Holder(nn.Module):
    """Parameters for `fully_shard`."""

    def __init__(self):
        super().__init__()
        self.held = nn.ParameterList(parameters())


def trained_under_fsdp2(options: dict[str, Any]) -> list[torch.Tensor]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    model = Holder()
    fully_shard(model)
    optimizer = LARS(model.parameters(), **OPTIONS, **options)
    for step in range(STEPS):
        for p, grad in zip(model.parameters(), gradients(step), strict=True):
            assert isinstance(p, DTensor)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
        optimizer.step()
    return [p.to_local().detach() for p in model.parameters()]  # pyright: ignore[reportAttributeAccessIssue]


@in_threads
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        *(pytest.param(16, options, id=f"16-{options['variant']}") for options in VARIANTS),
        pytest.param(64, VARIANTS[0], id="64-moco-v3"),
    ],
)
def test_lars_under_fsdp2(ranks, options, threads):
    shards = threads(ranks).run(trained_under_fsdp2, options)
    for found, want in zip(zip(*shards, strict=True), trained(options), strict=True):
        assert_equal(torch.cat(found), want.detach())


def network() -> MoCo:
    """Return a network of which the last of 64 ranks holds a part, too: two rows of the heads' matrices."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"mlp_dim": 128, "projection_dim": 6, "temperature": 0.2, "dropout": 0.5}
    return MoCo(
        Backbone(), batchformer_loss="sum", group_size=4 * N, batchformer_kernel="reference", **options
    ).double()


def pretrained_under_fsdp2(model: MoCo, batches: list[torch.Tensor], stage: int):
    """Losses, gradient norms and this rank's shards after some steps of pretraining."""
    model = copy.deepcopy(model)
    model.set_collective(GroupCollective())
    backend = FsdpBackend(model, lambda module: LARS(module.parameters(), **OPTIONS), stage, gradient_clipping=0.0)
    losses, norms = [], []
    for step, images in enumerate(batches):
        output = backend("loss", mine(images, 1).flatten(0, 1), step, 4)
        backend.backward(output.loss, 1.0)
        norms.append(backend.step(1.0))
        backend.update_momentum(0.9)
        losses.append(output.loss.item())
    shards = {name: held.slices[0].local for name, held in backend.local_parameters().items()}
    return losses, norms, shards


@in_threads
@pytest.mark.parametrize(
    ("ranks", "stage"), [(16, 1), *(pytest.param(64, stage, marks=pytest.mark.slow) for stage in (3, 1))]
)
def test_pretraining_under_fsdp2(ranks, stage, threads):
    """Norms, keys, groups, LARS and the moving average at once, over two steps."""
    model, batches = network(), [normal(2, N * ranks, 3, 6, 6, seed=seed) for seed in range(2)]
    of_ranks = threads(ranks).run(pretrained_under_fsdp2, model, batches, stage)
    losses, norms, shards = zip(*of_ranks, strict=True)
    optimizer = LARS((p for p in model.parameters() if p.requires_grad), **OPTIONS)
    for step, images in enumerate(batches):
        loss = model.loss(images.flatten(0, 1), step, 4).loss
        optimizer.zero_grad()
        loss.backward()
        squares = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        model.update_momentum(0.9)
        assert sum(of_rank[step] for of_rank in losses) / ranks == pytest.approx(loss.item(), rel=1e-9)
        assert all(of_rank[step] == pytest.approx(float(squares) ** 0.5, rel=1e-9) for of_rank in norms)
    for name, p in model.named_parameters():
        found = torch.cat([of_rank[name] for of_rank in shards])
        torch.testing.assert_close(found, p.detach().flatten(), rtol=1e-7, atol=1e-9)
