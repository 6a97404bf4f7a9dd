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
- Xet. hf_xet is used when installed; `disable_xet` sends this process' uploads over LFS. hf_xet
  reads its settings from HF_XET_* when its first session begins; those in `XET_DEFAULTS` bound its
  memory, and the environment wins over them. On fast links with few cores
  HF_XET_XORB_COMPRESSION_POLICY=none doubles its speed.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

import httpx2
from huggingface_hub import constants, set_client_factory, utils
from huggingface_hub.utils import _http, _runtime, _xet_progress_reporting
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars

from ckptd.hub import translate

XET_DEFAULTS = {
    "HF_XET_DATA_MAX_CONCURRENT_FILE_INGESTION": "1",
    "HF_XET_CLIENT_AC_INITIAL_UPLOAD_CONCURRENCY": "1",
    "HF_XET_CLIENT_AC_MAX_UPLOAD_CONCURRENCY": "2",
}
"""Measured on 750 MB of bfloat16 over loopback, two cores: 300 MB of memory in place of 540 MB with
hf_xet's own values, and no slower. Long fat links want more uploads at once."""
LONGEST_INNER_WAIT_S = 10.0
"""A storage answer that asks for more than this is handed to ckptd's own backoff."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds that one socket operation may take; not the whole request."""

    connect_s: float = 10.0
    read_s: float = 120.0
    """Between two pieces of an answer; a large commit takes the Hub tens of seconds."""
    write_s: float = 60.0
    pool_s: float = 60.0
    """Waiting for a free connection."""


Meter = Callable[[int], None]
"""Is told how many more bytes of the current upload were sent; negative when a part starts over."""

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
        return super().request(method, url, **options)

    def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """Send; raise at once what the library would otherwise sleep over (see the module)."""
        stores = request.method == "PUT"
        meter = _METER.get()
        if stores and meter is not None and isinstance(request.stream, httpx2.SyncByteStream):
            request.stream = _Counted(request.stream, meter)
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
        return response


def _surfaces(response: httpx2.Response, *, stores: bool) -> bool:
    """Say whether an answer is to be raised before the library sleeps over it."""
    status = response.status_code
    if stores:
        asked_s = translate.asked_wait_s(response.headers)
        return status in translate.TRANSIENT and (asked_s or 0.0) > LONGEST_INNER_WAIT_S
    creates = response.request.url.path.endswith("/api/repos/create")
    return status in translate.TRANSIENT or (status == 409 and creates)  # it would spin on that 409


class _Counted(httpx2.SyncByteStream):
    """A request body that tells a meter what was taken from it, and takes it back when re-sent."""

    def __init__(self, stream: httpx2.SyncByteStream, meter: Meter) -> None:
        self._stream = stream
        self._meter = meter

    def __iter__(self) -> Iterator[bytes]:
        sent = 0
        whole = False
        try:
            for chunk in self._stream:
                sent += len(chunk)
                self._meter(len(chunk))
                yield chunk
            whole = True
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
