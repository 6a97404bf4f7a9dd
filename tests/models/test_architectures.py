"""The architecture table against the transformers that is installed."""

from __future__ import annotations

import json
import sys
from importlib.resources import files

import pytest
import transformers
from packaging.version import Version

from ckptd.models import architectures
from ckptd.models.architectures import Role


def test_known_names_are_on_disk(saved) -> None:
    """Every tensor the table lists is found in what transformers saved, itself or by its tie."""
    known = architectures.find(saved.config)
    assert known is not None
    assert known.exact
    sources = {tie.target: tie.source for tie in known.ties}
    for row in known.rows:
        name = known.locate(row.name, saved.tensors)
        if name is None:
            name = known.locate(sources[row.name], saved.tensors)
        assert name is not None, row
        assert saved.tensors[name].shape[row.axis] == 99, row


def test_input_and_head_are_what_the_model_says(saved) -> None:
    """The roles name the modules that transformers itself calls embeddings."""
    known = architectures.find(saved.config)
    assert known is not None
    names = {id(module): name for name, module in saved.model.named_modules()}
    for role, module in (
        (Role.INPUT, saved.model.get_input_embeddings()),
        (Role.HEAD, saved.model.get_output_embeddings()),
    ):
        if module is None or saved.family in ("vit", "deberta v2 new"):
            continue
        assert known.role_of[f"{names[id(module)]}.weight"] is role


def test_the_flag_is_what_the_configuration_class_makes_of_it(saved) -> None:
    """The table's flag in effect equals the attribute of the configuration read back."""
    known = architectures.find(saved.config)
    assert known is not None
    for change in ({}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}):
        bare = {key: value for key, value in saved.config.items() if key != architectures.FLAG}
        config = bare | change
        loaded = type(saved.model.config).from_dict(json.loads(json.dumps(config)))
        for tie in known.ties:
            node = loaded
            for part in tie.flag.keys[0].split(".")[:-1]:
                node = getattr(node, part)
            assert tie.flag.value(config) == bool(node.tie_word_embeddings)


def test_a_written_flag_takes_effect(saved) -> None:
    """After `writes`, the configuration class reads the value that was asked for."""
    known = architectures.find(saved.config)
    assert known is not None
    for flag in {tie.flag for tie in known.ties if tie.flag.forced is None}:
        for value in (True, False):
            config = architectures.configuration.written(
                saved.config, flag.writes(saved.config, value)
            )
            loaded = type(saved.model.config).from_dict(json.loads(json.dumps(config)))
            assert loaded.tie_word_embeddings is value
            assert flag.value(config) is value


def test_a_base_model_saved_alone_is_found_by_either_spelling() -> None:
    """GPT-2's published names lack the prefix; a base model's class finds those that have it."""
    head = architectures.find({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"})
    base = architectures.find({"architectures": ["GPT2Model"], "model_type": "gpt2"})
    assert head is not None
    assert base is not None
    assert head.locate("transformer.wte.weight", {"wte.weight"}) == "wte.weight"
    assert base.locate("wte.weight", {"transformer.wte.weight"}) == "transformer.wte.weight"


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (["model.layers.0.mlp.up_proj.weight"], "model.embed_tokens.weight"),
        (["layers.0.mlp.up_proj.weight", "norm.weight"], "embed_tokens.weight"),
        (["lm_head.weight"], "model.embed_tokens.weight"),
    ],
)
def test_a_missing_name_is_spelled_like_its_neighbours(present, expected) -> None:
    """A canonical name takes the prefix that the checkpoint's other names have."""
    known = architectures.find({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    assert known is not None
    expected_alone = "embed_tokens.weight" if present == ["lm_head.weight"] else expected
    assert known.spell("model.embed_tokens.weight", present) in (expected, expected_alone)


def test_the_original_and_the_run_time_spelling_are_both_known() -> None:
    """LLaVA's head is `language_model.lm_head` on disk and `lm_head` at run time."""
    known = architectures.find(
        {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    )
    assert known is not None
    old = "language_model.lm_head.weight"
    assert known.locate("lm_head.weight", {old}) == old
    assert known.locate("lm_head.weight", {"lm_head.weight"}) == "lm_head.weight"


def test_a_free_part_follows_the_configuration() -> None:
    """The text model a composite names decides the names below it, or nothing is claimed."""
    config = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
    known = architectures.find(config | {"text_config": {"model_type": "gpt_neox"}})
    assert known is not None
    assert "model.language_model.embed_in.weight" in known.role_of
    strange = architectures.find(config | {"text_config": {"model_type": "nobody"}})
    assert strange is not None
    assert "nobody" in str(strange.unplaced)
    no_name = architectures.find(config | {"text_config": {"model_type": []}})
    assert no_name == architectures.find(config)


def test_a_layout_that_hangs_on_a_key_has_its_own_entry() -> None:
    """Marian without shared embeddings ties the head to the decoder's own."""
    config = {"architectures": ["MarianMTModel"], "model_type": "marian"}
    known = architectures.find(config | {"share_encoder_decoder_embeddings": False})
    assert known is not None
    assert [(tie.target, tie.source) for tie in known.ties] == [
        ("lm_head.weight", "model.decoder.embed_tokens.weight")
    ]


@pytest.mark.parametrize(
    ("config", "name", "exact"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM", True),
        ({"model_type": "llama"}, "LlamaForCausalLM", False),
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": "mistral"},
            "MistralForCausalLM",
            True,
        ),
        ({"architectures": None, "model_type": "bert"}, "BertLMHeadModel", False),
        ({"architectures": ["LlamaForCausalLM"], "model_type": []}, "LlamaForCausalLM", True),
    ],
)
def test_the_class_is_found_by_name_then_by_model_type(config, name, exact) -> None:
    """`architectures[0]` decides, `model_type` corrects or replaces it."""
    known = architectures.find(config)
    assert known is not None
    assert (known.name, known.exact) == (name, exact)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"architectures": ["NobodyForCausalLM"], "model_type": "nobody"},
        {"architectures": []},
        {"model_type": {}},
    ],
)
def test_what_nobody_knows_is_not_guessed(config) -> None:
    """Unknown classes and types give None."""
    assert architectures.find(config) is None


def test_the_table_is_of_this_transformers_or_an_older_one() -> None:
    """A class that the installed release has is in the table as long as the releases are one."""
    table = architectures.table()
    if Version(table["transformers"]) != Version(transformers.__version__):
        pytest.skip(f"the table is of transformers {table['transformers']}")
    from transformers.models.auto import modeling_auto

    for mapping in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT"):
        names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values()
        flat = {one for name in names for one in ((name,) if isinstance(name, str) else name)}
        assert flat <= set(table["architectures"]), mapping


def test_the_table_is_small_and_needs_no_torch() -> None:
    """One architecture a line, under a megabyte; reading it imports neither torch nor the library."""
    raw = files("ckptd.models").joinpath("architectures.json").read_bytes()
    assert len(raw) < 1_000_000
    assert raw.count(b"\n") > len(architectures.table()["architectures"])
    import subprocess

    code = (
        "import sys\nfrom ckptd.models import architectures, embeddings, tying\n"
        "architectures.table()\nassert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
