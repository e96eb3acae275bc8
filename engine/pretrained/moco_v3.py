"""Turns `checkpoint_0099.pth.tar` of moco-v3 or BatchFormer into a run that continues here, and a run into such a file.

"The originals" are MoCo v3's and BatchFormer's released code. Their files hold:

    epoch, arch       epochs done; the name of the backbone
    state_dict        module.base_encoder.*, module.momentum_encoder.*, module.predictor.*
    optimizer         state by the position of a parameter: "mu" of LARS, "exp_avg" and "exp_avg_sq" of AdamW
    scaler            state of torch.cuda.amp.GradScaler

The projector is `fc` of a ResNet and `head` of a ViT. With BatchFormer, layer 0 of the projectors is the BatchFormer: the
others move up by one, and its weights are stored three times. A parameter that is stored more than once has the position of
its first name. Such a file holds no configuration: it must be given, as the recipe or the originals' flags.

The originals move the momentum encoder at the start of a step, this package at its end. So theirs is one move behind, which an
import makes and an export takes back, by `_moved`.
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
from crossbatch.engine.pretrained.files import read_torch, write_file
from crossbatch.engine.pretrained.weights import ENCODERS, mismatch
from crossbatch.engine.schedules import encoder_momentum
from crossbatch.engine.step import CLEAN_STEPS, INITIAL_LOSS_SCALE, Progress
from crossbatch.engine.tasks.build import build_model
from crossbatch.models.backbones import family

BATCHFORMER = ("base_encoder.{head}.0", "momentum_encoder.{head}.0", "encoder_global")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def import_file(file: Path, cfg: ResolvedConfig, images: int, out: Path) -> list[str]:
    """Write `file` as the first checkpoint of the run directory `out`, and return lines for the user.

    Args:
        cfg: the configuration that the run continues with.
        images: number of training images, which says how many steps an epoch has.

    Raises:
        InputError: if `file` is not a checkpoint of the originals, or does not fit the configured model or optimizer.
    """
    if (out / "checkpoints").exists():
        raise InputError(f"--out {out}: already holds a run; choose another folder")
    theirs = read_torch(file)
    absent = [key for key in ("epoch", "arch", "state_dict") if not isinstance(theirs, dict) or key not in theirs]
    if absent:
        raise InputError(f"{file}: is not a checkpoint of moco-v3 or BatchFormer: it has no {', '.join(absent)}")
    layout = _Layout(cfg, "crossbatch.batchformer.mode")
    _check_model(file, theirs, layout)
    tensors = {
        f"{part}.{name}": theirs["state_dict"][layout.keys(name)[0]]
        for part, named in (("parameters", layout.model.named_parameters()), ("buffers", layout.model.named_buffers()))
        for name, _ in named
    }
    tensors |= _moved(tensors, _momentum(cfg, theirs["epoch"]), "parameters.")
    state, notes = _optimizer_state(file, theirs, layout)
    tensors |= state
    steps_per_epoch = images // cfg.train_batch_size
    step = theirs["epoch"] * steps_per_epoch
    scaler = theirs.get("scaler") or {}
    scale, clean_steps = float(scaler.get("scale", INITIAL_LOSS_SCALE)), int(scaler.get("_growth_tracker", 0))
    progress = Progress(step, step, scale, clean_steps)
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
    layout = _Layout(cfg, f"--checkpoint {found}: crossbatch.batchformer.mode")
    progress = Progress(**manifest.progress)
    epoch, rest = divmod(progress.step, manifest.steps_per_epoch)
    momentum = _momentum(cfg, epoch)
    before = _moved(parts["parameters"], 1 / momentum) if momentum else {}  # with 0, the next move forgets the average
    tensors = parts["parameters"] | parts["buffers"] | before
    state_dict = {key: tensors[name] for name in layout.names() for key in layout.keys(name)}
    content = {
        "epoch": epoch,
        "arch": cfg.crossbatch.model.arch,
        "state_dict": state_dict,
        "optimizer": _original_optimizer(parts["optimizer"], layout, progress.updates),
        "scaler": {
            "scale": progress.loss_scale if cfg.precision == "fp16" else INITIAL_LOSS_SCALE,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": CLEAN_STEPS,
            "_growth_tracker": progress.clean_steps,
        },
    }
    write_file(file, lambda path: torch.save(content, path))
    notes = [f"{found}: step {progress.step} -> {file}, after epoch {epoch}"]
    if rest:
        notes.append(
            f"the {rest} steps since then are in the weights, and the originals will repeat them: they know epochs only"
        )
    return notes


def _momentum(cfg: ResolvedConfig, epoch: int) -> float:
    """Return the momentum with which the originals move the average in the first step after `epoch` epochs."""
    settings = cfg.crossbatch
    return encoder_momentum(epoch, settings.momentum.base, settings.schedule.epochs, settings.momentum.cosine)


def _moved(tensors: dict[str, Tensor], momentum: float, prefix: str = "") -> dict[str, Tensor]:
    """Return the parameters of the momentum encoder after average <- momentum average + (1 - momentum) online.

    1 / momentum takes such a move back. Computed in fp64, as that enlarges what rounding has left.
    """
    start, online = f"{prefix}momentum.", f"{prefix}online."
    moved = {}
    for name, average in tensors.items():
        if name.startswith(start):
            target = tensors[online + name.removeprefix(start)]
            moved[name] = torch.lerp(target.double(), average.double(), momentum).to(average.dtype)
    return moved


class _Layout:
    """Says under which keys, and in which order, the originals store the tensors of a configured model.

    Raises InputError, naming `where`, for a BatchFormer with a moving average, which they do not have.
    """

    def __init__(self, cfg: ResolvedConfig, where: str):
        self.cfg = cfg
        with torch.device("meta"):  # only names and shapes are wanted
            self.model = build_model(cfg)
        if self.model.momentum.batchformer is not None:
            raise InputError(
                f"{where}: given ema; a moco-v3 file has one BatchFormer for both encoders; allowed: trained, released"
            )
        self.projector = {"resnet": "fc", "vit": "head"}[family(cfg.crossbatch.model.arch)]
        self.optimizer_state = ("mu",) if isinstance(cfg.optimizer.params, LarsConfig) else ("exp_avg", "exp_avg_sq")

    def keys(self, name: str) -> list[str]:
        """Return the keys of the tensor `name`, of which BatchFormer has three."""
        part, _, rest = name.partition(".")
        if part == "predictor":
            return [f"module.{name}"]
        if part == "batchformer":
            return [f"module.{place.format(head=self.projector)}.encoder_layers.{rest}" for place in BATCHFORMER]
        place, _, rest = rest.partition(".")
        if place == "backbone":
            return [f"module.{ENCODERS[part]}.{rest}"]
        layer, _, rest = rest.partition(".")
        shift = 1 if self.model.batchformer is not None else 0
        return [f"module.{ENCODERS[part]}.{self.projector}.{int(layer) + shift}.{rest}"]

    def names(self) -> list[str]:
        """Return all names in the order of the originals' modules: BatchFormer between backbone and projector."""
        places = ("online.backbone.", "batchformer.", "online.projector.", "momentum.", "predictor.")
        names = list(self.model.state_dict())
        return sorted(names, key=lambda name: next(i for i, place in enumerate(places) if name.startswith(place)))


