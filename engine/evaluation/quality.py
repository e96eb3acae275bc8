"""Measures features without labels: how many dimensions they fill, how close views of an image lie, how evenly images spread.

    rankme          exp of the entropy of the features' singular values, divided by their sum (Garrido et al. 2023, without the
                    1e-7 that is added there to each); the features are not centred
    effective_rank  the same of the covariance matrix, so of the features' variances along its axes: the effective rank of Roy
                    and Vetterli (2007) of that matrix
    alignment       mean squared distance between two augmented views of an image (Wang and Isola 2020, alpha 2)
    uniformity      log of the mean of exp(-2 squared distance) over all pairs of different images, averaged over the two views
                    (Wang and Isola 2020, t 2)

The first two lie between 1 (all features on a line: collapse) and C, and grow with the number of images up to about 10 C. The
others are of unit-length features: 0 is best for alignment, and -4 cannot be passed by uniformity (0: all images are equal).

Shapes: N images of a rank, M images of all ranks, C features.
"""

import math

import torch
from torch.nn import functional as F

from crossbatch.models.collective import Collective

ROUNDING = 1e-10  # of the features' mean square: a variance below it is rounding, and no spread


def ranks(features_NC: torch.Tensor, collective: Collective) -> dict[str, float]:
    """Return rankme and effective_rank of the features of all ranks; every rank must call it, and gets the same numbers.

    The matrices that are decomposed are C x C and float64, whatever the number of images; one message holds all of them.
    Features that are not finite have no rank, and give {}.
    """
    ones = features_NC.new_ones(len(features_NC), 1, dtype=torch.float64)
    extended = torch.cat([features_NC.double(), ones], dim=1)
    sums = collective.all_reduce(extended.T @ extended)
    count, mean_C, square_CC = sums[-1, -1], sums[-1, :-1], sums[:-1, :-1]
    if not count > 0 or not torch.isfinite(sums).all():
        return {}
    square_CC, mean_C = square_CC / count, mean_C / count
    variances = torch.linalg.eigvalsh(square_CC - torch.outer(mean_C, mean_C)).clamp(min=0)
    spread = variances.sum() > ROUNDING * square_CC.trace()
    return {
        "rankme": _perplexity(torch.linalg.eigvalsh(square_CC).clamp(min=0).sqrt()),
        "effective_rank": _perplexity(variances) if spread else 1.0,
    }


def _perplexity(weights: torch.Tensor) -> float:
    """Return the exponential of the entropy of non-negative weights, divided by their sum; 1 if all of them are 0."""
    weights = weights / weights.sum()
    weights = weights[weights > 0]
    return math.exp(-(weights * weights.log()).sum().item())


def alignment_and_uniformity(views_MC: torch.Tensor, others_MC: torch.Tensor) -> dict[str, float]:
    """Return alignment and uniformity of two views' features; {} for fewer than two images or if a feature is not finite."""
    views, others = (F.normalize(features.double(), dim=1) for features in (views_MC, others_MC))
    if len(views) < 2 or not (torch.isfinite(views).all() and torch.isfinite(others).all()):
        return {}
    uniformity = [torch.pdist(some).square().mul(-2).exp().mean().log() for some in (views, others)]
    return {
        "alignment": (views - others).square().sum(1).mean().item(),
        "uniformity": torch.stack(uniformity).mean().item(),
    }
