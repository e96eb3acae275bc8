"""Kernels of the BatchFormer layer against float64, their masks bit for bit, and why one cannot run.

Triton kernels run interpreted where there is no GPU; tests marked `gpu` run them compiled.
"""

import pytest
import torch

from crossbatch.models.batchformer import (
    BatchFormer,
    DropoutKey,
    fused,
    keep_mask,
    passes_triton,
    reference,
    sdpa,
    tiles,
)
from crossbatch.models.batchformer.dispatch import Situation, choose, explain
from crossbatch.models.batchformer.dropout import NUM_PLACES, Mask

KEY = DropoutKey(seed=1, step=2)
SEEDS = KEY.dropout_seeds(2, torch.device("cpu"))


@pytest.fixture
def passes(request, monkeypatch):
    """Run fused operators with these passes, on this device, and interpreted kernels in few, large programs."""
    name, device = request.param
    if name != "cpu":
        monkeypatch.setattr(fused, "_passes", lambda _: passes_triton)
    if name != "cpu" and device == "cpu":
        monkeypatch.setattr(passes_triton, "ELEMENTS", 1 << 18)
        # A head of a group of 257 makes two tiles of rows.
        monkeypatch.setitem(tiles.TILE, "cpu", 200 * 257)
    return device


def with_passes(*names):
    cases = [(("cpu", "cpu"), ()), (("triton", "cpu"), ()), (("triton", "cuda"), pytest.mark.gpu)]
    cases = [pytest.param(case, marks=marks, id="-".join(case)) for case, marks in cases if case[0] in names]
    return pytest.mark.parametrize("passes", cases, indirect=True)


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-3)).item()


def layer_results(kernel, dtype, views, n, dim, group_size, dropout, device):
    """Return output and gradients by name; the input is not contiguous."""
    torch.manual_seed(0)
    layer = BatchFormer(dim, group_size, dropout=dropout, kernel=kernel)
    x, weight = torch.randn(views, dim, n).mT, torch.randn(views, n, dim)
    for p in layer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    layer, x, weight = layer.to(device, dtype), x.to(device, dtype).requires_grad_(), weight.to(device, dtype)
    assert not x.is_contiguous() or n == 1
    out = layer(x, dropout_seeds=SEEDS[:, :views].to(device))
    (out * weight).sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **gradients}


@with_passes("cpu", "triton")
@pytest.mark.parametrize(
    ("views", "n", "dim", "group_size", "dropout"),
    [(2, 3, 36, 1, 0.5), (2, 14, 20, 7, 0.0), (2, 14, 20, 7, 0.5), (1, 255, 36, 255, 0.5), (1, 257, 24, 257, 0.5)],
)
def test_error_is_at_most_twice_that_of_torch(passes, views, n, dim, group_size, dropout):
    shape = views, n, dim, group_size, dropout, passes
    want = layer_results("reference", torch.float64, *shape)
    plain = layer_results("reference", torch.float32, *shape)
    for name, got in layer_results("fused", torch.float32, *shape).items():
        assert got.shape == want[name].shape and got.dtype == torch.float32
        assert error(got, want[name]) <= 2 * error(plain[name], want[name]) + 1e-7, name


def plain_attention(q, k, v, mask):
    """Compute attention by torch operators in the dtype given, probabilities in fp32."""
    (S, H, Q, D), G = q.shape, k.shape[2]
    probabilities = (q @ k.mT * D**-0.5).float().softmax(-1)
    if mask.probability:
        rows, columns = mask.attention_rows(S, H, Q), mask.columns(S, G).unsqueeze(1)
        keep = keep_mask(mask.seeds(S).unsqueeze(1), rows, columns, mask.probability)
        probabilities = probabilities * keep / (1 - mask.probability)
    return probabilities.to(v.dtype) @ v


def attention_results(function, qkv, grad, mask):
    inputs = [x.detach().clone().requires_grad_() for x in qkv]
    out = function(*inputs, mask)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]