def _resolved_anywhere(config: dict[str, Any]) -> ResolvedConfig:
    """Resolve the configuration of a checkpoint without the keys that need the run's machine, such as DALI or a GPU."""
    here = {name: value for name, value in config.items() if name != "world_size"}
    section = here["crossbatch"]
    here["crossbatch"] = section | {
        "data": section["data"] | {"backend": "auto"},
        "model": section["model"] | {"cuda_graph": False},
    }
    return resolve(parse_config(here), config["world_size"], Device("cpu"))


def _check_model(file: Path, theirs: dict[str, Any], layout: _Layout) -> None:
    """Raise InputError if the file holds another model than the configured one."""
    arch = layout.cfg.crossbatch.model.arch
    if theirs["arch"] != arch:
        raise InputError(
            f"{file}: is a {theirs['arch']}, but crossbatch.model.arch is {arch}; give -a {theirs['arch']}"
        )
    has_batchformer = any(key.startswith("module.encoder_global.") for key in theirs["state_dict"])
    if has_batchformer != (layout.model.batchformer is not None):
        what, flag = ("a", "--add_bf 1") if has_batchformer else ("no", "--add_bf 0")
        raise InputError(
            f"{file}: has {what} BatchFormer, but the configuration says otherwise; give {flag}, or the value it was "
            f"trained with"
        )
    wanted = {key: tensor for name, tensor in layout.model.state_dict().items() for key in layout.keys(name)}
    wrong = mismatch(wanted, theirs["state_dict"])
    if wrong:
        raise InputError(
            f"{file}: does not fit the configured model: {wrong}; check crossbatch.model (projection_dim, "
            f"mlp_dim, backbone_args)"
        )


