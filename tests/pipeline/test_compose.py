"""Two passes of planning: what headers decide, and what only the contents can."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from ckptd import errors
from ckptd.checkpoint import checkpoint
from ckptd.pipeline import compose, definition

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40}


@pytest.fixture
def source(tmp_path):
    """Return a function that writes a checkpoint with an equal or a different head."""

    def make(*, equal: bool, tied: bool | None = None):
        path = tmp_path / f"checkpoint-{equal}-{tied}"
        path.mkdir()
        table = np.arange(400, dtype=np.float32).reshape(40, 10)
        tensors = {EMBEDDING: table, HEAD: table if equal else table + 1}
        save_file(
            tensors | {"model.norm.weight": np.ones(10, np.float32)}, path / "model.safetensors"
        )
        flag = {} if tied is None else {"tie_word_embeddings": tied}
        (path / "config.json").write_text(json.dumps(CONFIG | flag))
        return checkpoint.open_checkpoint(path)

    return make


def stages(*items: str):
    lines = "".join(f"  - {item}\n" for item in items)
    text = f"pipeline: x\nwatch:\n  - path: /runs/*\nstages:\n{lines}"
    return definition.parse_definition(text, "x.yaml").stages


def names(plan) -> set[str]:
    return {spec.name for shard in plan.shards for spec in shard.tensors}


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("tied", [True, False, None])
def test_headers_assume_what_the_flag_says_and_contents_decide(equal, tied, source) -> None:
    """The first pass believes the flag, the second one the bytes."""
    opened = source(equal=equal, tied=tied)
    assert (HEAD in names(compose.from_headers(opened, stages("tie")))) is (not tied)
    assert (HEAD in names(compose.decided(opened, stages("tie")))) is (not equal)


def test_no_stage_is_a_copy_of_the_source(source) -> None:
    """A pipeline that only checks writes the source's config.json and every byte as it is."""
    opened = source(equal=False)
    plan = compose.from_headers(opened, stages("footprint"))
    assert plan.config == opened.config_path.read_bytes()
    assert plan.computed_bytes == 0
    assert plan.tensor_bytes == opened.tensor_bytes


def test_stages_are_applied_in_their_order(source) -> None:
    """Each stage sees what the one before it made: a limit between them is on that."""
    opened = source(equal=True)
    plan = compose.decided(
        opened, stages("footprint", "tie", "footprint", "cast: {dtype: bfloat16}", "footprint")
    )
    sizes = [r.facts["parameter_bytes"] for r in plan.reports if r.stage == "footprint"]
    assert sizes == [1600 + 1600 + 40, 1600 + 40, 800 + 20]


@pytest.mark.parametrize("equal", [True, False])
def test_contents_are_compared_through_what_was_made_of_them(equal, source) -> None:
    """Grown and cast alike from equal bytes is equal; from different bytes it is not."""
    changed = [*stages("resize: {to: 64}"), *stages("cast: {dtype: bfloat16}"), *stages("tie")]
    plan = compose.decided(source(equal=equal), changed)
    assert (HEAD in names(plan)) is (not equal)


def test_comparing_can_be_stopped(source) -> None:
    """`check` is called while bytes are compared, and what it raises ends the planning."""

    class StopError(Exception):
        pass

    def check() -> None:
        raise StopError

    with pytest.raises(StopError):
        compose.decided(source(equal=True), stages("tie"), check=check)


def test_a_source_that_shrank_is_named_while_comparing(source) -> None:
    """The file ended before the tensor that is compared: the error names it."""
    opened = source(equal=True)
    weights = opened.path / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 2000)
    with pytest.raises(errors.CkptdError, match=r"model\.safetensors"):
        compose.decided(opened, stages("tie"))
