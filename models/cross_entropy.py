"""Computes the cross-entropy of rows against many keys, without the matrix of logits.

A tile of rows meets all keys at once, its softmax gives the loss and, right away, the gradient of the queries

    d mean(loss) / dq_i = (sum_j softmax_ij k_j - k_own) / (T n)

which is no larger than the queries; the tile is then used again. This takes two products where autograd takes three, and
for 256 rows and 65,536 keys 8 MiB where autograd keeps several times 64 MiB.

Shapes: n rows, B keys, D width.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE = 1 << 21  # logits at a time: 8 MiB


def cross_entropy_over_keys(queries_nD: Tensor, keys_BD: Tensor, labels_n: Tensor, temperature: float) -> Tensor:
    """Return the mean over the rows of cross_entropy(queries keys^T / temperature, labels), without storing the matrix [n, B].

    Args:
        queries_nD: n queries, which get a gradient. They are not normalised here.
        keys_BD: B keys in the dtype of the queries, for example those of all ranks. They get no gradient, as in MoCo.
        labels_n: int64, for each query the index of its own key, 0 to B - 1.
        temperature: the logits are divided by it; above 0.

    Raises:
        ValueError: if the keys require a gradient, which this function does not compute; if the shapes differ from these, or
            there are no queries or no keys; or if the temperature is not positive.
    """
    fits = queries_nD.dim() == keys_BD.dim() == 2 and queries_nD.shape[1] == keys_BD.shape[1]
    if not fits or labels_n.shape != queries_nD.shape[:1] or 0 in (len(queries_nD), len(keys_BD)):
        raise ValueError(
            f"queries_nD are {list(queries_nD.shape)}, keys_BD {list(keys_BD.shape)} and labels_n {list(labels_n.shape)}; "
            f"allowed: [n, D], [B, D] and [n], with at least one row and one key"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; allowed: > 0")
    if keys_BD.requires_grad:
        raise ValueError("keys_BD requires a gradient, which it would not get; detach it, or use F.cross_entropy")
    return _CrossEntropy.apply(queries_nD, keys_BD, labels_n, temperature)  # pyright: ignore[reportReturnType]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_nD: Tensor, keys_BD: Tensor, labels_n: Tensor, temperature: float) -> Tensor:
        n = len(q_nD)
        loss_n, gradient_nD = q_nD.new_empty(n), torch.empty_like(q_nD) if ctx.needs_input_grad[0] else None
        step = max(1, _TILE // len(keys_BD))
        tile_RB = q_nD.new_empty(min(step, n), len(keys_BD))
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            q, labels = q_nD[rows], labels_n[rows]
            logits = torch.mm(q, keys_BD.T, out=tile_RB[: len(q)]).div_(temperature)
            own = logits.gather(1, labels.unsqueeze(1))
            highest = logits.amax(1, keepdim=True)
            total = logits.sub_(highest).exp_().sum(1, keepdim=True)
            loss_n[rows] = (total.log() + highest - own).squeeze(1)
            if gradient_nD is not None:
                expected = torch.mm(logits, keys_BD).div_(total)
                gradient_nD[rows] = expected.sub_(keys_BD[labels]).div_(temperature * n)
        ctx.save_for_backward(gradient_nD)
        return loss_n.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient_nD,) = ctx.saved_tensors
        return gradient_nD * grad, None, None, None
