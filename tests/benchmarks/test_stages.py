"""The baselines are the same networks as ours, every stage is there, and bench-gpu goes on when its parts fail."""

import ast
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu
from benchmarks.stages import STAGES, Effort, checkpoint, heads, recipe, step
from benchmarks.stages.plain_step import PlainLars, PlainStep, plain_backbone
from crossbatch.data.augment.parameters import height_width
from crossbatch.engine.config import Device
from crossbatch.engine.planning.plan import Question, plan
from crossbatch.engine.tasks.build import build_model


def test_every_stage_is_a_module_with_run_and_says_what_it_is():
    files = {file.stem: file.read_text() for file in (Path(gpu.__file__).parent / "stages").glob("*.py")}
    assert sorted(STAGES) == sorted(stage for stage, text in files.items() if "def run(" in text)
    for stage in STAGES:
        tree = ast.parse(files[stage])
        assert ast.get_docstring(tree)
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run"]
        assert len(functions) == 1 and functions[0].args.args[0].arg == "effort", stage


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("bs4096", []),
        ("bs4096", ["crossbatch.model.arch=resnet18"]),
        ("vits_bs4096", ["crossbatch.data.image_size=32", 'crossbatch.model.backbone_args={"depth": 2}']),
    ],
)
def test_the_plain_backbone_has_our_parameters(name, overrides):
    cfg = recipe.load(name, overrides)
    with torch.device("meta"):
        ours, plain = build_model(cfg).online.backbone, plain_backbone(cfg.config)

    def shapes(network: torch.nn.Module) -> dict[str, tuple[torch.Size, bool]]:
        return {name: (p.shape, p.requires_grad) for name, p in network.named_parameters()}

    assert shapes(ours) == shapes(plain)
    assert plain.num_features == ours.num_features


