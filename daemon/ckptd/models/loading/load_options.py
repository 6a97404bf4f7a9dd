"""The keyword arguments of `from_pretrained` that are neither the configuration's nor the model's.

Owns: taking them out of the others, checking them, and refusing by name what this loader does not
do. What transformers accepts and this loader has no use for is taken and dropped: it never maps
files, never runs a checkpoint's code, always loads without a second copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What a whole model can be made in: torch's default dtypes."""

_DROPPED = (
    "_commit_hash", "_fast_init", "_from_auto", "_from_pipeline", "adapter_kwargs", "adapter_name",
    "allow_all_kernels", "code_revision", "disable_mmap", "from_flax", "from_tf",
    "low_cpu_mem_usage", "max_memory", "mirror", "offload_buffers", "offload_folder",
    "offload_state_dict", "tqdm_class", "trust_remote_code",
)  # fmt: skip
_REFUSED = {
    "device_mesh": "a model is loaded onto one device",
    "distributed_config": "a model is loaded onto one device",
    "fusion_config": "modules are never fused",
    "gguf_file": "GGUF files are not loaded: make safetensors of it with the stage `dequantize`, or "
    "load the checkpoint it was made of",
    "kernel_config": "no kernels are downloaded",
    "tp_plan": "a model is loaded onto one device",
    "tp_size": "a model is loaded onto one device",
    "use_kernels": "no kernels are downloaded",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What is left of the arguments once the documented ones of the signature are named.

    `dtype` None is "auto"; `key_mapping` are patterns of names in the checkpoint and what replaces
    them.
    """

    state_dict: Mapping[str, torch.Tensor] | None = None
    dtype: torch.dtype | None = None
    device: torch.device
    output_loading_info: bool = False
    attn_implementation: Any = None
    experts_implementation: Any = None
    variant: str | None = None
    generation_config: Any = None
    key_mapping: Mapping[str, str] | None = None

    @classmethod
    def taken_from(cls, kwargs: dict[str, Any]) -> LoadOptions:
        """Take what is named here out of `kwargs`; the rest is the configuration's or the model's.

        Raises:
            ValueError: an unknown dtype, more than one device, or something not done here.
        """
        for name in _DROPPED:
            kwargs.pop(name, None)
        for name, why in _REFUSED.items():
            if kwargs.pop(name, None):
                raise ValueError(f"from_pretrained({name}=...): {why}")
        _check_quantization(kwargs.pop("quantization_config", None))
        dtype, old_dtype = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
        device, device_map = kwargs.pop("device", None), kwargs.pop("device_map", None)
        if device is not None and device_map is not None:
            raise ValueError("give `device` or `device_map`, not both")
        own = {
            name: kwargs.pop(name)
            for name in cls.__slots__
            if name not in {"dtype", "device"} and name in kwargs
        }
        return cls(
            dtype=as_dtype(dtype if dtype is not None else old_dtype),
            device=as_device(device if device is not None else device_map),
            **own,
        )


def as_dtype(wanted: Any) -> torch.dtype | None:
    """Return the dtype that an argument means; None stands for "auto".

    Raises:
        ValueError: torch has no dtype of that name, or a model cannot be made in it.
    """
    if isinstance(wanted, Mapping):
        wanted = wanted.get("", torch.get_default_dtype())
    if wanted is None or wanted == "auto":
        return None
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype):
        raise ValueError(
            f"dtype {wanted!r} is not one: give 'auto', a torch.dtype, or its name, like 'bfloat16'"
        )
    return check_dtype(found)


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return `dtype` if a whole model can be made in it.

    Raises:
        ValueError: it cannot.
    """
    if dtype not in DTYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise ValueError(f"a model cannot be made in {dtype}: expected one of {names}")
    return dtype


def _check_quantization(wanted: Any) -> None:
    """Check that a `quantization_config` asks for plain weights, which is what loading gives.

    Objects of transformers and mappings say so by `dequantize=True`, compressed-tensors' by
    `run_compressed=False`.

    Raises:
        ValueError: it asks for weights that are quantized.
    """
    if wanted is None:
        return
    said = wanted if isinstance(wanted, Mapping) else vars(wanted)
    if said.get("dequantize") is not True and said.get("run_compressed") is not False:
        raise ValueError(
            "from_pretrained(quantization_config=...): nothing is quantized while it is loaded, and "
            "a quantized checkpoint is decoded without being asked: leave it out, or say "
            "dequantize=True in it"
        )


_AUTOMATIC = frozenset({"auto", "balanced", "balanced_low_0", "sequential"})
"""What transformers calls the ways to spread a model over the devices there are."""


def as_device(wanted: Any) -> torch.device:
    """Return the one device that `device` or `device_map` means; by default torch's current one.

    "auto" and its like are the first CUDA device where there is one, else the CPU: a model is never
    divided.

    Raises:
        ValueError: several devices, disk, or an unknown one.
    """
    if isinstance(wanted, str) and wanted in _AUTOMATIC:
        wanted = "cuda:0" if torch.cuda.is_available() else "cpu"
    if wanted is None:
        wanted = torch.get_default_device()
    if isinstance(wanted, Mapping):
        places = {str(as_device(place)) for place in wanted.values()}
        if len(places) != 1:
            raise ValueError(
                f"device_map names {len(places)} devices ({', '.join(sorted(places))}); a model is "
                "loaded onto one: give its name, like 'cuda:0'"
            )
        return torch.device(places.pop())
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        wanted = f"cuda:{wanted}"
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map {wanted!r} is not a device; a model is loaded onto one: give its name, "
            "like 'cpu' or 'cuda:0'"
        ) from error
    if device.type == "meta":
        raise ValueError(
            "weights cannot be loaded onto the meta device: make the model from its config"
        )
    return device
