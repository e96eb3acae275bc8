"""On one, two and four ranks, every backend: the collectives of a real step beside those that the model says.

Ours must be among them, exactly; what DeepSpeed and FSDP2 send besides must come to the same bytes within a quarter.
"""

from collections import Counter

import pytest
import torch

from benchmarks.scaling.rank import measure
from crossbatch.engine.config import Device, ResolvedConfig, load_config, resolve
from crossbatch.engine.planning.traffic import OURS, Message, of_parts, step_traffic, totals
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.engine.tasks.build import build_model
from tests.small_runs import ADAMW, BASE, LARS, RESNET, VIT, fsdp, slow_unless, zero

BATCH = ["train_batch_size=24", "crossbatch.batchformer.group_size=12"]  # 6 images a rank of four: groups span two
TOLERANCE, SMALL = 0.25, 256  # of bytes; gradient norms are a few numbers, which are not counted
CHUNKS = "train_micro_batch_size_per_gpu=3"


def resolved(overrides: list[str], ranks: int) -> ResolvedConfig:
    return resolve(load_config(None, [*BASE, *BATCH, *overrides]), ranks, Device("cpu"))


def predicted(overrides: list[str], ranks: int):
    run = resolved(overrides, ranks)
    with torch.device("meta"):
        return step_traffic(build_model(run), run)


def counted(cases: list[list[str]]) -> list[Counter]:
    """On this rank: what a step of each case sends, after three others."""
    ranks = world_from_environment().size
    return [measure(resolved(overrides, ranks), torch.device("cpu"), 0)[1] for overrides in cases]


CASES = {
    1: [[*VIT, *LARS, *zero(1)], [*VIT, *LARS, *fsdp(3)]],
    2: [
        [*RESNET, *LARS, *zero(0)],
        [*VIT, *LARS, *zero(1), CHUNKS],
        [*VIT, *ADAMW, *zero(2), "crossbatch.batchformer.add_bf=37"],
        [*VIT, *LARS, *zero(3)],
        [*VIT, *LARS, *fsdp(0)],
        [*VIT, *LARS, *fsdp(3), CHUNKS],
        [*RESNET, *LARS, *zero(1), "crossbatch.model.norm_ranks=1"],
    ],
    4: [[*VIT, *LARS, *zero(1)], [*VIT, *LARS, *fsdp(3)], [*RESNET, *LARS, *fsdp(0), "crossbatch.model.norm_ranks=2"]],
}
MORE = {
    2: [
        [*RESNET, *LARS, *zero(1), CHUNKS],
        [*RESNET, *LARS, *zero(3), "crossbatch.batchformer.lr_scale=0.5"],
        [*RESNET, *LARS, *zero(1), "zero_optimization.reduce_bucket_size=20000"],
        [*RESNET, *LARS, *zero(1), "crossbatch.model.checkpoint_activations=blocks"],
        [*RESNET, *ADAMW, *fsdp(0)],
        [*RESNET, *LARS, *fsdp(1), CHUNKS],
        [*RESNET, *LARS, *fsdp(3), "crossbatch.batchformer.mode=released"],
        [*RESNET, *LARS, *fsdp(3), "crossbatch.batchformer.mode=ema"],
    ],
    4: [
        [*VIT, *LARS, *zero(3)],
        [*VIT, *LARS, *zero(0), "crossbatch.batchformer.add_bf=0"],
        [*RESNET, *LARS, *zero(1)],
        [*VIT, *LARS, *zero(2), CHUNKS],
        [*VIT, *LARS, *fsdp(0)],
        [*RESNET, *LARS, *fsdp(3), CHUNKS],
    ],
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "cases"),
    [
        *(pytest.param(ranks, cases, id=f"{ranks}", marks=slow_unless(ranks < 4)) for ranks, cases in CASES.items()),
        *(pytest.param(ranks, cases, id=f"{ranks}-more", marks=pytest.mark.slow) for ranks, cases in MORE.items()),
    ],
)
def test_counted_is_predicted(pools, ranks, cases):
    by_rank = pools(ranks).run(counted, cases)
    for number, overrides in enumerate(cases):
        traffic = predicted(overrides, ranks)
        ours = of_parts(traffic, *OURS)
        theirs = totals(traffic - ours, by="kind")
        for calls in by_rank:
            rest = Counter(calls[number])
            for message, times in ours.items():
                rest[message._replace(part="counted")] -= times
            assert min(rest.values(), default=0) >= 0, (overrides, rest)
            sent = {kind: total["bytes"] for kind, total in totals(rest, by="kind").items()}
            for kind in {*sent, *theirs}:
                want = theirs.get(kind, {"bytes": 0})["bytes"]
                assert sent.get(kind, 0) == pytest.approx(want, rel=TOLERANCE, abs=SMALL), (overrides, kind)
        assert bool(traffic) == (ranks > 1)


def test_bs4096_on_16_gpus():
    """The numbers that field notes and DeepSpeed's documentation give, by hand."""
    run = resolve(load_config("ds_configs/bs4096.json"), 16, Device("cuda", False, "V100"))
    with torch.device("meta"):
        model = build_model(run)
    traffic = step_traffic(model, run)
    # 53 norms of the backbone, of which 4 of shortcuts share a message, two of a projector (one of them last), one of the
    # predictor.
    norms = of_parts(traffic, "norms")
    assert sum(calls for message, calls in norms.items() if message.kind == "all-gather") == 53 - 4 + 2 + 1
    assert sum(calls for message, calls in norms.items() if message.kind == "all-reduce") == 53 - 4 + 2 + 1
    assert of_parts(traffic, "keys") == {Message("keys", "all-gather", 2 * 2 * 4096 * 256 * 4): 1}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert of_parts(traffic, "LARS") == {Message("LARS", "all-reduce", 2 * 8 * len(trained)): 1}
    size = 4 * sum(p.numel() for p in trained)
    assert of_parts(traffic, "gradients") == {
        Message("gradients", "all-reduce", size / 3): 3
    }  # two hide behind the backward
    assert totals(traffic)["parameters"]["bytes"] == size
