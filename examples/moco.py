"""MoCo v3 around a backbone of your own, in a training loop of your own.

python examples/moco.py                            one process
torchrun --nproc_per_node 2 examples/moco.py       two: keys, norms and groups of BatchFormer span them
"""

import torch
import torch.distributed as dist
from torch import nn

from crossbatch import MoCo

if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
torch.manual_seed(0)
backbone = nn.Sequential(nn.Conv2d(3, 32, 5, 2), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
moco = MoCo(
    backbone, num_features=32, projection_dim=32, mlp_dim=64, temperature=0.2, batchformer_loss="mean", group_size=32
)
model = nn.parallel.DistributedDataParallel(moco) if world > 1 else moco
optimizer = torch.optim.SGD([p for p in moco.parameters() if p.requires_grad], lr=0.1, momentum=0.9)

colours, mine = torch.rand(32, 3, 1, 1), slice(rank * 32 // world, (rank + 1) * 32 // world)
for step in range(21):
    views = [(colours + 0.1 * torch.randn(32, 3, 16, 16))[mine] for _ in range(2)]
    out = model("loss", torch.cat(views), step, 0)  # (part of the model, both views, step, seed of the masks)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    moco.update_momentum(0.99)
    if step % 10 == 0 and rank == 0:
        signals = {name: round(value.item(), 3) for name, value in out.signals.items()}
        print(f"step {step}: loss {out.loss.item():.3f}, {signals}")
if world > 1:
    dist.destroy_process_group()
