"""Turns `checkpoint_0099.pth.tar` of moco-v3 or BatchFormer into a run that continues here, and a run into such a file.

"The originals" are MoCo v3's and BatchFormer's released code. Their files hold:

    epoch, arch       epochs done; the name of the backbone
    state_dict        module.base_encoder.*, module.momentum_encoder.*, module.predictor.*
    optimizer         state by the position of a parameter: "mu" of LARS, "exp_avg" and "exp_avg_sq" of AdamW
    scaler            state of torch.cuda.amp.GradScaler

The projector is `fc` of a ResNet and `head` of a ViT. With BatchFormer, layer 0 of the projectors is the BatchFormer: the
others move up by one, and its weights are stored three times. A parameter that is stored more than once has the position of
its first name. Such a file holds no configuration: it must be given, as the recipe or the originals' flags.

The originals update the momentum encoder at the start of a step, this package at its end: theirs is one update behind.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossbatch import InputError, __version__
from crossbatch.engine import checkpoint
from crossbatch.engine.checkpoint import Keep, Manifest, Unreadable
from crossbatch.engine.config import Device, LarsConfig, ResolvedConfig, parse_config, resolve, to_dict
from crossbatch.engine.pretrained.files import read_torch, write_torch
from crossbatch.engine.step import CLEAN_STEPS, INITIAL_LOSS_SCALE, Progress
from crossbatch.engine.tasks.build import build_model
from crossbatch.models import MoCo
from crossbatch.models.backbones import family

ENCODERS = {"online": "base_encoder", "momentum": "momentum_encoder"}
BATCHFORMER = ("base_encoder.{head}.0", "momentum_encoder.{head}.0", "encoder_global")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def import_file(file: Path, cfg: ResolvedConfig, images: int, out: Path) -> list[str]:
    """Write `file` as the first checkpoint of the run directory `out`, and return lines for the user.

    Args:
        cfg: the configuration that the run continues with.
        images: number of training images, which says how many steps an epoch has.

    Raises:
        InputError: if `file` is no checkpoint of the originals, or not of the configured model or optimizer.
    """
    if (out / "checkpoints").exists():
        raise InputError(f"--out {out}: already holds a run; choose another folder")
    theirs = _read(file)
    model = _on_meta(cfg)
    _check_mode(model, "crossbatch.batchformer.mode")
    head, notes = _head(cfg), []
    _check_model(file, theirs, model, cfg)
    state_dict = theirs["state_dict"]
    tensors = {
        f"{part}.{name}": state_dict[original_names(name, head, model)[0]]
        for part, named in (("parameters", model.named_parameters()), ("buffers", model.named_buffers()))
        for name, _ in named
    }
    tensors |= _optimizer_state(file, theirs, model, cfg, notes)
    steps_per_epoch = images // cfg.train_batch_size
    step = theirs["epoch"] * steps_per_epoch
    scaler = theirs.get("scaler") or {}
    progress = Progress(
        step, step, float(scaler.get("scale", INITIAL_LOSS_SCALE)), int(scaler.get("_growth_tracker", 0))
    )
    manifest = Manifest(
        progress=asdict(progress),
        shapes={name: list(tensor.shape) for name, tensor in tensors.items()},
        images=images,
        steps_per_epoch=steps_per_epoch,
        skipped_images=0,
        world_size=1,
        versions={"crossbatch": __version__, "torch": torch.__version__},
    )
    staged = {(name, 0): tensor.contiguous().view(-1) for name, tensor in tensors.items()}
    # Chunks and precision depend on the machine that will go on.
    config = {**to_dict(cfg.config), "world_size": 1, "train_micro_batch_size_per_gpu": "auto"}
    data = {**config["crossbatch"]["data"], "backend": "auto"}
    config["crossbatch"] = {**config["crossbatch"], "precision": "auto", "data": data}
    checkpoint.write(out / "checkpoints", staged, manifest, config, Keep(1))
    return [*notes, f"{file}: {theirs['arch']} after epoch {theirs['epoch']} -> step {step} in {out}"]


def export_file(source: Path, file: Path) -> list[str]:
    """Write a checkpoint, or the newest one of a run directory, as a file of the originals, and return lines for the user.

    Raises:
        InputError: if no checkpoint can be read, or its BatchFormer has a moving average, which the originals do not have.
    """
    found = checkpoint.find(source, "--checkpoint")
    try:
        manifest, config = checkpoint.read_manifest(found)
        parts = {part: checkpoint.read(found, f"{part}.") for part in ("parameters", "buffers", "optimizer")}
    except Unreadable as error:
        raise InputError(f"--checkpoint {found}: {error}") from None
    cfg = _resolved_anywhere(config)
    model = _on_meta(cfg)
    _check_mode(model, f"--checkpoint {found}: crossbatch.batchformer.mode")
    head = _head(cfg)
    tensors = parts["parameters"] | parts["buffers"]
    state_dict = {
        original: tensors[name] for name in _in_original_order(model) for original in original_names(name, head, model)
    }
    progress = Progress(**manifest.progress)
    epoch, rest = divmod(progress.step, manifest.steps_per_epoch)
    content = {
        "epoch": epoch,
        "arch": cfg.crossbatch.model.arch,
        "state_dict": state_dict,
        "optimizer": _original_optimizer(parts["optimizer"], model, cfg, progress.updates),
        "scaler": {
            "scale": progress.loss_scale if cfg.precision == "fp16" else INITIAL_LOSS_SCALE,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": CLEAN_STEPS,
            "_growth_tracker": progress.clean_steps,
        },
    }
    write_torch(file, content)
    notes = [f"{found}: step {progress.step} -> {file}, after epoch {epoch}"]
    if rest:
        notes.append(
            f"the {rest} steps since then are in the weights, and the originals will repeat them: they know epochs only"
        )
    return notes


def original_names(name: str, head: str, model: MoCo) -> list[str]:
    """Return the keys under which the originals store the tensor `name`; `head` is "fc" or "head"."""
    part, _, rest = name.partition(".")
    if part == "predictor":
        return [f"module.{name}"]
    if part == "batchformer":
        return [f"module.{place.format(head=head)}.encoder_layers.{rest}" for place in BATCHFORMER]
    place, _, rest = rest.partition(".")
    if place == "backbone":
        return [f"module.{ENCODERS[part]}.{rest}"]
    layer, _, rest = rest.partition(".")
    shift = 1 if model.batchformer is not None else 0
    return [f"module.{ENCODERS[part]}.{head}.{int(layer) + shift}.{rest}"]


def _resolved_anywhere(config: dict[str, Any]) -> ResolvedConfig:
    """Resolve the configuration of a checkpoint without the keys that need the run's machine, such as DALI or a GPU."""
    here = {name: value for name, value in config.items() if name != "world_size"}
    section = here["crossbatch"]
    here["crossbatch"] = section | {
        "data": section["data"] | {"backend": "auto"},
        "model": section["model"] | {"cuda_graph": False},
    }
    return resolve(parse_config(here), config["world_size"], Device("cpu"))


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(file: Path) -> dict[str, Any]:
    """Return the content of a checkpoint of the originals. Raises InputError if the file is none."""
    content = read_torch(file)
    missing = [key for key in ("epoch", "arch", "state_dict") if not isinstance(content, dict) or key not in content]
    if missing:
        raise InputError(f"{file}: is no checkpoint of moco-v3 or BatchFormer: it has no {', '.join(missing)}")
    return content


