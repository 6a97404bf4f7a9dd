"""adapter_config.json: what decides how an adapter's tensors go into the base.

Written after the sources of PEFT 0.21. Methods and variants that are no sum of a base weight and a
product of two matrices are refused here, by name, before anything else is looked at.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ckptd.errors import StageRefused

T = TypeVar("T")

STAGE = "merge"
_METHODS = (
    "LORA", "TRAINABLE_TOKENS", "ADALORA", "IA3", "LOHA", "LOKR", "VERA", "OFT", "BOFT", "FOURIERFT",
    "C3A", "HRA", "LN_TUNING",
)  # fmt: skip
_OF_INPUTS = {
    "PROMPT_TUNING": "prepends virtual tokens to the input",
    "MULTITASK_PROMPT_TUNING": "prepends virtual tokens to the input",
    "P_TUNING": "prepends virtual tokens to the input",
    "CPT": "prepends virtual tokens to the input",
    "PREFIX_TUNING": "prepends keys and values in every layer",
    "CARTRIDGE": "prepends keys and values in every layer",
    "ADAPTION_PROMPT": "adds prompts to the attention of some layers",
}
"""Methods that change no weight at all, and what they do."""
_RANKNUM_EPS = 1e-5
"""PEFT adds it to AdaLoRA's rank before it divides by it."""
_LYCORIS = ("LOHA", "LOKR")
_OTHER_VARIANTS = (
    "layer_replication",
    "use_qalora",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
)
"""Settings that change what is computed, or where, in ways that are not merged here."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Initialisations after which the adapter belongs to a base with other weights than the named one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What adapter_config.json says; `token_indices` are by module, or for the input embedding.

    `terms` are those of OFT's series, 0 where it has none, and `bound` what keeps its rotations small.
    `spectrum` are FourierFT's factor and seed; `together` says that HRA's planes are made
    perpendicular to each other. `revision` is the base's on the Hub, where the adapter names one; `task` is PEFT's task type.
    """

    path: Path
    method: str
    base: str | None
    revision: str | None
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rank_stabilized: bool
    dora: bool
    turned: bool
    terms: int
    bound: float | None
    spectrum: tuple[float, int]
    together: bool
    task: str | None
    modules_to_save: tuple[str, ...]
    token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None
    target_parameters: tuple[str, ...]
    ties_weights: bool

    def scale(self, module: str, rank: int | None) -> float:
        """Return the factor of the product in `module`, whose matrices have `rank`, if they show it.

        Raises:
            StageRefused: the settings give the module another rank.
        """
        if self.method == "ADALORA":
            return (self.alpha if self.alpha > 0 else self.rank) / (self.rank + _RANKNUM_EPS)
        wanted = _by_pattern(self.ranks, module, self.rank)
        if rank is None:
            rank = wanted
        if rank != wanted:
            self.refuse(
                "has another rank than adapter_config.json gives it",
                tensor=module,
                expected=str(wanted),
                found=str(rank),
                hint="the two files are of different adapters",
            )
        alpha = _by_pattern(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def indices(self, module: str) -> Sequence[int] | None:
        """Return the token ids whose rows were trained in the embedding `module`."""
        if isinstance(self.token_indices, Mapping):
            found = (i for key, i in self.token_indices.items() if _matches(key, module))
            return next(found, None)
        return self.token_indices

    def refuse(self, what: str, **fields: Any) -> NoReturn:
        """Refuse the adapter.

        Raises:
            StageRefused: always.
        """
        raise StageRefused(what, stage=STAGE, path=self.path, **fields)


def read(config: Mapping[str, Any], path: Path) -> Settings:
    """Return the settings in the adapter_config.json `config`, which lies at `path`.

    Raises:
        StageRefused: a method or a variant that is not merged, or a value of the wrong kind.
    """
    method = str(config.get("peft_type", "")).rpartition(".")[2].upper()
    _check_method(method, config, path)
    tokens = config.get("token_indices" if method != "LORA" else "trainable_token_indices")
    try:
        return Settings(
            path=path,
            method=method,
            base=config.get("base_model_name_or_path") or None,
            revision=config.get("revision") or None,
            rank=int(config.get("init_r", 12) if method == "ADALORA" else config.get("r", 8)),
            alpha=float(config.get("alpha" if method in _LYCORIS else "lora_alpha", 8)),
            ranks={} if method == "ADALORA" else _ranks(config.get("rank_pattern") or {}),
            alphas={k: float(value) for k, value in (config.get("alpha_pattern") or {}).items()},
            rank_stabilized=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            turned=bool(config.get("fan_in_fan_out")),
            terms=_terms(config),
            bound=float(config.get("eps", 6e-5)) if config.get("coft") else None,
            spectrum=(float(config.get("scaling", 150.0)), int(config.get("random_loc_seed") or 0)),
            together=bool(config.get("apply_GS")),
            task=config.get("task_type") or None,
            modules_to_save=tuple(config.get("modules_to_save") or ()),
            token_indices=_indices(tokens),
            target_parameters=tuple(config.get("target_parameters") or ()),
            ties_weights=bool(config.get("ensure_weight_tying")),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise StageRefused(f"is not as PEFT writes it: {error}", stage=STAGE, path=path) from error


def _terms(config: Mapping[str, Any]) -> int:
    if not config.get("use_cayley_neumann", False):
        return 0
    return int(config.get("num_cayley_neumann_terms", 5))


def _ranks(patterns: Mapping[str, Any]) -> dict[str, int]:
    return {key: int(value) for key, value in patterns.items()}


def _check_method(method: str, config: Mapping[str, Any], path: Path) -> None:
    if method in _OF_INPUTS:
        raise StageRefused(
            f"{method} {_OF_INPUTS[method]} and changes no weight: there is nothing to merge",
            stage=STAGE,
            path=path,
            hint="publish the adapter as it is, without this stage",
        )
    if method not in _METHODS:
        raise StageRefused(
            f"adapters of the method {method or 'unnamed'} are not merged",
            stage=STAGE,
            path=path,
            expected=", ".join(_METHODS),
            found=method,
            hint="merge it with PEFT (merge_and_unload, where the method has it) and save that, or "
            "publish the adapter as it is, without this stage",
        )
    for key in _OTHER_VARIANTS:
        if config.get(key):
            raise StageRefused(
                f"{method} with {key} is not merged",
                stage=STAGE,
                path=path,
                found=repr(config[key])[:80],
                hint="merge it with PEFT and save that, or publish the adapter as it is",
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise StageRefused(
            f"{start} changed the base's weights when it began, so that the adapter does not "
            "belong to the base as it is named",
            stage=STAGE,
            path=path,
            hint="save it with path_initial_model_for_weight_conversion, which makes a plain LoRA",
        )


def _indices(value: Any) -> Sequence[int] | Mapping[str, Sequence[int]] | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {str(key): [int(index) for index in some] for key, some in value.items()}
    return [int(index) for index in value]


def _by_pattern(patterns: Mapping[str, T], module: str, default: T) -> T:
    """Return the value of the first pattern that is the module's name or the end of it."""
    return next((value for key, value in patterns.items() if _matches(key, module)), default)


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return module == pattern or module.endswith(f".{pattern}")
