"""LARS against its formulas in float64, whole and cut, on both devices' passes; and who decays and adapts."""

import weakref

import pytest
import torch

from crossbatch.engine.config import load_config
from crossbatch.engine.optimizers import LARS, Layout, Segment, lars, lars_cpu, lars_cuda, set_learning_rate
from crossbatch.engine.tasks.build import build_optimizer, parameter_groups
from crossbatch.models import MoCo

VARIANTS = [
    {"variant": "moco-v3"},
    {"variant": "larc", "eps": 0.1},
    {"variant": "larc", "eps": 0.1, "clip_trust_ratio": True},
    {"variant": "mlperf", "eps": 0.1},
    {"variant": "mlperf", "eps": 0.1, "decay_after_momentum": True},
]
WD, TC, M = 0.1, 0.3, 0.9
SHAPES = [(4, 3), (3, 3), (2, 2, 2), (200, 50), (5,), (1,)]  # one of more than a program's 8192 elements


def formula(variant, w, g, v, lr, adapts):
    """One step of one parameter, written out: new w and v."""
    name, eps = variant["variant"], variant.get("eps")
    wd = WD if adapts else 0.0
    if name == "moco-v3":
        d = g + wd * w
        q = TC * w.norm() / d.norm() if adapts and w.norm() > 0 and d.norm() > 0 else 1.0
        v = M * v + q * d
        return w - lr * v, v
    usable = w.norm() > 0 and g.norm() > 0
    q = TC * w.norm() / (g.norm() + wd * w.norm() + eps) if adapts and usable else 1.0
    if name == "larc":
        if adapts and not usable:
            wd = 0.0
        elif adapts and variant.get("clip_trust_ratio"):
            q = min(q / lr, 1.0)
        v = M * v + q * (g + wd * w)
        return w - lr * v, v
    if variant.get("decay_after_momentum"):
        v = M * v + lr * q * g
        return w - v - lr * q * wd * w, v
    v = M * v + lr * q * (g + wd * w)
    return w - v, v


def groups(parameters):
    return [
        {
            "params": [p for p in parameters if (p.ndim > 1) == adapts],
            "adapts": adapts,
            "weight_decay": WD if adapts else 0.0,
            "lr_scale": 1.0 if adapts else 0.5,
        }
        for adapts in (True, False)
    ]


