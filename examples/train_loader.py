"""Loads augmented views with labels in a loop of your own, and goes on in the middle of an epoch.

python examples/train_loader.py
torchrun --nproc_per_node 2 examples/train_loader.py    # each rank gets its part of the same batches
"""

import os

import torch
import torch.distributed as dist

from crossbatch import TrainLoader, open_source
from crossbatch.data import normalize


def main() -> None:
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("gloo")
    source = open_source("synthetic://512?size=32")  # or a folder with train/<class>/<image>, or cifar10://DIR, ...
    with TrainLoader(source, batch_size=128, image_size=32, workers=1) as loader:
        batches = list(loader.epoch(0))
        for step, batch in enumerate(batches):
            assert batch.labels is not None  # as for any source that has labels
            views = normalize(batch.views)  # uint8 -> fp32, [2 views, n images, 3, 32, 32]
            print(f"step {step}: views {tuple(views.shape)}, labels {batch.labels[:8].tolist()} ...")
        resumed = next(loader.epoch(0, start_step=2))
    same = torch.equal(resumed.views, batches[2].views)
    print(f"epoch 0 from step 2 on: {'the same pixels' if same else 'other pixels'}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
