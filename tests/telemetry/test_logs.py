"""Logs: both forms, and the secrets that never leave."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from ckptd.telemetry import logs

TOKEN = "hf_" + "a1B2" * 8


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    yield
    root.handlers[:], root.level = before
    structlog.reset_defaults()


def record(stream: io.StringIO) -> dict[str, Any]:
    [line] = stream.getvalue().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def test_json_is_one_object_a_line() -> None:
    """A record is one JSON object with phrase, level, time and fields, tracebacks included."""
    stream = io.StringIO()
    logs.configure(stream, output="json")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        structlog.get_logger().exception("job failed", job="abc", size=5)
    found = record(stream)
    assert (found["event"], found["level"], found["job"], found["size"]) == (
        "job failed",
        "error",
        "abc",
        5,
    )
    assert found["timestamp"].endswith("Z")
    assert "ValueError: two" in found["exception"]


def test_auto_writes_json_where_nobody_looks() -> None:
    """A stream that is no terminal gets JSON."""
    stream = io.StringIO()
    logs.configure(stream)
    structlog.get_logger().info("ready")
    assert record(stream)["event"] == "ready"


def test_console_is_readable() -> None:
    """At a terminal a record is one line of phrase and fields, plain without colours."""
    stream = io.StringIO()
    logs.configure(stream, output="console")
    structlog.get_logger().info("checkpoint settled", path="/runs/a")
    assert "checkpoint settled" in stream.getvalue()
    assert "path=/runs/a" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_level_is_kept() -> None:
    """What is below the level is not written."""
    stream = io.StringIO()
    logs.configure(stream, output="json", level="warning")
    structlog.get_logger().info("quiet")
    assert stream.getvalue() == ""


def test_other_libraries_take_the_same_way() -> None:
    """Records of standard logging have the same form, and lose their secrets, too."""
    stream = io.StringIO()
    logs.configure(stream, output="json")
    logging.getLogger("some.library").warning("sent Authorization: Bearer %s", TOKEN)
    assert record(stream)["event"] == f"sent Authorization: Bearer {logs.HIDDEN}"


@pytest.mark.parametrize("output", ["json", "console"])
@pytest.mark.parametrize(
    "fields",
    [
        {"text": f"token {TOKEN} was refused"},
        {"headers": {"authorization": f"Bearer {TOKEN}"}},
        {"headers": [("Authorization", "Bearer " + TOKEN)]},
        {"token": TOKEN},
        {"hub_token": TOKEN},
        {"deep": {"a": [{"b": (TOKEN,)}]}},
        {"error": ValueError(f"bad {TOKEN}")},
        {"url": f"https://user:{TOKEN}@host/x"},
        {"map": {TOKEN: 1}},
    ],
)
def test_tokens_never_leave(output: logs.Format, fields: dict[str, Any]) -> None:
    """A token is hidden in every form of a field."""
    stream = io.StringIO()
    logs.configure(stream, output=output)
    structlog.get_logger().info("asked", **fields)
    assert TOKEN not in stream.getvalue()
    assert "asked" in stream.getvalue()


def test_tokens_never_leave_in_tracebacks() -> None:
    """A token in the text of an exception is hidden in its traceback."""
    stream = io.StringIO()
    logs.configure(stream, output="json")
    try:
        raise ValueError(f"cannot log in with {TOKEN}")
    except ValueError:
        structlog.get_logger().exception("login failed")
    assert TOKEN not in stream.getvalue()
    assert "cannot log in with" in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("Basic dXNlcjpwYXNz", "Basic [hidden]"),
        ("https://s3/x?X-Amz-Signature=abc&b=1", "https://s3/x?X-Amz-Signature=[hidden]&b=1"),
        ("https://me:secret@host/a@b", "https://[hidden]@host/a@b"),
        ("my own-secret here", "my [hidden] here"),
        ("acme/hf_model at refs/pr/1", "acme/hf_model at refs/pr/1"),
        ("num_tokens 5", "num_tokens 5"),
    ],
)
def test_what_is_hidden_in_text(text: str, hidden: str) -> None:
    """Credentials, signatures and named secrets are hidden, names that look alike stay."""
    assert logs.SecretFilter(["own-secret"]).text(text) == hidden


def test_fields_that_are_no_secrets_stay() -> None:
    """Numbers of tokens are no tokens, and whether one is there is no secret."""
    event = {"num_tokens": 5, "tokenizer": "x", "token": True, "token_count": 7, "password": None}
    assert logs.SecretFilter()(None, "info", dict(event)) == event
