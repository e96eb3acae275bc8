"""What is found, what is refused, what is passed over, and what a crash leaves (exact resume is in test_equivalence.py)."""

import copy
import io
import json
import os
import pickle
import shutil
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crossbatch import InputError
from crossbatch.engine import checkpoint
from crossbatch.engine.checkpoint import AsyncCheckpointWriter, Keep, Manifest, Unreadable, async_writer
from crossbatch.engine.checkpoint.changes import differences, fixed_values
from crossbatch.engine.checkpoint.slices import shares
from crossbatch.engine.checkpoint.store import read_manifest
from crossbatch.engine.config import Config, Device, FinetuneConfig, load_config, resolve, resumable_keys, to_dict
from crossbatch.engine.config.evaluation import LinearConfig
from crossbatch.engine.nested import nest
from crossbatch.engine.run_log import RunLog
from crossbatch.engine.runtime.atomic_files import write_atomically
from crossbatch.engine.sharding import FlatSlice, LocalShards
from tests.fake_cuda import FakeCuda, OnGpu, on_gpu
from tests.small_runs import ADAMW, BASE, LARS, VIT, fsdp, name_of, pretrainer, zero


def manifest_of(step: int, shapes: dict[str, list[int]]) -> Manifest:
    return Manifest(
        progress={"step": step, "updates": step},
        shapes=shapes,
        images=48,
        steps_per_epoch=4,
        skipped_images=0,
        world_size=1,
        versions={},
    )


def save(folder: Path, step: int, keep: Keep | None = None) -> None:
    """A checkpoint of two tensors, filled with the step."""
    held = {f"parameters.{name}": LocalShards.whole(torch.full((3, 2), float(step))) for name in ("a", "b")}
    manifest = manifest_of(step, {name: list(tensor.shape) for name, tensor in held.items()})
    checkpoint.write(folder, shares(held, 0, 1), manifest, {"world_size": 1}, keep or Keep(100))


def good(checkpoint_folder: Path) -> bool:
    try:
        tensors = checkpoint.read(checkpoint_folder, "parameters.")
    except Unreadable:
        return False
    step = int(checkpoint_folder.name.removeprefix("step-"))
    return all(tensor.equal(torch.full((3, 2), float(step))) for tensor in tensors.values()) and len(tensors) == 2


# --- which one ---------------------------------------------------------------------------------------------------------


def test_auto_tries_the_newest_first(tmp_path):
    assert checkpoint.candidates(tmp_path, "auto") == []
    for step in (3, 20, 100_000_000):
        save(tmp_path / "checkpoints", step)
    (tmp_path / "checkpoints" / ".step-00000030.0.tmp").mkdir()  # a crash while writing
    names = [path.name for path in checkpoint.candidates(tmp_path, "auto")]
    assert names == ["step-100000000", "step-00000020", "step-00000003"]
    assert checkpoint.candidates(tmp_path / "new", str(tmp_path))[1].name == "step-00000020"
    one = tmp_path / "checkpoints" / "step-00000020"
    assert checkpoint.candidates(tmp_path / "new", str(one)) == [one]


def test_none_does_not_overwrite_a_run(tmp_path):
    assert checkpoint.candidates(tmp_path, "none") == []
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(InputError, match="already holds a run"):
        checkpoint.candidates(tmp_path, "none")


