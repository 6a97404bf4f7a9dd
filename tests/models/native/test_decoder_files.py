"""The decoder family's folders and generated tokens, exchanged with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.models.native.decoder_pairs import (
    CASES,
    FIRST,
    IDS,
    TOLERANCE,
    Case,
    class_of,
    gap,
    model_name,
    pair,
    tokens,
)

SHORT_CONTEXT = CASES[IDS.index("phi3-longrope")]
SAVED = [case for case in CASES if case.name in FIRST]


@pytest.mark.parametrize("case", SAVED, ids=[case.name for case in SAVED])
def test_folders_go_both_ways(case: Case, tmp_path: Path) -> None:
    """Their folder loads here, ours loads there, nothing missing, and the logits stay."""
    theirs, _, _ = pair(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours_class = class_of(case, model_name(case, "ForCausalLM"))
    ours, info = ours_class.from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values())
    ours.save_pretrained(tmp_path / "ours")
    theirs_class = getattr(transformers, model_name(case, "ForCausalLM"))
    again, info = theirs_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    ids, _ = tokens("none")
    with torch.no_grad():
        expected = theirs(ids).logits
        assert gap(ours(ids).logits, expected) < TOLERANCE
        assert gap(again(ids).logits, expected) < TOLERANCE


@pytest.mark.parametrize("case", [*SAVED, SHORT_CONTEXT], ids=lambda case: case.name)
def test_generated_tokens(case: Case) -> None:
    """Greedy generation with left padding gives the same tokens, beyond every window and context."""
    theirs, ours, _ = pair(case)
    ids, mask = tokens("left", 7)
    wanted: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    expected = theirs.generate(ids, attention_mask=mask, **wanted)
    assert torch.equal(ours.generate(ids, attention_mask=mask, **wanted), expected)
