"""`chunked_backward` in loops that are not the engine's: gradients and weights are those of the unchunked step."""

import contextlib
import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from crossbatch.engine.chunked import chunked_backward
from crossbatch.models.batchformer import BatchFormer
from crossbatch.models.norm import ViewBatchNorm
from tests.small_runs import slow_unless

ROWS, PIXELS, WIDTH = 10, 8, 16


class SmallViT(nn.Module):
    """Turn images [n, 3, 8, 8] into features [n, 16], with dropout in both passes' way."""

    def __init__(self, dropout: float = 0.2):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.patches(images).flatten(2).transpose(1, 2)).mean(1)


class Towers(nn.Module):
    """Turn images [n, 3, 8, 8] and tokens [n, 5] into two features [n, 16] and a scale, as open_clip's model."""

    def __init__(self):
        super().__init__()
        self.image, self.text = SmallViT(0.0), nn.EmbeddingBag(20, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10.0)]))  # FSDP2 and DeepSpeed take no 0-dim parameters

    def forward(self, images: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.image(images), self.text(tokens), self.logit_scale.exp().squeeze()


class WithHead(nn.Module):
    """Hold all modules, as one DeepSpeed engine holds it: images -> features, features -> projections."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = SmallViT(0.0), nn.Linear(WIDTH, 8)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.head(rows) if rows.dim() == 2 else self.backbone(rows)


def nt_xent(features_VnC: torch.Tensor) -> torch.Tensor:
    """Return SimCLR's loss over the local batch (Chen et al., 2020, equation 1), temperature 0.5."""
    z = F.normalize(features_VnC.flatten(0, 1), dim=-1)
    similarity = (z @ z.T / 0.5).fill_diagonal_(-1e9)
    n = len(z) // 2
    return F.cross_entropy(similarity, torch.arange(2 * n).roll(n))


def clip_loss(features: tuple[torch.Tensor, ...]) -> torch.Tensor:
    images, texts, scale = features
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    truth = torch.arange(len(logits))
    return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2


def two_views(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, ROWS, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(seed))


def pairs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(ROWS, 3, PIXELS, PIXELS, generator=generator)
    return images, torch.randint(20, (ROWS, 5), generator=generator)


def gradients(module: nn.Module) -> dict[str, Any]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def unchunked(module: nn.Module, views, loss_of_features) -> tuple[torch.Tensor, dict]:
    """Run the same step in plain torch."""
    module = copy.deepcopy(module)
    if isinstance(views, torch.Tensor):
        loss = loss_of_features(module(views.flatten(0, 1)).unflatten(0, (len(views), -1)))
    else:
        loss = loss_of_features(module(*views))
    loss.backward()
    return loss.detach(), gradients(module)


def assert_same(found: dict, want: dict) -> None:
    assert found.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("chunk", [1, 3, 5, 9, 10, 99])
@pytest.mark.parametrize(
    ("module", "views", "loss_of_features"),
    [(SmallViT(0.0), two_views(), nt_xent), (Towers(), pairs(), clip_loss)],
    ids=["SimCLR", "CLIP"],
)
def test_gradients_are_those_of_the_unchunked_step(module, views, loss_of_features, chunk):
    module = copy.deepcopy(module)
    want = unchunked(module, views, loss_of_features)
    loss = chunked_backward(module, views, loss_of_features, chunk=chunk)
    torch.testing.assert_close(loss, want[0], rtol=1e-6, atol=1e-6)
    assert_same(gradients(module), want[1])
    chunked_backward(module, views, loss_of_features, chunk=chunk)
    assert_same(gradients(module), {name: 2 * gradient for name, gradient in want[1].items()})  # they add up


def test_each_row_passes_twice_but_those_of_the_last_chunk_and_the_loss_is_called_once():
    rows, calls = [], []

    class Counting(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            rows.append((len(input), torch.is_grad_enabled()))
            return super().forward(input)

    def loss_of_features(features):
        calls.append(features.shape)
        return nt_xent(features)

    chunked_backward(Counting(4, 4), torch.randn(2, 10, 4), loss_of_features, chunk=4)
    assert rows == [(8, False), (6, False), (6, True), (8, True), (6, True)]
    assert calls == [(2, 10, 4)]


@pytest.mark.parametrize("chunk", [3, 10])
def test_dropout_draws_the_same_numbers_in_both_passes_and_others_in_the_next_step(chunk):
    """The gradient is that of the masks of the first pass, chunk after chunk."""
    torch.manual_seed(0)
    module = SmallViT(0.3)
    want = copy.deepcopy(module)
    torch.manual_seed(1)
    losses = [chunked_backward(module, two_views(), nt_xent, chunk=chunk) for _ in range(2)]
    after = torch.rand(1)
    torch.manual_seed(1)
    for expected in losses:
        chunks = [
            want(views.flatten(0, 1)).unflatten(0, (2, -1)) for views in two_views().tensor_split(-(-ROWS // chunk), 1)
        ]
        loss = nt_xent(torch.cat(chunks, 1))
        loss.backward()
        torch.testing.assert_close(expected, loss.detach(), rtol=1e-6, atol=1e-6)
    assert losses[0] != losses[1]
    assert_same(gradients(module), gradients(want))
    assert torch.equal(torch.rand(1), after)  # and the stream goes on as if every chunk had passed once


class ConvNet(nn.Sequential):
    def __init__(self, norm: nn.Module):
        super().__init__(nn.Conv2d(3, 8, 3, 2), norm, nn.ReLU(), nn.Conv2d(8, WIDTH, 3), nn.Flatten())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_plain_batch_norm_sees_chunks_and_moves_its_statistics_once_for_each(momentum):
    torch.manual_seed(0)
    module = ConvNet(nn.BatchNorm2d(8, momentum=momentum))
    want = copy.deepcopy(module)
    chunked_backward(module, two_views(), nt_xent, chunk=4)
    chunks = [want(views.flatten(0, 1)).unflatten(0, (2, -1)) for views in two_views().tensor_split(3, 1)]
    nt_xent(torch.cat(chunks, 1)).backward()
    assert_same(gradients(module), gradients(want))
    for name, buffer in want.named_buffers():
        torch.testing.assert_close(dict(module.named_buffers())[name], buffer, msg=name)
    assert module[1].num_batches_tracked == 3 and module[1].track_running_stats


def test_frozen_batch_norm_stays_frozen():
    torch.manual_seed(0)
    module = ConvNet(nn.BatchNorm2d(8)).eval()
    before = copy.deepcopy(module.state_dict())
    want = unchunked(module, two_views(), nt_xent)
    chunked_backward(module, two_views(), nt_xent, chunk=4)
    assert_same(gradients(module), want[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_view_batch_norm_moves_its_statistics_once_a_step():
    """k chunks together weigh as much as one batch, and afterwards a call weighs as much as before."""
    torch.manual_seed(0)
    module = ConvNet(ViewBatchNorm(8))
    norm = module[1]
    chunked_backward(module, torch.cat([two_views()[:, :5]] * 2, 1), nt_xent, chunk=5)  # two equal chunks
    whole = ConvNet(ViewBatchNorm(8))
    whole.load_state_dict(module.state_dict())
    for buffer in ("running_mean", "running_var"):
        assert getattr(norm, buffer).abs().sum() > 0
    rows = module[0](two_views()[:, :5].flatten(0, 1)).unflatten(0, (2, -1))
    kept = 0.9**0.5
    mean = torch.zeros(8)
    for _ in range(2):
        for view in rows:
            mean = mean * kept + (1 - kept) * view.mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, mean)
    assert norm.num_chunks == 1 and norm.statistics is None
    with pytest.raises(ValueError, match=r"views: has 3 views, but the norm '1' of the backbone has num_views = 2"):
        chunked_backward(module, torch.randn(3, 4, 3, 8, 8), nt_xent, chunk=2)


@pytest.mark.parametrize("chunk", [4, 10])
def test_autocast_holds_for_both_passes_and_keeps_gradients(chunk):
    """Weights that autocast cast in a pass without gradient must not serve the passes with gradient."""
    torch.manual_seed(0)
    module = SmallViT(0.0)
    dtypes = []
    module.patches.register_forward_hook(lambda *call: dtypes.append(call[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        chunked_backward(module, two_views(), lambda features: nt_xent(features.float()), chunk=chunk)
    assert set(dtypes) == {torch.bfloat16}
    found, (_, want) = gradients(module), unchunked(module, two_views(), nt_xent)
    for name, gradient in want.items():
        assert found[name] is not None, name
        error = (found[name] - gradient).norm()
        assert error < 0.05 * gradient.norm() + 1e-3, name


def test_a_scaler_scales_once():
    """The gradients carry the scale once, whatever `backward` multiplies scalars by; the returned loss carries none."""
    module = SmallViT(0.0)
    loss, want = unchunked(module, two_views(), nt_xent)
    scalars = []

    def backward(scalar: torch.Tensor) -> None:
        scalars.append(scalar)
        (scalar * 1024).backward()

    found = chunked_backward(module, two_views(), nt_xent, chunk=4, backward=backward)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-6)
    assert_same({name: g / 1024 for name, g in gradients(module).items()}, want)
    assert len(scalars) == 1 + 3


def test_features_without_gradient_pass_through():
    """A frozen text tower (LiT): its features are computed once a chunk, and nothing flows back."""
    module = Towers()
    module.text.requires_grad_(False)
    want = unchunked(module, pairs(), clip_loss)
    loss = chunked_backward(module, pairs(), clip_loss, chunk=4)
    torch.testing.assert_close(loss, want[0], rtol=1e-6, atol=1e-6)
    assert_same(gradients(module), want[1])


def test_a_batchformer_in_evaluation_or_in_the_loss_is_no_matter():
    backbone, mix = nn.Sequential(nn.Linear(4, 4), BatchFormer(4, 2).eval()), BatchFormer(4, 6)
    chunked_backward(backbone, torch.randn(2, 6, 4), lambda f: mix(f, 0, 0).square().mean(), chunk=2)
    assert all(p.grad is not None for p in (*backbone[0].parameters(), *mix.parameters()))
    assert not backbone[1]._forward_pre_hooks


def test_a_backbone_that_is_not_repeatable_is_found_out():
    class Restless(nn.Linear):
        calls = 0

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(input) * self.calls

    with pytest.raises(RuntimeError, match="the second pass of a chunk gave different features"):
        chunked_backward(Restless(4, 4), torch.randn(2, 10, 4), nt_xent, chunk=4)


class Frozen(nn.Identity): ...


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"chunk": 0}, ValueError, "chunk: given 0; allowed: an integer >= 1"),
        ({"chunk": 2.0}, ValueError, "chunk: given 2.0"),
        ({"views": torch.randn(2, 0, 4)}, ValueError, r"views: given shapes \[\[2, 0, 4\]\]"),
        ({"views": ()}, ValueError, r"views: given shapes \[\]"),
        ({"views": torch.randn(4)}, ValueError, r"views: given shapes \[\[4\]\]"),
        ({"views": (torch.randn(3, 4), torch.randn(2, 4))}, ValueError, "must have the same number of rows"),
        ({"views": ("images",)}, TypeError, r"views: given \['str'\]"),
        ({"views": [torch.randn(3, 4)] * 2}, TypeError, r"views: given list; allowed: .* torch.stack\(views\)"),
        ({"backbone": F.relu}, TypeError, "backbone: given function; allowed: an nn.Module"),
        ({"backbone": nn.Sequential(nn.Linear(4, 4), BatchFormer(4, 2))}, ValueError, "backbone: calls a BatchFormer"),
        ({"backbone": Frozen()}, ValueError, "backbone: its features carry no gradient"),
        ({"backbone": nn.LSTM(4, 4)}, TypeError, "backbone: returned tuple; allowed: a tensor or a tuple of tensors"),
        (
            {"backbone": nn.Sequential(nn.Linear(4, 4), nn.Flatten(0))},
            ValueError,
            r"returned \[16\] for a chunk of 4 rows",
        ),
        ({"loss_of_features": lambda f: f}, ValueError, r"loss_of_features: returned a tensor \[2, 3, 4\]"),
        ({"loss_of_features": lambda f: f.sum().item()}, TypeError, "loss_of_features: returned float"),
        ({"loss_of_features": lambda f: f.detach().sum()}, ValueError, "the loss carries no gradient"),
        (
            {"loss_of_features": lambda f: nn.Parameter(torch.ones(())) * 2},
            ValueError,
            "the loss does not depend on the features",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    defaults = {
        "backbone": nn.Linear(4, 4),
        "views": torch.randn(2, 3, 4),
        "loss_of_features": lambda features: features.sum(),
        "chunk": 2,
    }
    with pytest.raises(error, match=message):
        chunked_backward(**(defaults | arguments))


# --- wrapped, on two ranks ---------------------------------------------------------------------------------------------


def wrapped(kind: str, module: nn.Module, **options):
    """Return `module` wrapped as a user would, and what steps it."""
    if kind.startswith("zero"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        config = {
            "train_micro_batch_size_per_gpu": ROWS,
            "zero_optimization": {"stage": int(kind[-1]), "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # the default is 1.0
        }
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
        return engine, engine
    if kind == "ddp":
        module = DistributedDataParallel(module, **options)
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for child in module.children():
            fully_shard(child)
        fully_shard(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    return module, optimizer


def weights(kind: str, wrapper) -> dict[str, torch.Tensor]:
    if kind == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(wrapper.module.parameters())):
            return {name: p.detach().clone() for name, p in wrapper.module.named_parameters()}
    module = wrapper if kind in ("plain", "fsdp") else wrapper.module
    full = {n: p.full_tensor() if kind == "fsdp" else p for n, p in module.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in full.items()}


MODELS = {"simclr": (lambda: SmallViT(0.0), two_views), "clip": (Towers, pairs), "head": (WithHead, two_views)}


def foreign_loop(kind: str, model: str, chunk: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Run three steps of somebody else's loop on this rank; return losses and the weights at the end."""
    torch.manual_seed(0)
    build, data = MODELS[model]
    module = build()
    rank = dist.get_rank()
    if kind == "plain":  # one process that sees both ranks' batches, and averages their losses
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
        wrapper = module
    else:
        wrapper, optimizer = wrapped(kind, module, **({"find_unused_parameters": True} if model == "head" else {}))

    def loss_of(features):
        if model == "clip":
            return clip_loss(features)
        return nt_xent(features if model == "simclr" else wrapper(features.flatten(0, 1)).unflatten(0, (2, -1)))

    losses = []
    for step in range(3):
        if kind == "plain":
            loss = torch.zeros(())
            for other in range(2):
                views = data(2 * step + other)
                stacked = isinstance(views, torch.Tensor)
                features = module(views.flatten(0, 1)).unflatten(0, (2, -1)) if stacked else module(*views)
                loss = loss + loss_of(features) / 2
            loss.backward()
        else:
            loss = chunked_backward(wrapper, data(2 * step + rank), loss_of, chunk=chunk)
            dist.all_reduce(loss)
            loss /= 2
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    return losses, weights(kind, wrapper)


@pytest.fixture(scope="module")
def plain(two_ranks):
    known = {}

    def get(model: str):
        if model not in known:
            known[model] = two_ranks.run(foreign_loop, "plain", model, 0)[0]
        return known[model]

    return get


KINDS = ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]


def wrappers():
    for kind, model, chunk in itertools.product(KINDS, ("simclr", "clip", "head"), (4, 10)):
        often = chunk == 4 and (model == "simclr" or kind in ("ddp", "zero1"))
        yield pytest.param(kind, model, chunk, marks=slow_unless(often), id=f"{kind}-{model}-{chunk}")


@pytest.mark.parametrize(("kind", "model", "chunk"), [*wrappers()])
def test_under_a_wrapper_weights_are_those_of_one_process(two_ranks, plain, kind, model, chunk):
    want, end = plain(model)
    for losses, found in two_ranks.run(foreign_loop, kind, model, chunk):
        assert losses == pytest.approx(want, rel=1e-5)
        for name, tensor in end.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def reductions(kind: str, chunk: int) -> int:
    """Count how many times a step on this rank sums over ranks, once everything is warm."""
    torch.manual_seed(0)
    wrapper, optimizer = wrapped(kind, SmallViT(0.0))
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    for step in range(3):
        with profile if step == 2 else contextlib.nullcontext():
            chunked_backward(wrapper, two_views(step), nt_xent, chunk=chunk)
        optimizer.step()
        optimizer.zero_grad()
    events: Any = profile.events()
    return sum("gloo:" in event.name and "reduce" in event.name for event in events)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=slow_unless(kind in ("ddp", "fsdp", "zero1"))) for kind in KINDS]
)
def test_gradients_are_exchanged_once_a_step(two_ranks, kind):
    whole, chunked = (two_ranks.run(reductions, kind, chunk) for chunk in (10, 3))
    assert whole == chunked and whole[0] > 0


def in_a_trap(trap: str) -> str:
    """Return what `chunked_backward` says on this rank to a loop that would drift apart, or to one that is right."""
    torch.manual_seed(0)
    views, head = two_views(dist.get_rank()), nn.Linear(WIDTH, 8)
    net = DistributedDataParallel(WithHead().backbone)
    plain_head: nn.Module = head if trap != "wrapped head" else DistributedDataParallel(head)

    def with_head(features):
        return nt_xent(plain_head(features))

    backbone = {"module of DDP": net.module, "unwrapped": SmallViT(0.0)}.get(trap, net)
    loss_of = with_head if "head" in trap else nt_xent
    try:
        if trap == "own no_sync":
            with net.no_sync():
                chunked_backward(net, views, loss_of, chunk=4)
            local = torch.stack([g.norm() for g in gradients(net).values()])
            chunked_backward(net, views, loss_of, chunk=4)
            assert net.require_backward_grad_sync
            norms = torch.stack([g.norm() for g in gradients(net).values()])
            mean = norms.clone()
            dist.all_reduce(mean)
            torch.testing.assert_close(mean / 2, norms)
            assert not torch.equal(norms, local)
        else:
            chunked_backward(backbone, views, loss_of, chunk=4, check_sync="unchecked" not in trap)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "trap", ["module of DDP", "unwrapped", "head", "head, unchecked", "wrapped head", "own no_sync"]
)
def test_gradients_that_nothing_averages_are_refused_in_the_first_call(two_ranks, trap):
    for message in two_ranks.run(in_a_trap, trap):
        if trap in ("head, unchecked", "wrapped head", "own no_sync"):
            assert message == ""
        else:
            assert "differ between ranks" in message and "check_sync=False" in message
            assert ("in loss_of_features" in message) == (trap == "head")


def refuses_a_static_graph() -> bool:
    with pytest.raises(ValueError, match="static_graph=True"):
        chunked_backward(wrapped("ddp", SmallViT(), static_graph=True)[0], two_views(), nt_xent, chunk=4)
    return True


def test_a_static_graph_is_refused(two_ranks):
    assert two_ranks.run(refuses_a_static_graph) == [True, True]


def refused_by_deepspeed(case: str) -> str:
    torch.manual_seed(0)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    module = SmallViT(0.0)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": 2 if case == "accumulation" else 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
    }
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    head = nn.Linear(WIDTH, 8)
    if case == "scaled head":
        engine.optimizer.override_loss_scale(1024.0)  # pyright: ignore
    try:
        backbone = {"inside": nn.Sequential(engine), "module": engine.module}.get(case, engine)
        backward = torch.Tensor.backward if case == "backward" else None
        chunked_backward(backbone, two_views(), lambda f: nt_xent(head(f)), chunk=4, backward=backward)
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("accumulation", "gradient_accumulation_steps = 2; set it to 1"),
        ("scaled head", "uses parameters that the DeepSpeed engine does not know"),
        ("inside", "contains a DeepSpeed engine"),
        ("module", "pass the engine, not its .module"),
        ("backward", "backward: leave it out with a DeepSpeed engine"),
    ],
)
def test_what_deepspeed_would_compute_wrongly_is_refused(one_rank, case, message):
    (found,) = one_rank.run(refused_by_deepspeed, case)
    assert message in found


def after_a_failure(kind: str) -> bool:
    """Tell whether a step is as it should be after one in which the loss raised."""
    torch.manual_seed(0)
    module = SmallViT(0.0)
    want = unchunked(module, two_views(), nt_xent)[1]
    wrapper, _ = wrapped(kind, module)

    def failing(features):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        chunked_backward(wrapper, two_views(), failing, chunk=4)
    chunked_backward(wrapper, two_views(), nt_xent, chunk=4)
    found = {name.removeprefix("module."): gradient for name, gradient in gradients(wrapper).items()}
    assert_same({n: g.full_tensor() if kind == "fsdp" else g for n, g in found.items()}, want)
    return True


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_step_that_failed_leaves_the_wrapper_as_it_was(two_ranks, kind):
    assert two_ranks.run(after_a_failure, kind) == [True, True]


def test_an_output_without_rows_that_differs_between_chunks_is_refused():
    """The last chunk's value would silently stand for the whole batch."""

    class WithAuxiliaryLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            y = self.linear(x)
            return y, y.square().mean()

    x = torch.randn(1, 8, 4)
    with pytest.raises(ValueError, match="differs between chunks"):
        chunked_backward(WithAuxiliaryLoss(), x, lambda f: f[0].mean() + f[1], chunk=2)
    chunked_backward(WithAuxiliaryLoss(), x, lambda f: f[0].mean() + f[1], chunk=8)  # one chunk: nothing to disagree
