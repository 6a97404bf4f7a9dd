"""generation_config.json: what `generate` is asked for, with Hugging Face's names.

A setting that nobody gave is None: the defaults of `generation_rules` apply only when a
sequence is made, so that a model's own settings, a call's settings and the defaults stay
distinguishable. Keys this module does not know are kept and written back. Free of torch.

What the generation loop does not do (beam search, stop strings and the like) may stand in a file; it
is refused when a sequence is asked for.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from ckptd.checkpoint import writer
from ckptd.models import push
from ckptd.models.config import config_source
from ckptd.models.config.config_source import Source
from ckptd.models.generation import generation_rules

log = logging.getLogger(__name__)

FILE_NAME = "generation_config.json"
_PRIVATE = ("_commit_hash", "_as_loaded")
_METADATA = ("_from_model_config", "transformers_version")


class _ModelConfig(Protocol):
    """What is asked of a model's configuration."""

    def to_dict(self) -> dict[str, Any]: ...

    def get_text_config(self, decoder: bool | None = None) -> _ModelConfig: ...


@dataclass(slots=True, kw_only=True)
class CompileConfig:
    """How `get_compiled_call` calls `torch.compile`; the fields are its arguments."""

    fullgraph: bool = False
    dynamic: bool | None = None
    backend: str = "inductor"
    mode: str | None = "reduce-overhead"
    options: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments of `torch.compile`."""
        return asdict(self)


class GenerationConfig(push.PushToHubMixin):
    """The settings of `generate`; None means that `generation_rules.DEFAULTS` holds.

    Any keyword is accepted: the known ones below, and others, which are kept as attributes and
    saved.

    Raises:
        ValueError: a value is impossible in itself, or the keyword is an argument of `generate`.
    """

    max_length: int | None
    max_new_tokens: int | None
    min_length: int | None
    min_new_tokens: int | None
    max_time: float | None
    do_sample: bool | None
    num_beams: int | None
    use_cache: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    renormalize_logits: bool | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | list[int] | None
    suppress_tokens: list[int] | None
    begin_suppress_tokens: list[int] | None
    num_return_sequences: int | None
    output_attentions: bool | None
    output_hidden_states: bool | None
    output_scores: bool | None
    output_logits: bool | None
    return_dict_in_generate: bool | None
    pad_token_id: int | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    decoder_start_token_id: int | list[int] | None
    compile_config: Any
    _from_model_config: bool | None
    transformers_version: str | None

    extra_output_flags: ClassVar[tuple[str, ...]] = generation_rules.OUTPUT_FLAGS

    def __init__(self, **kwargs: Any) -> None:
        given = set(kwargs)
        kwargs.pop("_commit_hash", None)
        for name in _FIELDS:
            setattr(self, name, kwargs.pop(name, None))
        for name, value in kwargs.items():
            setattr(self, name, value)
        self.validate(user_set_attributes=given)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GenerationConfig):
            return NotImplemented
        return self._fingerprint() == other._fingerprint()

    def __hash__(self) -> int:
        return hash(self._fingerprint())

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string(ignore_metadata=True)}"

    def _fingerprint(self) -> str:
        return self.to_json_string(use_diff=False, ignore_metadata=True)

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """Check the settings against each other; settings without effect are logged, once.

        With `strict`, settings without effect are refused too. `user_set_attributes` names what the
        caller gave: a setting inherited from a model is not complained about when the caller turned
        off what it belongs to.

        Raises:
            ValueError: a value is impossible, or, with `strict`, has no effect.
        """
        generation_rules.require_possible(vars(self))
        idle = generation_rules.idle_settings(vars(self), user_set_attributes or set())
        if not idle:
            return
        text = "; ".join(idle.values())
        if strict:
            raise ValueError(f"generation settings without effect: {text}")
        warn_once(f"generation settings without effect: {text}")

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Set the given settings that exist here; return those that do not.

        With `defaults_only`, only settings that are None are set. With `allow_custom_entries`, new
        names are set too.

        Raises:
            ValueError: the settings do not fit together any more.
        """
        taken = set()
        for name, value in kwargs.items():
            known = name in vars(self)
            if known and defaults_only and getattr(self, name) is not None:
                continue
            if known or allow_custom_entries:
                setattr(self, name, value)
                taken.add(name)
        self.validate(user_set_attributes=taken)
        return {name: value for name, value in kwargs.items() if name not in taken}

    def to_dict(self) -> dict[str, Any]:
        """Return every setting, None where it was not given."""
        found = {name: copy.deepcopy(v) for name, v in vars(self).items() if name not in _PRIVATE}
        if found["transformers_version"] is None:
            del found["transformers_version"]
        return found

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the settings that were given."""
        return {
            name: value
            for name, value in self.to_dict().items()
            if value is not None or name not in _FIELDS
        }

    def to_json_string(
        self,
        use_diff: bool = True,
        ignore_metadata: bool = False,
        keys_to_pop: list[str] | None = None,
    ) -> str:
        """Return the settings as JSON text, keys sorted, ending with a line feed."""
        found = self.to_diff_dict() if use_diff else self.to_dict()
        dropped = set(keys_to_pop or ()) | set(_METADATA if ignore_metadata else ())
        kept = {name: value for name, value in found.items() if name not in dropped}
        return json.dumps(kept, indent=2, sort_keys=True, default=_as_json) + "\n"

    def to_json_file(
        self,
        json_file_path: str | Path,
        use_diff: bool = True,
        keys_to_pop: list[str] | None = None,
    ) -> None:
        """Write the settings to a file, whole or not at all.

        Raises:
            NoSpace, StorageFailed: the file system refused; a file there is as it was.
        """
        text = self.to_json_string(use_diff=use_diff, keys_to_pop=keys_to_pop)
        writer.write_file(Path(json_file_path), text.encode())

    def save_pretrained(
        self,
        save_directory: str | Path,
        config_file_name: str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write generation_config.json into a folder, which is made if it does not exist.

        Settings that were changed since they were read must have an effect; settings as they were
        read are always written back. With `push_to_hub` the file also goes to the repository
        `repo_id` (the folder's name by default); `kwargs` are those of `push_to_hub`.

        Raises:
            ValueError: changed settings have no effect; nothing is written.
            NotADirectoryError: `save_directory` is a file.
            NoSpace, StorageFailed: the file system refused; a file there is as it was.
        """
        changed = vars(self).get("_as_loaded") != self._fingerprint()
        self.validate(strict=changed)
        folder, name = Path(save_directory), config_file_name or FILE_NAME
        if folder.is_file():
            raise NotADirectoryError(f"{folder} is a file; name a folder to save into")
        writer.make_folder(folder)
        self.to_json_file(folder / name, keys_to_pop=["compile_config"])
        if push_to_hub:
            push.push_files(self, [folder / name], **kwargs)

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], *, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the settings of `config_dict`, overridden by `kwargs`.

        With `return_unused_kwargs`, a pair: the settings, and those `kwargs` that name none; without
        it, they are kept in the settings.

        Raises:
            ValueError: a value is impossible.
        """
        if not return_unused_kwargs:
            return cls(**{**config_dict, **kwargs})
        unused = {n: v for n, v in kwargs.items() if n not in _FIELDS and n not in config_dict}
        chosen = {n: v for n, v in kwargs.items() if n not in unused}
        return cls(**{**config_dict, **chosen}), unused

    @classmethod
    def from_model_config(cls, model_config: _ModelConfig | Mapping[str, Any]) -> GenerationConfig:
        """Return the generation settings that stand in a model's configuration.

        Those of its text model fill what the outer configuration leaves open. When an
        `output_...` flag is on, so is `return_dict_in_generate`.
        """
        if isinstance(model_config, Mapping):
            outer: Mapping[str, Any] = model_config
            parts = (model_config.get(n) for n in ("decoder", "generator", "text_config"))
            inner: Mapping[str, Any] = next((part for part in parts if part), {})
        else:
            outer = model_config.to_dict()
            inner = model_config.get_text_config(decoder=True).to_dict()
        names = _FIELDS - set(_METADATA)
        found = {name: outer[name] for name in names if outer.get(name) is not None}
        found |= {n: inner[n] for n in names - found.keys() if inner.get(n) is not None}
        if any(found.get(flag) for flag in generation_rules.OUTPUT_FLAGS):
            found["return_dict_in_generate"] = True
        config = cls(**found, _from_model_config=True)
        return config.as_read()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: str | Path,
        config_file_name: str | Path | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the settings of a folder or of a Hub repository, overridden by `kwargs`.

        `cache_dir`, `force_download`, `local_files_only`, `token`, `revision`, `subfolder` and
        `proxies` say how the file is found, as for a model. With `return_unused_kwargs=True`, see
        `from_dict`.

        Raises:
            OSError: there is no such file, the Hub cannot be reached, or the file is no JSON object.
            ValueError: a value is impossible.
        """
        source = Source.taken_from(kwargs)
        name = str(config_file_name or FILE_NAME)
        path = config_source.find(pretrained_model_name, name, source)
        found = cls.from_dict(config_source.read(path), **kwargs)
        (found[0] if isinstance(found, tuple) else found).as_read()
        return found

    def as_read(self) -> GenerationConfig:
        """Remember the settings as they are now, as those that may be written back unchecked."""
        self._as_loaded = self._fingerprint()
        return self


_FIELDS = set(generation_rules.SERVED_ELSEWHERE) | {
    name for name, kind in GenerationConfig.__annotations__.items() if "ClassVar" not in kind
}


def _as_json(value: Any) -> Any:
    """Return a value that json does not know in a form that it knows."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    text = str(value)
    return text.removeprefix("torch.")


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning, the first time only."""
    log.warning(text)
