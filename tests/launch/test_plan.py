"""launch/plan.py: what it says of bs4096 on 16 V100, and of what cannot be."""

import json
import sys
from unittest import mock

import pytest

from crossbatch.engine.planning.plan import Question, as_dict, noise_of, notes
from crossbatch.engine.planning.plan import plan as answer
from crossbatch.engine.runtime.exit_codes import run_main
from crossbatch.launch import plan

BS4096 = "ds_configs/bs4096.json"


def ask(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    monkeypatch.setattr(sys, "argv", ["launch/plan.py", *arguments])
    code = 0
    try:
        run_main(plan.main)
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def v100s():
    """bs4096 on two nodes of eight, with what would help, and on four of four."""
    with_help = answer(Question(BS4096, (), "v100-32g", 16, 2, "4xedr"))
    with mock.patch(HELPS, NO_HELP):
        return {2: with_help, 4: answer(Question(BS4096, (), "v100-32g", 16, 4, "edr"))}


HELPS, NO_HELP = "crossbatch.engine.planning.plan._helps", lambda *_: ()


@pytest.fixture(autouse=True)
def no_help(v100s, monkeypatch):
    """Answer without what would help, nine plans more; only `v100s` has it."""
    monkeypatch.setattr(HELPS, NO_HELP)


def test_bs4096_on_16_v100(v100s):
    """Between the only published run (Fast-MoCo, 924 images/s) and what the backbone alone would allow."""
    for found in v100s.values():
        low, rate, high = found.images_per_s
        assert found.fits and found.cfg.chunk == 256 and found.cfg.precision == "fp16"
        backbone = 256 / found.estimate.stage("backbone").ms * 1000 * 16
        assert 924 < low < rate < high < backbone
        assert high / rate == pytest.approx(rate / low) and high / rate > 1.2
        assert found.estimate.limits[0] == "the backbone"
        assert found.hours[1] == pytest.approx(100 * 312 * 4096 / rate / 3600)
        # 3/8 of 1150 a GPU by the roofline; our norms move 0.75 of the bytes that the fitted runs moved.
        assert backbone == pytest.approx(6900 / 0.75, rel=0.1)
    assert v100s[4].estimate.stage("gradients").ms > 2 * v100s[2].estimate.stage("gradients").ms


def test_every_number_says_where_it_is_from(v100s):
    facts = json.loads(json.dumps(as_dict(v100s[2])))
    for thing in [*facts["stages"], *facts["memory_gib"]["parts"], *facts["helps"]]:
        assert thing["origin"], thing
    assert facts["helps"]
    assert facts["images_per_s"]["extrapolated"]
    assert any("no step of this recipe was measured" in note for note in facts["notes"])
    assert sum(stage["ms"] for stage in facts["stages"]) == pytest.approx(facts["step_ms"])
    assert sum(part["gib"] for part in facts["memory_gib"]["parts"]) == pytest.approx(facts["memory_gib"]["total"])
    assert facts["collectives"]["norms"]["calls"] == 2 * (53 - 4 + 2 + 1)


def test_one_gpu_takes_chunks_and_waits_for_nobody():
    found = answer(Question(BS4096, (), "v100-32g", 1))
    assert found.cfg.chunks > 10 and found.fits
    assert found.estimate.stage("stragglers").ms == found.estimate.stage("norms").ms == 0


def test_hours_are_those_of_the_recipe():
    found = [answer(Question(BS4096, (f"crossbatch.schedule.epochs={n}",), "v100-32g", 16, 2)) for n in (100, 300)]
    assert found[1].hours == pytest.approx([3 * hours for hours in found[0].hours])


def test_a_chunk_is_chosen_that_fits():
    """The chunk and "fits" are of one model: where a run chooses, what it chooses fits."""
    buckets = ("zero_optimization.overlap_comm=true", "zero_optimization.reduce_bucket_size=500000000")  # of 2 GB each
    overrides = ("zero_optimization.stage=2", *buckets)
    found = answer(Question("ds_configs/r50_vanilla_bs4096.json", overrides, "v100-16g", 32, 4))
    assert found.fits and found.cfg.chunk == 64


def test_norms_within_a_node_gain_most_where_they_wait_for_fewer_ranks():
    """The ranks of 4 nodes of 4 wait less than those of 2 nodes of 8; on one node nothing changes."""

    def gain(nodes: int) -> float:
        plain, by_node = (
            answer(Question(BS4096, (f"crossbatch.model.norm_ranks={ranks}",), "v100-32g", 16, nodes, "edr")).estimate
            for ranks in ("world", "node")
        )
        if nodes > 1:
            assert by_node.stage("norms").ms < 0.7 * plain.stage("norms").ms  # over the link inside a node
        return by_node.images_per_s / plain.images_per_s - 1

    assert gain(1) == 0 and 0.05 < gain(2) < gain(4)


def test_a_slow_feed_limits():
    found = answer(Question(BS4096, (), "v100-32g", 16, 2, feed_per_s=1000))
    assert found.estimate.limits[0] == "images from the loader"
    assert found.images_per_s[1] == pytest.approx(1000)


@pytest.mark.long
def test_a_run_that_is_too_short_is_warned_of(monkeypatch, capsys):
    """The recipe for one card fits into it, but few images make a short run."""
    given = ("--deepspeed_config", "ds_configs/r50_1gpu.json", "--gpus", "1", "--gpu", "rtx3090", "--images", "20000")
    code, said, _ = ask(monkeypatch, capsys, *given)
    assert code == 0 and "yes: " in said and "warning: too short to learn much: 100 epochs x 20000 images" in said


def test_what_does_not_fit_says_so(monkeypatch, capsys):
    code, said, _ = ask(
        monkeypatch,
        capsys,
        "--deepspeed_config",
        BS4096,
        "--gpus",
        "16",
        "--gpu",
        "v100-16g",
        "--nodes",
        "2",
        "--set",
        "train_micro_batch_size_per_gpu=256",
    )
    assert code == 0 and "NO: " in said and "where from" in said and "extrapolated: " in said
    assert max(map(len, said.splitlines())) <= 100


@pytest.mark.long
def test_a_measured_row_replaces_the_roofline(tmp_path):
    from crossbatch.engine.config import Device, load_config, resolve, to_dict

    run = resolve(load_config(BS4096, ["train_batch_size=256"]), 1, Device("cuda", False, "V100"))
    machine = {"cpu": "a CPU", "cores": 8, "threads": 8, "gpus": ["Tesla V100-SXM2-32GB"]}
    row = {"version": 2, "stage": "step", "case": "ResNet-50, 1 chunk", "machine": machine, "commit": "abc"}
    row |= {
        "p20": 990.0,
        "p50": 1000.0,
        "p80": 1010.0,
        "n": 5,
        "unit": "ms",
        "settings": {"config": to_dict(run.config)},
    }
    path = tmp_path / "step.jsonl"
    memory = row | {"case": "ResNet-50, memory, 256 images, 1 chunk", "unit": "MiB"}
    path.write_text(json.dumps(row) + "\n" + json.dumps(memory) + "\n")
    found = answer(Question(BS4096, (), "v100-32g", 16, 2, rows=path))
    backbone = found.estimate.stage("backbone")
    assert "measured (row 'ResNet-50, 1 chunk', commit abc)" in backbone.origin
    assert backbone.ms == pytest.approx(1000, rel=0.05)
    assert not any("was measured" in note for note in notes(found))
    other = answer(Question(BS4096, (), "a100-40g", 16, 2, rows=path))
    assert any("has no step of resnet50 in bf16 on one a100-40g" in note for note in notes(other))


@pytest.mark.long
def test_the_noise_scale_of_a_run_says_what_a_batch_pays(monkeypatch, capsys, tmp_path):
    recipe = ["--deepspeed_config", "ds_configs/quickstart.json", "--set", "train_batch_size=4096"]
    machines = [*recipe, "--gpu", "v100-32g", "--gpus", "1", "--run", str(tmp_path)]
    (tmp_path / "config.json").write_text('{"train_batch_size": 1024}')
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 10}\n')
    code, _, errors = ask(monkeypatch, capsys, *machines)
    assert code == 2 and f"--run: given {tmp_path}" in errors and "noise_scale in its metrics.jsonl" in errors
    metrics.write_text('{"step": 10, "noise_scale": 9}\n{"step": 20, "noise_scale": 2048.0}\n{"step": 30}\n')
    code, output, _ = ask(monkeypatch, capsys, *machines)
    said = " ".join(output.replace("│", " ").split())
    assert code == 0 and "2,048 images" in said and "batches of 4096 take 1.50 x the fewest steps" in said
    assert noise_of(tmp_path) == (2048.0, 20, 1024)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "v100", "--gpus", "16"], "did you mean v100-32g"),
        (["--gpu", "v100-32g", "--gpus", "-16"], "--gpus: given -16; allowed: a whole number >= 1"),
        (["--gpu", "v100-32g", "--gpus", "16", "--nodes", "3"], "a multiple of --nodes"),
        (["--gpu", "v100-32g", "--gpus", "3"], "train_batch_size: given 4096 for 3 ranks"),
        (["--gpu", "t4", "--gpus", "16", "--set", "crossbatch.precision=bf16"], "crossbatch.precision: given bf16"),
        (["--gpu", "t4", "--gpus", "16", "--images", "0"], "--images: given 0"),
        (
            ["--gpu", "t4", "--gpus", "16", "--rows", "nowhere"],
            "--rows: given nowhere; allowed: rows of the benchmarks",
        ),
        (["--gpu", "t4", "--gpus", "16", "--run", "nowhere"], "--run: given nowhere; allowed: the directory of a"),
        (["--gpu", "t4", "--gpus", "16", "--set", "crossbatch.model.arhc=x"], "arch"),
    ],
)
def test_exit_code_2(monkeypatch, capsys, arguments, said):
    code, output, errors = ask(monkeypatch, capsys, "--deepspeed_config", BS4096, *arguments)
    assert code == 2 and said in errors and errors.startswith("error: ") and output == ""
