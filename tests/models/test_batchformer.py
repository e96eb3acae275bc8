"""BatchFormer against torch's encoder layer, its dropout masks, and groups that span ranks."""

import pytest
import torch
from scipy.stats import chisquare

from crossbatch.models.batchformer import BatchFormer, DropoutKey, keep_mask

KEY = DropoutKey(seed=1, step=2)


@pytest.mark.parametrize("kernel", ["reference", "sdpa", "fused"])
def test_equals_torch_encoder_layer_at_dropout_0(kernel):
    torch.manual_seed(0)
    ours = BatchFormer(16, group_size=5, dropout=0.0, kernel=kernel)
    theirs = torch.nn.TransformerEncoderLayer(16, 4, 16, dropout=0.0)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 10, 16, requires_grad=True)
    out = ours(x, 1, 2)
    # [views, groups, 5, C] -> sequence first, as the original calls it
    want = theirs(x.view(4, 5, 16).transpose(0, 1)).transpose(0, 1).reshape(2, 10, 16)
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)
    weight = torch.randn_like(out)
    (ours_grad,) = torch.autograd.grad((out * weight).sum(), x, retain_graph=True)
    (theirs_grad,) = torch.autograd.grad((want * weight).sum(), x)
    torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-5, atol=1e-6)


def test_initialised_like_torch():
    ours, theirs = BatchFormer(64, 8), torch.nn.TransformerEncoderLayer(64, 4, 64)
    for (name, p), (other, q) in zip(sorted(ours.named_parameters()), sorted(theirs.named_parameters()), strict=True):
        assert (name, p.shape) == (other, q.shape)
        assert p.std().item() == pytest.approx(q.std().item(), rel=0.2, abs=1e-6)


@pytest.mark.parametrize(("width", "parameters"), [(2048, 25_186_304), (768, 3_546_624), (384, 888_576)])
def test_parameter_counts(width, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in BatchFormer(width, 256).parameters()) == parameters


def test_groups_do_not_see_each_other_and_evaluation_is_the_identity():
    torch.manual_seed(0)
    layer = BatchFormer(8, group_size=2)
    x = torch.randn(2, 4, 8)
    changed = x.clone()
    changed[0, 0] += 1
    difference = (layer(x, 1, 2) - layer(changed, 1, 2)).abs().sum(-1) > 0
    assert difference.tolist() == [[True, True, False, False], [False] * 4]
    assert layer.eval()(x, 1, 2) is x


def test_masks_are_balanced_independent_and_depend_on_every_word():
    rows, columns = torch.arange(300, dtype=torch.int32), torch.arange(400, dtype=torch.int32)
    word = KEY.dropout_seed(view=0, place=0)
    mask = keep_mask(word, rows, columns, 0.5)
    assert mask.float().mean().item() == pytest.approx(0.5, abs=0.01)
    for other in (
        KEY.dropout_seed(1, 0),
        KEY.dropout_seed(0, 1),
        DropoutKey(1, 3).dropout_seed(0, 0),
        DropoutKey(2, 2).dropout_seed(0, 0),
    ):
        agree = (keep_mask(other, rows, columns, 0.5) == mask).float().mean().item()
        assert agree == pytest.approx(0.5, abs=0.01)
    assert keep_mask(word, rows, columns, 0.1).float().mean().item() == pytest.approx(0.9, abs=0.01)
    pairs = mask[:-1, :-1].int() * 8 + mask[1:, :-1].int() * 4 + mask[:-1, 1:].int() * 2 + mask[1:, 1:].int()
    assert chisquare(torch.bincount(pairs[::2, ::2].flatten(), minlength=16).numpy()).pvalue > 1e-4


def triple32(x: int) -> int:
    x = (x ^ x >> 17) * 0xED5AD4BB % 2**32
    x = (x ^ x >> 11) * 0xAC4C1B51 % 2**32
    x = (x ^ x >> 15) * 0x31848BAB % 2**32
    return x ^ x >> 14


def test_mask_bits_are_those_of_the_documented_hash():
    """Kernels recompute these bits, and a checkpoint continues with them."""
    word = 0
    for part in (7, 0, 11, 1, 1, 2):  # seed (low, high), step, stream, view, place
        word = triple32(word ^ part)
    rows, columns = [0, 3, 70_000], [0, 1, 2, 9, 4095]
    words = [[triple32(triple32(triple32(r) ^ word) ^ triple32(c)) for c in columns] for r in rows]
    signed = [[w - 2**32 if w >= 2**31 else w for w in row] for row in words]
    want = [[w >= 0.3 * 2**32 - 2**31 for w in row] for row in signed]
    r, c = torch.tensor(rows, dtype=torch.int32), torch.tensor(columns, dtype=torch.int32)
    assert keep_mask(DropoutKey(7, 11, 1).dropout_seed(1, 2), r, c, 0.3).tolist() == want


def test_masks_repeat_with_seed_and_step_and_else_come_from_torchs_generator():
    torch.manual_seed(0)
    layer, x = BatchFormer(8, 4), torch.randn(2, 4, 8)
    first, again, later, other = (layer(x, seed, step) for seed, step in ((0, 3), (0, 3), (0, 4), (1, 3)))
    assert torch.equal(first, again)
    assert torch.equal(first, layer(x, dropout_seeds=DropoutKey(0, 3).dropout_seeds(2, x.device)))
    assert not torch.allclose(first, later) and not torch.allclose(first, other)
    torch.manual_seed(7)
    drawn, redrawn = layer(x), layer(x)
    assert not torch.allclose(drawn, redrawn)
    torch.manual_seed(7)
    assert torch.equal(layer(x), drawn)


