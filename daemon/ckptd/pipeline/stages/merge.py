"""Stage `merge`: an adapter put into its base model, which is what goes on from there.

Each weight is computed in float32 and rounded once to the base's dtype; a quantized base is made
plain first, its merged weights in float32. What the adapter does not touch stays the base's, byte
for byte. Embedding and head that training has made different are published apart, whatever the
base's config said. Config and code come from the base, tokenizer and the like from the trainer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ckptd.checkpoint import adapter_files
from ckptd.checkpoint.beside import SideFile
from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import StageRefused
from ckptd.models import configuration, embeddings, tying
from ckptd.models.ties import TieGroup
from ckptd.pipeline.adapter import heads, places
from ckptd.pipeline.adapter import keys as adapter_keys
from ckptd.pipeline.adapter import settings as adapter_settings
from ckptd.pipeline.adapter.merging import Merge
from ckptd.pipeline.stage import Base, Stage, StageContext, StageOptions
from ckptd.pipeline.stages import dequantize, tie
from ckptd.plan import draft as drafts
from ckptd.plan.draft import Draft, StageReport
from ckptd.plan.nodes import Changed, Concat, Expression, LowRank
from ckptd.quant import registry, stored

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of one tokenizer: those of two must not be mixed."""
_NOT_THE_MODELS = ("README.md", adapter_files.CONFIG_NAME, adapter_files.VALUE_HEAD_NAME)
"""Files that speak of the adapter, or of the base, and not of what is made of the two."""


_METHODS = {"LORA": "LoRA", "TRAINABLE_TOKENS": "trainable tokens", "ADALORA": "AdaLoRA"}
"""What PEFT's methods are called, as far as that is no abbreviation."""


class MergeOptions(StageOptions):
    """Options of `merge`."""

    base: str | None = None
    """The base model: a folder, or `owner/name@revision` on the Hub. By default the one that the
    adapter names (base_model_name_or_path in its adapter_config.json)."""


def plan(draft: Draft, options: MergeOptions, context: StageContext) -> Draft:
    """Return the draft of the merged model.

    Raises:
        StageRefused: no adapter, a method that is not merged, or a tensor without a place.
        CheckpointUnsupported, CheckpointCorrupt: the base is quantized and cannot be made plain.
    """
    base = _base_of(draft, context)
    config_path = draft.config_path
    settings = adapter_settings.read(adapter_files.read_config(config_path), config_path)
    keys = adapter_keys.parse(draft.tensors)
    start, exact = _plain_base(base.source, context)
    groups = _groups(start)
    twins = _twins(start, groups)
    merge = Merge(
        settings=settings,
        config=start.config,
        adapter=draft.tensors,
        base=start.tensors,
        exact=exact,
        twins=twins,
        places=places.of(start.config, start.tensors, twins),
    )
    merge.run(keys)
    _settle_twins(merge, start, groups)
    merged = _with_tensors(start, merge, groups)
    merged = _resized(merged, start, merge, context)
    merged = heads.added(merged, merge.heads, settings)
    changed = dataclasses.replace(
        merged,
        side_files=_side_files(draft, start),
        reports=(*draft.reports, *start.reports),
        others=(*draft.others, *(str(stamp) for stamp in base.source.stamps.values())),
    )
    report = _report(merge, base, keys.originals, draft.side_files)
    changed = changed.with_report(report)
    touched = {*merge.made} & {name for group in groups for name in _members(group)}
    return tie.plan(changed, tie.TieOptions(), context) if touched else changed


def _base_of(draft: Draft, context: StageContext) -> Base:
    if not draft.adapter or context.base is None:
        raise StageRefused(
            "is not an adapter: there is nothing to merge",
            stage="merge",
            path=context.source_path,
            expected=f"{adapter_files.WEIGHTS_NAME} and {adapter_files.CONFIG_NAME}",
            hint="leave the stage merge out for whole models",
        )
    return context.base


def _plain_base(base: Checkpoint, context: StageContext) -> tuple[Draft, Mapping[str, Expression]]:
    """Return the base as a plain draft, and its weights before any rounding."""
    start = drafts.from_checkpoint(base)
    if start.adapter:
        raise StageRefused(
            "the base is an adapter itself",
            stage="merge",
            path=base.path,
            hint="merge that one into its own base first, and name the result with `base:`",
        )
    quantized = stored.of_checkpoint(base)
    if registry.choose(quantized) is None:
        return start, start.tensors
    inner = dataclasses.replace(context, source_path=base.path, stored=quantized)
    plain = dequantize.plan(start, dequantize.DequantizeOptions(), inner)
    exact = dequantize.plan(start, dequantize.DequantizeOptions(dtype=Dtype.F32), inner)
    return plain, exact.tensors


def _groups(start: Draft) -> tuple[TieGroup, ...]:
    """Return what may be tied in the base; nothing where nobody knows its class."""
    try:
        return tying.find(start.config, start.tensors, path=start.config_path.parent).groups
    except StageRefused:
        return ()


def _members(group: TieGroup) -> list[str]:
    return [group.source, group.anchor, *(target.name for target in group.targets)]


def _tied(group: TieGroup, start: Draft) -> list[str]:
    """Return the tensors that are the anchor's own, by the config."""
    mine = [t.name for t in group.targets if t.alias or t.flag.value(start.config)]
    return [name for name in dict.fromkeys([group.source, *mine]) if name != group.anchor]


