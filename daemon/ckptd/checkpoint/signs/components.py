"""Are all components of a diffusers pipeline there, each with its configuration and its weights?

`model_index.json` names the components; a model among them has a config.json and weights. A
training checkpoint has the components alone, without the list.
"""

from __future__ import annotations

from pathlib import Path

from ckptd.checkpoint import index
from ckptd.checkpoint.listing import Listing
from ckptd.errors import CheckpointIncomplete

_LIST_NAME = "model_index.json"
_CONFIG_NAME = "config.json"
_STEMS = ("diffusion_pytorch_model", "model.", "model-")
"""What the weights of a component are called, by diffusers and by transformers."""
_WEIGHTS = (".safetensors", ".bin")


def require(path: Path, listing: Listing) -> None:
    """Check the components in the folder at `path`.

    Raises:
        CheckpointIncomplete: one that is listed is not there, or lacks configuration or weights.
        CheckpointCorrupt: the list is not JSON.
    """
    inside: dict[str, set[str]] = {}
    for name in listing.by_name:
        folder, slash, file = name.partition("/")
        if slash:
            inside.setdefault(folder, set()).add(file)
    if _LIST_NAME in listing.by_name:
        for name in _listed(path / _LIST_NAME):
            if name not in inside:
                raise _incomplete(path / name, "the component is not there", _LIST_NAME)
    for folder, files in sorted(inside.items()):
        is_model = any(file.startswith(_STEMS) for file in files)
        if is_model and _CONFIG_NAME not in files:
            raise _incomplete(path / folder, f"{_CONFIG_NAME} is missing", "its weights")
        if _CONFIG_NAME in files and not any(file.endswith(_WEIGHTS) for file in files):
            raise _incomplete(path / folder, "no weights", f"its {_CONFIG_NAME}")


def _listed(path: Path) -> list[str]:
    """Return the components that are not left out (`[null, null]`)."""
    return [
        name
        for name, said in index.read_json(path).items()
        if not name.startswith("_") and isinstance(said, list) and said and said[0] is not None
    ]


def _incomplete(path: Path, what: str, known_by: str) -> CheckpointIncomplete:
    return CheckpointIncomplete(
        what, path=path, found=f"{known_by} says that it belongs to the pipeline",
        hint="wait for the save to end, or save again",
    )  # fmt: skip
