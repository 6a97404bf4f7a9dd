"""Layouts that are recognised and not read: the reason, and the tool that converts them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ckptd.checkpoint.consolidate.gathered import Gathered
from ckptd.checkpoint.listing import Listing
from ckptd.errors import CheckpointUnsupported


@dataclass(frozen=True, slots=True)
class Refused:
    """A layout told by files that match all of `signs`; why it is refused and what helps."""

    name: str
    signs: tuple[re.Pattern[str], ...]
    what: str
    hint: str

    def recognise(self, folder_name: str, listing: Listing) -> str | None:
        """Return the file that gives it away, if every sign has one."""
        found = [
            next((name for name in listing.by_name if sign.search(name)), None)
            for sign in self.signs
        ]
        return None if None in found else f"{found[0]} is there"

    def marker_name(self, folder_name: str, listing: Listing) -> str | None:
        """Return None: nothing is waited for."""
        return None

    def holds(self, relpath: str) -> bool:
        """Return False: nothing of it is pinned for its weights."""
        return False

    def gather(self, path: Path, listing: Listing) -> Gathered:
        """Refuse."""
        raise CheckpointUnsupported(self.what, path=path, hint=self.hint)


MEGATRON = Refused(
    "megatron",
    (
        re.compile(r"(^|/)common\.pt$"),
        re.compile(r"(^|/)(__\d+_\d+\.distcp|metadata\.json)$"),
    ),
    "a Megatron-Core distributed checkpoint: its tensors have Megatron's names and fused layouts",
    "convert it with Megatron-Bridge (AutoBridge.export_ckpt) and point ckptd at the result",
)
MEGATRON_LEGACY = Refused(
    "megatron-legacy",
    (re.compile(r"(^|/)mp_rank_\d\d(_\d{3})*/model_optim_rng\.pt$"),),
    "a Megatron-LM checkpoint of one file a rank",
    "convert it with Megatron-LM's tools/checkpoint/convert.py or Megatron-Bridge",
)
ORBAX = Refused(
    "orbax",
    (re.compile(r"(^|/)(_CHECKPOINT_METADATA|_METADATA|manifest\.ocdbt)$"),),
    "an orbax checkpoint: its arrays are in OCDBT/Zarr stores",
    "convert it with the trainer's own tool (MaxText: MaxText.utils.ckpt_conversion.to_huggingface)",
)
ZERO_UNIVERSAL = Refused(
    "deepspeed-universal",
    (re.compile(r"(^|/)zero/[^/]+/fp32\.pt$"),),
    "a DeepSpeed universal checkpoint",
    "point ckptd at the checkpoint it was made from",
)
SEVERAL_MODELS = Refused(
    "accelerate-models",
    (
        re.compile(r"^(pytorch_)?model_1\.(safetensors|bin)$"),
        re.compile(r"^(pytorch_)?model\.(safetensors|bin)$"),
    ),
    "a state of accelerate with several models",
    "name the file of one of them, with the folder of its config: FOLDER/model_1.safetensors "
    "--assets MODEL",
)
MLX = Refused(
    "mlx-adapter",
    (re.compile(r"^adapters\.safetensors$"), re.compile(r"^adapter_config\.json$")),
    "an adapter of MLX: its matrices lie across those of PEFT",
    "fuse it with `mlx_lm.fuse` and point ckptd at the result",
)
NEMO = Refused(
    "nemo",
    (re.compile(r"^[^/]*\.nemo$"),),
    "an archive of NeMo: its tensors have Megatron's names and fused layouts",
    "convert it with NeMo's scripts (checkpoint_converters) or Megatron-Bridge, and point ckptd at the "
    "result",
)
SENTENCE_TRANSFORMERS = Refused(
    "sentence-transformers-parts",
    (
        re.compile(r"^modules\.json$"),
        re.compile(r"^0_[A-Za-z]+/(model\.safetensors|pytorch_model\.bin)$"),
    ),
    "a model of sentence-transformers whose first module lies in a folder of its own",
    "newer versions of sentence-transformers save a transformer at the top: save it again, or "
    "publish it with its own push_to_hub",
)
SEVERAL_FSDP = Refused(
    "accelerate-fsdp-models",
    (re.compile(r"^pytorch_model_fsdp_1/"), re.compile(r"^pytorch_model_fsdp_0/")),
    "a state of accelerate with several models under FSDP",
    "point at the folder of one of them, pytorch_model_fsdp_0 say, with --assets MODEL",
)
MODEL_PARALLEL = Refused(
    "meta-parallel",
    (re.compile(r"^consolidated\.01\.pth$"),),
    "Meta's model-parallel parts: each file has some columns or rows of every matrix",
    "convert it with transformers' convert_llama_weights_to_hf.py",
)
TUNE_PARTS = Refused(
    "torchtune-parts",
    (re.compile(r"^hf_model_0001_\d+\.pt$"), re.compile(r"^hf_model_0002_\d+\.pt$")),
    "files of torchtune before 0.4, several of which are one model, without an index",
    "train with a newer torchtune, or save the model as safetensors",
)
OLMO_CORE = Refused(
    "olmo-core",
    (re.compile(r"^model_and_optim/\.metadata$"),),
    "a checkpoint of OLMo-core: its tensors have names and fused layouts of their own",
    "convert it with OLMo-core's convert_checkpoint_to_hf.py and point ckptd at the result",
)
