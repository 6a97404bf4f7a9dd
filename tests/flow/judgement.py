"""What must hold of a node after a siege, and the figures of it."""

from __future__ import annotations

import itertools
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.community import DiscussionComment, DiscussionWithDetails
from huggingface_hub.hf_api import RepoFile

from ckptd.jobs.database import Database
from ckptd.jobs.job import Job, State
from ckptd.jobs.store import Moment
from tests.flow.conftest import Deployment

PUSH_ID = re.compile(r"ckptd-push-id: *(\S+)")
BROKEN = ("lost", "doubled", "torn", "rewritten", "resent", "left", "untrue")


@dataclass(slots=True, kw_only=True)
class Figures:
    """What happened in a siege."""

    kills: int = 0
    by_victim: Counter[str] = field(default_factory=Counter)
    unreached: list[str] = field(default_factory=list)
    recoveries_s: list[float] = field(default_factory=list)
    """From the start of a daemon to work: a job of before started, or ready where there is none."""
    works_s: list[float] = field(default_factory=list)
    """From the start of a daemon that finds work to the first change on disk that a runner makes."""
    jobs: int = 0
    attempts: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    rewritten: list[str] = field(default_factory=list)
    resent: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    untrue: list[str] = field(default_factory=list)
    """Lines of a job's history that do not tell what happened."""

    @property
    def faults(self) -> list[str]:
        """Every promise that was broken."""
        return [f"{name}: {text}" for name in BROKEN for text in getattr(self, name)]

    def __str__(self) -> str:
        broken = {name: len(getattr(self, name)) for name in BROKEN}
        return (
            f"{self.kills} kills ({dict(self.by_victim)}), {self.jobs} jobs, {self.attempts} tries; "
            f"{broken}; back at work after {_spread(self.recoveries_s)}, its runner's first change "
            f"on disk after {_spread(self.works_s)}; {len(self.unreached)} steps not reached"
        )


