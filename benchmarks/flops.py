"""Counts with torch what a call computes, and gives it as a share of what the card can do (MFU).

Products and convolutions count, at their dense sizes, two operations per multiply-add. What is computed twice to save memory
counts once (Chowdhery et al., 2022, appendix B), so the FLOPs of a step do not depend on its chunks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rows import Row
from crossbatch.engine.config import ResolvedConfig
from crossbatch.engine.planning.catalogue import CARDS, GPUS
from crossbatch.engine.planning.prediction import TRAINING_UNITS, crop_of
from crossbatch.engine.sketch import sketch
from crossbatch.models import NUM_VIEWS


def count(call: Callable[[], Any]) -> int:
    """Make one call and return its FLOPs."""
    import crossbatch.models.batchformer.fused  # noqa: F401, registers the operators

    mapping = {
        torch.ops.crossbatch.batchformer_attention: _attention,
        torch.ops.crossbatch.batchformer_attention_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return counter.get_total_flops()


def of_step(cfg: ResolvedConfig) -> float:
    """Return the FLOPs of a step of `cfg` on one rank, from its shapes: every view once online and once for the keys."""
    crop = crop_of(cfg)
    # Of the heads, the queries' side costs three forward passes and the keys' side one: twice what both cost forward.
    return NUM_VIEWS * cfg.local_batch * crop.flops * (1 + 1 / TRAINING_UNITS) + 2 * sketch(cfg).heads_flops


def with_rates(rows: list[Row], flops: float, precision: str) -> list[Row]:
    """Add TFLOP of a call, TFLOP/s and `mfu` ("unknown" without a known peak) to rows in ms of calls that compute `flops`."""
    peak = peak_of_card(torch.cuda.get_device_name(), precision) if torch.cuda.is_available() else None
    for row in rows:
        per_s = flops / row.p50 * 1000
        rates = {"tflop": flops / 1e12, "tflop_per_s": per_s / 1e12, "mfu": per_s / peak if peak else "unknown"}
        row.settings = row.settings | rates
    return rows


def peak_of_card(name: str, precision: str) -> float | None:
    """Return the dense FLOP/s of a card by the name that CUDA has for it; None where it is not in CARDS.

    None for fp32, too, on cards with TF32: torch lets convolutions use it, but not matrix products.
    """
    card = GPUS.get(CARDS.get(name, ""))
    if card is None or (precision == "fp32" and card.tf32):
        return None
    return card.peak(precision) or None


def _attention(q_SHQD: list[int], k_SHGD: list[int], *_: Any, **__: Any) -> int:
    """Count two products, [Q, D] x [D, G] and [Q, G] x [G, D]."""
    S, H, Q, D = q_SHQD
    return 4 * S * H * Q * k_SHGD[2] * D


def _attention_backward(grad_SHQD: list[int], q_SHQD: list[int], k_SHGD: list[int], *_: Any, **__: Any) -> int:
    """Count four products; the scores, computed again, do not count."""
    return 2 * _attention(q_SHQD, k_SHGD)
