"""The launcher configurations that ship, read by accelerate's own parser."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def test_they_are_these() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type == KINDS[name]
    # A dtype here would win over the recipe's model.dtype where that is float32.
    assert config.mixed_precision == "no"
    assert f"--config_file recipes/accelerate/{name}.yaml" in path.read_text(encoding="utf-8")
    assert "--machine_rank" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", KINDS)
def test_several_machines_need_no_other_launcher(name: str) -> None:
    """Hazard: for DeepSpeed on several machines accelerate takes pdsh and a hostfile."""
    machines = "--num_machines 8 --machine_rank 3 --main_process_ip first --num_processes 64"
    told = launch_command_parser().parse_args(
        ["--config_file", str(FOLDER / f"{name}.yaml"), *machines.split(), "script.py"]
    )
    told, defaults, _ = _validate_launch_command(told)
    if told.use_deepspeed:
        told.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        assert prepare_deepspeed_cmd_env(told)[0] is None
    else:
        prepare_multi_gpu_env(told)
    assert (told.nproc_per_node, told.nnodes, told.node_rank) == ("8", "8", 3)
    assert told.rdzv_endpoint == "first:29500"


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_builds_no_optimizer_of_its_own(name: str) -> None:
    """Hazard: an optimizer or a scheduler in DeepSpeed's file bypasses the rates per group."""
    tree: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    settings = tree["deepspeed_config"]
    assert settings["zero_stage"] == int(name[-1])
    assert not {"optimizer", "scheduler", "deepspeed_config_file"} & settings.keys()


def test_fsdp_keeps_the_parameters_names() -> None:
    """Hazard: the first FSDP flattens parameters, and no group would find its own."""
    settings = load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config
    assert settings["fsdp_version"] == 2
    assert settings["fsdp_state_dict_type"] == "SHARDED_STATE_DICT"
