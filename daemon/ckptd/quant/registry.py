"""Every format by name, and which of them a checkpoint is.

The quantization config's `quant_method` decides; where there is none, the tensors do, in the order
of the registry. A method that nobody here decodes is refused before a byte is read.
"""

from __future__ import annotations

from ckptd.quant import unsupported
from ckptd.quant.formats import (
    autoround,
    awq,
    bitnet,
    bitsandbytes,
    compressed_tensors,
    fbgemm,
    fp8,
    gemma,
    gguf,
    gptq,
    hqq,
    mlx,
    modelopt,
    mxfp4,
    quanto,
    quark,
    torchao,
)
from ckptd.quant.group import Format, Stored

FORMATS: tuple[Format, ...] = (
    gguf.FORMAT,
    torchao.FORMAT,
    bitsandbytes.FORMAT,
    mxfp4.FORMAT,
    modelopt.FORMAT,
    compressed_tensors.FORMAT,
    fp8.FORMAT,
    fbgemm.FORMAT,
    quark.FORMAT,
    mlx.FORMAT,
    autoround.FORMAT,
    gptq.FORMAT,
    awq.FORMAT,
    hqq.FORMAT,
    quanto.FORMAT,
    bitnet.FORMAT,
    gemma.FORMAT,
)
"""In the order in which they are asked where config.json names no method."""


def choose(stored: Stored) -> Format | None:
    """Return the format of a checkpoint, or None where nothing says that it is quantized.

    Raises:
        CheckpointUnsupported: a quant_method, or tensors of a method, that is not decoded; names
            them and lists the methods that are.
    """
    method = stored.quantization.get("quant_method")
    supported = {name for one in FORMATS for name in one.methods}
    if method is None:
        unsupported.refuse_signs(stored, supported)
        return next((one for one in FORMATS if one.recognise(stored) is not None), None)
    for candidate in FORMATS:
        if method in candidate.methods:
            return candidate
    raise unsupported.refusal(stored, method, supported)
