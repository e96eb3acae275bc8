"""Parts of the model compiled: no break in a graph, the same numbers, nothing compiled twice, the same names."""

import copy

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config

from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.models import MoCo, build_backbone, compiled
from crossbatch.models.backbones import blocks
from crossbatch.models.classifier import Classifier
from tests.small_runs import ADAMW, BASE, RESNET, VIT, fsdp, losses, name_of, pretrainer, run, zero

# torch looks at `.grad` of every input while it traces.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

SIZES = {"image_size": 16, "projection_dim": 8, "mlp_dim": 16, "group_size": 4, "batchformer_loss": "sum"}
ARCHS = {
    "vit_small": {"backbone_args": {"embed_dim": 24, "depth": 3, "num_heads": 2, "patch_size": 4}},
    "resnet18": {"stem": "small", "backbone_args": {"width": 8}},
}


@pytest.fixture
def counter(monkeypatch) -> CompileCounterWithBackend:
    """Count graphs; autograd is traced, as it is for inductor, and then torch's own operators run."""
    torch.compiler.reset()
    found = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiled, "BACKEND", found)
    return found


def build(arch: str, **more) -> MoCo:
    torch.manual_seed(0)
    return MoCo(arch, **{**SIZES, **ARCHS[arch], **more})


def train(model: MoCo, steps: int, images: int = 8) -> list[torch.Tensor]:
    """Return the losses, then the parameters, of some steps of SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for step in range(steps):
        views = torch.randn(2 * images, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        loss = model("loss", views, step, 0).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_momentum(0.9)
        found.append(loss.detach())
    return [*found, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [
        ("vit_small", None),
        ("resnet18", torch.bfloat16),
        pytest.param("vit_small", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("resnet18", None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_computes_what_it_did_before(counter, arch, dtype):
    """With BatchFormer's dropout, whose masks are a function of their seeds."""
    want, model = build(arch), build(arch)
    names = list(model.state_dict())
    model.compile_regions()
    want.autocast_dtype = model.autocast_dtype = dtype
    for found, expected in zip(train(model, 3), train(want, 3), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5 if dtype is None else 2e-2, atol=1e-6)
    assert counter.frame_count > 0
    assert list(model.state_dict()) == names == [*want.state_dict()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in want.named_parameters()]


@pytest.mark.long
def test_equal_blocks_are_compiled_once_and_nothing_after_the_first_step(counter):
    counts = []
    for depth in (2, 5):
        torch.compiler.reset()
        counter.frame_count = 0
        model = build("vit_small", backbone_args=ARCHS["vit_small"]["backbone_args"] | {"depth": depth})
        model.compile_regions()
        train(model, 1)
        counts.append(counter.frame_count)
        train(model, 2)
        assert counter.frame_count == counts[-1]
    assert counts[0] == counts[1]
    model.eval()
    with torch.no_grad():
        model.online.backbone(torch.randn(3, 3, 16, 16))
    assert counter.frame_count == counts[-1]  # evaluation is not compiled


def test_a_break_in_a_graph_is_an_error(counter, monkeypatch):
    model = build("vit_small")
    model.compile_regions()
    assert model.batchformer is not None
    monkeypatch.setattr(type(model.batchformer.norm2), "forward", lambda *_: torch._dynamo.graph_break())
    with pytest.raises(Unsupported):
        train(model, 1)


def test_a_copy_of_a_compiled_model_computes_with_its_own_parameters(counter):
    model = build("vit_small")
    model.compile_regions()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        x = torch.randn(2, 17, 24)
        assert blocks(copied.online.backbone)[0](x).equal(x)  # only the shortcut is left
        assert not blocks(model.online.backbone)[0](x).equal(x)


@pytest.mark.long
def test_stochastic_depth_draws_the_same_numbers(counter):
    """Only fine-tuning has it, which compiles nothing yet: each rate is a case of its own."""
    found = []
    for compiles in (False, True):
        torch.manual_seed(0)
        backbone = build_backbone("vit_small", 16, backbone_args=ARCHS["vit_small"]["backbone_args"])
        model = Classifier(backbone, 3, drop_path=0.5)
        for block in blocks(backbone) if compiles else ():
            compiled.compile_method(block, "forward")
        found.append(model("logits", torch.randn(8, 3, 16, 16)))
    torch.testing.assert_close(found[0], found[1])
    assert counter.frame_count > 0


