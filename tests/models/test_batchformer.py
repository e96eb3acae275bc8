"""BatchFormer against torch's encoder layer, its dropout masks, and groups that span ranks."""

import pytest
import torch
from scipy.stats import chisquare

from crossbatch.engine.runtime.distributed import GroupCollective
from crossbatch.models.batchformer import BatchFormer, DropoutKey, keep_mask

KEY = DropoutKey(seed=1, step=2)
WORDS = KEY.words(2, torch.device("cpu"))


@pytest.mark.parametrize("kernel", ["reference", "sdpa", "fused"])
def test_equals_torch_encoder_layer_at_dropout_0(kernel):
    torch.manual_seed(0)
    ours = BatchFormer(16, group_size=5, dropout=0.0, kernel=kernel)
    theirs = torch.nn.TransformerEncoderLayer(16, 4, 16, dropout=0.0)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 10, 16, requires_grad=True)
    out = ours(x, WORDS)
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
    difference = (layer(x, WORDS) - layer(changed, WORDS)).abs().sum(-1) > 0
    assert difference.tolist() == [[True, True, False, False], [False] * 4]
    assert layer.eval()(x, WORDS) is x


def test_masks_are_balanced_independent_and_depend_on_every_word():
    rows, columns = torch.arange(300, dtype=torch.int32), torch.arange(400, dtype=torch.int32)
    word = KEY.word(view=0, place=0)
    mask = keep_mask(word, rows, columns, 0.5)
    assert mask.float().mean().item() == pytest.approx(0.5, abs=0.01)
    for other in (KEY.word(1, 0), KEY.word(0, 1), DropoutKey(1, 3).word(0, 0), DropoutKey(2, 2).word(0, 0)):
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
    assert keep_mask(DropoutKey(7, 11, 1).word(1, 2), r, c, 0.3).tolist() == want


def test_dropout_changes_with_the_step_and_repeats():
    torch.manual_seed(0)
    layer, x = BatchFormer(8, 4), torch.randn(2, 4, 8)
    first, again, later = (layer(x, DropoutKey(0, step).words(2, x.device)) for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, later)


def _rank_part(features, weight, group_size, state):
    """Output and gradients on this rank, for the global batch `features` [V, B, C] cut over the ranks."""
    collective = GroupCollective()
    layer = BatchFormer(features.shape[-1], group_size, dropout=0.5)
    layer.load_state_dict(state)
    layer.collective = collective
    n = features.shape[1] // collective.world_size
    mine = slice(collective.rank * n, (collective.rank + 1) * n)
    x = features[:, mine].clone().requires_grad_()
    out = layer(x, WORDS)
    (out * weight[:, mine]).sum().backward()
    return out.detach(), x.grad, [p.grad for p in layer.parameters()]


@pytest.mark.parametrize("group_size", [2, 4, 8])
def test_two_ranks_equal_one_for_groups_inside_and_across_ranks(two_ranks, group_size):
    torch.manual_seed(0)
    layer = BatchFormer(8, group_size, dropout=0.5)
    features, weight = torch.randn(2, 8, 8, requires_grad=True), torch.randn(2, 8, 8)
    out = layer(features, WORDS)
    (out * weight).sum().backward()
    parts = two_ranks.run(_rank_part, features.detach(), weight, group_size, layer.state_dict())
    torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), out.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([part[1] for part in parts], 1), features.grad, rtol=1e-5, atol=1e-5)
    for i, p in enumerate(layer.parameters()):
        torch.testing.assert_close(sum(part[2][i] for part in parts), p.grad, rtol=1e-5, atol=1e-5)
