"""The batch-wide part as CUDA graphs: the wiring with a stand-in for torch's capture, the real one on a GPU."""

import importlib.util
import threading
from unittest import mock

import pytest
import torch

from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.models import MoCo
from tests.small_runs import ADAMW, BASE, RESNET, losses, pretrainer, zero

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
    warmed_up, warns = [], []
    monkeypatch.setattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", warns.append)

    def stand_in(parts, samples, **more):
        assert not torch.is_autocast_cache_enabled()
        assert warns == [False]  # of gradients from the stream of the capture, which is no fault of the graph
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


def test_two_backward_passes_before_the_gradients_are_cleared_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda parts, samples, **more: parts)
    model = MoCo("resnet18", **SIZES, batchformer_loss="sum", cuda_graph=True)
    images = torch.randn(16, 3, 16, 16)
    model.loss(images, 0, 0).loss.backward()
    again = model.loss(images, 1, 0).loss
    with pytest.raises(
        RuntimeError, match=r"cuda_graph: .* make one backward pass a step and call optimizer.zero_grad"
    ):
        again.backward()
    model.zero_grad()
    model.loss(images, 2, 0).loss.backward()


def run(overrides: list[str], out: str) -> list[int]:
    """Train three steps on this rank, with a loader that has a thread; count its threads at each capture."""
    cfg = resolve(load_config(None, [*BASE, *RESNET, *ADAMW, *zero(0), *overrides]), 1, Device("cuda"))
    threads = []

    def stand_in(parts, samples, **more):
        threads.append(sum(thread.name.startswith("batches") for thread in threading.enumerate()))
        return parts

    fork = mock.patch("crossbatch.data.workers.start_method", lambda: "fork")  # a fork server would import torch again
    with mock.patch("torch.cuda.make_graphed_callables", stand_in), fork:
        pretrainer(cfg, out, "none", 3).train()
    return threads


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
def test_the_loader_rests_while_a_graph_is_captured(tmp_path, one_rank):
    overrides = ["crossbatch.precision=fp32", "crossbatch.data.workers=1"]
    assert one_rank.run(run, [*overrides, "crossbatch.model.cuda_graph=true"], str(tmp_path / "graph")) == [[0]]
    assert one_rank.run(run, overrides, str(tmp_path / "plain")) == [[]]
    assert len(losses(tmp_path / "graph")) == 3 and losses(tmp_path / "graph") == losses(tmp_path / "plain")


@pytest.mark.gpu
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-4), (True, 2e-2)])
def test_a_graph_replays_the_step(autocast, tolerance):
    compare("cuda", autocast, tolerance)
