"""What the Hub says of accounts, repos, commits and pull requests, as values. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Whose token it is; `role` is `read`, `write`, `fineGrained`, or empty where unknown."""

    name: str
    role: str
    token_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One commit of a revision; `text` is its title and description."""

    oid: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PullRequest:
    """One pull request; `text` is its first comment where details were asked for, else empty."""

    num: int
    title: str
    author: str
    status: str
    """`draft`, `open`, `closed` or `merged`."""
    text: str = ""

    @property
    def revision(self) -> str:
        """The ref that holds its commits."""
        return f"refs/pr/{self.num}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RepoFacts:
    """A repo as the Hub knows it."""

    repo_id: str
    """Its name now: another than was asked for, where it was renamed."""
    is_private: bool
