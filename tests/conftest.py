"""What every test may use: a loopback Hub, and an environment that reaches no other."""

# ruff: noqa: E402 - the environment is set before the imports that read it

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# huggingface_hub reads its environment while it is imported: this must come before that.
_HF_HOME = tempfile.mkdtemp(prefix="ckptd-tests-hf-")
os.environ.update(
    HF_HOME=_HF_HOME,
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_IMPLICIT_TOKEN="1",
    HF_ENDPOINT="http://127.0.0.1:9",  # discard: a test that forgets its endpoint fails at once
    TOKENIZERS_PARALLELISM="false",
)
for _name in ("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
    os.environ.pop(_name, None)

import hypothesis
import pytest

from ckptd.hub.local import server
from ckptd.hub.local.accounts import EVERYWHERE, Account

hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")

WRITE_TOKEN = "hf_write00000000000000000000000000000"
READ_TOKEN = "hf_read000000000000000000000000000000"
ADMIN_TOKEN = "hf_admin00000000000000000000000000000"
STRANGER_TOKEN = "hf_stranger00000000000000000000000000"

TOKENS = {
    WRITE_TOKEN: Account(name="ckptd", role="write", orgs=(EVERYWHERE,)),
    READ_TOKEN: Account(name="reader", role="read", orgs=(EVERYWHERE,)),
    ADMIN_TOKEN: Account(name="root", role="admin"),
    STRANGER_TOKEN: Account(name="stranger", role="write"),
}
"""`ckptd` may write everywhere, `reader` may see everything, `stranger` owns only its own."""


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors, but for what the client does to its own HTTP library."""
    config.addinivalue_line(
        "filterwarnings", "ignore:Use 'content=<...>' to upload:DeprecationWarning"
    )


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[server.Running]:
    """A Hub on loopback: `.url`, `.token` (write), `.root`, `.ledger`, `.faults`, `.store`."""
    with server.running(root=tmp_path / "hub", tokens=TOKENS) as running:
        yield running


@pytest.fixture
def hub_tokens() -> dict[str, Account]:
    """Token -> account, for a test that starts a Hub of its own."""
    return dict(TOKENS)
