"""Writes backbones in formats with other tensor names or files: Hugging Face's folder, ONNX, detectron2's pickle.

    huggingface   config.json of a ResNetModel or ViTModel, which timm reads, too; transformers/model.safetensors with its
                  index, in transformers' names; pytorch_model.bin in timm's; README.md, the model card
    onnx          opset 18, input "images" [n, C, H, W] normalised, output "features" [n, C]; compared with onnxruntime
    detectron2    {"model", "matching_heuristics"} with the names of its ResNets

transformers and timm both read config.json and would both take model.safetensors, with other names inside. transformers then
looks for an index, which may name files in a folder, and comes to pytorch_model.bin last. timm knows no index. It looks for
pytorch_model.bin before all other names, on the Hub, too; versions before 1.0.31 then replace what they found by the last of
*.safetensors, *.pth and *.bin beside config.json, so that no other file of weights may lie there.
"""

import importlib.util
import json
import pickle
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from safetensors.torch import save_file

from crossbatch import InputError, __version__
from crossbatch.data.augment.parameters import height_width
from crossbatch.engine.pretrained.files import write_file
from crossbatch.engine.pretrained.formats import timm_name
from crossbatch.engine.pretrained.load import Pretrained
from crossbatch.engine.run_log import METRICS, read_metrics
from crossbatch.models.backbones import LAYOUTS, family
from crossbatch.models.resnet import BLOCKS, Bottleneck

FOR_TRANSFORMERS, FOR_TIMM = "transformers/model.safetensors", "pytorch_model.bin"
ONNX_TOLERANCE = 1e-4  # between the features of onnxruntime and of torch
CARD = "README.md"


