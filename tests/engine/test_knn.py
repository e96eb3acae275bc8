"""Weighted votes against a plain loop."""

import math

import torch
from torch.nn import functional as F

from crossbatch.engine.knn import weighted_votes


def test_votes_against_a_plain_loop():
    torch.manual_seed(0)
    queries, bank = F.normalize(torch.randn(7, 5), dim=1), F.normalize(torch.randn(40, 5), dim=1)
    labels = torch.randint(0, 3, (40,))
    votes = weighted_votes(queries, bank, labels, k=6, num_classes=3)
    for query, vote in zip(queries.tolist(), votes.tolist(), strict=True):
        cosines = [sum(a * b for a, b in zip(query, row, strict=True)) for row in bank.tolist()]
        nearest = sorted(range(40), key=lambda i: -cosines[i])[:6]
        want = [0.0, 0.0, 0.0]
        for i in nearest:
            want[labels[i]] += math.exp(cosines[i] / 0.07)
        torch.testing.assert_close(torch.tensor(vote), torch.tensor(want), rtol=1e-4, atol=0)


def test_a_bank_smaller_than_k_votes_whole():
    bank = F.normalize(torch.randn(3, 4), dim=1)
    votes = weighted_votes(bank, bank, torch.tensor([0, 1, 2]), k=20, num_classes=3)
    assert votes.argmax(1).tolist() == [0, 1, 2]
