"""Merging tags into a model card."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from ckptd import errors
from ckptd.hub import card

BODY = "# My model\n\nTrained on *everything*.   \n\n---\n\ntags: not these\n"


def metadata(text: str) -> dict[str, object]:
    front = text.split("---", 2)[1]
    return YAML(typ="safe", pure=True).load(front) or {}


def test_body_and_other_metadata_keep_every_byte() -> None:
    """Only the lines that are asked for are new; comments, order and body stay."""
    text = (
        "---\nlicense: apache-2.0 # ours\ntags:\n  - llama   # the family\n  - en\n"
        "model-index:\n- name: x\n  value: .nan\nlibrary_name: 'transformers'\n---\n" + BODY
    )
    merged = card.merge(text, tags=["ckptd", "en"])
    assert merged == text.replace("  - en\n", "  - en\n  - ckptd\n")


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("", ["a", "b"]),
        ("tags:\n", ["a", "b"]),
        ("tags: []\n", ["a", "b"]),
        ("tags: ~\n", ["a", "b"]),
        ("tags: x\n", ["x", "a", "b"]),
        ("tags: [x, a]\n", ["x", "a", "b"]),
        ("tags: [x, 'a, b',]\nlicense: mit\n", ["x", "a, b", "a", "b"]),
        ("tags:\n- x\nlicense: mit\n", ["x", "a", "b"]),
        ("license: mit\ntags:\n- x", ["x", "a", "b"]),
        ("tags:\n- |-\n  x\nlicense: mit\n", ["x", "a", "b"]),
        ("tags:\n- x\n\n# a comment\nlicense: mit\n", ["x", "a", "b"]),
    ],
)
def test_tags_are_added_however_they_are_written(front: str, expected: list[str]) -> None:
    """Block lists, flow lists, a single word and nothing at all take new tags; the rest stays."""
    text = (
        f"---\n{front}\n---\n{BODY}" if front and front[-1] != "\n" else f"---\n{front}---\n{BODY}"
    )
    merged = card.merge(text, tags=["a", "b"])
    assert metadata(merged)["tags"] == expected
    assert metadata(merged).get("license") == metadata(text).get("license")
    assert merged.endswith(f"---\n{BODY}")


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4))
def test_any_tag_survives(tags: list[str]) -> None:
    """A tag is read back as it was given, or the merge is refused; merging again changes nothing."""
    try:
        merged = card.merge("---\ntags: [x]\n---\nbody", tags=tags)
    except errors.HubRejected:
        return
    assert metadata_exact(merged) == ["x", *dict.fromkeys(tag for tag in tags if tag != "x")]
    assert card.merge(merged, tags=tags) == merged


def metadata_exact(text: str) -> object:
    match = card._FRONT_MATTER.match(text)
    assert match is not None
    return YAML(typ="safe", pure=True).load(match["yaml"])["tags"]


@pytest.mark.parametrize("tag", ["yes", "12", "a: b", "it's", "- x", "#x", "null", "1e3", "é"])
def test_awkward_tags_stay_strings(tag: str) -> None:
    """A tag that YAML would read as something else is quoted."""
    assert metadata_exact(card.merge("---\n---\n", tags=[tag])) == [tag]


def test_a_card_without_front_matter_gets_one() -> None:
    """The text below stays as it is."""
    merged = card.merge(BODY, tags=["ckptd"])
    assert merged.endswith(f"---\n{BODY}")
    assert metadata(merged) == {"library_name": "transformers", "tags": ["ckptd"]}


def test_an_absent_card_is_made() -> None:
    """A repo without a card gets a short one with the tags and the library."""
    merged = card.merge(None, tags=["ckptd"], name="tiny")
    assert metadata(merged) == {"library_name": "transformers", "tags": ["ckptd"]}
    assert "# tiny" in merged


def test_windows_line_ends_stay() -> None:
    """A card written with CRLF keeps CRLF everywhere, the new lines included."""
    text = "---\r\ntags:\r\n- x\r\n---\r\nbody\r\n"
    merged = card.merge(text, tags=["y"])
    assert "\n" not in merged.replace("\r\n", "")
    assert metadata(merged)["tags"] == ["x", "y"]


def test_no_tags_change_nothing() -> None:
    """Without tags even a broken card is left alone."""
    assert card.merge("---\n: : :\n---\n", tags=[]) == "---\n: : :\n---\n"


def test_another_library_stays() -> None:
    """A library_name that is there is not overwritten."""
    text = "---\nlibrary_name: timm\n---\n"
    assert metadata(card.merge(text, tags=["x"]))["library_name"] == "timm"


@pytest.mark.parametrize(
    "front", ["tags: [x\n", "- a\n- b\n", "{tags: [x]}\n", "a: &t [x]\ntags: *t\n", "a: 1\na: 2\n"]
)
def test_cards_that_cannot_be_edited_are_refused(front: str) -> None:
    """Broken, foreign or aliased front matter is refused by name, with what to do."""
    with pytest.raises(errors.HubRejected, match=r"README\.md.*correct the card"):
        card.merge(f"---\n{front}---\n", tags=["y"])


def test_our_section_is_put_once_and_replaced() -> None:
    """The section stands at the end, is replaced where it is, and the rest keeps every byte."""
    text = "---\ntags: [a]\n---\n# Title\n\nBody  \n"
    once = card.with_section(text, "## Ours\n\nfirst")
    assert once.startswith(text.rstrip())
    assert card.with_section(once, "## Ours\n\nfirst") == once
    edited = once + "\nwritten below\n"
    again = card.with_section(edited, "## Ours\n\nsecond")
    assert "first" not in again
    assert again == edited.replace("first", "second")


FACTS = card.Facts(
    base_model="acme/base",
    relation="adapter",
    borrowed=(("license", "llama3"), ("license_link", "https://x/y"), ("pipeline_tag", "any")),
)
PEFT = """---
base_model: /data/models/base
library_name: peft
licence: license
tags:
- base_model:adapter:/data/models/base
- lora
# kept
datasets: [a/b]
---
"""


def _merged(text: str, facts: card.Facts = FACTS) -> str:
    merged = card.merge(text, tags=["ckptd"], library="peft", facts=facts)
    assert card.merge(merged, tags=["ckptd"], library="peft", facts=facts) == merged
    return merged


def test_what_the_card_lacks_is_completed() -> None:
    """Base, relation, license and task come in; a trainer's folder and placeholder go out."""
    merged = _merged(PEFT + BODY)
    assert metadata_of(merged) == {
        "base_model": "acme/base",
        "library_name": "peft",
        "tags": ["base_model:adapter:acme/base", "lora", "ckptd"],
        "datasets": ["a/b"],
        "base_model_relation": "adapter",
        "license": "llama3",
        "license_link": "https://x/y",
        "pipeline_tag": "any",
    }
    assert "# kept\n" in merged
    assert merged.endswith(f"---\n{BODY}")


