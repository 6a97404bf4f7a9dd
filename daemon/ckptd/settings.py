"""The daemon's settings: one YAML file and `CKPTD_*` variables, read once and strictly.

Order: command line over environment over file over defaults. Everything wrong is reported at once,
each with the variable or the place in the file it came from. A token is never a setting: it comes
from HF_TOKEN, from the file that HF_TOKEN_PATH names (systemd: LoadCredential), or from the
client's own login, so that it stands in no file of ours and in no log.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from ckptd import errors, units
from ckptd.checkpoint.writer import Cache
from ckptd.jobs.failing import RetryLimits
from ckptd.pipeline import locate
from ckptd.pipeline.staged import StagingKind
from ckptd.telemetry import node

PREFIX = "CKPTD_"
FILE_NAME = "ckptd.yaml"
FILE_VARIABLE = "CKPTD_SETTINGS"
"""Names the settings file where the command line does not."""
FIXED_BYTES = 400_000_000
"""What a runner takes beside its byte budget: Python, torch on the CPU, the Hub's client."""

_ABOUT_TOKENS = (
    "a token is not a setting: set HF_TOKEN, or HF_TOKEN_PATH to a file that only ckptd can read"
)


def _bytes(value: object) -> object:
    if isinstance(value, str) and value.strip().isdigit():
        return int(value)
    return units.parse_bytes(value) if isinstance(value, (str, int)) else value


def _seconds(value: object) -> object:
    return units.parse_duration(value) if isinstance(value, (str, int, float)) else value


def _rate(value: object) -> object:
    if isinstance(value, str):
        value = value.strip().removesuffix("/s")
    return _bytes(value)


Rate = Annotated[int, BeforeValidator(_rate)]
ByteSize = Annotated[int, BeforeValidator(_bytes)]
Seconds = Annotated[float, BeforeValidator(_seconds)]


def default_state_path() -> Path:
    """Return systemd's state folder where there is one, else the user's (XDG)."""
    given = os.environ.get("STATE_DIRECTORY")
    return Path(given.split(":")[0]) if given else platformdirs.user_state_path("ckptd")


def default_configuration_path() -> Path:
    """Return systemd's configuration folder where there is one, else the user's (XDG)."""
    given = os.environ.get("CONFIGURATION_DIRECTORY")
    return Path(given.split(":")[0]) if given else platformdirs.user_config_path("ckptd")


