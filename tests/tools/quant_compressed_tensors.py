"""Write the compressed-tensors checkpoints under tests/data/quant/ct_*, with the real library.

Each weight is random, gets scales by minimum and maximum, and goes through `compress` and
`decompress` of the library's own compressor; what the latter returns is the reference. Made with
compressed-tensors 0.20.0 (`ct_packed`, `ct_bytes`, `ct_floats`, `ct_experts`) and 0.17.1, the last
one that let no code straddle words and knew g_idx (`ct_old`), torch 2.13:

    python tests/tools/quant_compressed_tensors.py tests/data/quant

writes those that the installed version can write. `--sweep` writes one folder with a weight for
every combination of bits, strategy, symmetry, dtype and shape that the library can express.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

VERSION = tuple(int(part) for part in compressed_tensors.__version__.split(".")[:2])
IS_OLD = VERSION < (0, 18)
GROUPINGS: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {},
    "group": {"group_size": 32},
    "block": {"block_structure": [16, 32]},
}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A weight to be quantized: its module, shape, the arguments of its group and its layout."""

    module: str
    shape: tuple[int, ...]
    layout: str
    weights: dict[str, Any]
    dtype: str = "bf16"
    target: str | None = None
    g_idx: bool = False
    extra: dict[str, torch.Tensor] = field(default_factory=dict)


