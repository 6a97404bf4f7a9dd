"""Chat templates: whole ones pass, cut ones are told where their syntax can tell."""

from __future__ import annotations

import pytest

from ckptd.checkpoint.signs import template

WHOLE = [
    "",
    "no tags at all, and a } or two }}",
    "{% for m in messages %}{{m['role']}}: {{m['content']}}\n{% endfor %}",
    "{%- if tools -%}{{ tools | tojson }}{%- else -%}none{%- endif -%}",
    "{{ {'a': {'b': 1}} }}",
    "{{ {'a': {'b': [1, (2)]}}['a'] }}{# a comment with {{ and ' in it #}",
    "{% set text = '%} }} \\' #}' %}{{ text }}",
    '{% macro say(x) %}{% if x %}{{ "it\'s" }}{% elif y %}{% endif %}{% endmacro %}',
    "{% generation %}{{ content }}{% endgeneration %}{{ -1 }}{{ 7 % 2 }}",
]


@pytest.mark.parametrize("text", WHOLE)
def test_a_whole_template_closes_what_it_opens(text: str) -> None:
    """Strings, brackets and comments may hold what looks like an end."""
    assert template.is_closed(text)


@pytest.mark.parametrize("text", [text for text in WHOLE if "endfor" in text or "endif" in text])
def test_a_template_that_was_cut_is_told(text: str) -> None:
    """Wherever it was cut behind the beginning of its first block."""
    for size in range(text.index("{%") + 2, len(text)):
        if not text[size:].isspace() and text[:size].count("{%") < text.count("{%"):
            assert not template.is_closed(text[:size]), text[:size]
    assert not template.is_closed(text[:-1].rstrip("%}-")[:-3])
