"""Pins: what was there stays there, whatever the trainer does; the source is never touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ckptd.checkpoint import open_files, origin, pin, whole
from ckptd.checkpoint.consolidate import assets
from ckptd.checkpoint.listing import list_files
from ckptd.checkpoint.open_files import OpenFiles
from ckptd.checkpoint.pin import PinMethod
from ckptd.errors import CheckpointUnsupported, NoSpace, StorageFailed

METHODS = [PinMethod.HARD_LINK, PinMethod.COPY]


def _content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _refresh(source: Path, target: Path, method: PinMethod) -> pin.PinReport:
    return pin.refresh(source, list_files(source), target, method)


@pytest.mark.parametrize("method", METHODS)
def test_a_pin_survives_rotation(method: PinMethod, make_folder: Any, tmp_path: Path) -> None:
    """After the trainer deleted its folder the pin holds every published file's bytes."""
    source, target = make_folder("checkpoint-3", shards=2, step=3), tmp_path / "pin"
    (source / "sub").mkdir()
    (source / "sub" / "template.jinja").write_text("x")
    before = _content(source)
    _refresh(source, target, method)
    shutil.rmtree(source)
    assert _content(target) == {n: b for n, b in before.items() if n != "optimizer.pt"}


@pytest.mark.parametrize("method", METHODS)
def test_pinning_leaves_no_trace_in_the_source(
    method: PinMethod, make_folder: Any, tmp_path: Path
) -> None:
    """Names, contents and times stay: a touched folder changes the trainer's rotation order."""
    source = make_folder(shards=2)
    before = (list_files(source).fingerprint, source.stat().st_mtime_ns, _content(source))
    _refresh(source, tmp_path / "pin", method)
    assert (list_files(source).fingerprint, source.stat().st_mtime_ns, _content(source)) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_second_refresh_does_nothing(method: PinMethod, make_folder: Any, tmp_path: Path) -> None:
    """Only what changed is pinned again."""
    source, target = make_folder(shards=2), tmp_path / "pin"
    assert _refresh(source, target, method).linked == 4
    assert _refresh(source, target, method).linked == 0
    (source / "config.json").write_text('{"changed": true}')
    assert _refresh(source, target, method).linked == 1
    assert json.loads((target / "config.json").read_text()) == {"changed": True}


def test_files_that_trainers_rewrite_in_place_are_not_linked(
    make_folder: Any, tmp_path: Path
) -> None:
    """Under hard links weights share their inode, config and markers are copies."""
    source, target = make_folder(step=1), tmp_path / "pin"
    _refresh(source, target, PinMethod.HARD_LINK)
    for name, shared in [("model.safetensors", True), ("config.json", False)]:
        assert (source / name).samefile(target / name) is shared
    with (source / "config.json").open("r+") as file:
        file.write("garbage")
    assert json.loads((target / "config.json").read_text())["model_type"] == "llama"


def test_a_file_replaced_by_a_new_one_is_pinned_again(make_folder: Any, tmp_path: Path) -> None:
    """A rename over a linked file shows as another inode."""
    source, target = make_folder(), tmp_path / "pin"
    _refresh(source, target, PinMethod.HARD_LINK)
    new = source / "new"
    new.write_bytes((source / "model.safetensors").read_bytes()[:-1] + b"!")
    new.rename(source / "model.safetensors")
    _refresh(source, target, PinMethod.HARD_LINK)
    assert (target / "model.safetensors").read_bytes().endswith(b"!")


