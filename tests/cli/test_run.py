"""`ckptd run`: the result, what is protected, what is resumed, what is left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from ckptd import errors
from ckptd.checkpoint.header import FileStamp
from ckptd.hub.local import server
from ckptd.runner import output as runner_output
from tests.cli.conftest import Call, Make

RUN_1KB = ("--set", "reshard.max_shard_size=1KB")


def _tensors(folder: Path) -> dict[str, bytes]:
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    return {name: array.tobytes() for arrays in files for name, array in arrays.items()}


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_output(ckptd: Call, checkpoint: Path, silent_definition: Path) -> None:
    """The output holds the same bytes in new shards, with what travels and where it is from."""
    before = {path: FileStamp.of(path.stat()) for path in checkpoint.iterdir()}
    result = ckptd("run", checkpoint, "-p", silent_definition, "-o", "out")
    assert result.code == 0, result
    assert _tensors(Path("out")) == _tensors(checkpoint)
    assert {"config.json", "tokenizer_config.json", "ckptd.json"} <= _names(Path("out"))
    assert not {"optimizer.pt", "strange.xyz"} & _names(Path("out"))
    assert {path: FileStamp.of(path.stat()) for path in checkpoint.iterdir()} == before
    assert not Path(".ckptd-out").exists()


def test_summary(ckptd: Call, checkpoint: Path, silent_definition: Path) -> None:
    """The summary on standard output names the output and its shards; talk goes elsewhere."""
    result = ckptd("run", checkpoint, "-p", silent_definition, "-o", "out")
    assert result.out.splitlines()[0].split() == ["state", "done"]
    assert str(Path("out").absolute()) in result.out
    assert "shard 1 of" in result.err


def test_json(ckptd: Call, checkpoint: Path, silent_definition: Path) -> None:
    """With --json the outcome is one JSON object."""
    value = ckptd("run", checkpoint, "-p", silent_definition, "-o", "out", "--json").value
    assert value["num_shards"] == 2
    assert value["written_bytes"] > 0
    assert value["reports"]["tie"]["summary"]


@pytest.mark.parametrize(
    "output", [".", "inside", "..", "../.."], ids=["itself", "inside", "run", "runs"]
)
def test_source_is_protected(
    ckptd: Call, checkpoint: Path, silent_definition: Path, output: str
) -> None:
    """No output lies in the source or replaces it, not even when overwriting is asked for."""
    before = _names(checkpoint)
    result = ckptd(
        *("run", checkpoint, "-p", silent_definition, "-o", checkpoint / output, "--overwrite")
    )
    assert result.code == 2, result
    assert _names(checkpoint) == before


def test_link_targets_are_protected(
    ckptd: Call, checkpoint: Path, silent_definition: Path, tmp_path: Path
) -> None:
    """An output is refused that holds what the checkpoint's links lead to."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    weights = checkpoint / "model.safetensors"
    weights.rename(blobs / "weights")
    weights.symlink_to(blobs / "weights")
    arguments = ("run", checkpoint, "-p", silent_definition)
    assert ckptd(*arguments, "-o", blobs, "--overwrite").code == 2
    assert ckptd(*arguments, "-o", "out").code == 0


def test_overwrite(ckptd: Call, checkpoint: Path, silent_definition: Path) -> None:
    """--overwrite replaces the whole folder: nothing of it stays."""
    Path("out").mkdir()
    Path("out/old").write_text("old")
    result = ckptd("run", checkpoint, "-p", silent_definition, "-o", "out", "--overwrite")
    assert result.code == 0
    assert "old" not in _names(Path("out"))
    assert {name for name in _names(Path()) if name.startswith(".ckptd")} == set()


def test_an_output_that_nothing_is_staged_for_is_refused(
    ckptd: Call, checkpoint: Path, definition: Path
) -> None:
    """Under `staging: none` no weights are written: a named output says so at once, and why."""
    definition.write_text(
        definition.read_text().replace("pipeline: test", "pipeline: test\nstaging: none")
    )
    result = ckptd("run", checkpoint, "-p", definition, "-o", "out")
    assert result.code == 2, result
    assert f"the output folder {Path('out').absolute()} would get none" in result.err
    assert "staging: disk" in result.err
    assert _names(Path()) == {definition.name, "runs"}


