"""Stage `tie`: embedding and head are one tensor or two, decided by what the file holds.

Configs lie: adapters are merged into one of two tied tensors, heads are dropped although the config
says they are apart. So contents are compared (only where dtype and shape are equal, and only the
tensors in question), and the config is corrected to what is published. `models.tying` decides;
this module turns the decision into a draft.
"""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from ckptd.models import configuration, tying
from ckptd.models.tying import Decision, Ties
from ckptd.pipeline.stage import Stage, StageContext, StageOptions
from ckptd.plan.draft import Draft, StageReport


class TieOptions(StageOptions):
    """Options of `tie`."""

    force: bool = False
    """Tie even what differs; the input embedding's content wins."""
    untie: bool = False
    """Write out the missing copy and set the config's flag to false."""

    @model_validator(mode="after")
    def _exclude(self) -> Self:
        if self.force and self.untie:
            raise ValueError("force and untie exclude each other")
        return self


def plan(draft: Draft, options: TieOptions, context: StageContext) -> Draft:
    """Return the draft with tied tensors decided and the config's flag corrected.

    Raises:
        StageRefused: the checkpoint contradicts its own flag, or nobody can say what is tied.
    """
    ties = tying.find(draft.config, draft.tensors, path=context.source_path)
    same: dict[tuple[str, str], bool] = {}
    undecided = set()
    for anchor, other in ties.pairs:
        found = context.same_content(draft.tensors[anchor], draft.tensors[other])
        if found is None:
            found = _expected(ties, other)
            if not found:
                undecided.add(other)
        same[anchor, other] = found
    decision = tying.decide(ties, same=same, force=options.force, untie=options.untie)
    report = StageReport(
        stage="tie",
        summary=_summary(decision),
        facts={
            "architecture": ties.architecture.name,
            "groups": [
                {"source": r.source, "outcome": str(r.outcome), "names": list(r.names)}
                for r in decision.results
            ],
            "config": {write.key: write.value for write in decision.writes},
        },
        warnings=decision.notes,
    )
    return _applied(draft, decision, report, frozenset(undecided))


def _applied(
    draft: Draft, decision: Decision, report: StageReport, undecided: frozenset[str]
) -> Draft:
    tensors, home = dict(draft.tensors), dict(draft.home)
    for source, target in decision.copies:
        tensors[target], home[target] = tensors[source], home[source]
    for name in decision.drops:
        tensors.pop(name, None)
    if renames := dict(decision.renames):
        tensors = {renames.get(name, name): value for name, value in tensors.items()}
        home = {renames.get(name, name): file for name, file in home.items()}
    config = draft.config
    if decision.writes:
        config = configuration.written(config, decision.writes)
    return draft.with_report(
        report,
        tensors=tensors,
        home=home,
        config=config,
        undecided=draft.undecided | undecided,
    )


def _expected(ties: Ties, name: str) -> bool:
    """What the flag in effect says of a name, for a pass that does not compare."""
    flags = [t.flag for group in ties.groups for t in group.targets if t.name == name]
    return all(flag.value(ties.config) for flag in flags)


def _summary(decision: Decision) -> str:
    if not decision.results:
        return "nothing to tie"
    return "; ".join(
        f"{result.source}: {result.outcome}"
        + (f" ({', '.join(result.names)})" if result.names else "")
        for result in decision.results
    )


STAGE = Stage(
    name="tie",
    summary="decide by content whether embedding and head are one tensor",
    options=TieOptions,
    plan=plan,
    rank=10,
)
