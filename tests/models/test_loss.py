"""The loss against its formula written out again in float64."""

import math

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from crossbatch.models import Collective, chance_loss, contrastive_loss, cross_entropy, loss_from_add_bf
from crossbatch.models.cross_entropy import cross_entropy_over_keys
from crossbatch.models.loss import LOSSES, loss_of_streams, loss_terms_by_image

N, D = 6, 8


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def ctr(q, k, temperature):
    """Return 2T * mean_i -log softmax_j(q_i . k_j / T)[i], row by row."""
    q, k = unit(q.double()), unit(k.double())
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(q)):
        logits = torch.stack([(q[i] * k[j]).sum() / temperature for j in range(len(k))])
        total = total - logits[i] + torch.log(torch.exp(logits).sum())
    return 2 * temperature * total / len(q)


def add(terms) -> torch.Tensor:
    return torch.stack(list(terms)).sum()


def expected(q, k, add_bf, t) -> torch.Tensor:
    both = [(q[0], k[1], q[0]), (q[1], k[0], q[1])]
    if add_bf == 0:
        return add(ctr(queries[0], keys[0], t) for queries, keys, _ in both)
    if add_bf not in (1, 34, 36, 37):
        return add(ctr(queries.flatten(0, 1), keys.flatten(0, 1), t) for queries, keys, _ in both)
    total = add(ctr(queries[s], keys[r], t) for queries, keys, _ in both for s in (0, 1) for r in (0, 1))
    if add_bf == 36:
        return total / 4
    if add_bf == 37:
        return (total + add(ctr(own[0], own[1].detach(), t) for _, _, own in both)) / 5
    return total


@pytest.mark.parametrize("kind", LOSSES)
def test_terms_by_image_have_the_terms_of_the_batch_as_their_mean(kind):
    torch.manual_seed(3)
    q, k = torch.randn(2, 2, 2, N, D)
    _, terms, _ = loss_of_streams(q, k, kind, 0.3, Collective())
    by_image = loss_terms_by_image(q, k, kind, 0.3, Collective())
    assert by_image.keys() == terms.keys()
    for name, of_images in by_image.items():
        assert of_images.shape == (N,)
        torch.testing.assert_close(of_images.mean(), terms[name])
    if kind != "joint":  # the first term: stream o of view 1 against that of view 2
        first, keys = unit(q[0, 0].double()), unit(k[1, 0].double())
        logits = first @ keys.T / 0.3
        want = 0.6 * (logits.logsumexp(1) - logits.diagonal())
        torch.testing.assert_close(by_image["q1o_k2o"].double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("add_bf", [0, 1, 34, 36, 37, 2, 33])
def test_loss_and_gradients_match_the_formula(add_bf, temperature):
    torch.manual_seed(add_bf)
    streams = 1 if add_bf == 0 else 2
    q = torch.randn(2, streams, N, D, requires_grad=True)
    k = torch.randn(2, streams, N, D)
    loss, terms, _ = loss_of_streams(q, k, loss_from_add_bf(add_bf), temperature, Collective())
    loss.backward()
    assert q.grad is not None
    gradient = q.grad.clone()
    reference = q.detach().clone().requires_grad_()
    want = expected(reference, k, add_bf, temperature)
    want.backward()
    assert reference.grad is not None
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, reference.grad, rtol=1e-5, atol=1e-7)
    assert len(terms) == {0: 2, 1: 8, 34: 8, 36: 8, 37: 10}.get(add_bf, 2)


def test_numbers_of_the_release_have_names():
    numbers = {number: loss_from_add_bf(number) for number in (0, 1, 34, 36, 37, 2, 33, 35)}
    joint = dict.fromkeys((2, 33, 35), "joint")
    assert numbers == {0: "none", 1: "sum", 34: "sum", 36: "mean", 37: "mean_with_self", **joint}
    assert set(numbers.values()) == set(LOSSES)


def test_the_public_form_is_the_loss_without_batchformer():
    torch.manual_seed(0)
    q, k = torch.randn(2, N, D, requires_grad=True), torch.randn(2, N, D)
    loss = contrastive_loss(q, k, 0.2)
    loss.backward()
    reference = q.detach().clone().requires_grad_()
    want = expected(reference.unsqueeze(1), k.unsqueeze(1), 0, 0.2)
    want.backward()
    assert q.grad is not None and reference.grad is not None
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(q.grad, reference.grad, rtol=1e-5, atol=1e-7)


