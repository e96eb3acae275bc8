"""k-NN against a plain loop, against scikit-learn, and against itself on other numbers of ranks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.nn import functional as F

from crossbatch.engine.evaluation import knn
from crossbatch.engine.evaluation.features import FeatureSet, gathered
from crossbatch.models.collective import Collective


def rows(features: torch.Tensor, labels: torch.Tensor, first: int = 0) -> FeatureSet:
    return FeatureSet(features, labels, first + torch.arange(len(labels)), [])


def clusters(count: int, seed: int, classes: int = 5, width: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features and labels of clusters that overlap, so that neighbours disagree."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, classes, (count,), generator=generator)
    return centres[labels] + 1.5 * torch.randn(count, width, generator=generator), labels


def test_votes_against_a_plain_loop():
    torch.manual_seed(0)
    queries, bank = F.normalize(torch.randn(7, 5), dim=1), F.normalize(torch.randn(40, 5), dim=1)
    labels = torch.randint(0, 3, (40,))
    near = knn.nearest(queries, rows(bank, labels), 9, Collective())
    for k in (6, 9):
        votes = knn.votes(near, k, num_classes=3)
        for query, vote in zip(queries.tolist(), votes.tolist(), strict=True):
            cosines = [sum(a * b for a, b in zip(query, row, strict=True)) for row in bank.tolist()]
            nearest = sorted(range(40), key=lambda i: -cosines[i])[:k]
            want = [0.0, 0.0, 0.0]
            for i in nearest:
                want[labels[i]] += math.exp((cosines[i] - max(cosines)) / 0.07)
            torch.testing.assert_close(torch.tensor(vote), torch.tensor(want), rtol=1e-4, atol=0)


def test_a_bank_smaller_than_k_votes_whole():
    bank = rows(F.normalize(torch.randn(3, 4), dim=1), torch.tensor([2, 1, 0]))
    scored = knn.score(bank, bank, [20, 1], 3, Collective())
    assert scored.predictions[20].tolist() == scored.predictions[1].tolist() == [2, 1, 0]
    assert scored.top1(20) == 100
    assert scored.neighbours.indices_MK[:, 3:].eq(-1).all()


@pytest.mark.parametrize("k", [1, 7, 20])
@pytest.mark.parametrize("temperature", [0.07, 0.5, 0.005])  # the last is beyond exp of fp32
def test_every_prediction_is_that_of_scikit_learn(k, temperature):
    (bank, bank_labels), (queries, labels) = clusters(400, 1), clusters(300, 2)
    weights: Any = lambda distance: np.exp((1 - distance) / temperature)  # noqa: E731
    theirs = KNeighborsClassifier(k, metric="cosine", weights=weights)
    theirs.fit(bank.double().numpy(), bank_labels.numpy())
    want = theirs.predict(queries.double().numpy())
    scored = knn.score(rows(bank, bank_labels), rows(queries, labels), [k], 5, Collective(), temperature)
    assert scored.predictions[k].tolist() == want.tolist()
    assert scored.top1(k) == pytest.approx(100 * (want == labels.numpy()).mean())
    assert 30 < scored.top1(k) < 90  # some are right, some wrong


def test_chunks_change_nothing(monkeypatch):
    (bank, bank_labels), (queries, labels) = clusters(50, 1), clusters(33, 2)
    whole = knn.score(rows(bank, bank_labels), rows(queries, labels), [5], 5, Collective())
    monkeypatch.setattr(knn, "SCORES_AT_ONCE", 200)  # 4 queries at a time
    cut = knn.score(rows(bank, bank_labels), rows(queries, labels), [5], 5, Collective())
    for one, other in zip(cut.neighbours, whole.neighbours, strict=True):
        torch.testing.assert_close(one, other)


def of_this_rank(bank_size: int, query_count: int) -> tuple:
    """Score this rank's share of the work, which is uneven on purpose."""
    from crossbatch.engine.runtime.distributed import GroupCollective

    collective = GroupCollective()
    shares = []
    for count, seed in ((bank_size, 1), (query_count, 2)):
        start, stop = (count * part // 3 for part in ((0, 1), (1, 3))[collective.rank])
        features, labels = (part[start:stop] for part in clusters(count, seed))
        shares.append(rows(features, labels, start))
    bank, queries = shares
    scored = knn.score(bank, queries, [20, 3], 5, collective)
    return tuple(scored.neighbours), scored.predictions, scored.queries.indices_N, [scored.top1(k) for k in (20, 3)]


@pytest.mark.parametrize(("bank_size", "query_count"), [(100, 50), (7, 2)])
def test_two_ranks_agree_with_one(threads, bank_size, query_count):
    (bank, bank_labels), (queries, labels) = clusters(bank_size, 1), clusters(query_count, 2)
    alone = knn.score(rows(bank, bank_labels), rows(queries, labels), [20, 3], 5, Collective())
    for near, predictions, indices, top1 in threads(2).run(of_this_rank, bank_size, query_count):
        for part, want in zip(near, alone.neighbours, strict=True):
            torch.testing.assert_close(part, want)
        assert predictions[20].equal(alone.predictions[20]) and predictions[3].equal(alone.predictions[3])
        assert indices.tolist() == list(range(query_count))
        assert top1 == [alone.top1(20), alone.top1(3)]


def gather_on_this_rank() -> list[int]:
    from crossbatch.engine.runtime.distributed import GroupCollective

    collective = GroupCollective()
    mine = rows(torch.zeros(3 * collective.rank, 4), torch.full((3 * collective.rank,), collective.rank))
    return gathered(mine, collective).labels_N.tolist()


def test_a_rank_without_rows_is_gathered_too(threads):
    assert threads(2).run(gather_on_this_rank) == [[1, 1, 1]] * 2
