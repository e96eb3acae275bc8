"""Quality without labels, against closed forms and numpy's SVD; on one and two ranks; in a run, which warns of a collapse."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from crossbatch.data import moco_v3_augmentations, open_source
from crossbatch.data.augment.backends import augment_function, make_views
from crossbatch.engine.evaluation.features import EvalLoaderConfig, extract, gathered
from crossbatch.engine.evaluation.quality import alignment_and_uniformity, ranks
from crossbatch.models.collective import Collective
from tests.small_runs import LARS, RESNET, VIT, fsdp, run, zero

MEASURES = ("rankme", "effective_rank", "alignment", "uniformity")


def perplexity(weights: np.ndarray) -> float:
    shares = weights / weights.sum()
    return math.exp(-sum(share * math.log(share) for share in shares if share > 0))


def with_singular_values(values: list[float], images: int, width: int) -> torch.Tensor:
    """Return centred features [images, width] with these singular values, and 0 for the others."""
    rng = np.random.default_rng(0)
    left = rng.standard_normal((images, len(values)))
    left, _ = np.linalg.qr(left - left.mean(0))
    right, _ = np.linalg.qr(rng.standard_normal((width, len(values))))
    return torch.tensor(left @ np.diag(values) @ right.T).float()


@pytest.mark.parametrize(
    ("values", "rankme"), [([2.0], 1), ([3.0] * 5, 5), ([1.0, 1.0, 2.0], math.exp(1.5 * math.log(2)))]
)
@pytest.mark.parametrize(("images", "width"), [(50, 8), (9, 30)])
def test_features_of_known_rank(values, rankme, images, width):
    found = ranks(with_singular_values(values, images, width), Collective())
    assert found["rankme"] == pytest.approx(rankme, rel=1e-4)
    assert found["effective_rank"] == pytest.approx(perplexity(np.square(values)), rel=1e-4)


def test_ranks_against_numpy():
    features = torch.randn(70, 12, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 13) + 40
    matrix = features.double().numpy()
    found = ranks(features, Collective())
    assert found["rankme"] == pytest.approx(perplexity(np.linalg.svd(matrix)[1]), rel=1e-9)
    assert found["effective_rank"] == pytest.approx(perplexity(np.linalg.svd(np.cov(matrix.T, bias=True))[1]), rel=1e-9)


@pytest.mark.parametrize("noise", [0.0, 1e-6])  # rounding of fp32
def test_identical_features_have_rank_one(noise):
    features = torch.randn(1, 40) + noise * torch.randn(100, 40)
    assert ranks(features, Collective()) == {"rankme": pytest.approx(1, abs=2e-3), "effective_rank": 1.0}
    found = alignment_and_uniformity(features, features.flip(0))
    assert found == {"alignment": pytest.approx(0, abs=1e-8), "uniformity": pytest.approx(0, abs=1e-8)}


def test_orthogonal_features_fill_all_dimensions():
    features = 3 * torch.eye(16)
    assert ranks(features, Collective()) == {"rankme": pytest.approx(16), "effective_rank": pytest.approx(15)}
    found = alignment_and_uniformity(
        features, -0.5 * features
    )  # of unit length: opposite, and orthogonal to the others
    assert found == {"alignment": pytest.approx(4), "uniformity": pytest.approx(-4)}


def test_both_views_count_for_uniformity():
    views, others = torch.eye(4), torch.ones(4, 4)
    assert alignment_and_uniformity(views, others)["uniformity"] == pytest.approx(-2)
    assert alignment_and_uniformity(views, others)["alignment"] == pytest.approx(2 - 2 * 0.5)


def test_what_cannot_be_measured_is_left_out():
    features = torch.randn(5, 3)
    features[2, 1] = math.inf
    assert ranks(features, Collective()) == alignment_and_uniformity(features, features) == {}
    assert ranks(features[:0], Collective()) == alignment_and_uniformity(features[:1], features[:1]) == {}


def ranks_here(shares: list[int]) -> dict[str, float]:
    from crossbatch.engine.runtime.distributed import GroupCollective

    collective = GroupCollective()
    start = sum(shares[: collective.rank])
    return ranks(with_singular_values([3, 2, 1], 20, 6)[start:][: shares[collective.rank]] + 1, collective)


@pytest.mark.parametrize("shares", [[13, 7], [20, 0]])
def test_two_ranks_find_the_ranks_of_one(threads, shares):
    alone = ranks(with_singular_values([3, 2, 1], 20, 6) + 1, Collective())
    assert threads(2).run(ranks_here, shares) == [pytest.approx(alone, rel=1e-9)] * 2


# --- the two views -----------------------------------------------------------------------------------------------------

VIEWS = moco_v3_augmentations(16)


def pairs_here(path: str) -> tuple[list[int], torch.Tensor, int]:
    """Return which images of all ranks have two views, the views' mean colours, and how often the network was asked."""
    from crossbatch.engine.runtime.distributed import GroupCollective

    asked, collective = [], GroupCollective()

    def embed(images: torch.Tensor) -> torch.Tensor:
        asked.append(len(images))
        return images.mean((2, 3))

    reading = EvalLoaderConfig(16, 4, 0, torch.device("cpu"), augmentations=VIEWS, seed=5)
    rows = extract(embed, open_source(path), np.arange(11), reading, collective, augmented=True)
    rows = gathered(rows, collective)
    assert max(asked) <= 2  # of two views, half as many images at a time
    return rows.indices_N.tolist(), rows.features_NC, len(asked)