def test_a_link_that_is_refused_becomes_a_copy_once(
    make_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one file cannot be linked it is copied, and not copied again at each refresh."""
    source, target = make_folder(), tmp_path / "pin"

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EXDEV, "other mount")

    monkeypatch.setattr(os, "link", refuse)
    _refresh(source, target, PinMethod.HARD_LINK)
    assert _content(target) == _content(source)
    assert _refresh(source, target, PinMethod.HARD_LINK).linked == 0


def test_a_file_rewritten_while_it_is_copied_is_copied_again(
    make_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy carries the times of before: a rewrite of equal size in between cannot hide."""
    source, target = make_folder(), tmp_path / "pin"
    path = source / "config.json"
    original = path.read_text()
    copyfileobj = shutil.copyfileobj

    def rewrite(read: Any, write: Any, *rest: Any) -> None:
        copyfileobj(read, write, *rest)
        if read.name == str(path) or Path(f"/proc/self/fd/{read.fileno()}").samefile(path):
            path.write_text(original.replace("llama", "LLAMA"))

    listing = list_files(source)
    monkeypatch.setattr(shutil, "copyfileobj", rewrite)
    pin.refresh(source, listing, target, PinMethod.COPY)
    monkeypatch.undo()
    assert _refresh(source, target, PinMethod.COPY).linked == 1
    assert "LLAMA" in (target / "config.json").read_text()


def test_files_that_vanish_meanwhile_are_reported(make_folder: Any, tmp_path: Path) -> None:
    """The rest is pinned all the same, and what was pinned before stays."""
    source, target = make_folder(shards=2), tmp_path / "pin"
    listing = list_files(source)
    (source / "config.json").unlink()
    report = pin.refresh(source, listing, target, PinMethod.HARD_LINK)
    assert report.vanished == ("config.json",)
    assert report.linked == 3


def test_a_link_put_in_place_of_a_file_is_not_followed(make_folder: Any, tmp_path: Path) -> None:
    """Between listing and pinning nobody can smuggle in a file from elsewhere."""
    source, target = make_folder(), tmp_path / "pin"
    (tmp_path / "secret").write_text("secret")
    listing = list_files(source)
    (source / "config.json").unlink()
    (source / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(StorageFailed):
        pin.refresh(source, listing, target, PinMethod.COPY)
    assert b"secret" not in _content(target).values()


def test_links_inside_the_folder_are_pinned_as_files(make_folder: Any, tmp_path: Path) -> None:
    """A link to a sibling becomes the sibling's content; one that leads elsewhere now does not."""
    source, target = make_folder(), tmp_path / "pin"
    (source / "blob").write_text("vocab")
    (source / "vocab.txt").symlink_to("blob")
    listing = list_files(source)
    pin.refresh(source, listing, target, PinMethod.HARD_LINK)
    assert not (target / "vocab.txt").is_symlink()
    assert (target / "vocab.txt").read_text() == "vocab"

    (tmp_path / "secret").write_text("secret")
    (source / "vocab.txt").unlink()
    (source / "vocab.txt").symlink_to(tmp_path / "secret")
    report = pin.refresh(source, listing, tmp_path / "other", PinMethod.COPY)
    assert report.vanished == ("vocab.txt",)


def test_what_is_pinned_tells_the_layout(make_folder: Any, tmp_path: Path) -> None:
    """Markers are pinned, half-written files and optimizer state are not."""
    assert pin.wanted("trainer_state.json")
    assert pin.wanted("training_args.bin")
    assert pin.wanted("model.safetensors")
    assert pin.wanted("chat_template.jinja")
    assert not pin.wanted("optimizer.pt")
    assert not pin.wanted(".tmpAbCdEf")
    assert not pin.wanted("sub/model.part")


def test_prune_removes_what_the_source_no_longer_has(make_folder: Any, tmp_path: Path) -> None:
    """After a re-save with fewer shards the old ones leave the pin; its origin note stays."""
    source, target = make_folder(shards=3), tmp_path / "pin"
    _refresh(source, target, PinMethod.HARD_LINK)
    origin.write(target, {"source": str(source)})
    (source / "model-00003-of-00003.safetensors").unlink()
    pin.prune(target, list_files(source))
    assert not (target / "model-00003-of-00003.safetensors").exists()
    assert (target / "model-00002-of-00003.safetensors").exists()
    assert origin.read(target) == {"source": str(source)}


def test_releasing_is_final_and_may_be_repeated(make_folder: Any, tmp_path: Path) -> None:
    """The source stays, the pin is gone, a second release does nothing."""
    source, target = make_folder(), tmp_path / "pin"
    _refresh(source, target, PinMethod.HARD_LINK)
    before = _content(source)
    pin.release(target)
    pin.release(target)
    assert not target.exists()
    assert _content(source) == before


def test_the_probe_finds_a_method_and_leaves_nothing(tmp_path: Path) -> None:
    """Its verdict works for a real file, and the probe's own files are gone."""
    method = pin.probe(tmp_path)
    assert method in {PinMethod.REFLINK, PinMethod.HARD_LINK}
    assert not list((tmp_path / pin.FOLDER_NAME).iterdir())


def test_a_root_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """The probe says which folder, and what to do."""
    (tmp_path / "root").write_text("a file, not a folder")
    with pytest.raises(StorageFailed, match="write access"):
        pin.probe(tmp_path / "root")


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, NoSpace), (errno.EIO, StorageFailed)])
def test_a_full_or_failing_disk_is_our_error(
    number: int, error: type[Exception], make_folder: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """The failure carries our class, and no half-made file stays in the pin."""
    source, target = make_folder(), tmp_path / "deep" / "pin"

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(shutil, "copyfileobj", refuse)
    with pytest.raises(error):
        _refresh(source, target, PinMethod.COPY)
    assert _content(target) == {}


def test_an_unreadable_source_is_the_sources_fault(
    make_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight file of mode 0600 that must be copied is named, with advice, not our storage."""
    source, target = make_folder(), tmp_path / "pin"
    real_open = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith("model.safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(CheckpointUnsupported, match="0600"):
        _refresh(source, target, PinMethod.COPY)


def test_open_files_keep_what_cannot_be_linked(make_folder: Any, tmp_path: Path) -> None:
    """Weights are held while the folder grows, and copied from there when the trainer is gone."""
    source, target, held = make_folder(shards=2, step=3), tmp_path / "pin", OpenFiles()
    before = _content(source)
    report = pin.refresh(
        source, list_files(source), target, PinMethod.OPEN_FILES, held=held, early=True
    )
    assert report.left == ()
    assert not list(target.glob("*.safetensors"))
    shutil.rmtree(source)
    assert held.deleted_bytes() >= sum(
        len(content) for name, content in before.items() if name.endswith(".safetensors")
    )
    pin.materialize(target, held)
    assert _content(target) == {n: b for n, b in before.items() if n != "optimizer.pt"}
    assert held.deleted_bytes() == 0


def test_a_file_that_went_before_the_copy_is_copied_from_what_is_held(
    make_folder: Any, tmp_path: Path
) -> None:
    """Between the last look and the copy the trainer may delete one file: it is pinned all the same."""
    source, target, held = make_folder(), tmp_path / "pin", OpenFiles()
    listing = list_files(source)
    before = _content(source)
    pin.refresh(source, listing, target, PinMethod.OPEN_FILES, held=held, early=True)
    (source / "model.safetensors").unlink()
    report = pin.refresh(source, listing, target, PinMethod.OPEN_FILES, held=held)
    assert report.vanished == ()
    assert (target / "model.safetensors").read_bytes() == before["model.safetensors"]


def test_a_file_that_is_replaced_is_held_anew(make_folder: Any, tmp_path: Path) -> None:
    """A rename over a held file is another file: the new one is kept, the old one let go."""
    source, target, held = make_folder(), tmp_path / "pin", OpenFiles()
    pin.refresh(source, list_files(source), target, PinMethod.OPEN_FILES, held=held, early=True)
    new = source / "new"
    new.write_bytes((source / "model.safetensors").read_bytes()[:-1] + b"!")
    new.rename(source / "model.safetensors")
    pin.refresh(source, list_files(source), target, PinMethod.OPEN_FILES, held=held, early=True)
    assert held.deleted_bytes() == 0
    shutil.rmtree(source)
    pin.materialize(target, held)
    assert (target / "model.safetensors").read_bytes().endswith(b"!")


def test_too_many_open_files_wait_for_the_copy(make_folder: Any, tmp_path: Path) -> None:
    """What is not held is said to be left, so that nobody takes the pin for whole."""
    source, target, held = make_folder(shards=3), tmp_path / "pin", OpenFiles(most=2)
    report = pin.refresh(
        source, list_files(source), target, PinMethod.OPEN_FILES, held=held, early=True
    )
    assert report.left == ("model-00003-of-00003.safetensors", "model.safetensors.index.json")
    pin.refresh(source, list_files(source), target, PinMethod.OPEN_FILES, held=held)
    assert len(list(target.glob("*.safetensors"))) == 3


def test_one_file_that_cannot_be_linked_is_held(
    make_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another mount below the root, another user's file: one step down the ladder, for that file."""
    source, target, held = make_folder(shards=2), tmp_path / "pin", OpenFiles()
    link = os.link

    def refuse(path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).endswith("00002-of-00002.safetensors"):
            raise PermissionError(errno.EPERM, "protected_hardlinks")
        link(path, *args, **kwargs)

    monkeypatch.setattr(os, "link", refuse)
    pin.refresh(source, list_files(source), target, PinMethod.HARD_LINK, held=held, early=True)
    assert [path.name for path in target.glob("*.safetensors")] == [
        "model-00001-of-00002.safetensors"
    ]
    assert held.names(target) == ("model-00002-of-00002.safetensors",)
    held.release(target)


def test_the_probe_goes_down_the_ladder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither clones nor links work, files are held open; where /proc is closed, copied."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EPERM, "not here")

    monkeypatch.setitem(pin._ACTS, PinMethod.REFLINK, refuse)
    monkeypatch.setitem(pin._ACTS, PinMethod.HARD_LINK, refuse)
    assert pin.probe(tmp_path) is PinMethod.OPEN_FILES
    monkeypatch.setattr(open_files, "works", lambda folder: False)
    assert pin.probe(tmp_path) is PinMethod.COPY
    assert not list((tmp_path / pin.FOLDER_NAME).iterdir())


def test_shards_of_zero_leave_the_pin_when_the_weights_come(
    make_folder: Any, tmp_path: Path
) -> None:
    """While only optimizer shards are there they are the weights; gathered ones replace them."""
    source, target = tmp_path / "checkpoint-3", tmp_path / "pin"
    shard = source / "global_step3" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    optim = source / "global_step3" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    shard.parent.mkdir(parents=True)
    for path in (shard, optim):
        path.write_bytes(b"PK\x03\x04")
    _refresh(source, target, PinMethod.HARD_LINK)
    assert (target / optim.relative_to(source)).exists()
    whole_folder = make_folder("other", step=3)
    for path in whole_folder.iterdir():
        shutil.copy(path, source / path.name)
    _refresh(source, target, PinMethod.HARD_LINK)
    assert not (target / optim.relative_to(source)).exists()
    assert (target / "model.safetensors").exists()


def test_files_of_the_run_are_pinned_with_what_needs_them(tmp_path: Path) -> None:
    """config.json beside the checkpoint of a sharded layout stays as it was when it was pinned."""
    run, target = tmp_path / "run", tmp_path / "pin"
    source = run / "checkpoint-3"
    source.mkdir(parents=True)
    (source / ".metadata").write_bytes(b"x")
    (source / "__0_0.distcp").write_bytes(b"x")
    (run / "config.json").write_text('{"model_type": "llama"}')
    (run / "train.log").write_text("lines")
    _refresh(source, target, PinMethod.HARD_LINK)
    (run / "config.json").write_text("{}")
    kept = assets.run_folder(target, run)
    assert kept != run
    assert json.loads((kept / "config.json").read_text()) == {"model_type": "llama"}
    assert not (kept / "train.log").exists()
    pin.prune(target, list_files(source))
    assert (kept / "config.json").exists()
    assert not any(".ckptd-run" in file.relpath for file in list_files(target).files)


def test_a_run_without_a_model_beside_it_is_pinned_as_that(tmp_path: Path) -> None:
    """What comes into the run's folder after the pin was made is not taken for the checkpoint's."""
    run, target = tmp_path / "run", tmp_path / "pin"
    source = run / "checkpoint-3"
    source.mkdir(parents=True)
    (source / "model.safetensors").write_bytes(b"x")
    _refresh(source, target, PinMethod.HARD_LINK)
    (run / "config.json").write_text("{}")
    assert assets.in_run(assets.run_folder(target, run)) == ()
    _refresh(source, target, PinMethod.HARD_LINK)
    assert [path.name for path in assets.in_run(assets.run_folder(target, run))] == ["config.json"]


def test_a_rewrite_in_place_under_a_hard_link_is_told(make_folder: Any, tmp_path: Path) -> None:
    """Bytes, size or times moved: by name. The trainer deleting its own name is no rewrite."""
    source, target = make_folder(), tmp_path / "pin"
    _refresh(source, target, PinMethod.HARD_LINK)
    before = list_files(target)
    weights = source / "model.safetensors"
    stat = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert whole.changed(before, list_files(target)) == (
        "model.safetensors was rewritten and its times put back"
    )
    between = list_files(target)
    weights.unlink()
    assert whole.changed(between, list_files(target)) is None
    with (target / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "bytes before" in (whole.changed(between, list_files(target)) or "")


def test_a_pin_that_is_half_removed_says_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it is removed: the next start finds the origin and removes the rest."""
    pin_path = tmp_path / "pin"
    origin.write(pin_path, {"owner": "me"})
    (pin_path / "model.safetensors").write_bytes(b"x")

    def killed(self: Path, *, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            pin.release(pin_path)
    assert origin.read(pin_path) == {"owner": "me"}
    pin.release(pin_path)
    assert not pin_path.exists()


def test_what_a_killed_probe_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """Files of a process that is gone; those of one that lives are its own."""
    folder = tmp_path / pin.FOLDER_NAME
    folder.mkdir()
    host = os.uname().nodename
    gone, alive = folder / f".probe-{host}-99999999", folder / f".probed-{host}-1"
    gone.touch()
    alive.touch()
    pin.probe(tmp_path)
    assert list(folder.iterdir()) == [alive]
