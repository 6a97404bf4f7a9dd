"""How this process talks HTTP to a Hub: timeouts, who retries, progress, Xet on or off.

The one place that sets huggingface_hub's process-wide state, all of it through `configure`. The
library reads its environment while it is imported, so these are its attributes, not variables.

- Timeouts. Its own client has none: a stalled upload would hang for ever. Ours are per socket
  operation, so a slow link passes and a dead one does not.
- Retries. It sleeps inside the call, in a thread, without a cap on what the server asks. So
  failures that may pass surface at once and ckptd waits (visible, capped, cancellable); only the
  PUT of bytes to storage is still repeated inside, because it repeats one part where ckptd would
  repeat the file. Even there a long wait asked for by the server surfaces.
- Progress. Bytes handed to the socket by an upload (LFS) are counted into the `Meter` of the thread
  that runs it; for Xet its own reports are. They count as sent, not as confirmed.
- Redirects. What writes keeps its method and its body, whichever redirect it is, for a GET in its
  place would look like an upload that arrived; only a 303 to a POST says "done, look there".
- Pace. `limit_uploads` caps what this process sends, all uploads together: our own requests while
  they are handed to the socket, those of hf_xet on their way through `xet_gate`.
- Xet. hf_xet is used when installed; `disable_xet` sends this process' uploads over LFS. hf_xet
  reads its settings from HF_XET_* when its first session begins; those in `XET_DEFAULTS` bound its
  memory and its patience, and the environment wins over them. On fast links with few cores
  HF_XET_XORB_COMPRESSION_POLICY=none doubles its speed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlsplit

import httpx2
from huggingface_hub import constants, set_client_factory, utils
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import _http, _runtime, _xet_progress_reporting
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars

from ckptd.hub import dialect, pace, translate, xet_gate

XET_DEFAULTS = {
    "HF_XET_DATA_MAX_CONCURRENT_FILE_INGESTION": "1",
    "HF_XET_CLIENT_AC_INITIAL_UPLOAD_CONCURRENCY": "1",
    "HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY": "2",
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "3",
}
"""The last one: half a minute of tries that nobody sees in place of four, for LFS is there. The
others: measured on 750 MB of bfloat16 over loopback, two cores: 300 MB of memory in place of 540 MB with
hf_xet's own values, and no slower. Long fat links want more uploads at once."""
_BUSY = b"Cannot create repo: another conflicting operation is in progress"
_WITH_BODY = frozenset({"POST", "PUT"})
_WRITES = _WITH_BODY | {"DELETE"}
_SEE_OTHER = 303
_REWIND = "ckptd.rewind"
"""The extension of a request that puts its body back to where it began."""
LONGEST_INNER_WAIT_S = 10.0
"""A storage answer that asks for more than this is handed to ckptd's own backoff."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds that one socket operation may take; not the whole request."""

    connect_s: float = 10.0
    read_s: float = 60.0
    """Between two pieces of an answer."""
    work_s: float = 180.0
    """The same where the Hub works before it answers: a large commit, many parts put together."""
    write_s: float = 60.0
    pool_s: float = 60.0
    """Waiting for a free connection."""


LONGEST_XORB_BYTES = 64 << 20
"""hf_xet sends so much in one request, and gives up what has no answer after its read time-out."""

Meter = Callable[[int], None]
"""Is told how many more bytes of the current upload were sent; negative when a part starts over."""

_PACE = pace.Pace()
"""Of this process."""
_GATES: list[xet_gate.Gate] = []
"""The way out of hf_xet, made with the first cap."""
_METER: ContextVar[Meter | None] = ContextVar("ckptd_upload_meter", default=None)


@contextlib.contextmanager
def metered(meter: Meter) -> Iterator[None]:
    """Count the bytes that uploads of this thread send meanwhile into `meter`."""
    token = _METER.set(meter)
    try:
        yield
    finally:
        _METER.reset(token)


