"""One batch whatever fits: chunks, ranks and checkpointed activations give the same losses, weights and statistics."""

import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch

from crossbatch import RunStopped
from crossbatch.engine import checkpoint
from crossbatch.engine.config import Device, load_config, resolve
from crossbatch.engine.memory_model import StepMemory
from crossbatch.engine.runtime import chunk_size as memory
from crossbatch.engine.runtime.world import world_from_environment
from crossbatch.models import Collective, MoCo
from crossbatch.models.norm import synchronize_norms
from tests.small_runs import (
    ADAMW,
    BASE,
    LARS,
    RESNET,
    VIT,
    fsdp,
    losses,
    name_of,
    parameters,
    pretrainer,
    slow_unless,
    train,
    zero,
)

BATCH, STEPS = 64, 6
LARGE = [
    f"train_batch_size={BATCH}",
    "train_micro_batch_size_per_gpu=auto",
    f"crossbatch.data.path=synthetic://{4 * BATCH}?size=20&classes=4",
    "crossbatch.batchformer.group_size=16",
]


def split(ranks: int, chunks: int) -> list[str]:
    return [f"train_micro_batch_size_per_gpu={BATCH // ranks // chunks}"]


# What `make test` runs of all splits.
OFTEN = [
    (16, 2, 2, fsdp(3)),
    (64, 1, 4, fsdp(0)),
    (64, 2, 2, zero(2)),
]


def cases():
    for group_size in (8, 16, 64):
        for ranks, chunks in ((1, 4), (2, 1), (2, 2), (4, 1)):
            for backend in (zero(0), zero(2), fsdp(0), fsdp(3)):
                often = (group_size, ranks, chunks, backend) in OFTEN
                case = f"{group_size}-{ranks}x{chunks}-{name_of(backend)}"
                yield pytest.param(group_size, ranks, chunks, backend, marks=slow_unless(often), id=case)


@pytest.fixture(scope="module")
def in_one(tmp_path_factory, pools):
    """Return losses and parameters of one rank and one chunk by group size."""
    known = {}

    def get(group_size: int):
        if group_size not in known:
            out = tmp_path_factory.mktemp("one")
            pools(1).run(train, [*vit(group_size), *zero(0), *split(1, 1)], str(out), STEPS)
            known[group_size] = losses(out), parameters(out)
        return known[group_size]

    return get


def vit(group_size: int) -> list[str]:
    dropout = "crossbatch.batchformer.dropout=0.5"
    return [*VIT, *LARS, *LARGE, f"crossbatch.batchformer.group_size={group_size}", dropout]


@pytest.mark.parametrize(("group_size", "ranks", "chunks", "backend"), list(cases()))
def test_a_split_changes_nothing(tmp_path, in_one, pools, group_size, ranks, chunks, backend):
    want, end = in_one(group_size)
    pools(ranks).run(train, [*vit(group_size), *backend, *split(ranks, chunks)], str(tmp_path), STEPS)
    assert len(want) == STEPS and abs(want[0] - want[-1]) > 0.1
    assert losses(tmp_path) == pytest.approx(want, rel=1e-5)
    for name, tensor in parameters(tmp_path).items():
        assert (tensor - end[name]).norm() <= 1e-5 * end[name].norm(), name


