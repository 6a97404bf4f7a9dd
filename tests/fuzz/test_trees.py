"""Folders of any shape: links, loops, pipes, sockets, names that are no text."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.checkpoint import completeness, gguf_files, layouts
from ckptd.checkpoint.checkpoint import open_checkpoint
from ckptd.checkpoint.listing import list_files
from ckptd.errors import CkptdError
from tests.checkpoint import gguf_file
from tests.fuzz.targets import CONFIG, Violation, open_folder, safetensors_bytes

NAMES = (
    b"config.json", b"model.safetensors", b"model.safetensors.index.json", b"trainer_state.json",
    b"pytorch_model.bin", b".metadata", b"__0_0.distcp", b"model.gguf", b"adapter_config.json",
    b"adapter_model.safetensors", b"latest", b"README.md", b"tokenizer.json", b"no-utf8-\xff.json",
    b"new\nline.txt", b"\x1b[31m.md", b"a", b"a/b", b"a/config.json", b"global_step1/x_optim_states.pt",
)  # fmt: skip
KINDS = (
    "file",
    "whole",
    "empty",
    "folder",
    "fifo",
    "socket",
    "out",
    "up",
    "loop",
    "dangling",
    "inside",
)
SECRET = b'{"model_type": "stolen", "global_step": 77}'
TREES = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(KINDS), max_size=8)


@contextmanager
def limited(seconds: int = 20) -> Iterator[None]:
    """Fail a test that waits for a pipe: SIGALRM ends the wait."""

    def end(number: int, frame: object) -> None:
        raise Violation("it waits")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def make(folder: Path, name: bytes, kind: str, outside: Path) -> None:
    """Put one thing of `kind` at `name` below `folder`, where the place is free."""
    place = folder / os.fsdecode(name)
    if place.is_symlink() or place.exists() or not _free(place.parent, folder):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    match kind:
        case "file":
            place.write_bytes(b'{"weight_map": {"a": "../secret.safetensors"}}')
        case "whole":
            is_weights = name.endswith(b".safetensors")
            place.write_bytes(safetensors_bytes() if is_weights else json.dumps(CONFIG).encode())
        case "empty":
            place.touch()
        case "folder":
            place.mkdir()
        case "fifo":
            os.mkfifo(place)
        case "socket":
            _socket(place)
        case "out":
            place.symlink_to(outside / "secret.json")
        case "up":
            place.symlink_to(os.path.relpath(outside, place.parent))
        case "loop":
            place.symlink_to(place.name)
        case "dangling":
            place.symlink_to("nothing/here")
        case "inside":
            place.symlink_to(folder / "config.json")


def _free(parent: Path, folder: Path) -> bool:
    chain = (parent, *parent.parents)
    ours = [one for one in chain if one != folder and one.is_relative_to(folder)]
    return all(not one.is_symlink() and (one.is_dir() or not one.exists()) for one in ours)


def _socket(place: Path) -> None:
    before = os.open(".", os.O_RDONLY)
    os.chdir(place.parent)  # the address of a socket holds some hundred characters only
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.fsencode(place.name))
    finally:
        os.fchdir(before)
        os.close(before)


def _refusal(folder: Path) -> str | None:
    """Return the text with which the folder is refused, as it would be written down."""
    try:
        open_folder(folder)
    except CkptdError as error:
        return str(error).encode("utf-8").decode("utf-8")
    return None


_numbers = iter(range(1 << 30))


@settings(
    max_examples=120, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(tree=TREES)
def test_trees_of_any_shape_keep_the_promise(tmp_path: Path, tree: dict[bytes, str]) -> None:
    """A folder of anything is opened or refused; no link out of it is followed, no pipe read."""
    outside = tmp_path / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "secret.json").write_bytes(SECRET)
    folder = tmp_path / f"{next(_numbers)}" / "checkpoint-3"
    folder.mkdir(parents=True)
    for name, kind in tree.items():
        make(folder, name, kind, outside)
    with limited():
        listing = list_files(folder)
        assert all(listing.path_of(file).resolve().is_relative_to(folder) for file in listing.files)
        assert layouts.step_of(folder, folder.name) != 77
        said = _refusal(folder)
    assert said is None or (str(folder) in said and "stolen" not in said)


@pytest.mark.parametrize("kind", ["fifo", "out", "up", "loop", "socket", "folder"])
@pytest.mark.parametrize("name", ["trainer_state.json", "config.json", "README.md"])
def test_a_strange_file_beside_good_weights_is_not_read(
    tmp_path: Path, name: str, kind: str
) -> None:
    """Pipes, sockets, folders and links out of the folder are left alone beside good weights."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_bytes(SECRET)
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    make(folder, name.encode(), kind, outside)
    make(folder, b"config.json", "whole", outside)
    make(folder, b"model.safetensors", "whole", outside)
    with limited():
        if name == "config.json":
            with pytest.raises(CkptdError, match=r"config\.json is missing"):
                open_checkpoint(folder)
            return
        source = open_checkpoint(folder)
    assert source.step == 3
    assert name not in {file.relpath for file in source.side_files}


def test_links_beside_a_single_gguf_file_are_not_followed(tmp_path: Path) -> None:
    """The files that travel with a GGUF file lie in its folder themselves."""
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "secret.json").write_bytes(SECRET)
    (folder / "config.json").symlink_to(tmp_path / "secret.json")
    (folder / "tokenizer.json").write_text("{}")
    model = folder / "model.gguf"
    model.write_bytes(
        gguf_file.encode(entries=[gguf_file.Entry("token_embd.weight", (4, 32), 0, bytes(512))])
    )
    assert set(gguf_files.beside(model).by_name) == {"model.gguf", "tokenizer.json"}


def test_a_folder_whose_name_is_no_text_is_refused_in_text(tmp_path: Path) -> None:
    """The text of an error can be written into a log and a database whatever the folder is called."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff"))
    folder.mkdir()
    with pytest.raises(CkptdError) as caught:
        open_checkpoint(folder)
    assert r"run-\udcff" in str(caught.value).encode("utf-8").decode()


_LOOK = """
import sys
from pathlib import Path
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
import ckptd.checkpoint.checkpoint as checkpoint
from ckptd.errors import CkptdError
opened.clear()
try:
    checkpoint.open_checkpoint(Path(sys.argv[1]))
except CkptdError as error:
    print(error)
names = {n if isinstance(n, str) else repr(n) for n in opened}
print(*sorted(n for n in names if not n.endswith((".py", ".pyc"))), sep="\\n", file=sys.stderr)
"""


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_shards_outside_of_the_folder_are_never_opened(tmp_path: Path, shard: str) -> None:
    """An index that names files elsewhere is refused before any of them is opened."""
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.safetensors").write_bytes(safetensors_bytes())
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    done = subprocess.run(
        [sys.executable, "-c", _LOOK, str(folder)], capture_output=True, text=True, check=True
    )
    assert "not a file name beside the index" in done.stdout
    assert done.stderr.split() == [str(folder / "model.safetensors.index.json")]


def test_judging_never_waits_for_a_pipe(tmp_path: Path) -> None:
    """The watcher's look at a folder of pipes with the names of a model ends at once."""
    for name in NAMES[:11]:
        os.mkfifo(tmp_path / os.fsdecode(name))
    with limited():
        facts = completeness.examine(tmp_path, list_files(tmp_path))
    assert facts.missing is not None
