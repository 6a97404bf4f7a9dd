"""The real client, talking to the loopback Hub."""

from __future__ import annotations

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from ckptd.hub.local import server

REPO = "acme/run"


@pytest.fixture
def api(hub: server.Running) -> HfApi:
    """A client whose token may write everywhere."""
    return HfApi(endpoint=hub.url, token=hub.token)


@pytest.fixture
def repo(api: HfApi) -> str:
    """An empty public repo."""
    api.create_repo(REPO)
    return REPO


@pytest.fixture
def add():
    """Make an operation out of a path and content."""

    def make(path: str, content: bytes = b"{}") -> CommitOperationAdd:
        return CommitOperationAdd(path, content)

    return make
