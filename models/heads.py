"""The projector (both encoders) and the predictor (online encoder only) of MoCo v3: bias-free MLPs with batch norm.

              projector                                     predictor
    resnet    C -> mlp_dim -> dim, norm                     dim -> mlp_dim -> dim
    vit       C -> mlp_dim -> mlp_dim -> dim, norm          dim -> mlp_dim -> dim, norm

Hidden layers are followed by norm and ReLU. The norm at the end has no weight and bias. Source: MoCo v3's release;
sizes there are mlp_dim = 4096 and dim = 256. Linear layers keep torch's default initialisation.
"""

from torch import nn

from crossbatch.models.norm import ViewBatchNorm

_NUM_PROJECTOR_LAYERS = {"resnet": 2, "vit": 3}


def build_mlp(num_layers: int, in_dim: int, hidden: int, out_dim: int, last_norm: bool) -> nn.Sequential:
    """[n, in_dim] -> [n, out_dim]: (Linear, norm, ReLU) * (num_layers - 1), Linear, and the last norm if asked."""
    layers: list[nn.Module] = []
    for _ in range(num_layers - 1):
        layers += [nn.Linear(in_dim, hidden, bias=False), ViewBatchNorm(hidden), nn.ReLU(inplace=True)]
        in_dim = hidden
    layers.append(nn.Linear(in_dim, out_dim, bias=False))
    if last_norm:
        layers.append(ViewBatchNorm(out_dim, affine=False))
    return nn.Sequential(*layers)


def build_projector(family: str, in_dim: int, mlp_dim: int, dim: int) -> nn.Sequential:
    """[n, in_dim] -> [n, dim]; `family` as in backbones.family."""
    return build_mlp(_NUM_PROJECTOR_LAYERS[family], in_dim, mlp_dim, dim, last_norm=True)


def build_predictor(family: str, mlp_dim: int, dim: int) -> nn.Sequential:
    """[n, dim] -> [n, dim]; `family` as in backbones.family."""
    return build_mlp(2, dim, mlp_dim, dim, last_norm={"resnet": False, "vit": True}[family])
