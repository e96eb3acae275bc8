"""The whole pretraining step on a GPU that is not there: devices, dtypes, layouts and launches, without a number computed.

torch's FakeTensorMode follows the devices and shapes of every operator. A mode in front of it counts what would be launched,
and fails at whatever would make the CPU wait for the GPU. BatchFormer's operators run their own code, and Triton kernels are
only looked at where they would be launched.
"""

import collections
import contextlib
import functools
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from crossbatch.data.augment import parameters
from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.sharding.fsdp import FsdpBackend
from crossbatch.engine.step import TrainStep
from crossbatch.engine.tasks.build import build_model, build_optimizer, parameter_groups
from crossbatch.models.backbones import build_backbone
from crossbatch.models.batchformer import fused
from crossbatch.models.norm import ViewBatchNorm, operators

ROOT = Path(__file__).parents[2]
GPU = torch.device("cuda:0")
# Where a step may wait for the GPU: for the norm of the gradients, once.
WAITS = {("engine/sharding/fsdp.py", "step")}
# Products outside of the 16 bits of autocast: the logits.
FP32 = {"models/cross_entropy.py"}
PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")
NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view")
DYNAMIC = ("nonzero", "masked_select", "_unique2", "unique_consecutive", "equal")  # the CPU must know a value or a size
INNER = {
    f"crossbatch::{name}": op._init_fn
    for op in vars(fused).values()
    if (name := getattr(op, "_name", "")).startswith("batchformer_")
} | {
    f"crossbatch::view_norm_{name}": functools.partial(operators.run_pass, name)
    for name in ("statistics", "normalise", "backward_sums", "input_gradients")
}


class Watch(TorchDispatchMode):
    """Counts launches by operator, and raises AssertionError at what no step should do."""

    def __init__(self, fake: FakeTensorMode, dtype: torch.dtype, channels_last: bool = False, may_wait: bool = False):
        super().__init__()
        self.fake, self.dtype, self.channels_last, self.may_wait = fake, dtype, channels_last, may_wait
        self.launches: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.late_copies = 0  # to the GPU, after the host has waited: the GPU has nothing to do meanwhile

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if is_view(func):
            return func(*args, **kwargs)
        name = func._schema.name
        if name in INNER:
            with self:
                return INNER[name](*args, **kwargs)
        name = name.removeprefix("aten::")
        tensors = [arg for arg in tree_leaves((args, kwargs)) if isinstance(arg, torch.Tensor)]
        self._look_for_waiting(name, tensors, kwargs)
        if name in PRODUCTS:
            self._check_product(name, args)
        out = self._run(name, func, args, kwargs)
        if name not in NO_KERNEL and "::" not in name:
            on_gpu = any(device_type(t) == "cuda" for t in [*tensors, *tree_leaves(out)] if isinstance(t, torch.Tensor))
            self.launches[name] += on_gpu
        return out

    def launch(self, kernel, *args, grid, warmup, **constants):
        """Stand for `JITFunction.run`, which launches a kernel."""
        assert all(arg.is_cuda for arg in args if isinstance(arg, torch.Tensor)), (
            f"{kernel.fn.__name__} got a CPU tensor"
        )
        assert all(size >= 1 for size in grid), f"{kernel.fn.__name__} has a grid of {grid}"
        self.launches[kernel.fn.__name__] += 1

    def _look_for_waiting(self, name, tensors, kwargs) -> None:
        waits = False
        devices = {device_type(t) for t in tensors}
        if "cuda" in devices:
            to_cpu = name == "_to_copy" and torch.device(kwargs.get("device") or GPU).type == "cpu"
            across = name == "copy_" and len(devices) > 1
            waits = name in ("_local_scalar_dense", *DYNAMIC) or to_cpu or across
            waits |= name == "index" and any(t.dtype in (torch.bool, torch.uint8) for t in tensors[1:])
        elif name == "_to_copy" and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            waits = not kwargs.get("non_blocking")
            self.late_copies += bool(self.waits)
        if waits and not self.may_wait:
            assert caller() in WAITS, f"{name} in {caller()} makes the CPU wait for the GPU"
            self.waits[caller()] += 1

    def _check_product(self, name, args) -> None:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if caller()[0] not in FP32:
            assert {t.dtype for t in tensors} == {self.dtype}, f"{name} in {caller()} of {[t.dtype for t in tensors]}"
        if self.channels_last and name.startswith("convolution"):
            assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors), (  # images and weight
                f"{name} in {caller()} of strides {[(t.shape, t.stride()) for t in tensors]}"
            )

    def _run(self, name, func, args, kwargs):
        """Run an operator; those of which torch has no fake for CUDA are written out."""
        if name == "_pin_memory":
            return args[0] if isinstance(args[0], FakeTensor) else self.fake.from_tensor(args[0])
        if name == "_local_scalar_dense":
            return 0.0
        out = func(*args, **kwargs)
        if name.startswith("convolution") and args[0].is_contiguous(memory_format=torch.channels_last):
            # As cuDNN does; the fake takes the backend of a machine without a driver.
            out = tree_map_only(torch.Tensor, _channels_last, out)
        return out


