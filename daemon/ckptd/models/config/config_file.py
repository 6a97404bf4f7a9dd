"""`ConfigFile`: a configuration's way in from config.json and out again.

Owns: `from_pretrained`, `from_dict`, `save_pretrained` and what they do to arguments. Does not own:
finding a file (config_source), the meaning of keys (config). Files appear whole or not at all.
"""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any, ClassVar

from ckptd.checkpoint import writer
from ckptd.models import push
from ckptd.models.config import config_source, config_values

_LOADING_ONLY = (
    "_from_auto",
    "_from_pipeline",
    "_commit_hash",
    "trust_remote_code",
    "code_revision",
)
_AT_CONSTRUCTION = frozenset(
    [
        "num_labels",
        "attn_implementation",
        "experts_implementation",
        "output_attentions",
        "name_or_path",
        "dtype",
        "torch_dtype",
    ]
)
"""Arguments that the constructor must see, as other values depend on them."""

log = logging.getLogger(__name__)


class ConfigFile(push.PushToHubMixin):
    """Reading and writing, mixed into the configuration class."""

    model_type: ClassVar[str]
    base_config_key: ClassVar[str]
    _fields: ClassVar[tuple[str, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return a deep copy of every value, as JSON can hold it."""
        raise NotImplementedError

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what config.json says."""
        raise NotImplementedError

    @property
    def _is_generic(self) -> bool:
        raise NotImplementedError

    def validate(self) -> None:
        """Check the values against each other."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str = "main",
        **kwargs: Any,
    ) -> Any:
        """Return the configuration of a folder, a config.json, or a repository on the Hub.

        Args:
            pretrained_model_name_or_path: any of the three.
            cache_dir: where downloads are kept, instead of huggingface_hub's cache.
            force_download: fetch even what is in the cache.
            local_files_only: never ask the Hub.
            token: for the Hub; True is the stored one.
            revision: branch, tag, commit or `refs/pr/N`.
            **kwargs: `subfolder`; `proxies` (accepted; huggingface_hub 2 takes proxies from the
                environment only); `return_unused_kwargs=True` for `(config, unused)`; all others
                that name an attribute override the file's value.

        Raises:
            OSError: no such file, folder, repository or revision, or not JSON; the text says which.
            ValueError, KeyError: as the constructor.
        """
        kwargs.update(
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            revision=revision,
        )
        content, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(cls._own_part(content), **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the content of config.json as it is, and the arguments not used to find it.

        Raises:
            OSError: as `from_pretrained`.
        """
        source = config_source.Source.taken_from(kwargs)
        for name in _LOADING_ONLY:
            kwargs.pop(name, None)
        path = config_source.find(pretrained_model_name_or_path, config_source.CONFIG_NAME, source)
        content = config_source.read(path)
        if "model_type" in kwargs and kwargs["model_type"] != content.get("model_type"):
            log.warning("%s: model_type overridden by %s", path, kwargs["model_type"])
            content["model_type"] = kwargs["model_type"]
        return content, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the configuration with this content, `kwargs` that name attributes overriding it.

        `return_unused_kwargs=True` gives `(config, unused)`. `config_dict` is left as it is.
        """
        want_unused = kwargs.pop("return_unused_kwargs", False)
        for name in _LOADING_ONLY:
            kwargs.pop(name, None)
        if kwargs.get("dtype", kwargs.get("torch_dtype")) == "auto":
            kwargs = {key: item for key, item in kwargs.items() if not key.endswith("dtype")}
        early = {key: kwargs.pop(key) for key in _AT_CONSTRUCTION & kwargs.keys()}
        config = cls(**{**copy.deepcopy(config_dict), **early})
        unused = {key: item for key, item in kwargs.items() if not config._override(key, item)}
        return (config, unused) if want_unused else config

    def _override(self, name: str, value: Any) -> bool:
        """Set an attribute that exists (a dict changes a nested configuration); say if it does."""
        if not hasattr(self, name):
            return False
        current = getattr(self, name)
        if isinstance(current, ConfigFile) and isinstance(value, dict):
            value = type(current)(**{**current.to_dict(), **value})
        setattr(self, name, value)
        return True

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> Any:
        """Return the configuration in a JSON file. Raises OSError as `from_pretrained`."""
        return cls(**config_source.read(json_file))

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return `to_diff_dict` (or `to_dict`) as the text of a config.json."""
        return config_source.written(self.to_diff_dict() if use_diff else self.to_dict())

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write `to_json_string` to a file, whole or not at all, with the mode the umask gives.

        Raises:
            NoSpace, StorageFailed: the file system refused; an old file is as it was.
        """
        writer.write_file(Path(json_file_path), self.to_json_string(use_diff).encode())

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write config.json into a folder, which is made where it is missing.

        With `push_to_hub` it also goes to the repository `repo_id` (the folder's name by default);
        `kwargs` are those of `push_to_hub`.

        Raises:
            ValueError: values contradict each other, or keys of generation are set, which belong
                in `model.generation_config`.
            NotADirectoryError: `save_directory` is a file.
            NoSpace, StorageFailed: the file system refused; an old config.json is as it was.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise NotADirectoryError(f"{folder} is a file; name a folder to save into")
        self._refuse_generation_keys()
        self.validate()
        writer.make_folder(folder)
        self.to_json_file(folder / config_source.CONFIG_NAME)
        if push_to_hub:
            push.push_files(self, [folder / config_source.CONFIG_NAME], **kwargs)

    def _refuse_generation_keys(self) -> None:
        """Raise ValueError where a key of generation was set; a generic one keeps the file's."""
        names = config_values.GENERATION_KEYS & vars(self).keys() - set(self._fields)
        wrong = sorted(name for name in names if vars(self)[name] is not None)
        if wrong and not self._is_generic:
            raise ValueError(
                f"generation settings in the model's configuration: {', '.join(wrong)}; "
                "set them on model.generation_config"
            )

    @classmethod
    def _own_part(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Return the part of a composite config.json that this class describes."""
        if cls.base_config_key:
            content = content.get(cls.base_config_key, content)
        if not cls.model_type or content.get("model_type", cls.model_type) == cls.model_type:
            return content
        for part in content.values():
            if isinstance(part, dict) and part.get("model_type") == cls.model_type:
                return part
        log.warning(
            "a config.json of model_type %s is read as %s", content["model_type"], cls.model_type
        )
        return content
