"""`cogvlm-sft train` under FSDP2 on CPU processes that talk through gloo.

    torchrun --nproc_per_node=2 tests/training/fsdp_on_cpu.py RECIPE

accelerate takes FSDP from its environment only where it sees GPUs; here its one look at the machine
is answered for it. All else is the product: our trainer, accelerate's `fully_shard` of each decoder
layer, sharded snapshots by torch.distributed.checkpoint.
"""

import os
import sys

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

# What `accelerate launch --config_file recipes/accelerate/fsdp2.yaml` sets.
os.environ |= {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "ACCELERATE_TORCH_DEVICE": "cpu",
}

if __name__ == "__main__":
    from cogvlm_sft.cli import main

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    status = main(["train", *sys.argv[1:]])
    torch.distributed.destroy_process_group()
    raise SystemExit(status)