def _optimizer_state(file: Path, theirs: dict[str, Any], layout: _Layout) -> tuple[dict[str, Tensor], list[str]]:
    """Return optimizer.KEY.NAME for every trained parameter, zero where the file has nothing, and notes for the user."""
    params = layout.cfg.optimizer.params
    optimizer = theirs.get("optimizer") or {}
    state: dict[int, dict[str, Tensor]] = optimizer.get("state", {})
    if state and not set(layout.optimizer_state) <= next(iter(state.values())).keys():
        raise InputError(
            f"{file}: was not trained with optimizer.type {layout.cfg.optimizer.type}; give "
            f"--optimizer {'lars' if 'mu' in next(iter(state.values())) else 'adamw'}"
        )
    positions = {key: position for position, key in enumerate(_parameter_keys(theirs["state_dict"]))}
    found, absent = {}, []
    for name, parameter in layout.model.named_parameters():
        if parameter.requires_grad:
            stored = state.get(positions[layout.keys(name)[0]])
            if stored is None:
                absent.append(name)
            for key in layout.optimizer_state:
                found[f"optimizer.{key}.{name}"] = torch.zeros(parameter.shape) if stored is None else stored[key]
    missing = f"no optimizer state for {len(absent)} tensors ({', '.join(absent[:1])}, ...): it starts at zero, as in a new run"
    notes = [missing] if absent else []
    for group in optimizer.get("param_groups", []):
        for key in ("weight_decay", "momentum", "betas"):
            configured = getattr(params, key, None)
            if key in group and configured is not None and group[key] != configured:
                notes.append(f"optimizer.params.{key} was {group[key]} and becomes {configured}")
    return found, notes


def _parameter_keys(state_dict: dict[str, Tensor]) -> list[str]:
    """Return the keys of parameters as the originals' optimizer numbers them: in the order of the file, copies counted once."""
    copies = tuple(
        f"module.{place.format(head=head)}.encoder_layers." for place in BATCHFORMER[1:] for head in ("fc", "head")
    )
    return [key for key in state_dict if key.rpartition(".")[2] not in STATISTICS and not key.startswith(copies)]


def _original_optimizer(state: dict[str, Tensor], layout: _Layout, updates: int) -> dict[str, Any]:
    """Return the optimizer state as the originals' optimizer saves it, numbered by the position of a parameter."""
    parameters = dict(layout.model.named_parameters())
    names = [name for name in layout.names() if name in parameters]
    numbered = {
        position: {key: state[f"{key}.{name}"] for key in layout.optimizer_state}
        for position, name in enumerate(names)
        if parameters[name].requires_grad
    }
    lr, params = layout.cfg.lr_peak, layout.cfg.optimizer.params
    if isinstance(params, LarsConfig):
        group = {name: getattr(params, name) for name in ("weight_decay", "momentum", "trust_coefficient")}
        return {"state": numbered, "param_groups": [{"lr": lr, **group, "params": list(range(len(names)))}]}
    for tensors in numbered.values():
        tensors["step"] = torch.tensor(float(updates))
    adamw = torch.optim.AdamW(
        [torch.nn.Parameter(torch.empty(0)) for _ in names],
        lr=lr,
        betas=params.betas,
        eps=params.eps,
        weight_decay=params.weight_decay,
    )
    return {"state": numbered, "param_groups": adamw.state_dict()["param_groups"]}
