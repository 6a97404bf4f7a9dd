"""The names a model's tensors have in the model, from those they have in a trainer's file.

Wrappers add parts anywhere (`module.`, `_orig_mod.`), containers add a first part (`model.` of a
Lightning module). Which first parts are the model's own is decided by a base model's names where
there are any, else by the config's architecture; where neither decides, the checkpoint is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ckptd.checkpoint.header import StoredTensor
from ckptd.checkpoint.pieces import Tensor
from ckptd.errors import CheckpointCorrupt, CheckpointUnsupported

_WRAPPERS = re.compile(
    r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_CONTAINERS = (
    "state_dict.", "module.", "model_state_dict.", "base_model.model.", "app.", "app_state.",
    "_fsdp.", "policy.", "actor.",
)  # fmt: skip
"""First parts that are never a model's own."""
_ADAPTER = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|modules_to_save)\.")
_PEFT = "base_model.model."
_MODEL = "model."
_HEADS = frozenset({"lm_head", "score", "classifier", "qa_outputs", "cls", "embed_out", "output"})
"""What stands beside the backbone in a model with a head."""
_BACKBONES = frozenset({
    "transformer", "bert", "roberta", "gpt_neox", "electra", "distilbert", "albert", "deberta",
    "vit", "backbone",
})  # fmt: skip
"""What the backbone is called where it is not `model`."""
_WITHOUT = frozenset({"t5", "mt5", "umt5", "longt5", "switch_transformers"})
"""Model types whose encoder and decoder stand at the top."""
_WITHIN = frozenset({
    "bart", "mbart", "marian", "pegasus", "m2m_100", "whisper", "blenderbot", "led", "opt",
    "plbart", "speech_to_text", "bigbird_pegasus",
})  # fmt: skip
"""Model types whose encoder and decoder stand in `model`."""
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|word_embeddings|wte|embed_in|shared|tokens_embed)\.")
_NATIVE_NOTE = (
    "the tensors have the trainer's own names (tok_embeddings, wq...), which transformers does not "
    "load: convert them, or save with the trainer's Hugging Face option"
)
_NATIVE = ("tok_embeddings.weight", "layers.0.attention.wq.weight")


def resolve(
    names: Collection[str], *, config: Mapping[str, Any], base: Collection[str], path: Path
) -> dict[str, str]:
    """Return the model's name of each of `names`; `base` are a base model's names, if known.

    Raises:
        CheckpointUnsupported: which first parts are the model's own is not clear.
        CheckpointCorrupt: two tensors would get one name.
    """
    plain = {name: unwrapped(name) for name in names}
    steps = list(prefixes(plain.values()))
    if base:
        prefix = _of_base(plain.values(), steps, base, path)
    else:
        prefix = _of_config(plain.values(), steps, config, path)
    found = {name: value.removeprefix(prefix) for name, value in plain.items()}
    if len(set(found.values())) != len(found):
        raise CheckpointCorrupt("two tensors have one name without their wrappers", path=path)
    return found


def notes(names: Iterable[str]) -> tuple[str, ...]:
    """Return what a reader of the published model should know of its tensors' names."""
    held = set(names)
    if any(name in held for name in _NATIVE):
        return (_NATIVE_NOTE,)
    return ()


