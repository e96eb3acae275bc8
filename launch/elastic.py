"""Start a run with torchrun's flags, and with ranks that are forked from a process that has imported everything.

python launch/elastic.py --nnodes 1:2 --nproc-per-node 8 --max-restarts 100 ... launch/pretrain.py ... --out runs/mine

torchrun starts every rank as a new Python, which imports for seconds before it can go on; here that is done once for each node.
"""

import os
import sys
from multiprocessing import set_forkserver_preload
from pathlib import Path

IMPORTED_ONCE = (
    "crossbatch.launch.pretrain",
    "crossbatch.launch.training",
    "crossbatch.engine.tasks.pretrain",
    "crossbatch.engine.sharding.fsdp",
)
# DeepSpeed looks for GPUs when it is imported, and a process that has done so cannot fork others that use them.
IMPORTED_WITHOUT_A_GPU = (
    "crossbatch.engine.sharding.zero",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
)


def main() -> None:
    """Run torchrun with the arguments in `sys.argv`."""
    from torch.distributed import run

    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # whether there is a GPU is asked without using it
    modules = [*IMPORTED_ONCE]
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        modules += IMPORTED_WITHOUT_A_GPU
    set_forkserver_preload(modules)
    run.main(["--run-path", "--start-method=forkserver", *sys.argv[1:]])


if __name__ == "__main__":
    main()
