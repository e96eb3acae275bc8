"""The BatchFormer layer (Hou et al., CVPR 2022): one post-norm transformer encoder layer over the images of a batch.

The batch is the sequence: image i attends to the other images of its group. There is no positional encoding and no mask.
Parameter names are those of `torch.nn.TransformerEncoderLayer(C, 4, C, dropout)`, and so are the values at dropout 0.

Groups are runs of `group_size` images of the *global* batch, so the result does not depend on the number of ranks. A group
inside a rank is plain self-attention; where a group spans ranks, each rank computes the rows of its own images against the
gathered features of the whole group, and the gather's backward returns each image the gradient that the others owe it.

Shapes: V views, n local images, G images of a group, Q rows computed here (G, or n where a group spans ranks), A groups here,
C features, H heads.
"""

import torch
from torch import nn
from torch.nn import functional as F

from crossbatch.models.batchformer.dropout import DropoutKey, keep_mask
from crossbatch.models.collective import Collective, gather_with_gradient

ATTENTION, AFTER_ATTENTION, INSIDE_MLP, AFTER_MLP = range(4)  # the four places of dropout


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

    def forward(self, own_AQC: torch.Tensor, group_AGC: torch.Tensor, mask_AHQG: torch.Tensor | None) -> torch.Tensor:
        """`mask_AHQG` multiplies the attention probabilities (0 or 1 / (1 - p)); None drops nothing. Returns [A, Q, C]."""
        dim = own_AQC.shape[-1]
        q_weight, kv_weight = self.in_proj_weight.split((dim, 2 * dim))
        q_bias, kv_bias = self.in_proj_bias.split((dim, 2 * dim))
        q = self._heads(F.linear(own_AQC, q_weight, q_bias))
        k, v = map(self._heads, F.linear(group_AGC, kv_weight, kv_bias).chunk(2, dim=-1))
        if mask_AHQG is None:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            probabilities = scores.float().softmax(dim=-1) * mask_AHQG
            out = probabilities.to(v.dtype) @ v
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class BatchFormer(nn.Module):
    """Mixes the features of the images of a group; the identity in evaluation.

    Args:
        dim: width C of the features; divisible by `num_heads`.
        group_size: images G that attend to each other; divides the global batch, and either divides the local batch or is
            a multiple of it.
        dropout: probability at the four places.
    """

    def __init__(self, dim: int, group_size: int, dropout: float = 0.5, num_heads: int = 4):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"BatchFormer needs a feature width divisible by {num_heads} heads; given {dim}")
        self.group_size, self.dropout = group_size, dropout
        self.collective = Collective()
        self.self_attn = BatchAttention(dim, num_heads)
        self.linear1 = nn.Linear(dim, dim)
        self.linear2 = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, features_VnC: torch.Tensor, key: DropoutKey) -> torch.Tensor:
        """[V, n, C] -> [V, n, C]; every view attends within itself."""
        if not self.training:
            return features_VnC
        views, n, _ = features_VnC.shape
        own, group, rows, columns = self._groups(features_VnC)
        drop = _Dropout(key if self.dropout else None, self.dropout, views, rows, columns, self.self_attn.num_heads)
        own = self.norm1(own + drop.features(self.self_attn(own, group, drop.attention()), AFTER_ATTENTION))
        hidden = drop.features(F.relu(self.linear1(own)), INSIDE_MLP)
        own = self.norm2(own + drop.features(self.linear2(hidden), AFTER_MLP))
        return own.reshape(views, n, -1)

    def _groups(self, features_VnC: torch.Tensor):
        """Own rows [V*A, Q, C], their groups [V*A, G, C], and the global positions of both, int32 [A, Q] and [A, G]."""
        _, n, dim = features_VnC.shape
        first = self.collective.rank * n
        positions = torch.arange(first, first + n, dtype=torch.int32, device=features_VnC.device)
        size = self.group_size
        if n % size == 0:
            own = features_VnC.reshape(-1, size, dim)
            return own, own, positions.view(-1, size), positions.view(-1, size)
        assert size % n == 0, (size, n)
        everyone = gather_with_gradient(features_VnC, self.collective)  # [W, V, n, C]
        start = first // size * (size // n)
        group = everyone[start : start + size // n].transpose(0, 1).reshape(-1, size, dim)
        group_positions = torch.arange(start * n, start * n + size, dtype=torch.int32, device=features_VnC.device)
        return features_VnC, group, positions.unsqueeze(0), group_positions.unsqueeze(0)


class _Dropout:
    """The masks of one forward pass; `key` None drops nothing."""

    def __init__(self, key: DropoutKey | None, probability: float, views: int, rows_AQ, columns_AG, num_heads: int):
        self.key, self.probability, self.views = key, probability, views
        self.rows_AQ, self.columns_AG, self.num_heads = rows_AQ, columns_AG, num_heads

    def attention(self) -> torch.Tensor | None:
        """[V*A, H, Q, G]: rows are (position, head), columns positions."""
        if self.key is None:
            return None
        heads = torch.arange(self.num_heads, dtype=torch.int32, device=self.rows_AQ.device)
        rows = self.rows_AQ.unsqueeze(1) * self.num_heads + heads.view(-1, 1)  # [A, H, Q]
        return self._mask(ATTENTION, rows, self.columns_AG.unsqueeze(1))

    def features(self, x_AQC: torch.Tensor, place: int) -> torch.Tensor:
        """Drops elements of [V*A, Q, C]: rows are positions, columns features."""
        if self.key is None:
            return x_AQC
        columns = torch.arange(x_AQC.shape[-1], dtype=torch.int32, device=x_AQC.device)
        return x_AQC * self._mask(place, self.rows_AQ, columns.expand(len(self.rows_AQ), -1)).to(x_AQC.dtype)

    def _mask(self, place: int, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        assert self.key is not None
        words = [self.key.word(view, place) for view in range(self.views)]
        masks = [keep_mask(word, rows, columns, self.probability) for word in words]
        return torch.cat(masks).float() / (1 - self.probability)