def huggingface(pretrained: Pretrained, folder: Path) -> list[str]:
    """Write a Hugging Face folder; return lines for the user. Raises InputError if timm cannot build it or `folder` exists."""
    try:
        name, arguments = timm_name("timm", pretrained)
    except ValueError as error:
        raise InputError(f"--to huggingface: {error}; --to safetensors and --to onnx take any network") from None
    if folder.exists():
        raise InputError(f"--output: {folder} exists already; remove it or give another folder")
    state = {key: tensor.contiguous() for key, tensor in pretrained.backbone.state_dict().items()}
    is_vit = family(pretrained.arch) == "vit"
    renamed, config = _as_transformers_vit(pretrained, state) if is_vit else _as_transformers_resnet(pretrained, state)
    (height, width), num_features = height_width(pretrained.image_size), pretrained.backbone.num_features
    num_channels = len(pretrained.mean)
    images = {"mean": list(pretrained.mean), "std": list(pretrained.std), "interpolation": "bilinear"}
    config |= {
        "torch_dtype": "float32",
        "architecture": name,
        "num_channels": num_channels,
        "num_classes": 0,
        "num_features": num_features,
        "global_pool": "token" if is_vit else "avg",
        "model_args": arguments,
        "pretrained_cfg": {"input_size": [num_channels, height, width], "num_classes": 0, "crop_pct": 0.875, **images},
    }
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": images["mean"],
        "image_std": images["std"],
    }
    index = {
        "metadata": {"total_size": sum(tensor.numel() * tensor.element_size() for tensor in renamed.values())},
        "weight_map": dict.fromkeys(renamed, FOR_TRANSFORMERS),
    }

    def save(temporary: Path) -> None:
        (temporary / FOR_TRANSFORMERS).parent.mkdir(parents=True, exist_ok=True)  # a killed command leaves them
        save_file(renamed, temporary / FOR_TRANSFORMERS, {"format": "pt"})
        torch.save(state, temporary / FOR_TIMM)
        for file, content in {
            "config.json": config,
            "preprocessor_config.json": processor,
            "model.safetensors.index.json": index,
        }.items():
            (temporary / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    write_file(folder, save)
    return [
        f"{folder}: {len(renamed)} tensors written",
        f'transformers: AutoModel.from_pretrained("{folder}")(images).pooler_output is the feature',
        f'timm: timm.create_model("local-dir:{folder}", pretrained=True)(images) is the feature, too',
    ]


def _as_transformers_resnet(pretrained: Pretrained, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors and the configuration of transformers' ResNetModel."""
    block, depths = BLOCKS[pretrained.arch]
    renames = [
        (r"^conv1\.", "embedder.embedder.convolution."),
        (r"^bn1\.", "embedder.embedder.normalization."),
        (r"downsample\.0\.", "shortcut.convolution."),
        (r"downsample\.1\.", "shortcut.normalization."),
    ]
    for i in range(3):
        renames += [
            (rf"\.conv{i + 1}\.", f".layer.{i}.convolution."),
            (rf"\.bn{i + 1}\.", f".layer.{i}.normalization."),
        ]
    for i in range(4):
        renames.append((rf"^layer{i + 1}\.", f"encoder.stages.{i}.layers."))
    bottleneck = block is Bottleneck
    return _renamed(state, renames), {
        "model_type": "resnet",
        "architectures": ["ResNetModel"],
        "embedding_size": 64,
        "hidden_sizes": [(256 if bottleneck else 64) * 2**i for i in range(4)],
        "depths": depths,
        "layer_type": "bottleneck" if bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,  # the stride stands in the 3x3, as in torchvision
    }


def _as_transformers_vit(pretrained: Pretrained, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors and the configuration of transformers' ViTModel, in the names of its versions 4 and 5.

    Its pooler becomes the identity, so that `pooler_output` is the class token after the last norm.
    """
    settings = {**vars(LAYOUTS[pretrained.arch]), **pretrained.backbone_args}
    width = settings["embed_dim"]
    split: dict[str, Any] = {}
    for key, tensor in state.items():
        if ".attn.qkv." in key:
            for name, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                split[key.replace("attn.qkv", f"attention.attention.{name}")] = part.contiguous()
        else:
            split[key] = tensor
    renames = [
        (r"^cls_token", "embeddings.cls_token"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.", "encoder.layer."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    ]
    tensors = _renamed(split, renames)
    tensors |= {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}
    return tensors, {
        "model_type": "vit",
        "architectures": ["ViTModel"],
        "hidden_size": width,
        "num_hidden_layers": settings["depth"],
        "num_attention_heads": settings["num_heads"],
        "intermediate_size": int(width * settings["mlp_ratio"]),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": pretrained.image_size,
        "patch_size": settings["patch_size"],
        "qkv_bias": True,
        "pooler_output_size": width,
        "pooler_act": "linear",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _renamed(state: dict[str, Any], renames: list[tuple[str, str]]) -> dict[str, Any]:
    def new(key: str) -> str:
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        return key

    return {new(key): tensor for key, tensor in state.items()}


def onnx(pretrained: Pretrained, file: Path) -> list[str]:
    """Write the network as an ONNX file, and return lines for the user.

    Raises InputError if a package is missing, or if onnxruntime computes other features than torch.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"--to onnx: needs {', '.join(missing)}; pip install {' '.join(missing)} (or 'crossbatch[onnx]')"
        )
    import onnxruntime  # pyright: ignore[reportMissingImports]

    backbone, shape = pretrained.backbone.eval(), (len(pretrained.mean), *height_width(pretrained.image_size))
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    difference = 0.0

    def save(temporary: Path) -> None:
        nonlocal difference
        program = torch.onnx.export(
            backbone,
            (images,),
            input_names=["images"],
            output_names=["features"],
            opset_version=18,
            dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(temporary), external_data=False)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        for n in (1, 3):
            (theirs,) = session.run(None, {"images": images[:n].numpy()})
            with torch.no_grad():
                ours = backbone(images[:n]).numpy()
            difference = max(difference, float(np.abs(theirs - ours).max() / max(1.0, np.abs(ours).max())))
        if not difference <= ONNX_TOLERANCE:
            raise InputError(
                f"--to onnx: onnxruntime's features differ from torch's by {difference:.1e}, more than {ONNX_TOLERANCE:g}; "
                f"nothing was written; try other versions of torch, onnxscript and onnxruntime"
            )

    write_file(file, save)
    return [
        f"{file}: written; onnxruntime's features agree with torch's to {difference:.1e}",
        f'input "images" [n, {", ".join(map(str, shape))}], normalised with mean {pretrained.mean} and std {pretrained.std}; '
        f'output "features" [n, {pretrained.backbone.num_features}]',
    ]


def detectron2(pretrained: Pretrained, file: Path) -> list[str]:
    """Write the pickle that detectron2 takes as MODEL.WEIGHTS, and return lines for the user.

    Raises InputError for what detectron2 cannot build: a ViT, a small stem, other than three channels.
    """
    if family(pretrained.arch) != "resnet" or pretrained.stem != "imagenet":
        what = (
            f"{pretrained.arch} with the stem {pretrained.stem}" if pretrained.stem != "imagenet" else pretrained.arch
        )
        raise InputError(
            f"--to detectron2: builds ResNets with the imagenet stem, and not {what}; --to timm takes a ViT"
        )
    if len(pretrained.mean) != 3:
        raise InputError(
            f"--to detectron2: reads images of 3 channels, and this network takes {len(pretrained.mean)}; --to timm and "
            f"--to onnx take any number"
        )
    renames = [
        (r"^(conv1|bn1)\.", r"stem.\1."),
        (r"downsample\.0\.", "shortcut."),
        (r"downsample\.1\.", "shortcut.norm."),
        (r"\bbn(\d)\.", r"conv\1.norm."),
    ]
    renames += [(rf"^layer{i}\.", f"res{i + 1}.") for i in (4, 3, 2, 1)]
    state = {key: value for key, value in pretrained.backbone.state_dict().items() if "num_batches" not in key}
    tensors = {key: tensor.numpy() for key, tensor in _renamed(state, renames).items()}
    content = {"model": tensors, "__author__": "crossbatch", "matching_heuristics": True}
    write_file(file, lambda path: path.write_bytes(pickle.dumps(content)))
    depth = pretrained.arch.removeprefix("resnet")
    mean, std = ([round(255 * value, 3) for value in values] for values in (pretrained.mean, pretrained.std))
    return [
        f"{file}: {len(tensors)} tensors written",
        f"detectron2: MODEL.WEIGHTS {file} MODEL.RESNETS.DEPTH {depth} MODEL.RESNETS.STRIDE_IN_1X1 False MODEL.RESNETS.NORM "
        f'SyncBN INPUT.FORMAT RGB MODEL.PIXEL_MEAN "{mean}" MODEL.PIXEL_STD "{std}"',
    ]


FOREIGN: dict[str, Callable[[Pretrained, Path], list[str]]] = {
    "huggingface": huggingface,
    "onnx": onnx,
    "detectron2": detectron2,
}


def write_card(checkpoint: Path, to: str, output: Path, notes: list[str]) -> str:
    """Write the model card of an export, with recipe, data, metrics and versions; return a line that says where.

    It is README.md in a folder, and OUTPUT.md beside a file. What the checkpoint does not say is left out.
    """
    file = output / CARD if to == "huggingface" else output.with_name(f"{output.name}.md")
    has_recipe = (checkpoint / "config.json").is_file()  # a run, or one of its checkpoints
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-feature-extraction",
        "tags: [mocov3, crossbatch]",
        "---",
    ]
    lines = [
        *(lines if to == "huggingface" else []),
        f"# {output.name}",
        "",
        "A backbone pretrained with crossbatch.",
        "",
    ]
    lines += [f"- {note}" for note in notes]
    if has_recipe:
        recipe = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        data = recipe.get("crossbatch", {}).get("data", {})
        run = checkpoint if (checkpoint / METRICS).is_file() else checkpoint.absolute().parent.parent
        lines += ["", "## Data", "", f"`{data.get('path')}`", *_metrics(run)]
        lines += ["", "## Recipe", "", "```json", json.dumps(recipe, indent=2), "```"]
    versions = {"crossbatch": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__}
    versions["python"] = platform.python_version()
    lines += ["", "## Versions", "", *(f"- {name} {version}" for name, version in versions.items())]
    write_file(file, lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))
    return f"{file}: the model card, with {'the recipe, data and metrics of the run' if has_recipe else 'versions'}"


def _metrics(run: Path) -> list[str]:
    """Return the last value of every number that a run has logged, as lines of Markdown."""
    last: dict[str, float] = {}
    for line in read_metrics(run) if (run / METRICS).is_file() else ():
        last |= {name: value for name, value in line.items() if isinstance(value, (int, float))}
    rows = [f"| {name} | {value:g} |" for name, value in last.items()]
    return ["", "## Metrics", "", "| at the end | value |", "| --- | --- |", *rows] if rows else []
