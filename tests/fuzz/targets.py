"""What is fuzzed: for each reader real inputs to begin with, and one run on the bytes of an input.

A run either ends well or raises a `CkptdError`, whose text names the path and can be written down;
`check` holds it to that. Inputs are made here with the libraries that write such files.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import torch.distributed.checkpoint as torch_dcp

from ckptd import settings
from ckptd.checkpoint import completeness, header, index, inert, parts, torch_file, whole
from ckptd.checkpoint.checkpoint import identifying_files, open_checkpoint
from ckptd.checkpoint.inert import TensorRef
from ckptd.checkpoint.listing import ListedFile, Listing, list_files
from ckptd.checkpoint.signs import file_set, last_file, unfinished
from ckptd.errors import CkptdError
from ckptd.hub import card
from ckptd.pipeline import definition
from tests.checkpoint import gguf_file

CANARY = "ckptd-fuzz-canary"
"""The folder that a pickle of the inputs makes, were it ever executed."""
MAX_TEXT = 20_000
"""Characters of an error: it goes to a log line and a row of the database."""
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 4}


class Violation(AssertionError):
    """An input was neither read nor refused in the way that is promised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A reader: inputs to begin with, and a run on one input in an empty folder."""

    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes, Path], None]
    is_json: bool = False
    names_path: bool = True
    tells_all: bool = False
    """Every problem is told at once: the text may be longer than that of one."""


def check(target: Target, data: bytes, folder: Path) -> None:
    """Run `target` on `data`; the files that it needs are written into `folder`.

    Raises:
        Violation: an error that is no CkptdError, does not name the path, or cannot be written.
    """
    try:
        target.run(data, folder)
    except CkptdError as error:
        text = str(error)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as cause:
            raise Violation(f"its text cannot be written: {text!r}") from cause
        if target.names_path and str(folder) not in text:
            raise Violation(f"it does not name the path: {text!r}") from error
        if len(text) > MAX_TEXT + 30 * len(data) * target.tells_all:
            raise Violation(f"its text is too long: {len(text)}") from error
    except Exception as error:
        raise Violation(f"{type(error).__name__}: {error}"[:300]) from error
    if Path(tempfile.gettempdir(), CANARY).exists():
        raise Violation("a pickle was executed")


class Executed:
    """What makes the canary when it is unpickled."""

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (str(Path(tempfile.gettempdir(), CANARY)),)


def state_dict() -> dict[str, torch.Tensor]:
    """Return a small model's tensors."""
    return OrderedDict(
        {
            "model.embed_tokens.weight": torch.arange(8.0).reshape(4, 2),
            "model.norm.weight": torch.ones(2, dtype=torch.bfloat16),
            "lm_head.weight": torch.arange(8.0).reshape(2, 4).t(),
        }
    )


