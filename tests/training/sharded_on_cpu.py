"""`cogvlm-sft train` under a shipped launcher configuration, on CPU processes that talk by gloo.

    torchrun --nproc_per_node=2 tests/training/sharded_on_cpu.py fsdp2 RECIPE

accelerate takes FSDP and DeepSpeed from its environment only where it sees GPUs; here its look at
the machine is answered for it. All else is the product: the environment that `accelerate launch`
makes of `recipes/accelerate/KIND.yaml`, our trainer, accelerate's sharding, sharded snapshots.
Under FSDP2 it looks behind every micro-batch: no process may hold more than its own part of the
gradients, and these are fp32, reduced in fp32. Rotary angles reach the layers in fp32, and
`generate` waits for the process with the longest answer.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"


def launcher_environment(kind: str) -> dict[str, str]:
    """What `accelerate launch` tells its processes by a shipped configuration."""
    file = ["--config_file", str(FOLDER / f"{kind}.yaml"), "script.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(file))
    if not arguments.use_deepspeed:
        told = prepare_multi_gpu_env(arguments)
    else:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        told = prepare_deepspeed_cmd_env(arguments)[1]
    return {key: told[key] for key in told if key.startswith(("ACCELERATE_", "FSDP_"))}


def watch_gradients() -> None:
    """Fails the run where gradients are whole, or no finer than bf16."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from transformers.distributed.fsdp import is_fsdp_managed_module

    from cogvlm_sft.model.attention_cogvlm import Run
    from cogvlm_sft.model.layers_cogvlm import CogVLMDecoderLayer
    from cogvlm_sft.training.trainer import CogVLMTrainer

    step, layer = CogVLMTrainer.training_step, CogVLMDecoderLayer.forward

    def with_angles(self: CogVLMDecoderLayer, rows: Any, run: Any, *rest: Any, **named: Any) -> Any:
        if isinstance(run, Run):
            assert run.angles[0].dtype == torch.float32, run.angles[0].dtype
        return layer(self, rows, run, *rest, **named)

    def watched(self: CogVLMTrainer, model: Any, *rest: Any) -> torch.Tensor:
        assert is_fsdp_managed_module(self.model), "generate goes its own way in each process"
        loss = step(self, model, *rest)
        assert loss.dtype == torch.float32, loss.dtype
        parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
        for group in (part._get_fsdp_state()._fsdp_param_group for part in parts):
            for held in group.fsdp_params if group else ():
                assert held.unsharded_accumulated_grad is None, "a whole gradient"
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert grads and all(isinstance(grad, DTensor) for grad in grads)
        local = torch.cat([grad.to_local().flatten() for grad in grads])
        assert local.dtype == torch.float32
        assert not torch.equal(local, local.bfloat16().float()), "reduced in bf16"
        return loss

    CogVLMTrainer.training_step = watched  # type: ignore[method-assign]
    CogVLMDecoderLayer.forward = with_angles  # type: ignore[method-assign]


if __name__ == "__main__":
    kind, recipe = sys.argv[1:]
    os.environ |= launcher_environment(kind)
    os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]

    from transformers import training_args

    from cogvlm_sft.cli import main
    from cogvlm_sft.training import arguments

    training_args.is_torch_bf16_gpu_available = lambda: True  # type: ignore[attr-defined]

    class OnADevice(arguments.SFTConfig):
        """As where GPUs are seen."""

        def __init__(self, **settings: Any) -> None:
            super().__init__(**{**settings, "use_cpu": False})

    arguments.SFTConfig = OnADevice  # type: ignore[misc]
    if kind == "fsdp2":
        watch_gradients()
    status = main(["train", recipe])
    torch.distributed.destroy_process_group()
    raise SystemExit(status)