def test_a_path_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such path"):
        checkpoint.candidates(tmp_path, str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no checkpoint in it"):
        checkpoint.candidates(tmp_path, str(tmp_path))


def test_what_is_kept(tmp_path):
    for step in range(2, 15, 2):
        save(tmp_path, step, Keep(2, every_steps=6))
    assert sorted(path.name for path in tmp_path.glob("*")) == [
        "latest",
        *(f"step-{step:08d}" for step in (6, 12, 14)),
    ]
    assert (tmp_path / "latest").read_text() == "step-00000014\n"
    save(tmp_path, 8, Keep(2, every_steps=6))  # a run that was resumed from step 6: 12 and 14 belong to another history
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000006", "step-00000008"]


# --- damage ------------------------------------------------------------------------------------------------------------


def cut_off(folder: Path) -> None:
    with (folder / "0.bin").open("r+b") as file:
        file.truncate(100)


def flip_a_bit(folder: Path) -> None:
    """In the middle of a tensor: torch.load alone would not notice."""
    content = bytearray((folder / "0.bin").read_bytes())
    value = torch.tensor(7.0).numpy().tobytes()
    content[content.index(value)] ^= 1
    (folder / "0.bin").write_bytes(content)


DAMAGES = {
    "cut off": cut_off,
    "one bit": flip_a_bit,
    "no tensors": lambda folder: (folder / "0.bin").unlink(),
    "no state.json": lambda folder: (folder / "state.json").unlink(),
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "not JSON": lambda folder: (folder / "state.json").write_text('{"format": 2, "prog'),
    "another format": lambda folder: (folder / "state.json").write_text('{"format": 1}'),
    "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed(tmp_path, damage):
    save(tmp_path, 7)
    folder = tmp_path / "step-00000007"
    assert good(folder)
    DAMAGES[damage](folder)
    with pytest.raises(Unreadable, match=r"incomplete|damaged|of another format"):
        checkpoint.read(folder, "parameters.")


class Bomb:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_checkpoint_cannot_run_code(tmp_path):
    save(tmp_path, 7)
    folder = tmp_path / "step-00000007"
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb()))
    state = json.loads((folder / "state.json").read_text())
    state["files"].pop(".metadata")  # checksums can be forged, too
    state.pop("crc32")
    (folder / "state.json").write_text(json.dumps({**state, "crc32": zlib.crc32(json.dumps(state).encode())}))
    with pytest.raises(Unreadable, match=r"asks for posix\.system"):
        checkpoint.read(folder, "parameters.")


def test_slices_must_cover_every_element_once(tmp_path):
    whole = torch.arange(6.0)
    for slices in ({0: whole[:3]}, {0: whole[:4], 3: whole[3:]}, {2: whole[2:]}):
        staged = {("a", start): values for start, values in slices.items()}
        with pytest.raises(RuntimeError, match="held by no rank"):
            checkpoint.write(tmp_path, staged, manifest_of(2, {"a": [6]}), {"world_size": 1}, Keep(1))
        assert list(tmp_path.iterdir()) == []


def test_shares_cover_what_all_ranks_hold():
    small, large = torch.arange(10.0), torch.arange(2.0**17 + 1)
    held = {"small": LocalShards.whole(small), "other": LocalShards.whole(small), "large": LocalShards.whole(large)}
    held["cut"] = LocalShards(torch.Size([4]), [FlatSlice(0, small[:2]), FlatSlice(2, small[:0])], False)
    parts = [shares(held, rank, 3) for rank in range(3)]
    assert all(("cut", 0) in part and ("cut", 2) not in part for part in parts)
    for name, whole in (("small", small), ("other", small), ("large", large)):
        slices = sorted((start, values) for part in parts for (of, start), values in part.items() if of == name)
        assert torch.cat([values for _, values in slices]).equal(whole)
        assert [start for start, _ in slices] == [
            sum(len(values) for _, values in slices[:i]) for i in range(len(slices))
        ]
    sizes = [sum(values.numel() for values in part.values()) for part in parts]
    assert max(sizes) - min(sizes) <= 20


# --- while training goes on ------------------------------------------------------------------------------------------------


