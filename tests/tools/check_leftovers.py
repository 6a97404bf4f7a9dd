"""Ask `quant.leftovers` about every architecture of the installed transformers.

A developer script, run by hand after transformers moved (some four minutes):

    python tests/tools/check_leftovers.py

Every model class is built on the meta device from a shrunk default configuration; a tensor of a
plain model that would be refused is a name to take out of the tables there. With transformers
5.24.0: 1872 classes, none refused.
"""

from __future__ import annotations

import sys
from pathlib import Path

import generate_architectures as architectures
import torch
from transformers import PreTrainedModel

from ckptd.checkpoint import dtypes
from ckptd.errors import CheckpointUnsupported
from ckptd.quant import leftovers


def main() -> int:
    """Print what is refused; return how many classes that are."""
    built = refused = 0
    for name, cls in architectures.model_classes().items():
        model = _built(cls)
        if model is None:
            continue
        built += 1
        tensors = {
            key: (dtypes.from_torch_name(str(value.dtype)), tuple(value.shape))
            for key, value in model.state_dict().items()
            if isinstance(value, torch.Tensor)
        }
        try:
            leftovers.check(tensors, path=Path(name))
        except CheckpointUnsupported as error:
            refused += 1
            print(error)
    print(f"{built} classes, {refused} refused")
    return refused


def _built(cls: type[PreTrainedModel]) -> PreTrainedModel | None:
    """Return the model, shrunk if it can be; None for a class that needs other packages."""
    for shrink in (architectures.shrink, lambda file: file):
        try:
            file = architectures.as_file(architectures.default_config(cls))
            return architectures.build(cls, architectures.filled(shrink(file)))
        except Exception:  # noqa: BLE001 - whatever a class does wrong, the next one is tried
            continue
    return None


if __name__ == "__main__":
    sys.exit(min(1, main()))