def without_aliases(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the tensors without second names of the input embedding, and notes on those.

    A trainer's file has tied weights under every name, with the same bytes. They are left out
    where the config says that they are tied, as `save_pretrained` does; else both names are kept.
    """
    text = config.get("text_config")
    said = [part.get("tie_word_embeddings") for part in (config, text) if isinstance(part, Mapping)]
    if True not in said:
        return dict(tensors), ()
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        place = tensor.extent if isinstance(tensor, StoredTensor) else tensor.boxes
        if tensor.spec.numel:
            groups.setdefault((place, tensor.spec.dtype, tensor.spec.shape), []).append(name)
    gone: dict[str, str] = {}
    for names in groups.values():
        kept = next((name for name in names if _EMBEDDING.search(name)), None)
        if kept is not None:
            gone |= {name: kept for name in names if name != kept}
    found = {name: tensor for name, tensor in tensors.items() if name not in gone}
    return found, tuple(f"{name} is {kept} under another name" for name, kept in gone.items())


def unwrapped(name: str) -> str:
    """Return a name without the parts that wrappers of a module have put into it."""
    return _WRAPPERS.sub("", name)


def are_wrapped(names: Collection[str]) -> bool:
    """Return whether wrappers have left their marks on names that are a model's own otherwise."""
    if any(_WRAPPERS.search(name) for name in names):
        return True
    return any(all(name.startswith(one) for name in names) for one in _CONTAINERS if names)


def require_no_adapter(names: Iterable[str], path: Path) -> None:
    """Refuse PEFT's own state dict of a model with an adapter, or that of an adapter alone.

    A few models have such layers of their own; PEFT's names begin with its own module's.

    Raises:
        CheckpointUnsupported: names the tensor, and how to save the adapter or the merged model.
    """
    held = list(names)
    marked = [name for name in held if _ADAPTER.search(name)]
    found = next((name for name in marked if _PEFT in name or len(marked) == len(held)), None)
    if found is not None:
        raise CheckpointUnsupported(
            "an adapter's tensors in a state dict, without adapter_config.json",
            path=path,
            tensor=found,
            hint="save the adapter with PEFT's save_pretrained, or merge_and_unload before saving",
        )


def prefixes(names: Iterable[str]) -> Iterable[str]:
    """Yield the prefixes that all names share and that may be a container's, shortest first."""
    held = list(names)
    prefix = ""
    yield prefix
    while held:
        more = next(
            (
                one
                for one in (*_CONTAINERS, _MODEL)
                if all(name.startswith(prefix + one) for name in held)
            ),
            None,
        )
        if more is None:
            return
        prefix += more
        yield prefix


def _of_base(names: Iterable[str], steps: list[str], base: Collection[str], path: Path) -> str:
    held = list(names)
    known = set(base)
    agreeing = {
        prefix: sum(name.removeprefix(prefix) in known for name in held) for prefix in steps
    }
    best = max(agreeing.values())
    chosen = [prefix for prefix, count in agreeing.items() if count == best]
    if best * 2 <= len(held) or len(chosen) != 1:
        raise CheckpointUnsupported(
            "its names do not agree with the base model's",
            path=path,
            expected=f"names such as {min(known)}",
            found=f"{min(held)}" if held else "none",
            hint="check `assets:` (--assets): it must be the model that was trained",
        )
    return chosen[0]


def _of_config(
    names: Iterable[str], steps: list[str], config: Mapping[str, Any], path: Path
) -> str:
    """Return the prefix to take off, as the architecture and the names under it say."""
    held = list(names)
    sure = max((i for i, step in enumerate(steps) if step.endswith(_CONTAINERS)), default=0)
    if sure == len(steps) - 1:
        if any(name.startswith((f"{steps[sure]}model.model.", f"{steps[sure]}model.lm_head."))
               for name in held):  # fmt: skip
            raise _unclear(path, "other tensors stand beside a model under 'model.'")
        return steps[sure]
    deepest = steps[-1]
    tops = {name.removeprefix(deepest).split(".")[0] for name in held}
    within = _is_within(tops, [name.removeprefix(deepest) for name in held], config)
    if within is None:
        raise _unclear(path, f"is {deepest!r} the model's own, or the trainer's?")
    return steps[-2] if within else deepest


def _is_within(tops: set[str], names: list[str], config: Mapping[str, Any]) -> bool | None:
    """Return whether `names` are those within a model's own `model.`; None: it cannot be told."""
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    if "model" in tops or tops & _HEADS or tops <= _BACKBONES:
        return False
    if not isinstance(named, str):
        return None
    model_type = config.get("model_type")
    if (named.endswith("Model") and "LMHead" not in named) or model_type in _WITHOUT:
        return False
    if tops >= {"embed_tokens", "layers"} or model_type in _WITHIN:
        return True
    if "language_model" in tops:
        older = ("language_model.model.", "language_model.lm_head.")
        return not any(name.startswith(older) for name in names)
    return None


def _unclear(path: Path, what: str) -> CheckpointUnsupported:
    return CheckpointUnsupported(
        f"which names its tensors have in the model is not clear: {what}",
        path=path,
        hint="name a folder with config.json and the base model's index (or its weights) with "
        "`assets:` in the definition (--assets on the command line)",
    )
