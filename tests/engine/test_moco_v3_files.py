"""Files of moco-v3 and BatchFormer continue here and come back unchanged."""

import json
from pathlib import Path

import pytest
import torch

from crossbatch.engine import checkpoint
from crossbatch.engine.config import Device, load_config, resolve, to_dict
from crossbatch.engine.pretrained import moco_v3 as legacy
from crossbatch.engine.step import Progress, TrainStep
from crossbatch.engine.tasks.build import build_model
from crossbatch.launch import convert
from tests.commands import caller
from tests.engine.originals import EPOCH, original_file
from tests.engine.test_step import PlainBackend
from tests.small_runs import ADAMW, BASE, LARS, VIT, run, slow_unless

RESNET18 = ["crossbatch.model.arch=resnet18"]
CASES = {
    "resnet-bf-lars": ("resnet18", True, "LARS", [*RESNET18, *LARS]),
    "resnet-lars": ("resnet18", False, "LARS", [*RESNET18, *LARS, "crossbatch.batchformer.add_bf=0"]),
    "vit-adamw": ("vit_small", False, "AdamW", [*VIT, *ADAMW, "crossbatch.batchformer.add_bf=0"]),
    "vit-bf-adamw": ("vit_small", True, "AdamW", [*VIT, *ADAMW, "crossbatch.batchformer.mode=released"]),
}


command = caller(convert)


def imported(monkeypatch, folder: Path, case: str) -> tuple[dict, Path]:
    arch, add_bf, optimizer, settings = CASES[case]
    content = original_file(arch, add_bf, optimizer)
    torch.save(content, folder / "checkpoint_0001.pth.tar")
    sets = [f"--set={setting}" for setting in (*BASE, *settings)]
    assert command(monkeypatch, "import", folder / "checkpoint_0001.pth.tar", "--out", folder / "run", *sets) == 0
    return content, folder / "run"


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=slow_unless(case in ("resnet-bf-lars", "vit-adamw"))) for case in CASES]
)
def test_an_original_file_comes_back_as_it_was(tmp_path, monkeypatch, capsys, case):
    content, out = imported(monkeypatch, tmp_path, case)
    target = tmp_path / "back" / "checkpoint_0001.pth.tar"
    assert command(monkeypatch, "export", "--checkpoint", out, "--to", "moco-v3", "--output", target) == 0
    back = torch.load(target, weights_only=True)
    assert back.keys() == content.keys()
    assert (back["epoch"], back["arch"]) == (EPOCH, content["arch"])
    assert back["state_dict"].keys() == content["state_dict"].keys()
    for key, tensor in content["state_dict"].items():
        exact = "momentum_encoder" not in key  # moved once and back, which rounds
        torch.testing.assert_close(back["state_dict"][key], tensor, rtol=0, atol=0 if exact else 1e-6, msg=key)
    theirs, ours = content["optimizer"], back["optimizer"]
    trained_here = 12 if case == "resnet-bf-lars" else 0  # tensors of BatchFormer, which the original leaves frozen
    assert len(ours["state"]) == len(theirs["state"]) + trained_here
    for position, state in theirs["state"].items():
        assert ours["state"][position].keys() == state.keys()
        assert all(ours["state"][position][key].equal(value) for key, value in state.items())
    assert ours["param_groups"][0]["params"] == theirs["param_groups"][0]["params"]
    assert "after epoch 2 -> step 8" in capsys.readouterr().out


