"""Pipeline definitions: what is watched, what is done, where it is published.

A definition is a YAML file, read once and strictly: unknown keys, unknown stages or placeholders,
wrong units, names the Hub or git would refuse and stages in an order that cannot work are all
reported at once, each with its place. What passes is a frozen `Definition`. It travels to runner
processes as JSON: `Definition.model_validate(definition.dump())` gives an equal one.

Stages are known to the registry; functions here take another mapping for tests. This module checks
the form of stage options, never whether they fit a checkpoint: that is the plan's business.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from ckptd import errors
from ckptd.checkpoint import layouts
from ckptd.pipeline import complaints, locate, names, placeholders, registry
from ckptd.pipeline.complaints import StageKind
from ckptd.pipeline.stage import Seconds
from ckptd.pipeline.staged import Staging
from ckptd.pipeline.take import Take

MAIN = "main"
DIGEST_FORMAT = 1
"""Raised when ckptd itself starts to make other bytes of the same stages."""

_PIPELINE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,2})?")

FolderPath = Annotated[Path, Field(strict=False), PlainSerializer(str)]


_CLEANED = {
    "repo_id": placeholders.clean_repo_name,
    "revision": placeholders.clean_ref_name,
    "git_tag": placeholders.clean_ref_name,
}
_NAME_CHECKS = {
    "repo_id": names.check_repo_id,
    "revision": names.check_revision,
    "git_tag": names.check_git_tag,
}


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )


class Watch(_Strict):
    """One place where checkpoints appear."""

    path: str
    """Absolute glob of checkpoint folders, or of single weight files: `/runs/*/checkpoint-*`. The
    part before the first wildcard is the root: pins live in its `.ckptd` folder."""
    layout: str = "auto"
    """What kind of trainer writes here; `auto` recognises it for each checkpoint."""
    settle: Seconds = 10.0
    """How long nothing may change before a checkpoint is judged. Trainers write files after the
    last one that matters, so less than a few seconds is a risk; default 10s."""
    done_file: str | None = None
    """Name or glob, inside the checkpoint, of the file your trainer writes when all is done; where
    it is given, a checkpoint without it is never taken."""

    @field_validator("path")
    @classmethod
    def _check_path(cls, text: str) -> str:
        parts = PurePosixPath(text).parts
        if not text.startswith("/"):
            raise ValueError(f"must be an absolute path, found {text!r}")
        if ".." in parts or "**" in text:
            raise ValueError(f"neither '..' nor '**': spell every level out, found {text!r}")
        if len(parts) < 3 or any(character in parts[1] for character in "*?["):
            raise ValueError(f"must begin with a folder that is spelled out, found {text!r}")
        if any(part.startswith(".") for part in parts[1:]):
            raise ValueError(f"names that begin with a dot are never watched, found {text!r}")
        return text

    @field_validator("layout")
    @classmethod
    def _check_layout(cls, name: str) -> str:
        known = ("auto", *layouts.LAYOUTS)
        if name not in known:
            raise ValueError(locate.unknown("layout", name, known))
        return name

    @field_validator("done_file")
    @classmethod
    def _check_done_file(cls, text: str | None) -> str | None:
        if text is not None:
            parts = PurePosixPath(text).parts
            if not parts or text.startswith("/") or ".." in parts:
                raise ValueError(f"must be a name or glob inside the checkpoint, found {text!r}")
        return text


class Push(_Strict):
    """Where and how a finished model is published: one commit."""

    repo_id: str
    """`owner/name`; made on the first push if it does not exist. Takes placeholders."""
    revision: str | None = MAIN
    """Branch that gets the commit, made if it does not exist, or `refs/pr/N` to add to a pull
    request. `main`: one branch with a commit for each checkpoint; `step-{step}`: a branch for each.
    null means the repo's default branch. Takes placeholders."""
    forward_only: bool = False
    """The branch holds the newest step and never goes back: a step below one of the same run that
    it already got is skipped, with the reason, also where somebody retries it."""
    create_pr: bool = False
    """Open a new pull request against main for each checkpoint instead of committing to it."""
    private: bool | None = None
    """Whether a repo that has to be made is private; null leaves it to the owner's default."""
    commit_message: str | None = None
    """First line of the commit, title of the pull request. Takes placeholders. Default: the run
    with its step, or with the checkpoint's name where there is no step."""
    commit_description: str | None = None
    """Text below the first line; ckptd adds a line with the push id. Takes placeholders."""
    tags: list[str] = []
    """Tags merged into the model card; what the card holds already stays. Takes placeholders."""
    git_tag: str | None = None
    """Git tag set on exactly that commit, such as `step-{step}`. Takes placeholders."""

    @field_validator("repo_id")
    @classmethod
    def _check_repo_id(cls, text: str) -> str:
        names.check_repo_id(placeholders.sample(text))
        return text

    @field_validator("revision")
    @classmethod
    def _check_revision(cls, text: str | None) -> str | None:
        if text is not None:
            names.check_revision(placeholders.sample(text))
        return text

    @field_validator("git_tag")
    @classmethod
    def _check_git_tag(cls, text: str | None) -> str | None:
        if text is not None:
            names.check_git_tag(placeholders.sample(text))
        return text

    @field_validator("commit_message", "commit_description")
    @classmethod
    def _check_text(cls, text: str | None) -> str | None:
        if text is not None and not placeholders.sample(text).strip():
            raise ValueError("must not be empty")
        return text

    @field_validator("tags")
    @classmethod
    def _check_tags(cls, tags: list[str]) -> list[str]:
        for tag in tags:
            if not placeholders.sample(tag).strip():
                raise ValueError("a tag must not be empty")
        return tags

    @field_validator("forward_only")
    @classmethod
    def _check_forward_only(cls, forward_only: bool, info: ValidationInfo) -> bool:
        revision = info.data.get("revision") or MAIN
        if forward_only and {"step", "name", "digest"} & set(placeholders.used(revision)):
            raise ValueError(
                f"is for one branch of many checkpoints: it does not go with revision {revision!r}"
            )
        return forward_only

    @field_validator("create_pr")
    @classmethod
    def _check_create_pr(cls, create_pr: bool, info: ValidationInfo) -> bool:
        revision = info.data.get("revision")
        if create_pr and revision not in (None, MAIN):
            raise ValueError(
                f"opens pull requests against {MAIN}: it does not go with revision {revision!r}"
            )
        if create_pr and info.data.get("forward_only"):
            raise ValueError("commits to no branch: it does not go with forward_only")
        return create_pr

    def resolved(self, values: placeholders.Values) -> Push:
        """Return this push with the placeholders of one checkpoint filled in and checked again.

        Raises:
            CheckpointUnsupported: the checkpoint lacks a value (no step), or a resolved name is
                one that the Hub or git would refuse.
        """
        data = self.model_dump()
        if self.commit_message is None:
            by_step, by_name = "{run} at step {step}", "{run}/{name}"
            data["commit_message"] = by_name if values.step is None else by_step
        for field in ("repo_id", "revision", "commit_message", "commit_description", "git_tag"):
            if data[field] is not None:
                data[field] = placeholders.resolve(
                    data[field],
                    values,
                    field=f"push.{field}",
                    clean=_CLEANED.get(field, placeholders.clean_text),
                )
        data["tags"] = [placeholders.resolve(tag, values, field="push.tags") for tag in self.tags]
        for field, check in _NAME_CHECKS.items():
            try:
                if data[field] is not None:
                    check(data[field])
            except ValueError as exc:
                raise errors.CheckpointUnsupported(
                    f"push.{field} resolves to a name that cannot be used: {exc}",
                    path=values.source_path,
                    hint="rename the run, or write another name into the definition",
                ) from exc
        return self.model_copy(update=data)