def test_with_a_cuda_graph_only_blocks_are_compiled(counter):
    model = build("vit_small", cuda_graph=True)
    model.compile_regions()
    assert compiled.compiled_modules(model) == [*blocks(model.online.backbone), *blocks(model.momentum.backbone)]
    with pytest.raises(ValueError, match="compile is true, but with cuda_graph only the blocks of a ViT"):
        build("resnet18", cuda_graph=True).compile_regions()


# Inductor of torch 2.10 calls what torch deprecates.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_a_missing_compiler_is_named():
    """Inductor itself says so, of a compiler that is not there."""
    torch.compiler.reset()
    model = build("resnet18")
    message = r"^compile is true, but torch.compile cannot compile for cpu here: .*no-such"
    with (
        inductor_config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(ValueError, match=message),
    ):
        model.compile_regions()
    assert not compiled.compiled_modules(model)


# --- on ranks -------------------------------------------------------------------------------------------------------

CHUNKED = [
    "train_micro_batch_size_per_gpu=4",
    "crossbatch.batchformer.dropout=0.5",
    "crossbatch.model.checkpoint_activations=true",
]


def seven_images_a_rank(ranks: int) -> list[str]:
    """In chunks of 4 and 3."""
    return [*CHUNKED, f"train_batch_size={7 * ranks}", f"crossbatch.batchformer.group_size={7 * ranks}"]


def compiled_run(overrides: list[str], out: str) -> list[int]:
    """Train three steps on this rank; return how many graphs there were after each."""
    torch.compiler.reset()
    compiled.BACKEND = CompileCounterWithBackend("aot_eager")
    cfg = resolve(load_config(None, [*BASE, *overrides]), world_from_environment().size, Device("cpu"))
    trainer = pretrainer(cfg, out, "none", 3)
    counts, train_on = [], trainer.task.train_on

    def train_and_count(step, batch):
        result = train_on(step, batch)
        counts.append(compiled.BACKEND.frame_count)
        return result

    trainer.task.train_on = train_and_count
    trainer.train()
    return counts


@pytest.mark.long  # every rank compiles all graphs: 10 s
@pytest.mark.parametrize(
    ("model", "backend", "ranks"),
    [
        (VIT, zero(3), 1),
        (RESNET, fsdp(1), 2),
        pytest.param(VIT, zero(3), 2, marks=pytest.mark.slow),
        pytest.param(VIT, fsdp(3), 2, marks=pytest.mark.slow),
        pytest.param(VIT, zero(1), 2, marks=pytest.mark.slow),
        pytest.param(RESNET, zero(3), 2, marks=pytest.mark.slow),
    ],
    ids=lambda case: f"{case}" if isinstance(case, int) else name_of(case),
)
def test_ranks_compute_what_they_did_before(tmp_path, pools, model, backend, ranks):
    overrides = [*model, *ADAMW, *backend, *seven_images_a_rank(ranks)]
    pools(ranks).run(run_plainly, overrides, str(tmp_path / "plain"))
    compiling = [*overrides, "crossbatch.model.compile=true"]
    for counts in pools(ranks).run(compiled_run, compiling, str(tmp_path / "compiled")):
        assert counts[0] > 5 and counts == counts[:1] * 3  # nothing is compiled after the first step
    assert len(losses(tmp_path / "plain")) == 3
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def run_plainly(overrides: list[str], out: str) -> None:
    assert run(overrides, out, 3) == ""


@pytest.mark.long
def test_a_resumed_run_may_compile(tmp_path, one_rank):
    out = str(tmp_path / "run")
    assert one_rank.run(run, [*VIT, *ADAMW, *zero(0)], out, 2) == [""]
    patches = (("crossbatch.models.compiled.BACKEND", _counter),)
    compiling = [*VIT, *ADAMW, *zero(0), "crossbatch.model.compile=true"]
    assert one_rank.run(run, compiling, out, 4, "auto", (), patches) == [""]
    assert "torch.compile: 4 x Block, 8 x Linear, 1 x BatchFormer" in (tmp_path / "run.told").read_text()


def test_a_missing_compiler_stops_a_run_before_its_first_step(tmp_path, one_rank):
    patches = (("crossbatch.models.compiled.BACKEND", _broken),)
    (stopped,) = one_rank.run(
        run, [*VIT, "crossbatch.model.compile=true"], str(tmp_path / "run"), 2, "auto", (), patches
    )
    assert stopped == (
        "InputError: crossbatch.model.compile is true, but torch.compile cannot compile for cpu here: no cc; install a C++ "
        "compiler (g++), or set it to false"
    )


def _counter():
    return CompileCounterWithBackend("aot_eager")


def _broken():
    def backend(*_):
        raise RuntimeError("no cc")

    return backend
