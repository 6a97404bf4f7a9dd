"""Every failure ckptd can name, in one tree.

A class answers three questions: whose fault it is (its place in the tree), whether the job may be
tried again (`retry`), and which exit code the command line gives (`exit_code`). It is raised with
fields; the class writes the text, so that the same failure always reads the same.

    CkptdError                  1
    ├── LeaseLost               1   another worker has the job now (stop working on it)
    ├── UsageError              2   the command line was called wrongly
    ├── DefinitionError         3   a pipeline definition, with every problem and its place
    ├── SettingsError           3   the daemon's settings
    ├── CheckpointRefused       4   the source: this file, this tensor
    │   ├── CheckpointCorrupt       a file contradicts itself or its index
    │   ├── CheckpointIncomplete    something required is not there (yet)
    │   ├── CheckpointUnsupported   whole, but of a kind ckptd does not take
    │   └── StageRefused            a stage cannot do what was asked on this checkpoint
    ├── CheckpointVanished      4   the trainer's rotation was faster than the pin
    ├── SourceChanged           4   the source moved under the running job
    ├── CheckFailed             5   footprint, verification
    ├── HubError                6   the Hub refused or cannot be reached
    │   ├── HubUnauthorized         the token is missing, wrong or expired (waits)
    │   ├── HubForbidden            the token may not do this (waits)
    │   ├── HubFull                 the account's storage or plan is used up (waits)
    │   ├── HubNotFound             no such repo or revision
    │   ├── HubConflict             somebody else moved the revision
    │   ├── HubRejected             a final no: this push can never succeed as it is
    │   └── HubUnavailable          rate limit, 5xx, no connection, time-out (tried again)
    ├── NoSpace                 7   bytes needed, bytes free
    ├── NoMemory                7   the runner needed more memory than it may take (waits)
    └── StorageFailed           7   the output or state folder cannot be written
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path


class Retry(enum.Enum):
    """What a failure means for the job that met it."""

    NEVER = "never"
    """The same job would fail the same way: terminal."""
    LATER = "later"
    """Temporary: try again after a backoff, or after `retry_after_s` where the error has one."""
    WAIT = "wait"
    """Somebody must act first (a token, a permission): keep the job, try again rarely."""


MAX_SIDE = 2000
"""Characters of one part of a text: names and shapes in files may have millions."""


def shortened(text: str) -> str:
    """Return `text`, or its first characters where it is longer than any person reads."""
    return text if len(text) <= MAX_SIDE else f"{text[:MAX_SIDE]}... ({len(text):,} characters)"


class CkptdError(Exception):
    """The root. Subclasses set `exit_code` and `retry`; `hint` says what to do next."""

    exit_code: int = 1
    retry: Retry = Retry.NEVER

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        # Names of files may be no text, and those of tensors half characters: both are escaped.
        message = message.encode("utf-8", "backslashreplace").decode("utf-8")
        super().__init__(message)
        self.message = message
        self.hint = hint

    @property
    def code(self) -> str:
        """The class name, the stable name of this failure in JSON output and job rows."""
        return type(self).__name__

    @property
    def retry_after_s(self) -> float | None:
        """Seconds the other side asked us to wait, where it did."""
        return None

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}; {self.hint}"


class LeaseLost(CkptdError):
    """The worker does not hold the lease of this job (any more) and must stop working on it."""

    def __init__(self, *, job_id: str, worker: str) -> None:
        super().__init__(f"job {job_id}: worker {worker} no longer holds it")
        self.job_id = job_id
        self.worker = worker


class UsageError(CkptdError):
    """The command line was called with arguments that do not fit together."""

    exit_code = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is wrong in a definition: where it stands and what it is."""

    path: str
    line: int
    column: int
    field: str
    what: str

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}:{self.column}"
        return f"{place}: {self.field}: {self.what}" if self.field else f"{place}: {self.what}"


class DefinitionError(CkptdError):
    """A pipeline definition is invalid; every problem of the file is reported at once."""

    exit_code = 3

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


class SettingsError(CkptdError):
    """A setting is missing, unknown or out of range."""

    exit_code = 3