@pytest.mark.parametrize(
    ("name", "arch"), [("cifar10", "resnet18"), ("cifar10", "resnet50"), ("vits_bs4096", "vit_small")]
)
def test_the_plain_backbone_draws_its_weights_as_ours(name, arch):
    cfg = recipe.load(name, [f"crossbatch.model.arch={arch}"])

    def spread(network: torch.nn.Module) -> dict[str, float]:
        return {name: float(p.detach().square().mean().sqrt()) for name, p in network.named_parameters()}

    ours, plain = spread(build_model(cfg).online.backbone), spread(plain_backbone(cfg.config))
    assert ours == pytest.approx(plain, rel=0.1)
    assert any(size == 0 for size in plain.values())


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("bs4096", ["crossbatch.model.arch=resnet18", "crossbatch.data.image_size=32"]),
        (
            "vits_bs4096",
            [
                "crossbatch.data.image_size=16",
                'crossbatch.model.backbone_args={"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}',
            ],
        ),
    ],
)
def test_the_plain_step_starts_at_chance_and_moves_everything(name, overrides, tuned):
    sizes = ["train_batch_size=16", "crossbatch.batchformer.group_size=8", "crossbatch.model.mlp_dim=32"]
    cfg = recipe.load(name, [*overrides, *sizes, "crossbatch.model.dim=64"])
    plain = PlainStep(cfg, torch.device("cpu"), tuned)
    for name, p in plain.encoder.named_parameters():
        if name.endswith("weight") and not p.any():  # the last norm of a branch, which would keep the rest of it still
            torch.nn.init.ones_(p)
    before = [p.detach().clone() for p in plain.parameters]
    size = height_width(cfg.config.crossbatch.data.image_size)
    loss = plain(torch.randint(0, 256, (2, 16, 3, *size), dtype=torch.uint8))
    assert loss.item() == pytest.approx(cfg.chance_loss, rel=0.15)
    moved = [not p.detach().equal(old) for p, old in zip(plain.parameters, before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)
    assert all(p.grad is None for p in plain.parameters)
    pairs = zip(plain.average.parameters(), plain.encoder.parameters(), strict=True)
    assert any(not average.equal(p) for average, p in pairs)


def test_the_plain_step_follows_the_seed():
    sizes = [
        "crossbatch.model.arch=resnet18",
        'crossbatch.model.backbone_args={"width": 4}',
        "crossbatch.model.mlp_dim=32",
    ]
    sizes += ["crossbatch.batchformer.group_size=8", "train_batch_size=16"]
    steps = [PlainStep(recipe.load("bs4096", [*sizes, f"crossbatch.seed={n}"]), torch.device("cpu")) for n in (0, 1, 1)]
    first, other, same = (next(step.encoder.parameters()) for step in steps)
    assert other.equal(same) and not other.equal(first)


def test_plain_lars_in_foreach_calls_is_the_loop():
    torch.manual_seed(0)
    shapes = [(4, 3), (5,), (2, 3, 2, 2), (3,), (6, 2)]
    start = [torch.randn(shape) for shape in shapes]
    start[4].zero_()  # a norm of nothing adapts nothing
    ends = []
    for foreach in (False, True):
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = PlainLars([{"params": parameters, "weight_decay": 0.1}], lr=0.5, foreach=foreach)
        for number in range(3):
            for i, p in enumerate(parameters):
                p.grad = torch.full_like(p, 0.1 * (i + 1) * (-1) ** number)
            optimizer.step()
        ends.append(parameters)
    for one, at_once in zip(*ends, strict=True):
        torch.testing.assert_close(one, at_once)


def test_both_sides_of_the_heads_compute_in_the_precision_of_training():
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                dtypes.update(t.dtype for t in args if isinstance(t, torch.Tensor))
            return func(*args, **(kwargs or {}))

    for precision, expected in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        calls = heads.heads(4, precision, compiled=False)
        calls |= {f"loss, {name}": heads.term(name, 4, 8, precision) for name in (heads.PLAIN, heads.FP32)}
        for name, call in calls.items():
            dtypes: set[torch.dtype] = set()
            with Products():
                call()
            assert dtypes == {torch.float32 if heads.FP32 in name else expected}, name


def test_the_stall_of_a_save_holds_what_the_next_step_waits_for(monkeypatch):
    """Count on a clock by hand: the call takes 1 ms, a step 10 ms, and 40 ms more while copies are under way."""
    now = [0.0]

    def call_ms(call):
        before = now[0]
        call()
        return now[0] - before

    copying = [False]

    def save():
        now[0] += 1
        copying[0] = True

    def train():
        now[0] += 10 + 40 * copying[0]
        copying[0] = False

    monkeypatch.setattr(checkpoint, "call_ms", call_ms)
    assert checkpoint.stall_ms(save, train, [10.0, 10.0, 12.0]) == 41
    assert checkpoint.stall_ms(lambda: None, train, [11.0]) == 0  # noise


@pytest.mark.long
def test_predictions_for_this_gpu_name_the_cases_that_follow(monkeypatch):
    h100 = Device("cuda", True, "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(Device, "detect", staticmethod(lambda: h100))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: h100.name)
    monkeypatch.setattr("crossbatch.engine.planning.plan._helps", lambda *_: ())  # each is a plan of its own
    network = "ResNet-18, 64 px"
    group = step._beside_plain(network, 16)
    rows = list(step._predictions(group, [(network, 16, 8)]))
    ours = [setup for setup in group if setup.kind == step.OURS]
    assert [row.settings["prediction_of"] for row in rows[:3]] == [setup.case for setup in ours]
    found = plan(
        Question(str(recipe.FOLDER / "bs4096.json"), tuple(step.NETWORKS[network]) + tuple(SIXTEEN), "h100-80g", 1)
    )
    assert rows[0].p50 == pytest.approx(found.estimate.step_ms)
    assert [row.unit for row in rows] == ["ms"] * 3 + ["MiB"] * 2 and rows[3].p50 > rows[4].p50
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card of tomorrow")
    assert list(step._predictions(group, [])) == []


@pytest.mark.parametrize("effort", [Effort.BRIEF, Effort.FULL])
def test_a_gpu_measures_every_size_beside_both_plain_steps_and_4096_images(monkeypatch, effort):
    """Say that 512 images fit, and chunks of 1024: what is measured on a GPU, without one."""
    monkeypatch.setattr(step, "_largest", lambda network, device: 512)
    monkeypatch.setattr(step, "_automatic_chunk", lambda network, device: 1024)
    groups = list(step._groups(effort, torch.device("cuda")))
    plain, tuned, ours = step.PLAIN, step.TUNED, step.OURS
    sizes = {}
    for group in groups:
        if [setup.kind for setup in group[:3]] == [plain, tuned, ours]:  # the rows that a ratio is of
            assert all(setup.chunk == setup.images for setup in group[:3])
            sizes.setdefault((group[0].network, group[0].precision), set()).add(group[0].images)
    assert sizes == {
        (step.RESNET, "auto"): {64, 128, 256, 512},
        (step.RESNET, "fp16"): {256},
        (step.VIT, "auto"): {256},
    }
    whole = [(setup.chunk, setup.case) for group in groups for setup in group if setup.images == 4096]
    assert [chunk for chunk, _ in whole] == [1024, 512] and "automatic chunk" in whole[0][1]
    assert {step.COMPILED, step.OURS_COMPILED} <= {setup.kind for group in groups for setup in group}


SIXTEEN = ["train_batch_size=16", "train_micro_batch_size_per_gpu=16", "crossbatch.batchformer.group_size=16"]


@pytest.mark.long
def test_bench_gpu_tells_how_each_part_ended_goes_on_and_packs(tmp_path, capfd):
    parts = gpu.Parts(tmp_path, "1", 60)
    python = [sys.executable, "-S", "-c"]
    parts.run("tests-rest", [*python, "print('3 passed')"], 20)
    parts.run("bad", [*python, "print('no card'); raise SystemExit(4)"], 20)
    parts.end = time.monotonic()  # nothing is left but the five seconds that any part gets
    parts.run("slow", [*python, "import time; print('here', flush=True); time.sleep(60)"], 20)
    parts.run("ema", [*python, "print(1)"], parts.left_s)
    outcomes = json.loads((tmp_path / "outcomes-1.json").read_text())
    assert list(outcomes) == ["tests-rest", "bad", "slow", "ema"]
    assert outcomes["tests-rest"].startswith("done in") and outcomes["tests-rest"].endswith(": 3 passed")
    assert outcomes["bad"].startswith("failed with exit code 4") and outcomes["bad"].endswith(": no card")
    assert outcomes["slow"].startswith("stopped at its limit after 5") and outcomes["slow"].endswith(": here")
    assert outcomes["ema"] == "left out: no time"
    assert (tmp_path / "bad.txt").read_text() == "no card\n"
    printed = capfd.readouterr().out
    assert "slow: stopped" in printed and "no card" in printed
    with tarfile.open(tmp_path / "bench-gpu-1.tgz") as archive:
        assert archive.getnames() == ["bad.txt", "outcomes-1.json", "slow.txt", "tests-rest.txt"]
        packed = archive.extractfile("outcomes-1.json")
        assert packed is not None and json.load(packed) == outcomes


def test_the_two_calls_of_bench_gpu_have_every_stage_once():
    names = [name for shares in gpu.PARTS.values() for name in shares]
    assert sorted(names) == sorted([*STAGES, *gpu.TESTS, "machine"])
    parts = gpu.Parts.__new__(gpu.Parts)
    parts.out = Path("out")
    covered = {path for paths in gpu.TESTS.values() for path in paths if not path.startswith("--")}
    ignored = {f"--ignore={path}" for path in covered - {"tests"}}
    assert ignored <= set(parts.command("tests-rest", "brief")) and "--brief" in parts.command("step", "brief")


def test_a_failing_test_is_printed_before_the_next_one_starts(tmp_path):
    """A second test that never ends stands for a machine that is taken away."""
    (tmp_path / "test_two.py").write_text(
        "import os\ndef test_first():\n    assert 1 == 2, 'the first'\ndef test_second():\n    os._exit(7)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "benchmarks.instant_failures", "test_two.py"]
    environment = {**os.environ, "PYTHONPATH": str(gpu.ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 7
    assert "FAILED test_two.py::test_first" in done.stdout and "AssertionError: the first" in done.stdout


def test_a_quick_stage_has_rows_with_their_baseline():
    """Measure `heads` without the processes that weigh it."""
    plain, ours = itertools.islice(heads.run(Effort.QUICK), 2)
    assert (ours.baseline, plain.ratio) == (plain.case, 1.0)
    assert ours.n >= 2 and ours.ratio == pytest.approx(plain.p50 / ours.p50)
