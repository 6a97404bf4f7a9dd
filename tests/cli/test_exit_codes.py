"""Every exit code of the contract, as text and as one JSON object."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckptd.hub.local import server
from tests.cli.conftest import Call, Start, lines_until


@pytest.fixture(params=["text", "json"])
def expect(request: pytest.FixtureRequest, ckptd: Call) -> Any:
    """Return a function that calls `ckptd` and checks code and error, as text or as JSON."""

    def check(code: int, error: str, words: str, *arguments: object) -> None:
        if request.param == "text":
            result = ckptd(*arguments)
            assert result.code == code, result
            assert words in result.err
            assert "Traceback" not in result.err
            assert result.out == ""
            return
        result = ckptd(*arguments, "--json")
        assert result.code == code, result
        told = result.value["error"]
        assert told["code"] == error
        assert told["exit_code"] == code
        assert words in told["message"]

    return check


def test_2_unknown_option(expect: Any, checkpoint: Path) -> None:
    """A misspelled option is a usage error."""
    expect(2, "UsageError", "--tensros", "inspect", checkpoint, "--tensros")


def test_2_no_use(expect: Any, checkpoint: Path, silent_definition: Path) -> None:
    """A run whose result would go nowhere is refused before anything is read."""
    expect(2, "UsageError", "nothing would be left", "run", checkpoint, "-p", silent_definition)


def test_2_unknown_name(expect: Any, checkpoint: Path) -> None:
    """A definition that does not ship is told with the one that was probably meant."""
    expect(2, "UsageError", "did you mean 'publish'", "plan", checkpoint, "-p", "publsh")


def test_2_bad_set(expect: Any, checkpoint: Path, definition: Path) -> None:
    """A --set of an option that the stage lacks is a usage error."""
    arguments = ("plan", checkpoint, "-p", definition, "--set", "reshard.max_size=1GB")
    expect(2, "UsageError", "max_shard_size", *arguments)


def test_3_definition(expect: Any, ckptd: Call, checkpoint: Path, definition: Path) -> None:
    """A definition with a typo is told with path, line, column and field."""
    definition.write_text(definition.read_text().replace("reshard:", "rehsard:"))
    expect(3, "DefinitionError", f"{definition}:5:5: ", "plan", checkpoint, "-p", definition)
    told = ckptd("plan", checkpoint, "-p", definition, "--json").value["error"]
    assert told["problems"][0]["line"] == 5


def test_3_definition_is_absent(expect: Any, checkpoint: Path) -> None:
    """A definition file that is not there is an invalid definition."""
    expect(3, "DefinitionError", "absent.yaml", "plan", checkpoint, "-p", "absent.yaml")


def test_3_settings(expect: Any, checkpoint: Path, definition: Path) -> None:
    """A setting out of range is told with the variable it came from."""
    Path("s.yaml").write_text("slots: 0\n")
    arguments = ("plan", checkpoint, "-p", definition, "--settings", "s.yaml")
    expect(3, "SettingsError", "slots", *arguments)


def test_4_truncated(expect: Any, checkpoint: Path, silent_definition: Path) -> None:
    """A shard that is too short is refused by name; no output appears."""
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    arguments = ("run", checkpoint, "-p", silent_definition, "-o", "out")
    expect(4, "CheckpointCorrupt", str(weights), *arguments)
    assert not Path("out").exists()
    assert not Path(".ckptd-out").exists()


def test_4_vanished(expect: Any, definition: Path) -> None:
    """A checkpoint that is not there is refused."""
    expect(4, "CheckpointIncomplete", "does not exist", "plan", "absent", "-p", definition)


def test_5_footprint(expect: Any, checkpoint: Path, definition: Path) -> None:
    """A model larger than the limit fails the check, from headers alone."""
    arguments = ("plan", checkpoint, "-p", definition, "--set", "footprint.max=1KB")
    expect(5, "CheckFailed", "allows 1 KB", *arguments)


def test_7_output_in_use(expect: Any, checkpoint: Path, silent_definition: Path) -> None:
    """An output folder that holds something is left alone."""
    Path("out").mkdir()
    Path("out/precious").write_text("mine")
    arguments = ("run", checkpoint, "-p", silent_definition, "-o", "out")
    expect(7, "StorageFailed", "is not empty", *arguments)
    assert Path("out/precious").read_text() == "mine"


def test_7_output_cannot_be_made(expect: Any, checkpoint: Path, silent_definition: Path) -> None:
    """An output below something that is no folder is a failure of the storage."""
    Path("file").write_text("")
    arguments = ("run", checkpoint, "-p", silent_definition, "-o", "file/out")
    expect(7, "StorageFailed", "file", *arguments)


def test_7_disk_full(
    expect: Any, checkpoint: Path, silent_definition: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk without room is found before work, with bytes needed and free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    arguments = ("run", checkpoint, "-p", silent_definition, "-o", "out")
    expect(7, "NoSpace", "1,000 are free", *arguments)
    assert not Path(".ckptd-out").exists()


def test_1_unexpected(
    expect: Any, ckptd: Call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody foresaw is one line without secrets; CKPTD_DEBUG adds the traceback."""

    def explode(*args: object, **options: object) -> None:
        raise RuntimeError("boom hf_abcdefghijklmnop")

    monkeypatch.setattr("ckptd.checkpoint.listing.list_files", explode)
    expect(1, "Unexpected", "RuntimeError: boom [hidden]", "inspect", checkpoint)
    monkeypatch.setenv("CKPTD_DEBUG", "1")
    result = ckptd("inspect", checkpoint)
    assert "Traceback" in result.err
    assert "hf_abc" not in result.err


def test_6_bad_token(
    process: Call, hub: server.Running, checkpoint: Path, definition: Path
) -> None:
    """A token that the Hub does not know ends the run before anything is uploaded."""
    result = process(
        "run", checkpoint, "-p", definition, "--json", HF_ENDPOINT=hub.url, HF_TOKEN="hf_wrong0000"
    )
    assert result.code == 6, result
    assert result.value["error"]["code"] == "HubUnauthorized"
    assert "HF_TOKEN" in result.value["error"]["hint"]


def test_6_no_hub(process: Call, checkpoint: Path, definition: Path) -> None:
    """A Hub that is not there is tried for as long as was said, visibly, and no longer."""
    result = process(
        *("run", checkpoint, "-p", definition, "--hub-patience", "2s"),
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_TOKEN="hf_any",
    )
    assert result.code == 6, result
    assert "next try in" in result.err
    assert "Traceback" not in result.err


def test_130_interrupted(start: Start, checkpoint: Path, definition: Path) -> None:
    """Ctrl-C ends a run at once, also while it waits for the Hub."""
    run = start(
        *("run", checkpoint, "-p", definition, "--hub-patience", "10m"),
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_TOKEN="hf_any",
    )
    lines_until(run.stderr, "next try in")
    run.send_signal(signal.SIGINT)
    _, rest = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest
