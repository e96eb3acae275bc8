"""Builds files of moco-v3 and BatchFormer for tests, laid out as the reference documents say."""

import itertools

import timm
import torch
import torchvision
from torch import nn

MLP, DIM, EPOCH = 32, 16, 2


class BatchFormer(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.encoder_layers = nn.TransformerEncoderLayer(dim, 4, dim, 0.5)


def mlp(first: list[nn.Module], widths: list[int], last_norm: bool) -> nn.Sequential:
    layers = list(first)
    for i, (here, there) in enumerate(itertools.pairwise(widths)):
        layers.append(nn.Linear(here, there, bias=False))
        if i < len(widths) - 2:
            layers += [nn.BatchNorm1d(there), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm1d(there, affine=False))
    return nn.Sequential(*layers)


class Original(nn.Module):
    """Has the modules, names and order of an original, and nothing of what they compute."""

    def __init__(self, arch: str, add_bf: bool):
        super().__init__()
        self.arch = arch
        if arch == "resnet18":
            self.base_encoder, self.momentum_encoder = torchvision.models.resnet18(), torchvision.models.resnet18()
            head, width, widths = "fc", 512, [512, MLP, DIM]
        else:
            self.base_encoder, self.momentum_encoder = (
                timm.models.VisionTransformer(
                    img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=0
                )
                for _ in range(2)
            )
            self.base_encoder.get_parameter("pos_embed").requires_grad_(False)
            self.base_encoder.patch_embed.requires_grad_(False)
            head, width, widths = "head", 24, [24, MLP, MLP, DIM]
        shared = BatchFormer(width) if add_bf else None
        if shared is not None:
            self.encoder_global = shared
        for encoder in (self.base_encoder, self.momentum_encoder):
            setattr(encoder, head, mlp([shared] if shared is not None else [], widths, True))
        self.predictor = mlp([], [DIM, MLP, DIM], head == "head")
        self.momentum_encoder.requires_grad_(False)  # and with it BatchFormer, which is the same module


def original_file(arch: str, add_bf: bool, optimizer: str) -> dict:
    """Return a checkpoint after two epochs: random weights, and a state of each trained parameter that names its position."""
    torch.manual_seed(1)
    model = Original(arch, add_bf)
    for buffer in model.buffers():
        buffer.copy_(torch.rand(buffer.shape) if buffer.is_floating_point() else torch.tensor(16))
    state = {}
    for position, parameter in enumerate(model.parameters()):
        if parameter.requires_grad:
            value = torch.full(parameter.shape, float(position))
            steps = torch.tensor(8.0)
            state[position] = (
                {"mu": value} if optimizer == "LARS" else {"step": steps, "exp_avg": value, "exp_avg_sq": value + 0.5}
            )
    group = {"lr": 0.1, "weight_decay": 0.01, "params": list(range(len(list(model.parameters()))))}
    scaler = {"scale": 2.0**14, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000}
    return {
        "epoch": EPOCH,
        "arch": arch,
        "state_dict": {f"module.{name}": tensor.clone() for name, tensor in model.state_dict().items()},
        "optimizer": {"state": state, "param_groups": [group]},
        "scaler": {**scaler, "_growth_tracker": 7},
    }