def _contrast_of_rank(q, k):
    """Return loss and gradient of this rank's half of the images, in a group of its own and in that of all ranks."""
    rank = torch.distributed.get_rank()
    alone = [torch.distributed.new_group([0]), torch.distributed.new_group([1])][rank]
    assert isinstance(alone, torch.distributed.ProcessGroup)
    mine = slice(rank * N // 2, (rank + 1) * N // 2)
    results = []
    for group in (alone, None):
        own = q[:, mine].clone().requires_grad_()
        loss = contrastive_loss(own, k[:, mine], 0.2, process_group=group)
        loss.backward()
        results.append((loss.detach(), own.grad))
    return results


def test_two_ranks_contrast_with_the_keys_of_both(threads):
    torch.manual_seed(0)
    q, k = torch.randn(2, N, D), torch.randn(2, N, D)
    ranks = threads(2).run(_contrast_of_rank, q, k)
    whole = q.clone().requires_grad_()
    loss = contrastive_loss(whole, k, 0.2)
    loss.backward()
    losses, gradients = zip(*(results[1] for results in ranks), strict=True)
    torch.testing.assert_close(sum(losses) / 2, loss.detach())
    torch.testing.assert_close(torch.cat(gradients, 1) / 2, whole.grad)
    for rank, (alone, _) in enumerate(results[0] for results in ranks):
        mine = slice(rank * N // 2, (rank + 1) * N // 2)
        torch.testing.assert_close(alone, contrastive_loss(q[:, mine], k[:, mine], 0.2))


def test_shapes_and_keys_that_need_a_gradient_are_refused():
    q = torch.randn(2, N, D)
    with pytest.raises(ValueError, match=r"queries are \[6, 8\] and keys \[6, 8\]; both must be \[2, n, D\]"):
        contrastive_loss(q[0], q[0])
    with pytest.raises(ValueError, match="keys require a gradient"):
        contrastive_loss(q, q.clone().requires_grad_())
    with pytest.raises(ValueError, match="keys_BD requires a gradient"):
        cross_entropy_over_keys(q[0], q[1].clone().requires_grad_(), torch.arange(N), 1.0)


@pytest.mark.parametrize("add_bf", [0, 1, 36, 37, 2])
def test_chance_level_is_the_loss_of_equal_keys(add_bf):
    streams = 1 if add_bf == 0 else 2
    q = torch.randn(2, streams, N, D)
    k = torch.ones(2, streams, N, D)
    if add_bf == 37:
        q[:, 1] = 1.0  # the b queries are keys, too
    loss, _, _ = loss_of_streams(q, k, loss_from_add_bf(add_bf), 0.3, Collective())
    assert loss.item() == pytest.approx(chance_loss(loss_from_add_bf(add_bf), 0.3, N), rel=1e-5)


def test_chance_values_of_the_recipes():
    values = [chance_loss(kind, 1.0, 4096) for kind in ("none", "sum", "mean", "joint")]
    assert [round(value, 2) for value in values] == [33.27, 133.08, 33.27, 36.04]
    assert chance_loss("mean_with_self", 1.0, 4096) == pytest.approx(4 * math.log(4096))


def test_logits_stay_fp32_under_autocast():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, N, D), torch.randn(2, 1, N, D)
    plain, _, _ = loss_of_streams(q, k, "none", 0.1, Collective())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered, _, _ = loss_of_streams(q, k, "none", 0.1, Collective())
    assert lowered.dtype == torch.float32
    assert lowered.item() == plain.item()


def test_similarities_against_all_pairs():
    torch.manual_seed(1)
    q, k = torch.randn(2, 2, N, D), torch.randn(2, 2, N, D)
    _, _, signals = loss_of_streams(q, k, "sum", 1.0, Collective())
    cosines = torch.stack([unit(q[0, 0]) @ unit(k[1, 0]).T, unit(q[1, 0]) @ unit(k[0, 0]).T])
    own = torch.eye(N, dtype=torch.bool)
    assert signals["positive_similarity"].item() == pytest.approx(cosines[:, own].mean().item(), abs=1e-6)
    assert signals["negative_similarity"].item() == pytest.approx(cosines[:, ~own].mean().item(), abs=1e-6)


def plain(q, keys, labels, temperature):
    return torch.nn.functional.cross_entropy(q @ keys.T / temperature, labels)


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("rows_at_once", [1, 5, 33])
def test_cross_entropy_in_tiles_is_the_plain_formula(rows_at_once, temperature, monkeypatch):
    torch.manual_seed(0)
    n, B = 33, 1001
    monkeypatch.setattr(cross_entropy, "_TILE", rows_at_once * B)
    q, keys, labels = unit(torch.randn(n, 64)), unit(torch.randn(B, 64)), torch.randperm(B)[:n]
    results = []
    for function, dtype in ((cross_entropy_over_keys, torch.float32), (plain, torch.float64)):
        own = q.to(dtype, copy=True).requires_grad_()
        loss = function(own, keys.to(dtype), labels, temperature)
        (3 * loss).backward()
        assert own.grad is not None
        results.append((loss.detach().double(), own.grad.double()))
    (loss, gradient), (want, want_gradient) = results
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    assert (gradient - want_gradient).norm() <= 1e-6 * want_gradient.norm()


class Peak(TorchDispatchMode):
    """Record in `bytes` the largest sum of all storages that operators have made and that are alive."""

    def __init__(self):
        super().__init__()
        self.bytes, self._alive = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            storage = out.untyped_storage()
            self._alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {at: (ref, size) for at, (ref, size) in self._alive.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return out


def test_peak_memory_at_65536_keys_is_under_a_tenth_of_the_plain_formulas():
    q, keys, labels = torch.randn(256, 32, requires_grad=True), torch.randn(65536, 32), torch.arange(256)
    peaks = []
    for function in (cross_entropy_over_keys, plain):
        with Peak() as peak:
            function(q, keys, labels, 1.0).backward()
        peaks.append(peak.bytes)
    assert peaks[1] > 2 * 256 * 65536 * 4
    assert peaks[0] < peaks[1] / 10


def test_what_would_give_a_loss_that_means_nothing_is_refused():
    q, keys, labels = torch.randn(4, 8), torch.randn(6, 8), torch.arange(4)
    for arguments in ((q, keys, labels[:1], 1.0), (q[:0], keys, labels[:0], 1.0), (q, keys[:0], labels, 1.0)):
        with pytest.raises(ValueError, match="labels_n"):
            cross_entropy_over_keys(*arguments)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature is"):
            cross_entropy_over_keys(q, keys, labels, temperature)
        with pytest.raises(ValueError, match="temperature is"):
            contrastive_loss(torch.randn(2, 4, 8), torch.randn(2, 4, 8), temperature)
