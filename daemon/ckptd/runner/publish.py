"""A job's output on the Hub: the runner's files given to the Hub's publisher.

This module imports the Hub's client (some tenths of a second, tens of MB); jobs that do not push
never load it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ckptd.aio.backoff import Backoff
from ckptd.hub import push as hub_push
from ckptd.hub.card import LIBRARY, NOTHING, Facts
from ckptd.hub.client import HubClient
from ckptd.hub.publisher import HubEvent, LocalFile, Publisher, Target
from ckptd.hub.push import Content
from ckptd.pipeline import target
from ckptd.pipeline.definition import Push
from ckptd.runner.output import OutputFile


class HubPush:
    """One push of one output; `push` has its placeholders resolved."""

    def __init__(
        self,
        *,
        push: Push,
        content_digest: str,
        pipeline_digest: str,
        endpoint: str | None,
        patience: Backoff | None,
        upload_limit: int | None = None,
        library: str = LIBRARY,
        card_facts: Facts = NOTHING,
        report: Callable[[HubEvent], None],
    ) -> None:
        self._publisher = Publisher(
            target=Target(
                repo_id=push.repo_id,
                revision=push.revision,
                create_pr=push.create_pr,
                private=push.private,
                commit_message=push.commit_message or push.repo_id,
                commit_description=push.commit_description,
                card_tags=tuple(push.tags),
                git_tag=push.git_tag,
                card_library=library,
                card_facts=card_facts,
            ),
            push_id=hub_push.push_id(
                content_digest=content_digest,
                pipeline_digest=pipeline_digest,
                target=target.describe(push),
            ),
            hub=HubClient(endpoint=endpoint, upload_limit=upload_limit),
            report=report,
            patience=patience,
        )
        self._streamed: dict[str, LocalFile] = {}

    async def open(self) -> None:
        """Check token, repo, revision and card; create what is absent.

        Raises:
            HubError: the Hub refused or cannot be reached; nothing was sent.
        """
        await self._publisher.open()

    async def upload(self, file: OutputFile, content: Content | None = None) -> str | None:
        """Send one finished file and return the sha256 that the Hub has; None for a small one.

        One that lies nowhere comes with its `content`, which is read as often as need be until the
        commit is made.

        Raises:
            HubError: after the publisher's own retries.
            ContentFailed: the content could not be made; the cause says why.
        """
        local = _local(file)
        if content is not None:
            local = dataclasses.replace(local, content=content)
            self._streamed[file.name] = local
        return await self._publisher.upload(local)

    async def commit(
        self, files: tuple[OutputFile, ...], *, card_section: str | None = None
    ) -> dict[str, Any]:
        """Make the one commit, verify and tag it; return the fields of an `Outcome`.

        `card_section` is what ckptd says of the model in its card.

        Raises:
            HubError: after the publisher's own retries; nothing half-published.
            CheckFailed: what stands on the Hub is not what was sent.
        """
        made = await self._publisher.commit(
            [self._streamed.get(file.name) or _local(file) for file in files],
            card_section=card_section,
        )
        fields = ("repo_id", "revision", "commit", "commit_url", "pr_num", "pr_url", "git_tag")
        outcome = {field: getattr(made, field) for field in fields}
        if not made.created:
            outcome["reason"] = "the Hub held exactly these files already"
        return outcome


def _local(file: OutputFile) -> LocalFile:
    return LocalFile(path=file.path, path_in_repo=file.name, nbytes=file.nbytes, sha256=file.sha256)