def _check_mode(model: MoCo, where: str) -> None:
    """Raise InputError for a BatchFormer with a moving average."""
    if model.momentum.batchformer is not None:
        raise InputError(
            f"{where} is ema; a moco-v3 file has one BatchFormer for both encoders; allowed: trained, released"
        )


def _check_model(file: Path, theirs: dict[str, Any], model: MoCo, cfg: ResolvedConfig) -> None:
    """Raise InputError if the file holds another model than the configured one."""
    arch = cfg.crossbatch.model.arch
    if theirs["arch"] != arch:
        raise InputError(f"{file}: is a {theirs['arch']}, crossbatch.model.arch is {arch}; give -a {theirs['arch']}")
    state_dict: dict[str, Tensor] = theirs["state_dict"]
    has_batchformer = any(key.startswith("module.encoder_global.") for key in state_dict)
    if has_batchformer != (model.batchformer is not None):
        what, flag = ("a", "--add_bf 1") if has_batchformer else ("no", "--add_bf 0")
        raise InputError(
            f"{file}: has {what} BatchFormer, the configuration differs; give {flag}, or what it was trained with"
        )
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wanted = {key: tensor.shape for name, tensor in named.items() for key in original_names(name, _head(cfg), model)}
    missing, unexpected = sorted(wanted.keys() - state_dict.keys()), sorted(state_dict.keys() - wanted.keys())
    wrong = sorted(key for key in wanted.keys() & state_dict.keys() if state_dict[key].shape != wanted[key])
    if missing or unexpected or wrong:
        raise InputError(
            f"{file}: is of another model: {len(missing)} missing {missing[:2]}, {len(unexpected)} unexpected "
            f"{unexpected[:2]}, {len(wrong)} of another shape {wrong[:2]}; check crossbatch.model "
            f"(projection_dim, mlp_dim, backbone_args)"
        )


