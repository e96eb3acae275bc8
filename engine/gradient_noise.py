"""Measures the simple noise scale of the gradients during training: the batch size up to which larger batches pay off.

McCandlish et al. (2018), "An Empirical Model of Large-Batch Training" (arXiv 1812.06162), section 2.2 and appendix A.1. If a
gradient is the mean of B terms, one per image, then

    E |G_B|^2 = |G|^2 + tr(Sigma) / B          G: the mean term, Sigma: the covariance of the terms
    noise scale = tr(Sigma) / |G|^2            in images

so the squared norms of two gradients over different numbers of images give both unknowns. A step has them for nothing: the
gradient of the batch, and those of its parts, which add up to it. With parts of m_1, m_2, ... images that contribute g_1, g_2,
... to the gradient g of the batch (g = g_1 + g_2 + ...), these estimates are unbiased (equal parts: the paper's equation A.3):

    |G|^2       ~  (|g|^2 - sum |g_k|^2) / (1 - sum m_k^2 / B^2)
    tr(Sigma)   ~  B (|g|^2 - |G|^2)

The terms of a contrastive loss are not gradients of losses of their own. Here the term of image i is B times what flows into
the parameters through its own views, in the backward pass of the loss of the whole batch, keys, BatchFormer's groups and the
statistics of norms being what they are: the gradient with the features of all other images held fixed. See docs/measuring.md.

The parts are the ranks, over all trained parameters; on one rank they are the chunks, over the backbone's parameters, because
the rest is computed once for all images. A hook on every parameter sees a part's gradient before it is added to `.grad`, and
takes its norm: no other pass and no buffer are needed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from crossbatch.engine.config import ResolvedConfig
from crossbatch.models import ShardableModel

if TYPE_CHECKING:
    from crossbatch.engine.step import Progress

AVERAGED_STEPS = 100  # what the moving averages span


class GradientNoise:
    """Sums up squared norms of gradients over steps, and estimates the noise scale from them.

    Between two readings nothing is sent and the host waits for nothing; each rank sums up its own norms.

    Args:
        model: whose trained parameters are watched; gradients must be those of this rank until the backward pass is over.
        over: "ranks" or "chunks", what the parts of a batch are.
        sizes: number of images of each part.
    """

    def __init__(self, model: ShardableModel, over: Literal["ranks", "chunks"], sizes: Sequence[int]):
        self.over, self.sizes = over, sizes
        self.is_last = True  # whether the backward pass under way is the last of the chunked module
        self._chunked = {*model.chunked_module.parameters()}
        self._parts: list[Tensor] = []  # norms of this step: of gradients of parts, by parameter
        self._whole: list[Tensor] = []  # and of the whole batch, on one rank
        self._steps, self._part_square, self._whole_square = 0, torch.zeros(()), torch.zeros(())
        for parameter in self._chunked if over == "chunks" else model.parameters():
            if parameter.requires_grad:
                self._watch(parameter)

    @staticmethod
    def of(model: ShardableModel, cfg: ResolvedConfig, chunks: int) -> "GradientNoise | None":
        """Return a meter for a step in `chunks` chunks; None if the recipe turns it off, or no gradient of a part can be seen.

        The latter is so with one rank and one chunk; under FSDP2 (any stage), which reduces gradients before a hook sees them;
        and with `cuda_graph`, whose gradients no hook sees.
        """
        is_blind = cfg.crossbatch.sharding == "fsdp" or cfg.crossbatch.model.cuda_graph
        if is_blind or not cfg.crossbatch.log.noise_scale:
            return None
        if cfg.world_size > 1:
            return GradientNoise(model, "ranks", [cfg.local_batch] * cfg.world_size)
        if chunks > 1:
            fewer, more = divmod(cfg.local_batch, chunks)
            return GradientNoise(model, "chunks", [fewer + (k < more) for k in range(chunks)])
        return None

    def _watch(self, parameter: nn.Parameter) -> None:
        is_chunked = parameter in self._chunked

        def see(gradient: Tensor) -> None:
            gradient = gradient.detach()
            if self.over == "chunks":
                self._parts.append(torch.linalg.vector_norm(gradient))
            if self.is_last or not is_chunked:
                before = parameter.grad  # of the chunks before
                total = gradient if before is None else gradient + before
                (self._whole if self.over == "chunks" else self._parts).append(torch.linalg.vector_norm(total))

        parameter.register_hook(see)

    def end_step(self, grad_norm: float, loss_scale: float, counts: bool) -> None:
        """Add the norms of the last step to the sums if the step `counts`; `grad_norm` is the norm for the whole batch."""
        if counts and self._parts:
            parts = torch.stack(self._parts).double().square().sum() / loss_scale**2
            if self.over == "chunks":
                whole = torch.stack(self._whole).double().square().sum() / loss_scale**2
            else:  # times the mean over ranks: what a rank adds to the mean gradient, squared
                parts = parts / len(self.sizes)
                whole = torch.full_like(parts, grad_norm**2)
            self._part_square, self._whole_square = self._part_square + parts, self._whole_square + whole
            self._steps += 1
        self._parts, self._whole = [], []

    def part_square(self) -> Tensor:
        """Return this rank's squared norm of parts, averaged over the steps since the last `read`; ranks average it."""
        return self._part_square / max(self._steps, 1)

    def read(self, part_square: float, progress: "Progress") -> dict[str, float]:
        """Add the steps since the last call to the averages in `progress`, and return their values for metrics.jsonl.

        Args:
            part_square: the mean over ranks of `part_square()`.
            progress: keeps moving averages of both estimates, which are the same on all ranks.

        Returns:
            "gradient_noise/square" and "/variance", the estimates of |G|^2 and tr(Sigma) averaged over these steps, and
            "noise_scale", the ratio of the moving averages, in images; without it while the average of |G|^2 is not positive,
            and empty without steps.
        """
        steps, self._steps = self._steps, 0
        whole_square = float(self._whole_square) / max(steps, 1)
        self._part_square, self._whole_square = torch.zeros(()), torch.zeros(())
        if steps == 0:
            return {}
        square, variance = signal_and_noise(whole_square, part_square, self.sizes)
        if progress.noise_over != self.over:  # other parameters
            progress.noise_over, progress.noise_square, progress.noise_variance = self.over, 0.0, 0.0
        kept = (1 - 1 / AVERAGED_STEPS) ** steps
        progress.noise_square = kept * progress.noise_square + (1 - kept) * square
        progress.noise_variance = kept * progress.noise_variance + (1 - kept) * variance
        found = {"gradient_noise/square": square, "gradient_noise/variance": variance}
        return found if progress.noise_scale is None else {"noise_scale": progress.noise_scale, **found}


def signal_and_noise(whole_square: float, part_square: float, sizes: Sequence[int]) -> tuple[float, float]:
    """Estimate |G|^2 and tr(Sigma), the signal and the noise of the gradients, without bias.

    Args:
        whole_square: |g|^2 of the gradient of a batch.
        part_square: sum |g_k|^2 of what its parts contribute to it.
        sizes: the number of images of each part.
    """
    images = sum(sizes)
    square = (whole_square - part_square) / (1 - sum(size**2 for size in sizes) / images**2)
    return square, images * (whole_square - square)


def cost_of_batch(batch: int, noise_scale: float) -> tuple[float, float]:
    """Return the steps and the images that a batch size takes to the same loss, as multiples of the fewest possible.

    They are 1 + noise_scale / batch and 1 + batch / noise_scale (McCandlish et al., section 2.3): at a batch as large as the
    noise scale, both are 2.
    """
    return 1 + noise_scale / batch, 1 + batch / noise_scale


def describe_batch(batch: int, noise_scale: float) -> str:
    """Say in words what `cost_of_batch` returns."""
    steps, images = cost_of_batch(batch, noise_scale)
    return f"batches of {batch} take {steps:.2f} x the fewest steps and {images:.2f} x the fewest images"
