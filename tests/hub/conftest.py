"""Faults between the real client and a real Hub: requests refused, lost, raced or held.

Sits under huggingface_hub's HTTP client, above the socket, so that every fault is deterministic and
needs nothing of the server. hf_xet's own requests do not pass here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest

Act = Callable[[httpx2.Request, Callable[[], httpx2.Response]], httpx2.Response]


@dataclass
class Fault:
    method: str
    path: re.Pattern[str]
    act: Act
    times: int


@dataclass
class Wire:
    """What went over the wire, and what is to go wrong on it."""

    seen: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    busy: bool = False

    def on(self, method: str, path: str, act: Act, *, times: int = 1) -> None:
        """Let `act` handle the next `times` requests whose method and path match."""
        self.faults.append(Fault(method, re.compile(path), act, times))

    def count(self, method: str, path: str = "") -> int:
        pattern = re.compile(f"{method} .*{path}")
        return sum(1 for line in self.seen if pattern.match(line))

    def install(self, monkeypatch: Any) -> None:
        real = httpx2.Client.send

        def send(client: httpx2.Client, request: httpx2.Request, **kw: Any) -> httpx2.Response:
            def forward() -> httpx2.Response:
                return real(client, request, **kw)

            path = request.url.raw_path.decode()
            self.seen.append(f"{request.method} {path}")
            for fault in self.faults:
                if fault.times and fault.method == request.method and fault.path.search(path):
                    fault.times -= 1
                    return fault.act(request, forward)
            return forward()

        monkeypatch.setattr(httpx2.Client, "send", send)

    @staticmethod
    def refuse(status: int, text: str = "", *, code: str = "", **headers: str) -> Act:
        """Answer with this status; the server never sees the request."""

        def act(request: httpx2.Request, forward: Callable[[], httpx2.Response]) -> httpx2.Response:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            if code:
                named["X-Error-Code"] = code
            return httpx2.Response(status, headers=named, json={"error": text}, request=request)

        return act

    @staticmethod
    def lose_answer(
        request: httpx2.Request, forward: Callable[[], httpx2.Response]
    ) -> httpx2.Response:
        """The server does what was asked; its answer never arrives."""
        forward()
        raise httpx2.ReadError("connection reset", request=request)

    @staticmethod
    def never_arrive(
        request: httpx2.Request, forward: Callable[[], httpx2.Response]
    ) -> httpx2.Response:
        """The request never reaches the server."""
        raise httpx2.ConnectError("connection refused", request=request)

    @staticmethod
    def after(deed: Callable[[], object]) -> Act:
        """Something happens just before the request reaches the server."""

        def act(request: httpx2.Request, forward: Callable[[], httpx2.Response]) -> httpx2.Response:
            deed()
            return forward()

        return act


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    """The wire of this test, in place."""
    made = Wire()
    made.install(monkeypatch)
    return made
