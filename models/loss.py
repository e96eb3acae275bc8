"""Computes the contrastive loss over both views and, with BatchFormer, over both streams.

One term contrasts the queries of one view and stream with the keys of another:

    ctr(q, k) = 2T * cross_entropy(normalize(q) @ normalize(all keys).T / T, labels = own position in the global batch)

(MoCo v3, Chen et al. 2021, algorithm 1; 2T makes the learning rate less sensitive to T.) The kind of loss says which terms are
added; BatchFormer's release calls it `add_bf`. With S the sum over both directions and all pairs of streams (8 terms):

    kind              add_bf     loss                                                     chance level
    "none"            0          q1 k2 + q2 k1 on the only stream, without BatchFormer    4T ln B
    "sum"             1, 34      S                                                        16T ln B
    "mean"            36         S / 4                                                    4T ln B
    "mean_with_self"  37         (S + ctr(q1_o, q1_b) + ctr(q2_o, q2_b)) / 5, no          4T ln B
                                 gradient through the b side
    "joint"           other > 0  both streams as one batch of 2B rows; the other          4T ln 2B
                                 stream's key of the same image is a negative

Logits and cross-entropy are fp32 in every precision, and no [n, B] matrix of them is kept. Shapes: V views, S
streams (o: original, b: after BatchFormer), n local rows, B global rows, D width.
"""

import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from crossbatch.models.collective import Collective, GroupCollective
from crossbatch.models.cross_entropy import cross_entropy_over_keys

BatchFormerLoss = Literal["none", "sum", "mean", "mean_with_self", "joint"]
LOSSES: tuple[BatchFormerLoss, ...] = get_args(BatchFormerLoss)
NUM_TERMS = {"none": 2, "sum": 8, "mean": 8, "mean_with_self": 10, "joint": 2}
_DIVISORS = {"mean": 4, "mean_with_self": 5}
_STREAMS = "ob"


def loss_from_add_bf(add_bf: int) -> BatchFormerLoss:
    """Return the kind of loss that BatchFormer's release denotes by the number `add_bf`, at least 0."""
    if add_bf < 0:
        raise ValueError(f"`add_bf` (={add_bf}) must be at least 0; 0 trains without BatchFormer")
    numbers: dict[int, BatchFormerLoss] = {0: "none", 1: "sum", 34: "sum", 36: "mean", 37: "mean_with_self"}
    return numbers.get(add_bf, "joint")


def chance_loss(kind: BatchFormerLoss, temperature: float, batch: int) -> float:
    """Return the loss when all keys look alike: each term is then 2T ln(number of keys)."""
    keys = 2 * batch if kind == "joint" else batch
    return NUM_TERMS[kind] / _DIVISORS.get(kind, 1) * 2 * temperature * math.log(keys)


def contrastive_loss(
    queries: Tensor, keys: Tensor, temperature: float = 1.0, process_group: dist.ProcessGroup | None = None
) -> Tensor:
    """Return MoCo v3's loss ctr(q1, k2) + ctr(q2, k1) of this rank's images against the keys of all ranks, an fp32 scalar.

    The mean of this loss over the ranks is the loss of the global batch, so the gradients that DDP averages are those of the
    global batch. Queries and keys are normalised here.

    Args:
        queries: predictions of the online encoder for both views, [2, n, D], any floating dtype.
        keys: projections of the momentum encoder, [2, n, D]. They get no gradient.
        temperature: T, above 0; MoCo v3 trains ResNets with 1.0 and ViTs with 0.2.
        process_group: the ranks that hold the global batch, each with equally many images; None means all ranks, or this
            process alone without torch.distributed.

    Raises:
        ValueError: if the shapes differ from these, there are no images, the temperature is not positive, or the keys require
            a gradient.
    """
    if queries.dim() != 3 or len(queries) != 2 or queries.shape[1] == 0 or queries.shape != keys.shape:
        raise ValueError(
            f"queries are {list(queries.shape)} and keys {list(keys.shape)}; both must be [2, n, D], n >= 1"
        )
    if keys.requires_grad:
        raise ValueError("keys require a gradient, which they would not get; compute them under torch.no_grad()")
    collective = GroupCollective(process_group)
    return loss_of_streams(queries.unsqueeze(1), keys.unsqueeze(1), "none", temperature, collective)[0]


def loss_of_streams(
    q_VSnD: Tensor, k_VSnD: Tensor, kind: BatchFormerLoss, temperature: float, collective: Collective
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Compute the loss, the terms and the similarities of `MoCoOutput` from queries and keys of any floating dtype.

    S is 2 with BatchFormer and 1 without. One gather takes the keys of all views and streams to all ranks.
    """
    with torch.autocast(q_VSnD.device.type, enabled=False):
        q, keys_VSBD = _normalised(q_VSnD, k_VSnD, kind, collective)
        terms = {
            name: 2 * temperature * cross_entropy_over_keys(query, key, labels, temperature)
            for name, query, key, labels in _pairs(q, keys_VSBD, kind, collective)
        }
        loss = torch.stack(list(terms.values())).sum() / _DIVISORS.get(kind, 1)
        signals = _similarities(q.detach(), keys_VSBD, collective)
    return loss, {name: term.detach() for name, term in terms.items()}, signals


def loss_terms_by_image(
    q_VSnD: Tensor, k_VSnD: Tensor, kind: BatchFormerLoss, temperature: float, collective: Collective
) -> dict[str, Tensor]:
    """Return every term of `loss_of_streams` for each of this rank's images, fp32 [n]; its mean is the term."""
    q, keys_VSBD = _normalised(q_VSnD, k_VSnD, kind, collective)
    n, scale = q.shape[2], 2 * temperature
    return {
        name: scale * F.cross_entropy(query @ key.T / temperature, labels, reduction="none").view(-1, n).mean(0)
        for name, query, key, labels in _pairs(q, keys_VSBD, kind, collective)
    }


def _normalised(q_VSnD: Tensor, k_VSnD: Tensor, kind: BatchFormerLoss, collective: Collective) -> tuple[Tensor, Tensor]:
    """Return the queries of this rank and the keys of all ranks [V, S, B, D], in fp32 and of unit length."""
    q = F.normalize(q_VSnD.float(), dim=-1)
    keys = F.normalize(k_VSnD.detach().float(), dim=-1)
    if kind == "mean_with_self":
        keys = torch.cat((keys, q.detach()[:, 1:]), dim=1)  # the b queries are keys too
    return q, collective.all_gather(keys).permute(1, 2, 0, 3, 4).flatten(2, 3)  # from [W, V, S, n, D]


def _pairs(
    q_VSnD: Tensor, keys_VSBD: Tensor, kind: BatchFormerLoss, collective: Collective
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield (name, queries, keys, labels) of every term."""
    views, streams, n, _ = q_VSnD.shape
    batch = keys_VSBD.shape[2]
    labels = torch.arange(n, device=q_VSnD.device) + n * collective.rank
    for view in range(views):
        other = views - 1 - view
        if kind == "joint":
            joint_labels = torch.cat([labels + stream * batch for stream in range(streams)])
            yield f"q{view + 1}_k{other + 1}", q_VSnD[view].flatten(0, 1), keys_VSBD[other].flatten(0, 1), joint_labels
            continue
        for s in range(streams):
            for t in range(streams):
                name = f"q{view + 1}{_STREAMS[s]}_k{other + 1}{_STREAMS[t]}"
                yield name, q_VSnD[view, s], keys_VSBD[other, t], labels
        if kind == "mean_with_self":
            yield f"q{view + 1}o_q{view + 1}b", q_VSnD[view, 0], keys_VSBD[view, 2], labels


def _similarities(q_VSnD: Tensor, keys_VSBD: Tensor, collective: Collective) -> dict[str, Tensor]:
    """Return the mean cosine of queries with their own keys, and with all other keys, before BatchFormer."""
    n, batch = q_VSnD.shape[2], keys_VSBD.shape[2]
    q, keys = q_VSnD[:, 0], keys_VSBD[:, 0].flip(0)  # every view beside the keys of the other
    own = keys[:, collective.rank * n : (collective.rank + 1) * n]
    positive = (q * own).sum(-1).mean()
    everything = (q.mean(1) * keys.mean(1)).sum(-1).mean()
    return {
        "positive_similarity": positive,
        "negative_similarity": (everything * batch - positive) / (batch - 1),
    }
