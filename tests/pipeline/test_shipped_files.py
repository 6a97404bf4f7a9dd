"""The files that ship are found however ckptd is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckptd
from ckptd import errors
from ckptd.pipeline import shipped


def test_checkout() -> None:
    """In an editable installation the folders of the repository are used."""
    assert (shipped.folder("pipelines") / "publish.yaml").is_file()
    assert (shipped.folder("systemd") / "ckptd.service").is_file()


def test_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a wheel the package's own data is used."""
    package = tmp_path / "site-packages" / "ckptd"
    (package / "data" / "pipelines").mkdir(parents=True)
    (package / "data" / "pipelines" / "mine.yaml").write_text("")
    monkeypatch.setattr(ckptd, "__file__", str(package / "__init__.py"))
    assert shipped.names() == ["mine"]
    assert shipped.definition_path("mine") == package / "data" / "pipelines" / "mine.yaml"
    with pytest.raises(errors.StorageFailed):
        shipped.folder("systemd")


@pytest.mark.parametrize("text", ["absent.yaml", "./publish", "a/b"])
def test_paths(text: str) -> None:
    """What is spelled like a path is one, whether it is there or not."""
    assert shipped.definition_path(text) == Path(text)


def test_unknown_name() -> None:
    """A bare name that does not ship is refused with the names that do."""
    with pytest.raises(errors.UsageError) as caught:
        shipped.definition_path("reshrad")
    assert "did you mean 'reshard'" in caught.value.message
    assert "publish-pr" in str(caught.value.hint)
