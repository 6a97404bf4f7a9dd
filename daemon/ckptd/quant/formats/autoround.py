"""AutoRound: the packings of GPTQ, AWQ, compressed-tensors and MLX under a config of its own.

`packing_format` says which: `auto_round:auto_gptq` stores zeros less one, `auto_round` and
`auto_round:gptqmodel` as they are, `auto_round:auto_awq` is AWQ; widths that straddle words are a
stream of bits in all of them. Microscaled codes lie as compressed-tensors lays them, 8-bit floats
with other scales as FP8 does, whatever the packing is called; `data_type`, bits and group_size say
what they are.

Source: AutoRound 0.16 and its files; transformers' AutoRoundConfig for a config without packing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptd.errors import CheckpointUnsupported
from ckptd.quant.formats import awq, compressed_tensors, fp8, gptq, linears, mlx, narrow
from ckptd.quant.group import Found, Stored

_SIDE_FILE = "quantization_config.json"
_PACKING = "auto_round:gptq"
"""What a config without packing_format means."""
_ROTATED = ("rotation_config", "hadamard_config", "transform_config")
_PLAIN_BITS = 16
_FOREIGN = (".w_bf16_to_fp8_scale", ".act_scales")
"""Partners of 4-bit codes whose values are FP8 of another scale."""


@dataclass(frozen=True, slots=True)
class AutoRound:
    """Checkpoints whose `quant_method` is auto-round, as it is and was spelled."""

    name: str = "AutoRound"
    methods: tuple[str, ...] = ("auto-round", "auto_round", "autoround", "intel/auto-round")
    side_files: tuple[str, ...] = (_SIDE_FILE,)
    skip_key: str | None = None

    def recognise(self, stored: Stored) -> str | None:
        """Return that AutoRound's own file is there and names it."""
        side = stored.document(_SIDE_FILE) or {}
        if side.get("quant_method") in self.methods or linears.by_autoround(side):
            return f"{_SIDE_FILE} is of AutoRound"
        return None

    def find(self, stored: Stored) -> Found:
        """Return every quantized module, of whichever packing.

        Raises:
            CheckpointCorrupt: a partner is missing or does not fit; names it.
            CheckpointUnsupported: a packing that is not decoded, weights that were rotated.
        """
        configs = (stored.quantization, stored.document(_SIDE_FILE) or {})
        config = next((one for one in configs if one), {})
        _refuse(stored, config)
        packing = linears.text(config.get("packing_format")) or _PACKING
        if packing in ("mlx", "auto_round:mlx"):
            return mlx.FORMAT.find(stored)
        integers = _integers(stored, configs, packing)
        used = {name for group in integers.groups for name in group.consumed}
        rest = {name: one for name, one in stored.tensors.items() if name not in used}
        floats = _floats(dataclasses.replace(stored, tensors=rest), config)
        return Found(
            groups=integers.groups + floats.groups, dropped=integers.dropped + floats.dropped
        )


FORMAT = AutoRound()


def _integers(stored: Stored, configs: tuple[Mapping[str, Any], ...], packing: str) -> Found:
    if "awq" in packing:
        return awq.find(stored, (*configs, {"provider": "auto-round"}))
    stored_zeros = "gptq" not in packing or "gptqmodel" in packing
    layout = gptq.Layout(planes=frozenset(), stored_zeros=stored_zeros)
    said = linears.settings(*configs)
    modules = linears.linears(stored)
    return Found(groups=tuple(gptq.group_of(module, layout, said) for module in modules))


def _floats(stored: Stored, config: Mapping[str, Any]) -> Found:
    """Return the weights whose codes are floats, as the family finds them that lays them so."""
    names = [name for name in stored.tensors if name.endswith(".weight_packed")]
    if names or linears.text(config.get("data_type")).startswith("mx"):
        declared = _as_compressed(config)
        return compressed_tensors.FORMAT.find(dataclasses.replace(stored, quantization=declared))
    if any(tensor.spec.dtype in narrow.FLOAT8 for tensor in stored.tensors.values()):
        size = config.get("group_size")
        block = {"weight_block_size": size} if isinstance(size, list) else {}
        return fp8.FORMAT.find(dataclasses.replace(stored, quantization=block))
    return Found(groups=())


def _refuse(stored: Stored, config: Mapping[str, Any]) -> None:
    """Refuse rotations at run time, codes of codes and scales that no library reads elsewhere."""
    rotated = [key for key in _ROTATED if config.get(key)]
    foreign = [name for name in stored.tensors if name.endswith(_FOREIGN)]
    kind = linears.text(config.get("data_type"))
    what = None
    if rotated:
        what = f"has weights that need a rotation at run time ({rotated[0]})"
    elif foreign:
        what = "has 4-bit codes of FP8 values (w4a8)"
    elif kind.startswith("mx_int") or kind == "nvfp4_v2" or "e5m3" in kind:
        what = f"has codes of a type that is not decoded: {kind}"
    if what is not None:
        raise CheckpointUnsupported(
            what,
            path=stored.path,
            tensor=next(iter(foreign), None),
            expected="int, fp8, mx_fp or nv_fp codes",
            hint="dequantize it with AutoRound, and save that",
        )


def _as_compressed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of compressed-tensors that means the same, for codes that are floats."""
    groups = {"default": {"targets": ["Linear"], "weights": _weights(config)}}
    for number, (target, values) in enumerate(_exceptions(config)):
        groups[f"{number}"] = {"targets": [target], "weights": _weights({**config, **values})}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


def _exceptions(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the modules that are quantized otherwise than most, and patterns of them."""
    exceptions = config.get("extra_config")
    if not isinstance(exceptions, Mapping):
        return
    for name, values in exceptions.items():
        bits = linears.whole(values.get("bits")) if isinstance(values, Mapping) else None
        if bits is not None and bits >= _PLAIN_BITS:
            continue
        if isinstance(values, Mapping):
            yield (f"re:{name}" if any(mark in name for mark in "*^$|?+[(") else name), values


def _weights(config: Mapping[str, Any]) -> Mapping[str, Any]:
    kind, size = linears.text(config.get("data_type")), config.get("group_size")
    weights: dict[str, Any] = {
        "num_bits": linears.whole(config.get("bits")) or 8,
        "type": "float" if "fp" in kind else "int",
        "symmetric": True,
    }
    whole = linears.whole(size)
    if whole is None or whole < 1:
        return weights | {"strategy": "channel"}
    return weights | {"strategy": "tensor_group" if "nv" in kind else "group", "group_size": whole}
