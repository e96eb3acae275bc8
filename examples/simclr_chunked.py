"""SimCLR on 256 images in chunks of 64: the loss compares the whole batch, memory holds the activations of one chunk."""

import torch
from torch import nn
from torch.nn import functional as F

from crossbatch import chunked_backward


def nt_xent(features: torch.Tensor) -> torch.Tensor:
    """SimCLR's loss of features [2, n, C] (Chen et al., 2020, equation 1)."""
    z = F.normalize(features.flatten(0, 1), dim=1)
    similarity = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    n = len(z) // 2
    return F.cross_entropy(similarity, torch.arange(2 * n).roll(n))


torch.manual_seed(0)
encoder = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 64))
network = nn.Sequential(encoder, nn.ReLU(), nn.Linear(64, 32))
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
images = torch.rand(256, 3, 16, 16)


views = torch.stack([images + 0.1 * torch.randn_like(images) for _ in range(2)])  # [2, n, 3, 16, 16]
nt_xent(network(views.flatten(0, 1)).unflatten(0, (2, -1))).backward()  # the plain step, for comparison
plain = [p.grad.clone() for p in network.parameters()]
optimizer.zero_grad()
for step in range(20):
    loss = chunked_backward(network, views, nt_xent, chunk=64)
    if step == 0:
        difference = max(
            float((p.grad - g).norm() / g.norm()) for p, g in zip(network.parameters(), plain, strict=True)
        )
        print(f"gradients differ from those of the plain step by {difference:.0e}")
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 4:
        print(f"step {step + 1}: loss {loss:.3f}")
