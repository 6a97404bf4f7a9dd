"""Checks of the token and of the Hub it opens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ckptd import units
from ckptd.cli.doctor.finding import Finding, failed, ok, skipped, warning

SKEW_WARNED_S = 60.0
SKEW_FAILED_S = 300.0
"""Signed upload URLs are refused when the clocks differ by some minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFound:
    """Where a token was found; never the token."""

    origin: str | None = None
    error: str | None = None
    """Why the one that is there may not be used."""
    hint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What came back from the Hub."""

    endpoint: str
    error: str | None = None
    hint: str | None = None
    seconds: float = 0.0
    skew_s: float | None = None
    """The Hub's clock minus ours."""
    account: str | None = None
    role: str = ""
    namespaces: frozenset[str] = frozenset()
    """The account and its organisations."""
    writable: frozenset[str] | None = None
    """For a fine-grained token: the namespaces it may write in; None for the other kinds."""


def token(found: TokenFound, *, pushes: bool) -> Finding:
    """Check where the token comes from; `pushes` says whether a definition needs one."""
    if found.error is not None:
        return failed("token", found.error, found.hint or "replace it")
    if found.origin is None:
        if not pushes:
            return skipped("token", "none, and no definition pushes")
        return failed(
            "token",
            "there is none: jobs that push would wait",
            "HF_TOKEN_PATH names a file of mode 0600 (systemd: LoadCredential), or `hf auth login`",
        )
    return ok("token", f"from {found.origin}")


def reached(found: Reached, *, pushes: bool) -> Finding:
    """Check that the Hub answers; `pushes` says whether a definition needs it."""
    if found.error is not None:
        return (failed if pushes else warning)(
            "hub", f"{found.endpoint}: {found.error}",
            found.hint or "is the network up, a proxy needed (HTTPS_PROXY), the endpoint right?",
        )  # fmt: skip
    return ok("hub", f"{found.endpoint} answers in {units.format_duration(found.seconds)}")


def account(found: Reached, *, targets: Collection[str]) -> list[Finding]:
    """Check what the token may do for `targets`, the namespaces that definitions push to."""
    name = "account"
    if found.error is not None or found.account is None:
        return [skipped(name, "the Hub has not said whose token it is")]
    if found.role == "read" and targets:
        return [
            failed(name, f"{found.account}: the token may only read", "make one that may write")
        ]
    findings = []
    for namespace in sorted(targets):
        if found.writable is not None and namespace not in found.writable:
            findings.append(
                failed(
                    name,
                    f"{found.account}: the fine-grained token has no write access to {namespace}/",
                    f"give it `repo.write` for {namespace} in the Hub's token settings",
                )
            )
        elif found.writable is None and namespace not in found.namespaces:
            findings.append(
                warning(
                    name,
                    f"{found.account} is no member of {namespace}, where a definition pushes to",
                    f"join {namespace}, or push to one of: {', '.join(sorted(found.namespaces))}",
                )
            )
    return findings or [ok(name, f"{found.account}, {found.role or 'unknown role'}")]


def clock(found: Reached) -> Finding:
    """Compare the clocks."""
    name = "clock"
    if found.skew_s is None:
        return skipped(name, "the Hub has not said what time it is")
    skew, hint = abs(found.skew_s), "timedatectl set-ntp true"
    side = "behind" if found.skew_s > 0 else "ahead"
    if skew > SKEW_FAILED_S:
        return failed(name, f"{skew:.0f} s {side} of the Hub: signed uploads are refused", hint)
    if skew > SKEW_WARNED_S:
        return warning(name, f"{skew:.0f} s {side} of the Hub", hint)
    return ok(name, f"{skew:.0f} s from the Hub's")
