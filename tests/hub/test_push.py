"""The push id and the texts that carry it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ckptd.hub import push

TARGET = push.Target(repo_id="acme/run", commit_message="run at step 100")


def test_the_push_id_is_a_function_of_its_parts() -> None:
    """The same content, pipeline and target give the same id; any other gives another."""
    parts = {"content_digest": "a", "pipeline_digest": "b", "target": "c"}
    made = push.push_id(**parts)
    assert made == push.push_id(**parts)
    others = {push.push_id(**{**parts, key: "x"}) for key in parts}
    assert len(others | {made}) == 4
    assert push.push_id(content_digest="ab", pipeline_digest="", target="c") != push.push_id(
        content_digest="a", pipeline_digest="b", target="c"
    )


def test_only_the_whole_line_carries_an_id() -> None:
    """An id that begins like ours, or that is mentioned in a sentence, is somebody else's."""
    assert push.carries("why\n\nckptd-push-id: abc\r\n", "abc")
    assert not push.carries("ckptd-push-id: abcd", "abc")
    assert not push.carries("see ckptd-push-id: abc", "abc")


@pytest.mark.parametrize(
    ("message", "title", "rest"),
    [
        ("one line", "one line", ""),
        ("first\n\nsecond\nthird", "first", "second\nthird"),
        ("  padded \n", "padded", ""),
        ("", "Publish acme/run", ""),
        ("v1", "Publish acme/run v1", "v1"),
        ("x" * 300, "x" * 199 + "…", "x" * 300),
    ],
)
def test_any_message_fits_the_hub(message: str, title: str, rest: str) -> None:
    """Titles have 3 to 200 characters; what has no room goes into the description."""
    target = replace(TARGET, commit_message=message)
    assert push.title(target) == title
    assert 3 <= len(push.title(target)) <= 200
    expected = f"{rest}\n\nckptd-push-id: p" if rest else "ckptd-push-id: p"
    assert push.description(target, "p") == expected


def test_a_long_description_keeps_the_id() -> None:
    """Text is cut, the push id never."""
    text = push.description(replace(TARGET, commit_description="y" * 100_000), "p")
    assert len(text) < 65_536
    assert push.carries(text, "p")
