"""MoCo v3 (Chen, Xie, He 2021) with BatchFormer between the backbone and the heads.

    views ──> online backbone ──> features ─┬─ o ─┬─> projector ──> predictor ──> queries ─┐
                                 BatchFormer └─ b ─┘                                        ├─> loss
    views ──> momentum backbone ─> features ─┬─ o ─┬─> projector (no gradient) ──> keys ────┘
                                 BatchFormer └─ b ─┘

The cut of the step runs through "features": everything left of it sees an image at a time and may be computed in chunks;
everything right of it sees the whole batch and is computed once (`contrast`).

Both views travel in one tensor, view-major, so every batch norm needs one collective for both and still keeps separate
statistics per view. With BatchFormer the heads' norms take their statistics over both streams of a view.

Shapes: V views, n local images, S streams (o and b), C backbone features, D width of queries and keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from crossbatch.models.backbones import Backbone, build_backbone, family
from crossbatch.models.batchformer import BatchFormer, DropoutKey
from crossbatch.models.collective import Collective
from crossbatch.models.cuda_graph import captured
from crossbatch.models.heads import build_predictor, build_projector
from crossbatch.models.loss import contrastive_loss, uses_batchformer
from crossbatch.models.norm import synchronize_norms
from crossbatch.models.shardable import ShardableModel, backbone_units

NUM_VIEWS = 2


@dataclass
class MoCoOutput:
    """What one step yields besides gradients; every tensor but `loss` is a detached scalar of the local rows."""

    loss: torch.Tensor
    terms: dict[str, torch.Tensor] = field(default_factory=dict)
    signals: dict[str, torch.Tensor] = field(default_factory=dict)


class Encoder(nn.Module):
    """Backbone and projector; `batchformer` only where the momentum encoder keeps its own copy."""

    def __init__(self, backbone: Backbone, projector: nn.Module, batchformer: BatchFormer | None = None):
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.batchformer = batchformer


class Heads(nn.Module):
    """Backbone features [V*n, C] of one encoder -> queries or keys [V*S*n, D]: BatchFormer, projector and predictor.

    From tensors to a tensor, so that it can be captured (`crossbatch.models.cuda_graph`). Parameters belong to `MoCo`.
    """

    def __init__(self, batchformer: BatchFormer | None, heads: Sequence[nn.Module], with_grad: bool):
        super().__init__()
        self.batchformer, self.heads, self.with_grad = batchformer, nn.Sequential(*heads), with_grad

    def forward(self, features_NC: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """`words` as in `DropoutKey.words`. With BatchFormer, a view's original features come before the mixed ones."""
        with torch.set_grad_enabled(self.with_grad and torch.is_grad_enabled()):
            if self.batchformer is not None:
                features_VnC = features_NC.unflatten(0, (NUM_VIEWS, -1)).float()
                mixed_VnC = self.batchformer(features_VnC, words)
                features_NC = torch.cat((features_VnC, mixed_VnC), dim=1).flatten(0, 1)
            return self.heads(features_NC)


