"""LARS under DeepSpeed ZeRO is LARS. Run: python examples/lars_zero.py, or deepspeed --num_gpus 2 examples/lars_zero.py"""

import os

import deepspeed
import torch
from torch import nn

import crossbatch

alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
for name, value in alone.items():
    os.environ.setdefault(name, value)
if not torch.cuda.is_available():  # DeepSpeed would compile, for a minute, an operator for inference on CPUs
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
images, targets = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0))


def build() -> tuple[nn.Module, crossbatch.LARS]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 33), nn.LayerNorm(33), nn.Tanh(), nn.Linear(33, 16))
    return model, crossbatch.LARS(model.parameters(), lr=5.0, weight_decay=1e-4)


model, optimizer = build()
zero = {"train_batch_size": 64, "zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={**zero, "gradient_clipping": 0.0})
crossbatch.lars_for_zero(engine)  # without it, the first step raises

plain, plain_optimizer = build()  # the same on the whole batch, without DeepSpeed
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
for _ in range(10):
    mine = [tensor.chunk(ranks)[rank].to(engine.device) for tensor in (images, targets)]
    engine.backward(nn.functional.mse_loss(engine(mine[0]), mine[1]))
    engine.step()
    plain_optimizer.zero_grad()
    nn.functional.mse_loss(plain(images), targets).backward()
    plain_optimizer.step()
difference = max((a.cpu() - b).norm() / b.norm() for a, b in zip(model.parameters(), plain.parameters(), strict=True))
print(f"rank {rank} of {ranks}: largest relative difference of a weight to plain torch: {difference:.1e}")