def configure(timeouts: Timeouts | None = None) -> None:
    """Set up huggingface_hub for this process; the same again changes nothing.

    Other timeouts close the connections that are open, so set them before the first call.
    """
    for name, value in XET_DEFAULTS.items():
        os.environ.setdefault(name, value)
    limits = timeouts if timeouts is not None else Timeouts()
    if _Session.limits != limits:
        _Session.limits = limits
        set_client_factory(_Session)
    _http.logger.addFilter(translate.clean_record)  # its lines name signed upload links
    constants.HF_HUB_DISABLE_TELEMETRY = True  # or each process asks the endpoint who calls it
    if not are_progress_bars_disabled():
        disable_progress_bars()
    warnings.filterwarnings("ignore", message="Warnings while validating metadata in README")
    _report_xet_progress()


def limit_uploads(bytes_per_s: float | None, *, endpoint: str = "") -> None:
    """Send no more than this from now on, all uploads of this process together; None for no cap.

    Set it before the first upload: hf_xet keeps the way out that it began with.
    """
    _PACE.bytes_per_s = bytes_per_s
    if bytes_per_s is None:
        return
    if not _GATES:
        _GATES.append(xet_gate.Gate(_PACE))
    os.environ[xet_gate.VARIABLE] = str(_GATES[0].path)
    slowest_s = int(2 * LONGEST_XORB_BYTES / bytes_per_s) + 300
    os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", f"{slowest_s}s")
    parts = urlsplit(endpoint)
    if parts.scheme == "https" and parts.hostname and parts.port:
        _GATES[0].ports[parts.hostname] = parts.port


def uses_xet() -> bool:
    """Say whether uploads of this process go through Xet."""
    return bool(_runtime.is_xet_available())


def disable_xet() -> None:
    """Send this process' uploads over LFS from now on. The library reads this at every upload."""
    constants.HF_HUB_DISABLE_XET = True