class Settings(BaseSettings):
    """What the daemon of one machine may use, and how it behaves."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )

    state_dir: Path = Field(default_factory=default_state_path)
    """Folder of the job database and of staged files; made if absent. Needs room for the largest
    model you publish. Default: $STATE_DIRECTORY (systemd), else the user's state folder."""
    pipelines_dir: Path = Field(
        default_factory=lambda: default_configuration_path() / "pipelines.d"
    )
    """Folder of definition files; reloaded when they change. Default: pipelines.d in
    $CONFIGURATION_DIRECTORY (systemd), else in the user's configuration folder."""
    slots: Annotated[int, Field(ge=1, le=64)] = 1
    """Runner processes, so jobs at a time. One job already keeps disk and network busy; more helps
    only with several disks or a Hub that limits each connection. Default 1."""
    byte_budget: Annotated[ByteSize, Field(ge=16_000_000)] = 256_000_000
    """Most tensor bytes that a runner holds at a time; peak memory is this plus a fixed part,
    whatever the model's size. More helps slow disks little. Default 256MB, at least 16MB."""
    threads: Annotated[int, Field(ge=1, le=256)] = 2
    """Threads that read and write, and that compute on the CPU, in each runner. Two fill most
    disks and leave the cores to the trainer. Default 2."""
    cache: Cache = Cache.DIRECT
    """What writing does to the node's page cache. `direct`: files go past it, so that a job of 700 GB
    takes nothing from what the trainer reads, and costs little processor time. `drop`: through it,
    and dropped from it once on the disk. `keep`: through it, and left there. Where a file system
    cannot write directly, `direct` is `drop`. Default direct."""
    staging: StagingKind = "disk"
    """Where weights lie until the commit, for definitions that do not say: `disk` (the state folder)
    or `none`: each file is made while it is sent. Definitions without `push`, or with `verify`, need
    the files, and have them on disk. Default disk."""
    runner_memory: Annotated[ByteSize, Field(ge=500_000_000)] = Field(
        default_factory=lambda: max(4_000_000_000, node.memory_bytes() // 2)
    )
    """Most memory of its own (RLIMIT_DATA) that a runner may take; beyond it the job fails with
    figures and the trainer is not touched. Needs room for the byte budget, torch, and the whole
    model where a definition has `verify`. Not set on a node with an accelerator, whose driver maps
    memory of its own; the unit's MemoryMax holds there. Default: half of the node's memory (or of the cgroup's),
    at least 4GB."""
    nice: Annotated[int, Field(ge=0, le=19)] = 10
    """CPU niceness of runners, as nice(1) counts: the trainer's data loaders come first. 0 leaves
    it as the daemon's. Default 10."""
    io_priority: Literal["normal", "low", "idle"] = "low"
    """Disk priority of runners, where the I/O scheduler knows any: `low` is the last of the
    ordinary ones, `idle` runs only while nobody else does and may starve. Default low."""
    min_free: ByteSize | None = None
    """Free bytes on the disk of the state folder below which no job is begun; jobs wait, say so,
    and go on by themselves. The room belongs to the trainer's next checkpoint. 0 switches it off.
    Default: 2GB, or a twentieth of the disk where that is less."""
    max_queued: Annotated[int, Field(ge=1)] = 1000
    """Jobs that may be unfinished before new checkpoints have to wait for theirs; they stay pinned
    meanwhile. Bounds what a Hub that is away for days leaves to be done. Default 1000."""
    jobs_per_repo: Annotated[int, Field(ge=1)] = 1
    """Jobs at a time that push to one repo, whatever the revision: the Hub counts commits by repo.
    Default 1."""
    jobs_per_device: Annotated[int, Field(ge=1)] = 1
    """Jobs at a time that compute on one accelerator; its memory is shared with the trainer. Jobs
    on the CPU and jobs that only copy are bounded by `slots` alone. Default 1."""
    stall_timeout: Annotated[Seconds, Field(ge=10)] = 1800.0
    """Seconds without any sign of progress after which a running job is taken for hung: its runner
    is replaced, and where that fails systemd's watchdog ends the daemon. Fetching a base model and
    verifying a large one are silent for minutes. Default 30m."""
    stop_grace: Annotated[Seconds, Field(ge=0, le=3600)] = 10.0
    """Seconds that running jobs may go on after SIGTERM, so that one that is nearly done ends;
    what is not done goes on at the next start. A second signal does not wait. Default 10s."""
    history: Annotated[Seconds, Field(ge=86_400)] = 63_072_000.0
    """How long it is remembered what happened to ended jobs (each step of each try), and what
    became of checkpoints without one. Jobs themselves stay for good, for they keep anything from
    being published twice. Default 730d."""
    scan_interval: Annotated[Seconds, Field(ge=0.1, le=3600)] = 1.0
    """Seconds between scans of watched places on local disks. File system events wake the scan
    earlier; this is what finds that which events miss. A scan costs one look at each folder above
    the checkpoints; in trees of thousands of those it comes less often by itself. Default 1s."""
    network_scan_interval: Annotated[Seconds, Field(ge=0.1, le=3600)] = 15.0
    """The same for network file systems, which have no events and charge for every look.
    Default 15s."""
    lease: Annotated[Seconds, Field(ge=5, le=3600)] = 60.0
    """Seconds after which a job whose worker went silent is taken from it. Default 60s."""
    max_failures: Annotated[int, Field(ge=1)] = 50
    """Failures after which a job is given up; with the defaults below after about twelve hours.
    Default 50."""
    retry_base: Annotated[Seconds, Field(ge=0.1)] = 10.0
    """Longest pause after a first failure; doubles with each further one. Default 10s."""
    retry_cap: Annotated[Seconds, Field(ge=1)] = 900.0
    """Longest pause ever, also where the Hub asks for more. Default 15m."""
    wait_interval: Annotated[Seconds, Field(ge=1)] = 600.0
    """Seconds between tries of a job that waits for a person (a token, a permission).
    Default 10m."""
    pin_limit: Annotated[ByteSize, Field(ge=0)] = 500_000_000_000
    """Most bytes on disk that pins of all definitions may hold. Over it the oldest pins of jobs that
    do not run are dropped, and the jobs say so. Only what the trainer has deleted counts: a hard
    link whose source is there costs nothing. Room for some large checkpoints, and not for a disk
    that fills while the Hub is away. Default 500GB."""
    pin_age: Annotated[Seconds, Field(ge=0)] = 7 * 86_400.0
    """How long a failed or held job keeps its pin, and a failed one its staged files, for somebody
    to retry it; a held one keeps its output. A week has a weekend in it. Default 7d."""
    upload_limit: Annotated[Rate, Field(ge=100_000)] | None = None
    """Most bytes a second that all runners together send to the Hub, over LFS and Xet alike, such
    as `50MB/s`; each of `slots` gets its share. At least 100KB/s. Default: no limit."""
    hub_endpoint: str | None = None
    """URL of the Hub. Default: HF_ENDPOINT, else https://huggingface.co."""
    log_format: Literal["auto", "console", "json", "journal"] = "auto"
    """How logs look: for people, as JSON, as entries of systemd's journal with fields, or `auto`:
    for people at a terminal, for the journal where standard output goes there, else JSON.
    Default auto."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important kind of line that is written. Default info."""

    @property
    def database_path(self) -> Path:
        """Where the jobs are."""
        return self.state_dir / "jobs.sqlite3"

    @property
    def work_path(self) -> Path:
        """Where jobs stage their files, one folder each."""
        return self.state_dir / "work"

    @property
    def min_free_bytes(self) -> int:
        """The low-water mark of the state folder's disk; looks at the disk where it is not set."""
        if self.min_free is not None:
            return self.min_free
        try:
            return node.low_water_bytes(self.state_dir)
        except OSError:
            return node.LOW_WATER_BYTES

    @property
    def retry_limits(self) -> RetryLimits:
        """The limits as the job store takes them."""
        return RetryLimits(
            max_failures=self.max_failures,
            base_s=self.retry_base,
            cap_s=self.retry_cap,
            wait_s=self.wait_interval,
        )

    @field_validator("runner_memory")
    @classmethod
    def _check_memory(cls, memory_bytes: int, info: ValidationInfo) -> int:
        needed = info.data.get("byte_budget", 0) + FIXED_BYTES
        if memory_bytes < needed:
            raise ValueError(
                f"must be at least byte_budget and {units.format_bytes(FIXED_BYTES)} "
                f"({units.format_bytes(needed)}), found {units.format_bytes(memory_bytes)}"
            )
        return memory_bytes

    @field_validator("state_dir", "pipelines_dir")
    @classmethod
    def _check_path(cls, path: Path) -> Path:
        if not path.is_absolute():
            raise ValueError(f"must be an absolute path, found {str(path)!r}")
        return path

    @field_validator("hub_endpoint")
    @classmethod
    def _check_endpoint(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"must begin with http:// or https://, found {url!r}")
        if "@" in url:
            raise ValueError("must not hold a password or token")
        return url.rstrip("/")

    @field_validator("retry_cap")
    @classmethod
    def _check_cap(cls, cap_s: float, info: ValidationInfo) -> float:
        base_s = info.data.get("retry_base", cap_s)
        if cap_s < base_s:
            raise ValueError(f"must be at least retry_base ({base_s:g}s), found {cap_s:g}s")
        return cap_s

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the merged values alone: `load` reads the sources, to know where each is from."""
        return (init_settings,)


def load(path: Path | None = None, *, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings from the file at `path` and the environment.

    Without `path`, $CKPTD_SETTINGS names the file; without that, `ckptd.yaml` in the configuration
    folder is read if it is there. `overrides` (the command line) win over everything.

    Raises:
        SettingsError: the file is named but cannot be read, or anything is unknown or out of
            range; every problem with its source.
    """
    document = _document(path)
    from_file = document.data if document else {}
    from_environment = EnvSettingsSource(Settings)()
    given = dict(overrides or {})
    try:
        return Settings(**{**from_file, **from_environment, **given})
    except ValidationError as exc:
        written = {key.lower(): key for key in from_file} | {key: key for key in from_file}
        lines = []
        for detail in exc.errors():
            name, of_key = str(detail["loc"][0]), detail["type"] == "extra_forbidden"
            what = _unknown(name) if of_key else locate.explain(detail)
            if name in given:
                lines.append(f"command line: {name}: {what}")
            elif name in from_environment:
                lines.append(f"environment: {PREFIX}{name.upper()}: {what}")
            elif document is not None and name in written:
                loc = (written[name], *detail["loc"][1:])
                lines.append(str(document.problem(loc, what, of_key=of_key)))
            else:
                lines.append(f"default: {name}: {what}")
        raise errors.SettingsError("\n".join(lines)) from exc


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Return a sentence for every `CKPTD_*` variable that is no setting, for a warning."""
    known = {PREFIX + name.upper() for name in Settings.model_fields} | {FILE_VARIABLE}
    names = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    return [locate.unknown("variable", name, known) for name in names]


def _document(path: Path | None) -> locate.Document | None:
    named = path or (Path(text) if (text := os.environ.get(FILE_VARIABLE)) else None)
    file_path = named or default_configuration_path() / FILE_NAME
    if named is None and not file_path.exists():
        return None
    try:
        text = locate.read(file_path)
        if not any(
            line.strip() and not line.lstrip().startswith("#") for line in text.splitlines()
        ):
            return None  # nothing but comments: all defaults
        return locate.parse(text, file_path)
    except errors.DefinitionError as exc:
        raise errors.SettingsError(exc.message) from exc


def _unknown(name: str) -> str:
    if "token" in name.lower():
        return _ABOUT_TOKENS
    return locate.unknown("setting", name, Settings.model_fields)