def check_attention(dtype, device, shape, dropout):
    torch.manual_seed(0)
    S, H, Q, G, D = shape
    mask = Mask(KEY.dropout_seeds(1, torch.device(device))[0], dropout, first_row=11, first_column=3)
    packed = torch.randn(S, G, 3, H, D, device=device).to(dtype)  # heads lie between the rows
    q, k, v = (packed[:, : Q if i == 0 else G, i].transpose(1, 2) for i in range(3))
    grad = torch.randn(S, Q, H, D, device=device).to(dtype).transpose(1, 2)
    want = attention_results(plain_attention, [x.double() for x in (q, k, v)], grad, mask)
    plain = attention_results(plain_attention, (q, k, v), grad, mask)
    for got, torchs, exact in zip(attention_results(fused.attention, (q, k, v), grad, mask), plain, want, strict=True):
        assert got.dtype == dtype
        assert error(got, exact) <= 2 * error(torchs, exact) + 1e-7


@with_passes("triton")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("dtype", "shape"), [(torch.float16, (2, 2, 7, 7, 9)), (torch.bfloat16, (1, 2, 33, 66, 40))])
def test_attention_of_16_bits(passes, dtype, shape, dropout):
    check_attention(dtype, passes, shape, dropout)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 4, 257, 257, 512), (2, 4, 255, 510, 96), (1, 4, 4096, 4096, 192)])
def test_compiled_attention(shape, dtype, dropout):
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no bf16")
    check_attention(dtype, "cuda", shape, dropout)


S, A, H, Q, G, C = 4, 2, 3, 5, 10, 300  # two views of two groups; rows start elsewhere than columns


def masks_of(place):
    return Mask(SEEDS[place], 0.5, first_row=40, first_column=20)


@with_passes("cpu", "triton")
def test_attention_drops_what_the_hash_says(passes):
    """Equal scores and the identity as values show the mask itself."""
    mask, seeds = masks_of(0), [KEY.dropout_seed(view, 0) for view in range(2)]
    mask = Mask(mask.seeds_V.to(passes), *(mask.probability, mask.first_row, mask.first_column))
    q, k = torch.zeros(S, H, Q, 16, device=passes), torch.zeros(S, H, G, 16, device=passes)
    out = fused.attention(q, k, torch.eye(G, 16, device=passes).expand(S, H, G, 16), mask)[..., :G]
    torch.testing.assert_close(out[out > 0], torch.full_like(out[out > 0], 2 / G))
    for s in range(S):
        view, group = divmod(s, A)
        for h in range(H):
            rows = torch.tensor([(40 + group * Q + i) * H + h for i in range(Q)], dtype=torch.int32)
            columns = torch.tensor([20 + group * G + j for j in range(G)], dtype=torch.int32)
            assert torch.equal(out[s, h].cpu() > 0, keep_mask(seeds[view], rows, columns, 0.5))


