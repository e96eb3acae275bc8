"""ViewBatchNorm against torch's own batch norm, applied to one view of all ranks at a time."""

import copy

import pytest
import torch
from torch import nn

from crossbatch.models.collective import Collective, GroupCollective
from crossbatch.models.norm import ViewBatchNorm, reuse_batch_stats, set_num_views, synchronize_norms

C = 5
SHAPES = [(12, C), (12, C, 3, 7), (2, C, 4, 4)]  # the last: one image per view


class Counting(Collective):
    """Passes on to another collective and notes the shape of what travels."""

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
    """Parameters and running statistics that a slip would show in."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in norm.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def batch(shape, seed):
    """An input far from mean 0 and variance 1, in which views differ, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = torch.randn((2, *shape), generator=generator)
    x = x * 3 + torch.arange(C).view(1, C, *(1,) * (len(shape) - 2))
    x[shape[0] // 2 :] *= 0.5
    return x, dy + 0.3


def expected(x_views, dy_views, affine=True, momentum=0.1):
    """torch's norm in float64, once per view: [y per view], [dx per view], and the module with grads and statistics."""
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
    """One rank's share: y, dx, the module and the shapes of its messages."""
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
    """Two ranks with the same images."""

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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
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
