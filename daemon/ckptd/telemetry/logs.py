"""Logs: fixed phrases with fields, for a person at a terminal or as JSON for the journal.

`configure` is called once, by the command that starts; everything else says
`structlog.get_logger().info("checkpoint settled", path=...)`. Records of other libraries (standard
`logging`) take the same way out. No secret leaves: the last step before a record becomes text
replaces tokens wherever they stand, in messages, fields and tracebacks. `keep_secret` names a text
that must not leave this process from now on; whoever reads a token calls it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any, Literal, TextIO
from urllib.parse import quote

import structlog
from structlog.typing import Processor

from ckptd.telemetry import journal

Format = Literal["auto", "console", "json", "journal"]
Level = Literal["debug", "info", "warning", "error"]

HIDDEN = "[hidden]"

_SECRET_KEYS = re.compile(
    r"(^|[_-])(token|authorization|password|secret|cookie|credentials?|api[_-]?key)$",
    re.IGNORECASE,
)
_SECRET_TEXTS = (
    (re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{8,}"), HIDDEN),
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]+", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (re.compile(r"(://)[^/@\s]+@"), rf"\1{HIDDEN}@"),
    (
        re.compile(
            r"([?&](?:X-Amz-Signature|X-Amz-Credential|X-Amz-Security-Token|Signature|Key-Pair-Id"
            r"|Policy|sig|token)=)[^&\s\"']+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
)
_QUIET_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "filelock", "asyncio")
_SHORTEST_SECRET_CHARS = 6
_DEEPEST = 8


_kept: set[str] = set()
"""Of this process, like its logging: a token is replaced while filters that know the old one live."""


def keep_secret(text: str) -> None:
    """Hide `text` from every log line and error of this process, from now on."""
    if len(text) >= _SHORTEST_SECRET_CHARS:
        _kept.update({text, quote(text, safe=""), json.dumps(text)[1:-1]})


def without_kept(text: str) -> str:
    """Return `text`, which may be JSON and stays so, without what `keep_secret` was given."""
    for secret in sorted(_kept, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def without_secrets(text: str) -> str:
    """Return `text` without secrets, for what leaves this process on other ways than its logs."""
    text = without_kept(text)
    for pattern, replacement in _SECRET_TEXTS:
        text = pattern.sub(replacement, text)
    return text


class SecretFilter:
    """A structlog processor that replaces secrets in a record, however deep they stand.

    Hidden are Hub tokens, values of `Authorization` headers, signatures in URLs, values of fields
    named like a secret (`token`, `authorization`, `password`...), and every text that was given to
    `keep_secret`, `secrets` among them.
    """

    def __init__(self, secrets: Collection[str] = ()) -> None:
        for text in secrets:
            keep_secret(text)

    def __call__(
        self, logger: object, method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        """Return `event` without secrets."""
        return {key: self._clean(value, key=str(key), depth=0) for key, value in event.items()}

    def text(self, text: str) -> str:
        """Return `text` without secrets."""
        return without_secrets(text)

    def _clean(self, value: object, *, key: str, depth: int) -> object:
        if value is not None and not isinstance(value, bool) and _SECRET_KEYS.search(key):
            return HIDDEN
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, str):
            return self.text(value)
        if depth < _DEEPEST and isinstance(value, Mapping):
            return {
                self.text(str(name)): self._clean(item, key=str(name), depth=depth + 1)
                for name, item in value.items()
            }
        if depth < _DEEPEST and isinstance(value, (list, tuple, set, frozenset)):
            return [self._clean(item, key="", depth=depth + 1) for item in value]
        return self.text(str(value))


def configure(
    stream: TextIO,
    *,
    output: Format = "auto",
    level: Level = "info",
    secrets: Collection[str] = (),
) -> None:
    """Send all logs of this process to `stream`; calling it again replaces what was set.

    `auto` writes for people where `stream` is a terminal, entries with fields where it goes to
    systemd's journal (as `journal` does always), and JSON elsewhere. `secrets` are texts
    that must never appear, such as a token that does not look like one.
    """
    if output == "auto":
        output = _format_for(stream)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    # Tracebacks become text before the filter, so that it sees what stands in them.
    last: list[Processor] = [
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,
        SecretFilter(secrets),
        _renderer(output, stream),
    ]
    handler = (
        journal.JournalHandler(stream) if output == "journal" else logging.StreamHandler(stream)
    )
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=last)
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def _format_for(stream: TextIO) -> Format:
    if journal.is_stdout(stream):
        return "journal"
    return "console" if stream.isatty() else "json"


def _renderer(output: Format, stream: TextIO) -> Processor:
    if output == "journal":
        return journal.render
    return _json_renderer() if output == "json" else _console_renderer(colors=stream.isatty())


def _json_renderer() -> Processor:
    return structlog.processors.JSONRenderer(ensure_ascii=False)


def _console_renderer(*, colors: bool) -> Processor:
    render: Callable[..., str] = structlog.dev.ConsoleRenderer(
        colors=colors, pad_event_to=30, exception_formatter=structlog.dev.plain_traceback
    )
    return render
