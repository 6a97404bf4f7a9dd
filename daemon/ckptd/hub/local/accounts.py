"""Whose token it is and what it may do. Tokens are kept in ROOT/accounts.json, readable by us only.

A role is what a token may do at most: `read` (see), `write` (change what lies in its own namespaces
and propose elsewhere), `admin` (everything, everywhere). Without a token one may see what is public.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from ckptd import errors
from ckptd.hub.local import refusal
from ckptd.hub.local.blobs import write_durably
from ckptd.hub.local.values import Repo

Role = Literal["read", "write", "admin"]
EVERYWHERE = "*"
"""In `orgs`: a member of every namespace."""
FILE_NAME = "accounts.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Who stands behind a token."""

    name: str
    role: Role = "write"
    orgs: tuple[str, ...] = ()
    """Namespaces it belongs to, besides its own."""

    def owns(self, namespace: str) -> bool:
        """Say whether the namespace is its own or one it is a member of."""
        return namespace == self.name or namespace in self.orgs or EVERYWHERE in self.orgs

    def may_read(self, repo: Repo) -> bool:
        """Say whether it sees the repo."""
        return not repo.private or self.role == "admin" or self.owns(repo.namespace)

    def may_write(self, namespace: str) -> bool:
        """Say whether it may make and change repos there."""
        return self.role == "admin" or (self.role == "write" and self.owns(namespace))


ANONYMOUS = Account(name="", role="read")
DEFAULT = Account(name="ckptd", role="write", orgs=(EVERYWHERE,))
"""Made on the first start where no accounts are given."""

_ACCOUNTS = TypeAdapter(dict[str, Account])


def open_accounts(root: Path, given: Mapping[str, Account] | None = None) -> dict[str, Account]:
    """Return token -> account: those `given`, else those in the folder, else a new default one.

    Raises:
        errors.StorageFailed: the file in the folder is not one of accounts.
    """
    if given is not None:
        return dict(given)
    path = root / FILE_NAME
    try:
        return _ACCOUNTS.validate_json(path.read_bytes())
    except FileNotFoundError:
        fresh = {new_token(): DEFAULT}
    except ValidationError as exc:
        why = f"not a file of accounts: {exc.error_count()} fields are wrong"
        raise errors.StorageFailed(why, path=path) from exc
    root.mkdir(parents=True, exist_ok=True)
    write_durably(path, _ACCOUNTS.dump_json(fresh, indent=1), mode=0o600)
    return fresh


def new_token() -> str:
    """Return a token of the usual form that nobody has."""
    return "hf_" + secrets.token_hex(17)


def identify(authorization: str | None, accounts: Mapping[str, Account]) -> Account:
    """Return who sent a request, from its Authorization header (Bearer, or Basic as git does).

    Raises:
        refusal.Refused: 401, there is a token and the Hub does not know it.
    """
    if not authorization:
        return ANONYMOUS
    scheme, _, value = authorization.partition(" ")
    token = value.strip()
    if scheme.lower() == "basic":
        try:
            token = base64.b64decode(token, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            raise refusal.bad_token() from None
    account = accounts.get(token)
    if account is None:
        raise refusal.bad_token()
    return account
