"""Who may speak to a Hub on loopback: programs, its own pages, and nobody whom a browser sends."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from ckptd.hub.local import origins
from ckptd.hub.local.traffic import Fault


def ask(hub: Any, path: str = "/api/whoami-v2", **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with httpx2.Client(headers={"authorization": f"Bearer {hub.token}"}) as client:
        return client.get(f"{hub.url}{path}", headers=named)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "evil.example:{port}", "localhost.evil.example", ""],
)
def test_a_name_that_somebody_points_here_is_refused(hub: Any, host: str) -> None:
    """DNS rebinding: a foreign name in the Host header gets nothing, whatever token comes with it."""
    port = urlsplit(hub.url).port
    answer = ask(hub, Host=host.format(port=port))
    assert answer.status_code == 403
    assert "accessToken" not in answer.text


@pytest.mark.parametrize(
    "host", ["localhost:{port}", "127.0.0.1:{port}", "[::1]:{port}", "LOCALHOST"]
)
def test_names_of_this_machine_are_served(hub: Any, host: str) -> None:
    """Loopback's names and addresses cannot be pointed elsewhere."""
    port = urlsplit(hub.url).port
    assert ask(hub, Host=host.format(port=port)).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "file://"])
def test_pages_of_other_origins_are_refused(hub: Any, origin: str) -> None:
    """A page elsewhere, or on another port, may neither read nor post."""
    assert ask(hub, Origin=origin).status_code == 403
    answer = httpx2.post(
        f"{hub.url}/api/repos/create",
        json={"name": "x"},
        headers={"origin": origin, "authorization": f"Bearer {hub.token}"},
    )
    assert answer.status_code == 403
    assert httpx2.get(f"{hub.url}/api/models/ckptd/x").status_code == 401


@pytest.mark.parametrize(
    ("host", "any_name"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("0.0.0.0", True)],
)
def test_a_hub_for_others_has_the_names_that_they_give_it(host: str, *, any_name: bool) -> None:
    """Bound to more than loopback it answers under any name, for its owner wanted that."""
    assert (origins.names_of(host) is None) is any_name


def test_its_own_pages_are_served(hub: Any) -> None:
    """The same origin is no other."""
    assert ask(hub, Origin=hub.url).status_code == 200


def test_a_refused_page_is_no_request_to_the_faults(hub: Any) -> None:
    """What is refused at the door reaches nothing behind it."""
    hub.faults = lambda request: Fault.DROP
    assert ask(hub, Origin="http://evil.example").status_code == 403