def test_a_base_that_the_hub_does_not_know_is_not_named() -> None:
    """Without a name on the Hub the folder is taken out, and no relation to nothing is claimed."""
    merged = _merged(PEFT + BODY, card.Facts(relation="adapter"))
    assert "/data/models" not in merged
    assert metadata_of(merged) == {
        "library_name": "peft",
        "tags": ["lora", "ckptd"],
        "datasets": ["a/b"],
    }


@pytest.mark.parametrize(
    ("front", "key", "expected"),
    [
        ("base_model: me/mine\n", "base_model", "me/mine"),
        ("base_model:\n- me/mine\n- me/other\n", "base_model", ["me/mine", "me/other"]),
        ("base_model:\n- /data/mine\n# x\n", "base_model", "acme/base"),
        ("base_model: ''\n", "base_model", "acme/base"),
        ("base_model_relation: merge\n", "base_model_relation", "merge"),
        ("license: mit\n", "license", "mit"),
        ("license: mit\n", "license_link", None),
        ("license_name: ours\n", "license", None),
        ("license:\n", "license", "llama3"),
        ("license: ~ # which?\n", "license", "llama3"),
        ("tags: 'base_model:adapter:./x'\n", "tags", ["base_model:adapter:acme/base", "ckptd"]),
        ("tags: [a, 'base_model:adapter:~/x', b]\n", "tags",
         ["a", "base_model:adapter:acme/base", "b", "ckptd"]),
    ],
)  # fmt: skip
def test_what_the_card_says_stays(front: str, key: str, expected: object) -> None:
    """Nothing that somebody wrote is overwritten; a license is never put together from two."""
    merged = _merged(f"---\n{front}---\n{BODY}")
    assert metadata_of(merged).get(key) == expected
    assert merged.endswith(f"---\n{BODY}")


def metadata_of(text: str) -> dict[str, object]:
    match = card._FRONT_MATTER.match(text)
    assert match is not None
    found = YAML(typ="safe", pure=True).load(match["yaml"])
    assert isinstance(found, dict)
    return found


def test_the_places_a_template_left_open() -> None:
    """TRL and PEFT leave repo and base open; both are known when a card is published."""
    text = (
        "# Model Card for Model ID\n"
        "of [None](https://huggingface.co/None).\n"
        'generator = pipeline("text-generation", model="None", device="cuda")\nNone of this.\n'
    )
    assert card.filled(text, repo_id="acme/run", facts=FACTS) == (
        "# Model Card for run\n"
        "of [acme/base](https://huggingface.co/acme/base).\n"
        'generator = pipeline("text-generation", model="acme/run", device="cuda")\nNone of this.\n'
    )
    assert card.filled(text, repo_id=None, facts=card.NOTHING) == text


def test_what_is_borrowed_from_a_base() -> None:
    """License and task, nothing else; a card that cannot be read lends nothing."""
    text = "---\nlicense: other\nlicense_name: x\npipeline_tag: any\ntags: [a]\nlanguage: en\n---\n"
    found = dict(card.borrowed(text))
    assert found == {"license": "other", "license_name": "x", "pipeline_tag": "any"}
    assert card.borrowed("---\n: : :\n---\n") == card.borrowed("no front matter") == ()
    assert card.over({"license": "mit"}, found) == {"license": "mit", "pipeline_tag": "any"}


@pytest.mark.parametrize(
    "front",
    [
        "date: 2024-02-31\n",
        "n: !!int x\n",
        "n: !!bool x\n",
        "n: " + "9" * 5000 + "\n",
        "n: " + "[" * 600 + "\n",
        ": \nlibrary_name:\n",
        "&a a: &b [*b]\n",
    ],
)
def test_front_matter_that_no_reader_takes_is_refused(front: str) -> None:
    """Days that no month has, tags that lie, nesting: the card is named, and stays as it is."""
    with pytest.raises(errors.HubRejected, match=r"README\.md"):
        card.merge(f"---\n{front}---\n", tags=["x"])


def test_aliases_that_make_millions_of_values_are_refused() -> None:
    """A few lines that name each other nine times are not written out."""
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)]
    with pytest.raises(errors.HubRejected, match="more than 200,000 values"):
        card.merge("---\na0: &a0 [x, x]\n" + "".join(lines) + "---\n", tags=["x"])


def test_a_card_may_use_aliases() -> None:
    """An alias of a name is read as what it stands for, and stays as it is written."""
    text = "---\nbase_model: &m x/y\nother: *m\n---\n"
    merged = card.merge(text, tags=["z"], library="")
    assert "other: *m\n" in merged
    assert metadata(merged)["other"] == "x/y"