def test_copies_from_a_gpu_run_beside_the_next_step_and_before_its_update(tmp_path, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(async_writer, "cpu_group", lambda patience_s: None)
    monkeypatch.setattr(async_writer, "dist", SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1))
    monkeypatch.setattr(async_writer, "time", SimpleNamespace(perf_counter=lambda: 5.0))
    writer = AsyncCheckpointWriter(tmp_path, Keep(1), "0")
    parameter, statistic = (on_gpu(torch.full((3, 2), 2.0)) for _ in range(2))
    held = {"parameters.a": LocalShards.whole(parameter), "buffers.b": LocalShards.whole(statistic)}
    optimizer, other = (torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1) for _ in range(2))
    hosts = []
    for step, copies in ((2, "to host 0"), (4, "to host 1")):
        cuda.launch(f"step {step}")
        manifest = manifest_of(step, {"parameters.a": [3, 2], "buffers.b": [3, 2]})
        writer.save(held, manifest, {"world_size": 1}, optimizer)
        assert f"step {step}" in cuda.launched[copies]
        cuda.launch(f"forward after {step}")
        other.step()
        cuda.launch(f"another network's update after {step}")
        assert not any(
            copies in cuda.launched[f"{what} after {step}"] for what in ("forward", "another network's update")
        )
        optimizer.step()
        cuda.launch(f"update after {step}")
        assert copies in cuda.launched[f"update after {step}"]
        writer.wait()
        outcome = writer.finished()
        assert outcome is not None and (outcome.step, outcome.error) == (step, None)
        assert outcome.stalled_s == 0.001  # one launch in the clock of these events
        hosts.append([values.data_ptr() for values in writer._host.values()])
    assert "checkpoint of step 4" in cuda.devices  # else the thread would take memory on GPU 0
    assert (parameter.data_ptr(), "side") in OnGpu.recorded  # a step out of memory may free it
    assert statistic.data_ptr() not in {address for address, _ in OnGpu.recorded}  # the forward pass changes it
    assert hosts[0] == hosts[1]


