"""Published runs on one and on many GPUs: what the model is fitted to, and what it must predict.

A row says what is known (a smaller run) and what is wanted (a larger one of the same code on the same GPUs). Rates are training
images/s. MLPerf's are medians over the logs of a submission, batches those of its configuration files.

Not in the table, because what they need is not published: pytorch #39358 (synchronised norms "2x", no sizes), mosaicml/composer
#1391 (norms within a node, about 5 % on two nodes, no step time), MoCo v3, Fast-MoCo, Barlow Twins and others (one size each).
Runs on one GPU in TF32 are left out of `SINGLE`: our runs never ask for it (the roofline has them 1.4 times too fast).
"""

from dataclasses import dataclass

RESNET50_PARAMETERS = 25.56e6


@dataclass(frozen=True)
class Run:
    gpus: int
    nodes: int
    batch: int  # images of a GPU
    images_per_s: float
    norms_over: int = 0  # ranks that share the statistics of a norm; 0: norms are not synchronised

    @property
    def step_ms(self) -> float:
        return 1000 * self.gpus * self.batch / self.images_per_s


@dataclass(frozen=True)
class Row:
    name: str
    stack: str  # whose contention within a node
    noise: str  # whose interruptions: "graph" (compiled or captured graphs), "eager" (Python drives every step)
    gpu: str
    network: str | None  # None: that of the catalogue
    known: Run
    wanted: Run
    source: str
    gradient_bytes: float = 2 * RESNET50_PARAMETERS
    synchronisations: int = (
        1  # points of a step where ranks wait for each other; with synchronised norms, two for each norm
    )
    calls: int = 0  # collectives of the norms in a step

    @property
    def publication(self) -> str:
        return self.name.split()[0]


@dataclass(frozen=True)
class Single:
    """Supervised training on one GPU, 224 px."""

    arch: str
    gpu: str
    precision: str
    images_per_s: float
    source: str
    score_heads: int = 0  # of a ViT whose attention kept its scores (before PyTorch 2): heads; 0: it does not


_DLE = "NVIDIA/DeepLearningExamples"
_PYTORCH = f"{_DLE} PyTorch/Classification/ConvNets/resnet50v1.5/README.md (21.03)"
_TENSORFLOW = f"{_DLE} TensorFlow/Classification/ConvNets/resnet50v1.5/README.md (20.06)"
_MXNET = f"{_DLE} MxNet/Classification/RN50v1.5/README.md (20.12)"
_PADDLE = f"{_DLE} PaddlePaddle/Classification/RN50v1.5/README.md"
_TIMM = "timm results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv"
_V06, _V07 = "mlcommons/training_results_v0.6 NVIDIA", "mlcommons/training_results_v0.7 NVIDIA"
_SWAV = "facebookresearch/swav README (running times), scripts/"


def _in_a_node(
    stack: str, noise: str, source: str, title: str, gpu: str, batch: int, rates: dict[int, float]
) -> list[Row]:
    """From one GPU to some of the same node."""
    known = Run(1, 1, batch, rates[1])
    size = (2 if stack == "mxnet" else 4) * RESNET50_PARAMETERS
    return [
        Row(f"{title}, 1 -> {n}", stack, noise, gpu, "edr", known, Run(n, 1, batch, rate), source, size)
        for n, rate in rates.items()
        if n > 1
    ]


def _mlperf(title: str, gpu: str, network: str, known: Run, wanted: Run, source: str) -> Row:
    return Row(f"MLPerf {title}", "mxnet", "graph", gpu, network, known, wanted, source)


# SwAV, R50, 2x224 + 6x96 px: 54 norms, of which the backbone's 53 run once for each crop size; apex's then took three gathers
# forward and two all-reduces back for each (NVIDIA/apex #980), torch 1.4's too. ImageNet has 1,281,167 images.
_IMAGES, _SWAV_NORMS = 1_281_167, 53 * 2 + 1
_swav_4 = Run(4, 1, 64, _IMAGES / (52 * 60 + 10), norms_over=4)
_swav_64 = Run(64, 8, 64, _IMAGES / (3 * 60 + 40), norms_over=8)
_swav_global = Run(64, 8, 64, _IMAGES / (2 * (3 * 60 + 40)), norms_over=64)