class _Session(httpx2.Client):
    """The HTTP client under huggingface_hub, with timeouts, visible failures and counted bytes."""

    limits: ClassVar[Timeouts | None] = None
    """Those of this process; None until `configure` was called."""

    def __init__(self) -> None:
        limits = self.limits or Timeouts()
        super().__init__(
            event_hooks={"request": [_http.hf_request_event_hook]},
            follow_redirects=True,
            timeout=httpx2.Timeout(
                connect=limits.connect_s,
                read=limits.read_s,
                write=limits.write_s,
                pool=limits.pool_s,
            ),
        )

    def request(self, method: str, url: httpx2.URL | str, **options: Any) -> httpx2.Response:
        """Send with what the library gets wrong put right.

        It passes `timeout=None` (repo_info does), which means no timeout at all; and raw bodies as
        `data`, which httpx2 warns about, where it means `content`.
        """
        if options.get("timeout", self.timeout) is None:
            del options["timeout"]
        data = options.get("data")
        if data is not None and not isinstance(data, Mapping):
            options["content"] = options.pop("data")
            if hasattr(data, "seek"):
                rewind = functools.partial(data.seek, data.tell())
                options["extensions"] = {**(options.get("extensions") or {}), _REWIND: rewind}
        return super().request(method, url, **options)

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send; raise at once what the library would otherwise sleep over (see the module)."""
        stores = request.method == "PUT"
        if request.method == "POST" and _works_long(request):
            request.extensions.get("timeout", {})["read"] = (self.limits or Timeouts()).work_s
        meter = _METER.get() if stores else None
        if isinstance(request.stream, httpx2.SyncByteStream) and request.method in _WITH_BODY:
            rewind = request.extensions.get(_REWIND, lambda: None)
            request.stream = _Counted(request.stream, meter or (lambda _: None), rewind)
        try:
            response = super().send(request, **options)
        except httpx2.TransportError as exc:
            if stores:
                raise
            # The library's own loop catches the subclasses, not this class itself.
            text = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
            raise httpx2.TransportError(text, request=request) from exc
        if _surfaces(response, stores=stores):
            response.read()
            _http.hf_raise_for_status(response)
        if request.method in _WRITES and 300 <= response.status_code < 400:
            response.read()
            raise HfHubHTTPError("a redirect that leads nowhere", response=response)
        if request.method != "POST":
            return response
        if request.url.path.endswith(dialect.BATCH):
            _raise_for_objects(response)
        return dialect.usual(request, response)

    def _redirect_method(self, request: httpx2.Request, response: httpx2.Response) -> str:
        """Return the method with which a redirect is followed; where it stays, so does the body."""
        if request.method in _WRITES and (
            request.method == "PUT" or response.status_code != _SEE_OTHER
        ):
            return request.method
        return super()._redirect_method(request, response)


def _works_long(request: httpx2.Request) -> bool:
    """Say whether a POST makes a commit, or (without a token) puts the parts of an upload together."""
    return "/commit/" in request.url.path or "authorization" not in request.headers


def _surfaces(response: httpx2.Response, *, stores: bool) -> bool:
    """Say whether an answer is to be raised before the library sleeps over it."""
    status = response.status_code
    if stores:
        asked_s = translate.asked_wait_s(response.headers)
        return status in translate.TRANSIENT and (asked_s or 0.0) > LONGEST_INNER_WAIT_S
    return status in translate.TRANSIENT or (status == 409 and _spins(response))


def _spins(response: httpx2.Response) -> bool:
    """Say whether it is the answer on which the library asks again at once, for ever.

    Any other 409 is left to it: under `exist_ok` it means that the repo is there.
    """
    creates = response.request.url.path.endswith("/api/repos/create")
    return creates and _BUSY in response.read()


def _raise_for_objects(response: httpx2.Response) -> None:
    """Raise what a batch answer says of its objects as if it were the answer's own status.

    The library makes a bare text of it, without the code that says whether to wait or to give up.
    """
    try:
        objects = response.json().get("objects") or []
        problems = [item["error"] for item in objects if item.get("error")]
        codes = [int(problem.get("code") or 0) for problem in problems]
    except (ValueError, TypeError, AttributeError, KeyError):
        return  # not a batch answer; the library says so
    if problems and codes[0] >= 400:
        told = {"error": str(problems[0].get("message") or "refused")}
        _http.hf_raise_for_status(
            httpx2.Response(codes[0], json=told, headers=_named(response), request=response.request)
        )


def _named(response: httpx2.Response) -> dict[str, str]:
    names = ("X-Request-Id", "Retry-After", "RateLimit")
    return {name: response.headers[name] for name in names if name in response.headers}


class _Counted(httpx2.SyncByteStream):
    """A request body at this process' pace.

    It tells a meter what was taken from it, and takes that back when it is sent again: a redirect
    asks for the body of its request once more, which then begins where it had begun.
    """

    def __init__(
        self, stream: httpx2.SyncByteStream, meter: Meter, rewind: Callable[[], object]
    ) -> None:
        self._stream = stream
        self._meter = meter
        self._rewind = rewind
        self._num_begun = 0
        self._counted = 0

    def __iter__(self) -> Iterator[bytes]:
        if self._num_begun:
            self._meter(-self._counted)
            self._counted = 0
            self._rewind()
        self._num_begun += 1
        sent = 0
        whole = False
        try:
            for chunk in _PACE.pieces(self._stream):
                sent += len(chunk)
                self._meter(len(chunk))
                yield chunk
            whole = True
            self._counted = sent
        finally:
            if not whole:
                self._meter(-sent)

    def close(self) -> None:
        self._stream.close()


def _report_xet_progress() -> None:
    """Let Xet uploads report to our meter.

    The library reports them only to the progress bar class that it looks up by these two names at
    every upload; both are replaced for that one use. Without them (another version) uploads work
    the same and report once, at their end.
    """
    if hasattr(_xet_progress_reporting, "XetUploadProgressReporter"):
        # The type checker is right that these are not meant to be replaced.
        _xet_progress_reporting.XetUploadProgressReporter = _XetReports  # type: ignore[misc,assignment]
        utils.are_progress_bars_disabled = lambda name=None: _METER.get() is None  # type: ignore[attr-defined]


class _XetReports:
    """Stands in for the library's Xet progress bars: passes bytes on to the thread's meter."""

    def __init__(self) -> None:
        self._meter = _METER.get()
        self._sent = 0

    def update_progress(self, group: Any, items: Any = None) -> None:
        """Take one report; `group` counts the bytes of the files that are processed so far."""
        del items
        sent = int(group.total_bytes_completed)
        if self._meter is not None and sent > self._sent:
            self._meter(sent - self._sent)
            self._sent = sent

    def close(self) -> None:
        """End of the upload."""