def changes_before_and_after_the_hook(overrides: list[str], out: str) -> list[tuple[bool, bool]]:
    """For each of two steps: whether a parameter or optimizer state changed before torch's optimizer was called, and at all."""
    from crossbatch.engine.checkpoint.slices import local_state
    from crossbatch.engine.config import Device, resolve

    cfg = resolve(load_config(None, [*BASE, *VIT, *overrides]), 1, Device("cpu"))
    step = pretrainer(cfg, out, "none", 2).state.step
    held = {name: shards for name, shards in local_state(step.backend).items() if not name.startswith("buffers.")}

    def values() -> list[torch.Tensor]:
        return [part.local.clone() for shards in held.values() for part in shards.slices]

    def changed() -> bool:
        return any(not now.equal(then) for now, then in zip(values(), before, strict=True))

    found, calls = [], []
    step.backend.torch_optimizer.register_step_pre_hook(lambda *_: calls.append(changed()))
    views = torch.randint(0, 256, (2, 12, 16, 16, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    step.progress.updates = 1  # the first step of a warm-up has a rate of 0
    for _ in range(2):
        before = values()
        calls.clear()
        step(views)
        found.append((calls[0], changed()))  # DeepSpeed calls it for every group
    return found


@pytest.mark.parametrize("backend", [zero(0), zero(2), zero(3), fsdp(3)], ids=name_of)
@pytest.mark.parametrize("optimizer", [LARS, ADAMW], ids=name_of)
def test_nothing_that_is_saved_changes_before_torch_s_optimizer_steps(tmp_path, one_rank, backend, optimizer):
    (found,) = one_rank.run(changes_before_and_after_the_hook, [*backend, *optimizer], str(tmp_path))
    assert found == [(False, True)] * 2


# --- crashes -----------------------------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """Nothing after it happens, not even tidying up."""


class Switch:
    """Counts operations on files, and from the `limit`-th on lets none happen."""

    def __init__(self, limit: float):
        self.limit, self.count = limit, 0

    def press(self) -> None:
        self.count += 1
        if self.count > self.limit:
            raise PowerCut

    def wrapped(self, function):
        def call(*args, **kwargs):
            self.press()
            return function(*args, **kwargs)

        return call


class CountedFile(io.FileIO):
    switch: Switch

    def write(self, data) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.switch.press()
        return super().write(data)


def cut_power_after(monkeypatch, limit: float) -> Switch:
    switch = Switch(limit)
    for name in ("rename", "replace", "fsync", "unlink", "remove", "rmdir", "mkdir", "open"):
        monkeypatch.setattr(os, name, switch.wrapped(getattr(os, name)))

    real = io.open

    def open_counted(file, mode="r", *args, **kwargs):
        if "r" in mode:
            return real(file, mode, *args, **kwargs)
        switch.press()
        raw = CountedFile(file, mode.replace("b", ""))
        raw.switch = switch
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")

    monkeypatch.setattr(io, "open", open_counted)
    return switch


def test_a_power_cut_between_any_two_file_operations_leaves_a_good_checkpoint(tmp_path):
    def attempt(folder: Path, limit: float) -> Switch:
        """Step 2 is there, step 4 replaces it (keep 1), power fails after `limit` operations."""
        with pytest.MonkeyPatch.context() as monkeypatch:
            switch = cut_power_after(monkeypatch, limit)
            try:
                save(folder / "checkpoints", 4, Keep(1))
            except BaseException as error:
                assert "PowerCut" in repr(error)
        return switch

    save(tmp_path / "whole" / "checkpoints", 2)
    operations = attempt(tmp_path / "whole", float("inf")).count
    assert operations > 20
    found = []
    for limit in range(operations):
        out = tmp_path / str(limit)
        save(out / "checkpoints", 2)
        attempt(out, limit)
        candidates = checkpoint.candidates(out, "auto")
        assert candidates and all(good(path) for path in candidates)
        found.append(candidates[0].name)
        checkpoint.create_run_directory(out)  # the next attempt does so at its start
        save(out / "checkpoints", 4, Keep(1))
        assert sorted(path.name for path in (out / "checkpoints").glob("*")) == ["latest", "step-00000004"]
    assert (
        found == sorted(found) and len(set(found)) == 2
    )  # the old one up to some operation, the new one from there on


def test_a_save_without_room_leaves_the_last_one_and_no_litter(tmp_path, monkeypatch):
    save(tmp_path, 2)
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(BaseException, match="No space left"):
        save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.glob("*")) == ["latest", "step-00000002"]
    assert good(tmp_path / "step-00000002")


def test_a_crash_between_writing_and_renaming_leaves_the_old_text(tmp_path, monkeypatch):
    target = tmp_path / "latest"
    write_atomically(target, "old")
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, "new")
    assert target.read_text() == "old"


# --- what may change ---------------------------------------------------------------------------------------------------


def config(*overrides: str, world_size: int = 2, chunk: int = 8) -> dict:
    settings = ["train_batch_size=16", f"train_micro_batch_size_per_gpu={chunk}", *overrides]
    return {**to_dict(load_config(None, settings)), "world_size": world_size}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("crossbatch.seed=1", "crossbatch.seed: was 0, is 1"),
        ("optimizer.params.lr=0.3", "optimizer.params.base_lr: was 0.6, is 0.3"),
        ("optimizer.type=AdamW", "optimizer.type: was 'LARS', is 'AdamW'"),
        ("crossbatch.schedule.epochs=200", "crossbatch.schedule.epochs"),
        ("crossbatch.batchformer.group_size=16", "crossbatch.batchformer.group_size"),
        ("crossbatch.model.norm_ranks=2", "crossbatch.model.norm_ranks: was 'world', is 2"),
        ('crossbatch.model.backbone_args={"width": 8}', "crossbatch.model.backbone_args"),
    ],
)
def test_a_change_of_the_run_is_named(change, word):
    found = differences(config(), config(change))
    assert any(word in difference for difference in found)
    key = change.split("=")[0]
    assert not [line for line in differences(config(), config(change), [key]) if line.startswith(key)]
    assert differences(config(), config(change), ["optimizer", "crossbatch"]) == []


