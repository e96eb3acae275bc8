"""Replay: faults are traced to rank, image and layer; a step made again is the step that was made; wrong input."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossbatch.data import GlobalBatchSampler
from crossbatch.engine import checkpoint
from tests.replays import (
    MARK,
    NORMALIZE,
    TRAIN_ON,
    breaks_on,
    divided_by_contrast,
    edit_checkpoint,
    flips_a_bit,
    keeps_views,
    nan_in_views_of,
    replay,
    replay_printing,
    verdict,
    view_of,
    write_images,
    writer,
)
from tests.small_runs import ADAMW, LARS, RESNET, VIT, fsdp, run, slow_unless, zero

BLOCK = "crossbatch.models.vit.ViT.forward"
DATA = "synthetic://48?size=20&classes=4"  # that of BASE
BACKENDS = [zero(2), fsdp(3), zero(3), zero(0), zero(1), fsdp(1)]
STOP = ["crossbatch.watch.max_nonfinite_steps=1"]


def settings_of(number: int) -> tuple[list[str], int]:
    """The settings of a faulty run, and on how many ranks it runs."""
    model = (VIT, RESNET)[number // 4 % 2]
    optimizer = (ADAMW, LARS)[number // 4 % 2]
    precision = "fp32" if number < 50 else "bf16" if number < 58 else "fp16"
    settings = [*model, *optimizer, *BACKENDS[number // 4 % len(BACKENDS)], *STOP, f"crossbatch.precision={precision}"]
    return settings, 2 - (number // 8 % 3 == 2)


def sixteen():
    return 16.0


def loss_scale_of(number: int) -> tuple:
    """What makes a run in fp16 begin with a loss scale that is right: no step is skipped before the faulty one."""
    return (("crossbatch.engine.step.INITIAL_LOSS_SCALE", sixteen),) if number >= 58 else ()


def command_in(message: str, out: Path, step: int) -> str:
    """The command that a stopped run names, or the one to type where it went on."""
    if message:
        assert message.count(f"python launch/replay.py --run {out} --step {step}") == 1, message
        return message.rpartition("look into it: ")[2]
    return f"python launch/replay.py --run {out} --step {step}"


def assert_image(found: dict, index: int, position: int, ranks: int) -> None:
    assert found["kind"] in ("not finite", "jump") and found["layer"] == "input", found
    assert [(image["index"], image["position"]) for image in found["images"]] == [(index, position)], found
    assert found["rank"] == position // (12 // ranks) == found["images"][0]["rank"]


def nan_pixel(number, out, pools, chance) -> None:
    """In one view of one image, in one step."""
    settings, ranks = settings_of(number)
    step, position, view = int(chance.integers(2, 7)), int(chance.integers(12)), int(chance.integers(2))
    index, target = view_of(DATA, *divmod(step - 1, 4), position, view)
    pixel = (int(chance.integers(3)), int(chance.integers(16)), int(chance.integers(16)))
    patches = ((NORMALIZE, partial(nan_in_views_of, target, pixel)), *loss_scale_of(number))
    messages = pools(ranks).run(run, settings, str(out), 8, "auto", (), patches)
    assert all("1 steps in a row were skipped: non-finite" in message for message in messages)
    assert pools(1).run(replay, command_in(messages[0], out, step), patches) == [""]
    found = verdict(out, step)
    assert_image(found, index, position, ranks)
    assert found["kind"] == "not finite"


def poisoned_image(number, out, pools, chance) -> None:
    """A flat frame among the files, in a run that divides by contrast."""
    settings, ranks = settings_of(number)
    index, level = int(chance.integers(48)), int(chance.choice([0, 30, 77, 128, 200, 255]))
    write_images(out.parent / "images", 48, {index: level})
    order = GlobalBatchSampler(0, 48, 12)
    step = next(step for step in range(4) if index in order.batch(0, step)) + 1
    floor = float(chance.choice([0.0, 1e-30, 1e-12]))
    patches = ((NORMALIZE, partial(divided_by_contrast, floor)), *loss_scale_of(number))
    settings = [*settings, f"crossbatch.data.path={out.parent / 'images'}"]
    messages = pools(ranks).run(run, settings, str(out), 4, "auto", (), patches)
    assert pools(1).run(replay, command_in(messages[0], out, step), patches) == [""]
    found = verdict(out, step)
    assert_image(found, index, order.batch(0, step - 1).tolist().index(index), ranks)
    assert found["images"][0]["name"] == f"class{index * 2 // 48}/{index:04d}.png"


def assert_weight(found: dict, name: str, element: int, rank: int, shape: list[int]) -> None:
    assert found["kind"] == "state" and found["images"] == [], found
    assert found["state"]["name"] == name, found
    assert found["layer"] == name.removeprefix("parameters.").rpartition(".")[0]
    assert np.ravel_multi_index(found["state"]["element"], shape) == element
    assert found["rank"] == rank


def exploding_weight(number, out, pools, chance) -> None:
    """In a checkpoint from which the run is resumed."""
    settings, ranks = settings_of(number)
    patches = loss_scale_of(number)
    assert set(pools(ranks).run(run, settings, str(out), 4, "auto", (), patches)) == {""}
    folder = out / "checkpoints" / "step-00000004"
    shapes = checkpoint.read_manifest(folder)[0].shapes
    names = [name for name in shapes if name.startswith(("parameters.online", "parameters.batch", "parameters.pred"))]
    name = str(chance.choice([name for name in names if name.endswith("weight")]))
    element, factor = int(chance.integers(np.prod(shapes[name]))), float(chance.choice([1e8, 1e20, 1e30, np.nan]))

    def explode(weight: torch.Tensor) -> None:
        weight[element] = (float(weight[element]) or 0.1) * factor

    edit_checkpoint(folder, name, explode)
    messages = pools(ranks).run(run, settings, str(out), 6, "auto", (), patches)
    assert pools(1).run(replay, command_in(messages[0], out, 5), patches) == [""]
    assert_weight(verdict(out, 5), name, element, writer(folder, name, element), shapes[name])


def flipped_bit(number, out, pools, chance) -> None:
    """In a weight on one rank, between steps 3 and 4."""
    settings, ranks = settings_of(number)
    rank, bit = int(chance.integers(ranks)), int(chance.choice([30, 30, 31, 26, 25]))
    flip = flips_a_bit(rank, 4, bit, number, f"{out}.flipped")
    scale = loss_scale_of(number)
    messages = pools(ranks).run(run, settings, str(out), 6, "auto", (), ((TRAIN_ON, flip), *scale))
    name, element = json.loads(Path(f"{out}.flipped").read_text())
    assert pools(1).run(replay, command_in(messages[0], out, 4), scale) == [""]
    found = verdict(out, 4)
    shape = checkpoint.read_manifest(
        out / "checkpoints" / "step-00000004" if not messages[0] else out / "checkpoints" / "step-00000003"
    )[0].shapes[name]
    assert_weight(found, name, element, rank, shape)


FAULTS = [nan_pixel, poisoned_image, exploding_weight, flipped_bit]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, marks=slow_unless(number in (0, 3)), id=f"{FAULTS[number % 4].__name__}-{number}")
        for number in range(66)  # the last 16: 8 in bf16, 8 in fp16
    ],
)
def test_a_fault_is_traced_to_rank_image_and_layer(number, tmp_path, pools):
    FAULTS[number % 4](number, tmp_path / "run", pools, np.random.default_rng(100 + number))


def test_a_bit_that_no_checkpoint_has_is_found_by_what_the_ranks_had_when_they_stopped(tmp_path, pools):
    """Flipped right after a save, in the copy of a replicated weight of which another rank writes this part."""
    told, settings = tmp_path / "flipped", [*VIT, *ADAMW, *zero(0), *STOP]
    flip = flips_a_bit(1, 5, 30, 3, str(told), writes_it=False)
    messages = pools(2).run(run, settings, str(tmp_path / "run"), 6, "auto", (), ((TRAIN_ON, flip),))
    name, element = json.loads(told.read_text())
    assert pools(1).run(replay, command_in(messages[0], tmp_path / "run", 5)) == [""]
    folder = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert writer(folder, name, element) == 0
    assert_weight(verdict(tmp_path / "run", 5), name, element, 1, checkpoint.read_manifest(folder)[0].shapes[name])


# --- a step made again is the step that was made ----------------------------------------------------------------------


def views_in(folder: Path, rank: int, position: int) -> np.ndarray:
    """Both views of a position, uint8 [2, H, W, 3], from the PNG files of a replay."""
    files = sorted((folder / "views" / f"rank-{rank}").glob(f"position-{position:04d}-*.png"))
    assert [file.name[-5] for file in files] == ["1", "2"]
    return np.stack([np.asarray(Image.open(file)) for file in files])


@pytest.mark.parametrize(
    ("settings", "ranks", "replayed_on"),
    [
        ([*VIT, *ADAMW, *zero(3), "crossbatch.batchformer.dropout=0.5"], 2, 1),
        # Chunks of three images, over whose norms a ResNet's statistics go: six images of two ranks.
        pytest.param([*RESNET, *LARS, *fsdp(3), "train_micro_batch_size_per_gpu=3"], 2, 1, marks=pytest.mark.slow),
        pytest.param([*RESNET, *LARS, *zero(1)], 1, 2, marks=pytest.mark.slow),
        pytest.param([*VIT, *ADAMW, *fsdp(1), "train_micro_batch_size_per_gpu=2"], 2, 2, marks=pytest.mark.slow),
        pytest.param([*RESNET, *LARS, *zero(2), "train_micro_batch_size_per_gpu=4"], 2, 2, marks=pytest.mark.slow),
        pytest.param([*VIT, *ADAMW, *zero(2), "crossbatch.precision=bf16"], 2, 1, marks=pytest.mark.slow),
        pytest.param([*RESNET, *LARS, *fsdp(3), "crossbatch.precision=fp16"], 2, 1, marks=pytest.mark.slow),
    ],
    ids=["vit-2-on-1", "resnet-chunks-2-on-1", "resnet-1-on-2", "vit-2-on-2", "resnet-chunks-2-on-2", "bf16", "fp16"],
)
def test_a_step_made_again_has_the_same_views_and_losses(tmp_path, pools, settings, ranks, replayed_on):
    out, kept = tmp_path / "run", tmp_path / "kept"
    kept.mkdir()
    patches = ((TRAIN_ON, partial(keeps_views, str(kept))),)
    assert set(pools(ranks).run(run, settings, str(out), 6, "auto", (), patches)) == {""}
    n = 12 // ranks
    for rank in range(ranks) if settings[: len(VIT)] == VIT else (ranks - 1,):  # a ResNet's replay takes longer
        command = f"replay --run {out} --step 6 --window 2 --rank {rank}"
        assert set(pools(replayed_on).run(replay, command)) == {""}
        views, indices = torch.load(kept / f"6-{rank}.pt", weights_only=False)
        for position in range(n):
            found = views_in(out / "replay" / "step-6", rank, position)
            assert np.array_equal(found, views[:, position].permute(0, 2, 3, 1).numpy())
        files = list((out / "replay" / "step-6" / "views" / f"rank-{rank}").glob("*.png"))
        assert sorted({int(file.name.split("-")[3]) for file in files}) == sorted(indices.tolist())
    report = json.loads((out / "replay" / "step-6" / "loss.json").read_text())
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    rounding = 1e-5 if "crossbatch.precision=" not in settings[-1] else 1e-2
    assert report["loss"] == pytest.approx(line["loss"], rel=rounding) and report["parted_at"] is None
    assert report["grad_norm"] == pytest.approx(line["grad_norm"], rel=10 * rounding)
    assert report["terms"] == pytest.approx(line["loss_terms"], rel=rounding)
    means = [np.mean([rank["terms"][name] for rank in report["by_rank"]]) for name in report["terms"]]
    assert means == pytest.approx([*report["terms"].values()]) and len(report["by_rank"]) == ranks
    images = [json.loads(text) for text in (out / "replay" / "step-6" / "images.jsonl").read_text().splitlines()]
    by_image = {name: np.mean([image["terms"][name] for image in images]) for name in report["terms"]}
    assert by_image == pytest.approx(report["terms"], rel=rounding)
    found = verdict(out, 6)
    assert found["kind"] == "none" and found["images"] == []


@pytest.mark.long
def test_replay_from_the_seed_and_what_is_written_of_layers(tmp_path, one_rank):
    """Of a clean run, from its very first step on: nothing jumps, although everything grows in a warm-up."""
    assert one_rank.run(run, [*RESNET, *LARS, "crossbatch.checkpoint.keep=1"], str(tmp_path), 4) == [""]
    for step in (1, 4):  # the only checkpoint is that of step 4, so that both start from the seed
        assert one_rank.run(replay, f"replay --run {tmp_path} --step {step}") == [""]
        assert verdict(tmp_path, step)["kind"] == "none", verdict(tmp_path, step)
    lines = [json.loads(text) for text in (tmp_path / "replay" / "step-4" / "layers.jsonl").read_text().splitlines()]
    layers = {line["name"]: line for line in lines}
    names = [line["name"] for line in lines]
    order = ["input", "online.backbone.conv1", "online.backbone.layer4.1.bn2", "batchformer", "predictor"]
    assert sorted(order, key=names.index) == order and [line["order"] for line in lines] == list(range(len(lines)))
    conv = layers["online.backbone.conv1"]
    for values in (conv["output"], conv["gradient"], *conv["weights"]["weight"].values()):
        assert values["min"] < values["mean"] < values["max"] and values["std"] > 0 and values["not_finite"] == 0
    assert layers["momentum.backbone.conv1"]["gradient"] is None
    assert "batchformer (keys)" in layers
    before = checkpoint.read(tmp_path / "checkpoints" / "step-00000004", "parameters.online.backbone.conv1.weight")[""]
    after = conv["weights"]["weight"]["before"]["max"] + conv["weights"]["weight"]["update"]["max"]
    assert float(before.max()) <= after


def test_a_fault_inside_the_network_is_found_where_images_have_not_met(tmp_path, one_rank):
    """An image breaks a layer: the rows of that layer tell which."""
    settings = [*VIT, *ADAMW, *STOP]
    _, target = view_of(DATA, 0, 2, 5, 1)
    patches = ((BLOCK, breaks_on), (NORMALIZE, partial(nan_in_views_of, target, (0, 0, 0), MARK)))
    (message,) = one_rank.run(run, settings, str(tmp_path), 6, "auto", (), patches)
    assert one_rank.run(replay, command_in(message, tmp_path, 3), patches) == [""]
    found = verdict(tmp_path, 3)
    assert found["kind"] == "not finite" and found["layer"].startswith("online.backbone.blocks.1")
    assert [image["position"] for image in found["images"]] == [5] and found["rank"] == 0


# --- two runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_two_runs_part_where_one_of_them_was_changed(tmp_path, pools):
    one, two, folder = tmp_path / "one", tmp_path / "two", tmp_path / "two" / "checkpoints" / "step-00000004"
    settings = [*VIT, *ADAMW, *zero(1), "crossbatch.checkpoint.keep=9"]
    assert pools(2).run(run, settings, str(one), 6) == pools(2).run(run, settings, str(two), 4) == ["", ""]
    assert pools(1).run(replay, f"replay --run {one} --compare {two}") == [""]
    assert json.loads((one / "replay" / "compare-two" / "compare.json").read_text())["step"] is None
    name = "parameters.online.backbone.blocks.1.mlp.fc1.weight"
    edit_checkpoint(folder, name, lambda weight: weight[3:4].mul_(-40))
    assert pools(2).run(run, settings, str(two), 6) == ["", ""]
    assert pools(1).run(replay, f"replay --run {one} --compare {two}") == [""]
    found = json.loads((one / "replay" / "compare-two" / "compare.json").read_text())
    assert found["step"] == found["recorded_apart_at"] == 4
    assert found["differences"][0]["where"] == "online.backbone.blocks.1.mlp.fc1"
    assert found["differences"][0]["tensor"] == "weight weight" and len(found["differences"]) == 1
    text = " ".join(found["lines"])
    assert f"{two}: first fault: the state after step 4 is not what the steps give: {name}[" in text


def test_two_seeds_part_in_the_first_batch(tmp_path, one_rank):
    one, two, settings = tmp_path / "one", tmp_path / "two", [*VIT, *ADAMW]
    assert one_rank.run(run, settings, str(one), 2) == one_rank.run(run, [*settings, "crossbatch.seed=1"], str(two), 2)
    assert one_rank.run(replay, f"replay --run {one} --compare {two} --out {tmp_path / 'found'}") == [""]
    found = json.loads((tmp_path / "found" / "compare.json").read_text())
    assert found["step"] == 1 and found["differences"][0]["where"] == "batch"
    assert "other configuration: crossbatch.seed: 0 and 1" in found["lines"]


# --- wrong input ------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused_in_one_message(tmp_path, one_rank):
    out, images = tmp_path / "run", tmp_path / "images"
    write_images(images, 48, {})
    settings = [*VIT, *ADAMW, f"crossbatch.data.path={images}"]
    assert one_rank.run(run, settings, str(out), 4) == [""]
    order = GlobalBatchSampler(0, 48, 12)
    elsewhere = next(
        int(index) for index in order.batch(0, 2) if not np.isin((index - np.arange(16)) % 48, order.batch(0, 1)).all()
    )
    for flags, wanted in (
        (
            "--step 40",
            f"--step: given 40; {out} has come to step 4, as its metrics and checkpoints say; allowed: 1 to 5",
        ),
        ("--step 2 --rank 1", f"--rank: given 1; allowed: 0 to 0, the ranks of {out}"),
        ("--step 2 --image 48", "--image: given 48; allowed: 0 to 47, the images of the data set"),
        (
            f"--step 2 --image {elsewhere}",
            f"--image: given {elsewhere}, which is not in step 2; in this epoch, it is in step 3",
        ),
        (
            "--step 2 --data synthetic://48",
            "--data synthetic://48: holds 48 images, and the run had as many, but others",
        ),
        (f"--step 2 --compare {images}", f"--compare {images}: no config.json in it; allowed: the run directory of"),
    ):
        (message,) = one_rank.run(replay, f"replay --run {out} {flags}")
        assert message.startswith(wanted)
    (message,) = one_rank.run(replay, f"replay --run {tmp_path / 'nothing'} --step 2")
    assert message.startswith(f"--run {tmp_path / 'nothing'}: no such folder; allowed: the run directory of a run of")
    other = tmp_path / "other"
    other.mkdir()
    for content, wanted in (
        ('{"crossbatch"', "its config.json is cut off or damaged; allowed: the run directory of a run of"),
        ('{"crossbatch": 1}', "not a run of pretraining; allowed: a run directory of"),
    ):
        (other / "config.json").write_text(content)
        (message,) = one_rank.run(replay, f"replay --run {other} --step 2")
        assert message.startswith(f"--run {other}: {wanted}")


@pytest.mark.parametrize("listed", [False, True])
def test_a_file_that_has_changed_since_is_named(tmp_path, one_rank, listed):
    """Its name is the same, so nothing else tells but the time, and the loss."""
    out, images = tmp_path / "run", tmp_path / "images"
    write_images(images, 48, {})
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.png"))
    (images / "list.txt").write_text("\n".join(names))
    path = f"list://{images}/list.txt?eval={images}/list.txt" if listed else str(images)
    assert one_rank.run(run, [*VIT, *ADAMW, f"crossbatch.data.path={path}"], str(out), 2) == [""]
    name = names[int(GlobalBatchSampler(0, 48, 12).batch(0, 1)[4])]
    write_images(tmp_path / "others", 48, {int(Path(name).stem): 9})
    (images / name).write_bytes((tmp_path / "others" / name).read_bytes())
    (printed,) = one_rank.run(replay_printing, f"replay --run {out} --step 2")
    shown = name if listed else name.removeprefix("train/")
    assert f"files of 1 images are newer than the run's record of their step: {shown};" in printed
    assert verdict(out, 2)["kind"] == "other images"