class CheckpointRefused(CkptdError):
    """The checkpoint cannot be used; names the path and, where there is one, the tensor."""

    exit_code = 4

    def __init__(
        self,
        what: str,
        *,
        path: Path | str,
        tensor: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        text = f"{path}: "
        if tensor is not None:
            text += f"tensor {shortened(repr(tensor))}: "
        text += shortened(what)
        if expected is not None or found is not None:
            sides = (("expected", expected), ("found", found))
            shown = (f"{side} {shortened(value)}" for side, value in sides if value)
            text += " (" + ", ".join(shown) + ")"
        super().__init__(text, hint=hint)
        self.path = Path(path)
        self.tensor = tensor
        self.expected = expected
        self.found = found


class CheckpointCorrupt(CheckpointRefused):
    """A file contradicts itself, its size or its index."""


class CheckpointIncomplete(CheckpointRefused):
    """Something the layout requires is absent."""


class CheckpointUnsupported(CheckpointRefused):
    """A whole checkpoint of a kind ckptd does not take (yet); the hint says what would."""


class StageRefused(CheckpointRefused):
    """A stage cannot do what its options ask on this checkpoint."""

    def __init__(
        self,
        what: str,
        *,
        stage: str,
        path: Path | str,
        tensor: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(
            f"stage {stage}: {what}",
            path=path,
            tensor=tensor,
            expected=expected,
            found=found,
            hint=hint,
        )
        self.stage = stage


class CheckpointVanished(CkptdError):
    """The source was deleted before all of it was pinned."""

    exit_code = 4

    def __init__(self, *, path: Path | str) -> None:
        super().__init__(
            f"{path}: the checkpoint was deleted before it was pinned",
            hint="raise the trainer's save_total_limit, or save less often",
        )
        self.path = Path(path)


class SourceChanged(CkptdError):
    """The source was rewritten or truncated under the job: what was read is void.

    The job never runs again; the folder's new content is judged anew and gets a job of its own.
    """

    exit_code = 4

    def __init__(self, *, path: Path | str, expected: str, found: str) -> None:
        super().__init__(
            f"{path}: changed while it was read (expected {expected}, found {found})",
            hint="the new content gets a job of its own once the folder is quiet",
        )
        self.path = Path(path)


class CheckFailed(CkptdError):
    """A check that the definition asks for did not hold."""

    exit_code = 5

    def __init__(self, what: str, *, check: str, hint: str | None = None) -> None:
        super().__init__(f"{check}: {what}", hint=hint)
        self.check = check


class HubError(CkptdError):
    """The Hub refused or could not be reached; never carries a token."""

    exit_code = 6

    def __init__(
        self,
        what: str,
        *,
        repo_id: str | None = None,
        status: int | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
        hint: str | None = None,
    ) -> None:
        text = what if repo_id is None else f"{repo_id}: {what}"
        if status is not None:
            text += f" (HTTP {status}" + (f", request {request_id})" if request_id else ")")
        super().__init__(text, hint=hint)
        self.repo_id = repo_id
        self.status = status
        self._retry_after_s = retry_after_s

    @property
    def retry_after_s(self) -> float | None:
        """Seconds the Hub asked us to wait, where it did."""
        return self._retry_after_s


class HubUnauthorized(HubError):
    """401: the token is missing, wrong or expired."""

    retry = Retry.WAIT


class HubForbidden(HubError):
    """403: the token is good but may not do this."""

    retry = Retry.WAIT


class HubFull(HubError):
    """402, 507 or a refusal that names a quota: the account's storage or plan is used up."""

    retry = Retry.WAIT


class HubNotFound(HubError):
    """404: no such repo, revision or file, or it is hidden from this token."""


class HubConflict(HubError):
    """409 or 412: the revision moved, or the name is taken by something else."""

    retry = Retry.LATER


class HubRejected(HubError):
    """A final no: this push can never succeed as it is (bad card, name...)."""


class HubUnavailable(HubError):
    """429, 5xx, no connection or a time-out: the same request may pass later."""

    retry = Retry.LATER


class NoSpace(CkptdError):
    """The disk has too little room."""

    exit_code = 7
    retry = Retry.LATER

    def __init__(self, *, path: Path | str, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"{path}: no space: needs {needed_bytes:,} bytes, {free_bytes:,} are free",
            hint="free some space or point the output elsewhere",
        )
        self.path = Path(path)
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class NoMemory(CkptdError):
    """A runner needed more memory than it may take, or than there is."""

    exit_code = 7
    retry = Retry.WAIT

    def __init__(self, what: str, *, limit_bytes: int | None) -> None:
        limit = "no bound of its own" if limit_bytes is None else f"{limit_bytes:,} bytes"
        super().__init__(
            f"out of memory ({limit}): {what}",
            hint="raise runner_memory, lower byte_budget, or leave `verify` out for this model",
        )
        self.limit_bytes = limit_bytes


class StorageFailed(CkptdError):
    """The output or state folder cannot be written (read-only, permission, I/O error)."""

    exit_code = 7
    retry = Retry.LATER

    def __init__(self, what: str, *, path: Path | str, hint: str | None = None) -> None:
        super().__init__(f"{path}: {what}", hint=hint)
        self.path = Path(path)