def test_what_only_says_how_it_is_computed_may_change():
    free = ["zero_optimization.stage=3", "crossbatch.sharding=zero", "crossbatch.log.every_steps=1"]
    free += ["crossbatch.checkpoint.keep=7", "crossbatch.data.workers=0", "crossbatch.watch.timeout_s=5"]
    assert differences(config(), config(*free)) == []
    assert differences(config(), config(world_size=1, chunk=16)) == []  # the norms see all 16 images either way


@pytest.mark.parametrize("schema", [Config, FinetuneConfig, LinearConfig])
def test_what_may_change_is_declared_with_the_key(schema):
    names = "path", "cache_dir", "cache_gib", "workers", "max_skipped_fraction"
    data = {f"crossbatch.data.{name}" for name in names}
    start = set() if schema is Config else {"crossbatch.model.checkpoint"}
    training = {"zero_optimization", "crossbatch.sharding", "crossbatch.evaluate", "crossbatch.checkpoint"}
    training |= {"crossbatch.watch", "crossbatch.deterministic"}
    training |= {"comms_logger", "dump_state", "memory_breakdown", "steps_per_print"}  # of DeepSpeed
    pretraining = {
        "crossbatch.model.checkpoint_activations",
        "crossbatch.model.compile",
        "crossbatch.model.cuda_graph",
        "crossbatch.batchformer.kernel",
    }
    probe = {"train_micro_batch_size_per_gpu", "crossbatch.model", "crossbatch.data.backend"}
    want = {Config: training | pretraining, FinetuneConfig: training, LinearConfig: probe}
    assert set(resumable_keys(schema)) == {"crossbatch.log"} | data | start | want[schema]
    checkpoint.check_allowed(resumable_keys(schema), schema)


def test_a_checkpoint_from_before_the_keys_were_renamed_resumes():
    now = config("crossbatch.batchformer.loss=sum")
    old = copy.deepcopy(now)
    old["optimizer"]["params"]["lr"] = old["optimizer"]["params"].pop("base_lr")
    old["optimizer"]["params"]["clip"] = old["optimizer"]["params"].pop("clip_trust_ratio")
    del old["optimizer"]["params"]["reference_batch"]
    old["crossbatch"]["model"]["dim"] = old["crossbatch"]["model"].pop("projection_dim")
    old["crossbatch"]["evaluate"]["knn_images"] = old["crossbatch"]["evaluate"].pop("knn_bank_size")
    old["crossbatch"]["batchformer"]["add_bf"] = {"sum": 34}[old["crossbatch"]["batchformer"].pop("loss")]
    assert differences(old, now) == []
    changed = config("crossbatch.batchformer.loss=joint", "optimizer.params.lr=0.3")
    assert differences(old, changed) == [
        "crossbatch.batchformer.loss: was 'sum', is 'joint'",
        "optimizer.params.base_lr: was 0.6, is 0.3",
    ]
    checkpoint.check_allowed(["optimizer.params.lr", "crossbatch.batchformer.add_bf"])
    assert differences(old, changed, ["optimizer.params.lr", "crossbatch.batchformer.add_bf"]) == []


def test_a_probe_from_before_the_keys_were_renamed_resumes():
    identity = {
        "train_batch_size": 1024,
        "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.9, "weight_decay": 0.0}},
        "crossbatch.schedule": {"epochs": 90},
        "crossbatch.linear": {"norm": False, "cache": False},
        "crossbatch.seed": 0,
        "crossbatch.precision": "fp32",
        "crossbatch.data.crop_min": 0.08,
        "crossbatch.data.image_size": "auto",
    }
    now = to_dict(load_config(None, ["crossbatch.data.workers=3", "crossbatch.model.arch=resnet50"], LinearConfig))
    assert fixed_values(nest(identity), LinearConfig) == fixed_values(now, LinearConfig)
    now["optimizer"]["params"]["base_lr"] = 1.0
    assert fixed_values(nest(identity), LinearConfig) != fixed_values(now, LinearConfig)


