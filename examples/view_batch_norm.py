"""A network written with ViewBatchNorm: two views in one pass, each with its own statistics.

python examples/view_batch_norm.py
"""

import torch
from torch import nn

from crossbatch import ViewBatchNorm

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 8, 3), ViewBatchNorm(8, num_views=2), nn.ReLU())
first, second = torch.randn(16, 3, 12, 12), 5 * torch.randn(16, 3, 12, 12) + 1  # two views, distributed differently
network(torch.cat((first, second)))  # view-major: all images of the first view, then all of the second

normalised = network[:2](torch.cat((first, second))).unflatten(0, (2, -1))
print("mean and standard deviation after the norm")
for number, view in enumerate(normalised, start=1):
    print(f"  view {number}: {view.mean():+.3f} {view.std():.3f}")

mixed = nn.BatchNorm2d(8)(network[0](torch.cat((first, second)))).unflatten(0, (2, -1))
print("and after nn.BatchNorm2d, which takes one statistic over both views")
for number, view in enumerate(mixed, start=1):
    print(f"  view {number}: {view.mean():+.3f} {view.std():.3f}")
