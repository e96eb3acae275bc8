"""Defines vision transformers as MoCo v3 trains them: timm's, with fixed positions, other initial weights and another stem.

MoCo v3 (Chen, Xie, He 2021, sections 4 to 6, and their release) differs from timm in:

- **12 heads at width 384** in ViT-S, where DeiT and timm have 6. The shapes are the same, so a mistake loads silently.
- **Positions** are a fixed 2-D sine-cosine table, stored as the frozen parameter `pos_embed` so that files stay
  compatible. With omega_j = 10000^(-j / (C/4)), the token in row r and column c is
  [sin(r omega), cos(r omega), sin(c omega), cos(c omega)]; the class token's position is zero. (MoCo v3's release gives
  the same table on square grids and a wrong one on others.)
- **Initialisation**: Xavier-uniform everywhere, where query, key and value count as three matrices, not one.
- **Stability**: the gradient of the patch projection spikes first, so it is left at its random start
  (`stop_grad_conv1`). The `vit_conv_*` archs replace it by a stack of convolutions (Xiao et al. 2021) in exchange for
  one block; those need no freezing.

Shapes: n = images, C = embed_dim.
"""

import math
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from crossbatch.models.arguments import check_choice
from crossbatch.models.backbones import Layout
from crossbatch.models.norm import ViewBatchNorm

CHECKPOINTS = ("none", "blocks")  # a ViT's blocks have no batch norms


class ConvStem(nn.Module):
    """Turn [n, in_channels, H, W] into [n, H/16 * W/16, C]: four 3x3 convolutions of stride 2 with norm and ReLU, then a 1x1.

    Convolutions keep torch's default initialisation, as in MoCo v3's release.
    """

    def __init__(self, embed_dim: int, in_channels: int = 3):
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (embed_dim // 8, embed_dim // 4, embed_dim // 2, embed_dim):
            layers += [
                nn.Conv2d(in_channels, channels, kernel_size=3, stride=2, padding=1, bias=False),
                ViewBatchNorm(channels),
                nn.ReLU(inplace=True),
            ]
            in_channels = channels
        layers.append(nn.Conv2d(embed_dim, embed_dim, kernel_size=1))
        self.proj = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        x = image
        for layer in self.proj:
            if isinstance(layer, ViewBatchNorm):
                x = layer(x, relu=True)
            elif not isinstance(layer, nn.ReLU):  # that stands there for the keys of state dicts
                x = layer(x)
        return x.flatten(2).transpose(1, 2)


class ViT(VisionTransformer):
    """Turn [n, in_channels, H, W] into [n, C], the class token after the final norm. State-dict keys are timm's, without head.

    Args:
        layout: sizes; `backbones.LAYOUTS` has the published ones.
        image_size: side in pixels, or (height, width); multiples of the patch size.
        stop_grad_conv1: freeze the patch projection at its random start.
        in_channels: channels of the images.

    Raises:
        ValueError: if `stop_grad_conv1` is true for a conv stem.
    """

    def __init__(
        self,
        layout: Layout,
        image_size: int | tuple[int, int] = 224,
        stop_grad_conv1: bool = False,
        in_channels: int = 3,
    ):
        if layout.conv_stem and stop_grad_conv1:
            raise ValueError(
                "stop_grad_conv1 is true, but a conv stem is never frozen: it trains stably as it is; set it to false, or "
                "take vit_small or vit_base"
            )
        super().__init__(
            img_size=image_size,
            in_chans=in_channels,
            patch_size=layout.patch_size,
            embed_dim=layout.embed_dim,
            depth=layout.depth,
            num_heads=layout.num_heads,
            mlp_ratio=layout.mlp_ratio,
            num_classes=0,
            global_pool="token",
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            weight_init="skip",
        )
        self.in_channels = in_channels
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.grid = height // layout.patch_size, width // layout.patch_size
        if layout.conv_stem:
            self.patch_embed = ConvStem(layout.embed_dim, in_channels)
        self._initialise()
        if stop_grad_conv1:
            self.patch_embed.requires_grad_(False)

    def checkpoint_activations(self, what: str) -> None:
        """If `what` is "blocks", keep only their inputs for the backward pass from now on; it runs each block once more."""
        check_choice("checkpoint_activations", what, CHECKPOINTS)
        self.set_grad_checkpointing(what == "blocks")

    @torch.no_grad()
    def _initialise(self) -> None:
        """Draw the initial weights in the order of MoCo v3's release; LayerNorms keep 1 and 0."""
        assert isinstance(self.cls_token, nn.Parameter) and isinstance(self.pos_embed, nn.Parameter)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # Xavier's bound is sqrt(6 / (fan in + fan out)); qkv is [3C, C], three matrices of fan out C.
                rows, columns = module.weight.shape
                bound = math.sqrt(6 / (columns + (rows // 3 if name.endswith("qkv") else rows)))
                module.weight.uniform_(-bound, bound)
                if module.bias is not None:
                    module.bias.zero_()
        self.cls_token.normal_(std=1e-6)
        if not isinstance(self.patch_embed, ConvStem):
            projection = self.patch_embed.proj
            bound = math.sqrt(6 / (projection.weight[0].numel() + self.embed_dim))
            projection.weight.uniform_(-bound, bound)
            projection.bias.zero_()
        self.pos_embed.copy_(sincos_positions(*self.grid, self.embed_dim))
        self.pos_embed.requires_grad_(False)


def sincos_positions(num_rows: int, num_columns: int, embed_dim: int) -> Tensor:
    """Return the position table [1, 1 + num_rows * num_columns, C], fp32; the class token first, the patches row by row."""
    quarter = embed_dim // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    row_angles = torch.outer(torch.arange(num_rows, dtype=torch.float64), omega)
    column_angles = torch.outer(torch.arange(num_columns, dtype=torch.float64), omega)
    by_row = torch.cat((row_angles.sin(), row_angles.cos()), 1).repeat_interleave(num_columns, 0)
    by_column = torch.cat((column_angles.sin(), column_angles.cos()), 1).repeat(num_rows, 1)
    patches = torch.cat((by_row, by_column), 1)
    return torch.cat((torch.zeros_like(patches[:1]), patches)).float().unsqueeze(0)