@with_passes("cpu", "triton")
def test_features_are_dropped_as_the_hash_says(passes):
    seeds = [KEY.dropout_seed(view, 2) for view in range(2)]
    mask = Mask(masks_of(2).seeds_V.to(passes), 0.5, 40)
    ones, zeros = torch.ones(S, Q, C, device=passes), torch.zeros(S, Q, C, device=passes)
    hidden = fused.bias_relu(zeros, ones[0, 0], mask)
    y = ones.clone().requires_grad_()
    _, total, _, _ = fused.add_norm_op(zeros, y, ones[0, 0], zeros[0, 0], 1e-5, mask.seeds_V, 0.5, 40)
    columns = torch.arange(C, dtype=torch.int32)
    for s in range(S):
        view, group = divmod(s, A)
        rows = torch.arange(40 + group * Q, 40 + (group + 1) * Q, dtype=torch.int32)
        want = keep_mask(seeds[view], rows, columns, 0.5)
        for got in (hidden, total):
            assert torch.equal(got[s].cpu(), 2.0 * want)
    assert (hidden > 0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    grad = torch.randn_like(ones)
    (dy,) = torch.autograd.grad(
        fused.add_norm(grad, y, ones[0, 0], zeros[0, 0], 1e-5, mask), y, grad * columns.to(passes)
    )
    assert torch.equal(dy != 0, total != 0)


@pytest.mark.parametrize(
    ("kernel", "dropout"), [(reference, 0.0), (reference, 0.5), (sdpa, 0.0), (fused, 0.0), (fused, 0.5)]
)
def test_gradcheck_in_float64(kernel, dropout):
    torch.manual_seed(0)
    mask = Mask(SEEDS[0], dropout, 4, 2)
    q, k, v = (torch.randn(2, 2, rows, 3, dtype=torch.float64, requires_grad=True) for rows in (3, 5, 5))
    x, y, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 6), (2, 3, 6), (6,), (6,))
    )
    assert torch.autograd.gradcheck(lambda *qkv: kernel.attention(*qkv, mask), (q, k, v))
    assert torch.autograd.gradcheck(lambda *xb: kernel.bias_relu(*xb, mask), (x, bias))
    assert torch.autograd.gradcheck(lambda *xywb: kernel.add_norm(*xywb, 1e-5, mask), (x, y, weight, bias))


def test_scores_are_not_kept():
    dim, G = 8, 256
    layer, x = BatchFormer(dim, G), torch.randn(1, G, dim, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, dropout_seeds=SEEDS[:, :1]).sum()
    assert 4 * G < max(kept) <= 3 * dim * G


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck asks for it
@pytest.mark.parametrize("name", ["attention", "bias_relu", "add_norm"])
def test_operators_are_registered_as_torch_wants_them(name):
    seeds = SEEDS[0]
    x, y = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    vector = torch.randn(8, requires_grad=True)
    q = torch.randn(2, 3, 2, 4).transpose(1, 2).requires_grad_()
    arguments = {
        "attention": (q, q, q, seeds, 0.5, 0, 0),
        "bias_relu": (x, vector, seeds, 0.5, 0),
        "add_norm": (x, y, vector, vector, 1e-5, seeds, 0.5, 0),
    }
    torch.library.opcheck(getattr(fused, f"{name}_op"), arguments[name])


def test_torch_compile_takes_the_layer_whole():
    torch.manual_seed(0)
    layer, x = BatchFormer(16, 5), torch.randn(2, 10, 16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for mix in (layer, compiled):
        own = x.clone().requires_grad_()
        out = mix(own, dropout_seeds=SEEDS)
        out.sum().backward()
        results.append((out.detach(), own.grad))
    torch.testing.assert_close(results[1], results[0])


def test_a_kernel_that_cannot_run_says_why():
    assert choose("auto", Situation("cpu")) == "fused" and choose("sdpa", Situation("cpu", dropout=0.0)) == "sdpa"
    with pytest.raises(
        ValueError, match=r"kernel is 'sdpa', but .*draws its own dropout masks.*; allowed: auto, fused, reference"
    ):
        BatchFormer(8, 2, kernel="sdpa")
    with pytest.raises(ValueError, match="needs sm_70"):
        choose("fused", Situation("cuda", (6, 1)))
    assert choose("auto", Situation("cuda", (6, 1), dropout=0.0)) == "sdpa"
    name, why = explain("auto", Situation("xpu"))
    assert name == "reference" and "this is xpu" in why and "sdpa: torch's attention" in why


def test_places_have_seeds_of_their_own():
    assert SEEDS.shape == (NUM_PLACES, 2) and len(set(SEEDS.flatten().tolist())) == 2 * NUM_PLACES
    assert SEEDS[3, 1].item() % 2**32 == KEY.dropout_seed(1, 3)