@pytest.mark.parametrize("passes", ["cpu", "interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_lars_follows_its_formula(variant, passes, monkeypatch):
    """`interpreted`: the Triton kernels of `cuda` on a CPU."""
    device = "cuda" if passes == "cuda" else "cpu"
    monkeypatch.setattr(lars, "_passes", lambda _: lars_cpu if passes == "cpu" else lars_cuda)
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in SHAPES]
    parameters[1].data.zero_()
    optimizer = LARS(groups(parameters), lr=0.0, momentum=M, trust_coefficient=TC, **variant)
    values = [p.detach().double() for p in parameters]
    velocities = [torch.zeros_like(v) for v in values]
    for step in range(3):
        lr = 0.3 * (step + 1)
        set_learning_rate(optimizer, lr)
        for i, p in enumerate(parameters):
            p.grad = torch.randn_like(p) if (step, i) != (1, 2) else torch.zeros_like(p)
            rate = lr if p.ndim > 1 else 0.5 * lr
            values[i], velocities[i] = formula(variant, values[i], p.grad.double(), velocities[i], rate, p.ndim > 1)
        optimizer.step()
        for p, value, velocity in zip(parameters, values, velocities, strict=True):
            torch.testing.assert_close(p.detach().double(), value, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(optimizer.state[p]["mu"].double(), velocity, rtol=1e-5, atol=1e-6)


def test_channels_last_weights_and_foreign_strides():
    torch.manual_seed(0)
    w, g = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    plain, last = torch.nn.Parameter(w.clone()), torch.nn.Parameter(w.to(memory_format=torch.channels_last, copy=True))
    plain.grad, last.grad = g.clone(), g.clone()
    for p in (plain, last):
        LARS([p], lr=1.0, trust_coefficient=0.1).step()
    torch.testing.assert_close(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last) and not torch.equal(last, w)


@pytest.mark.parametrize("passes", [lars_cpu, lars_cuda], ids=["cpu", "cuda"])
def test_a_flat_tensor_cut_through_parameters(passes, monkeypatch):
    """As ZeRO hands it over: rank 0 holds all of a, half of b and some padding, rank 1 the other half of b."""
    monkeypatch.setattr(lars, "_passes", lambda _: passes)
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.randn(n, 3)) for n in (3, 6000))
    gradients = [torch.randn_like(p) for p in (a, b)]
    half = 9000
    flats = [torch.full((9 + half + 7,), 5.0), torch.empty(half)]
    flats[0][:9], flats[0][9:-7], flats[1][:] = a.data.view(-1), b.data.view(-1)[:half], b.data.view(-1)[half:]
    grads = [torch.ones_like(flats[0]), torch.empty(half)]
    grads[0][:9], grads[0][9:-7], grads[1][:] = (
        gradients[0].view(-1),
        gradients[1].view(-1)[:half],
        gradients[1].view(-1)[half:],
    )
    partial = [None, None]
    ranks = []
    for rank, segments in enumerate(([Segment(0, 0, 9), Segment(1, 9, 9 + half)], [Segment(1, 0, half)])):

        def all_reduce(sums, rank=rank):
            partial[rank] = sums.clone()
            other = partial[1 - rank]
            return sums if other is None else sums + other

        flats[rank].grad = grads[rank]
        ranks.append(LARS([flats[rank]], lr=0.5, trust_coefficient=0.1))
        ranks[-1].layout = Layout({flats[rank]: segments}, [True, True], frozenset([flats[rank]]), all_reduce)
    kept = [flat.clone() for flat in flats]
    for optimizer in ranks:  # the first round only fills `partial`
        optimizer.step()
    for flat, optimizer, before in zip(flats, ranks, kept, strict=True):
        flat.copy_(before)
        optimizer.state.clear()
        optimizer.step()
    a.grad, b.grad = gradients
    LARS([a, b], lr=0.5, trust_coefficient=0.1).step()
    torch.testing.assert_close(flats[0][:9], a.data.view(-1))
    torch.testing.assert_close(torch.cat((flats[0][9:-7], flats[1])), b.data.view(-1))
    assert flats[0][-7:].tolist() == [5.0] * 7


def test_the_tables_of_the_kernels_follow_the_memory(monkeypatch):
    """What is kept from step to step is neither a gradient nor an address that has become another's."""
    monkeypatch.setattr(lars, "_passes", lambda _: lars_cuda)
    torch.manual_seed(0)
    start, both = [torch.randn(shape) for shape in SHAPES], []
    for moves in (False, True):
        torch.manual_seed(1)
        parameters = [torch.nn.Parameter(w.clone()) for w in start]
        optimizer = LARS(parameters, lr=0.5, weight_decay=WD, trust_coefficient=TC)
        for step in range(4):
            for i, p in enumerate(parameters):
                gradient = torch.randn_like(p)
                if moves or p.grad is None:
                    p.grad = gradient
                else:
                    p.grad.copy_(gradient)
                if moves and step == 2:
                    p.data = p.data.clone()
                    optimizer.state[p]["mu"] = optimizer.state[p]["mu"].clone()
                if step == 3 and i == 0:
                    p.grad = None
            optimizer.step()
        gradient = weakref.ref(parameters[1].grad)
        optimizer.zero_grad()
        assert gradient() is None
        both.append([p.detach() for p in parameters])
    for stays, moved in zip(*both, strict=True):
        assert torch.equal(stays, moved)


def test_a_step_computes_the_tables_of_its_segments_once(monkeypatch):
    """4 ms of Python a step, while the GPU has nothing to do, came from making them anew for each pass of every step."""
    monkeypatch.setattr(lars, "_passes", lambda _: lars_cuda)
    made = []
    monkeypatch.setattr(lars_cuda, "_to_device", lambda table, _: made.append(table.shape) or torch.from_numpy(table))
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = LARS(parameters, lr=0.5)
    for step in range(3):
        for p in parameters:
            p.grad = torch.ones_like(p) if p.grad is None or step == 2 else p.grad
        before = len(made)
        optimizer.step()
        # Of the two kinds of parameters: chunks and runs; nothing where nothing has moved; chunks where gradients have.
        assert len(made) - before == [4, 0, 2][step]