def _twins(start: Draft, groups: tuple[TieGroup, ...]) -> dict[str, str]:
    return {
        name: group.anchor
        for group in groups
        for name in _tied(group, start)
        if name not in start.tensors
    }


def _settle_twins(merge: Merge, start: Draft, groups: tuple[TieGroup, ...]) -> None:
    """Let what is tied follow its twin where PEFT kept them one, and stand apart where it did not.

    Training looks at each use of a tied weight: an adapter on one of them leaves the other as it
    was. Rows of single tokens and vocabularies in a new size belong to both.
    """
    for group in groups:
        anchor, twins = group.anchor, _tied(group, start)
        aliases = {t.name for t in group.targets if t.alias}
        together = merge.settings.ties_weights or anchor not in merge.trained
        for name in twins:
            if name in merge.made or anchor not in merge.made:
                continue
            keeps_shape = merge.made[anchor].shape == start.tensors[anchor].shape
            if together:
                if name in start.tensors:
                    merge.made[name] = merge.made[anchor]
            elif name not in start.tensors and name not in aliases and keeps_shape:
                merge.made[name] = start.tensors[anchor]


def _with_tensors(start: Draft, merge: Merge, groups: tuple[TieGroup, ...]) -> Draft:
    tensors, home = dict(start.tensors), dict(start.home)
    for name, value in merge.made.items():
        tensors[name] = value
        if name not in home:
            anchors = (group.anchor for group in groups if name in _members(group))
            home[name] = home[next(anchors)]
    return dataclasses.replace(start, tensors=tensors, home=home)


def _resized(merged: Draft, start: Draft, merge: Merge, context: StageContext) -> Draft:
    """Return the draft with the config's sizes set where the vocabulary has another size.

    Raises:
        StageRefused: a tensor that has no vocabulary rows has another shape than in the base.
    """
    new = [n for n in merge.made if n in start.tensors and _shapes_differ(n, merged, start)]
    if not new:
        return merged
    vocabulary = embeddings.find(merged.config, merged.tensors, path=context.source_path)
    rows = {tensor.name: tensor.rows for tensor in vocabulary.tensors}
    for name in new:
        if name not in rows:
            merge.settings.refuse(
                "has another shape than in the base, and no vocabulary rows",
                tensor=name,
                expected=str(start.tensors[name].shape),
                found=str(merged.tensors[name].shape),
            )
    for name, count in rows.items():
        if count != vocabulary.rows:
            merge.settings.refuse(
                "has another number of vocabulary rows than the embedding",
                tensor=name,
                expected=str(vocabulary.rows),
                found=str(count),
                hint="the adapter was saved without it: add it to modules_to_save, or save with "
                "save_embedding_layers=True",
            )
    config = configuration.written(merged.config, vocabulary.writes(vocabulary.rows))
    return dataclasses.replace(merged, config=config)


def _shapes_differ(name: str, merged: Draft, start: Draft) -> bool:
    return merged.tensors[name].shape != start.tensors[name].shape


def _side_files(adapter: Draft, start: Draft) -> tuple[SideFile, ...]:
    """Return the trainer's files, and the base's where the trainer has none of that kind."""
    own = {f.relpath: f for f in adapter.side_files if f.relpath not in _NOT_THE_MODELS}
    has_tokenizer = any(name in own for name in ("tokenizer.json", "tokenizer_config.json"))
    for file in start.side_files:
        mixed = has_tokenizer and file.relpath in _TOKENIZER
        if file.relpath not in own and not mixed and file.relpath not in _NOT_THE_MODELS:
            own[file.relpath] = file
    return tuple(own[name] for name in sorted(own))


def _report(
    merge: Merge, base: Base, originals: list[str], files: tuple[SideFile, ...]
) -> StageReport:
    method = _METHODS.get(merge.settings.method, merge.settings.method)
    method = "DoRA" if merge.settings.dora else method
    whole = len(merge.replaced) + len([n for n in merge.trained if not _is_sum(merge.made[n])])
    sums = sum(_is_sum(value) for value in merge.made.values())
    done = [f"{sums} weights computed"]
    done += [f"{whole} taken whole"] * (whole > 0)
    done += [f"rows of {', '.join(sorted(merge.rows))} replaced"] * bool(merge.rows)
    done += [f"the head {', '.join(merge.heads)} added"] * bool(merge.heads)
    warnings = []
    if originals:
        warnings.append(f"{len(originals)} copies of the base's own weights were left out")
    if merge.heads:
        warnings.append(
            "the base's files were written for another class of the family: what neither they nor "
            "the adapter hold is new each time the model is loaded; the stage verify finds that"
        )
    if any(file.relpath == adapter_files.VALUE_HEAD_NAME for file in files):
        warnings.append(f"{adapter_files.VALUE_HEAD_NAME} is of no model, and was left out")
    return StageReport(
        stage="merge",
        summary=f"{method} into {base.name}: {', '.join(done)}",
        facts={
            "base": base.name,
            "base_digest": base.digest,
            "method": merge.settings.method,
            "dora": merge.settings.dora,
            "computed": sums,
            "taken": whole,
            "rows": sorted(merge.rows),
        },
        warnings=tuple(warnings),
    )


def _is_sum(value: Expression) -> bool:
    parts = value.parts if isinstance(value, Concat) else ()
    return isinstance(value, LowRank | Changed) or any(_is_sum(part) for part in parts)


STAGE = Stage(
    name="merge",
    summary="an adapter put into its base model",
    options=MergeOptions,
    plan=plan,
    rank=5,
    computes=True,
    takes_adapters=True,
)
