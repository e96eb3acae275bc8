"""LARS in training loops that are not ours: plain torch, DDP, FSDP2 and DeepSpeed as their manuals write them."""

import copy
import functools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from crossbatch.engine.optimizers import LARS, lars_param_groups
from crossbatch.engine.sharding import lars_for_zero

STEPS, BATCH = 10, 12
OPTIONS: dict[str, Any] = {"lr": 0.5, "weight_decay": 1e-2, "trust_coefficient": 0.1}


def network() -> nn.Sequential:
    """Odd sizes, so that partitions cut through tensors; matrices, norms and biases in one group."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 11), nn.Tanh(), nn.Linear(11, 3))


@functools.cache
def batches(steps: int = STEPS) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(BATCH, 7, generator=generator) for _ in range(steps)]
    return [(x, torch.stack((x.sum(1), x.norm(dim=1), x[:, 0] * x[:, 1]), dim=1)) for x in images]


def share(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a batch."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def over_ranks(losses: list[float]) -> list[float]:
    total = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


def train_plain(clip: float = 0.0) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of one process."""
    model = network()
    optimizer = LARS(model.parameters(), **OPTIONS)
    losses = []
    for x, y in batches():
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def train_ddp():
    model = nn.parallel.DistributedDataParallel(network())
    optimizer = LARS(model.parameters(), **OPTIONS)
    losses = []
    for x, y in batches():
        loss = F.mse_loss(model(share(x)), share(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return over_ranks(losses), {name: p.detach() for name, p in model.module.named_parameters()}


def sharded() -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    model = network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    fully_shard(model)
    return model


def train_fsdp2():
    model = sharded()
    optimizer = LARS(model.parameters(), **OPTIONS)
    losses = fsdp2_steps(model, optimizer, batches())
    return over_ranks(losses), {name: p.full_tensor().detach() for name, p in model.named_parameters()}  # pyright: ignore


def fsdp2_steps(model, optimizer, data) -> list[float]:
    losses = []
    for x, y in data:
        loss = F.mse_loss(model(share(x)), share(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def initialize(stage: int, zero: dict | None = None, optimizer: Any = LARS, **config) -> Any:
    """An engine as DeepSpeed's manual starts one."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile for a minute
    model = network()
    options: Any = OPTIONS if optimizer is LARS else {"lr": 0.1}
    config = {
        "train_batch_size": BATCH,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **config,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer(model.parameters(), **options), config=config)[0]


def zero_steps(engine) -> list[float]:
    losses = []
    for x, y in batches():
        dtype = next(engine.module.parameters()).dtype
        loss = F.mse_loss(engine(share(x).to(dtype)).float(), share(y))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def train_zero(stage: int, zero: dict | None = None, **config):
    import deepspeed

    engine = initialize(stage, zero, **config)
    lars_for_zero(lars_for_zero(engine))
    losses = over_ranks(zero_steps(engine))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        return losses, {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def assert_equal_to_one_process(results, losses, weights):
    """To 1e-5 of the losses, and of how far each tensor moved."""
    start = dict(network().named_parameters())
    for found_losses, found in results:
        assert found_losses == pytest.approx(losses, rel=1e-5)
        for name, weight in weights.items():
            moved = (weight - start[name]).norm()
            assert moved > 0 and (found[name] - weight).norm() <= 1e-5 * moved, name


def test_it_learns():
    losses, _ = train_plain()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("train", [train_ddp, train_fsdp2])
def test_two_ranks_do_what_one_process_does(pools, train):
    assert_equal_to_one_process(pools(2).run(train), *train_plain())


OFFLOAD = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}


@pytest.mark.parametrize(
    ("stage", "zero"),
    [(0, {}), (1, {}), (2, {}), (3, {}), (2, OFFLOAD), (3, OFFLOAD), (3, {"sub_group_size": 100})],
)
def test_zero_on_two_ranks_does_what_one_process_does(pools, stage, zero):
    assert_equal_to_one_process(pools(2).run(train_zero, stage, zero), *train_plain())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_clipped_gradients_under_zero(pools, stage):
    found = pools(2).run(functools.partial(train_zero, gradient_clipping=0.3), stage)
    losses, weights = train_plain(clip=0.3)
    assert losses != pytest.approx(train_plain()[0], rel=1e-3)  # it does clip
    assert_equal_to_one_process(found, losses, weights)


@pytest.mark.parametrize(
    ("precision", "stage", "accumulate"),
    [
        ("bf16", 1, "bf16"),
        ("bf16", 1, "fp32"),
        ("bf16", 2, "fp32"),
        ("bf16", 3, "bf16"),
        ("fp16", 1, "fp16"),
        ("fp16", 2, "fp16"),
        ("fp16", 3, "fp16"),
    ],
)
def test_half_precision_with_master_weights(pools, precision, stage, accumulate):
    """Against a loop written out: scaled gradients of the network in half precision, LARS on fp32 weights, and back."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    assert accelerator is not None
    if precision == "fp16" and not accelerator.is_fp16_supported():
        pytest.skip("DeepSpeed refuses fp16 on this CPU")
    dtype, scale = (torch.bfloat16, 1.0) if precision == "bf16" else (torch.float16, 16.0)
    model = network().to(dtype)
    master = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    optimizer, losses = LARS(master, **OPTIONS), []
    for x, y in batches():
        model.zero_grad()
        loss = F.mse_loss(model(x.to(dtype)).float(), y)
        (scale * loss).backward()
        for weight, p in zip(master, model.parameters(), strict=True):
            assert p.grad is not None
            weight.grad = p.grad.float() / scale
        optimizer.step()
        for weight, p in zip(master, model.parameters(), strict=True):
            p.data.copy_(weight)
        losses.append(loss.item())
    settings = {"enabled": True} if precision == "bf16" else {"enabled": True, "loss_scale": scale}
    config = {precision: settings, "data_types": {"grad_accum_dtype": accumulate}}
    train = functools.partial(train_zero, **config)
    ((found, _),) = pools(1).run(train, stage)
    assert found == pytest.approx(losses, rel=1e-5)
    for found, _ in pools(2).run(train, stage):  # each rank rounds its own gradient
        assert found == pytest.approx(losses, rel=2e-2)


def step_without_layout(stage: int, **config) -> str:
    engine = initialize(stage, **config)
    with pytest.raises(RuntimeError) as error:
        zero_steps(engine)
    return str(error.value)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_forgetting_lars_for_zero_raises(pools, ranks, stage):
    for config in ({}, {"bf16": {"enabled": True}}):
        for message in pools(ranks).run(functools.partial(step_without_layout, **config), stage):
            assert "lars_for_zero(engine)" in message


def refused() -> list[str]:
    messages = []
    for wrong in (network(), (network(), None)):
        with pytest.raises(TypeError, match=r"lars_for_zero: engine is a .*; allowed: .* deepspeed\.initialize"):
            lars_for_zero(wrong)  # pyright: ignore[reportArgumentType]
    engine = initialize(1, optimizer=torch.optim.SGD)
    with pytest.raises(ValueError, match="lars_for_zero") as error:
        lars_for_zero(engine)
    messages.append(str(error.value))
    with pytest.raises(RuntimeError) as error:
        initialize(0, bf16={"enabled": True})
    messages.append(str(error.value))
    engine = initialize(2)
    if dist.get_rank() == 0:  # a table that says something else on one rank
        del engine.module[0].weight._hp_mapping
    with pytest.raises(RuntimeError) as error:
        lars_for_zero(engine)
    messages.append(str(error.value))
    return messages


def test_what_lars_for_zero_refuses(pools):
    import deepspeed

    for sgd, stage_0, tables in pools(2).run(refused):
        assert "is SGD" in sgd
        assert "stage to 1" in stage_0
        assert f"DeepSpeed {deepspeed.__version__} cuts parameters" in tables


def fsdp1_messages() -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    messages = []
    for use_orig_params in (True, False):
        model = FullyShardedDataParallel(network(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        with pytest.raises(ValueError) as error:
            LARS(model.parameters(), lr=0.1)
        messages.append(str(error.value))
    return messages


def test_fsdp1_is_refused(pools):
    for messages in pools(2).run(fsdp1_messages):
        assert all("fully_shard" in message for message in messages)


def resumed_under_fsdp2() -> tuple[list[float], list[float]]:
    """Losses of the second half of a run that went on, and of one that was saved and loaded."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = sharded()
    optimizer = LARS(model.parameters(), **OPTIONS)
    fsdp2_steps(model, optimizer, batches()[:5])
    weights, state = copy.deepcopy(get_state_dict(model, optimizer))
    whole = fsdp2_steps(model, optimizer, batches()[5:])
    model = sharded()
    optimizer = LARS(model.parameters(), **{**OPTIONS, "lr": 0.1})
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return whole, fsdp2_steps(model, optimizer, batches()[5:])


def test_distributed_state_dicts_under_fsdp2(pools):
    for whole, resumed in pools(2).run(resumed_under_fsdp2):
        assert resumed == whole


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_like_the_original(copied):
    model = network()
    optimizer = LARS([{"params": model.parameters(), "adapts": False}], **OPTIONS, variant="mlperf")
    pairs = [(model, optimizer)]
    for x, y in batches()[:4]:
        for network_, optimizer_ in pairs:
            optimizer_.zero_grad()
            F.mse_loss(network_(x), y).backward()
            optimizer_.step()
        if len(pairs) == 1:
            pairs.append(copied(pairs[0]))
    for original, other in zip(pairs[0][0].parameters(), pairs[1][0].parameters(), strict=True):
        assert torch.equal(original, other) and original is not other


def test_state_dicts_schedulers_closures_and_names():
    """Ten steps in one go, and with a break after five; with a closure and named parameters, and without."""
    losses = []
    for interrupted in (False, True):
        model = network()
        optimizer = LARS(model.named_parameters() if interrupted else model.parameters(), **OPTIONS)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        found = []
        for number, (x, y) in enumerate(batches()):
            if interrupted and number == 5:
                states = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, scheduler)]
                model = network()
                optimizer = LARS(model.named_parameters(), lr=0.1)
                scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
                for part, state in zip((model, optimizer, scheduler), states, strict=True):
                    part.load_state_dict(state)

            def closure(model=model, optimizer=optimizer, x=x, y=y) -> Any:
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                return loss

            if interrupted:
                loss: Any = optimizer.step(closure)
                found.append(loss.item())
            else:
                found.append(closure().item())
                optimizer.step()
            scheduler.step()
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.25 * (1 + math.cos(math.pi * (number + 1) / 10)))
        losses.append(found)
    assert losses[0] == losses[1]


def test_groups_that_join_later_are_stepped():
    model, late = network(), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS(model.parameters(), lr=0.1)
    for step in range(2):
        for p in (*model.parameters(), late):
            p.grad = torch.ones_like(p)
        optimizer.step()
        if step == 0:
            optimizer.add_param_group({"params": [late]})
            assert torch.equal(late, torch.ones(2, 2)) and optimizer.adapts[late]
    torch.testing.assert_close(late, torch.full((2, 2), 1 - 0.1 * 0.001))


def test_groups_by_name():
    model = nn.ModuleDict({"backbone": network(), "head": nn.Linear(3, 2)})
    model["backbone"].register_parameter("pos_embed", nn.Parameter(torch.zeros(1, 4, 7)))
    model["head"].get_parameter("bias").requires_grad = False
    groups = lars_param_groups(model, weight_decay=0.1, lr=2.0, lr_scales={"backbone.": 0.1}, no_decay=["*.pos_embed"])
    names: dict[Any, str] = {p: name for name, p in model.named_parameters()}
    found = {names[p]: (g["lr"], g["weight_decay"], g["adapts"]) for g in groups for p in g["params"]}
    assert found["head.weight"] == (2.0, 0.1, True) and "head.bias" not in found
    assert found["backbone.0.weight"] == (0.2, 0.1, True)
    assert found["backbone.pos_embed"] == found["backbone.0.bias"] == (0.2, 0.0, False)
    optimizer = LARS(groups, lr=2.0)
    assert {names[p]: does for p, does in optimizer.adapts.items()} == {
        name: does for name, (*_, does) in found.items()
    }
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"lr_scales": {"backbone.": 0.1}}, "lr is not"),
        ({"no_decay": ["pos"]}, "'pos' has no effect: it fits no trainable parameter"),
        ({"lr": 1.0, "lr_scales": {"neck.": 0.1}}, "'neck.' has no effect: it fits no trainable parameter"),
    ]
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            lars_param_groups(model, **wrong)


def test_the_longest_whole_name_decides():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(11)))
    names: dict[Any, str] = {p: name for name, p in model.named_parameters()}
    for scales in ({"1": 0.1, "10": 0.2, "10.bias": 0.3}, {"10.bias": 0.3, "10.": 0.2, "1.": 0.1}):
        groups = lars_param_groups(model, lr=1.0, lr_scales=scales)
        found = {names[p]: g["lr"] for g in groups for p in g["params"] if g["lr"] != 1.0}
        assert found == {"1.weight": 0.1, "1.bias": 0.1, "10.weight": 0.2, "10.bias": 0.3}
    with pytest.raises(ValueError, match=r"'1' has no effect: .* a longer name fits each of them, too; remove it"):
        lars_param_groups(model, lr=1.0, lr_scales={"1": 0.1, "1.": 0.2})


def test_a_parameter_that_is_given_twice_is_refused():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"^LARS: a parameter is given twice"):
        LARS([parameter, parameter], lr=0.1)