class StageCall(_Strict):
    """One step of a pipeline: a stage by name, with its options resolved.

    In the file it is the name alone (`- tie`) or the name with options (`- resize: {to: 32064}`).
    """

    name: str
    options: SerializeAsAny[BaseModel]

    @model_validator(mode="wrap")
    @classmethod
    def _parse(
        cls, entry: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> StageCall:
        if isinstance(entry, StageCall):
            return entry
        stages = _stages(info)
        name, options = complaints.stage_entry(entry, stages)
        try:
            # As JSON: there, strict models take a list for a tuple and text for an enum.
            resolved = stages[name].options.model_validate_json(json.dumps(options))
        except ValidationError as exc:
            raise complaints.under((name,), exc) from exc
        return cls.model_construct(name=name, options=resolved)

    @model_serializer
    def _dump(self) -> dict[str, Any]:
        return {self.name: self.options.model_dump(mode="json")}


class Definition(_Strict):
    """One pipeline definition, checked."""

    pipeline: str
    """Name of this pipeline, shown wherever its jobs are: small letters, digits, `-`, `_`, `.`."""
    watch: list[Watch] = []
    """Where `ckptd serve` looks for checkpoints; `ckptd run` does not need it."""
    take: Take = "all"
    """Which of them become jobs of `ckptd serve`: `all`, `newest` (a step that was not started is
    skipped once a newer one of its run is complete), or `{every: N}` (steps that N divides)."""
    device: str = "auto"
    """Where stages compute: `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:1`."""
    assets: FolderPath | None = None
    """Absolute path of a folder with config.json, tokenizer and so on, for trainers that write
    none of these into their checkpoints."""
    stages: list[StageCall] = Field(min_length=1)
    """What is done to the weights, in this order."""
    push: Push | None = None
    """Where the result is published; null or absent: nowhere (`ckptd run -o DIR` keeps it)."""
    staging: Staging = None
    """Where weights lie until the commit: `disk`, or `none`: each file is made while it is sent, and
    needs no room. Goes with `push`, without `verify` and `-o`. null: as the setting `staging` says."""

    @field_validator("pipeline")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not _PIPELINE_NAME.fullmatch(name):
            raise ValueError(f"small letters, digits, '-', '_' and '.', at most 64, found {name!r}")
        return name

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        if not _DEVICE.fullmatch(device):
            raise ValueError(f"must be auto, cpu, cuda or cuda:N, found {device!r}")
        return device

    @field_validator("assets")
    @classmethod
    def _check_assets(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_absolute():
            raise ValueError(f"must be an absolute path, found {str(path)!r}")
        return path

    @field_validator("watch")
    @classmethod
    def _check_watches(cls, watches: list[Watch]) -> list[Watch]:
        complaints.refuse_repeats([watch.path for watch in watches], "path")
        return watches

    @field_validator("stages", mode="wrap")
    @classmethod
    def _check_order(
        cls, entries: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo
    ) -> list[StageCall]:
        wrong_order = complaints.stage_order(entries, _stages(info))
        try:
            calls: list[StageCall] = handler(entries)
        except ValidationError as exc:
            raise complaints.under((), exc, more=wrong_order) from exc
        if wrong_order:
            raise complaints.invalid(wrong_order)
        return calls

    def dump(self) -> dict[str, Any]:
        """Return this definition as JSON values; `Definition.model_validate` takes them back."""
        return self.model_dump(mode="json")


def load_definition(path: Path, *, stages: Mapping[str, StageKind] | None = None) -> Definition:
    """Return the definition in the file at `path`.

    Raises:
        DefinitionError: the file cannot be read or is invalid; holds every problem.
    """
    return parse_definition(locate.read(path), path, stages=stages)


def parse_definition(
    text: str, path: Path | str, *, stages: Mapping[str, StageKind] | None = None
) -> Definition:
    """Return the definition that `text` holds; `path` is named in problems.

    Raises:
        DefinitionError: holds every problem with its line, column and field.
    """
    document = locate.parse(text, path)
    known = known_stages(stages)
    try:
        return Definition.model_validate(document.data, context={"stages": known})
    except ValidationError as exc:
        problems = locate.problems(exc, document, lambda loc: _keys_at(loc, known))
        raise errors.DefinitionError(problems) from exc


def pipeline_digest(definition: Definition) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of what decides the published bytes.

    That is every stage with all its options resolved, in order, and the assets folder; not what is
    watched, not the device, not where the result is pushed.
    """
    dump = definition.dump()
    decisive = {
        "format": DIGEST_FORMAT,
        "stages": dump["stages"],
        "assets": dump["assets"],
    }
    canonical = json.dumps(decisive, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def known_stages(stages: Mapping[str, StageKind] | None) -> Mapping[str, StageKind]:
    """Return `stages`, or those of the registry."""
    return registry.STAGES if stages is None else stages


def _stages(info: ValidationInfo) -> Mapping[str, StageKind]:
    return known_stages((info.context or {}).get("stages"))


def _keys_at(loc: locate.Loc, stages: Mapping[str, StageKind]) -> Collection[str]:
    """Return the keys that the mapping at `loc` of a definition may have."""
    match loc:
        case ():
            return Definition.model_fields
        case ("watch", int()):
            return Watch.model_fields
        case ("push",):
            return Push.model_fields
        case ("stages", int(), str(name)) if name in stages:
            return stages[name].options.model_fields
    return ()
