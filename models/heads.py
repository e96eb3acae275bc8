"""Builds the projector (both encoders) and the predictor (online encoder only) of MoCo v3: bias-free MLPs with batch norm.

              projector                                               predictor
    resnet    C -> mlp_dim -> projection_dim, norm                    projection_dim -> mlp_dim -> projection_dim
    vit       C -> mlp_dim -> mlp_dim -> projection_dim, norm         the same, norm

Hidden layers are followed by norm and ReLU. The norm at the end has neither weight nor bias. Source: MoCo v3's release;
sizes there are mlp_dim = 4096 and projection_dim = 256. Linear layers keep torch's default initialisation.
"""

from torch import nn

from crossbatch.models.norm import ViewBatchNorm

FAMILIES = ("resnet", "vit")


def build_mlp(num_layers: int, in_dim: int, hidden: int, out_dim: int, last_norm: bool) -> nn.Sequential:
    """Build [n, in_dim] -> [n, out_dim]: (Linear, norm, ReLU) * (num_layers - 1), Linear, and the last norm if asked."""
    layers: list[nn.Module] = []
    for _ in range(num_layers - 1):
        layers += [nn.Linear(in_dim, hidden, bias=False), ViewBatchNorm(hidden), nn.ReLU(inplace=True)]
        in_dim = hidden
    layers.append(nn.Linear(in_dim, out_dim, bias=False))
    if last_norm:
        layers.append(ViewBatchNorm(out_dim, affine=False))
    return nn.Sequential(*layers)


def build_projector(family: str, in_dim: int, mlp_dim: int, projection_dim: int) -> nn.Sequential:
    """Build the projector [n, in_dim] -> [n, projection_dim]; `family` is one of FAMILIES."""
    return build_mlp({"resnet": 2, "vit": 3}[family], in_dim, mlp_dim, projection_dim, last_norm=True)


def build_predictor(family: str, mlp_dim: int, projection_dim: int) -> nn.Sequential:
    """Build the predictor [n, projection_dim] -> [n, projection_dim]; `family` is one of FAMILIES."""
    return build_mlp(2, projection_dim, mlp_dim, projection_dim, last_norm=family == "vit")
