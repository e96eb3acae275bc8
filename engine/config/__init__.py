"""Read a recipe, check it, and resolve it into the numbers of a run.

schema      declares every key of pretraining; `finetune` and `evaluation` those of the other commands
keys        says how a key is declared, and answers what is known about keys
aliases     translates former names of keys
deepspeed_keys  says what becomes of DeepSpeed's own keys
load        reads JSON and checks it
resolve     replaces "auto" by numbers, for a world size and a device
user_input  turns errors about arguments into errors about keys
document    makes the tables of all keys in ds_configs/README.md
"""

from crossbatch.engine.config.finetune import FinetuneConfig, ResolvedFinetune, resolve_finetune
from crossbatch.engine.config.keys import key_paths, resumable_keys
from crossbatch.engine.config.load import load_config, parse_config, to_dict
from crossbatch.engine.config.resolve import (
    Device,
    Resolved,
    ResolvedConfig,
    autocast_dtype,
    choose_precision,
    resolve,
    usable_cores,
)
from crossbatch.engine.config.schema import AdamWConfig, Config, LarsConfig, WatchConfig
from crossbatch.engine.config.user_input import user_input
