"""Where one checkpoint goes: a definition's push with the placeholders of that checkpoint.

The daemon resolves it to key the job, the runner to publish; both get the same answer, for it
depends on the checkpoint alone and never on the clock.
"""

from __future__ import annotations

import datetime

from ckptd.checkpoint.checkpoint import Checkpoint
from ckptd.pipeline.definition import Push
from ckptd.pipeline.placeholders import Values


def resolve(
    push: Push, source: Checkpoint, *, run: str, digest: str | None, model_type: str | None
) -> Push:
    """Return `push` with every placeholder filled in.

    `digest` is the content digest, `sha256:` and hexadecimal digits; `model_type` the checkpoint's,
    or that of an adapter's base (`origins.model_type`).

    Raises:
        CheckpointUnsupported: the checkpoint has no value for a placeholder, or a resolved name
            cannot be used.
    """
    newest_ns = max(stamp.mtime_ns for stamp in source.stamps.values())
    day = datetime.datetime.fromtimestamp(newest_ns / 1e9, tz=datetime.UTC).date()
    return push.resolved(
        Values(
            source_path=source.path,
            run=run,
            name=source.name,
            step=source.step,
            model_type=model_type,
            digest=(digest or "").rpartition(":")[2][:12],
            date=day.isoformat(),
        )
    )


def describe(push: Push | None) -> str:
    """Return a resolved push as one word: `acme/run@main`, with `#pr` for a pull request.

    Two jobs with equal content, pipeline and this are the same job. Empty where nothing is pushed.
    """
    if push is None:
        return ""
    return f"{push.repo_id}@{push.revision or 'main'}" + ("#pr" if push.create_pr else "")
