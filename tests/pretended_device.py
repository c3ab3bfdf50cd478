"""An accelerator pretended on the CPU: what a GPU would refuse or wait for, seen without one.

After `pretend()` tensors can be on the device `pretended`; their values are CPU tensors. Operations
that mix them with tensors left on the host fail, as on a GPU (which takes a tensor without
dimensions, and host indices into its own tensors), and those that make the host wait for the device
are counted in `WAITS`: reading a value, looking for nonzero places, copying to the host. For a
process of its own, since torch holds one such backend for good.
"""

import json
import os
import sys
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

_aten = torch.ops.aten
_HOST_INDICES = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_WAITS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default}
WAITS: Counter[str] = Counter()


class OnDevice(torch.Tensor):
    """A tensor of the device; `values` are on the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> "OnDevice":
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device("pretended", 0),
        )
        made.values = values
        return made

    def tolist(self) -> Any:  # torch's takes no subclass
        WAITS["tolist"] += 1
        return self.values.tolist()

    def untyped_storage(self) -> Any:
        return self.values.untyped_storage()

    def storage(self) -> Any:
        return self.values.untyped_storage()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **kwargs or {})


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """One operation, on the values."""
    if func is _aten._copy_from.default:
        func, args = _aten.copy_.default, (args[1], args[0])
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    inside = any(isinstance(value, OnDevice) for value in given)
    copies = func is _aten.copy_.default
    for value in given if inside and not copies and func not in _HOST_INDICES else ():
        if not isinstance(value, OnDevice) and value.dim():
            raise AssertionError(f"{func}: {tuple(value.shape)} is on the host")
    target = kwargs.pop("device", None)
    if target is not None:
        kwargs |= (
            {"device": "cpu", "pin_memory": False} if "pin_memory" in kwargs else {"device": "cpu"}
        )
        to_host = inside and torch.device(target).type == "cpu"
        inside = not to_host
    else:
        to_host = copies and not isinstance(args[0], OnDevice)
        inside |= not given
    if to_host or func in _WAITS:
        WAITS[str(func)] += 1
    bare = tree_map(lambda v: v.values if isinstance(v, OnDevice) else v, (args, kwargs))
    result = func(*bare[0], **bare[1])
    for value in given:  # changed in place
        if (value.values if isinstance(value, OnDevice) else value) is result:
            return value
    if not inside:
        return result
    return tree_map(lambda v: OnDevice(v) if isinstance(v, torch.Tensor) else v, result)


class _Module(_DummyBackendModule):
    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]


_LIBRARY = torch.library.Library("aten", "IMPL")


def pretend() -> None:
    """Tells torch of the device, before the first backward pass of the process."""
    _setup_privateuseone_for_python_backend("pretended", backend_module=_Module())
    for name in ("empty.memory_format", "empty_strided", "_copy_from"):
        packet, _, overload = name.partition(".")
        func = getattr(getattr(_aten, packet), overload or "default")
        _LIBRARY.impl(name, partial(_run, func), "PrivateUse1")


def put(module: torch.nn.Module) -> None:
    """A module's parameters and buffers to the device."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                placed = torch.nn.Parameter(OnDevice(weight.data), weight.requires_grad)
                part._parameters[name] = placed
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = OnDevice(buffer)


def main(arguments: list[str]) -> int:
    """`cogvlm-sft` on the device; the last line of stderr tells what the host waited for."""
    pretend()
    os.environ["ACCELERATE_TORCH_DEVICE"] = "pretended"
    from cogvlm_sft.checkpoint import load

    torch.inference_mode = torch.no_grad  # type: ignore[misc, assignment]  # takes no subclass
    load.own_device = lambda: "pretended"
    from trl import SFTConfig

    from cogvlm_sft import cli

    prepare = SFTConfig.__post_init__

    def on_the_device(self: SFTConfig) -> None:
        self.use_cpu = False
        prepare(self)

    SFTConfig.__post_init__ = on_the_device  # type: ignore[method-assign]
    status = cli.main(arguments)
    print(json.dumps(WAITS), file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
