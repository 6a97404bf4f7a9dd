# ruff: noqa: BLE001 (a class that cannot be built is counted and left out)
"""Write `daemon/ckptd/pipeline/adapter/renamings.json` from the installed transformers.

A developer script, run by hand after transformers moved:

    python tests/tools/generate_renamings.py [--jobs 2]

For each model class that gives tensors other names in memory than they have in files: the renamings
that `from_pretrained` does, in order, and which tensors it divides or puts together. Each class is
built on the meta device from a shrunk default configuration, because parts bring renamings of
their own. What only other operations do is left out: such tensors find no place, and are refused.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import generate_architectures as architectures
import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming

TARGET = Path(__file__).parents[2] / "daemon" / "ckptd" / "pipeline" / "adapter" / "renamings.json"
FORMAT = 1
_OPERATIONS = {
    ("MergeModulelist:0",): "experts",
    ("MergeModulelist:0", "Concatenate:1"): "experts",
    ("Concatenate:0",): "concatenate",
    ("Chunk:0",): "chunk",
}
_CLASSES: dict[str, Any] = {}


def rule(transform: Any) -> list[Any] | None:
    """Return [kind, scope, base prefix, pattern, targets]; None for what is not described."""
    scope = [transform.scope_prefix, transform.base_model_prefix]
    rest = [transform.compiled_sources.pattern, list(transform.target_patterns)]
    if type(transform) in (WeightRenaming, PrefixChange):
        return ["rename", *scope, *rest]
    if not isinstance(transform, WeightConverter):
        return None
    done = tuple(f"{type(op).__name__}:{getattr(op, 'dim', '')}" for op in transform.operations)
    kind = _OPERATIONS.get(done)
    return None if kind is None else [kind, *scope, *rest]


def work(name: str) -> tuple[str, list[Any] | None]:
    """Return the rules of one class; None where it cannot be built."""
    cls = _CLASSES[name]
    for attempt in (_shrunk, _default, _filled, _filled_default):
        try:
            file = attempt(architectures.as_file(architectures.default_config(cls)))
            model = architectures.build(cls, file)
            found = get_model_conversion_mapping(model, add_legacy=False)
        except Exception:
            continue
        return name, [made for one in found if (made := rule(one)) is not None]
    return name, None


def _shrunk(file: dict[str, Any]) -> dict[str, Any]:
    return architectures.shrink(file)


def _default(file: dict[str, Any]) -> dict[str, Any]:
    return file


def _filled(file: dict[str, Any]) -> dict[str, Any]:
    return architectures.filled(architectures.shrink(file))


def _filled_default(file: dict[str, Any]) -> dict[str, Any]:
    return architectures.filled(file)


def main() -> None:
    """Generate, write and summarise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    _CLASSES.update(architectures.model_classes())
    rules: dict[str, int] = {}
    classes: dict[str, list[int]] = {}
    unbuilt = []
    with multiprocessing.get_context("fork").Pool(options.jobs, maxtasksperchild=100) as pool:
        for done, (name, found) in enumerate(pool.imap(work, sorted(_CLASSES), chunksize=4), 1):
            if found is None:
                unbuilt.append(name)
            elif found:
                numbers = [rules.setdefault(json.dumps(one), len(rules)) for one in found]
                classes[name] = numbers
            if done % 200 == 0:
                print(f"{done}/{len(_CLASSES)}", file=sys.stderr, flush=True)
    lines = ["{", f'"format":{FORMAT},', f'"transformers":"{transformers.__version__}",']
    lines += ['"rules":[', ",\n".join(rules), "],", '"classes":{']
    lines.append(",\n".join(f'"{name}":{json.dumps(found)}' for name, found in classes.items()))
    TARGET.write_text("\n".join([*lines, "}\n}\n"]), encoding="utf-8")
    print(f"{len(classes)} classes, {len(rules)} rules; not built: {', '.join(unbuilt)}")


if __name__ == "__main__":
    main()
