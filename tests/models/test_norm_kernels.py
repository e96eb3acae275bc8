"""The passes of ViewBatchNorm, Triton's (interpreted where there is no GPU) and torch's, against float64."""

import functools
import gc
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from triton.runtime import interpreter

from crossbatch.models.norm import (
    ViewBatchNorm,
    for_two_consumers,
    operators,
    passes_triton,
    recomputed,
    view_batch_norm,
)

EPS = 1e-5


@pytest.fixture
def fused(monkeypatch):
    """Take Triton's kernels on this device, too, with small tiles, so that a view is several strips."""

    def is_last(x):
        return x.dim() == 2 or x.is_contiguous(memory_format=torch.channels_last)

    for module in (operators, view_batch_norm):
        monkeypatch.setattr(module, "is_fused", is_last)
    if os.environ["TRITON_INTERPRET"] == "1":
        round_bfloat16(monkeypatch)
    monkeypatch.setattr(passes_triton, "ELEMENTS", 1024)
    monkeypatch.setattr(passes_triton, "PROGRAMS", 4)


def round_bfloat16(monkeypatch):
    """Let the interpreter round to the nearest bfloat16, as GPUs and torch do; it cuts off."""
    cut_off, fp32, bfloat16 = interpreter._convert_float, interpreter.tl.float32, interpreter.tl.bfloat16

    def convert(values, source, target, mode):
        if (source, target) != (fp32, bfloat16):
            return cut_off(values, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def inputs(shape, dtype, seed=0, mean=0.5) -> tuple[torch.Tensor, ...]:
    """Return x, the residual and the gradient of the output, channels last, and weight and bias."""
    generator = torch.Generator().manual_seed(seed)
    x, residual, dy = torch.randn((3, *shape), generator=generator)
    x[len(x) // 2 :] *= 2
    images = [t.to(dtype) for t in (x + mean, residual, dy + 0.2)]
    if len(shape) == 4:
        images = [t.contiguous(memory_format=torch.channels_last) for t in images]
    weight, bias = torch.rand((2, shape[1]), generator=generator) + 0.5
    return *images, weight, bias - 1


def made(norm: nn.Module, call, x, residual, dy, weight, bias) -> dict[str, Any]:
    """Return the result of `call(norm, x, residual)`, its gradients and the running statistics, by name."""
    with torch.no_grad():
        norm.get_parameter("weight").copy_(weight)
        norm.get_parameter("bias").copy_(bias)
    leaves = [t.detach().clone().requires_grad_() for t in (x, residual)]
    y = call(norm, *leaves)
    y.backward(dy)
    grads = {"dx": leaves[0].grad, "dresidual": leaves[1].grad}
    grads |= {name: p.grad for name, p in norm.named_parameters()}
    found = {"y": y.detach(), **grads, "mean": norm.get_buffer("running_mean"), "var": norm.get_buffer("running_var")}
    return {name: value for name, value in found.items() if value is not None}


def plainly(views, adds, relu, norm, x, residual):
    """Do what torch does, view after view."""
    y = torch.cat([norm(x_v) for x_v in x.chunk(views)])
    y = y + residual if adds else y
    return y.relu() if relu else y


def ours(adds, relu, norm, x, residual):
    return norm(x, residual if adds else None, relu)


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-3)).item()


def assert_as_exact(got, want, torchs, fused: bool) -> None:
    """Check that no error is larger than twice torch's, whose sums on a CPU are doubles; its own passes may round once more."""
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.dtype == torchs[name].dtype and value.shape == want[name].shape
        slack = 0 if fused else torch.finfo(torch.float32).eps / 2
        assert error(value, want[name]) <= 2 * error(torchs[name], want[name]) + slack, name


def check(shape, views, dtype, adds, relu, fused=True, **options):
    given = inputs(shape, dtype, **options)
    make = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    plain = functools.partial(plainly, views, adds, relu)
    want = made(make(shape[1], EPS).double(), plain, *(t.double() for t in given))
    torchs = made(make(shape[1], EPS), plain, *given)
    got = made(ViewBatchNorm(shape[1], EPS, num_views=views), functools.partial(ours, adds, relu), *given)
    assert_as_exact(got, want, torchs, fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("adds", "relu"), [(False, False), (False, True), (True, False), (True, True)])
def test_all_in_one_pass(fused, dtype, adds, relu):
    check((2, 5, 7, 33), 2, dtype, adds, relu)


@pytest.mark.parametrize("passes", ["fused", "torch"])
@pytest.mark.parametrize(
    ("shape", "views"),
    [((2, 5, 7, 33), 1), ((6, 7, 3, 5), 3), ((8, 2048, 1, 1), 2), ((12, 70), 2), ((9, 1, 5, 5), 3)],
)
def test_shapes_and_numbers_of_views(request, monkeypatch, passes, shape, views):
    if passes == "fused":
        request.getfixturevalue("fused")
        monkeypatch.setattr(passes_triton, "ELEMENTS", 256 if shape[1] < 100 else 4096)
        monkeypatch.setattr(passes_triton, "COLUMNS", 64 if shape[1] < 100 else 1024)
    check(shape, views, torch.float32, True, True, passes == "fused")


