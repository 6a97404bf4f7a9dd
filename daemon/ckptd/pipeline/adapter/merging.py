"""An adapter's tensors put into the tensors of its base: the expressions, and whose place is whose.

Shapes: a linear weight is `(outputs, inputs)`, with `lora_A` `(rank, inputs)` and `lora_B`
`(outputs, rank)`. Conv1D weights and embeddings are the other way round, "turned": there the sum is
with the transposed product. Every tensor of the adapter is used or refused by name.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptd.checkpoint.dtypes import Dtype
from ckptd.pipeline.adapter import places
from ckptd.pipeline.adapter.keys import Factors, Keys
from ckptd.pipeline.adapter.settings import Settings
from ckptd.plan import expression
from ckptd.plan.nodes import Columns, Concat, Expression, Load, LowRank
from ckptd.quant.formats import conv1d

_WRAPPED = ".base_layer"


@dataclass(slots=True, kw_only=True)
class Merge:
    """One merge under way.

    `base` is what is published where the adapter has nothing to say, `exact` the same weights
    before they are rounded (a quantized base in float32). `twins` names tensors that are not in
    the base, for they are tied, and the one whose content they have. `made` gathers the result,
    `trained` the tensors whose module was adapted or trained, `rows` those where single rows were.
    """

    settings: Settings
    config: Mapping[str, Any]
    adapter: Mapping[str, Expression]
    base: Mapping[str, Expression]
    exact: Mapping[str, Expression]
    twins: Mapping[str, str]
    made: dict[str, Expression] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    rows: set[str] = field(default_factory=set)
    replaced: set[str] = field(default_factory=set)
    taken: dict[str, str] = field(default_factory=dict)

    def run(self, keys: Keys) -> None:
        """Put everything in.

        Raises:
            StageRefused: a tensor of the adapter has no place, or does not fit there.
        """
        self._check(keys)
        for target, name in keys.values.items():
            self._replace(target, name, trained=target in keys.saved)
        for module, factors in keys.factors.items():
            self._add(module, factors)
        for module, name in keys.tokens.items():
            self._put_rows(module, name)

    def _check(self, keys: Keys) -> None:
        refuse = self.settings.refuse
        if keys.repeated:
            refuse("stands in the adapter twice, under two spellings", tensor=keys.repeated[0])
        if len(keys.adapters) > 1:
            refuse(
                "holds several adapters",
                found=", ".join(sorted(keys.adapters)),
                hint="save each one alone (save_pretrained with selected_adapters)",
            )
        if not (keys.factors or keys.values or keys.tokens):
            refuse("holds nothing to merge")

    def _place(self, name: str, tensor: str) -> str:
        """Return the name in the base, or of a tied twin, of what the adapter calls `name`."""
        found = places.find(name, self.base.keys() | self.twins.keys())
        if found is None:
            self.settings.refuse(
                "finds no place in the base model",
                tensor=tensor,
                expected=name,
                hint="is it the right base? name another with `base:`; its names are shown by "
                "`ckptd inspect --tensors`",
            )
        return found

    def _claim(self, place: str, tensor: str) -> None:
        if place in self.taken:
            self.settings.refuse(
                "goes to the same place as another tensor of the adapter",
                tensor=tensor,
                expected=place,
                found=self.taken[place],
            )
        self.taken[place] = tensor

    def _now(self, place: str, *, exact: bool = False) -> Expression:
        """Return what stands at `place` so far; `exact` before any rounding."""
        if place in self.made:
            return self.made[place]
        return (self.exact if exact else self.base)[self.twins.get(place, place)]

    def _dtype(self, place: str) -> Dtype:
        dtype = self.base[self.twins.get(place, place)].dtype
        if not dtype.is_plain_float:
            self.settings.refuse(
                f"is {dtype} in the base: nothing is merged into that", tensor=place
            )
        return dtype

    def _replace(self, target: str, name: str, *, trained: bool) -> None:
        """Take a whole tensor of the adapter: trained beside it, or of a resized vocabulary."""
        place = self._place(target, name)
        self._claim(place, name)
        value, old = self.adapter[name], self._now(place)
        if value.shape != old.shape:
            same_width = len(value.shape) == len(old.shape) and value.shape[1:] == old.shape[1:]
            if not same_width:
                self._misfit(name, old.shape, value.shape)
        self.made[place] = expression.cast(value, old.dtype)
        module = target.rpartition(".")[0]
        listed = any(module == m or module.endswith(f".{m}") for m in self.settings.modules_to_save)
        inside = any(f".{m}." in f".{module}." for m in self.settings.modules_to_save)
        (self.trained if trained or listed or inside else self.replaced).add(place)

    def _add(self, module: str, factors: Factors) -> None:
        """Add the product of a module's two matrices to its weight."""
        down, up = self._pair(module, factors)
        stem = module.removesuffix(_WRAPPED)
        plain = module if not module.endswith(_WRAPPED) else ""
        place = plain and places.find(f"{plain}.weight", self.base.keys() | self.twins.keys())
        if not place:
            while stem.endswith(_WRAPPED):
                stem = stem.removesuffix(_WRAPPED)
            self._add_to_parameter(stem, factors, down, up)
            return
        self._claim(f"{place} (lora)", factors.down or "")
        rank = down.shape[0]
        scale = self.settings.scale(module, rank)
        value = self._now(place, exact=True)
        magnitude = None
        if factors.magnitude is not None:
            stored = self.adapter[factors.magnitude]
            magnitude = _reshaped(stored, (expression.numel(stored),))
        elif self.settings.dora:
            self.settings.refuse(
                "has no lora_magnitude_vector, as use_dora asks for", tensor=module
            )
        turned = self._is_turned(module, factors, value, down, up)
        self.made[place] = self._sum(
            value, down, up, scale, self._dtype(place), turned, magnitude, factors
        )
        self.trained.add(place)
        if factors.bias is not None:
            self._add_bias(module, factors, scale)

    def _add_bias(self, module: str, factors: Factors, scale: float) -> None:
        assert factors.bias is not None
        place = places.find(f"{module}.bias", self.base.keys())
        bias = self.adapter[factors.bias]
        if place is None:
            self.settings.refuse(
                "the base has no bias that it could be added to", tensor=factors.bias
            )
        old = self._now(place, exact=True)
        if old.shape != bias.shape:
            self._misfit(factors.bias, old.shape, bias.shape)
        self.made[place] = LowRank(old, None, bias, scale, self._dtype(place))

    def _pair(self, module: str, factors: Factors) -> tuple[Expression, Expression]:
        if factors.down is None or factors.up is None:
            self.settings.refuse(
                "has only one of the two matrices of an adapter",
                tensor=module,
                expected="lora_A and lora_B",
                hint="the save was not whole: save the adapter again",
            )
        down, up = self.adapter[factors.down], self.adapter[factors.up]
        for name, value in ((factors.down, down), (factors.up, up)):
            if len(value.shape) < 2 or not expression.numel(value):
                self.settings.refuse(
                    "is empty: its parts were not gathered before they were saved",
                    tensor=name,
                    found=str(value.shape),
                    hint="save with ZeRO-3's GatheredParameters, or FSDP's summon_full_params",
                )
        return down, up

    def _is_turned(
        self, module: str, factors: Factors, value: Expression, down: Expression, up: Expression
    ) -> bool:
        """Whether the weight is `(inputs, outputs)`."""
        inputs, outputs = math.prod(down.shape[1:]), up.shape[0]
        straight = value.shape[0] == outputs and math.prod(value.shape[1:]) == inputs
        across = value.shape == (inputs, outputs)
        if factors.embedding:
            straight = False
        if math.prod(up.shape[1:]) != down.shape[0] or not (straight or across):
            self._misfit(factors.down or "", value.shape, (outputs, *down.shape[1:]))
        if straight and across:
            return self.settings.turned or conv1d.is_conv1d(self.config, module)
        return across

    def _sum(
        self,
        value: Expression,
        down: Expression,
        up: Expression,
        scale: float,
        dtype: Dtype,
        turned: bool,
        magnitude: Expression | None,
        factors: Factors,
    ) -> Expression:
        rank = down.shape[0]
        down = _reshaped(down, (rank, math.prod(down.shape[1:])))
        up = _reshaped(up, (up.shape[0], rank))
        of_columns = turned
        if len(value.shape) == 2 and value.shape[0] == 1:
            turned = not turned  # one row is a column: its rows, too, are the longer axis
            of_columns = not of_columns
        if turned:
            down, up = (
                Columns(up, count=rank, turned=True),
                Columns(down, count=down.shape[1], turned=True),
            )
        if magnitude is not None:
            length = down.shape[1] if of_columns else up.shape[0]
            if magnitude.shape != (length,):
                self._misfit(factors.magnitude or "", (length,), magnitude.shape)
        if len(value.shape) > 2 and value.shape[0] == 1:
            self.settings.refuse(
                "a convolution with one output channel is not merged", tensor=factors.down
            )
        made = LowRank(value, down, up, scale, dtype, magnitude)
        if magnitude is not None and of_columns:
            made = dataclasses.replace(made, whole=dataclasses.replace(made, magnitude=None))
        return made

    def _add_to_parameter(
        self, module: str, factors: Factors, down: Expression, up: Expression
    ) -> None:
        """Add to the experts that are one parameter of `module` in memory (target_parameters)."""
        fits: list[tuple[str, tuple[int, bool]]] = []
        for listed in self.settings.target_parameters:
            parameter = listed.rpartition(".")[2]
            owner = listed.rpartition(".")[0]
            if owner and not (module == owner or module.endswith(f".{owner}")):
                continue
            name = f"{module}.{parameter}"
            if any(name == one for one, _ in fits):
                continue
            way = self._expert_way(name, down, up)
            if way is not None and f"{name} (lora)" not in self.taken:
                fits.append((name, way))
        if len(fits) != 1:
            what = (
                "may belong to several parameters" if fits else "finds no place in the base model"
            )
            self.settings.refuse(
                what,
                tensor=factors.down,
                expected=", ".join(name for name, _ in fits) or f"{module}.weight",
                hint="is it the right base? name another with `base:`",
            )
        name, (count, turned) = fits[0]
        self._claim(f"{name} (lora)", factors.down or "")
        rank = down.shape[0] // count
        scale = self.settings.scale(name, rank)
        self._add_to_experts(name, down, up, count, scale, turned=turned)

    def _expert_way(self, name: str, down: Expression, up: Expression) -> tuple[int, bool] | None:
        """Return number and orientation of the experts of a parameter, if the matrices fit it."""
        place = places.find(name, self.base)
        outputs, inputs = up.shape[0], down.shape[1]
        if place is not None:
            shape = self.base[place].shape
            if len(shape) == 2:
                shape = (1, *shape)
            ways = [
                turned
                for turned, wanted in ((False, (outputs, inputs)), (True, (inputs, outputs)))
                if shape[1:] == wanted
            ]
            count = shape[0]
            if len(ways) != 1 or down.shape[0] % count or up.shape[1] != down.shape[0]:
                return None
            return count, ways[0]
        listed = places.experts(name, self.base)
        if not listed or down.shape[0] % len(listed) or up.shape[1] != down.shape[0]:
            return None
        rows = sum(self.base[part].shape[0] for part in listed[0])
        if rows != outputs or any(self.base[part].shape[1:] != (inputs,) for part in listed[0]):
            return None
        return len(listed), False

    def _add_to_experts(
        self, name: str, down: Expression, up: Expression, count: int, scale: float, *, turned: bool
    ) -> None:
        """Add each expert's product; the rank of `up` runs slower than its experts."""
        rank = down.shape[0] // count
        place = places.find(name, self.base)
        parts: list[Expression] = []
        for expert in range(count):
            mine = expression.rows(down, expert * rank, (expert + 1) * rank)
            if place is None:
                start = 0
                for part in places.experts(name, self.base)[expert]:
                    value = self._now(part, exact=True)
                    stop = start + value.shape[0]
                    rows = Columns(expression.rows(up, start, stop), rank, expert, count)
                    self.made[part] = LowRank(value, mine, rows, scale, self._dtype(part))
                    self.trained.add(part)
                    start = stop
                continue
            value = self._now(place, exact=True)
            if len(value.shape) == 3:
                value = expression.rows(value, expert, expert + 1)
            factors: tuple[Expression, Expression] = (mine, Columns(up, rank, expert, count))
            if turned:
                factors = (
                    Columns(up, rank, expert, count, turned=True),
                    Columns(mine, mine.shape[1], turned=True),
                )
            parts.append(LowRank(value, *factors, scale, self._dtype(place)))
        if place is not None:
            self.made[place] = parts[0] if count == 1 else Concat(tuple(parts), 0)
            self.trained.add(place)

    def _put_rows(self, module: str, name: str) -> None:
        """Put the trained rows of single tokens in the place of the base's."""
        place = self._place(f"{module.removesuffix('.token_adapter')}.weight", name)
        indices, value, rows = self.settings.indices(module), self._now(place), self.adapter[name]
        if indices is None or len(indices) != rows.shape[0] or len({*indices}) != len(indices):
            self.settings.refuse(
                "does not go with the token indices of adapter_config.json",
                tensor=name,
                expected=f"{rows.shape[0]} different indices",
                found="none" if indices is None else f"{len(indices)}",
            )
        if rows.shape[1:] != value.shape[1:] or not all(0 <= i < value.shape[0] for i in indices):
            self._misfit(name, value.shape, rows.shape)
        self._claim(f"{place} (rows)", name)
        new = expression.cast(rows, self._dtype(place))
        order = sorted(range(len(indices)), key=lambda at: indices[at])
        parts: list[Expression] = []
        edges = [-1, *(indices[at] for at in order), value.shape[0]]
        for number, (before, after) in enumerate(itertools.pairwise(edges)):
            if before + 1 < after:
                parts.append(expression.rows(value, before + 1, after))
            if number < len(order):
                parts.append(expression.rows(new, order[number], order[number] + 1))
        self.made[place] = expression.concat(parts)
        self.rows.add(place)

    def _misfit(self, tensor: str, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
        self.settings.refuse(
            "does not fit the base",
            tensor=tensor,
            expected=f"shape {expected}",
            found=f"shape {found}",
            hint="is it the right base? name another with `base:`",
        )


def _reshaped(value: Expression, shape: tuple[int, ...]) -> Expression:
    """Return a stored tensor's elements in another shape."""
    if value.shape == shape:
        return value
    assert isinstance(value, Load)
    return Load(value.extent, value.dtype, shape)
