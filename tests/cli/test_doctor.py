"""`ckptd doctor` on this very machine, against a Hub on loopback."""

from __future__ import annotations

import email.utils
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import JSONResponse

from ckptd.cli.doctor import device, facts
from ckptd.hub.local.server import Running
from tests.cli.conftest import Call
from tests.conftest import READ_TOKEN


@pytest.fixture(autouse=True)
def torch_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """One test imports torch in a process of its own; the others need not wait for it."""
    monkeypatch.setattr(facts, "torch", lambda: device.Torch(version="2.6.0", import_s=1.0))


@pytest.fixture
def pipelines_dir(tmp_path: Path, checkpoint: Path) -> Path:
    """A definition that watches where a checkpoint is and pushes it."""
    folder = tmp_path / "pipelines.d"
    folder.mkdir()
    (folder / "a.yaml").write_text(
        f"pipeline: a\nwatch:\n  - path: {checkpoint.parent}/checkpoint-*\n"
        'stages: [reshard]\npush: {repo_id: "ckptd/{run}"}\n'
    )
    return folder


def _by_check(value: Any) -> dict[str, dict[str, Any]]:
    return {finding["check"].split()[0]: finding for finding in value["findings"]}


def test_a_node_that_is_fit(
    ckptd: Call, hub: Running, pipelines_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything there it exits with 0, and has left nothing in the watched folder."""
    monkeypatch.setenv("CKPTD_HUB_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("CKPTD_MIN_FREE", "0")
    before = sorted(Path("runs").rglob("*"))
    result = ckptd("doctor", "--pipelines-dir", pipelines_dir, "--json")
    found = _by_check(result.value)
    assert (result.code, result.value["ok"]) == (0, True), result.out
    assert found["account"]["what"] == "ckptd, write"
    assert found["token"]["grade"] == "ok"
    assert found["root"]["what"].endswith("1 checkpoints")
    assert found["inotify"]["grade"] == "ok"
    assert sorted(Path("runs").rglob("*")) == before


def test_what_is_wrong_is_told_with_its_remedy(
    ckptd: Call, hub: Running, pipelines_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that may only read and a full disk fail, with exit code 5 and what to do."""
    monkeypatch.setenv("CKPTD_HUB_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    monkeypatch.setenv("CKPTD_MIN_FREE", "1000TB")
    (pipelines_dir / "b.yaml").write_text("pipeline: b\n")
    result = ckptd("doctor", "--pipelines-dir", pipelines_dir)
    assert result.code == 5
    for text in (
        "may only read",
        "min_free",
        "b.yaml",
        "make one that may write",
        "ckptd validate",
    ):
        assert text in result.out
    assert READ_TOKEN not in result.out + result.err


def test_open_token_file(
    ckptd: Call, hub: Running, pipelines_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token file that others may read is a failure, though the Hub would take it."""
    path = tmp_path / "token"
    path.write_text(hub.token)
    path.chmod(0o644)
    monkeypatch.setenv("HF_TOKEN_PATH", str(path))
    monkeypatch.setenv("CKPTD_HUB_ENDPOINT", hub.url)
    result = ckptd("doctor", "--pipelines-dir", pipelines_dir, "--json")
    token = _by_check(result.value)["token"]
    assert (result.code, token["grade"]) == (5, "failed")
    assert f"chmod 600 {path}" in token["hint"]


@pytest.mark.usefixtures("hub")
def test_refused_token(
    ckptd: Call, hub: Running, pipelines_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that the Hub does not know is found before a job needs it."""
    monkeypatch.setenv("CKPTD_HUB_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_unknown000000000000000000000000000")
    found = _by_check(ckptd("doctor", "--pipelines-dir", pipelines_dir, "--json").value)
    assert found["token"]["grade"] == "failed"
    assert "hf_unknown" not in str(found)


def test_clock_skew(
    ckptd: Call, hub: Running, pipelines_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's clock is read from its answer."""
    monkeypatch.setenv("CKPTD_HUB_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    date = email.utils.formatdate(time.time() + 600, usegmt=True)
    hub.faults = lambda _: JSONResponse({"name": "ckptd"}, headers={"Date": date})
    found = _by_check(ckptd("doctor", "--pipelines-dir", pipelines_dir, "--json").value)
    assert found["clock"]["grade"] == "failed"
    assert "behind" in found["clock"]["what"]


def test_without_the_hub(ckptd: Call, pipelines_dir: Path) -> None:
    """--no-hub asks nobody."""
    found = _by_check(ckptd("doctor", "--pipelines-dir", pipelines_dir, "--no-hub", "--json").value)
    assert found["hub"]["grade"] == "skipped"


def test_torch_is_tried_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch computes there; where it does not start, that is told with the reason."""
    monkeypatch.undo()
    found = facts.torch()
    assert (found.error, bool(found.version)) == (None, True)
    monkeypatch.setattr(facts, "_TRY_TORCH", "import no_such_torch")
    assert facts.torch().error == "ModuleNotFoundError: No module named 'no_such_torch'"
