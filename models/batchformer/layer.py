"""Defines the BatchFormer layer (Hou et al., CVPR 2022): one post-norm transformer encoder layer over the images of a batch.

The batch is the sequence: image i attends to the other images of its group. There is no positional encoding and no mask.
Parameter names are those of `torch.nn.TransformerEncoderLayer(C, 4, C, dropout)`, and so are the values at dropout 0.

Groups are runs of `group_size` images of the *global* batch, so the result does not depend on the number of ranks. A group
inside a rank is plain self-attention; where a group spans ranks, each rank computes the rows of its own images against the
gathered features of the whole group, and the gather's backward pass returns the gradients that other ranks found for them.

A kernel computes what lies between the linear layers: see `dispatch`.

Shapes: V views, n local images, G images of a group, Q rows computed here (G, or n where a group spans ranks), S sequences
(views x groups here), C features, H heads.
"""

from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from crossbatch.models.arguments import check_positive_integer
from crossbatch.models.batchformer import fused, reference, sdpa
from crossbatch.models.batchformer.dispatch import Situation, choose, explain
from crossbatch.models.batchformer.dropout import (
    AFTER_ATTENTION,
    AFTER_MLP,
    ATTENTION,
    INSIDE_MLP,
    NUM_PLACES,
    DropoutKey,
    Mask,
    random_seeds,
)
from crossbatch.models.collective import Collective, GroupCollective, gather_with_gradient

KERNELS: dict[str, ModuleType] = {"fused": fused, "sdpa": sdpa, "reference": reference}


