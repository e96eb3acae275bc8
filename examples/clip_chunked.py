"""CLIP on 256 pairs of image and text in chunks of 64: two towers, a learned scale, one loss over all pairs."""

import torch
from torch import nn
from torch.nn import functional as F

from crossbatch import chunked_backward


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 64))
        self.text = nn.EmbeddingBag(100, 64)
        self.logit_scale = nn.Parameter(torch.tensor([2.6]))  # with a dimension, which FSDP2 and DeepSpeed need

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # What has no dimension belongs to the whole batch: it reaches the loss as it is.
        return self.image(images), self.text(tokens), self.logit_scale.exp().squeeze()


def clip_loss(features: tuple[torch.Tensor, ...]) -> torch.Tensor:
    images, texts, scale = features
    logits = scale * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    truth = torch.arange(len(logits))
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


torch.manual_seed(0)
towers = TwoTowers()
optimizer = torch.optim.AdamW(towers.parameters(), lr=3e-3)
tokens = torch.randint(100, (256, 5))
images = torch.zeros(256, 3, 16, 16)
images.view(256, -1).scatter_(1, 7 * tokens, 1.0)  # a picture of its text
for step in range(30):
    loss = chunked_backward(towers, (images, tokens), clip_loss, chunk=64)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss:.3f}, scale {towers.logit_scale.exp().item():.1f}")