@pytest.mark.parametrize("passes", [lars_cpu, lars_cuda], ids=["cpu", "cuda"])
def test_a_prepared_step_is_the_same_and_never_one_with_old_gradients(passes, monkeypatch):
    monkeypatch.setattr(lars, "_passes", lambda _: passes)
    torch.manual_seed(0)
    start, gradients, results = [torch.randn(s) for s in SHAPES], [torch.randn(s) for s in SHAPES], []
    for way in ("plain", "prepared", "other gradients", "cleared"):
        parameters = [torch.nn.Parameter(w.clone()) for w in start]
        optimizer = LARS(parameters, lr=0.5, weight_decay=WD, trust_coefficient=TC)
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g.clone() if way == "plain" else 2 * g
        if way != "plain":
            optimizer.prepare()
        if way == "prepared":  # the norm's factor comes in between
            torch._foreach_mul_([p.grad for p in parameters], 0.5)  # pyright: ignore
        if way == "cleared":
            gradient = weakref.ref(parameters[0].grad)
            optimizer.zero_grad()
            assert gradient() is None
        if way in ("other gradients", "cleared"):
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g.clone()
        optimizer.step()
        results.append([p.detach() for p in parameters])
    for other in results[1:]:
        for want, got in zip(results[0], other, strict=True):
            assert torch.equal(want, got)


def test_lars_leaves_parameters_without_gradient_alone():
    p, q = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    LARS([{"params": [p, q], "weight_decay": 0.1}], lr=1.0).step()
    assert torch.equal(q, torch.ones(2, 2))
    assert not torch.equal(p, torch.ones(2, 2))


def test_lars_refuses_what_it_does_not_know():
    p = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="variant is 'lamb'; allowed: moco-v3, larc, mlperf"):
        LARS([p], lr=1.0, variant="lamb")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="clip_trust_ratio is part of variant larc"):
        LARS([p], lr=1.0, clip_trust_ratio=True)
    with pytest.raises(ValueError, match="weight_decay is -1; allowed: >= 0"):
        LARS([{"params": [p], "weight_decay": -1}], lr=1.0)
    with pytest.raises(ValueError, match="eps is part of variants larc and mlperf, not of moco-v3"):
        LARS([p], lr=1.0, eps=0.1)
    with pytest.raises(ValueError, match=r"has the key 'adapt'; allowed: lr, weight_decay, .*, adapts, params"):
        LARS([{"params": [p], "adapt": False}], lr=1.0)
    optimizer = LARS([p], lr=1.0)
    optimizer.param_groups[0]["params"] = [torch.ones(4, requires_grad=True)]
    with pytest.raises(RuntimeError, match=r"shape \[4\] that is not one of the parameters.*lars_for_zero"):
        optimizer.step()
    with pytest.raises(TypeError, match=r"in torch\.bfloat16; allowed: float32"):
        LARS([torch.ones(2, 2, dtype=torch.bfloat16)], lr=1.0).step()


def test_lars_refuses_sparse_gradients():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        ValueError, match=r"shape \[4, 2\] is sparse; allowed: dense; build the embedding with sparse=False"
    ):
        LARS(embedding.parameters(), lr=1.0).step()


def test_a_model_may_change_its_type_before_the_first_step_only():
    model = torch.nn.Linear(3, 2)
    optimizer = LARS(model.parameters(), lr=1.0)
    for dtype in (torch.float64, torch.float64, torch.float32):
        model.to(dtype)
        model(torch.ones(1, 3, dtype=dtype)).sum().backward()
        if dtype == torch.float64:
            optimizer.step()
            assert optimizer.state[model.weight]["mu"].dtype == torch.float64
    with pytest.raises(
        TypeError, match=r"in torch\.float32 on cpu, its velocity in torch\.float64 on cpu; allowed: the same"
    ):
        optimizer.step()


def model_and_config(*overrides):
    config = load_config(None, ["crossbatch.batchformer.lr_scale=0.5", *overrides])
    torch.manual_seed(0)
    size = {"image_size": 16, "stem": "small", "backbone_args": {"width": 8}, "projection_dim": 8, "mlp_dim": 16}
    return MoCo("resnet18", **size, batchformer_loss="sum", group_size=2), config


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
