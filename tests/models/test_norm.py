"""ViewBatchNorm against torch's own batch norm, applied to one view of all ranks at a time."""

import copy
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from crossbatch.models.collective import Collective, GroupCollective
from crossbatch.models.norm import ViewBatchNorm, convert_norms, reuse_batch_stats, set_num_views, synchronize_norms

C = 5
SHAPES = [(12, C), (12, C, 3, 7), (2, C, 4, 4)]  # the last: one image per view


class Counting(Collective):
    """Pass on to another collective and note the shape of what travels."""

    def __init__(self, inner: Collective):
        self.inner = inner
        self.gathered, self.reduced = [], []

    @property
    def rank(self):
        return self.inner.rank

    @property
    def world_size(self):
        return self.inner.world_size

    def all_gather(self, tensor):
        self.gathered.append(tuple(tensor.shape))
        return self.inner.all_gather(tensor)

    def all_reduce(self, tensor):
        self.reduced.append(tuple(tensor.shape))
        return self.inner.all_reduce(tensor)


def randomise(norm):
    """Set parameters and running statistics to values that a slip would show in."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def batch(shape, seed):
    """Return an input far from mean 0 and variance 1, in which views differ, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = torch.randn((2, *shape), generator=generator)
    x = x * 3 + torch.arange(C).view(1, C, *(1,) * (len(shape) - 2))
    x[shape[0] // 2 :] *= 0.5
    return x, dy + 0.3


def expected(x_views, dy_views, affine=True, momentum=0.1):
    """Run torch's norm in float64, once per view: [y per view], [dx per view], and the module with grads and statistics."""
    make = nn.BatchNorm1d if x_views[0].dim() == 2 else nn.BatchNorm2d
    norm = make(C, momentum=momentum, affine=affine)
    randomise(norm)
    norm.double()
    ys, dxs = [], []
    for x, dy in zip(x_views, dy_views, strict=True):
        x = x.double().requires_grad_()
        y = norm(x)
        y.backward(dy.double())
        ys.append(y.detach())
        dxs.append(gradient(x))
    return ys, dxs, norm


def gradient(tensor):
    assert tensor.grad is not None
    return tensor.grad


def assert_near(actual, wanted, tolerance=1e-5):
    torch.testing.assert_close(actual, wanted.to(actual.dtype), rtol=tolerance, atol=tolerance)


def assert_same_statistics(norm, reference):
    assert_near(norm.running_mean, reference.running_mean)
    assert_near(norm.running_var, reference.running_var)
    assert norm.num_batches_tracked == reference.num_batches_tracked


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("num_views", [1, 2])
def test_one_process(shape, affine, num_views):
    x, dy = batch(shape, seed=2)
    norm = ViewBatchNorm(C, momentum=0.3, affine=affine, num_views=num_views)
    randomise(norm)
    counting = Counting(Collective())
    synchronize_norms(norm, counting)
    x.requires_grad_()
    y = norm(x)
    y.backward(dy)
    ys, dxs, reference = expected(x.detach().chunk(num_views), dy.chunk(num_views), affine, momentum=0.3)
    assert_near(y, torch.cat(ys))
    assert_near(gradient(x), torch.cat(dxs))
    assert_same_statistics(norm, reference)
    if affine:
        assert_near(gradient(norm.weight), gradient(reference.weight), 1e-4)
        assert_near(gradient(norm.bias), gradient(reference.bias), 1e-4)
    assert counting.gathered == counting.reduced == []


def run_rank(shape, memory_format):
    """Return one rank's share: y, dx, the module and the shapes of its messages."""
    collective = Counting(GroupCollective())
    x, dy = batch(shape, seed=10 + collective.rank)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    norm = ViewBatchNorm(C)
    randomise(norm)
    synchronize_norms(norm, collective)
    y = norm(x)
    y.backward(dy)
    norm.collective = Collective()
    grads = gradient(norm.weight), gradient(norm.bias)
    return y.detach(), gradient(x), norm, grads, collective.gathered, collective.reduced


@pytest.mark.parametrize(
    ("shape", "memory_format", "tolerance"),
    [(shape, torch.contiguous_format, 1e-5) for shape in SHAPES]
    + [(SHAPES[1], torch.channels_last, 1e-5)]
    + [((2, C), torch.contiguous_format, 1e-4)],  # one value on each rank: dx is a difference of equals
)
def test_two_ranks(two_ranks, shape, memory_format, tolerance):
    results = two_ranks.run(run_rank, shape, memory_format)
    xs, dys = zip(*(batch(shape, seed=10 + rank) for rank in range(2)), strict=True)
    half = shape[0] // 2
    views = slice(None, half), slice(half, None)
    ys, dxs, reference = expected(
        [torch.cat([x[view] for x in xs]) for view in views], [torch.cat([dy[view] for dy in dys]) for view in views]
    )
    for rank, (y, dx, norm, _, gathered, reduced) in enumerate(results):
        own = slice(rank * half, (rank + 1) * half)
        assert_near(y, torch.cat([y_v[own] for y_v in ys]))
        assert_near(dx, torch.cat([dx_v[own] for dx_v in dxs]), tolerance)
        assert_same_statistics(norm, reference)
        assert gathered == [(2, 2, C)] and reduced == [(2, 2, C)]
    assert_near(sum(grads[0] for *_, grads, _, _ in results), gradient(reference.weight), 1e-4)
    assert_near(sum(grads[1] for *_, grads, _, _ in results), gradient(reference.bias), 1e-4)


def add_and_rectify_on_a_rank(num_views):
    """Return one rank's share of a norm with residual and ReLU: y, dx, the gradient of the residual, and the module."""
    rank = torch.distributed.get_rank()
    x, dy = batch((6, C, 3, 7), seed=20 + rank)
    norm = ViewBatchNorm(C, num_views=num_views)
    randomise(norm)
    x, residual = x.requires_grad_(), torch.linspace(-9, 9, x.numel()).view(x.shape).requires_grad_()
    y = norm(x, residual, relu=True)
    y.backward(dy)
    return y.detach(), gradient(x), gradient(residual), gradient(norm.weight), norm


@pytest.mark.parametrize(("ranks", "num_views"), [(2, 3), (3, 2)])
def test_a_residual_and_a_relu_on_ranks(pools, ranks, num_views):
    results = pools(ranks).run(add_and_rectify_on_a_rank, num_views)
    xs, dys = zip(*(batch((6, C, 3, 7), seed=20 + rank) for rank in range(ranks)), strict=True)
    x, dy = (
        torch.stack(images).unflatten(1, (num_views, -1)).transpose(0, 1).double() for images in (xs, dys)
    )  # [V, W, n
    residual = torch.linspace(-9, 9, xs[0].numel()).view(num_views, 1, -1, C, 3, 7).double().expand_as(x)
    x, residual, reference = x.clone().requires_grad_(), residual.clone().requires_grad_(), nn.BatchNorm2d(C)
    randomise(reference)
    ys = [reference.double()(x_v.flatten(0, 1)).view_as(x_v) + r_v for x_v, r_v in zip(x, residual, strict=True)]
    torch.stack(ys).relu().backward(dy)
    for rank, (y, dx, dresidual, _, norm) in enumerate(results):
        assert_near(y, torch.stack(ys)[:, rank].relu().flatten(0, 1))
        assert_near(dx, gradient(x)[:, rank].flatten(0, 1))
        assert_near(dresidual, gradient(residual)[:, rank].flatten(0, 1))
        assert_same_statistics(norm, reference)
    assert_near(sum(dweight for *_, dweight, _ in results), gradient(reference.weight), 1e-4)


def two_norms_on_a_rank(defer):
    """Return what a norm makes of x and of a residual with a norm of its own, and the shapes of the messages."""
    collective = Counting(GroupCollective())
    x, residual = (t.requires_grad_() for t in batch((6, C, 3, 7), seed=30 + collective.rank))
    norms = nn.ModuleList([ViewBatchNorm(C, num_views=3) for _ in range(2)])
    for norm in norms:
        randomise(norm)
    synchronize_norms(norms, collective)
    y = norms[0](x, norms[1](residual, defer=defer), relu=True)
    y.square().sum().backward()
    found = [y.detach(), gradient(x), gradient(residual), *(gradient(p) for p in norms.parameters()), *norms.buffers()]
    return found, collective.gathered, collective.reduced


def test_a_norm_and_that_of_its_residual_share_messages(pools):
    ones, others = (pools(3).run(two_norms_on_a_rank, defer) for defer in (True, False))
    for (found, gathered, reduced), (want, *_) in zip(ones, others, strict=True):
        for value, of_two in zip(found, want, strict=True):
            assert_near(value, of_two)
        assert gathered == [(6, 2, C)] and reduced == [(3, 3, C)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_half_precision_is_as_exact_as_torch(dtype, memory_format):
    shape = (64, C, 6, 6)
    x, dy = (t.to(dtype).contiguous(memory_format=memory_format) for t in batch(shape, seed=3))
    norm, plain = ViewBatchNorm(C), nn.BatchNorm2d(C)
    randomise(norm)
    randomise(plain)
    x.requires_grad_()
    y = norm(x)
    y.backward(dy)
    assert y.dtype == gradient(x).dtype == dtype and gradient(norm.weight).dtype == torch.float32
    ys, dxs, reference = expected(x.detach().chunk(2), dy.chunk(2))
    assert_same_statistics(norm, reference)  # to 1e-5: they are taken in fp32
    x_plain = x.detach().clone().requires_grad_()
    y_plain = torch.cat([plain(x_v) for x_v in x_plain.chunk(2)])
    y_plain.backward(dy)
    for ours, torchs, exact in [(y, y_plain, torch.cat(ys)), (gradient(x), gradient(x_plain), torch.cat(dxs))]:
        assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max()
    assert_near(gradient(norm.weight), gradient(reference.weight), 1e-4)


def test_memory_format_is_kept():
    x, dy = batch((8, C, 6, 4), seed=4)
    norm = ViewBatchNorm(C)
    dense = x.clone().requires_grad_()
    y = norm(dense)
    y.backward(dy)
    last = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y_last = ViewBatchNorm(C)(last)
    y_last.backward(dy)  # a gradient in the other format
    assert y.is_contiguous() and y_last.is_contiguous(memory_format=torch.channels_last)
    assert gradient(last).is_contiguous(memory_format=torch.channels_last)
    assert_near(y_last, y)
    assert_near(gradient(last), gradient(dense))
    strided = x.transpose(2, 3)  # in neither format
    assert_near(ViewBatchNorm(C)(strided), y.transpose(2, 3))


class Twins(Collective):
    """Act as two ranks with the same images."""

    @property
    def world_size(self):
        return 2

    def all_gather(self, tensor):
        return torch.stack([tensor, tensor])

    def all_reduce(self, tensor):
        return 2 * tensor


def test_later_passes_of_a_batch_take_the_statistics_of_the_first():
    model, counting, statistics = nn.Sequential(ViewBatchNorm(C)), Counting(Twins()), {}
    synchronize_norms(model, counting)
    x, dy = batch(SHAPES[1], seed=0)
    with torch.no_grad(), reuse_batch_stats(model, statistics):
        first = model(x)
    running = copy.deepcopy(model.state_dict())
    x.requires_grad_()
    with reuse_batch_stats(model, statistics):
        again = model(x)
        with reuse_batch_stats(model, {}):  # activations that are checkpointed within
            within = model(x)
        (dx,) = torch.autograd.grad(again, x, dy)
    assert again.equal(first) and within.equal(first)
    assert len(counting.gathered) == 1
    assert all(model.state_dict()[name].equal(value) for name, value in running.items())
    another = model(x)
    (want,) = torch.autograd.grad(another, x, dy)
    assert another.equal(first) and dx.equal(want)
    assert len(counting.gathered) == 2 and not model.state_dict()["0.running_mean"].equal(running["0.running_mean"])


def test_evaluation_is_batch_norm():
    x, _ = batch((7, C, 3, 3), seed=5)  # an odd batch: views are nothing to evaluation
    norm, plain = ViewBatchNorm(C).eval(), nn.BatchNorm2d(C).eval()
    randomise(norm)
    plain.load_state_dict(norm.state_dict())
    before = copy.deepcopy(norm.state_dict())
    torch.testing.assert_close(norm(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)


def test_state_dict_is_that_of_batch_norm():
    norm, plain = ViewBatchNorm(C), nn.BatchNorm2d(C)
    assert list(norm.state_dict()) == list(plain.state_dict())
    assert list(ViewBatchNorm(C, affine=False).state_dict()) == list(nn.BatchNorm2d(C, affine=False).state_dict())
    randomise(plain)
    norm.load_state_dict(plain.state_dict())
    torch.testing.assert_close(norm.running_var, plain.running_var)


def test_without_gradients():
    x, dy = batch((8, C), seed=6)
    norm = ViewBatchNorm(C)
    with torch.no_grad():
        y = norm(x)
    assert not y.requires_grad and norm.num_batches_tracked == 2
    norm.requires_grad_(False)
    x.requires_grad_()
    norm(x).backward(dy)
    _, dxs, _ = expected(x.detach().chunk(2), dy.chunk(2), affine=False)
    assert_near(gradient(x), torch.cat(dxs))
    assert norm.weight.grad is None
    norm.requires_grad_(True)
    norm(x.detach()).backward(dy)  # only the parameters
    assert norm.weight.grad is not None


def test_set_num_views_reaches_every_norm():
    model = nn.Sequential(ViewBatchNorm(C), nn.Sequential(ViewBatchNorm(C)))
    set_num_views(model, 3)
    model(torch.randn(9, C))
    assert [int(b) for name, b in model.named_buffers() if name.endswith("tracked")] == [3, 3]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((7, C), r"7 rows, which num_views \(=2\)"),
        ((2, C), "more than 1 value"),
        ((2, C, 1, 1), "more than 1 value"),
        ((4, C + 1), r"\[V\*n, 5\]"),
        ((4,), r"\[V\*n, 5\]"),
    ],
)
def test_errors(shape, message):
    with pytest.raises(ValueError, match=message):
        ViewBatchNorm(C)(torch.zeros(shape))


def test_a_number_of_views_that_cannot_be():
    with pytest.raises(ValueError, match="num_views is 0; it must be at least 1"):
        ViewBatchNorm(C, num_views=0)
    for make in (lambda: ViewBatchNorm(C, num_views=2.0), lambda: convert_norms(nn.Linear(3, 3), 2.0)):  # pyright: ignore
        with pytest.raises(TypeError, match=r"num_views is 2\.0; it must be an integer"):
            make()


def test_features_of_sequences_are_those_of_images():
    x, dy = batch((8, C, 6), seed=8)
    ys, dxs, reference = expected(x.unsqueeze(-1).chunk(2), dy.unsqueeze(-1).chunk(2))
    norm = ViewBatchNorm(C)
    randomise(norm)
    x.requires_grad_()
    y = norm(x)
    y.backward(dy)
    assert_near(y, torch.cat(ys).squeeze(-1))
    assert_near(gradient(x), torch.cat(dxs).squeeze(-1))
    assert_same_statistics(norm, reference)
    evaluated = norm.eval()(x.detach())
    assert_near(evaluated, norm(x.detach().unsqueeze(-1)).squeeze(-1))


def network(**options) -> Any:
    return nn.Sequential(
        nn.Conv2d(3, C, 3), nn.BatchNorm2d(C, **options), nn.Flatten(), nn.Linear(C, C), nn.BatchNorm1d(C)
    )


def test_converting_keeps_everything_but_the_class():
    model = network(eps=1e-3, momentum=0.3)
    model[4] = nn.SyncBatchNorm(C, affine=False)
    model[1].weight.requires_grad_(False)
    model[1].eval()
    randomise(model[1])
    state, kept = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    assert convert_norms(model, num_views=3) is model
    first, second = model[1], model[4]
    assert isinstance(first, ViewBatchNorm) and isinstance(second, ViewBatchNorm)
    assert (first.eps, first.momentum, first.num_views, first.training) == (1e-3, 0.3, 3, False)
    assert second.training and not second.affine and second.weight is None
    assert not first.weight.requires_grad and first.bias.requires_grad
    assert all(p is kept[name] for name, p in model.named_parameters())  # an optimizer made before stays valid
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_state_dicts_load_both_ways():
    plain, converted = network(), convert_norms(network())
    randomise(plain[1])
    converted.load_state_dict(plain.state_dict())
    torch.testing.assert_close(dict(converted.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    again = network()
    again.load_state_dict(converted.state_dict())
    torch.testing.assert_close(dict(again.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


def test_a_norm_alone_a_norm_in_two_places_and_a_second_conversion():
    norm = nn.BatchNorm1d(C)
    assert isinstance(convert_norms(norm), ViewBatchNorm)
    shared = convert_norms(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)}))
    assert isinstance(shared["a"], ViewBatchNorm) and shared["a"] is shared["b"][0]  # pyright: ignore[reportIndexIssue]
    assert convert_norms(shared, num_views=4)["a"].num_views == 4  # pyright: ignore[reportIndexIssue]


class Activated(nn.BatchNorm2d):
    """Have a forward pass of its own, as timm's BatchNormAct2d."""

    def forward(self, input):
        return super().forward(input).relu()


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (Activated(C), "norm '1' .Activated. cannot be converted: only nn.BatchNorm1d"),
        (nn.BatchNorm3d(C), "BatchNorm3d. cannot be converted"),
        (nn.BatchNorm2d(C, momentum=None), "momentum is None"),
        (nn.BatchNorm2d(C, track_running_stats=False), "track_running_stats is False"),
    ],
)
def test_norms_that_cannot_be_converted_are_refused_before_anything_is_changed(norm, reason):
    model = nn.Sequential(nn.BatchNorm2d(C), norm)
    with pytest.raises(ValueError, match=reason):
        convert_norms(model)
    assert type(model[0]) is nn.BatchNorm2d