def device_type(tensor: torch.Tensor) -> str:
    """Return "cpu" or "cuda"; to ask a fake tensor for its device is an operator of its own."""
    return (tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device).type


@functools.cache
def is_view(func) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images


def caller() -> tuple[str, str]:
    """Return file and function of the package, innermost on the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(ROOT / "crossbatch")):
            return str(Path(path).relative_to(ROOT / "crossbatch")), frame.f_code.co_name
        frame = frame.f_back
    return "autograd", ""


@torch.no_grad()
def backward(loss: torch.Tensor) -> None:
    """Do what `Tensor.backward` does; torch's own engine asks a driver for streams, even with fake tensors."""
    assert loss.grad_fn is not None
    waiting_for: collections.Counter[object] = collections.Counter()
    found: set[Any] = {loss.grad_fn}
    stack: list[Any] = [loss.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waiting_for[node] += 1
                if node not in found:
                    found.add(node)
                    stack.append(node)
    gradients: dict = collections.defaultdict(dict)
    gradients[loss.grad_fn][loss.output_nr] = torch.ones_like(loss)
    ready: list[Any] = [loss.grad_fn]
    while ready:
        node = ready.pop()
        given = gradients.pop(node, {})
        if hasattr(node, "variable"):
            leaf, gradient = node.variable, given[0]
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            continue
        inputs = [given.get(i) for i in range(len(node._input_metadata))]
        outputs, edges = _apply(node, inputs), [edge for edge in node.next_functions if edge[0] is not None]
        for (following, i), gradient in zip(edges, outputs, strict=True):
            if gradient is not None:
                want = following._input_metadata[i]
                gradient = gradient.sum_to_size(want.shape).to(want.dtype)
                assert gradient.device == want.device, following
                mine = gradients[following]
                mine[i] = mine[i] + gradient if i in mine else gradient
            waiting_for[following] -= 1
            if not waiting_for[following]:
                ready.append(following)


def _apply(node, inputs: list) -> list:
    """Return the gradients that a node of the graph gives to its next nodes."""
    if isinstance(node, BackwardCFunction):  # of Python, with a gradient for every argument
        outputs, wanted = node.apply(*inputs), node.needs_input_grad
    else:
        outputs, wanted = node(*inputs), [following is not None for following, _ in node.next_functions]
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [gradient for gradient, wants in zip(outputs, wanted, strict=True) if wants]


class Unsharded(FsdpBackend):
    """Makes the steps of the FSDP2 backend on a model that is not wrapped, which takes no driver and no ranks."""

    def __init__(self, model, cfg):
        self.model, self._clip, self._sharded, self._wrapped = model, 0.0, False, []
        self.optimizer = build_optimizer(parameter_groups(model, cfg.config), cfg.config)

    def backward(self, loss, scale, is_last=True):
        backward(loss * scale)


def attention(q, k, v, **_) -> torch.Tensor:
    """Take a kernel of GPUs; without a driver, torch takes its formula in fp32."""
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]