def test_a_mean_of_a_thousand_deviations(fused, monkeypatch):
    monkeypatch.setattr(passes_triton, "ELEMENTS", 256)  # strips of several tiles
    check((4, 6, 9, 31), 2, torch.float32, True, True, mean=1500.0)


def test_equal_inputs_give_equal_bits(fused):
    given = inputs((4, 6, 9, 31), torch.bfloat16)
    first, second = (made(ViewBatchNorm(6), functools.partial(ours, True, True), *given) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_layouts_and_dtypes_of_what_comes_in(fused):
    """A residual in fp32, and a residual and a gradient that are stored contiguously, are those of channels last."""
    x, residual, dy, *parameters = inputs((4, 6, 9, 31), torch.bfloat16)
    call = functools.partial(ours, True, True)
    want = made(ViewBatchNorm(6), call, x, residual, dy, *parameters)
    got = made(ViewBatchNorm(6), call, x, residual.float().contiguous(), dy.contiguous(), *parameters)
    assert got["dresidual"].dtype == torch.float32
    for name, value in got.items():
        torch.testing.assert_close(value, want[name].to(value.dtype), rtol=0, atol=0)


def test_sequences_are_images_of_width_1():
    x, residual, dy, *parameters = inputs((4, 6, 9, 31), torch.float32)
    call = functools.partial(ours, True, True)
    want = made(ViewBatchNorm(6), call, x, residual, dy, *parameters)
    got = made(ViewBatchNorm(6), call, *(t.flatten(2) for t in (x, residual, dy)), *parameters)
    for name, value in got.items():
        torch.testing.assert_close(value, want[name].reshape(value.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("passes", ["fused", "torch"])
def test_two_consumers(request, passes):
    """The gradients of both arrive as one, also if one of them has none."""
    if passes == "fused":
        request.getfixturevalue("fused")
    x, residual, dy, *parameters = inputs((2, 5, 7, 33), torch.float32)

    def call(factors, norm, x, residual):
        branches = for_two_consumers(norm(x, residual, True))
        assert (branches[0] is branches[1]) == (passes == "torch")
        return sum(factor * branch for factor, branch in zip(factors, branches, strict=True) if factor)

    want = made(ViewBatchNorm(5), functools.partial(ours, True, True), x, residual, dy, *parameters)
    for factors in ((0.25, 0.75), (1.0, 0.0), (0.0, 1.0)):
        got = made(ViewBatchNorm(5), functools.partial(call, factors), x, residual, dy, *parameters)
        for name, value in got.items():
            torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("passes", ["fused", "torch"])
def test_an_output_that_is_not_kept_is_computed_again(request, passes):
    """The convolution behind it keeps the norm's input, and its gradient is the same to the bit."""
    if passes == "fused":
        request.getfixturevalue("fused")
    x, _, dy, weight, bias = inputs((2, 5, 7, 33), torch.bfloat16)
    kernel, outputs = torch.randn(5, 5, 1, 1).bfloat16().requires_grad_(), []

    def call(recomputes, norm, x, _):
        norm.recomputes_output = recomputes
        y = norm(x, relu=True)
        outputs.append(StorageWeakRef(y.untyped_storage()))
        with recomputed(y):
            return nn.functional.conv2d(y, kernel)

    def results(recomputes):
        def end(norm, x, residual):
            out = call(recomputes, norm, x, residual)
            gc.collect()  # the interpreter's circles of references
            assert outputs[-1].expired() == recomputes
            return out

        kernel.grad = None
        return {**made(ViewBatchNorm(5), end, x, x, dy, weight, bias), "kernel": gradient(kernel)}

    want, got = results(False), results(True)
    for name, value in want.items():
        assert got[name].equal(value), name


def test_hooks_around_get_what_else_is_kept_beside_a_recomputed_output():
    norm, weight, packed = ViewBatchNorm(5), torch.randn(5, 5, requires_grad=True), []
    norm.recomputes_output = True
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or len(packed), lambda k: packed[k - 1])
    with hooks:
        y = norm(torch.randn(4, 5, requires_grad=True), relu=True)
        with recomputed(y):
            out = y @ weight
    assert any(t is weight for t in packed) and not any(t is y for t in packed)
    out.sum().backward()
    torch.testing.assert_close(gradient(weight), y.detach().sum(0)[:, None].expand(5, 5))


def gradient(tensor):
    assert tensor.grad is not None
    return tensor.grad


def both(two, relu, norm, x, residual):
    """Normalise x by `norm` and the residual by a norm of its own, in one pass or (`two` is false) one after the other."""
    other = norm.residual_norm
    if isinstance(norm, ViewBatchNorm):
        return norm(x, other(residual, defer=two), relu)
    y = torch.cat([norm(x_v) for x_v in x.chunk(2)]) + torch.cat([other(x_v) for x_v in residual.chunk(2)])
    return y.relu() if relu else y


def made_of_both(make, call, x, residual, *rest):
    """Return what `made` does for two norms, of which the second is that of the residual."""
    norm, generator = make(x.shape[1]), torch.Generator().manual_seed(7)
    norm.residual_norm = make(x.shape[1])
    for parameter in norm.residual_norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    found = made(norm, call, x, residual, *rest)
    return found | {
        f"residual's {name}": value for name, value in norm.residual_norm.named_buffers() if "tracked" not in name
    }


@pytest.mark.parametrize("passes", ["fused", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "relu"), [((2, 5, 7, 33), True), ((2, 5, 7, 33), False), ((8, 70), True)])
def test_a_residual_with_a_norm_of_its_own(request, passes, dtype, shape, relu):
    if passes == "fused":
        request.getfixturevalue("fused")
    x, residual, *rest = inputs(shape, dtype)
    given = x, residual * 3 - 1, *rest
    make = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    plain = functools.partial(both, False, relu)
    want = made_of_both(lambda C: make(C, EPS).double(), plain, *(t.double() for t in given))
    torchs = made_of_both(lambda C: make(C, EPS), plain, *given)
    got = made_of_both(ViewBatchNorm, functools.partial(both, True, relu), *given)
    assert "residual_norm.weight" in want
    assert_as_exact(got, want, torchs, passes == "fused")


@pytest.mark.parametrize("passes", ["fused", "torch"])
def test_a_deferred_norm_equals_one_that_is_not(request, passes):
    """With torch's passes to the bit, also where norms are not alike, in evaluation and for sequences."""
    if passes == "fused":
        request.getfixturevalue("fused")
    x, residual, dy, *parameters = inputs((4, 6, 9, 31), torch.float32)
    rtol = 1e-4 if passes == "fused" else 0

    def check(make, call=both, images=(x, residual, dy)):
        want, got = (
            made_of_both(make, functools.partial(call, two, True), *images, *parameters) for two in (False, True)
        )
        for name, value in want.items():
            torch.testing.assert_close(got[name], value, rtol=rtol, atol=rtol)

    def with_two_consumers(two, relu, norm, x, residual):
        first, second = for_two_consumers(both(two, relu, norm, x, residual))
        return first + 2 * second

    norms = iter(ViewBatchNorm(6, eps) for eps in (1e-5, 1e-3, 1e-5, 1e-3))
    check(ViewBatchNorm)
    check(ViewBatchNorm, with_two_consumers)
    check(lambda _: next(norms))
    check(lambda C: ViewBatchNorm(C).eval())
    check(ViewBatchNorm, images=[t.flatten(2) for t in (x, residual, dy)])


def test_a_nan_stays(fused):
    x, residual, *_ = inputs((2, 5, 7, 33), torch.float32)
    residual[0, 0, 0, 0] = torch.nan
    assert ViewBatchNorm(5)(x, residual, relu=True).isnan().sum() == 1


def test_rows_beyond_two_to_the_31st_element():
    """The second view begins behind 2^31 elements (of memory that nobody touches): one program of each pass reads it there."""
    rows, C = (1 << 25) + 1, 64
    x = torch.empty((2 * rows, C), dtype=torch.float16)
    y, start = torch.empty_like(x), rows * C
    assert start > 2**31
    tile = torch.randn(4, C).half()
    x[:4], x[rows : rows + 4] = 0, tile
    channels = torch.zeros(2, C), torch.ones(2, C), torch.ones(C), torch.zeros(C)
    numbers: dict[str, Any] = {"ROWS": 4, "BLOCK": C, "num_warps": 1}
    kernels: Any = passes_triton
    both = *channels, *channels, C
    kernels._normalise[(1, 2)](x, x, y, *both, rows, C, 4, 1, 0.0, BOTH=False, RESIDUAL=False, RELU=True, **numbers)
    assert y[rows : rows + 4].equal(tile.relu())
    partial, options = torch.zeros(1, 2, 2, C), dict.fromkeys(("BOTH", "TWO", "RELU", "KEPT", "WRITE"), False)
    kernels._backward_sums[(1, 2)](x, x, x, x, x, x, *both, partial, rows, C, 4, 1, 0.0, **options, **numbers)
    torch.testing.assert_close(partial[0, 1, 0], tile.float().sum(0))


def test_a_residual_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"residual is \[4, 3\]; it must have the shape of the input, \[4, 5\]"):
        ViewBatchNorm(5)(torch.zeros(4, 5), torch.zeros(4, 3))


def test_evaluation_adds_and_rectifies():
    norm, plain = ViewBatchNorm(5).eval(), nn.BatchNorm2d(5).eval()
    x, residual, *_ = inputs((3, 5, 7, 33), torch.float32)
    assert norm(x, residual, relu=True).equal((plain(x) + residual).relu())