def torch_bytes(value: Any, **options: Any) -> bytes:
    """Return `value` as torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def safetensors_bytes() -> bytes:
    """Return a small safetensors file."""
    arrays = {
        "a": np.ones((2, 3), np.float32),
        "b": np.zeros(0, np.int8),
        "c": np.ones(4, np.float16),
    }
    return safetensors.numpy.save(arrays, {"format": "pt"})


def dcp_files() -> Mapping[str, bytes]:
    """Return the files of a distributed checkpoint by name."""
    with tempfile.TemporaryDirectory() as name:
        torch_dcp.save({"model": dict(state_dict())}, checkpoint_id=name, no_dist=True)
        return {file.name: file.read_bytes() for file in Path(name).iterdir()}


def _read_header(data: bytes, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    found = header.read(path)
    for tensor in found.tensors:
        assert tensor.extent.offset + tensor.extent.nbytes <= len(data)
    header.encode([tensor.spec for tensor in found.tensors], metadata=found.metadata)


def _read_index(data: bytes, folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_bytes(data)
    for shard in index.read_weight_map(path).values():
        assert (folder / shard).parent == folder


def _read_pickle(data: bytes, folder: Path) -> None:
    inert.loads(data, path=folder / "data.pkl")


def _read_torch(data: bytes, folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    path.write_bytes(data)
    file = torch_file.read(path)
    for extent in file.storages.values():
        assert 0 <= extent.offset <= extent.offset + extent.nbytes <= len(data)
    values = file.value.values() if isinstance(file.value, dict) else ()
    for tensor in values:
        if isinstance(tensor, TensorRef):
            extent = file.extent(tensor)
            assert 0 <= extent.offset <= extent.offset + extent.nbytes <= len(data)


def open_folder(folder: Path) -> None:
    """Judge the folder and open it, as the watcher and a job do."""
    facts = completeness.examine(folder, list_files(folder))
    completeness.verdict(facts, quiet_s=100, settle_s=1)
    source = open_checkpoint(folder)
    assert all(
        path.resolve().is_relative_to(folder.resolve()) for _, path in identifying_files(source)
    )
    for name in source.tensors:
        name.encode("utf-8")


def _in_folder(
    relpath: str, others: Callable[[], Mapping[str, bytes]]
) -> Callable[[bytes, Path], None]:
    kept = cache(others)

    def run(data: bytes, folder: Path) -> None:
        for name, content in {**kept(), relpath: data}.items():
            place = folder / name
            if place.is_file() and place.read_bytes() == content:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        open_folder(folder)

    return run


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _whole() -> Mapping[str, bytes]:
    return {"config.json": _json(CONFIG), "model.safetensors": safetensors_bytes()}


_ADAPTER = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none",
    "base_model_name_or_path": "owner/base", "task_type": "CAUSAL_LM", "rank_pattern": {},
}  # fmt: skip


def _adapter() -> Mapping[str, bytes]:
    arrays = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones(
            (4, 8), np.float32
        ),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": np.ones(
            (8, 4), np.float32
        ),
    }
    return {"adapter_model.safetensors": safetensors.numpy.save(arrays)}


def _distributed() -> Mapping[str, bytes]:
    return {**dcp_files(), "config.json": _json(CONFIG)}


def _pickles() -> list[bytes]:
    value = {
        "a": [1, 2.5, None, True, b"x", "y", (1, 2, 3), {"k": {1, 2}}],
        "o": OrderedDict(a=1), "big": 1 << 300, "frozen": frozenset({1}), "shape": torch.Size([2]),
    }  # fmt: skip
    made = [pickle.dumps(value, protocol) for protocol in range(6)]
    return [*made, pickle.dumps(Executed(), 2), pickle.dumps([Executed()], 4), _torch_pickle()]


def _torch_pickle() -> bytes:
    import zipfile

    with zipfile.ZipFile(io.BytesIO(torch_bytes(state_dict()))) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))


def _torch_files() -> list[bytes]:
    values = (state_dict(), {"step": 3, "state_dict": state_dict(), "x": Executed()})
    return [torch_bytes(value) for value in values]


def _ggufs() -> list[bytes]:
    entry = gguf_file.Entry("token_embd.weight", (4, 32), 0, bytes(512))
    more = gguf_file.LLAMA | {"tokenizer.ggml.tokens": ["a", "b"], "x.long": list(range(5000))}
    scaling = gguf_file.LLAMA | {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0,
                                 "llama.rope.freq_base": 1e4, "llama.vocab_size": 4}  # fmt: skip
    return [gguf_file.encode(metadata, [entry]) for metadata in (gguf_file.LLAMA, more, scaling)]


_DEFINITION = """\
# a comment
pipeline: publish
watch:
  - path: /runs/*/checkpoint-*
    layout: auto
    settle: 10s
    done_file: "DONE"
device: cpu
assets: /base
stages:
  - tie
  - cast: {dtype: bfloat16}
  - reshard: {max_shard_size: 5GB}
push:
  repo_id: "owner/{run}"
  tags: [a, 'b c']
  commit_message: |
    step {step}
"""
_SETTINGS = "state_dir: /state\nretry_base: 1s\nretry_cap: 5m\nupload_limit: 50MB/s\nhub_endpoint: http://h\n"
_CARDS = (
    "---\nlicense: mit\ntags:\n- a\n- 'b'\nlibrary_name:\n---\n# Title\n",
    "---\ntags: [a, b]\nmodel-index:\n- name: x\n  results:\n  - metrics: [{type: acc, value: .nan}]\n---\n",
    "---\ntags: a\nbase_model: &m [x/y]\ndate: 2024-01-02\nother: *m\n---\n<!-- ckptd: end -->",
)


def alias_bomb(levels: int = 9) -> bytes:
    """Return a card of a few lines whose aliases, written out, are 9 ** levels values."""
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(["---", "a0: &a0 [x, x, x]", *lines, "---", ""]).encode()


def _read_definition(data: bytes, folder: Path) -> None:
    path = folder / "publish.yaml"
    path.write_bytes(data)
    found = definition.load_definition(path)
    assert definition.Definition.model_validate(json.loads(json.dumps(found.dump()))) == found


def _read_settings(data: bytes, folder: Path) -> None:
    path = folder / "ckptd.yaml"
    path.write_bytes(data)
    settings.load(path)


def _merge_card(data: bytes, folder: Path) -> None:
    text = data.decode("utf-8", "replace")
    merged = card.merge(text, tags=["ckptd", "b"], name="m")
    assert card.merge(merged, tags=["ckptd", "b"], name="m") == merged
    card.with_section(merged, "section").encode("utf-8")


def _legacy_files() -> list[bytes]:
    """Return files as torch wrote them before 1.6."""
    values = (state_dict(), {"step": 3, "state_dict": state_dict()})
    return [torch_bytes(value, _use_new_zipfile_serialization=False) for value in values]


_PIPELINE = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0",
    "unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": [None, None],
}  # fmt: skip


def _components() -> Mapping[str, bytes]:
    return {
        "model_index.json": _json(_PIPELINE),
        "unet/config.json": _json({"_class_name": "UNet2DConditionModel"}),
        "unet/diffusion_pytorch_model.safetensors": safetensors_bytes(),
    }


def _flat_files() -> list[bytes]:
    arrays = {"lora_unet_a.alpha": np.ones((), np.float32)}
    return [safetensors.numpy.save(arrays, {"ss_steps": "30", "modelspec.title": "x"})]


def _inner() -> Mapping[str, bytes]:
    name = "model-00001-of-00001.safetensors"
    weight_map = dict.fromkeys(("a", "b", "c"), name)
    listed = {"metadata": {"total_size": 32}, "weight_map": weight_map}
    return {
        "model/consolidated/config.json": _json(CONFIG),
        f"model/consolidated/{name}": safetensors_bytes(),
        "model/consolidated/model.safetensors.index.json": _json(listed),
    }


_PIECES = (
    b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02" * 3 + b"\x12\x06\x0a\x01x\x10\x80\x7f"
)
"""Three pieces of a sentencepiece model and the beginning of its trainer's settings."""
_TEMPLATE = (
    "{%- for m in messages %}{{ '<|' + m['role'] + \"|>\" }}{# c #}{% if a %}{{ x[{'a': 1}] }}"
    "{% endif %}{% endfor %}"
)
_TOKENIZER = {
    "tokenizer_class": "LlamaTokenizer", "model_max_length": 10**30, "chat_template": _TEMPLATE,
    "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}},
}  # fmt: skip


def _side_files() -> Mapping[str, bytes]:
    return {
        **_whole(), "tokenizer_config.json": _json(_TOKENIZER), "tokenizer.model": _PIECES,
        "chat_template.jinja": _TEMPLATE.encode(), "optimizer.pt": torch_bytes({"step": 3}),
    }  # fmt: skip


def _read_note(data: bytes, folder: Path) -> None:
    """Take what a pin has noted, as the daemon does when the source is gone."""
    listing = list_files(folder)
    whole.note(folder, listing, settled=True, certain=True)
    (folder / whole.NOTE_NAME).write_bytes(data)
    found = whole.noted(folder)
    whole.since_noted(folder, listing)
    if found is not None:
        whole.changed(found.listing, listing)
        found.listing.fingerprint_id.encode()
        assert all((folder / name).is_relative_to(folder) for name in found.listing.by_name)


def _notes() -> list[bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for relpath in ("model.safetensors", "global_step3/x.pt"):
            (folder / relpath).parent.mkdir(exist_ok=True)
            (folder / relpath).write_bytes(b"x")
        whole.note(folder, list_files(folder), settled=True, certain=False)
        return [(folder / whole.NOTE_NAME).read_bytes()]


def _read_tracker(data: bytes, folder: Path) -> None:
    (folder / "latest").write_bytes(data)
    found = last_file.beside(folder, "deepspeed")
    assert found is not None
    assert found.number is None or found.number >= 0
    last_file.text(folder / "latest").encode()


def _look_at_names(data: bytes, folder: Path) -> None:
    """Judge a checkpoint with these names in it, and the one before with some of them."""
    found = dict.fromkeys(os.fsdecode(line) for line in data.split(b"\n")[:200])
    texts = [text for text in found if _may_be_a_path(text)]
    files = tuple(
        ListedFile(relpath=text, dev=1, ino=at, size=at, mtime_ns=at)
        for at, text in enumerate(sorted(texts))
    )
    listing = Listing(path=folder, base_path=folder, files=files)
    unfinished.signs(folder, files)
    sets = [
        file_set.of(name, "hf", some, weights=(), elements=len(some))
        for name, some in (("checkpoint-2", files), ("checkpoint-3", files[::2]))
    ]
    file_set.lacks(*sets, state=True)
    file_set.lacks(*reversed(sets), state=False)
    parts.recognise_pipeline(listing)
    parts.recognise_file(listing)
    for text in texts:
        parts.refusal(Path(text))
        parts.step({}, text)
    for layout in (parts.DIFFUSERS, parts.FLAT):
        with contextlib.suppress(FileNotFoundError):  # an index by name, which is not there to read
            parts.find(layout, folder, listing)


def _may_be_a_path(text: str) -> bool:
    """Whether a listing can have this path: no empty names in it, and none that leads elsewhere."""
    return "\0" not in text and not {"", ".", ".."}.intersection(text.split("/"))


_NAMES = (
    b"model-00001-of-00002.safetensors\nmodel.safetensors.index.json\nconfig.json\noptimizer.pt",
    b"unet/diffusion_pytorch_model.fp16.safetensors\nvae/diffusion_pytorch_model.bin\n.incomplete",
    b"lora-step00000030.safetensors",
    b"epoch=3-step=40/x.ckpt\n.model.safetensors.aB3dE5\nglobal_step3/mp_rank_00_model_states.pt",
)

TARGETS: dict[str, Target] = {
    "safetensors": Target(seeds=lambda: [safetensors_bytes()], run=_read_header),
    "index": Target(
        seeds=lambda: [
            _json(
                {
                    "metadata": {"total_size": 8},
                    "weight_map": {"a": "model-00001-of-00001.safetensors"},
                }
            )
        ],
        run=_read_index,
        is_json=True,
    ),
    "config": Target(
        seeds=lambda: [_json(CONFIG)], run=_in_folder("config.json", _whole), is_json=True
    ),
    "trainer_state": Target(
        seeds=lambda: [_json({"global_step": 3, "epoch": 0.5, "log_history": [{"loss": 1.5}]})],
        run=_in_folder("trainer_state.json", _whole),
        is_json=True,
    ),
    "adapter_config": Target(
        seeds=lambda: [_json(_ADAPTER)],
        run=_in_folder("adapter_config.json", _adapter),
        is_json=True,
    ),
    "pickle": Target(seeds=_pickles, run=_read_pickle),
    "torch": Target(seeds=_torch_files, run=_read_torch),
    "torch_folder": Target(
        seeds=_torch_files,
        run=_in_folder("pytorch_model.bin", lambda: {"config.json": _json(CONFIG)}),
    ),
    "legacy": Target(seeds=_legacy_files, run=_read_torch),
    "model_index": Target(
        seeds=lambda: [_components()["model_index.json"]],
        run=_in_folder("model_index.json", _components),
        is_json=True,
    ),
    "component": Target(
        seeds=lambda: [safetensors_bytes()],
        run=_in_folder("unet/diffusion_pytorch_model.safetensors", _components),
    ),
    "flat": Target(seeds=_flat_files, run=_in_folder("lora-step00000030.safetensors", dict)),
    "inner_index": Target(
        seeds=lambda: [_inner()["model/consolidated/model.safetensors.index.json"]],
        run=_in_folder("model/consolidated/model.safetensors.index.json", _inner),
        is_json=True,
    ),
    "inner_shard": Target(
        seeds=lambda: [safetensors_bytes()],
        run=_in_folder("model/consolidated/model-00001-of-00001.safetensors", _inner),
    ),
    "tokenizer_config": Target(
        seeds=lambda: [_json(_TOKENIZER)],
        run=_in_folder("tokenizer_config.json", _side_files),
        is_json=True,
    ),
    "sentencepiece": Target(
        seeds=lambda: [_PIECES], run=_in_folder("tokenizer.model", _side_files)
    ),
    "chat_template": Target(
        seeds=lambda: [_TEMPLATE.encode()], run=_in_folder("chat_template.jinja", _side_files)
    ),
    "optimizer": Target(
        seeds=lambda: [torch_bytes({"step": 3})], run=_in_folder("optimizer.pt", _side_files)
    ),
    "whole_note": Target(seeds=_notes, run=_read_note, is_json=True, names_path=False),
    "tracker": Target(
        seeds=lambda: [b"global_step30\n", b"40"], run=_read_tracker, names_path=False
    ),
    "names": Target(seeds=lambda: list(_NAMES), run=_look_at_names),
    "dcp": Target(
        seeds=lambda: [dcp_files()[".metadata"]], run=_in_folder(".metadata", _distributed)
    ),
    "dcp_shard": Target(
        seeds=lambda: [dcp_files()["__0_0.distcp"]], run=_in_folder("__0_0.distcp", _distributed)
    ),
    "gguf": Target(seeds=_ggufs, run=_in_folder("model.gguf", dict)),
    "definition": Target(
        seeds=lambda: [_DEFINITION.encode()], run=_read_definition, tells_all=True
    ),
    "settings": Target(seeds=lambda: [_SETTINGS.encode()], run=_read_settings, tells_all=True),
    "card": Target(
        seeds=lambda: [text.encode() for text in _CARDS], run=_merge_card, names_path=False
    ),
}
"""Every reader of what others wrote, by the name that `--only` takes."""
