"""Logs: fixed phrases with fields, for a person at a terminal or as JSON for the journal.

`configure` is called once, by the command that starts; everything else says
`structlog.get_logger().info("checkpoint settled", path=...)`. Records of other libraries (standard
`logging`) take the same way out. No secret leaves: the last step before a record becomes text
replaces tokens wherever they stand, in messages, fields and tracebacks.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import Processor

Format = Literal["auto", "console", "json"]
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
_QUIET_LIBRARIES = ("httpx", "httpcore", "filelock", "asyncio")
_SHORTEST_SECRET_CHARS = 6
_DEEPEST = 8


class SecretFilter:
    """A structlog processor that replaces secrets in a record, however deep they stand.

    Hidden are Hub tokens, values of `Authorization` headers, signatures in URLs, values of fields
    named like a secret (`token`, `authorization`, `password`...), and every text in `secrets`.
    """

    def __init__(self, secrets: Collection[str] = ()) -> None:
        literal = [re.escape(text) for text in secrets if len(text) >= _SHORTEST_SECRET_CHARS]
        self._literal = re.compile("|".join(literal)) if literal else None

    def __call__(
        self, logger: object, method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        """Return `event` without secrets."""
        return {key: self._clean(value, key=str(key), depth=0) for key, value in event.items()}

    def text(self, text: str) -> str:
        """Return `text` without secrets."""
        if self._literal is not None:
            text = self._literal.sub(HIDDEN, text)
        for pattern, replacement in _SECRET_TEXTS:
            text = pattern.sub(replacement, text)
        return text

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

    `auto` writes for people where `stream` is a terminal and JSON elsewhere. `secrets` are texts
    that must never appear, such as a token that does not look like one.
    """
    as_json = output == "json" or (output == "auto" and not stream.isatty())
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
        _json_renderer() if as_json else _console_renderer(colors=stream.isatty()),
    ]
    handler = logging.StreamHandler(stream)
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


def _json_renderer() -> Processor:
    return structlog.processors.JSONRenderer(ensure_ascii=False)


def _console_renderer(*, colors: bool) -> Processor:
    render: Callable[..., str] = structlog.dev.ConsoleRenderer(
        colors=colors, pad_event_to=30, exception_formatter=structlog.dev.plain_traceback
    )
    return render
