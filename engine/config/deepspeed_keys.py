"""Say in one table what becomes of DeepSpeed's own keys in a recipe.

Keys that DeepSpeed gets as they are (`steps_per_print`, `memory_breakdown`, many of `zero_optimization`) stand in the
schema like any other. The table here holds all the others: the values with which a key changes nothing here, so that it may
stay in a recipe, and why another value is refused. `fp16`, `bf16` and `torch_autocast` become `crossbatch.precision`.
"""

import json
from collections.abc import Mapping
from typing import Any

from crossbatch import InputError

ANY = object()  # any value is taken
# The values of loss scaling below are DeepSpeed's defaults, which its examples write out.
_LOSS_SCALE = "crossbatch finds the loss scale as torch's GradScaler does, from 2^16; leave it out"
_OWN_CHECKPOINTS = "crossbatch writes its own checkpoints; set crossbatch.checkpoint"
_PROFILE = "start with --profile N, which measures each part of a step"
_METRICS = "every run writes metrics.jsonl and TensorBoard files; leave it out, or give it enabled: false"
_DTYPES: dict[str, str] = dict.fromkeys(("bfloat16", "torch.bfloat16", "bf16"), "bf16")
_DTYPES |= dict.fromkeys(("float16", "torch.float16", "fp16", "half"), "fp16")

# The values with which a key changes nothing here, and why all others are refused.
KEYS: dict[str, tuple[tuple[Any, ...], str]] = {
    "gradient_accumulation_steps": (
        (1, "auto"),
        "set train_micro_batch_size_per_gpu; accumulation does not enlarge a contrastive batch",
    ),
    "scheduler": ((None,), "set crossbatch.schedule"),
    "amp": ((), "set crossbatch.precision"),
    "fp16.loss_scale": ((0, 0.0), _LOSS_SCALE),
    "fp16.initial_scale_power": ((16,), _LOSS_SCALE),
    "fp16.loss_scale_window": ((1000,), _LOSS_SCALE),
    "fp16.hysteresis": ((2,), _LOSS_SCALE),
    "fp16.consecutive_hysteresis": ((False,), _LOSS_SCALE),
    "fp16.min_loss_scale": ((1, 1.0), _LOSS_SCALE),
    "fp16.auto_cast": ((True, False), "crossbatch.precision always casts automatically"),
    "fp16.fp16_master_weights_and_grads": ((False,), "master weights and gradients are fp32"),
    "bf16.bf16_master_weights_and_grads": ((False,), "master weights and gradients are fp32"),
    "bf16.bf16_optimizer_states": ((False,), "the optimizer's state is fp32"),
    "bf16.immediate_grad_update": ((True, False), "gradients are fp32"),
    "bf16.check_overflow": ((True,), "a step that is not finite is always skipped"),
    "torch_autocast.lower_precision_safe_modules": ((None,), "set crossbatch.precision"),
    "zero_allow_untested_optimizer": (
        (True,),
        "leave it out; DeepSpeed alone would turn LARS into SGD, so crossbatch sets it and tells LARS how parameters are cut",
    ),
    "zero_force_ds_cpu_optimizer": ((False,), "an offloaded optimizer steps with crossbatch's own kernels"),
    "tensorboard": ((), _METRICS),
    "wandb": ((), f"{_METRICS}; wandb.init(sync_tensorboard=True) uploads these"),
    "csv_monitor": ((), _METRICS),
    "comet": ((), _METRICS),
    "wall_clock_breakdown": ((False,), f"{_PROFILE}; DeepSpeed's timers expect its own order of calls"),
    "flops_profiler": ((), _PROFILE),
    "activation_checkpointing": (
        (),
        "set crossbatch.model.checkpoint_activations, or lower train_micro_batch_size_per_gpu",
    ),
    "prescale_gradients": ((False,), "it would round the mean of the gradients otherwise"),
    "gradient_predivide_factor": ((1, 1.0), "it would round the mean of the gradients otherwise"),
    "gradient_allreduce_op": (("mean",), "the gradient of the global batch is a mean"),
    "communication_data_type": ((None, "fp32"), "gradients travel in fp32"),
    "sparse_gradients": ((False,), "no gradient here is sparse"),
    "disable_allgather": ((False,), "parameters must be gathered"),
    "dataloader_drop_last": ((True,), "the last batch of an epoch is always a whole one"),
    "data_types": (({}, {"grad_accum_dtype": "fp32"}, {"grad_accum_dtype": None}), "gradients add up in fp32"),
    "checkpoint": (({},), _OWN_CHECKPOINTS),
    "zero_optimization.allgather_partitions": ((True,), "parameters are gathered at once"),
    "zero_optimization.stage3_param_persistence_threshold": ((ANY,), "no parameter stays gathered"),
    "zero_optimization.stage3_model_persistence_threshold": ((ANY,), "no parameter stays gathered"),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": ((ANY,), _OWN_CHECKPOINTS),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": ((ANY,), _OWN_CHECKPOINTS),
    "zero_optimization.load_from_fp32_weights": ((True,), _OWN_CHECKPOINTS),
    "zero_optimization.elastic_checkpoint": ((False,), _OWN_CHECKPOINTS),
    "zero_optimization.ignore_unused_parameters": ((True,), "all parameters are used"),
    "zero_optimization.cpu_offload": ((False,), "set zero_optimization.offload_optimizer.device to cpu"),
    "zero_optimization.offload_param": (
        (None, {"device": "none"}),
        "parameters stay on the GPU; offload the optimizer",
    ),
    "zero_optimization.round_robin_gradients": ((False,), "LARS has to know who holds which gradient"),
    "zero_optimization.use_multi_rank_bucket_allreduce": ((True,), "gradients would be added in another order"),
    "zero_optimization.zero_hpz_partition_size": ((1,), "LARS has to know who holds which parameter"),
    "zero_optimization.zero_quantized_weights": ((False,), "parameters travel as they are"),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), "parameters travel as they are"),
    "zero_optimization.zero_quantized_gradients": ((False,), "gradients travel in fp32"),
    "zero_optimization.memory_efficient_linear": ((True, False), "it changes only layers that DeepSpeed builds"),
    "zero_optimization.legacy_stage1": ((False,), "LARS has to know who holds which parameter"),
}
# Further keys of DeepSpeed. A section among them may stand in a recipe as long as it is not enabled.
OTHERS = {
    *("fp16", "bf16", "bfloat16", "torch_autocast", "autotuning", "elasticity", "hybrid_engine"),
    *("compression_training", "disable_python_gc", "vocabulary_size", "use_data_before_expert_parallelism"),
    *("data_efficiency", "curriculum_learning", "progressive_layer_drop", "eigenvalue", "sparse_attention", "pipeline"),
    *("aio", "nebula", "compile", "tensor_parallel", "expert_parallel", "monitor_config", "quantize_training"),
    *("managed_gradient_accumulation", "seq_parallel_communication_data_type", "log_level", "optimizer.legacy_fusion"),
    *(
        f"zero_optimization.{name}"
        for name in (
            *("zenflow", "compute_grad_norm", "cpu_offload_param", "cpu_offload_use_pin_memory", "parameter_alignment"),
            *("stage3_module_granularity_threshold", "stage3_use_all_reduce_for_fetch_params", "leaf_module"),
            *("stage3_allgather_sequential", "override_module_apply", "pipeline_loading_checkpoint"),
            *("enable_sanity_checks", "save_muon_momentum_buffer_in_memory"),
        )
    ),
}