class BatchAttention(nn.Module):
    """Let Q rows attend to the G images of their group; parameters as in `nn.MultiheadAttention`."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, own_SQC: Tensor, group_SGC: Tensor | None, kernel: ModuleType, mask: Mask) -> Tensor:
        """Return the attention's output, [S, Q, C]; without a group, rows attend to each other."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if group_SGC is None:
            q, k, v = self._heads(F.linear(own_SQC, weight, bias), 3)
        else:
            width = own_SQC.shape[-1]
            (q,) = self._heads(F.linear(own_SQC, weight[:width], bias[:width]), 1)
            k, v = self._heads(F.linear(group_SGC, weight[width:], bias[width:]), 2)
        return self.out_proj(kernel.attention(q, k, v, mask).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """Split [S, N, parts * C] into `parts` views [S, H, N, D]."""
        return x.unflatten(-1, (parts, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class MaskedRelu(nn.Linear):
    """Compute dropout(relu(x weight^T + bias)). A module, since ZeRO-3 gathers parameters where a forward is called."""

    def forward(self, input: Tensor, kernel: ModuleType, mask: Mask) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return kernel.bias_relu(F.linear(input, self.weight), self.bias, mask)


class AddNorm(nn.LayerNorm):
    """Compute LayerNorm(x + dropout(y))."""

    def forward(self, x: Tensor, y: Tensor, kernel: ModuleType, mask: Mask) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return kernel.add_norm(x, y, self.weight, self.bias, self.eps, mask)


class BatchFormer(nn.Module):
    """Mix the features of the images of a group by attention; in evaluation, return them unchanged.

    Features have the dtype of the parameters, fp32 or fp64; inside `torch.autocast` they may also be fp16 or bf16. The result
    is at least fp32.

    Args:
        width: number C of features, a multiple of `num_heads`.
        group_size: number G of consecutive images of the global batch that attend to each other. It must divide the local
            batch, or be a multiple of it that divides the global batch. All ranks must hold equally many images.
        num_heads: number of attention heads.
        dropout: dropout probability, in [0, 1), at the four places of an encoder layer.
        kernel: "fused", "sdpa" (only with dropout 0), "reference", or "auto", which takes the first of these that can run.
        process_group: ranks that hold the global batch; None means all ranks, or this process alone without
            torch.distributed.

    Raises:
        TypeError: if `width`, `group_size` or `num_heads` is not an integer.
        ValueError: for arguments that do not fit together, or a kernel that cannot run.
    """

    def __init__(
        self,
        width: int,
        group_size: int,
        num_heads: int = 4,
        dropout: float = 0.5,
        *,
        kernel: str = "auto",
        process_group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        for name, value in (("width", width), ("group_size", group_size), ("num_heads", num_heads)):
            check_positive_integer(name, value)
        if width % num_heads:
            raise ValueError(f"width is {width}, but it must be a multiple of num_heads (={num_heads})")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout:g}; it must be at least 0 and less than 1")
        choose(kernel, Situation("cpu", dropout=dropout))
        self.width, self.group_size, self.dropout, self.kernel = width, group_size, dropout, kernel
        self.collective: Collective = GroupCollective(process_group)
        self.self_attn = BatchAttention(width, num_heads)
        self.linear1 = MaskedRelu(width, width)
        self.linear2 = nn.Linear(width, width)
        self.norm1 = AddNorm(width)
        self.norm2 = AddNorm(width)

    def kernel_on(self, device: torch.device | str) -> tuple[str, str]:
        """Return the kernel that computes on `device`, and why."""
        return explain(self.kernel, Situation.on(torch.device(device), self.dropout))

    def forward(
        self, features: Tensor, seed: int | None = None, step: int | None = None, *, dropout_seeds: Tensor | None = None
    ) -> Tensor:
        """Mix features [n, C], or [V, n, C] with each view within itself; the result has the same shape.

        Args:
            features: the features of this rank's n images, in V views where there are three dimensions.
            seed: seed of the dropout masks. A mask depends on seed, step, view and position in the global batch, so it is the
                same with any number of ranks. Without seed and step, masks come from torch's generator.
            step: number of the training step; give both `seed` and `step`, or neither.
            dropout_seeds: a tensor in place of seed and step, int32 [NUM_PLACES, V], as `DropoutKey.dropout_seeds` makes it;
                for CUDA graphs and torch.compile.

        Raises:
            ValueError: if features have another shape. In training also if there are no images, if `group_size` fits neither
                the local nor the global batch, or if the seeds contradict each other.
        """
        is_empty = self.training and 0 in features.shape
        if features.dim() not in (2, 3) or features.shape[-1] != self.width or is_empty:
            raise ValueError(
                f"features are {list(features.shape)}; they must be [n, {self.width}] or [V, n, {self.width}], n >= 1"
            )
        if not self.training:
            return features
        features_VnC = features if features.dim() == 3 else features.unsqueeze(0)
        seeds = _seeds(features_VnC, seed, step, dropout_seeds)
        kernel = KERNELS[choose(self.kernel, Situation.on(features.device, self.dropout))]
        own, group, first_row, first_column = self._groups(features_VnC)
        own = self.mix(own, group, kernel, seeds, first_row, first_column)
        return own.reshape(features.shape)

    def mix(
        self, own: Tensor, group: Tensor | None, kernel: ModuleType, seeds: Tensor, first_row: int, first_column: int
    ) -> Tensor:
        """Compute the layer, [S, Q, C], without messages to other ranks; `models.moco` may have it compiled."""

        def mask(place: int) -> Mask:
            return Mask(seeds[place], self.dropout, first_row, first_column)

        own = self.norm1(own, self.self_attn(own, group, kernel, mask(ATTENTION)), kernel, mask(AFTER_ATTENTION))
        hidden = self.linear1(own, kernel, mask(INSIDE_MLP))
        return self.norm2(own, self.linear2(hidden), kernel, mask(AFTER_MLP))

    def _groups(self, features_VnC: Tensor) -> tuple[Tensor, Tensor | None, int, int]:
        """Return own rows [S, Q, C], their groups [S, G, C] and the global positions of the first image of each.

        Instead of groups that are the rows themselves, return None.
        """
        n, size, ranks = features_VnC.shape[1], self.group_size, self.collective.world_size
        first = self.collective.rank * n
        if n % size == 0:
            own = features_VnC.reshape(-1, size, self.width)
            return own, None, first, first
        if size % n or n * ranks % size:
            raise ValueError(
                f"group_size is {size}, but there are {n} images on each of {ranks} rank(s); it must divide {n}, or be a "
                f"multiple of {n} that divides {n * ranks}"
            )
        everyone = gather_with_gradient(features_VnC, self.collective)  # [W, V, n, C]
        start = first // size * (size // n)
        group = everyone[start : start + size // n].transpose(0, 1).reshape(-1, size, self.width)
        return features_VnC, group, first, start * n

    def extra_repr(self) -> str:
        return f"{self.width}, group_size={self.group_size}, dropout={self.dropout:g}, kernel={self.kernel}"


def _seeds(features_VnC: Tensor, seed: int | None, step: int | None, given: Tensor | None) -> Tensor:
    """Return the seeds of the masks, int32 [NUM_PLACES, V], from whichever was given."""
    views, device = len(features_VnC), features_VnC.device
    if (seed is None) != (step is None):
        raise ValueError(f"seed is {seed} and step is {step}; give both or neither")
    if given is not None:
        if seed is not None:
            raise ValueError(f"dropout_seeds is given together with seed (={seed}); give only one of them")
        if given.shape != (NUM_PLACES, views) or given.dtype != torch.int32:
            raise ValueError(
                f"dropout_seeds are {given.dtype} {list(given.shape)}; they must be int32 [{NUM_PLACES}, {views}]"
            )
        return given
    if seed is None or step is None:
        return random_seeds(views, device)
    return DropoutKey(seed, step).dropout_seeds(views, device)