def test_masks_drawn_without_a_key_are_those_of_the_backward_pass():
    """With fixed masks the layer is a smooth function, so numerical gradients must agree."""
    torch.manual_seed(0)
    layer, x = BatchFormer(4, 3, num_heads=2).double(), torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)

    def call(x):
        torch.manual_seed(5)
        return layer(x)

    assert torch.autograd.gradcheck(call, x)


def test_one_view_without_its_axis_and_evaluation():
    torch.manual_seed(0)
    layer, x = BatchFormer(8, 3), torch.randn(6, 8)
    assert layer.kernel_on("cpu") == layer.kernel_on(torch.device("cpu"))
    assert torch.equal(layer(x, seed=1, step=2), layer(x.unsqueeze(0), seed=1, step=2)[0])
    assert layer.eval()(x) is x and layer(x[:0]).shape == (0, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"width": 6}, ValueError, r"width is 6, but .* num_heads \(=4\)"),
        ({"width": 8.0}, TypeError, "width is 8.0; it must be an integer"),
        ({"group_size": 0}, ValueError, "group_size is 0; it must be at least 1"),
        ({"group_size": 2.0}, TypeError, "group_size is 2.0; it must be an integer"),
        ({"dropout": 1.0}, ValueError, "dropout is 1; it must be at least 0 and less than 1"),
        ({"kernel": "flash"}, ValueError, "kernel is 'flash', but there is no such kernel; allowed: auto"),
    ],
)
def test_arguments_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        BatchFormer(**{"width": 8, "group_size": 2, **arguments})


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((5, 8), {}, r"group_size is 4, but there are 5 images on each of 1 rank\(s\); it must divide 5, or be"),
        ((2, 8), {}, "group_size is 4, but there are 2 images"),
        ((4, 9), {}, r"features are \[4, 9\]; they must be \[n, 8\] or \[V, n, 8\]"),
        ((0, 8), {}, r"features are \[0, 8\]; they must be .*, n >= 1"),
        ((4, 8), {"seed": 1}, "seed is 1 and step is None; give both or neither"),
        ((4, 8), {"dropout_seeds": torch.zeros(4, 2, dtype=torch.int32)}, r"must be int32 \[4, 1\]"),
        (
            (4, 8),
            {"seed": 1, "step": 2, "dropout_seeds": torch.zeros(4, 1, dtype=torch.int32)},
            "give only one of them",
        ),
    ],
)
def test_calls_that_cannot_be(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchFormer(8, 4)(torch.zeros(shape), **arguments)


def ddp_gradients(model, x):
    """Return the gradients of one step in DDP, in a training loop that is not ours."""
    ddp = torch.nn.parallel.DistributedDataParallel(model)  # it must outlive the backward pass
    ddp(x).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


class Network(torch.nn.Module):
    """Stand in for somebody else's network: a backbone, BatchFormer, a head."""

    def __init__(self, group_size):
        super().__init__()
        self.backbone, self.mix, self.head = torch.nn.Linear(6, 8), BatchFormer(8, group_size), torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.mix(self.backbone(x), seed=3, step=5))


def _rank_of_ddp(state, x, group_size):
    rank, n = torch.distributed.get_rank(), len(x) // 2
    model = Network(group_size)
    model.load_state_dict(state)
    return ddp_gradients(model, x[rank * n : (rank + 1) * n])


@pytest.mark.parametrize("group_size", [4, 8])
def test_in_ddp_two_ranks_equal_one_process(two_ranks, group_size):
    """Groups of 8 span the ranks, which hold 4 images each."""
    torch.manual_seed(0)
    model, x = Network(group_size), torch.randn(8, 6)
    model(x).square().mean().backward()
    for gradients in two_ranks.run(_rank_of_ddp, model.state_dict(), x, group_size):
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-5, atol=1e-6)


def _rank_part(features, weight, group_size, state):
    """Return output and gradients on this rank for the global batch `features` [V, B, C] cut over the ranks."""
    layer = BatchFormer(features.shape[-1], group_size, dropout=0.5, process_group=torch.distributed.group.WORLD)
    layer.load_state_dict(state)
    n = features.shape[1] // layer.collective.world_size
    mine = slice(layer.collective.rank * n, (layer.collective.rank + 1) * n)
    x = features[:, mine].clone().requires_grad_()
    out = layer(x, 1, 2)
    (out * weight[:, mine]).sum().backward()
    return out.detach(), x.grad, [p.grad for p in layer.parameters()]


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_two_ranks_equal_one_for_groups_inside_and_across_ranks(threads, group_size):
    torch.manual_seed(0)
    layer = BatchFormer(8, group_size, dropout=0.5)
    features, weight = torch.randn(2, 8, 8, requires_grad=True), torch.randn(2, 8, 8)
    out = layer(features, 1, 2)
    (out * weight).sum().backward()
    parts = threads(2).run(_rank_part, features.detach(), weight, group_size, layer.state_dict())
    torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), out.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([part[1] for part in parts], 1), features.grad, rtol=1e-5, atol=1e-5)
    for i, p in enumerate(layer.parameters()):
        torch.testing.assert_close(sum(part[2][i] for part in parts), p.grad, rtol=1e-5, atol=1e-5)
