"""BatchFormer between a backbone and a classifier. Run it with python, or with torchrun --nproc_per_node 2: the same losses."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from crossbatch import BatchFormer


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(16, 64), nn.ReLU()), nn.Linear(64, 4)
        self.mix = BatchFormer(64, group_size=32)  # here all images of the global batch attend to each other

    def forward(self, x, step):
        # The head learns from the features before and after BatchFormer, which is only for training.
        features = self.backbone(x)
        return torch.cat([self.head(features), self.head(self.mix(features, seed=0, step=step))])


if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
torch.manual_seed(0)
network, labels = Network(), torch.arange(32) % 4
x, mine = torch.randn(4, 16)[labels] + 0.5 * torch.randn(32, 16), slice(rank * 32 // world, (rank + 1) * 32 // world)
model = nn.parallel.DistributedDataParallel(network) if world > 1 else network
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(20):
    optimizer.zero_grad()
    F.cross_entropy(model(x[mine], step), labels[mine].repeat(2)).backward()
    optimizer.step()
logits = network.eval()(x, 0)[:32]  # in evaluation BatchFormer changes nothing
print(f"rank {rank} of {world}: loss {F.cross_entropy(logits, labels).item():.4f}")
if world > 1:
    dist.destroy_process_group()