def integers(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    """Return the arguments of integers."""
    return {"num_bits": bits, "type": "int", "strategy": strategy, **more}


def floats(bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    """Return the arguments of floats."""
    return {"num_bits": bits, "type": "float", "strategy": strategy, **more}


def blocks(weight: torch.Tensor, args: QuantizationArgs) -> torch.Tensor:
    """Return the weight with the elements under one scale on the last axis, zeros where ragged."""
    rows, columns = weight.shape
    strategy = str(args.strategy)
    if strategy == "tensor":
        return weight.reshape(1, -1)
    if strategy == "channel":
        return weight[:, None]
    if strategy == "block":
        high, wide = args.block_structure
        pad = (0, -columns % wide, 0, -rows % high)
        padded = torch.nn.functional.pad(weight, pad)
        tiles = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
        return tiles.transpose(1, 2).flatten(2)
    return weight.unflatten(1, (-1, args.group_size))


def quantized(case: Case, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], Any]:
    """Return the tensors that the library stores of a case, and the weight that it gives back."""
    args = QuantizationArgs(**case.weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=case.layout)
    compressor = BaseCompressor.get_value_from_registry(case.layout)
    if len(case.shape) == 3:  # experts: the library takes them one by one or packs them together
        singles = [
            quantized(Case(**{**vars(case), "shape": case.shape[1:]}), generator)
            for _ in range(case.shape[0])
        ]
        state = {key: torch.stack([one[0][key] for one in singles]) for key in singles[0][0]}
        if "weight_shape" in state:
            state["weight_shape"] = torch.tensor(case.shape)
        return state, torch.stack([one[1] for one in singles])
    spread = torch.rand(case.shape[0], 1, generator=generator) * 0.2 + 0.01
    weight = (torch.randn(case.shape, generator=generator) * spread).to(DTYPES[case.dtype])
    groups = torch.arange(case.shape[1]) // (args.group_size or case.shape[1])
    state = {"weight": weight}
    ordered = weight
    if case.g_idx:
        order = torch.randperm(case.shape[1], generator=generator)
        state["weight_g_idx"] = groups[order].to(torch.int32)
        ordered = weight[:, state["weight_g_idx"].argsort(stable=True)]
    held = blocks(ordered, args)
    low, high = held.amin(-1), held.amax(-1)
    if str(args.strategy) == "tensor_group":
        largest = weight.abs().max().to(torch.float32).clamp(min=1e-6)
        state["weight_global_scale"] = (448.0 * 6.0 / largest).reshape(1)
    scale, zero = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    if case.layout.startswith("mx"):
        scale = 2.0 ** torch.floor(torch.log2(scale.float()))
    state["weight_scale"] = scale.to(DTYPES[case.dtype])
    state["weight_zero_point"] = zero
    if args.symmetric or case.layout.endswith(("fp4-pack-quantized", "fp6-pack-quantized")):
        del state["weight_zero_point"]
    stored = compressor.compress(state, scheme)
    plain = compressor.decompress(stored, scheme)["weight"]
    return stored, plain.detach()


def config_of(cases: list[Case], key: str) -> dict[str, Any]:
    """Return a config.json: one group for every set of arguments and layout."""
    groups: dict[str, dict[str, Any]] = {}
    for case in cases:
        args = QuantizationArgs(**case.weights).model_dump(mode="json")
        said = {"weights": args, "format": case.layout, "targets": []}
        alike = [one for one in groups.values() if {**one, "targets": []} == said]
        group = alike[0] if alike else groups.setdefault(f"group_{len(groups)}", said)
        target = case.target or case.module
        if target not in group["targets"]:
            group["targets"].append(target)
    layouts = {case.layout for case in cases}
    quantization = {
        "quant_method": "compressed-tensors",
        "version": compressed_tensors.__version__,
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
    }
    return {"model_type": "llama", "dtype": "bfloat16", key: quantization}


def write(
    folder: Path, cases: list[Case], *, shards: int = 1, key: str = "quantization_config"
) -> None:
    """Write the checkpoint of `cases`; the tensors of a weight go to shards in turn."""
    generator = torch.Generator().manual_seed(sum(map(ord, folder.name)))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}
    reference = {}
    for case in cases:
        stored, plain = quantized(case, generator)
        reference[f"{case.module}.weight"] = plain.contiguous()
        tensors |= {f"{case.module}.{name}": value.detach() for name, value in stored.items()}
        tensors |= {f"{case.module}.{name}": value for name, value in case.extra.items()}
    names = list(tensors)
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{place + 1:05}-of-{shards:05}.safetensors" for place in range(shards)]
    weight_map = {name: files[place % shards] for place, name in enumerate(names)}
    for file in files:
        held = {name: tensors[name].contiguous() for name in names if weight_map[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    save_file(reference, folder / "reference.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(cases, key), indent=1))


def packed() -> list[Case]:
    """Integers of every width, in every grouping, from names and patterns."""
    cases = []
    for bits in range(1, 9):
        for symmetric in (True, False) if bits > 1 else (True,):
            strategy = "group" if (bits + symmetric) % 2 else "channel"
            more = {"group_size": 32} if strategy == "group" else {}
            name = f"model.layers.{bits}.mlp.{'even' if symmetric else 'uneven'}"
            target = rf"re:.*\.{bits}\.mlp\.{'even' if symmetric else 'uneven'}$"
            shape = (37, 64) if strategy == "group" else (37, 43)
            args = integers(bits, strategy, symmetric=symmetric, **more)
            cases.append(
                Case(
                    module=name,
                    shape=shape,
                    layout="pack-quantized",
                    weights=args,
                    target=target if bits % 2 else None,
                    dtype=list(DTYPES)[bits % 3],
                )
            )
    for strategy in ("tensor", "block"):
        for symmetric in (True, False):
            more = {"block_structure": [16, 32]} if strategy == "block" else {}
            cases.append(
                Case(
                    module=f"model.{strategy}.{'even' if symmetric else 'uneven'}",
                    shape=(33, 80),
                    layout="pack-quantized",
                    weights=integers(4, strategy, symmetric=symmetric, **more),
                )
            )
    return cases


def bytes_() -> list[Case]:
    """int8 and FP8 in every grouping, and MXFP8."""
    cases = []
    for kind, layout in (("int", "int-quantized"), ("float", "float-quantized")):
        for strategy, more in GROUPINGS.items():
            for symmetric in (True, False) if kind == "int" else (True,):
                args = (integers if kind == "int" else floats)(8, strategy, **more)
                shape = (40, 64) if strategy == "group" else (39, 43)
                cases.append(
                    Case(
                        module=f"model.{kind}.{strategy}_{'even' if symmetric else 'uneven'}",
                        shape=shape,
                        layout=layout,
                        weights={**args, "symmetric": symmetric},
                        dtype=list(DTYPES)[len(cases) % 3],
                    )
                )
    naive = integers(5, "channel", symmetric=True)
    cases.append(
        Case(module="model.naive", shape=(20, 48), layout="naive-quantized", weights=naive)
    )
    exponents = floats(8, "group", group_size=32, scale_dtype="torch.uint8")
    cases.append(
        Case(module="model.mx8", shape=(20, 96), layout="mxfp8-quantized", weights=exponents)
    )
    return cases


def small_floats() -> list[Case]:
    """NVFP4 with and without a global scale, MXFP4, MXFP6, and one group for a class."""
    nv = floats(4, "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")
    alone = floats(4, "group", group_size=16, scale_dtype="torch.float8_e4m3fn")
    mx4 = floats(4, "group", group_size=32, scale_dtype="torch.uint8")
    mx6 = floats(6, "group", group_size=32, scale_dtype="torch.uint8")
    return [
        Case(
            module="model.nv",
            shape=(40, 112),
            layout="nvfp4-pack-quantized",
            weights=nv,
            target="Linear",
        ),
        Case(module="model.alone", shape=(9, 48), layout="nvfp4-pack-quantized", weights=alone),
        Case(module="model.mx4", shape=(40, 96), layout="mxfp4-pack-quantized", weights=mx4),
        Case(module="model.mx6", shape=(40, 96), layout="mxfp6-pack-quantized", weights=mx6),
    ]


def experts() -> list[Case]:
    """Experts one by one and together, FP8 attention with what its inference needs."""
    words = integers(4, "group", group_size=32)
    rows = floats(8, "channel")
    one = torch.full((1,), 0.5, dtype=torch.bfloat16)
    scales = {"input_scale": one, "k_scale": one, "output_scale": one}
    block = "model.layers.0.block_sparse_moe.experts"
    singles = [
        Case(
            module=f"{block}.{expert}.{name}",
            shape=(48, 64),
            layout="pack-quantized",
            weights=words,
            target="re:.*experts.*",
        )
        for expert in range(2)
        for name in ("w1", "w2")
    ]
    attention = Case(
        module="model.layers.0.self_attn.k_proj",
        shape=(64, 64),
        layout="float-quantized",
        weights=rows,
        target="Linear",
        extra=scales,
    )
    return [attention, *singles, *fused(block)]


def fused(block: str) -> list[Case]:
    """Experts in one tensor, packed with zero points, in rows, in ragged blocks, in MXFP4."""
    uneven = integers(3, "group", group_size=32, symmetric=False)
    return [
        Case(
            module=f"{block}.{name}",
            shape=(3, 35, 64),
            layout=layout,
            weights=args,
            target=f"re:.*{name}",
        )
        for name, layout, args in (
            ("a_packed", "pack-quantized", uneven),
            ("a_rows", "float-quantized", floats(8, "channel")),
            ("a_blocks", "float-quantized", floats(8, "block", block_structure=[16, 32])),
            ("a_mx", "mxfp4-pack-quantized", floats(4, "group", group_size=32)),
        )
    ]


def old() -> list[Case]:
    """Codes that straddle no word, and columns reordered by activation."""
    cases = [
        Case(
            module=f"model.{bits}.{'even' if symmetric else 'uneven'}",
            shape=(37, 96),
            layout="pack-quantized",
            weights=integers(bits, "group", group_size=32, symmetric=symmetric),
        )
        for bits in (3, 4, 5, 6, 7)
        for symmetric in (True, False)
    ]
    reordered = integers(4, "group", group_size=32, symmetric=False, actorder="group")
    cases.append(
        Case(
            module="model.reordered",
            shape=(37, 96),
            layout="pack-quantized",
            weights=reordered,
            g_idx=True,
        )
    )
    return cases


def sweep() -> Iterator[Case]:
    """Yield a weight for every combination that the library can express."""
    integer_layouts = ["pack-quantized"] if IS_OLD else ["pack-quantized", "int-quantized"]
    schemes = [
        (layout, integers(bits, strategy, symmetric=symmetric, **more))
        for layout in integer_layouts
        for bits in range(1, 9)
        for symmetric in (True, False)
        for strategy, more in GROUPINGS.items()
    ]
    schemes += [("float-quantized", floats(8, name, **more)) for name, more in GROUPINGS.items()]
    mx = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    nv = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
    for layout, bits, more in (
        ("mxfp8-quantized", 8, mx),
        ("nvfp4-pack-quantized", 4, nv),
        ("mxfp4-pack-quantized", 4, mx),
        ("mxfp6-pack-quantized", 6, mx),
    ):
        schemes.append((layout, floats(bits, **more)))
    whole, ragged = (
        ((1, 96), (5, 32), (33, 128), (70, 224)),
        ((1, 7), (5, 33), (33, 100), (64, 688)),
    )
    for number, ((layout, args), dtype, place) in enumerate(product(schemes, DTYPES, range(4))):
        shape = (whole if "group" in args["strategy"] else ragged)[place]
        yield Case(module=f"m.{number}", shape=shape, layout=layout, weights=args, dtype=dtype)


def main() -> None:
    """Write the folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    if options.sweep:
        cases = []
        for case in sweep():
            try:
                quantized(case, torch.Generator().manual_seed(0))
            except Exception as error:  # noqa: BLE001 - whatever the library cannot do
                print(case.module, case.shape, case.layout, case.weights, repr(error)[:100])
                continue
            cases.append(case)
        print(
            f"{len(cases)} weights of {math.fsum(math.prod(c.shape) for c in cases):.0f} elements"
        )
        write(options.folder, cases)
    elif IS_OLD:
        write(options.folder / "ct_old", old(), key="compression_config")
    else:
        write(options.folder / "ct_packed", packed())
        write(options.folder / "ct_bytes", bytes_())
        write(options.folder / "ct_floats", small_floats())
        write(options.folder / "ct_experts", experts(), shards=3)


if __name__ == "__main__":
    main()