def _swav(title: str, known: Run, wanted: Run, source: str) -> Row:
    size, waits, calls = 4 * RESNET50_PARAMETERS, 2 * _SWAV_NORMS, 5 * _SWAV_NORMS
    return Row(f"SwAV {title}", "pytorch", "eager", "v100-16g", "edr", known, wanted, source, size, waits, calls)


ROWS: list[Row] = [
    *_in_a_node("pytorch", "eager", _PYTORCH, "PyTorch AMP, DGX-1 32G", "v100-32g", 256, {1: 1156, 8: 8056}),
    *_in_a_node("pytorch", "eager", _PYTORCH, "PyTorch FP32, DGX-1 32G", "v100-32g", 128, {1: 356, 8: 2766}),
    *_in_a_node("pytorch", "eager", _PYTORCH, "PyTorch AMP, DGX-1 16G", "v100-16g", 256, {1: 1200, 8: 8322}),
    *_in_a_node("pytorch", "eager", _PYTORCH, "PyTorch FP32, DGX-1 16G", "v100-16g", 128, {1: 367, 8: 2855}),
    *_in_a_node("pytorch", "eager", _PYTORCH, "PyTorch AMP, DGX A100", "a100-80g", 256, {1: 2470, 8: 16621}),
    *_in_a_node("pytorch", "eager", _PYTORCH, "PyTorch TF32, DGX A100", "a100-80g", 256, {1: 938, 8: 7248}),
    *_in_a_node("tensorflow", "graph", _TENSORFLOW, "TF1 AMP XLA, DGX-1", "v100-16g", 256, {1: 1270, 8: 9510}),
    *_in_a_node("tensorflow", "graph", _TENSORFLOW, "TF1 FP32 XLA, DGX-1", "v100-16g", 128, {1: 412, 8: 3170}),
    *_in_a_node("tensorflow", "graph", _TENSORFLOW, "TF1 AMP XLA, DGX-2", "v100-32g", 256, {1: 1300, 16: 17250}),
    *_in_a_node("tensorflow", "graph", _TENSORFLOW, "TF1 FP32 XLA, DGX-2", "v100-32g", 128, {1: 432, 16: 6500}),
    *_in_a_node("tensorflow", "graph", _TENSORFLOW, "TF1 AMP XLA, DGX A100", "a100-40g", 256, {1: 2375, 8: 17400}),
    *_in_a_node("tensorflow", "graph", _TENSORFLOW, "TF1 TF32 XLA, DGX A100", "a100-40g", 256, {1: 909, 8: 7000}),
    *_in_a_node("mxnet", "graph", _MXNET, "MXNet AMP, DGX-1", "v100-16g", 192, {1: 1376, 2: 2768, 4: 5357, 8: 10723}),
    *_in_a_node("mxnet", "graph", _MXNET, "MXNet FP32, DGX-1", "v100-16g", 96, {1: 384, 2: 763, 4: 1513, 8: 3005}),
    *_in_a_node(
        "mxnet",
        "graph",
        _MXNET,
        "MXNet AMP, DGX-2",
        "v100-32g",
        256,
        {1: 1492, 2: 2935, 4: 5726, 8: 11368, 16: 21484},
    ),
    *_in_a_node(
        "mxnet", "graph", _MXNET, "MXNet FP32, DGX-2", "v100-32g", 128, {1: 417, 2: 821, 4: 1623, 8: 3223, 16: 6338}
    ),
    *_in_a_node(
        "mxnet", "graph", _MXNET, "MXNet AMP, DGX A100", "a100-80g", 256, {1: 2180, 2: 4332, 4: 8587, 8: 16925}
    ),
    *_in_a_node(
        "mxnet", "graph", _MXNET, "MXNet TF32, DGX A100", "a100-80g", 256, {1: 1022, 2: 2032, 4: 4035, 8: 8001}
    ),
    *_in_a_node("paddle", "graph", _PADDLE, "Paddle AMP, DGX A100", "a100-80g", 256, {1: 2711, 8: 20267}),
    *_in_a_node("paddle", "graph", _PADDLE, "Paddle TF32, DGX A100", "a100-80g", 256, {1: 993, 8: 7955}),
    _mlperf(
        "v0.7 Dell C4140, 1 -> 2 nodes of 4 V100",
        "v100-32g",
        "edr",
        Run(4, 1, 208, 5592),
        Run(8, 2, 208, 11244),
        "mlcommons/training_results_v0.7 DellEMC (network not stated: one EDR assumed)",
    ),
    _mlperf(
        "v0.7 Dell C4140, 1 -> 4 nodes of 4 V100",
        "v100-32g",
        "edr",
        Run(4, 1, 208, 5592),
        Run(16, 4, 208, 22147),
        "mlcommons/training_results_v0.7 DellEMC (network not stated: one EDR assumed)",
    ),
    _mlperf(
        "v0.6 DGX-1, 1 -> 130 nodes",
        "v100-16g",
        "4xedr",
        Run(8, 1, 208, 11222),
        Run(1040, 130, 52, 1_147_014),
        f"{_V06}: dgx1 and dgx1_n130, config_DGX1.sh and config_DGX1_multi.sh",
    ),
    _mlperf(
        "v0.6 DGX-2H, 1 -> 32 nodes",
        "v100-32g",
        "8xedr",
        Run(16, 1, 208, 24655),
        Run(512, 32, 65, 0.803 * 32 * 24655),
        f"{_V06}: dgx2h and dgx2h_n32, config_DGX2.sh and config_DGX2_multi_32x16x65.sh",
    ),
    _mlperf(
        "v0.6 DGX-2H, 1 -> 96 nodes",
        "v100-32g",
        "8xedr",
        Run(16, 1, 208, 24655),
        Run(1536, 96, 39, 0.689 * 96 * 24655),
        f"{_V06}: dgx2h and dgx2h_n96, config_DGX2.sh and config_DGX2_multi.sh",
    ),
    _mlperf(
        "v0.7 DGX-2H, 1 -> 32 nodes",
        "v100-32g",
        "8xedr",
        Run(16, 1, 208, 25285),
        Run(512, 32, 65, 0.775 * 32 * 25285),
        f"{_V07}: dgx2h and dgx2h_n32, config_DGX2.sh and config_DGX2_multi_32x16x65.sh",
    ),
    _mlperf(
        "v0.7 DGX A100, 1 -> 2 nodes, batch of 3264",
        "a100-40g",
        "8xhdr",
        Run(8, 1, 408, 22510),
        Run(16, 2, 204, 37400),
        f"{_V07}: dgxa100 and dgxa100_n2, config_DGXA100_multi_2x8x204.sh",
    ),
    _mlperf(
        "v3.0 DGX H100, 1 -> 8 nodes, batch of 3200",
        "h100-80g",
        "8xndr",
        Run(8, 1, 400, 55_350),
        Run(64, 8, 50, 0.63 * 8 * 55_350),
        "mlcommons/training_results_v3.0 NVIDIA (time to train, with start and evaluation)",
    ),
    _swav("4 -> 64 V100, norms within a node", _swav_4, _swav_64, f"{_SWAV}swav_200ep_bs256 and swav_800ep"),
    _swav(
        "64 V100, norms within a node -> over all",
        _swav_64,
        _swav_global,
        f'facebookresearch/swav #22 ("about x2 more time"); {_SWAV}swav_800ep_pretrain.sh',
    ),
]

SINGLE: list[Single] = [
    Single("resnet50", "v100-32g", "fp16", 1156, _PYTORCH),
    Single("resnet50", "v100-16g", "fp16", 1200, _PYTORCH),
    Single("resnet50", "v100-32g", "fp32", 356, _PYTORCH),
    Single("resnet50", "v100-16g", "fp32", 367, _PYTORCH),
    Single("resnet50", "a100-80g", "fp16", 2470, _PYTORCH),
    Single("resnet18", "rtx3090", "fp16", 3482, _TIMM),
    Single("resnet34", "rtx3090", "fp16", 2037, _TIMM),
    Single("resnet50", "rtx3090", "fp16", 1218, _TIMM),
    Single("resnet101", "rtx3090", "fp16", 748, _TIMM),
    Single("vit_small", "rtx3090", "fp16", 1058, _TIMM, score_heads=6),
    Single("vit_base", "rtx3090", "fp16", 393, _TIMM, score_heads=12),
]
