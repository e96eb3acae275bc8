"""Defines MoCo v3 (Chen, Xie, He 2021) with BatchFormer between the backbone and the heads.

    views ──> online backbone ──> features ─┬─ o ─┬─> projector ──> predictor ──> queries ─┐
                                 BatchFormer └─ b ─┘                                        ├─> loss
    views ──> momentum backbone ─> features ─┬─ o ─┬─> projector (no gradient) ──> keys ────┘
                                 BatchFormer └─ b ─┘

The step is cut at "features": everything to its left sees one image at a time and may be computed in chunks; everything to its
right sees the whole batch and is computed once (`contrast`).

Both views travel in one tensor, view-major, so every batch norm needs one collective for both and still keeps separate
statistics per view. With BatchFormer the heads' norms take their statistics over both streams of a view. Where norms talk to
other ranks, the two encoders run in lockstep and share those collectives, too (`crossbatch.models.lockstep`).

Shapes: V views, n local images, S streams (o and b), C backbone features, D width of queries and keys.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from crossbatch.models.arguments import check_choice, check_positive_integer, list_allowed
from crossbatch.models.backbones import Backbone, blocks, build_backbone, family
from crossbatch.models.batchformer import BatchFormer, DropoutKey
from crossbatch.models.collective import Collective, GroupCollective
from crossbatch.models.compiled import check_compiler, compile_method
from crossbatch.models.cuda_graph import capture
from crossbatch.models.heads import FAMILIES, build_predictor, build_projector
from crossbatch.models.lockstep import LockstepCollective, in_lockstep
from crossbatch.models.loss import LOSSES, BatchFormerLoss, loss_of_streams
from crossbatch.models.norm import ViewBatchNorm, convert_norms, synchronize_norms
from crossbatch.models.shardable import ShardableModel, backbone_units

NUM_VIEWS = 2
MODES = ("trained", "released", "ema")


@dataclass
class MoCoOutput:
    """Hold what one step computed from this rank's images. All tensors are fp32 scalars, detached except for `loss`.

    Attributes:
        loss: the loss, with its graph. The mean over the ranks is the loss of the global batch.
        terms: every term before it is divided, by name: "q1o_k2b" are the queries of view 1 before BatchFormer ("o") against
            the keys of view 2 after it ("b"); with `batchformer_loss="joint"` "q1_k2" and "q2_k1".
        signals: signs of a collapse: "feature_std" (see `feature_std`), and the mean cosines of queries with keys of the same
            image ("positive_similarity") and of other images ("negative_similarity").
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    signals: dict[str, Tensor] = field(default_factory=dict)


class Encoder(nn.Module):
    """Hold a backbone and its projector, and a BatchFormer where the momentum encoder keeps its own copy."""

    def __init__(self, backbone: Backbone, num_features: int, projector: nn.Module):
        super().__init__()
        self.backbone, self.num_features, self.projector = backbone, num_features, projector
        self.batchformer: BatchFormer | None = None


class Heads(nn.Module):
    """Turn backbone features [V*n, C] of one encoder into queries or keys [V*S*n, D].

    It is one module from tensors to a tensor so that it can be captured (`crossbatch.models.cuda_graph`). Parameters belong to
    `MoCo`.
    """

    def __init__(self, batchformer: BatchFormer | None, heads: Sequence[nn.Module], with_grad: bool):
        super().__init__()
        self.batchformer, self.heads, self.with_grad = batchformer, nn.Sequential(*heads), with_grad

    def forward(self, features_NC: Tensor, dropout_seeds: Tensor) -> Tensor:
        """Return queries or keys. With BatchFormer, a view's original features come before the mixed ones."""
        with torch.set_grad_enabled(self.with_grad and torch.is_grad_enabled()):
            if self.batchformer is not None:
                features_VnC = features_NC.unflatten(0, (NUM_VIEWS, -1)).float()
                mixed_VnC = self.batchformer(features_VnC, dropout_seeds=dropout_seeds)
                features_NC = torch.cat((features_VnC, mixed_VnC), dim=1).flatten(0, 1)
            return self.heads(features_NC)


