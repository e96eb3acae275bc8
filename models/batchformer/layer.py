"""The BatchFormer layer (Hou et al., CVPR 2022): one post-norm transformer encoder layer over the images of a batch.

The batch is the sequence: image i attends to the other images of its group. There is no positional encoding and no mask.
Parameter names are those of `torch.nn.TransformerEncoderLayer(C, 4, C, dropout)`, and so are the values at dropout 0.

Groups are runs of `group_size` images of the *global* batch, so the result does not depend on the number of ranks. A group
inside a rank is plain self-attention; where a group spans ranks, each rank computes the rows of its own images against the
gathered features of the whole group, and the gather's backward returns each image the gradient that the others owe it.

What lies between the linear layers is a kernel's: see `dispatch`.

Shapes: V views, n local images, G images of a group, Q rows computed here (G, or n where a group spans ranks), S sequences
(views x groups here), C features, H heads.
"""

import torch
from torch import nn
from torch.nn import functional as F

from crossbatch.models.batchformer import fused, reference, sdpa
from crossbatch.models.batchformer.dispatch import Kernel, Situation, check, choose, explain
from crossbatch.models.batchformer.dropout import AFTER_ATTENTION, AFTER_MLP, ATTENTION, INSIDE_MLP, Mask
from crossbatch.models.collective import Collective, gather_with_gradient

KERNELS: dict[str, Kernel] = {"fused": fused, "sdpa": sdpa, "reference": reference}


class BatchAttention(nn.Module):
    """Multi-head attention of Q rows over the G images of their group; parameters as in `nn.MultiheadAttention`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, own_SQC: torch.Tensor, group_SGC: torch.Tensor, kernel: Kernel, mask: Mask) -> torch.Tensor:
        """[S, Q, C]."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if group_SGC is own_SQC:
            q, k, v = self._heads(F.linear(own_SQC, weight, bias), 3)
        else:
            dim = own_SQC.shape[-1]
            (q,) = self._heads(F.linear(own_SQC, weight[:dim], bias[:dim]), 1)
            k, v = self._heads(F.linear(group_SGC, weight[dim:], bias[dim:]), 2)
        return self.out_proj(kernel.attention(q, k, v, mask).transpose(1, 2).flatten(2))

    def _heads(self, x: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        """[S, N, parts * C] -> `parts` views [S, H, N, D]."""
        return x.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class MaskedRelu(nn.Linear):
    """dropout(relu(x weight^T + bias))."""

    def forward(self, input: torch.Tensor, kernel: Kernel, mask: Mask) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return kernel.bias_relu(F.linear(input, self.weight), self.bias, mask)


class AddNorm(nn.LayerNorm):
    """LayerNorm(x + dropout(y))."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, kernel: Kernel, mask: Mask) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return kernel.add_norm(x, y, self.weight, self.bias, self.eps, mask)


class BatchFormer(nn.Module):
    """Mixes the features of the images of a group; the identity in evaluation.

    Args:
        dim: width C of the features; divisible by `num_heads`.
        group_size: images G that attend to each other; divides the global batch, and either divides the local batch or is
            a multiple of it.
        dropout: probability at the four places.
        kernel: "auto" or one of `dispatch.NAMES`.

    Raises:
        ValueError: for a width that the heads do not divide, or a kernel that cannot run.
    """

    def __init__(self, dim: int, group_size: int, dropout: float = 0.5, num_heads: int = 4, kernel: str = "auto"):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"BatchFormer needs a feature width divisible by {num_heads} heads; given {dim}")
        self.group_size, self.dropout, self.kernel = group_size, dropout, kernel
        check(kernel, Situation("cpu", dropout=dropout))
        self.collective = Collective()
        self.self_attn = BatchAttention(dim, num_heads)
        self.linear1 = MaskedRelu(dim, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.norm1 = AddNorm(dim)
        self.norm2 = AddNorm(dim)

    def kernel_on(self, device: torch.device) -> tuple[str, str]:
        """The kernel that computes there, and why."""
        return explain(self.kernel, Situation.on(device, self.dropout))

    def forward(self, features_VnC: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """[V, n, C] -> [V, n, C]; every view attends within itself. `words`, of the masks, as in `DropoutKey.words`."""
        if not self.training:
            return features_VnC
        kernel = KERNELS[choose(self.kernel, Situation.on(features_VnC.device, self.dropout))]
        own, group, first_row, first_column = self._groups(features_VnC)

        def mask(place: int) -> Mask:
            return Mask(words[place], self.dropout, first_row, first_column)

        own = self.norm1(own, self.self_attn(own, group, kernel, mask(ATTENTION)), kernel, mask(AFTER_ATTENTION))
        hidden = self.linear1(own, kernel, mask(INSIDE_MLP))
        own = self.norm2(own, self.linear2(hidden), kernel, mask(AFTER_MLP))
        return own.reshape(features_VnC.shape)

    def _groups(self, features_VnC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Own rows [S, Q, C], their groups [S, G, C], and the global position of the first image of either."""
        _, n, dim = features_VnC.shape
        first, size = self.collective.rank * n, self.group_size
        if n % size == 0:
            own = features_VnC.reshape(-1, size, dim)
            return own, own, first, first
        assert size % n == 0, (size, n)
        everyone = gather_with_gradient(features_VnC, self.collective)  # [W, V, n, C]
        start = first // size * (size // n)
        group = everyone[start : start + size // n].transpose(0, 1).reshape(-1, size, dim)
        return features_VnC, group, first, start * n