def test_names_are_those_of_the_reference(tmp_path, monkeypatch):
    content, out = imported(monkeypatch, tmp_path, "resnet-bf-lars")
    theirs = content["state_dict"]
    folder = checkpoint.candidates(out, "auto")[0]
    ours = checkpoint.read(folder, "parameters.") | checkpoint.read(folder, "buffers.")
    for mine, key in {
        "online.backbone.layer3.1.bn2.weight": "module.base_encoder.layer3.1.bn2.weight",
        "online.projector.0.weight": "module.base_encoder.fc.1.weight",
        "online.projector.4.running_var": "module.base_encoder.fc.5.running_var",
        "momentum.projector.1.bias": "module.momentum_encoder.fc.2.bias",
        "predictor.3.weight": "module.predictor.3.weight",
        "batchformer.self_attn.in_proj_weight": "module.encoder_global.encoder_layers.self_attn.in_proj_weight",
        "batchformer.norm2.bias": "module.base_encoder.fc.0.encoder_layers.norm2.bias",
    }.items():
        assert ours[mine].equal(theirs[key])
    # Of 122 parameters: 60 of the backbone, 12 of BatchFormer, then the projector, and the predictor at the end.
    velocity = checkpoint.read(folder, "optimizer.mu.")
    first = {name: tensor.flatten()[0].item() for name, tensor in velocity.items()}
    assert first["online.backbone.conv1.weight"] == 0
    assert first["online.backbone.layer4.1.bn2.bias"] == 59
    assert first["online.projector.0.weight"] == 60 + 12
    assert first["predictor.0.weight"] == 60 + 12 + 4 + 60 + 4
    assert first["batchformer.linear1.weight"] == 0  # frozen there, trained here


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_an_imported_run_continues(tmp_path, monkeypatch, pools, ranks):
    _, out = imported(monkeypatch, tmp_path, "vit-adamw")
    stage = ["crossbatch.sharding=zero", f"zero_optimization.stage={ranks - 1}"]
    assert pools(ranks).run(run, [*CASES["vit-adamw"][3], *stage], str(out), 10) == [""] * ranks
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [9, 10]
    # After 8 of 20 steps; a warm-up of one epoch (4 steps) and then half a cosine; 1e-2 per 256 images.
    peak = 1e-2 * 12 / 256
    assert lines[0]["lr"] == pytest.approx(peak * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * 4 / 16)).item()))
    moved = checkpoint.read(checkpoint.candidates(out, "auto")[0], "optimizer.exp_avg.")
    # The first moment decays by 0.9 a step: what was 1 (cls_token has position 0, blocks follow) is near 0.81 of it.
    assert moved["predictor.3.weight"].mean().item() == pytest.approx(0.81 * position_of_last(), abs=0.5)


def position_of_last() -> int:
    return max(original_file("vit_small", False, "AdamW")["optimizer"]["state"])


WRONG = [
    ("vit-adamw", ["crossbatch.model.arch=resnet18"], ["is a vit_small", "-a vit_small"]),
    ("vit-adamw", ["crossbatch.batchformer.add_bf=1"], ["has no BatchFormer", "--add_bf 0"]),
    ("resnet-bf-lars", ["crossbatch.batchformer.add_bf=0"], ["has a BatchFormer", "--add_bf 1"]),
    (
        "vit-adamw",
        ["crossbatch.model.mlp_dim=64"],
        ["does not fit the configured model", "of another shape", "mlp_dim"],
    ),
    ("resnet-bf-lars", ["crossbatch.batchformer.mode=ema"], ["crossbatch.batchformer.mode: given ema"]),
    ("vit-adamw", [*LARS, "optimizer.params.eps=1e-8", "optimizer.params.variant=moco-v3"], ["--optimizer adamw"]),
]


@pytest.mark.parametrize(("case", "change", "words"), WRONG, ids=range(len(WRONG)))
def test_a_file_of_another_run_is_refused(tmp_path, monkeypatch, capsys, case, change, words):
    arch, add_bf, optimizer, settings = CASES[case]
    torch.save(original_file(arch, add_bf, optimizer), tmp_path / "file")
    settings = [setting for setting in settings if not (change[0].startswith("optimizer") and "optimizer" in setting)]
    if change[0] == "crossbatch.model.arch=resnet18":
        settings = [setting for setting in settings if "crossbatch.model" not in setting]
    sets = [f"--set={setting}" for setting in (*BASE, *settings, *change)]
    assert command(monkeypatch, "import", tmp_path / "file", "--out", tmp_path / "run", *sets) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_export_needs_nothing_that_the_machine_of_the_run_had(monkeypatch):
    monkeypatch.setattr("crossbatch.data.augment.backends.has_dali", lambda: False)
    run = resolve(load_config(None, [*BASE, *VIT, *ADAMW]), 1, Device("cpu"))
    config = {**to_dict(run.config), "world_size": 1}
    config["crossbatch"]["data"]["backend"] = "dali"
    config["crossbatch"]["model"]["cuda_graph"] = True
    assert legacy._resolved_anywhere(config).config.crossbatch.model.arch == "vit_small"


