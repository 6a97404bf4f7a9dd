"""An adapter's tensors put into the tensors of its base: the expressions, and whose place is whose.

Shapes: a linear weight is `(outputs, inputs)`, with `lora_A` `(rank, inputs)` and `lora_B`
`(outputs, rank)`. Conv1D weights and embeddings are the other way round, "turned": there the sum is
with the transposed product. Every tensor of the adapter is used or refused by name.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ckptd.checkpoint.dtypes import Dtype
from ckptd.pipeline.adapter import experts, fused, heads, methods
from ckptd.pipeline.adapter.expressions import reshaped
from ckptd.pipeline.adapter.keys import Factors, Keys
from ckptd.pipeline.adapter.places import Places
from ckptd.pipeline.adapter.settings import Settings
from ckptd.plan import expression
from ckptd.plan.nodes import Columns, Expression, LowRank
from ckptd.quant.formats import conv1d

_WRAPPED = ".base_layer"


@dataclass(slots=True, kw_only=True)
class Merge:
    """One merge under way.

    `base` is what is published where the adapter has nothing to say, `exact` the same weights
    before they are rounded (a quantized base in float32). `twins` names tensors that are not in
    the base, for they are tied, and the one whose content they have. `made` gathers the result,
    `trained` the tensors whose module was adapted or trained, `rows` those where single rows were.
    `heads` are those that the base has not at all, `cut` stretches of rows of a tensor that modules
    in memory have apart, while they gather.
    """

    settings: Settings
    config: Mapping[str, Any]
    adapter: Mapping[str, Expression]
    base: Mapping[str, Expression]
    exact: Mapping[str, Expression]
    twins: Mapping[str, str]
    places: Places
    made: dict[str, Expression] = field(default_factory=dict)
    trained: set[str] = field(default_factory=set)
    rows: set[str] = field(default_factory=set)
    replaced: set[str] = field(default_factory=set)
    taken: dict[str, str] = field(default_factory=dict)
    heads: dict[str, Expression] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    cut: dict[str, list[tuple[int, int, Expression]]] = field(default_factory=dict)

    def run(self, keys: Keys) -> None:
        """Put everything in.

        Raises:
            StageRefused: a tensor of the adapter has no place, or does not fit there.
        """
        self._check(keys)
        self.others = keys.others
        self.places.exchange(*_wanted(keys, self))
        for target, name in keys.values.items():
            self._replace(target, name, trained=target in keys.saved)
        for module, factors in keys.factors.items():
            self._add(module, factors)
        methods.apply(self, keys.others)
        for module, name in keys.tokens.items():
            self._put_rows(module, name)
        fused.join(self)

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
        if not (keys.factors or keys.others or keys.values or keys.tokens):
            refuse("holds nothing to merge")
        foreign = methods.foreign(keys, self.settings.method)
        if foreign is not None:
            refuse(
                "is of another method than adapter_config.json names",
                tensor=foreign,
                found=self.settings.method,
                hint="the two files are of different adapters",
            )

    def place(self, name: str, tensor: str) -> str:
        """Return the name in the base, or of a tied twin, of what the adapter calls `name`.

        Raises:
            StageRefused: there is none.
        """
        found = self.places.find(name)
        if found is None:
            self.settings.refuse(
                "finds no place in the base model",
                tensor=tensor,
                expected=name,
                hint="is it the right base? name another with `base:`; its names are shown by "
                "`ckptd inspect --tensors`",
            )
        return found

    def claim(self, place: str, tensor: str) -> None:
        """Note that `tensor` goes to `place`.

        Raises:
            StageRefused: another one went there already.
        """
        if place in self.taken:
            self.settings.refuse(
                "goes to the same place as another tensor of the adapter",
                tensor=tensor,
                expected=place,
                found=self.taken[place],
            )
        self.taken[place] = tensor

    def now(self, place: str, *, exact: bool = False) -> Expression:
        """Return what stands at `place` so far; `exact` before any rounding."""
        if place in self.made:
            return self.made[place]
        return (self.exact if exact else self.base)[self.twins.get(place, place)]

    def dtype(self, place: str) -> Dtype:
        """Return the dtype of what is published at `place`.

        Raises:
            StageRefused: it is none that numbers are added in.
        """
        dtype = self.base[self.twins.get(place, place)].dtype
        if not dtype.is_plain_float:
            self.settings.refuse(
                f"is {dtype} in the base: nothing is merged into that", tensor=place
            )
        return dtype

    def _replace(self, target: str, name: str, *, trained: bool) -> None:
        """Take a whole tensor of the adapter: trained beside it, or of a resized vocabulary."""
        value = self.adapter[name]
        if heads.is_new(self.settings, target) and self.places.find(target) is None:
            self.heads[target] = expression.cast(value, heads.dtype_of(self.base).dtype)
            return
        place = self.place(target, name)
        self.claim(place, name)
        old = self.now(place)
        if value.shape != old.shape:
            same_width = len(value.shape) == len(old.shape) and value.shape[1:] == old.shape[1:]
            if not same_width:
                self.misfit(name, old.shape, value.shape)
        self.made[place] = expression.cast(value, old.dtype)
        module = target.rpartition(".")[0]
        listed = any(module == m or module.endswith(f".{m}") for m in self.settings.modules_to_save)
        inside = any(f".{m}." in f".{module}." for m in self.settings.modules_to_save)
        (self.trained if trained or listed or inside else self.replaced).add(place)

    def _add(self, module: str, factors: Factors) -> None:
        """Add the product of a module's two matrices to its weight."""
        if self.settings.method == "ADALORA" and self._is_pruned(factors):
            return
        down, up = self._pair(module, factors)
        stem = module.removesuffix(_WRAPPED)
        plain = module if not module.endswith(_WRAPPED) else ""
        place = plain and self.places.find(f"{plain}.weight")
        if plain and not place and (pieces := self.places.pieces(f"{plain}.weight")):
            fused.add(self, plain, pieces, factors, down, up)
            return
        if not place:
            while stem.endswith(_WRAPPED):
                stem = stem.removesuffix(_WRAPPED)
            experts.add(self, stem, factors, down, up)
            return
        scale = self.settings.scale(module, down.shape[0])
        self.add_product(module, factors, down, up, scale)

    def add_product(
        self, module: str, factors: Factors, down: Expression, up: Expression, scale: float
    ) -> None:
        """Add a product of two matrices to a module's weight.

        Raises:
            StageRefused: they do not fit.
        """
        place = self.place(f"{module}.weight", factors.down or "")
        self.claim(f"{place} (lora)", factors.up or "")
        value = self.now(place, exact=True)
        magnitude = self.magnitude(module, factors)
        turned = self._is_turned(module, factors, value, down, up)
        self.made[place] = self._sum(
            value, down, up, scale, self.dtype(place), turned, magnitude, factors
        )
        self.trained.add(place)
        if factors.bias is not None:
            self._add_bias(module, factors, scale)

    def magnitude(self, module: str, factors: Factors) -> Expression | None:
        """Return the lengths of a module's rows after training, of `(rows,)`; None without DoRA."""
        if factors.magnitude is not None:
            stored = self.adapter[factors.magnitude]
            return reshaped(stored, (expression.numel(stored),))
        if self.settings.dora:
            self.settings.refuse(
                "has no lora_magnitude_vector, as use_dora asks for", tensor=module
            )
        return None

    def _add_bias(self, module: str, factors: Factors, scale: float) -> None:
        assert factors.bias is not None
        place = self.places.find(f"{module}.bias")
        bias = self.adapter[factors.bias]
        if place is None:
            self.settings.refuse(
                "the base has no bias that it could be added to", tensor=factors.bias
            )
        old = self.now(place, exact=True)
        if old.shape != bias.shape:
            self.misfit(factors.bias, old.shape, bias.shape)
        self.made[place] = LowRank(old, None, bias, scale, self.dtype(place))

    def _is_pruned(self, factors: Factors) -> bool:
        """Whether AdaLoRA has left a module no rank at all."""
        return factors.down is not None and self.adapter[factors.down].shape[0] == 0

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
        if self.settings.method == "ADALORA":
            down = methods.singular_values(self, module, down)
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
            self.misfit(factors.down or "", value.shape, (outputs, *down.shape[1:]))
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
        down = reshaped(down, (rank, math.prod(down.shape[1:])))
        up = reshaped(up, (up.shape[0], rank))
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
                self.misfit(factors.magnitude or "", (length,), magnitude.shape)
        if len(value.shape) > 2 and value.shape[0] == 1:
            self.settings.refuse(
                "a convolution with one output channel is not merged", tensor=factors.down
            )
        made = LowRank(value, down, up, scale, dtype, magnitude)
        if magnitude is not None and of_columns:
            made = dataclasses.replace(made, whole=dataclasses.replace(made, magnitude=None))
        return made

    def _put_rows(self, module: str, name: str) -> None:
        """Put the trained rows of single tokens in the place of the base's."""
        place = self.place(f"{module.removesuffix('.token_adapter')}.weight", name)
        indices, value, rows = self.settings.indices(module), self.now(place), self.adapter[name]
        if indices is None or len(indices) != rows.shape[0] or len({*indices}) != len(indices):
            self.settings.refuse(
                "does not go with the token indices of adapter_config.json",
                tensor=name,
                expected=f"{rows.shape[0]} different indices",
                found="none" if indices is None else f"{len(indices)}",
            )
        if rows.shape[1:] != value.shape[1:] or not all(0 <= i < value.shape[0] for i in indices):
            self.misfit(name, value.shape, rows.shape)
        self.claim(f"{place} (rows)", name)
        new = expression.cast(rows, self.dtype(place))
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

    def misfit(self, tensor: str, expected: tuple[int, ...], found: tuple[int, ...]) -> NoReturn:
        """Refuse a tensor of another shape than its place.

        Raises:
            StageRefused: always.
        """
        self.settings.refuse(
            "does not fit the base",
            tensor=tensor,
            expected=f"shape {expected}",
            found=f"shape {found}",
            hint="is it the right base? name another with `base:`",
        )


def _wanted(keys: Keys, merge: Merge) -> tuple[Iterable[str], Callable[[str, str], bool]]:
    """Return the names that an adapter asks for, and whether its tensor may go into one of the base."""
    shapes: dict[str, tuple[int, ...]] = {
        target: merge.adapter[name].shape for target, name in keys.values.items()
    }
    products: set[str] = set()
    for module, factors in keys.factors.items():
        if factors.down is not None and factors.up is not None and not module.endswith(_WRAPPED):
            down, up = merge.adapter[factors.down].shape, merge.adapter[factors.up].shape
            shapes[f"{module}.weight"] = (up[0], *down[1:])
            products.add(f"{module}.weight")
    shapes |= {
        f"{module}.weight": merge.adapter[name].shape for module, name in keys.tokens.items()
    }

    whole = {*shapes} - products

    def fits(name: str, tensor: str) -> bool:
        shape, place = shapes[name], merge.base[merge.twins.get(tensor, tensor)].shape
        across = len(place) == 2 and place == shape[::-1]
        return across or place == shape or (name in whole and place[1:] == shape[1:])

    return shapes, fits