def _spread(seconds: Sequence[float]) -> str:
    median = statistics.median(seconds) if seconds else 0.0
    return f"{median:.2f} s (slowest {max(seconds, default=0.0):.2f} s of {len(seconds)} starts)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Looks at jobs, Hub and disk when all is done."""

    node: Deployment
    figures: Figures
    expected: Mapping[int, Mapping[str, str]]
    """Step -> what `Kind.made_of` said."""
    slots: int

    def judge(self, jobs: Sequence[Job]) -> None:
        """Note everything that is not as promised."""
        figures = self.figures
        figures.jobs, figures.attempts = len(jobs), sum(job.attempt for job in jobs)
        steps = Counter(job.spec.step for job in jobs)
        figures.lost += [f"step {s}: no job" for s in self.expected if s not in steps]
        figures.doubled += [f"step {s}: {n} jobs" for s, n in steps.items() if n > 1]
        with Database(self.node.state / "jobs.sqlite3", read_only=True) as database:
            for job in jobs:
                figures.untrue += untruths(job, database.history(job.job_id))
                figures.torn += self._torn(job)
        for repo_id in {_repo_of(job) for job in jobs}:
            self._count_pushes(repo_id, [job for job in jobs if _repo_of(job) == repo_id])
        if figures.attempts - len(jobs) > figures.kills * self.slots:
            figures.untrue.append(f"{figures.attempts} tries of {len(jobs)} jobs")
        figures.left += [str(path) for path in self._leftovers()]

    def _count_pushes(self, repo_id: str, jobs: Sequence[Job]) -> None:
        """One commit for each job, on the branch or in a pull request of its own."""
        ids = Counter(self._push_ids(repo_id, "main"))
        proposals = [job for job in jobs if _proposes(job)]
        for pr in self._pull_requests(repo_id) if proposals else ():
            ids.update(
                self._push_ids(repo_id, f"refs/pr/{pr.num}") or ["nothing in a pull request"]
            )
            if pr.status != "open":
                self.figures.left.append(f"{repo_id}: pull request {pr.num} is {pr.status}")
        self.figures.doubled += [
            f"{repo_id}: push {i}: {n} commits" for i, n in ids.items() if n > 1
        ]
        if len(ids) != len(jobs):
            self.figures.lost.append(f"{repo_id}: {len(jobs)} jobs but {len(ids)} pushes")

    def _push_ids(self, repo_id: str, revision: str) -> list[str]:
        commits = self._api.list_repo_commits(repo_id, revision=revision)
        return PUSH_ID.findall("\n".join(commit.message for commit in commits))

    def _pull_requests(self, repo_id: str) -> Iterator[DiscussionWithDetails]:
        """Yield ours: those whose first comment has a push id."""
        for one in self._api.get_repo_discussions(repo_id, discussion_type="pull_request"):
            details = self._api.get_discussion_details(repo_id, one.num)
            texts = [
                event.content for event in details.events if isinstance(event, DiscussionComment)
            ]
            if texts and PUSH_ID.search(texts[0]):
                yield details

    def _torn(self, job: Job) -> list[str]:
        """What of the published model is not what a job in peace makes."""
        spec = job.spec
        if job.state is not State.PUBLISHED or job.outcome is None:
            self.figures.lost.append(f"step {spec.step}: {job.state.value}: {job.reason}")
            return []
        assert spec.step is not None
        revision = f"step-{spec.step}"
        files = self._api.list_repo_tree(_repo_of(job), revision=revision, recursive=True)
        found = {file.path: file for file in files if isinstance(file, RepoFile)}
        expected = self.expected[spec.step]
        wrong = []
        for name, sha256 in expected.items():
            file = found.get(name)
            if file is None:
                wrong.append(f"step {spec.step}: {name} is not there")
            elif sha256 not in (file.lfs.sha256 if file.lfs else None, file.blob_id):
                wrong.append(f"step {spec.step}: {name} differs")
        weights = {name for name in found if name.endswith(".safetensors")}
        if extra := weights - expected.keys():
            wrong.append(f"step {spec.step}: {extra} too much")
        return wrong

    def _leftovers(self) -> Iterator[Path]:
        """Files of ours that nobody needs: all but database, identity, lock, status and known roots."""
        kept = {"lock", "identity", "status.json", "jobs.sqlite3", "root"}
        for folder in (self.node.state, self.node.runs / ".ckptd"):
            for path in folder.rglob("*"):
                if path.is_file() and path.name not in kept and "sqlite3-" not in path.name:
                    yield path

    @property
    def _api(self) -> HfApi:
        return HfApi(endpoint=self.node.hub.url, token=self.node.hub.token)


def _repo_of(job: Job) -> str:
    return job.spec.target.partition("@")[0]


def _proposes(job: Job) -> bool:
    return bool(job.spec.definition["push"]["create_pr"])


def untruths(job: Job, history: Sequence[Moment]) -> list[str]:
    """Return what of `history` cannot have happened, or does not say why."""
    wrong = []
    told = [(moment.state, moment.attempt) for moment in history]
    if told[0] != (State.QUEUED, 1):
        wrong.append(f"begins with {told[0]}")
    if told[-1] != (job.state, job.attempt):
        wrong.append(f"ends with {told[-1]}, the job is {job.state} at {job.attempt}")
    for before, after in itertools.pairwise(history):
        step = after.attempt - before.attempt
        match before.state, after.state:
            case (State.QUEUED | State.RETRYING, State.RUNNING) if step == 0:
                continue
            case (State.RUNNING, State.PUBLISHED) if step == 0:
                continue
            case (State.RUNNING, State.QUEUED) if step == 1 and "was lost" in (after.reason or ""):
                continue
            case (State.RUNNING, State.QUEUED) if step == 0 and "stopped" in (after.reason or ""):
                continue
            case (State.RUNNING, State.RETRYING) if step == 1 and after.reason:
                continue
        wrong.append(f"{before.state.value} {before.attempt} then {after.state.value} "
                     f"{after.attempt} ({after.reason})")  # fmt: skip
    return [f"{job.job_id}: {text}" for text in wrong]
