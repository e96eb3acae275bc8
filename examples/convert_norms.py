"""Two views in one pass through somebody else's network, each normalised by its own statistics.

python examples/convert_norms.py                           one process
torchrun --nproc_per_node 2 examples/convert_norms.py      two: statistics over both, on a CPU, too
"""

import torch
import torch.distributed as dist
import torchvision
from torch import nn

from crossbatch import convert_norms

if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
torch.manual_seed(0)
plain = torchvision.models.resnet18(num_classes=8)
converted = torchvision.models.resnet18(num_classes=8)
converted.load_state_dict(plain.state_dict())
convert_norms(converted, num_views=2)
model = nn.parallel.DistributedDataParallel(converted) if world > 1 else converted

views = torch.randn(2, 8, 3, 32, 32) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1)  # [views, images, 3, H, W]
mine = views[:, rank * 8 // world : (rank + 1) * 8 // world]
together = model(mine.flatten(0, 1)).unflatten(0, (2, -1))  # one pass; view-major: first views, then second views
one_by_one = torch.stack([plain(view) for view in views])  # torch's norms see one view of all images at a time
difference = (together - one_by_one[:, rank * 8 // world : (rank + 1) * 8 // world]).abs().max().item()
plain.load_state_dict(converted.state_dict())  # the state dict is still that of nn.BatchNorm2d
if rank == 0:
    print(f"{world} process(es): largest difference to torch's norms, a view at a time: {difference:.1e}")
if world > 1:
    dist.destroy_process_group()