def _optimizer_state(
    file: Path, theirs: dict[str, Any], model: MoCo, cfg: ResolvedConfig, notes: list[str]
) -> dict[str, Tensor]:
    """Return optimizer.KEY.NAME for every trained parameter: zero, as in a new run, where the file has nothing."""
    keys = _state_keys(cfg)
    optimizer = theirs.get("optimizer") or {}
    state: dict[int, dict[str, Tensor]] = optimizer.get("state", {})
    if state and not set(keys) <= next(iter(state.values())).keys():
        raise InputError(
            f"{file}: was not trained with optimizer.type {cfg.optimizer.type}; give "
            f"--optimizer {'lars' if 'mu' in next(iter(state.values())) else 'adamw'}"
        )
    positions = {key: position for position, key in enumerate(_positions(theirs["state_dict"]))}
    found, absent = {}, []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            position = positions[original_names(name, _head(cfg), model)[0]]
            if position not in state:
                absent.append(name)
            for key in keys:
                value = state[position][key] if position in state else torch.zeros(parameter.shape)
                found[f"optimizer.{key}.{name}"] = value
    if absent:
        notes.append(
            f"no optimizer state for {len(absent)} tensors ({absent[0]}, ...): it starts at zero, as in a new run"
        )
    for group in optimizer.get("param_groups", []):
        for key in ("weight_decay", "momentum", "betas"):
            configured = getattr(cfg.optimizer.params, key, None)
            if key in group and configured is not None and group[key] != configured:
                notes.append(f"optimizer.params.{key} was {group[key]} and becomes {configured}")
    return found


def _positions(state_dict: dict[str, Tensor]) -> list[str]:
    """Return the keys of parameters as the originals' optimizer numbers them: in the order of the file, copies counted once."""
    copies = tuple(
        f"module.{place.format(head=head)}.encoder_layers." for place in BATCHFORMER[1:] for head in ("fc", "head")
    )
    return [key for key in state_dict if key.rpartition(".")[2] not in STATISTICS and not key.startswith(copies)]


# --- writing ---------------------------------------------------------------------------------------------------------


def _in_original_order(model: MoCo) -> list[str]:
    """Return the names of this package in the order of the originals' modules: BatchFormer between backbone and projector."""
    names = list(model.state_dict())
    places = ("online.backbone.", "batchformer.", "online.projector.", "momentum.", "predictor.")
    return sorted(names, key=lambda name: next(i for i, place in enumerate(places) if name.startswith(place)))


def _original_optimizer(state: dict[str, Tensor], model: MoCo, cfg: ResolvedConfig, updates: int) -> dict[str, Any]:
    """Return the optimizer state as the originals' optimizer saves it, numbered by the position of a parameter."""
    parameters = dict(model.named_parameters())
    names = [name for name in _in_original_order(model) if name in parameters]
    numbered = {
        position: {key: state[f"{key}.{name}"] for key in _state_keys(cfg)}
        for position, name in enumerate(names)
        if parameters[name].requires_grad
    }
    params = cfg.optimizer.params
    if isinstance(params, LarsConfig):
        group = {name: getattr(params, name) for name in ("weight_decay", "momentum", "trust_coefficient")}
        groups = [{"lr": cfg.lr_peak, **group, "params": list(range(len(names)))}]
        return {"state": numbered, "param_groups": groups}
    for tensors in numbered.values():
        tensors["step"] = torch.tensor(float(updates))
    adamw = torch.optim.AdamW(
        [torch.nn.Parameter(torch.empty(0)) for _ in names],
        lr=cfg.lr_peak,
        betas=params.betas,
        eps=params.eps,
        weight_decay=params.weight_decay,
    )
    return {"state": numbered, "param_groups": adamw.state_dict()["param_groups"]}


def _on_meta(cfg: ResolvedConfig) -> MoCo:
    """Return the configured model without memory, for its names and shapes."""
    with torch.device("meta"):
        return build_model(cfg)


def _head(cfg: ResolvedConfig) -> str:
    """Return what the originals call the projector."""
    return {"resnet": "fc", "vit": "head"}[family(cfg.crossbatch.model.arch)]


def _state_keys(cfg: ResolvedConfig) -> tuple[str, ...]:
    """Return the optimizer state that a parameter has, by its name in the originals' files."""
    return ("mu",) if isinstance(cfg.optimizer.params, LarsConfig) else ("exp_avg", "exp_avg_sq")