class MoCo(ShardableModel):
    """Wrap a backbone for MoCo v3 pretraining: add projector, predictor, momentum encoder and, if asked, BatchFormer.

    In a training loop: `out = moco.loss(images, step, seed)`, `out.loss.backward()`, an optimizer step over the parameters
    that require a gradient, then `moco.update_momentum(0.99)`. In DDP call `ddp("loss", images, step, seed)` instead.

    Args:
        backbone: a name (see `build_backbone`), or a module that turns [n, 3, H, W] into a tensor [n, num_features]. A module
            is changed in place: its batch norms are replaced (`convert_norms`). The momentum encoder is a copy of it.
        num_features: number of features that a module returns; by default its attribute `num_features`.
        heads: "resnet" or "vit", the kind of projector and predictor (see `crossbatch.models.heads`); by default the
            kind that belongs to the name, and "resnet" for a module.
        checkpoint_activations: what the backward pass of the online backbone computes again, to keep less memory: "none";
            "norms", of a ResNet: the outputs of the ReLUs inside blocks, a fifth less for little time; "blocks": everything but
            the inputs of blocks, for a third more time.
        projection_dim: width D of queries and keys.
        mlp_dim: hidden width of projector and predictor.
        temperature: T of the loss.
        batchformer_loss: "none" (no BatchFormer), "sum", "mean", "mean_with_self" or "joint"; see `crossbatch.models.loss`.
        group_size: number of images of the global batch that attend to each other; see `BatchFormer`.
        dropout: dropout probability in BatchFormer.
        batchformer_kernel: the argument `kernel` of `BatchFormer`.
        batchformer_mode: "trained": one module for both encoders, trained through the queries. "released": the same module,
            frozen at its initialisation, as the released BatchFormer code behaves. "ema": the keys use a moving average.
        cuda_graph: run what follows the backbone as a CUDA graph; see `crossbatch.models.cuda_graph`. It takes one backward
            pass a step, with `zero_grad()` after it, and no other thread that allocates on the GPU during the first step.
        process_group: the ranks that hold the global batch; None means all ranks, or this process alone without
            torch.distributed.
        backbone_options: image_size, stem, stop_grad_conv1, backbone_args and in_channels, passed on to `build_backbone`; only
            for a name.

    Raises:
        TypeError: for an unknown keyword argument, or if `num_features` is not an integer.
        ValueError: for values that are not allowed or cannot be combined; the message begins with the argument.
    """

    parts = ("loss", "features", "embed", "contrast")

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        *,
        num_features: int | None = None,
        heads: str | None = None,
        checkpoint_activations: str = "none",
        projection_dim: int = 256,
        mlp_dim: int = 4096,
        temperature: float = 1.0,
        batchformer_loss: BatchFormerLoss = "none",
        group_size: int = 256,
        dropout: float = 0.5,
        batchformer_mode: str = "trained",
        batchformer_kernel: str = "auto",
        cuda_graph: bool = False,
        process_group: dist.ProcessGroup | None = None,
        **backbone_options: Any,
    ):
        super().__init__()
        known = [*inspect.signature(MoCo).parameters][:-1] + [*inspect.signature(build_backbone).parameters][1:]
        for name in backbone_options:
            if name not in known:
                raise TypeError(f"{name} is not an argument of MoCo; {list_allowed(name, known)}")
        check_choice("batchformer_loss", batchformer_loss, LOSSES)
        check_choice("batchformer_mode", batchformer_mode, MODES)
        if isinstance(backbone, str):
            if num_features is not None:
                raise ValueError(f"num_features is {num_features}, but {backbone} has its own; leave it out")
            heads = heads or family(backbone)
        else:
            if backbone_options:
                name = next(iter(backbone_options))
                raise ValueError(f"{name} is given with a module, but only a named backbone takes it; leave it out")
            backbone, heads = convert_norms(backbone, NUM_VIEWS), heads or "resnet"
        check_choice("heads", heads, FAMILIES)
        self.batchformer_loss: BatchFormerLoss = batchformer_loss
        self.temperature = temperature

        def encoder(given: str | nn.Module) -> Encoder:
            network = build_backbone(given, **backbone_options) if isinstance(given, str) else given
            width: Any = getattr(network, "num_features", None) if num_features is None else num_features
            if width is None:
                raise ValueError(
                    f"num_features is not given, and {type(network).__name__} has no attribute num_features; give it"
                )
            check_positive_integer("num_features", width)
            projector = build_projector(heads, width, mlp_dim, projection_dim)
            return Encoder(network, width, projector)  # pyright: ignore[reportArgumentType] (any module will do)

        self.online = encoder(backbone)
        self.momentum = encoder(backbone if isinstance(backbone, str) else copy.deepcopy(backbone))
        if checkpoint_activations != "none":
            if not hasattr(self.online.backbone, "checkpoint_activations"):
                raise ValueError(
                    f"checkpoint_activations is {checkpoint_activations!r}, but the backbone has no method "
                    f"checkpoint_activations; set it to 'none'"
                )
            self.online.backbone.checkpoint_activations(checkpoint_activations)
        self.predictor = build_predictor(heads, mlp_dim, projection_dim)
        self.batchformer = None
        if batchformer_loss != "none":

            def mix() -> BatchFormer:
                return BatchFormer(self.online.num_features, group_size, dropout=dropout, kernel=batchformer_kernel)

            self.batchformer = mix().requires_grad_(batchformer_mode != "released")
            if batchformer_mode == "ema":
                self.momentum.batchformer = mix()
        self.momentum.requires_grad_(False)
        with torch.no_grad():
            for _, online, average in self.momentum_pairs():
                average.copy_(online)
        key_batchformer = self.momentum.batchformer or self.batchformer
        # In a tuple, or their parameters would be registered twice.
        self._heads = (
            Heads(self.batchformer, (self.online.projector, self.predictor), with_grad=True),
            Heads(key_batchformer, (self.momentum.projector,), with_grad=False),
        )
        self.cuda_graph, self._graphs = cuda_graph, None
        # Whether lockstep gains something and changes nothing. Somebody's module may draw random numbers: its first pass tells.
        has_norms = any(isinstance(module, ViewBatchNorm) for module in self.online.backbone.modules())
        self._can_interleave = has_norms if isinstance(backbone, str) or not has_norms else None
        self.set_collective(GroupCollective(process_group))

    def momentum_pairs(self) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
        online = dict(self.online.named_parameters())
        if self.batchformer is not None:
            online |= {f"batchformer.{name}": p for name, p in self.batchformer.named_parameters()}
        return [(name, online[name], average) for name, average in self.momentum.named_parameters()]

    @torch.no_grad()
    def update_momentum(self, m: float) -> None:
        """Set each momentum parameter to m * itself + (1 - m) * the online one, after the optimizer's step.

        Parameters must be whole on this rank, as in plain torch and DDP. Running statistics of norms need no update: the
        momentum encoder's norms see the same images.

        Raises:
            ValueError: if `m` is not in [0, 1], or if parameters are sharded (ZeRO-3).
        """
        if not 0 <= m <= 1:
            raise ValueError(f"m is {m}; allowed: 0 to 1")
        pairs = [(online, average) for _, online, average in self.momentum_pairs() if online.requires_grad]
        if any(p.numel() == 0 for pair in pairs for p in pair):
            raise ValueError(
                "parameters are sharded (ZeRO-3), so this rank cannot average them; gather them around this call"
            )
        torch._foreach_lerp_([average for _, average in pairs], [online for online, _ in pairs], weight=1 - m)

    @torch.no_grad()
    def average_running_stats(self) -> None:
        """Average the norms' running statistics over all ranks, where groups of ranks have statistics of their own.

        Evaluation and checkpoints then are the same on every rank. `norms` of `set_collective` says which ranks form a group.
        """
        if self.norm_collective.world_size == self.collective.world_size:
            return
        stats = [buffer for name, buffer in self.named_buffers() if name.endswith(("running_mean", "running_var"))]
        mean = self.collective.all_reduce(torch.cat(stats)) / self.collective.world_size
        torch._foreach_copy_(stats, mean.split([len(buffer) for buffer in stats]))

    def set_collective(self, collective: Collective, norms: Collective | None = None) -> None:
        """Let keys and groups that span ranks use `collective` from now on.

        Args:
            collective: the ranks that hold the global batch.
            norms: the ranks that share the statistics of norms; None means those of `collective`. If there are fewer, call
                `average_running_stats` before an evaluation or a checkpoint.
        """
        self.collective, self.norm_collective = collective, collective if norms is None else norms
        # Not the BatchFormer: both encoders share it, so one would be inside it when the other enters.
        synchronize_norms(self, LockstepCollective(self.norm_collective))
        for module in self.modules():
            if isinstance(module, BatchFormer):
                module.collective = collective

    def compile_regions(self) -> None:
        """Let torch.compile take the blocks of ViTs, the heads' linear layers and BatchFormer, each by itself.

        Parameters and state dicts stay as they are, and evaluation is not compiled. Nor are a ResNet's blocks, because their
        norms talk to other ranks, nor with `cuda_graph` what follows the backbone. Call it before the model is sharded.

        Raises:
            ValueError: if there is nothing to compile, or torch.compile finds no compiler for the device of the parameters.
        """
        backbones = (self.online.backbone, self.momentum.backbone)
        methods = [
            (block, "forward")
            for backbone in backbones
            for block in blocks(backbone)
            if not any(isinstance(module, _BatchNorm) for module in block.modules())
        ]
        if not self.cuda_graph:
            heads = (self.online.projector, self.momentum.projector, self.predictor)
            methods += [(m, "forward") for head in heads for m in head.modules() if isinstance(m, nn.Linear)]
            methods += [(m, "mix") for m in (self.batchformer, self.momentum.batchformer) if m is not None]
        if not methods:
            raise ValueError(
                "compile is true, but with cuda_graph only the blocks of a ViT could be compiled; set one of them to false"
            )
        check_compiler(next(self.parameters()).device)
        for module, name in methods:
            compile_method(module, name)

    @property
    def awaits_capture(self) -> bool:
        """Return whether the next loss is computed while its CUDA graph is captured."""
        return self.cuda_graph and self._graphs is None

    @property
    def chunked_module(self) -> nn.Module:
        return self.online.backbone

    def fsdp_units(self) -> list[nn.Module]:
        online, momentum = self.online, self.momentum
        units = [*backbone_units(online.backbone), self.batchformer, online.projector, self.predictor]
        units += [*backbone_units(momentum.backbone), momentum.batchformer, momentum.projector]
        return [unit for unit in units if unit is not None]

    def loss(self, images: Tensor, step: int, seed: int) -> MoCoOutput:
        """Compute the loss of this rank's images against the keys of all ranks.

        Args:
            images: normalised images [2n, 3, H, W] in the dtype of the parameters (fp32): the first views of all n images, then
                their second views.
            step: number of the training step; BatchFormer's dropout masks depend on `step` and `seed` alone.
            seed: seed of the dropout masks.

        Returns:
            The loss with its graph, its terms and the signs of a collapse, all scalars; see `MoCoOutput`.

        Raises:
            ValueError: if `images` has another shape, or if the backbone returns anything but a tensor [2n, num_features].
        """
        if images.dim() != 4 or not len(images) or len(images) % NUM_VIEWS:
            raise ValueError(
                f"images are {list(images.shape)}; they must be [2n, 3, H, W], both views of n >= 1 images"
            )
        return self.contrast(*self.features(images, with_grad=True), step, seed)

    def features(self, images: Tensor, with_grad: bool) -> tuple[Tensor, Tensor]:
        """Turn both views [V*m, 3, H, W] of a chunk into features [V*m, C] of the online and of the momentum backbone."""
        if self.norm_collective.world_size > 1 and self._can_interleave:
            with self.span("online and momentum features"), torch.set_grad_enabled(with_grad):
                return in_lockstep(lambda: self.embed(images), lambda: self.momentum.backbone(images))
        is_first = self._can_interleave is None and self.training
        before = _random_states(images.device) if is_first else []
        with self.span("online features"), torch.set_grad_enabled(with_grad):
            online = self.embed(images)
        with self.span("momentum features"), torch.no_grad():
            momentum = self.momentum.backbone(images)
        if is_first:
            self._can_interleave = all(map(torch.equal, before, _random_states(images.device)))
        return online, momentum

    def embed(self, images: Tensor) -> Tensor:
        """Turn images [m, 3, H, W] into features [m, C] of the online backbone."""
        features, want = self.online.backbone(images), [len(images), self.online.num_features]
        if not isinstance(features, Tensor) or list(features.shape) != want:
            given = list(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
            raise ValueError(
                f"backbone returned {given} for {want[0]} images; it must return [n, num_features] = {want}"
            )
        return features

    def contrast(self, online_NC: Tensor, momentum_NC: Tensor, step: int, seed: int) -> MoCoOutput:
        """Compute the batch-wide part: backbone features [V*n, C] of both encoders -> the loss."""
        with self.span("batch-wide part"):
            seeds = [DropoutKey(seed, step, stream).dropout_seeds(NUM_VIEWS, online_NC.device) for stream in (0, 1)]
            if self.awaits_capture:
                self._graphs = capture(self._heads, ((online_NC, seeds[0]), (momentum_NC, seeds[1])))
            to_queries, to_keys = self._graphs or self._heads
            if self.norm_collective.world_size > 1:
                queries, keys = in_lockstep(
                    lambda: to_queries(online_NC, seeds[0]), lambda: to_keys(momentum_NC, seeds[1])
                )
            else:
                queries, keys = to_queries(online_NC, seeds[0]), to_keys(momentum_NC, seeds[1])
            streams = len(queries) // len(online_NC)
            loss, terms, signals = loss_of_streams(
                queries.unflatten(0, (NUM_VIEWS, streams, -1)),
                keys.unflatten(0, (NUM_VIEWS, streams, -1)),
                self.batchformer_loss,
                self.temperature,
                self.collective,
            )
            signals["feature_std"] = feature_std(online_NC.detach())
            return MoCoOutput(loss, terms, signals)


def _random_states(device: torch.device) -> list[Tensor]:
    """Return the states of the generators that a network on `device` draws from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def feature_std(features_NC: Tensor) -> Tensor:
    """Measure the spread of the features' directions: 0 when all are equal (collapse), 1 when they fill all dimensions.

    sqrt(C) times the standard deviation over the rows of the unit-length features, averaged over dimensions (SimSiam, Chen
    and He 2021, figure 2).
    """
    unit = F.normalize(features_NC.float(), dim=-1)
    return unit.std(0, correction=0).mean() * features_NC.shape[1] ** 0.5