def step_alone(model, views):
    """Run one process with torch's own norms, a view at a time."""
    return torch.cat([model(view) for view in views])


def trained(model, call, images, labels):
    """Return parameters and buffers after two steps of a training loop that is not ours."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in zip(images, labels, strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(call(x), y.repeat(len(x))).backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train_in_ddp(state, images, labels):
    rank, n = torch.distributed.get_rank(), images.shape[2] // 2
    model = torchvision.models.resnet18(num_classes=3).double()
    model.load_state_dict(state)
    ddp = nn.parallel.DistributedDataParallel(convert_norms(model, num_views=images.shape[1]))
    mine = slice(rank * n, (rank + 1) * n)
    return trained(model, lambda views: ddp(views.flatten(0, 1)), images[:, :, mine], labels[:, mine])


@pytest.mark.parametrize("num_views", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_torchvision_resnet_in_ddp_on_two_ranks_equals_one_process(two_ranks, num_views):
    torch.manual_seed(0)
    images, labels = torch.randn(2, num_views, 8, 3, 32, 32, dtype=torch.float64), torch.randint(3, (2, 8))
    images[:, 1:] *= 2
    model = torchvision.models.resnet18(num_classes=3).double()
    state = copy.deepcopy(model.state_dict())
    want = trained(model, lambda views: step_alone(model, views), images, labels)
    for got in two_ranks.run(train_in_ddp, state, images, labels):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
        assert not torch.equal(got["layer4.1.bn2.running_var"], state["layer4.1.bn2.running_var"])


def statistics_in_groups(x):
    """Return the running mean on this rank with a group of its own, and after a deep copy, with the group and without."""
    rank = torch.distributed.get_rank()
    alone = [torch.distributed.new_group([0]), torch.distributed.new_group([1])][rank]
    norms = [convert_norms(nn.BatchNorm1d(C), 1, group) for group in (alone, None)]  # pyright: ignore[reportArgumentType]
    norms += copy.deepcopy(norms)
    for norm in norms:
        norm(x + rank)
    return [norm.running_mean for norm in norms]


def test_norms_of_a_process_group_and_their_copies(two_ranks):
    x = torch.randn(16, C)
    for rank, (alone, everyone, *copies) in enumerate(two_ranks.run(statistics_in_groups, x)):
        assert_near(alone, 0.1 * (x.mean(0) + rank))
        assert_near(everyone, 0.1 * (x.mean(0) + 0.5))
        assert copies[0].equal(alone) and copies[1].equal(everyone)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_cuda_equals_cpu(memory_format, dtype, tolerance):
    x, dy = (t.to(dtype).contiguous(memory_format=memory_format) for t in batch((16, C, 6, 4), seed=7))
    results = []
    for device in ("cpu", "cuda"):
        norm = ViewBatchNorm(C).to(device)
        x_device = x.to(device).detach().requires_grad_()
        y = norm(x_device)
        y.backward(dy.to(device))
        results.append(
            [t.cpu() for t in (y.detach(), gradient(x_device), gradient(norm.weight), norm.state_dict()["running_var"])]
        )
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
