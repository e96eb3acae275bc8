"""The batch-wide part as CUDA graphs: the wiring with a stand-in for torch's capture, the real one on a GPU."""

import pytest
import torch

from crossbatch.models import MoCo

SIZES = {
    "image_size": 16,
    "stem": "small",
    "backbone_args": {"width": 8},
    "projection_dim": 8,
    "mlp_dim": 16,
    "group_size": 4,
}


def trained(cuda_graph: bool, device: str, autocast: bool, steps: int = 3):
    """Return losses, and then gradients and buffers, of some steps of SGD."""
    torch.manual_seed(0)
    model = MoCo("resnet18", **SIZES, batchformer_loss="sum", cuda_graph=cuda_graph).to(device)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(steps):
        images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(step)).to(device)
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, autocast):
            contrast = model.loss(images, step, 0)
        contrast.loss.backward()
        optimizer.step()
        losses.append(contrast.loss.item())
    values = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | dict(model.named_buffers())
    return torch.tensor(losses), values


def compare(device: str, autocast: bool, tolerance: float) -> None:
    losses, values = trained(True, device, autocast)
    want_losses, want_values = trained(False, device, autocast)
    torch.testing.assert_close(losses, want_losses, rtol=tolerance, atol=0)
    assert values.keys() == want_values.keys()
    for name, value in values.items():
        torch.testing.assert_close(value, want_values[name], rtol=tolerance, atol=10 * tolerance, msg=name)


def test_capturing_changes_nothing(monkeypatch):
    """The stand-in warms up as torch does: forward and backward of every part, three times."""
    warmed_up = []

    def stand_in(parts, samples, **more):
        assert not torch.is_autocast_cache_enabled()
        for part, (features, seeds) in zip(parts, samples, strict=True):
            assert features.is_leaf and seeds.dtype == torch.int32
            assert not part._forward_pre_hooks and not any(buffer.requires_grad for buffer in part.buffers())
            outputs = [part(features, seeds) for _ in range(3)]
            warmed_up.append(outputs[0].requires_grad)
            if outputs[0].requires_grad:
                trainable = [p for p in part.parameters() if p.requires_grad]
                torch.autograd.grad(outputs[2].sum(), [features, *trainable])
        return parts

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", stand_in)
    compare("cpu", autocast=False, tolerance=0.0)
    assert warmed_up == [True, False]  # once, of the first step: queries with gradient, keys without


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-4), (True, 2e-2)])
def test_a_graph_replays_the_step(autocast, tolerance):
    compare("cuda", autocast, tolerance)
