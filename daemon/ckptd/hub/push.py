"""The values of one push: where it goes, what goes there, what came of it, what happened meanwhile.

Pure. Owns the push id and the texts that carry it; knows nothing of the network.
"""

from __future__ import annotations

import enum
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from ckptd import errors
from ckptd.hub import card

MAIN = "main"
_LINE_START = "ckptd-push-id: "
LONGEST_TITLE_CHARS = 200
"""The Hub takes pull request titles of 3 to 200 characters; commits get the same bound."""
LONGEST_DESCRIPTION_CHARS = 60_000
"""The Hub refuses comments above 65,536 characters; the push id needs some of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a push goes and what it is called; every placeholder is resolved."""

    repo_id: str
    """`namespace/name` of a model repo."""
    revision: str | None = MAIN
    """A branch, made from main when absent; None means main."""
    create_pr: bool = False
    """Publish as a pull request against main instead of a commit on `revision`."""
    private: bool | None = None
    """Visibility of a repo made by this push. True also refuses an existing public repo."""
    commit_message: str
    """The first line becomes the title, further lines join the description."""
    commit_description: str | None = None
    card_tags: tuple[str, ...] = ()
    """Merged into the tags of the revision's README.md; empty leaves the card alone."""
    card_library: str = "transformers"
    """`library_name` for a card that has none."""
    card_facts: card.Facts = card.NOTHING
    """What else is known of the model, for a card that lacks it."""
    git_tag: str | None = None
    """A git tag put on exactly the commit of this push."""


class Content(Protocol):
    """The bytes of a file that lies nowhere; the same ones whenever they are read."""

    @property
    def failure(self) -> Exception | None:
        """Why they could not be read, where that happened."""

    def open(self) -> io.BufferedIOBase:
        """Return the file at its beginning, for one reader, who closes it."""

    def digest(self) -> str:
        """Return the hex sha256 of all of it; read for that once. Blocks."""

    def was_sent(self) -> bool:
        """Say whether an earlier attempt has sent it; only once, for who asks again has lost it."""

    def check(self) -> None:
        """Raise SourceChanged where what it is made from has changed since it was planned."""


class ContentFailed(errors.CkptdError):
    """The bytes of a file could not be made while they were sent; the cause says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalFile:
    """A durable file that nobody writes any more and that stays until the commit is confirmed.

    With `content` it is read from there instead, and nothing lies at `path`.
    """

    path: Path
    path_in_repo: str
    nbytes: int
    sha256: str | None = None
    """Hex digest of the whole file where known: then nothing here reads the file to hash it."""
    content: Content | None = None

    def open(self) -> BinaryIO | io.BufferedIOBase:
        """Return the file, open for reading."""
        return self.path.open("rb") if self.content is None else self.content.open()


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What a push left on the Hub."""

    repo_id: str
    revision: str
    """The branch, or `refs/pr/N`."""
    commit: str
    commit_url: str
    pr_num: int | None = None
    pr_url: str | None = None
    git_tag: str | None = None
    created: bool
    """False: the Hub already held this push or exactly these files; no commit was made now."""


class Happening(enum.Enum):
    """What a `HubEvent` tells."""

    REPO_CREATED = "repo_created"
    REPO_MOVED = "repo_moved"
    """The repo was renamed; `text` is its name now, under which the push goes on."""
    BRANCH_CREATED = "branch_created"
    UPLOADING = "uploading"
    """`done_bytes` of `nbytes` of `path_in_repo` were handed to the network so far."""
    UPLOADED = "uploaded"
    SENT_AGAIN = "sent_again"
    """What was sent did not arrive as it was; `text` says what the Hub made of it."""
    BEGUN_AGAIN = "begun_again"
    """Repo or branch went away during the push; they were made anew. `text` says what was missed."""
    WAITING = "waiting"
    """A call failed and is tried again after `wait_s`; `text` says what failed."""
    REBASED = "rebased"
    """Somebody else's commit came first; the commit is tried again on top of it."""
    KEPT = "kept"
    """Weights that somebody else pushed meanwhile stay beside ours; `text` names them."""
    XET_OFF = "xet_off"
    """Uploads of this process go over LFS from here on; `text` says why."""
    PR_CREATED = "pr_created"
    PR_OPENED = "pr_opened"
    COMMITTED = "committed"
    VERIFIED = "verified"
    TAGGED = "tagged"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubEvent:
    """One thing that happened during a push; fields that do not apply are None."""

    happening: Happening
    text: str = ""
    path_in_repo: str | None = None
    done_bytes: int | None = None
    nbytes: int | None = None
    wait_s: float | None = None
    commit: str | None = None
    pr_num: int | None = None


def push_id(*, content_digest: str, pipeline_digest: str, target: str) -> str:
    """Return the id of the push of this content through this pipeline to this target.

    32 hex digits; the same arguments always give the same id, so that a job that runs again finds
    what it did before.
    """
    parts = "\n".join((content_digest, pipeline_digest, target))
    return hashlib.sha256(parts.encode()).hexdigest()[:32]


def push_id_line(push_id: str) -> str:
    """Return the line that marks a commit or a pull request as made by this push."""
    return f"{_LINE_START}{push_id}"


def carried(text: str) -> list[str]:
    """Return the push ids that `text` has whole lines of."""
    lines = (line.strip() for line in text.splitlines())
    return [line.removeprefix(_LINE_START) for line in lines if line.startswith(_LINE_START)]


def carries(text: str, push_id: str) -> bool:
    """Say whether `text` has the whole line of this push id (an id that begins alike is not it)."""
    return push_id in carried(text)


def is_ours(text: str) -> bool:
    """Say whether `text` has the line of any push id: ckptd made it, whichever job it was."""
    return bool(carried(text))


def title(target: Target) -> str:
    """Return the commit title: the first line of the message, within what the Hub takes."""
    first = (target.commit_message.strip().splitlines() or [""])[0].strip()
    if len(first) > LONGEST_TITLE_CHARS:
        return first[: LONGEST_TITLE_CHARS - 1].rstrip() + "…"
    return first if len(first) >= 3 else f"Publish {target.repo_id} {first}".strip()


def description(target: Target, push_id: str) -> str:
    """Return the commit description: what the title had no room for, the user's text, the push id."""
    message = target.commit_message.strip()
    first, _, rest = message.partition("\n")
    parts = [message] if title(target) != first.strip() else [rest.strip()]
    parts.append((target.commit_description or "").strip())
    text = "\n\n".join(part for part in parts if part)
    if len(text) > LONGEST_DESCRIPTION_CHARS:
        text = text[: LONGEST_DESCRIPTION_CHARS - 1].rstrip() + "…"
    return f"{text}\n\n{push_id_line(push_id)}" if text else push_id_line(push_id)