class MoCo(ShardableModel):
    """Online encoder, momentum encoder, predictor and BatchFormer, on one device.

    Args:
        arch, image_size, stem, stop_grad_conv1, backbone_args: see `build_backbone`.
        checkpoint_activations: of the blocks of the online backbone: less memory for a third more time.
        dim, mlp_dim: widths of the heads.
        temperature, add_bf: see `crossbatch.models.loss`.
        group_size, dropout: see `BatchFormer`.
        batchformer_mode: "trained": one module for both encoders, trained through the queries. "released": the same module,
            frozen at its initialisation, as the released BatchFormer code behaves. "ema": the keys use a moving average.
        batchformer_kernel: see `crossbatch.models.batchformer.dispatch`.
        cuda_graph: what follows the backbone runs as a CUDA graph; see `crossbatch.models.cuda_graph`.
    """

    def __init__(
        self,
        arch: str = "resnet50",
        *,
        image_size: int = 224,
        stem: str = "imagenet",
        stop_grad_conv1: bool = False,
        backbone_args: dict | None = None,
        checkpoint_activations: bool = False,
        dim: int = 256,
        mlp_dim: int = 4096,
        temperature: float = 1.0,
        add_bf: int = 0,
        group_size: int = 256,
        dropout: float = 0.5,
        batchformer_mode: str = "trained",
        batchformer_kernel: str = "auto",
        cuda_graph: bool = False,
    ):
        super().__init__()
        self.add_bf, self.temperature = add_bf, temperature
        self.collective = Collective()

        def encoder() -> Encoder:
            backbone = build_backbone(arch, image_size, stem, stop_grad_conv1, backbone_args)
            return Encoder(backbone, build_projector(family(arch), backbone.num_features, mlp_dim, dim))

        self.online, self.momentum = encoder(), encoder()
        if checkpoint_activations:
            self.online.backbone.checkpoint_activations()
        self.predictor = build_predictor(family(arch), mlp_dim, dim)
        self.batchformer = None
        if uses_batchformer(add_bf):
            width = self.online.backbone.num_features
            self.batchformer = BatchFormer(width, group_size, dropout, kernel=batchformer_kernel)
            self.batchformer.requires_grad_(batchformer_mode != "released")
            if batchformer_mode == "ema":
                self.momentum.batchformer = BatchFormer(width, group_size, dropout, kernel=batchformer_kernel)
        self.momentum.requires_grad_(False)
        self.copy_to_momentum()
        key_batchformer = self.momentum.batchformer or self.batchformer
        # In a tuple, or their parameters would be registered twice.
        self._heads = (
            Heads(self.batchformer, (self.online.projector, self.predictor), with_grad=True),
            Heads(key_batchformer, (self.momentum.projector,), with_grad=False),
        )
        self.cuda_graph, self._graphs = cuda_graph, None

    def momentum_pairs(self) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
        online = dict(self.online.named_parameters())
        if self.batchformer is not None:
            online |= {f"batchformer.{name}": p for name, p in self.batchformer.named_parameters()}
        return [(name, online[name], average) for name, average in self.momentum.named_parameters()]

    @torch.no_grad()
    def copy_to_momentum(self) -> None:
        """Starts the momentum encoder at the online parameters."""
        for _, online, average in self.momentum_pairs():
            average.copy_(online)

    def set_collective(self, collective: Collective) -> None:
        """Joins the ranks: norms, keys and groups that span ranks."""
        self.collective = collective
        synchronize_norms(self, collective)
        for module in self.modules():
            if isinstance(module, BatchFormer):
                module.collective = collective

    @property
    def chunked_module(self) -> nn.Module:
        return self.online.backbone

    def fsdp_units(self) -> list[nn.Module]:
        units: list[nn.Module] = []
        for encoder in (self.online, self.momentum):
            units += [*backbone_units(encoder.backbone), encoder.projector]
        parts = (self.predictor, self.batchformer, self.momentum.batchformer)
        return units + [part for part in parts if part is not None]

    def loss(self, images: torch.Tensor, step: int, seed: int) -> MoCoOutput:
        """Both views [V*n, 3, H, W] of the whole local batch -> the loss."""
        return self.contrast(*self.features(images, with_grad=True), step, seed)

    def features(self, images: torch.Tensor, with_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Both views [V*m, 3, H, W] of a chunk -> features [V*m, C] of the online and of the momentum backbone."""
        with self.span("online features"), torch.set_grad_enabled(with_grad):
            online = self.embed(images)
        with self.span("momentum features"), torch.no_grad():
            return online, self.momentum.backbone(images)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images [m, 3, H, W] -> features [m, C] of the online backbone."""
        return self.online.backbone(images)

    def contrast(self, online_NC: torch.Tensor, momentum_NC: torch.Tensor, step: int, seed: int) -> MoCoOutput:
        """The batch-wide part: backbone features [V*n, C] of both encoders -> the loss."""
        with self.span("batch-wide part"):
            return self._contrast(online_NC, momentum_NC, step, seed)

    def _contrast(self, online_NC: torch.Tensor, momentum_NC: torch.Tensor, step: int, seed: int) -> MoCoOutput:
        words = [DropoutKey(seed, step, stream).words(NUM_VIEWS, online_NC.device) for stream in (0, 1)]
        if self.cuda_graph and self._graphs is None:
            self._graphs = captured(self._heads, (online_NC, momentum_NC), words)
        to_queries, to_keys = self._graphs or self._heads
        queries, keys = to_queries(online_NC, words[0]), to_keys(momentum_NC, words[1])
        loss, terms, signals = contrastive_loss(
            self._unstack(queries, online_NC),
            self._unstack(keys, momentum_NC),
            self.add_bf,
            self.temperature,
            self.collective,
        )
        signals["feature_std"] = feature_std(online_NC.detach())
        return MoCoOutput(loss, terms, signals)

    def _unstack(self, rows: torch.Tensor, features_NC: torch.Tensor) -> torch.Tensor:
        """[V*S*n, D] -> [V, S, n, D]."""
        return rows.unflatten(0, (NUM_VIEWS, len(rows) // len(features_NC), -1))


def feature_std(features_NC: torch.Tensor) -> torch.Tensor:
    """How far the directions of the features spread: 0 when all are equal (collapse), 1 when they fill all dimensions.

    sqrt(C) times the standard deviation over the rows of the unit-length features, averaged over dimensions (SimSiam, Chen
    and He 2021, figure 2).
    """
    unit = F.normalize(features_NC.float(), dim=-1)
    return unit.std(0, correction=0).mean() * features_NC.shape[1] ** 0.5
