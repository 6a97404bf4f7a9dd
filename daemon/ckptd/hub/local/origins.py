"""Who may speak to a Hub besides programs: nobody whom a browser sends.

A page of any site can make the browser of somebody on this machine send requests to loopback, and a
name that its owner points to 127.0.0.1 (DNS rebinding) makes the answers readable for it too. So a
Hub on loopback answers only under names that nobody else can point here, and every Hub to no page
but its own.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers


def names_of(host: str) -> frozenset[str] | None:
    """Return the names, besides addresses, under which a Hub bound to `host` may be spoken to.

    None for any, where it was bound to more than loopback: others give it names then.
    """
    if host != "localhost" and not (_is_address(host) and ipaddress.ip_address(host).is_loopback):
        return None
    return frozenset({"localhost", socket.gethostname().lower(), host.lower()})


def refusal_of(headers: Headers, names: Collection[str] | None) -> str | None:
    """Return why a request is not served, None where it is; without `names` any host will do.

    An address is always good: a name server cannot point it elsewhere.
    """
    host = headers.get("host", "")
    name = _hostname(f"//{host}")
    if names is not None and not (name in names or _is_address(name)):
        return f"This Hub is not served under the name {name or 'of no host'!r}"
    origin = headers.get("origin")
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
        return "Pages of other origins may not use this Hub"
    return None


def _hostname(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