def test_views_are_those_of_the_first_epoch_on_any_number_of_ranks(one_rank, two_ranks, tmp_path):
    from crossbatch.data import prepare

    path = f"shapes://{tmp_path / 'images'}?train=11&val=8&size=20"
    prepare(path)
    source = open_source(path)
    broken = tmp_path / "images" / "train" / source.name(3)
    kept, whole = [index for index in range(11) if index != 3], np.array(source.open(0))
    pixels = [np.array(source.open(index)) for index in kept]
    broken.write_bytes(b"")
    assert whole.shape == (20, 20, 3)
    views = make_views(augment_function("torchvision"), pixels, VIEWS, 5, 0, np.array(kept)).double() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    want = ((views - mean) / std).mean((-2, -1)).movedim(1, 0).flatten(1)  # the views of an image side by side
    for pool, times in ((one_rank, 12), (two_ranks, 6)):
        for indices, features, asked in pool.run(pairs_here, path):
            order = np.argsort(indices)
            assert sorted(indices) == kept and asked == times
            torch.testing.assert_close(features[order].double(), want, atol=1e-5, rtol=1e-4)


# --- runs --------------------------------------------------------------------------------------------------------------


def lines_of(out: Path) -> dict[int, dict]:
    return {line["step"]: line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())}


@pytest.fixture
def unlabelled(tmp_path) -> str:
    """Write 48 images in one folder, without classes."""
    from PIL import Image

    rng, folder = np.random.default_rng(0), tmp_path / "images"
    folder.mkdir()
    for number in range(48):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return str(folder)


@pytest.mark.parametrize(
    ("model", "sharding"),
    [(VIT, fsdp(3)), pytest.param(RESNET, zero(1), marks=pytest.mark.slow)],
    ids=["vit", "resnet"],
)
def test_images_without_labels_are_measured_alike_on_one_and_two_ranks(
    unlabelled, one_rank, two_ranks, tmp_path, model, sharding
):
    settings = [*model, *LARS, *sharding, f"crossbatch.data.path={unlabelled}", "crossbatch.evaluate.every_epochs=2"]
    settings += ["crossbatch.evaluate.knn_every_epochs=1", "crossbatch.evaluate.sample_size=31"]
    found = []
    for pool in (one_rank, two_ranks):
        out = tmp_path / f"run{pool.world_size}"
        assert set(pool.run(run, settings, str(out), 9)) == {""}
        lines = lines_of(out)
        assert [step for step, line in lines.items() if "rankme" in line] == [0, 8, 9]  # 4 steps an epoch, and the end
        assert not any("knn_top1" in line for line in lines.values())
        found.append([lines[0][name] for name in MEASURES])
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    rankme, effective_rank, alignment, uniformity = found[0]
    assert 1 < rankme < 31 and 1 < effective_rank < 31 and 0 < alignment < 4 and -4 < uniformity < 0


@pytest.mark.long
def test_knn_and_quality_have_schedules_of_their_own(one_rank, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = [*VIT, *LARS, "crossbatch.evaluate.knn_k=3"]
    every = [f"crossbatch.evaluate.{name}=" for name in ("knn_every_epochs", "every_epochs")]
    assert one_rank.run(run, [*settings, f"{every[0]}1", f"{every[1]}2"], str(tmp_path / "both"), 9) == [""]
    assert one_rank.run(run, [*settings, f"{every[0]}2", f"{every[1]}0"], str(tmp_path / "knn"), 9) == [""]
    both, knn = (lines_of(tmp_path / name) for name in ("both", "knn"))
    assert [step for step, line in both.items() if "knn_top1" in line] == [0, 4, 8, 9]
    assert [step for step, line in both.items() if "uniformity" in line] == [0, 8, 9]
    assert not any(set(MEASURES) & set(line) for line in knn.values())
    for step in (0, 8, 9):  # what is measured changes neither the training nor k-NN
        assert both[step]["knn_top1"] == knn[step]["knn_top1"] and both[step].get("loss") == knn[step].get("loss")
    board = EventAccumulator(str(tmp_path / "both")).Reload()
    assert [event.step for event in board.Scalars("run/effective_rank")] == [0, 8, 9]


def test_a_wrong_mean_is_refused_before_the_features_are_read(one_rank, tmp_path):
    settings = [*VIT, *LARS, "crossbatch.evaluate.every_epochs=1", "crossbatch.data.mean=[0.5]"]
    (message,) = one_rank.run(run, settings, str(tmp_path / "run"), 1)
    assert message.startswith("InputError: crossbatch.data.mean has 1 numbers, but images have 3 channels")


def on_a_line():
    """For `extract` of the monitor: features that differ along one line, which feature_std does not see."""
    import dataclasses

    def collapsed(*arguments):
        rows = extract(*arguments)
        middle = rows.features_NC.mean(1, keepdim=True)
        return dataclasses.replace(rows, features_NC=(middle - middle.mean()) * torch.ones(24))

    return collapsed


def test_a_collapse_to_a_line_is_warned_of(one_rank, tmp_path):
    settings = [*VIT, *LARS, "crossbatch.evaluate.every_epochs=1"]
    patches = (("crossbatch.engine.evaluation.monitor.extract", on_a_line),)
    assert one_rank.run(run, settings, str(tmp_path / "run"), 4, "auto", (), patches) == [""]
    assert one_rank.run(run, settings, str(tmp_path / "sound"), 4) == [""]
    warned, quiet = (
        [line for line in Path(f"{tmp_path / name}.told").read_text().splitlines() if "effective_rank fell" in line]
        for name in ("run", "sound")
    )
    assert len(warned) == 1 and quiet == []
    assert warned[0].startswith(
        "warning: step 4: effective_rank fell to 1: the features of different images differ along"
    )