def without_deepspeed_keys(recipe: Mapping[str, Any], declared: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe without the keys of DeepSpeed that change nothing here, and with crossbatch's keys in place of others.

    `declared` are the keys of the schema, which stay. Raises InputError for a key, or its value, that crossbatch cannot follow.
    """
    kept, precisions = {}, {}
    for name, value in recipe.items():
        if name in ("fp16", "bf16", "bfloat16", "torch_autocast") and isinstance(value, Mapping):
            precisions |= _precision(name, value)
        elif name == "zero_optimization" and isinstance(value, Mapping):
            kept[name] = {inner: given for inner, given in value.items() if not _is_harmless(f"{name}.{inner}", given)}
        elif name in declared or not _is_harmless(name, value):
            kept[name] = value
    if not precisions:
        return kept
    key, precision = next(iter(precisions.items()))
    section = dict(kept.get("crossbatch", {}))
    given = section.get("precision", "auto")
    if {given, *precisions.values()} - {"auto", precision}:
        others = [f"{other} means {value}" for other, value in precisions.items()]
        raise InputError(
            f"crossbatch.precision: given {given}, but {', '.join(others)}; allowed: one precision; leave {key} out"
        )
    return {**kept, "crossbatch": {**section, "precision": precision}}


def _is_harmless(path: str, value: Any) -> bool:
    """Return whether DeepSpeed's key at `path` changes nothing here; False also for no key of DeepSpeed.

    Raises InputError for a key of DeepSpeed that would change something.
    """
    if path not in KEYS and path not in OTHERS:
        return False
    if isinstance(value, Mapping) and value.get("enabled") is False:
        return True
    harmless, why = KEYS.get(path, ((), "crossbatch has nothing like it; leave it out"))
    if ANY in harmless or any(type(value) is type(one) and value == one for one in harmless):
        return True
    allowed = " or ".join(map(json.dumps, harmless)) or "to leave it out"
    raise InputError(f"{path}: given {json.dumps(value)}; a DeepSpeed key; allowed here: {allowed}; {why}")


def _precision(name: str, section: Mapping[str, Any]) -> dict[str, str]:
    """Return {path: crossbatch.precision} of DeepSpeed's section `name`, empty where it is not enabled."""
    enabled = section.get("enabled", False)
    if enabled in (False, "auto"):
        return {}
    if enabled is not True:
        raise InputError(f"{name}.enabled: given {enabled!r}; allowed: true or false; or set crossbatch.precision")
    dtype = section.get("dtype", "bfloat16") if name == "torch_autocast" else name
    if dtype not in _DTYPES:
        raise InputError(f"{name}.dtype: given {dtype!r}; allowed: bfloat16, float16; or set crossbatch.precision")
    for inner, value in section.items():
        path = f"{'bf16' if name == 'bfloat16' else name}.{inner}"
        if inner not in ("enabled", "dtype") and value != "auto" and not _is_harmless(path, value):
            raise InputError(f"{name}.{inner}: given {value!r}; no such key of crossbatch; set crossbatch.precision")
    return {f"{name}.enabled": _DTYPES[dtype]}
