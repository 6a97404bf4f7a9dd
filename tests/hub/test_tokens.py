"""Where the token comes from, and which files are not believed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckptd import errors
from ckptd.hub import tokens
from ckptd.hub.client import HubClient
from ckptd.telemetry import logs

TOKEN = "hf_" + "t0Ken" * 7


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(0o600)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_the_order_of_places(tmp_path: Path) -> None:
    """The environment, then systemd's credential, then the named file; an empty one is none."""
    named = write(tmp_path / "named", "hf_named00\n")
    write(tmp_path / "credentials/hf-token", "hf_credential\n")
    environ = {
        "HF_TOKEN": " hf_variable ",
        "CREDENTIALS_DIRECTORY": str(tmp_path / "credentials"),
        "HF_TOKEN_PATH": str(named),
    }
    found = []
    for absent in (None, "HF_TOKEN", "CREDENTIALS_DIRECTORY", "HF_TOKEN_PATH"):
        environ.pop(absent or "", None)
        token = tokens.find(environ)
        found.append(token.text if token else None)
    assert found == ["hf_variable", "hf_credential", "hf_named00", None]


@pytest.mark.parametrize(
    ("mode", "who"), [(0o644, "others"), (0o640, "its group"), (0o602, "others")]
)
def test_a_file_that_is_open_to_others_is_refused(tmp_path: Path, mode: int, who: str) -> None:
    """The reason and the command that mends it are told, the token is not."""
    path = write(tmp_path / "token", TOKEN, mode)
    with pytest.raises(errors.HubUnauthorized) as caught:
        tokens.find({"HF_TOKEN_PATH": str(path)})
    text = str(caught.value)
    assert f"{path} is open to {who} (mode {mode:04o})" in text
    assert f"chmod 600 {path}" in text
    assert TOKEN not in text
    assert caught.value.retry is errors.Retry.WAIT


def test_a_credential_is_guarded_by_systemd(tmp_path: Path) -> None:
    """Its mode shows the mask of an access list, not who may read it; named by HF_TOKEN_PATH too."""
    path = write(tmp_path / "hf-token", TOKEN, 0o440)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path), "HF_TOKEN_PATH": str(path)}
    found = tokens.find(environ)
    assert found is not None
    assert found.text == TOKEN
    path.rename(tmp_path / "other")
    found = tokens.find(environ | {"HF_TOKEN_PATH": str(tmp_path / "other")})
    assert found is not None
    assert found.origin == str(tmp_path / "other")


@pytest.mark.parametrize("text", ["", "\n", "hf_one hf_two", "{\n}", "hf_\x00", "ü", "x" * 70_000])
def test_what_is_no_token_is_refused(tmp_path: Path, text: str) -> None:
    """An empty file, two words, or something else altogether: said, not sent to the Hub."""
    path = write(tmp_path / "token", text)
    with pytest.raises(errors.HubUnauthorized, match=str(path)):
        tokens.find({"HF_TOKEN_PATH": str(path)})


def test_no_special_file_is_read(tmp_path: Path) -> None:
    """A pipe does not hang the job, a folder is named, an absent file is."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, why in (
        ("pipe", "no regular file"),
        ("", "no regular file"),
        ("gone", "No such file"),
    ):
        with pytest.raises(errors.HubUnauthorized, match=why):
            tokens.find({"HF_TOKEN_PATH": str(tmp_path / name)})


def test_a_found_token_is_hidden_everywhere(tmp_path: Path) -> None:
    """Whatever it looks like, it is taken out of texts from then on, and out of its own repr."""
    odd = "not-like-a-token-at-all"
    found = tokens.find({"HF_TOKEN": odd})
    assert odd not in logs.without_secrets(f"server said: {odd}!")
    assert odd not in repr(found)


def test_the_login_of_the_library_must_be_private_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of `hf auth login` is held to the same."""
    path = write(tmp_path / "login", TOKEN, 0o644)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(path))
    with pytest.raises(errors.HubUnauthorized, match="is open to others"):
        tokens.find({})
    path.chmod(0o600)
    found = tokens.find({})
    assert found is not None
    assert found.text == TOKEN


async def test_without_a_token_nobody_is_asked() -> None:
    """No token anywhere: said with where to put one, before any request."""
    with pytest.raises(errors.HubUnauthorized, match="there is no token"):
        await HubClient(endpoint="http://127.0.0.1:9").whoami()
