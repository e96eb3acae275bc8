"""The linear probe against its formula, scikit-learn, and itself: alone or beside others, on one rank or two."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from crossbatch.data import GlobalBatchSampler, TrainLoader, open_source, prepare
from crossbatch.data.augment.parameters import crop_and_flip
from crossbatch.engine.config import Device, load_config
from crossbatch.engine.config.evaluation import LinearConfig
from crossbatch.engine.config.resolve import resolve_training
from crossbatch.engine.evaluation.batches import AugmentedFeatures, CachedFeatures
from crossbatch.engine.evaluation.features import EvalLoaderConfig, FeatureSet, FrozenBackbone, extract, fingerprint
from crossbatch.engine.evaluation.linear_probe import LinearProbe
from crossbatch.engine.run_log import StepClock
from crossbatch.models import build_backbone
from crossbatch.models.collective import Collective

CPU = torch.device("cpu")
WIDTH, CLASSES = 6, 3


def batches(count: int, size: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (2 * torch.randn(size, WIDTH, generator=generator), torch.randint(0, CLASSES, (size,), generator=generator))
        for _ in range(count)
    ]


def trained(peaks: list[float], epochs: int = 3, **options) -> LinearProbe:
    probe = LinearProbe(WIDTH, CLASSES, peaks, **options)
    for epoch in range(epochs):
        probe.start_epoch(epoch, epochs)
        for features, labels in batches(2):
            probe.step(features, labels)
    return probe


def weights(probe: LinearProbe, head: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return probe.heads[head].get_parameter("weight").detach(), probe.heads[head].get_parameter("bias").detach()


def by_the_formula(start: torch.Tensor, peak: float, momentum: float, decay: float, norm: bool) -> tuple:
    """Train softmax regression in float64: gradient of the mean loss, velocity, half a cosine over three epochs."""
    W, b = start.double().numpy().copy(), np.zeros(CLASSES)
    velocity = [np.zeros_like(W), np.zeros_like(b)]
    for epoch in range(3):
        lr = peak * 0.5 * (1 + math.cos(math.pi * epoch / 3))
        for features, labels in batches(2):
            x = features.double().numpy()
            if norm:
                x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
            logits = x @ W.T + b
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            p[np.arange(len(p)), labels.numpy()] -= 1
            gradients = [p.T @ x / len(x) + decay * W, p.mean(0) + decay * b]
            velocity = [momentum * v + g for v, g in zip(velocity, gradients, strict=True)]
            W, b = W - lr * velocity[0], b - lr * velocity[1]
    return torch.from_numpy(W).float(), torch.from_numpy(b).float()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.0), (0.5, 0.1)])
def test_training_against_the_formula(norm, momentum, decay):
    start, bias = weights(LinearProbe(WIDTH, CLASSES, [1.0]))
    assert bias.count_nonzero() == 0
    probe = trained([0.3], momentum=momentum, weight_decay=decay, norm=norm)
    for got, want in zip(weights(probe), by_the_formula(start, 0.3, momentum, decay, norm), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_weights_start_at_a_standard_deviation_of_one_hundredth():
    weight, _ = weights(LinearProbe(500, 100, [1.0], seed=1))
    assert weight.std().item() == pytest.approx(0.01, rel=0.02) and abs(weight.mean().item()) < 2e-4
    assert not weight.equal(weights(LinearProbe(500, 100, [1.0], seed=2))[0])


def test_rates_side_by_side_end_where_each_ends_alone():
    together = trained([0.01, 0.3, 1e6], norm=True)
    for head, peak in enumerate((0.01, 0.3)):
        for got, want in zip(weights(together, head), weights(trained([peak], norm=True)), strict=True):
            assert got.equal(want)


def test_a_rate_that_diverges_is_named_and_leaves_the_others_alone():
    probe = trained([0.1, 3e38])
    assert probe.diverged() == [False, True]
    assert weights(probe)[0].equal(weights(trained([0.1]))[0])


def test_the_norm_removes_the_scale_of_the_features():
    small, large = (LinearProbe(WIDTH, CLASSES, [0.3], norm=True) for _ in range(2))
    for features, labels in batches(8):
        small.step(features, labels)
        large.step(1000 * features, labels)
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-4, atol=1e-5)
    features, _ = batches(9)[-1]
    assert small.predict(features).equal(large.predict(1000 * features))


def test_state_continues_the_same_training():
    whole = trained([0.1, 0.5], epochs=4, norm=True)
    first = LinearProbe(WIDTH, CLASSES, [0.1, 0.5], norm=True)
    for epoch in range(4):
        if epoch == 2:
            state, first = first.state(), LinearProbe(WIDTH, CLASSES, [0.1, 0.5], norm=True, seed=5)
            first.load(state)
        first.start_epoch(epoch, 4)
        for features, labels in batches(2):
            first.step(features, labels)
    assert all(one.equal(other) for one, other in zip(weights(first, 1), weights(whole, 1), strict=True))
    assert first.norm.get_buffer("running_var").equal(whole.norm.get_buffer("running_var"))


def train_on_this_rank(norm: bool) -> list:
    from crossbatch.engine.runtime.distributed import GroupCollective

    collective = GroupCollective()
    probe = LinearProbe(WIDTH, CLASSES, [0.3, 0.1], norm=norm, collective=collective)
    for epoch in range(3):
        probe.start_epoch(epoch, 3)
        for features, labels in batches(2):
            mine = slice(6 * collective.rank, 6 * collective.rank + 6)
            probe.step(features[mine], labels[mine])
    return [*weights(probe), probe.norm.state_dict()]


@pytest.mark.parametrize("norm", [False, True])
def test_two_ranks_train_as_one(threads, norm):
    alone = trained([0.3, 0.1], norm=norm)
    for weight, bias, statistics in threads(2).run(train_on_this_rank, norm):
        torch.testing.assert_close((weight, bias), weights(alone), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(statistics, alone.norm.state_dict())


# --- on images ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> str:
    path = f"shapes://{tmp_path_factory.mktemp('shapes') / 'images'}?train=400&val=400&size=32"
    prepare(path)
    return path


@pytest.fixture(scope="module")
def frozen() -> FrozenBackbone:
    torch.manual_seed(0)
    backbone = build_backbone("resnet18", 32, "small", backbone_args={"width": 8})
    return FrozenBackbone(backbone, CPU)


def test_the_probe_reaches_what_scikit_learn_reaches(shapes, frozen):
    """Cross-entropy with weight decay d over N images is what LogisticRegression minimises with C = 1 / (d N)."""
    reading = EvalLoaderConfig(32, 200, 0, CPU)
    sources = [open_source(shapes, split) for split in ("train", "eval")]
    train, evaluation = (extract(frozen, s, np.arange(len(s)), reading, Collective()) for s in sources)
    mean, std = train.features_NC.mean(0), train.features_NC.std(0).clamp(min=1e-6)
    train, evaluation = (
        FeatureSet((r.features_NC - mean) / std, r.labels_N, r.indices_N, []) for r in (train, evaluation)
    )
    order, epochs, decay = GlobalBatchSampler(0, len(train), 100), 90, 0.02
    probe = LinearProbe(frozen.num_features, 8, [0.1, 0.3], weight_decay=decay)
    cached = CachedFeatures(train, order, StepClock())
    for epoch in range(epochs):
        probe.start_epoch(epoch, epochs)
        for features, labels in cached.epoch(epoch):
            probe.step(features, labels)
    ours = (probe.predict(evaluation.features_NC) == evaluation.labels_N).double().mean(1) * 100
    theirs = LogisticRegression(C=1 / (decay * len(train)), max_iter=2000)
    theirs.fit(train.features_NC.double().numpy(), train.labels_N.numpy())
    want = 100 * theirs.score(evaluation.features_NC.double().numpy(), evaluation.labels_N.numpy())
    assert want > 25  # chance is 12.5
    assert ours.tolist() == pytest.approx([want] * 2, abs=1.0)


def test_training_images_are_cropped_and_flipped_and_nothing_else(shapes):
    source = open_source(shapes, "train")
    order = GlobalBatchSampler(0, len(source), 8)
    views = {}
    for backend in ("torchvision", "opencv"):
        loader = TrainLoader(source, sampler=order, augmentations=[crop_and_flip(32, 0.08)], backend=backend)
        batch = next(loader.epoch(0))
        views[backend] = batch.views[0].float()
        assert batch.views.shape == (1, 8, 3, 32, 32)
        # Each view's colours are those of its image: no jitter, no gray, no blur beyond that of resizing.
        for view, index in zip(views[backend], batch.indices, strict=True):
            pixels = np.asarray(source.open(int(index))).reshape(-1, 3)
            low, high = (torch.from_numpy(limit.astype(np.float32)) for limit in (pixels.min(0), pixels.max(0)))
            assert (view.amin((1, 2)) >= low - 1).all() and (view.amax((1, 2)) <= high + 1).all()
            assert view.std() > 5
    assert (views["torchvision"] - views["opencv"]).abs().mean() < 2.6


def test_a_broken_image_brings_the_label_of_the_one_in_its_place(tmp_path, frozen):
    prepare(f"shapes://{tmp_path / 'few'}?train=16&val=8&size=32")
    source = open_source(tmp_path / "few", "train")
    for index in (0, 5, 15):  # each is followed by an image of its own class or another: 2 of each class
        (tmp_path / "few/train" / source.name(index)).write_bytes(b"")
    run = resolve_training(
        load_config(None, ["train_batch_size=16", "crossbatch.data.max_skipped_fraction=1"], LinearConfig),
        1,
        Device("cpu"),
        1,
    )
    order, reading = GlobalBatchSampler(0, 16, 16), EvalLoaderConfig(32, 5, 0, CPU)
    rows = extract(frozen, source, np.arange(16), reading, Collective())
    assert len(rows) == 13 and len(rows.skipped) == 3
    cached = CachedFeatures(rows, order, StepClock())
    asked = order.batch(0, 0)
    read = [{0: 1, 5: 6, 15: 1}.get(int(index), int(index)) for index in asked]
    features, labels = next(cached.epoch(0))
    assert labels.tolist() == source.labels[read].tolist()
    assert features.equal(rows.features_NC[[rows.indices_N.tolist().index(index) for index in read]])
    augmented = AugmentedFeatures(frozen, source, order, reading, run, StepClock())
    features, labels = next(augmented.epoch(0))
    assert labels.tolist() == source.labels[read].tolist() and features.shape == (16, 64)
    assert (cached.replaced, augmented.replaced) == (3, 3 + 1)  # 15 is replaced by 0, which is broken, too
    assert F.mse_loss(features, next(cached.epoch(0))[0]) > 0


def test_a_backbone_that_changed_is_noticed(frozen):
    assert fingerprint(frozen.backbone) == frozen.fingerprint
    statistics = frozen.backbone.get_buffer("layer1.0.bn1.running_mean")
    before = statistics[0].clone()
    statistics[0] += 1e-7
    assert fingerprint(frozen.backbone) != frozen.fingerprint
    statistics[0] = before
    assert fingerprint(frozen.backbone) == frozen.fingerprint