def test_what_is_no_such_file_is_refused(tmp_path, monkeypatch, capsys):
    class Bomb:
        def __reduce__(self):
            return print, ("boom",)

    torch.save({"state_dict": {}, "best_acc1": 1.0}, tmp_path / "linear")
    torch.save({"epoch": Bomb()}, tmp_path / "bomb")
    sets = [f"--set={setting}" for setting in (*BASE, *VIT, *ADAMW)]
    for name, word in (("linear", "no epoch, arch"), ("bomb", "cannot be read"), ("none", "no such file")):
        assert command(monkeypatch, "import", tmp_path / name, "--out", tmp_path / "run", *sets) == 2
        captured = capsys.readouterr()
        assert word in captured.err and "boom" not in captured.out


def test_a_moving_average_of_batchformer_has_no_place_in_their_files(tmp_path, monkeypatch, capsys, one_rank):
    settings = [*VIT, *ADAMW, "crossbatch.batchformer.mode=ema"]
    assert one_rank.run(run, settings, str(tmp_path / "run"), 1) == [""]
    arguments = ["export", "--checkpoint", tmp_path / "run", "--to", "moco-v3", "--output", tmp_path / "file"]
    assert command(monkeypatch, *arguments) == 2
    assert "mode: given ema" in capsys.readouterr().err


def pattern(shape, number: int) -> torch.Tensor:
    """Return values between -1 and 1 that depend on nothing but `number`, not even on a generator of random numbers."""
    count = torch.Size(shape).numel()
    return torch.sin(number + 0.7 * torch.arange(count, dtype=torch.float64).square()).reshape(shape).float()


def patterned_file() -> dict:
    """Return a checkpoint of a ViT after two epochs with weights that anybody can make again."""
    content = original_file("vit_small", False, "AdamW")
    tensors = content["state_dict"]
    for number, (key, tensor) in enumerate(tensors.items()):
        is_norm = ".head." in key and tensor.dim() == 1
        is_norm = is_norm or key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "var"))
        online = key.replace("momentum_encoder", "base_encoder")
        if online != key and tensor.is_floating_point():
            is_frozen = "pos_embed" in key or "patch_embed" in key
            tensor.copy_(tensors[online] + (0.0 if is_frozen else 0.05) * pattern(tensor.shape, number))
        elif tensor.is_floating_point():
            tensor.copy_(0.2 * pattern(tensor.shape, number) + float(is_norm))
    for state in content["optimizer"]["state"].values():
        state["exp_avg"] = 0.01 * pattern(state["exp_avg"].shape, 1)
        state["exp_avg_sq"] = 1e-4 * (1 + pattern(state["exp_avg"].shape, 2))
    return content


def pattern_views(step: int) -> torch.Tensor:
    return (128 + 127 * pattern((2, 12, 3, 16, 16), 100 + step)).to(torch.uint8)


# Losses of four steps after that file, by the steps of MoCo v3 in float64: the average moves first, then come the keys.
THEIR_LOSSES = [2.652394424461846, 2.2557897386335988, 2.552255450623774, 2.4314964209534047]


def test_field_losses_after_an_import_are_those_of_the_originals(tmp_path):
    torch.save(patterned_file(), tmp_path / "file")
    settings = [*BASE, *VIT, *ADAMW, "crossbatch.batchformer.add_bf=0", "crossbatch.momentum.cosine=true"]
    cfg = resolve(load_config(None, settings), 1, Device("cpu"))
    legacy.import_file(tmp_path / "file", cfg, 48, tmp_path / "run")
    folder = checkpoint.candidates(tmp_path / "run", "auto")[0]
    model = build_model(cfg)
    model.load_state_dict(checkpoint.read(folder, "parameters.") | checkpoint.read(folder, "buffers."))
    step = TrainStep(PlainBackend(model, cfg), cfg, torch.device("cpu"), 4, 12)
    step.progress = Progress(**checkpoint.read_manifest(folder)[0].progress)
    moments = checkpoint.read(folder, "optimizer.")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state = {key: moments[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")}
            step.backend.optimizer.state[parameter] = {"step": torch.tensor(8.0), **state}
    losses = [step(pattern_views(i)).output.loss.item() for i in range(4)]
    assert losses == pytest.approx(THEIR_LOSSES, rel=1e-6)
