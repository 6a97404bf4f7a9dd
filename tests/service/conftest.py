"""A whole node for the tests that need one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.hub.local.server import Running
from tests.flow.conftest import Deployment


@pytest.fixture
def node(tmp_path: Path, hub: Running) -> Iterator[Deployment]:
    """A node with nothing running yet; what a test started is killed after it."""
    deployment = Deployment(tmp_path, hub)
    yield deployment
    if deployment.process is not None and deployment.process.poll() is None:
        deployment.kill()
