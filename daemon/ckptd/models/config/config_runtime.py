"""`RuntimeChoices`: what a configuration says about this process only, and older names of its keys.

Owns: attention and expert kernels, `output_attentions`, and the names that older code uses for
`dtype`, `return_dict` and `rope_parameters`. Kernel choices are never saved.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar


class RuntimeChoices:
    """The properties of a configuration that are not keys of its own; mixed into the config class."""

    _fields: ClassVar[tuple[str, ...]]
    _name_or_path: str
    _output_attentions: bool | None
    _attn_implementation_internal: str | None
    _experts_implementation_internal: str | None

    @property
    def name_or_path(self) -> str:
        """The folder or repository that this was loaded from, "" where it was not."""
        return self._name_or_path

    @name_or_path.setter
    def name_or_path(self, value: str | os.PathLike[str]) -> None:
        self._name_or_path = os.fspath(value)

    @property
    def output_attentions(self) -> bool:
        """Whether a forward gives the attention weights; only the eager kernels have them.

        Setting it to True chooses these where nothing is chosen.

        Raises:
            ValueError: set to True while another attention implementation is chosen.
        """
        return bool(self._output_attentions)

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        if value and self._attn_implementation not in {None, "eager"}:
            raise ValueError(
                "output_attentions needs attn_implementation 'eager', "
                f"found {self._attn_implementation!r}"
            )
        if value:
            self._attn_implementation = "eager"
        self._output_attentions = value

    @property
    def _attn_implementation(self) -> Any:
        """The attention kernels chosen, or None; setting it sets it in nested ones too."""
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict[str, Any] | None) -> None:
        self._choose("_attn_implementation", value)

    @property
    def _experts_implementation(self) -> Any:
        """The kernels for experts chosen, or None; setting it sets it in nested ones too."""
        return self._experts_implementation_internal

    @_experts_implementation.setter
    def _experts_implementation(self, value: str | dict[str, Any] | None) -> None:
        self._choose("_experts_implementation", value)

    def _choose(self, name: str, value: str | dict[str, Any] | None) -> None:
        """Set a choice here and below; a dict has one for each nested key, and "" for this one."""
        by_key = value if isinstance(value, dict) else None
        own = value if by_key is None else by_key.get("", getattr(self, name))
        vars(self)[f"{name}_internal"] = own
        for key, part in vars(self).items():
            if isinstance(part, RuntimeChoices):
                chosen = value if by_key is None else by_key.get(key, getattr(part, name))
                setattr(part, name, chosen)

    @property
    def torch_dtype(self) -> Any:
        """The older name of `dtype`."""
        return vars(self)["dtype"]

    @torch_dtype.setter
    def torch_dtype(self, value: Any) -> None:
        vars(self)["dtype"] = value

    @property
    def use_return_dict(self) -> bool:
        """The older name of `return_dict`."""
        return bool(vars(self)["return_dict"])

    @property
    def rope_scaling(self) -> Any:
        """The older name of `rope_parameters` where the class has that field, else the file's key.

        Setting it stores the settings in their one form.
        """
        name = "rope_parameters" if "rope_parameters" in self._fields else "rope_scaling"
        if name not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute 'rope_scaling'")
        return vars(self)[name]

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        if "rope_parameters" not in self._fields:
            vars(self)["rope_scaling"] = value
            return
        vars(self)["rope_parameters"] = value
        if value is not None:
            self._settle_rope({})

    def _settle_rope(self, old: dict[str, Any]) -> None:
        raise NotImplementedError