@contextlib.contextmanager
def a_gpu(capability: tuple[int, int]):
    """Let everything believe in a GPU, and yield the mode of its tensors."""
    patches = {
        "torch.cuda.get_device_capability": lambda *_: capability,
        "torch.cuda.is_bf16_supported": lambda *_: capability >= (8, 0),
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.nn.functional.scaled_dot_product_attention": attention,
        "torch.Tensor.data_ptr": lambda _: 0,
    }
    parameters._scale_and_bias.cache_clear()
    with contextlib.ExitStack() as stack:
        for target, replacement in patches.items():
            stack.enter_context(mock.patch(target, replacement))
        yield stack.enter_context(FakeTensorMode())
    parameters._scale_and_bias.cache_clear()


def step(recipe: str, chunks: int, capability: tuple[int, int], *overrides: str) -> Watch:
    """Make one step of 16 images of 64 px, and return what was watched."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    overrides = (
        "train_batch_size=16",
        f"train_micro_batch_size_per_gpu={16 // chunks}",
        "crossbatch.batchformer.group_size=8",
        "crossbatch.data.image_size=64",
        "crossbatch.data.backend=opencv",
        *overrides,
    )
    cfg = resolve(
        load_config(f"ds_configs/{recipe}.json", list(overrides)), 1, Device("cuda", capability >= (8, 0), "GPU")
    )
    dtype = torch.bfloat16 if capability >= (8, 0) else torch.float16
    with a_gpu(capability) as fake:
        with torch.device(GPU), Watch(fake, dtype, may_wait=True):
            model = build_model(cfg)
        train = TrainStep(Unsharded(model, cfg), cfg, GPU, 10, cfg.chunk)
        views = torch.zeros(2, 16, 64, 64, 3, dtype=torch.uint8).permute(0, 1, 4, 2, 3)
        with Watch(fake, dtype, may_wait=True):
            parameters.normalize(views[0].to(GPU))  # which keeps two constants on the GPU
            train.backend.local_optimizer_state()  # which the first step would make
        watch = Watch(fake, dtype, channels_last="resnet" in cfg.crossbatch.model.arch)
        with watch, contextlib.ExitStack() as patches:
            for kind in (JITFunction, InterpretedFunction):
                patches.enter_context(mock.patch.object(kind, "run", lambda *args, **more: watch.launch(*args, **more)))
            result = train(views)
    output = result.output
    assert {value.dtype for value in (output.loss, *output.terms.values(), *output.signals.values())} == {torch.float32}
    assert {value.device for value in (output.loss, *output.terms.values(), *output.signals.values())} == {GPU}
    return watch


# Launches of a step as they are: lower a number with every kernel that is saved.
LAUNCHES = {("bs4096", 1): 2045, ("bs4096", 2): 3948, ("vits_bs4096", 1): 1150, ("vits_bs4096", 2): 2447}


@pytest.mark.parametrize(("recipe", "chunks"), LAUNCHES)
def test_a_step_waits_once_and_launches_what_it_must(recipe, chunks):
    capability = (8, 0) if recipe == "bs4096" else (7, 0)  # bf16 and fp16
    watch = step(recipe, chunks, capability)
    assert dict(watch.waits) == dict.fromkeys(WAITS, 1)
    assert watch.late_copies == 0  # LARS has sent its tables before
    assert sum(watch.launches.values()) <= LAUNCHES[recipe, chunks], watch.launches.most_common(20)


# In passes of torch's kernels, a norm took 31 launches forward and 22 backward.
NORM_LAUNCHES = {"forward": 9, "backward": 5}


def test_a_norm_launches_little():
    """With both views, running statistics, weight, bias and a ReLU, channels last."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    with a_gpu((8, 0)) as fake:
        with torch.device(GPU), Watch(fake, torch.bfloat16, may_wait=True):
            norm = ViewBatchNorm(64, num_views=2)
            x = torch.empty(4, 64, 8, 8, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
            x.requires_grad_()
            dy = torch.empty_like(x)
        counts = {}
        with contextlib.ExitStack() as patches:
            watch = patches.enter_context(Watch(fake, torch.bfloat16))
            for kind in (JITFunction, InterpretedFunction):
                patches.enter_context(mock.patch.object(kind, "run", lambda *args, **more: watch.launch(*args, **more)))
            y = norm(x, relu=True)
            counts["forward"] = watch.launches.copy()
            _apply(y.grad_fn, [dy])
            counts["backward"] = watch.launches - counts["forward"]
    for name, launches in counts.items():
        assert 0 < sum(launches.values()) <= NORM_LAUNCHES[name], launches


class ElementwiseBytes(Watch):
    """Counts the bytes that everything but products reads and writes; a view norm's pass is one operator."""

    def __init__(self, fake: FakeTensorMode):
        super().__init__(fake, torch.bfloat16)
        self.bytes: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        out = self._run(name, func, args, kwargs or {})
        if not (is_view(func) or name.startswith(("prim::", "new_")) or name in (*NO_KERNEL, *PRODUCTS, "_to_copy")):
            given = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            tensors = [*given.values(), *(t for t in tree_leaves(out) if isinstance(t, torch.Tensor))]
            self.bytes[name] += sum(t.nbytes for t in tensors)
        return out


# Of an image (two views of 224 px, bf16) through a ResNet-50 and back, with statistics, normalising, additions and ReLUs in
# kernels of their own, and a copy of each norm's gradient: counted in the same way at commit b5fc359.
BYTES_OF_SINGLE_PASSES, BYTES_OF_POOLING = 836.8e6, 17.7e6


def test_a_resnet_moves_few_bytes_between_its_convolutions():
    images = 2
    with a_gpu((8, 0)) as fake:
        with torch.device(GPU), Watch(fake, torch.bfloat16, may_wait=True):
            backbone = build_backbone("resnet50")
            x = torch.empty(2 * images, 3, 224, 224, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        with ElementwiseBytes(fake) as count:
            with torch.autocast("cuda", torch.bfloat16):
                features = backbone(x)
            backward(features.float().sum())
    pooling = sum(moved for name, moved in count.bytes.items() if "pool" in name) / images
    assert pooling == pytest.approx(BYTES_OF_POOLING, rel=0.01)
    moved = sum(count.bytes.values()) / images - pooling
    assert moved <= (BYTES_OF_SINGLE_PASSES - BYTES_OF_POOLING) / 1.8, count.bytes.most_common(10)


FAULTS = {
    "a CPU tensor": (lambda f: f.std() + torch.ones(2).sum(0, keepdim=True), RuntimeError, "device"),
    "item": (lambda f: f.std() * f.mean().item(), AssertionError, "_local_scalar_dense in .*contrast"),
    "copy to the CPU": (lambda f: f.std().cpu(), AssertionError, "_to_copy in .*contrast"),
    "nonzero": (lambda f: f[f > 0].std(), AssertionError, "index in .*contrast"),
    "copy of pageable memory": (lambda f: f.std() * torch.ones(2).to(f.device)[0], AssertionError, "_to_copy in .*"),
    "product in fp32": (lambda f: torch.ops.aten.mm(f.float(), f.float().T).mean(), AssertionError, "mm in .*contrast"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(monkeypatch, fault):
    signal, error, message = FAULTS[fault]

    def feature_std(features):
        with torch.autocast("cuda", enabled=False):
            return signal(features)

    monkeypatch.setattr("crossbatch.models.moco.feature_std", feature_std)
    with pytest.raises(error, match=message):
        step("vits_bs4096", 1, (8, 0), 'crossbatch.model.backbone_args={"depth": 1}')