@pytest.fixture
def failing_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run fails when all shards are finished, as a Hub fails."""
    real: Any = runner_output.keep
    failures = [errors.HubUnavailable("gone")]

    def keep(*args: Any) -> Path:
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(runner_output, "keep", keep)


@pytest.mark.usefixtures("failing_once")
def test_resume(ckptd: Call, checkpoint: Path, silent_definition: Path) -> None:
    """The same command again reuses the shards that are finished."""
    arguments = ("run", checkpoint, "-p", silent_definition, "-o", "out", "--json")
    first = ckptd(*arguments)
    assert first.code == 6
    assert "goes on from there" in first.err
    second = ckptd(*arguments)
    assert second.code == 0
    assert second.value["reports"]["job"]["reused_shards"] == 2
    assert not Path(".ckptd-out").exists()


@pytest.mark.usefixtures("failing_once")
def test_resume_keeps_checkpoints_apart(
    ckptd: Call, make_checkpoint: Make, silent_definition: Path
) -> None:
    """What a failed run left of one checkpoint never gets into the output of another."""
    one, other = make_checkpoint("checkpoint-1", seed=1), make_checkpoint("checkpoint-2", seed=2)
    assert ckptd("run", one, "-p", silent_definition, "-o", "out").code == 6
    result = ckptd("run", other, "-p", silent_definition, "-o", "out", "--json")
    assert result.value["reports"]["job"]["reused_shards"] == 0
    assert _tensors(Path("out")) == _tensors(other)


def test_two_at_once(ckptd: Call, checkpoint: Path, silent_definition: Path) -> None:
    """Of two runs with one output the second is refused while the first works."""
    import fcntl

    Path(".ckptd-out").mkdir()
    fd = os.open(".ckptd-out", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        result = ckptd("run", checkpoint, "-p", silent_definition, "-o", "out")
    finally:
        os.close(fd)
    assert result.code == 2
    assert "at work" in result.err


def test_assets(ckptd: Call, checkpoint: Path, silent_definition: Path) -> None:
    """--assets gives the config that the checkpoint lacks."""
    Path("assets").mkdir()
    (checkpoint / "config.json").rename("assets/config.json")
    arguments = ("run", checkpoint, "-p", silent_definition, "-o", "out")
    assert ckptd(*arguments).code == 4
    assert ckptd(*arguments, "--assets", "assets").code == 0
    assert "config.json" in _names(Path("out"))


def test_held(ckptd: Call, checkpoint: Path, definition: Path) -> None:
    """A model over the limit with hold_push is made and stays, is not pushed, and exits with 5."""
    sets = ("--set", "footprint.max=1KB", "--set", "footprint.on_exceed=hold_push")
    result = ckptd("run", checkpoint, "-p", definition, *sets, "--json")
    assert result.code == 5, result
    assert result.value["state"] == "held"
    assert "footprint" in result.value["reason"]
    assert _tensors(Path(result.value["output_path"])) == _tensors(checkpoint)


def test_push(
    process: Call, hub: server.Running, checkpoint: Path, definition: Path, state_path: Path
) -> None:
    """A push without -o leaves one tagged commit on the Hub and nothing on this machine."""
    access = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
    first = process("run", checkpoint, "-p", definition, "--json", **access)
    assert first.code == 0, first
    assert first.value["commit_url"].startswith(f"{hub.url}/acme/demo/commit/")
    assert first.value["git_tag"] == "step-20"
    assert first.value["uploaded_bytes"] > 0
    assert list((state_path / "runs").iterdir()) == []
    again = process("run", checkpoint, "-p", definition, **access)
    assert again.code == 0, again
    assert first.value["commit"] in again.out
