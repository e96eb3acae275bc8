"""The contrastive loss over both views and, with BatchFormer, over both streams.

One term contrasts the queries of one view and stream with the keys of another:

    ctr(q, k) = 2T * cross_entropy(normalize(q) @ normalize(all keys).T / T, labels = own position in the global batch)

(MoCo v3, Chen et al. 2021, algorithm 1; 2T makes the learning rate less sensitive to T.) `add_bf` says which terms are added
(the flag of BatchFormer's release). With S the sum over both directions and all pairs of streams (8 terms):

    0          q1 k2 + q2 k1 on the only stream (chance level 4T ln B)
    1, 34      S                                                   (16T ln B)
    36         S / 4                                                (4T ln B)
    37         (S + ctr(q1_o, q1_b) + ctr(q2_o, q2_b)) / 5, no gradient through the b side (4T ln B)
    other > 0  "joint": both streams as one batch of 2B rows; the other stream's key of the same image is a negative
               (4T ln 2B)

Logits and cross-entropy are fp32 in every precision, and no [n, B] matrix of them is kept. Shapes: V views, S
streams (o: original, b: after BatchFormer), n local rows, B global rows, D width.
"""

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from crossbatch.models.collective import Collective
from crossbatch.models.cross_entropy import cross_entropy_over_keys

STREAMS = "ob"
SUM, MEAN, MEAN_WITH_SELF = (1, 34), 36, 37


def uses_batchformer(add_bf: int) -> bool:
    return add_bf > 0


def is_joint(add_bf: int) -> bool:
    return uses_batchformer(add_bf) and add_bf not in (*SUM, MEAN, MEAN_WITH_SELF)


def divisor(add_bf: int) -> int:
    """What the sum of the terms is divided by."""
    return {MEAN: 4, MEAN_WITH_SELF: 5}.get(add_bf, 1)


def num_terms(add_bf: int) -> int:
    if not uses_batchformer(add_bf) or is_joint(add_bf):
        return 2
    return 10 if add_bf == MEAN_WITH_SELF else 8


def chance_loss(add_bf: int, temperature: float, batch: int) -> float:
    """The loss when every key looks alike: each term is 2T ln(number of keys)."""
    keys = 2 * batch if is_joint(add_bf) else batch
    return num_terms(add_bf) / divisor(add_bf) * 2 * temperature * math.log(keys)


def contrastive_loss(
    q_VSnD: torch.Tensor, k_VSnD: torch.Tensor, add_bf: int, temperature: float, collective: Collective
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Loss of the local rows, whose mean over ranks is the loss of the global batch.

    Args:
        q_VSnD: predictions of the online encoder, any floating dtype; S is 2 with BatchFormer and 1 without.
        k_VSnD: keys of the momentum encoder.
        collective: gathers the keys of all views and streams at once.

    Returns:
        The loss (fp32 scalar); its terms by name, undivided and detached, e.g. "q1o_k2b"; and the collapse signals
        "positive_similarity" and "negative_similarity" of the original stream (mean cosines, detached).
    """
    with torch.autocast(q_VSnD.device.type, enabled=False):
        q = F.normalize(q_VSnD.float(), dim=-1)
        keys = F.normalize(k_VSnD.detach().float(), dim=-1)
        if add_bf == MEAN_WITH_SELF:
            keys = torch.cat((keys, q.detach()[:, 1:]), dim=1)  # the b queries are keys too
        keys_VSBD = _gather(keys, collective)
        terms = {
            name: 2 * temperature * cross_entropy_over_keys(query, key, labels, temperature)
            for name, query, key, labels in _pairs(q, keys_VSBD, add_bf, collective)
        }
        loss = torch.stack(list(terms.values())).sum() / divisor(add_bf)
        signals = _similarities(q.detach(), keys_VSBD, collective)
    return loss, {name: term.detach() for name, term in terms.items()}, signals


def _gather(keys_VSnD: torch.Tensor, collective: Collective) -> torch.Tensor:
    everyone = collective.all_gather(keys_VSnD)  # [W, V, S, n, D]
    return everyone.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _pairs(
    q_VSnD: torch.Tensor, keys_VSBD: torch.Tensor, add_bf: int, collective: Collective
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(name, queries, keys, labels) of every term."""
    views, streams, n, _ = q_VSnD.shape
    batch = keys_VSBD.shape[2]
    labels = torch.arange(n, device=q_VSnD.device) + n * collective.rank
    for view in range(views):
        other = views - 1 - view
        if is_joint(add_bf):
            joint_labels = torch.cat([labels + stream * batch for stream in range(streams)])
            yield f"q{view + 1}_k{other + 1}", q_VSnD[view].flatten(0, 1), keys_VSBD[other].flatten(0, 1), joint_labels
            continue
        for s in range(streams):
            for t in range(streams):
                name = f"q{view + 1}{STREAMS[s]}_k{other + 1}{STREAMS[t]}"
                yield name, q_VSnD[view, s], keys_VSBD[other, t], labels
        if add_bf == MEAN_WITH_SELF:
            yield f"q{view + 1}o_q{view + 1}b", q_VSnD[view, 0], keys_VSBD[view, 2], labels


def _similarities(q_VSnD: torch.Tensor, keys_VSBD: torch.Tensor, collective: Collective) -> dict[str, torch.Tensor]:
    n, batch = q_VSnD.shape[2], keys_VSBD.shape[2]
    q, keys = q_VSnD[:, 0], keys_VSBD[:, 0].flip(0)  # every view beside the keys of the other
    own = keys[:, collective.rank * n : (collective.rank + 1) * n]
    positive = (q * own).sum(-1).mean()
    everything = (q.mean(1) * keys.mean(1)).sum(-1).mean()
    return {
        "positive_similarity": positive,
        "negative_similarity": (everything * batch - positive) / (batch - 1),
    }
