"""MoCo v3's loss for projections that you have already: queries with a gradient, keys of the momentum encoder without.

python examples/contrastive_loss.py                        one process
torchrun --nproc_per_node 2 examples/contrastive_loss.py   two: every image against the keys of both, the same loss
"""

import torch
import torch.distributed as dist

from crossbatch import contrastive_loss, cross_entropy_over_keys

if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
torch.manual_seed(0)
queries, keys = torch.randn(2, 64, 32), torch.randn(2, 64, 32)  # [views, images of the global batch, features]
mine = slice(rank * 64 // world, (rank + 1) * 64 // world)
own = queries[:, mine].clone().requires_grad_()
loss = contrastive_loss(own, keys[:, mine], temperature=0.2)
loss.backward()
assert own.grad is not None
mean = loss.detach()
if world > 1:
    dist.all_reduce(mean)
if rank == 0:
    print(f"loss over {world} process(es): {mean / world:.4f}, gradient of {list(own.grad.shape)}")

# One term by itself, here of 64 rows against 100,000 keys: the matrix of logits never exists as a whole.
rows, many = torch.randn(64, 32, requires_grad=True), torch.randn(100_000, 32)
term = cross_entropy_over_keys(rows, many, labels_n=torch.arange(64), temperature=0.2)
term.backward()
if rank == 0:
    print(f"cross-entropy over {len(many)} keys: {term.item():.2f}")
if world > 1:
    dist.destroy_process_group()
