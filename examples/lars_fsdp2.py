"""LARS under FSDP2 is LARS. Run: python examples/lars_fsdp2.py, or torchrun --nproc_per_node 2 examples/lars_fsdp2.py"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import crossbatch

alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"}
for name, value in alone.items():
    os.environ.setdefault(name, value)
dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
images, targets = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))


def build(shard: bool) -> tuple[nn.Module, crossbatch.LARS]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 33), nn.LayerNorm(33), nn.Tanh(), nn.Linear(33, 16))
    if shard:  # before the optimizer is built
        fully_shard(model, mesh=mesh)
    return model, crossbatch.LARS(model.parameters(), lr=5.0, weight_decay=1e-4)


(model, optimizer), (plain, plain_optimizer) = build(shard=True), build(shard=False)
mine = [tensor.chunk(dist.get_world_size())[dist.get_rank()] for tensor in (images, targets)]
for _ in range(10):
    for network, lars, (x, y) in ((model, optimizer, mine), (plain, plain_optimizer, (images, targets))):
        lars.zero_grad()
        nn.functional.mse_loss(network(x), y).backward()
        lars.step()
pairs = zip(model.parameters(), plain.parameters(), strict=True)
difference = max((a.full_tensor() - b).norm() / b.norm() for a, b in pairs)
print(f"rank {dist.get_rank()}: largest relative difference of a weight to plain torch: {difference:.1e}")
dist.destroy_process_group()