def test_chunks_change_what_the_norms_of_a_resnet_see():
    (found,) = differences(config(), config(chunk=4))
    assert found.startswith("train_micro_batch_size_per_gpu: the norms of a ResNet saw the whole batch")
    assert differences(config(), config(chunk=4), ["train_micro_batch_size_per_gpu"]) == []
    vit = "crossbatch.model.arch=vit_small"
    assert differences(config(vit), config(vit, world_size=4, chunk=1)) == []


def test_ranks_that_share_statistics_stay():
    def on(ranks: int, of_a_node: int, given: str = "node") -> dict:
        settings = ["train_batch_size=16", f"crossbatch.model.norm_ranks={given}"]
        return {
            **to_dict(resolve(load_config(None, settings), ranks, Device("cpu"), of_a_node).config),
            "world_size": ranks,
        }

    assert differences(on(8, 4), on(8, 4)) == differences(on(8, 4), on(8, 2, "4")) == []
    assert differences(on(8, 4), on(8, 2)) == ["crossbatch.model.norm_ranks: was 4, is 2"]
    assert differences(on(8, 4), on(8, 8)) == ["crossbatch.model.norm_ranks: was 4, is 'world'"]
    (found,) = differences(on(8, 4), on(16, 4))
    assert found.startswith("crossbatch.model.norm_ranks: was 4 of 8 ranks, is 4 of 16")
    assert differences(on(8, 4), on(16, 4), ["crossbatch.model.norm_ranks"]) == []
    assert differences(on(8, 8, "world"), on(4, 2, "world")) == []


def test_a_key_that_is_newer_than_the_checkpoint_had_its_default():
    old = config()
    del old["crossbatch"]["watch"], old["crossbatch"]["seed"]
    assert differences(old, config()) == []
    assert differences(old, config("crossbatch.seed=3")) == ["crossbatch.seed: was 0, is 3"]


def test_allowing_a_key_that_does_not_exist_is_refused():
    checkpoint.check_allowed(["crossbatch.seed", "optimizer"])
    with pytest.raises(InputError, match=r"crossbatch.sed"):
        checkpoint.check_allowed(["crossbatch.sed"])


# --- the log -----------------------------------------------------------------------------------------------------------


def line(step: int) -> dict:
    return {"step": step, "epoch": 0.0, "images_seen": 0, "loss": float(step)}


def test_metrics_after_the_checkpoint_and_torn_lines_are_dropped_on_resume(tmp_path):
    lines = [json.dumps(line(step)) for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')
    RunLog(tmp_path, first_step=2, last_step=10).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:2]


def test_lines_wait_for_room_on_the_disk(tmp_path, capsys):
    log = RunLog(tmp_path, first_step=0, last_step=10)
    log.record(line(1))
    real = log.metrics
    assert real is not None

    class Full:
        """Room for half a line."""

        def write(self, data: bytes) -> int:
            if len(data) < 40:
                raise OSError(28, "No space left on device")
            return real.write(data[: len(data) - 39])

    log.metrics = Full()  # pyright: ignore[reportAttributeAccessIssue]
    log.record(line(2))
    log.record(line(3))
    log.metrics = real
    log.record(line(4))
    log.close()
    assert [json.loads(text)["step"] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("metrics.jsonl cannot be written") == 1


def test_manifest_round_trip(tmp_path):
    save(tmp_path, 7)
    manifest, saved = read_manifest(tmp_path / "step-00000007")
    assert (manifest.step, saved, manifest.images) == (7, {"world_size": 1}, 48)
    files = [path for path in (tmp_path / "step-00000007").iterdir() if path.name != "state.json"]
    assert manifest.num_bytes == sum(path.stat().st_size for path in files) > 0
    assert time.time() - files[0].stat().st_mtime < 60


def test_field_checkpoints_that_cannot_be_read_are_not_taken_for_none(monkeypatch, tmp_path):
    (tmp_path / "checkpoints").mkdir()

    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "listdir", denied)
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputError, match=r"checkpoints: cannot be read: Permission denied; make it readable"):
        checkpoint.candidates(tmp_path, "auto")
