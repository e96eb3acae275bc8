"""LARS against its formula in float64, and who decays and adapts."""

import pytest
import torch

from crossbatch.engine.config import load_config
from crossbatch.engine.optimizers import LARS, build_optimizer, parameter_groups, set_learning_rate
from crossbatch.models import MoCo


def groups(matrices, vectors, weight_decay):
    return [
        {"params": matrices, "adapts": True, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": vectors, "adapts": False, "weight_decay": 0.0, "lr_scale": 0.5},
    ]


def test_lars_follows_its_formula():
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(values) for values in (torch.randn(4, 3), torch.zeros(3, 3), torch.randn(2, 2, 2))]
    vectors = [torch.nn.Parameter(values) for values in (torch.randn(5), torch.randn(1))]
    optimizer = LARS(groups(matrices, vectors, 0.1), lr=0.0, momentum=0.9, trust_coefficient=0.01)
    values = [p.detach().double().clone() for p in (*matrices, *vectors)]
    velocity = [torch.zeros_like(v) for v in values]
    for step in range(4):
        set_learning_rate(optimizer, 0.3 * (step + 1))
        for p in (*matrices, *vectors):
            p.grad = torch.randn_like(p)
        if step == 2:
            matrices[2].grad = torch.zeros(2, 2, 2)
        for i, p in enumerate((*matrices, *vectors)):
            assert p.grad is not None
            direction, rate = p.grad.double(), 0.3 * (step + 1)
            if p.ndim > 1:
                direction = direction + 0.1 * values[i]
                p_norm, d_norm = values[i].norm(), direction.norm()
                direction = direction * (0.01 * p_norm / d_norm if p_norm > 0 and d_norm > 0 else 1.0)
            else:
                rate *= 0.5
            velocity[i] = 0.9 * velocity[i] + direction
            values[i] = values[i] - rate * velocity[i]
        optimizer.step()
        for p, value in zip((*matrices, *vectors), values, strict=True):
            torch.testing.assert_close(p.detach().double(), value, rtol=1e-5, atol=1e-6)


def test_lars_leaves_parameters_without_gradient_alone():
    p, q = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = LARS(groups([p, q], [], 0.1), lr=0.0)
    set_learning_rate(optimizer, 1.0)
    p.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(q, torch.ones(2, 2))
    assert not torch.equal(p, torch.ones(2, 2))


def model_and_config(*overrides):
    config = load_config(None, ["crossbatch.batchformer.lr_scale=0.5", *overrides])
    torch.manual_seed(0)
    size = {"image_size": 16, "stem": "small", "backbone_args": {"width": 8}, "dim": 8, "mlp_dim": 16}
    return MoCo("resnet18", **size, add_bf=1, group_size=2), config


def test_groups_hold_every_trainable_parameter_once_by_original_shape():
    model, config = model_and_config()
    found = parameter_groups(model, config)
    listed = [id(p) for group in found for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for group in found:
        assert {p.ndim > 1 for p in group["params"]} == {group["adapts"]}
        assert group["weight_decay"] == (1e-6 if group["adapts"] else 0.0)
    batchformer = {id(p) for p in model.batchformer.parameters()}  # pyright: ignore
    assert {id(p) for g in found if g["lr_scale"] == 0.5 for p in g["params"]} == batchformer


@pytest.mark.parametrize("decay_1d", [True, False])
def test_adamw_decays_everything_unless_told_otherwise(decay_1d):
    model, config = model_and_config("optimizer.type=AdamW", f"optimizer.params.decay_1d={str(decay_1d).lower()}")
    optimizer = build_optimizer(parameter_groups(model, config), config)
    decays = {group["adapts"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {True: 0.1, False: 0.1 if decay_1d else 0.0}
