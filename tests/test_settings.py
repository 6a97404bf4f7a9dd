"""Settings: where they come from, and what is said when they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptd import errors, settings


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without settings of ours; returns the configuration folder."""
    import os

    for name in list(os.environ):
        if name.startswith("CKPTD_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setenv("CONFIGURATION_DIRECTORY", str(tmp_path / "etc"))
    (tmp_path / "etc").mkdir()
    return tmp_path / "etc"


def test_defaults_follow_systemd(clean: Path) -> None:
    """Without any setting, systemd's folders and the documented defaults hold."""
    found = settings.load()
    assert found.database_path == clean.parent / "state" / "jobs.sqlite3"
    assert found.pipelines_dir == clean / "pipelines.d"
    assert (found.slots, found.byte_budget, found.scan_interval) == (1, 256_000_000, 1.0)
    assert (found.network_scan_interval, found.log_format) == (15.0, "auto")
    assert found.retry_limits.cap_s == 900.0


def test_defaults_follow_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without systemd, the user's own folders are used."""
    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.delenv("CONFIGURATION_DIRECTORY")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg-state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg-config"))
    found = settings.load()
    assert found.state_dir == tmp_path / "xdg-state" / "ckptd"
    assert found.pipelines_dir == tmp_path / "xdg-config" / "ckptd" / "pipelines.d"


def test_each_source_wins_over_the_next(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command line over environment over file over default."""
    (clean / "ckptd.yaml").write_text("slots: 2\nthreads: 3\nbyte_budget: 64MiB\nlease: 2m\n")
    monkeypatch.setenv("CKPTD_SLOTS", "4")
    monkeypatch.setenv("CKPTD_BYTE_BUDGET", "1GB")
    found = settings.load(overrides={"slots": 8})
    assert (found.slots, found.threads, found.byte_budget) == (8, 3, 1_000_000_000)
    assert (found.lease, found.log_level) == (120.0, "info")


def test_every_problem_names_its_source(clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong is said at once: line of the file, name of the variable."""
    path = clean / "ckptd.yaml"
    path.write_text("slotss: 2\nthreads: many\nlog_level: loud\nbyte_budget: 1MB\n")
    monkeypatch.setenv("CKPTD_SCAN_INTERVAL", "5 parsecs")
    monkeypatch.setenv("CKPTD_SLOTS", "0")
    with pytest.raises(errors.SettingsError) as caught:
        settings.load(overrides={"retry_cap": 2.0})
    lines = sorted(str(caught.value).splitlines())
    assert [line.replace(str(path), "F").split(" (")[0] for line in lines] == [
        "F:1:1: slotss: unknown setting 'slotss'; did you mean 'slots'?",
        (
            "F:2:10: threads: must be a valid integer, unable to parse string as an integer, "
            "found 'many'"
        ),
        "F:3:12: log_level: must be 'debug', 'info', 'warning' or 'error', found 'loud'",
        "F:4:14: byte_budget: must be greater than or equal to 16000000, found '1MB'",
        "command line: retry_cap: must be at least retry_base",
        "environment: CKPTD_SCAN_INTERVAL: not a duration: '5 parsecs'",
        "environment: CKPTD_SLOTS: must be greater than or equal to 1, found '0'",
    ]


@pytest.mark.parametrize("name", ["token", "hf_token", "hub_token"])
def test_token_is_no_setting(name: str, clean: Path) -> None:
    """A token in the file is refused with the right place for it, and never repeated."""
    (clean / "ckptd.yaml").write_text(f"{name}: hf_abcdefghijkl\n")
    with pytest.raises(errors.SettingsError, match="HF_TOKEN_PATH") as caught:
        settings.load()
    assert "hf_abc" not in str(caught.value)


def test_named_file_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A settings file that was named and is absent is an error, by argument or variable."""
    with pytest.raises(errors.SettingsError, match=r"none\.yaml:1:1: cannot be read"):
        settings.load(tmp_path / "none.yaml")
    monkeypatch.setenv("CKPTD_SETTINGS", str(tmp_path / "none.yaml"))
    with pytest.raises(errors.SettingsError, match=r"none\.yaml"):
        settings.load()


def test_broken_file_is_a_settings_error(clean: Path) -> None:
    """YAML that cannot be read is reported with its line, as an error of the settings."""
    (clean / "ckptd.yaml").write_text("slots: 1\nslots: 2\n")
    with pytest.raises(errors.SettingsError, match=r"ckptd\.yaml:2:1: slots: given twice"):
        settings.load()


def test_file_of_comments_means_defaults(clean: Path) -> None:
    """A settings file with everything commented out is all defaults."""
    (clean / "ckptd.yaml").write_text("# slots: 2\n\n  # threads: 3\n")
    assert settings.load().slots == 1


@pytest.mark.parametrize("url", ["huggingface.co", "https://me:secret@hub"])
def test_wrong_endpoint(url: str, clean: Path) -> None:
    """An endpoint is a plain URL."""
    with pytest.raises(errors.SettingsError) as caught:
        settings.load(overrides={"hub_endpoint": url})
    assert "secret" not in str(caught.value)


def test_misspelt_variables_are_told() -> None:
    """A variable that looks like a setting and is none is worth a warning."""
    assert settings.unknown_variables({"CKPTD_SLOT": "1", "CKPTD_SLOTS": "1", "HOME": "/"}) == [
        "unknown variable 'CKPTD_SLOT'; did you mean 'CKPTD_SLOTS'?"
    ]


def test_every_setting_is_documented() -> None:
    """Each setting says what it is, and how it is without being set."""
    for name, field in settings.Settings.model_fields.items():
        assert field.description, name
        assert "Default" in field.description, name


@pytest.mark.parametrize(
    ("text", "bytes_per_s"), [("50MB/s", 50_000_000), ("1MiB/s", 1 << 20), ("200000", 200_000)]
)
def test_the_upload_limit_is_a_rate(text: str, bytes_per_s: int, clean: Path) -> None:
    """With or without `/s`; the default is no limit."""
    assert settings.load().upload_limit is None
    assert settings.load(overrides={"upload_limit": text}).upload_limit == bytes_per_s


@pytest.mark.parametrize("text", ["50", "0MB/s", "fast", "50MB/h"])
def test_an_upload_limit_that_is_none_is_refused(text: str, clean: Path) -> None:
    """Too low to ever finish, or no rate: the setting is named."""
    with pytest.raises(errors.SettingsError, match="upload_limit"):
        settings.load(overrides={"upload_limit": text})


def test_a_setting_in_capitals_is_told_with_its_place(clean: Path) -> None:
    """Names are taken in any case; what is wrong with one is told where it stands."""
    (clean / "ckptd.yaml").write_text("slots: 1\nState_dir: 5\n")
    with pytest.raises(errors.SettingsError, match=r"ckptd\.yaml:2:12: State_dir"):
        settings.load()
