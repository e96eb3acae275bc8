"""LARS in plain torch. Matrices get a trust ratio and weight decay, biases and norms neither. Run: python examples/lars.py"""

import torch
from torch import nn

import crossbatch

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10))
optimizer = crossbatch.LARS(model.parameters(), lr=4.0, weight_decay=1e-6, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)

images, teacher = torch.randn(4096, 32), torch.randn(32, 10)
labels = (images @ teacher).argmax(1)
for step in range(200):
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step % 50 == 0 or step == 199:
        print(f"step {step:3}  loss {loss.item():.4f}  lr {optimizer.param_groups[0]['lr']:.3f}")

adapting = [name for name, p in model.named_parameters() if optimizer.adapts[p]]
print("these adapt and decay:", ", ".join(adapting))

# Groups by name: the first layer learns at a tenth of the rate.
groups = crossbatch.lars_param_groups(model, weight_decay=1e-6, lr=4.0, lr_scales={"0.": 0.1})
print("learning rates of the groups:", [group["lr"] for group in crossbatch.LARS(groups, lr=4.0).param_groups])