@pytest.mark.long
@pytest.mark.parametrize(
    "backend", [zero(1), *(pytest.param(b, marks=pytest.mark.slow) for b in (zero(3), fsdp(1)))], ids=name_of
)
def test_fp16_in_chunks_is_fp16_in_one(tmp_path, pools, backend):
    """The loss scale passes the cut unchanged: chunks of equal features have bit-equal gradients of the heads."""
    overrides = [*vit(16), *backend, "crossbatch.precision=fp16"]
    pools(2).run(train, [*overrides, *split(2, 1)], str(tmp_path / "one"), 8)
    pools(2).run(train, [*overrides, *split(2, 2)], str(tmp_path / "two"), 8)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-3)
    norms = [
        [json.loads(line)["grad_norm"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [norm is None for norm in norms[1]] == [norm is None for norm in norms[0]]  # skipped until the scale fits
    found = [[norm for norm in some if norm is not None] for some in norms]
    assert len(found[0]) > 2
    # Of the first steps with finite gradients: from there on two runs that round differently part.
    assert found[1][:2] == pytest.approx(found[0][:2], rel=1e-5)


@pytest.mark.parametrize(
    ("model", "backend"),
    [
        (VIT, fsdp(3)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((RESNET, zero(0)), (VIT, zero(0)), (VIT, zero(3)), (RESNET, zero(3)), (RESNET, fsdp(3)))
        ),
    ],
    ids=name_of,
)
def test_checkpointed_activations_change_nothing(tmp_path, pools, model, backend):
    """Running statistics do not see a batch twice either."""
    overrides = [*model, *ADAMW, *backend]
    runs = {}
    kinds = ["none", "blocks"] if model is VIT else ["none", "blocks", "norms"]
    for checkpointed in kinds:
        out = tmp_path / checkpointed
        settings = [*overrides, f"crossbatch.model.checkpoint_activations={checkpointed}"]
        pools(2).run(train, settings, str(out), 3)
        runs[checkpointed] = losses(out), checkpoint.read(out / "checkpoints/step-00000003", "buffers.")
    for checkpointed in kinds[1:]:
        assert runs[checkpointed][0] == pytest.approx(runs["none"][0], rel=1e-6)
        for name, buffer in runs[checkpointed][1].items():
            torch.testing.assert_close(buffer, runs["none"][1][name], rtol=1e-5, atol=1e-6)


def step_of_resnet(overrides: list[str], out: str, alone: bool) -> tuple[float, dict]:
    """Take one step on this rank; return the global loss and the gradient-updated parameters."""
    world = world_from_environment()
    run = resolve(load_config(None, [*BASE, *LARGE, *RESNET, *ADAMW, *overrides]), world.size, Device("cpu"))
    trainer = pretrainer(run, out, "none", 2)
    if alone:
        model = trainer.state.step.backend.model
        assert isinstance(model, MoCo)
        for encoder in (model.online, model.momentum):
            synchronize_norms(encoder.backbone, Collective())
    batches = trainer.task.data.batches(0)
    trainer.state.step(next(batches).views)  # at rate 0
    loss = trainer.state.step(next(batches).views).output.loss
    trainer.task.data.loader.close()
    torch.distributed.all_reduce(loss)
    return float(loss) / world.size, {
        n: p.detach().clone() for n, p in trainer.state.step.backend.model.named_parameters()
    }


def test_a_resnet_in_chunks_is_ranks_that_keep_their_norms_to_themselves(tmp_path, pools):
    chunked = pools(1).run(step_of_resnet, [*zero(0), *split(1, 4)], str(tmp_path / "chunked"), False)[0]
    ranks = pools(4).run(step_of_resnet, [*zero(0), *split(4, 1)], str(tmp_path / "ranks"), True)[0]
    together = pools(4).run(step_of_resnet, [*zero(0), *split(4, 1)], str(tmp_path / "together"), False)[0]
    assert chunked[0] == pytest.approx(ranks[0], rel=1e-5)
    assert chunked[0] != pytest.approx(together[0], rel=1e-5)
    for name, tensor in ranks[1].items():
        torch.testing.assert_close(chunked[1][name], tensor, rtol=1e-4, atol=2e-6, msg=name)


def run_with_little_memory(
    out: str, chunk: int, rows: int, until_call: int, network: list[str] = VIT, steps: int = 3
) -> str:
    """Train with a backbone that runs out of memory above `rows` rows and from call `until_call` on; return why it stopped."""
    from crossbatch.models import MoCo

    overrides = [*BASE, *LARGE, *network, *ADAMW, f"train_micro_batch_size_per_gpu={chunk}"]
    run = resolve(load_config(None, overrides), 1, Device("cpu"))
    embed, calls = MoCo.embed, []

    def greedy(self, images):
        calls.append(len(images))
        features = embed(self, images)
        if len(images) > rows or len(calls) >= until_call:
            raise torch.OutOfMemoryError("no more")
        return features

    with mock.patch.object(MoCo, "embed", greedy):
        try:
            pretrainer(run, out, "auto", steps).train()
        except RunStopped as stopped:
            return str(stopped)
    return ""


def test_out_of_memory_in_the_first_step_halves_the_chunk(tmp_path, pools):
    always = 10**9
    assert pools(1).run(run_with_little_memory, str(tmp_path / "want"), 16, always, always) == [""]
    assert pools(1).run(run_with_little_memory, str(tmp_path / "got"), 64, 2 * 16, always) == [""]
    assert losses(tmp_path / "got") == losses(tmp_path / "want")
    assert json.loads((tmp_path / "got/chunk.json").read_text())["chunk"] == 16


def test_out_of_memory_later_saves_and_stops(tmp_path, pools):
    (message,) = pools(1).run(run_with_little_memory, str(tmp_path), 64, 10**9, 3)
    assert (
        "out of memory in step 3" in message
        and "saved" in message
        and "train_micro_batch_size_per_gpu to 32" in message
    )
    assert checkpoint.read_manifest(tmp_path / "checkpoints/step-00000002")[0].step == 2


def test_out_of_memory_leaves_running_statistics_as_they_were(tmp_path, pools):
    assert pools(1).run(run_with_little_memory, str(tmp_path / "want"), 64, 10**9, 10**9, RESNET, 2) == [""]
    (message,) = pools(1).run(run_with_little_memory, str(tmp_path / "got"), 64, 10**9, 3, RESNET)
    assert "out of memory in step 3" in message
    want, got = (checkpoint.read(tmp_path / name / "checkpoints/step-00000002", "") for name in ("want", "got"))
    assert any("running_mean" in name for name in want) and want.keys() == got.keys()
    assert [name for name in want if not want[name].equal(got[name])] == []


def automatic(out: str, free: float, overrides: list[str]) -> int:
    world = world_from_environment()
    run = resolve(load_config(None, [*BASE, *LARGE, *VIT, *overrides]), world.size, Device("cpu"))
    with mock.patch.object(memory, "free_bytes", lambda *_: free * (1 + world.rank)):
        chunk, _ = memory.automatic_chunk(run, world, torch.device("cpu"), Path(out))
    return chunk


def test_the_chunk_follows_the_memory_of_the_poorest_rank(tmp_path, pools):
    run = resolve(load_config(None, [*BASE, *LARGE, *VIT]), 2, Device("cpu"))
    model = StepMemory(run)
    each = model.at(2).without_context - model.at(1).without_context
    rest = model.at(1).without_context - each
    assert each > 2 * 17 * 24 * 4 * 10  # views x tokens x width x bytes x ten activations at the very least
    for room in (7.5, 11.5, 40.0):
        cache = tmp_path / f"{room}.json"
        want = math.ceil(32 / math.ceil(32 / min(32, int(room))))
        free = (rest + room * each) / memory.MARGIN
        assert pools(2).run(automatic, str(cache), free, []) == [want, want]
        assert pools(2).run(automatic, str(cache), 1e15, []) == [want, want]  # continued: as before
    with pytest.raises(AssertionError, match="not even one image fits"):
        pools(2).run(automatic, str(tmp_path / "none.json"), rest / 2, [])
