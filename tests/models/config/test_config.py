"""PreTrainedConfig against transformers, key by key, and what it adds."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors as hub_errors

from ckptd.models.config import config_source
from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.config.rope_config import RopeKeys


class LlamaLikeConfig(PreTrainedConfig):
    """The fields of LlamaConfig, declared as an architecture declares them."""

    model_type = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    head_dim: int | None = None

    def __post_init__(self) -> None:
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__()

    def validate_architecture(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size is not a multiple of num_attention_heads")


class AliasedConfig(PreTrainedConfig):
    model_type = "aliased"
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "n_embd"}
    n_embd: int = 8
    blocks: list[int] = [1, 2]  # noqa: RUF012 - a declared field; instances get copies


class CompositeConfig(PreTrainedConfig):
    model_type = "composite"
    sub_configs: ClassVar[dict[str, Any]] = {
        "text_config": LlamaLikeConfig,
        "vision_config": AliasedConfig,
    }
    image_token_id: int = 7


TINY = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}

V4 = {
    **TINY,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0",
    "unknown_key": {"a": [1, 2]},
    "_private_of_the_file": 3,
    "temperature": 0.6,
}

ROPES = {
    "v4 theta only": {"rope_theta": 500000.0},
    "v4 nothing": {},
    "v4 null scaling": {"rope_theta": 1e6, "rope_scaling": None},
    "v4 type": {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "v4 dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "v4 llama3": {
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    },
    "v4 yarn": {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "v4 partial": {"rope_theta": 1e6, "partial_rotary_factor": 0.5},
    "v5 default": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    "v5 partial": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0, "partial_rotary_factor": 0.5}
    },
    "v5 without theta": {"rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    "v5 and old theta": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 9.0},
    "v5 unknown type": {"rope_parameters": {"rope_type": "spiral", "rope_theta": 9.0}},
}


def write(folder: Path, content: dict[str, Any], name: str = "config.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content), "utf-8")
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write(tmp_path / "llama", V4)


class TestFields:
    def test_defaults_are_set_and_copied(self) -> None:
        """Every declared field is there, and two instances do not share a list."""
        first, second = AliasedConfig(), AliasedConfig()
        first.blocks.append(3)
        assert (first.n_embd, second.blocks) == (8, [1, 2])

    def test_a_field_without_default_is_required(self) -> None:
        """A field with no default refuses construction without it, by name."""

        class Strict(PreTrainedConfig):
            width: int

        with pytest.raises(TypeError, match="width"):
            Strict()
        assert Strict(width=3).width == 3

    def test_an_override_without_annotation_changes_the_default(self) -> None:
        """A derived class may set a field's default with a plain assignment."""

        class Small(LlamaLikeConfig):
            hidden_size = 64

        assert Small().hidden_size == 64
        assert Small().head_dim == 2

    def test_positional_arguments_are_refused(self) -> None:
        """As in transformers, values are given by name."""
        with pytest.raises(TypeError):
            PreTrainedConfig(3)  # type: ignore[call-arg]

    def test_an_unknown_attribute_is_named(self) -> None:
        """A typo in reading gives an AttributeError with class and name."""
        with pytest.raises(AttributeError, match=r"LlamaLikeConfig.*hiden_size"):
            _ = LlamaLikeConfig().hiden_size

    def test_common_keys_can_be_read_everywhere(self) -> None:
        """Keys that not every architecture declares read as their common default."""
        config = PreTrainedConfig()
        assert config.tie_word_embeddings is True
        assert config.pad_token_id is config.decoder_start_token_id is None

    def test_copies_are_equal_and_apart(self) -> None:
        """Copying and pickling keep everything, and a copy has its own nested values."""
        config = CompositeConfig(dtype="float16", text_config=TINY, other=[1])
        for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            assert other == config
            other.text_config.vocab_size = 5
            assert other != config

    def test_it_cannot_be_hashed_and_does_not_equal_others(self) -> None:
        """A configuration changes, so it is no key; it equals no other kind of object."""
        with pytest.raises(TypeError):
            hash(PreTrainedConfig())
        assert PreTrainedConfig() != {}

    def test_iterating_gives_the_keys(self) -> None:
        """`in` and iteration see attributes that are set."""
        config = LlamaLikeConfig(extra_key=1)
        assert {"extra_key", "hidden_size"} <= set(config)
        assert "nothing" not in config


class TestAgainstTransformers:
    @pytest.mark.parametrize("name", ROPES)
    def test_rope_keys_of_both_formats_read_the_same(self, tmp_path: Path, name: str) -> None:
        """Every way to write rotary settings becomes the dict that transformers makes of it."""
        write(tmp_path, {"model_type": "llama", **TINY, **ROPES[name]})
        ours = LlamaLikeConfig.from_pretrained(tmp_path)
        theirs = transformers.LlamaConfig.from_pretrained(tmp_path)
        assert ours.rope_parameters == theirs.rope_parameters
        assert ours.to_dict() == theirs.to_dict()

    @pytest.mark.parametrize(
        "content",
        [
            V4,
            {**TINY, "model_type": "llama", "dtype": "float16", "tie_word_embeddings": True},
            {**TINY, "model_type": "llama", "num_labels": 4, "problem_type": "regression"},
            {**TINY, "model_type": "llama", "id2label": {"0": "no", "1": "yes", "2": "maybe"}},
            {**TINY, "model_type": "llama", "output_attentions": True, "return_dict": False},
            {**TINY, "model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
            {**TINY, "model_type": "llama", "pad_token_id": 3, "is_decoder": True, "x": None},
        ],
    )
    def test_files_written_from_a_file_are_equal(
        self, tmp_path: Path, content: dict[str, Any]
    ) -> None:
        """What we save of a file is, byte for byte, what transformers saves of it."""
        write(tmp_path, content)
        ours = LlamaLikeConfig.from_pretrained(tmp_path)
        theirs = transformers.LlamaConfig.from_pretrained(tmp_path)
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        assert (tmp_path / "ours/config.json").read_bytes() == (
            tmp_path / "theirs/config.json"
        ).read_bytes()
        again = transformers.LlamaConfig.from_pretrained(tmp_path / "ours")
        assert again.to_dict() == theirs.to_dict()

    def test_the_generic_one_is_empty_when_nothing_is_said(self) -> None:
        """A configuration that nobody filled says its format's version and nothing else."""
        assert PreTrainedConfig().to_diff_dict() == transformers.PreTrainedConfig().to_diff_dict()
        assert PreTrainedConfig().to_dict() == transformers.PreTrainedConfig().to_dict()

    @pytest.mark.parametrize(
        "values",
        [
            {"num_labels": 3},
            {"num_labels": 1},
            {"num_labels": 3, "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}},
            {"id2label": {"0": "a", 1: "b"}},
            {"id2label": {0: "a"}, "label2id": {"a": 0}},
        ],
    )
    def test_labels_follow_the_same_rules(self, values: dict[str, Any]) -> None:
        """Labels given by number, by name or both settle as they do there, with integer keys."""
        ours, theirs = (
            LlamaLikeConfig(**copy.deepcopy(values)),
            transformers.LlamaConfig(**copy.deepcopy(values)),
        )
        assert (ours.id2label, ours.label2id) == (theirs.id2label, theirs.label2id)
        ours.num_labels = theirs.num_labels = 5
        assert (ours.id2label, ours.label2id) == (theirs.id2label, theirs.label2id)

    def test_arguments_override_the_file(self, llama: Path) -> None:
        """Known keys override, unknown ones come back, in the same way as there."""
        kwargs = {"hidden_size": 64, "foo": 1, "num_labels": 7, "return_unused_kwargs": True}
        ours, our_rest = LlamaLikeConfig.from_pretrained(llama, **kwargs)
        theirs, their_rest = transformers.LlamaConfig.from_pretrained(llama, **kwargs)
        assert our_rest == their_rest == {"foo": 1}
        assert ours.to_dict() == theirs.to_dict()

    def test_gemma3_has_one_rope_for_each_kind_of_layer(self) -> None:
        """Old and new files of a model with local and global layers read as they do there."""

        class Gemma3Like(PreTrainedConfig):
            model_type = "gemma3_text"
            max_position_embeddings: int = 131072
            layer_types: list[str] | None = None
            rope_parameters: dict[str, Any] | None = None
            rope_keys = RopeKeys(
                layers={
                    "full_attention": ("rope_theta", 1_000_000.0),
                    "sliding_attention": ("rope_local_base_freq", 10_000.0),
                }
            )

        for values in (
            {},
            {"rope_theta": 3.0, "rope_local_base_freq": 4.0},
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 3.0},
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 2.0}}},
        ):
            theirs = transformers.Gemma3TextConfig(**copy.deepcopy(values)).rope_parameters
            assert Gemma3Like(**copy.deepcopy(values)).rope_parameters == theirs

    def test_rope_by_layer_is_completed_in_each_kind(self) -> None:
        """Settings for each kind of layer take the old top-level base where they lack their own."""

        class Layered(LlamaLikeConfig):
            layer_types: list[str] | None = None

        values = {
            **TINY,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_theta": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 8.0},
                "sliding_attention": {"type": "default"},
            },
        }
        theirs = transformers.Qwen3Config(**copy.deepcopy(values)).rope_parameters
        assert Layered(**copy.deepcopy(values)).rope_parameters == theirs

    def test_phi3_and_gpt_neox_name_their_settings_differently(self) -> None:
        """An architecture's own names and defaults of rotary settings are data of its class."""

        class Phi3Like(PreTrainedConfig):
            max_position_embeddings: int = 4096
            original_max_position_embeddings: int = 4096
            rope_parameters: dict[str, Any] | None = None
            rope_keys = RopeKeys(
                default_partial=1.0, type_aliases={"su": "longrope", "yarn": "longrope"}
            )

        class NeoXLike(PreTrainedConfig):
            max_position_embeddings: int = 2048
            rope_parameters: dict[str, Any] | None = None
            rope_keys = RopeKeys(
                theta="rotary_emb_base", partial="rotary_pct", default_partial=0.25
            )

        factors = [1.0] * 48
        long = {"rope_type": "longrope", "short_factor": factors, "long_factor": factors}
        for values in ({}, {"rope_scaling": long, "max_position_embeddings": 131072}):
            theirs = transformers.Phi3Config(**copy.deepcopy(values)).rope_parameters
            assert Phi3Like(**copy.deepcopy(values)).rope_parameters == theirs
        su = Phi3Like(rope_scaling={**long, "rope_type": "su"})
        assert su.rope_parameters == Phi3Like(rope_scaling=long).rope_parameters
        for values in ({}, {"rotary_emb_base": 5, "rotary_pct": 1.0}):
            theirs = transformers.GPTNeoXConfig(**copy.deepcopy(values)).rope_parameters
            assert NeoXLike(**copy.deepcopy(values)).rope_parameters == theirs

    def test_a_flat_encoder_decoder_gives_one_side(self) -> None:
        """Asked for decoder or encoder, that side's keys carry the common names."""
        values = {
            "is_encoder_decoder": True,
            "decoder_layers": 3,
            "encoder_layers": 5,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 9,
        }
        for side in ("decoder", "encoder"):
            ours = PreTrainedConfig(**values).get_text_config(**{side: True})
            theirs = transformers.PreTrainedConfig(**values).get_text_config(**{side: True})
            assert ours.to_dict() == theirs.to_dict()
        assert PreTrainedConfig(**values).get_text_config().decoder_layers == 3

    def test_infinity_and_nan_survive(self, tmp_path: Path) -> None:
        """Floats that JSON lacks are written so that transformers reads them, and the reverse."""
        values = {"a": math.inf, "b": [-math.inf], "c": {"d": math.nan}}
        PreTrainedConfig(**values).save_pretrained(tmp_path / "ours")
        transformers.PreTrainedConfig(**values).save_pretrained(tmp_path / "theirs")
        read = transformers.PreTrainedConfig.from_pretrained(tmp_path / "ours")
        assert (read.a, read.b, math.isnan(read.c["d"])) == (math.inf, [-math.inf], True)
        mine = PreTrainedConfig.from_pretrained(tmp_path / "theirs")
        assert (mine.a, mine.b, math.isnan(mine.c["d"])) == (math.inf, [-math.inf], True)


class TestAliases:
    def test_both_names_read_and_write_one_value(self) -> None:
        """An alias and its real name are one attribute, in arguments too; the real one is saved."""
        config = AliasedConfig(hidden_size=16)
        assert (config.n_embd, config.hidden_size) == (16, 16)
        config.hidden_size = 24
        config.update({"n_embd": config.n_embd + 1})
        assert config.hidden_size == 25
        assert config.to_diff_dict()["n_embd"] == 25
        assert "hidden_size" not in config.to_dict()

    def test_a_declared_alias_gives_the_real_name_its_value(self) -> None:
        """A field that is an alias as well, as in Qwen3-MoE, sets the real name, default included."""

        class Experts(PreTrainedConfig):
            attribute_map: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}
            num_experts: int = 128

        class Fewer(Experts):
            pass

        assert (Experts().num_local_experts, Fewer().num_experts) == (128, 128)
        config = Fewer(num_experts=4)
        assert (config.num_experts, config.num_local_experts) == (4, 4)
        assert "num_experts" not in config.to_dict()

    def test_older_names_still_work(self) -> None:
        """`torch_dtype`, `use_return_dict` and `rope_scaling` are the values of today's names."""
        config = LlamaLikeConfig(torch_dtype="float16")
        assert config.torch_dtype is config.dtype is torch.float16
        config.torch_dtype = torch.bfloat16
        assert config.dtype is torch.bfloat16
        assert config.use_return_dict is True
        assert config.rope_scaling is config.rope_parameters
        config.rope_scaling = {"type": "linear", "factor": 2.0}
        assert config.rope_parameters["rope_type"] == "linear"
        assert config.rope_parameters["rope_theta"] == 10000.0
        with pytest.raises(AttributeError, match="rope_scaling"):
            _ = PreTrainedConfig().rope_scaling


class TestDtype:
    def test_names_become_dtypes_and_names_again(self) -> None:
        """A dtype is a torch.dtype in memory and its plain name in a file."""
        config = LlamaLikeConfig(dtype="bfloat16")
        assert config.dtype is torch.bfloat16
        assert config.to_dict()["dtype"] == config.to_diff_dict()["dtype"] == "bfloat16"
        assert LlamaLikeConfig(dtype=torch.float16).to_dict()["dtype"] == "float16"

    def test_an_unknown_dtype_is_refused(self) -> None:
        """A dtype that torch lacks is refused by name."""
        with pytest.raises(ValueError, match="floatt"):
            LlamaLikeConfig(dtype="floatt")

    def test_the_new_name_wins(self) -> None:
        """Where a file has both names, `dtype` counts."""
        assert LlamaLikeConfig(dtype="float16", torch_dtype="float32").dtype is torch.float16

    def test_auto_is_no_dtype(self, llama: Path) -> None:
        """`dtype="auto"` leaves the file's dtype, which transformers overwrites with the word."""
        assert LlamaLikeConfig.from_pretrained(llama, dtype="auto").dtype is torch.bfloat16
        assert LlamaLikeConfig.from_pretrained(llama, dtype="float16").dtype is torch.float16

    def test_without_torch_a_name_stays_a_name(self, llama: Path) -> None:
        """Reading a configuration imports neither torch nor the Hub's client."""
        code = (
            "import sys; from ckptd.models.config.config import PreTrainedConfig as P;"
            f"c = P.from_pretrained({str(llama)!r});"
            "assert c.dtype == 'bfloat16', c.dtype;"
            "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestNested:
    def test_dicts_become_objects_and_dicts_again(self, tmp_path: Path) -> None:
        """Nested configurations are of their class in memory and equal after a round trip."""
        config = CompositeConfig(text_config=dict(TINY), vision_config={"hidden_size": 3})
        assert isinstance(config.text_config, LlamaLikeConfig)
        assert config.text_config.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
        config.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["text_config"]["model_type"] == "llama"
        assert "transformers_version" not in saved["text_config"]
        assert CompositeConfig.from_pretrained(tmp_path) == config

    def test_missing_ones_have_defaults(self) -> None:
        """A nested configuration that is not given has its class's defaults."""
        assert CompositeConfig().text_config == LlamaLikeConfig()
        assert CompositeConfig(text_config=None).text_config == LlamaLikeConfig()

    def test_a_dict_argument_changes_one_value(self, tmp_path: Path) -> None:
        """A dict for a nested configuration changes what it names and keeps the rest."""
        CompositeConfig(text_config=dict(TINY)).save_pretrained(tmp_path)
        config = CompositeConfig.from_pretrained(tmp_path, text_config={"vocab_size": 99})
        assert (config.text_config.vocab_size, config.text_config.hidden_size) == (99, 32)

    def test_a_part_can_be_read_from_the_whole(self, tmp_path: Path) -> None:
        """The class of a nested configuration finds it in the composite's file."""
        CompositeConfig(text_config=dict(TINY)).save_pretrained(tmp_path)
        assert LlamaLikeConfig.from_pretrained(tmp_path).vocab_size == 64

        class Vision(AliasedConfig):
            base_config_key = "vision_config"

        assert Vision.from_pretrained(tmp_path).n_embd == 8

    def test_attention_is_chosen_for_all_or_by_part(self) -> None:
        """Choosing kernels reaches nested configurations, a dict picks them, and nothing is saved."""
        config = CompositeConfig(attn_implementation="sdpa")
        assert config.text_config._attn_implementation == "sdpa"
        config._attn_implementation = {"": "eager", "text_config": "flash"}
        assert config._attn_implementation == "eager"
        assert config.text_config._attn_implementation == "flash"
        assert config.vision_config._attn_implementation == "sdpa"
        assert "attn" not in config.to_json_string()

    def test_attention_weights_need_eager(self) -> None:
        """Asking for attention weights chooses eager, or is refused beside another choice."""
        config = LlamaLikeConfig()
        config.output_attentions = True
        assert config._attn_implementation == "eager"
        with pytest.raises(ValueError, match="eager"):
            LlamaLikeConfig(attn_implementation="sdpa").output_attentions = True


class TestTextConfig:
    def test_it_is_the_nested_one_or_itself(self) -> None:
        """The text part is the one nested configuration that is text, else the whole."""
        composite, flat = CompositeConfig(), LlamaLikeConfig()
        assert composite.get_text_config() is composite.text_config
        assert composite.get_text_config(decoder=True) is composite.text_config
        assert composite.get_text_config(encoder=True) is composite
        assert flat.get_text_config() is flat

    def test_several_are_refused(self) -> None:
        """Where two could be meant nobody guesses; asking for one side is not ambiguous."""
        config = PreTrainedConfig(model_type="x", text_encoder={"a": 1}, decoder={"b": 2})
        with pytest.raises(ValueError, match="text_encoder, decoder"):
            config.get_text_config()
        assert config.get_text_config(decoder=True).b == 2
        assert config.get_text_config(encoder=True).a == 1


class TestGeneric:
    FILE: ClassVar[dict[str, Any]] = {
        "architectures": ["StrangeForCausalLM"],
        "model_type": "strange",
        "dtype": "float16",
        "is_encoder_decoder": False,
        "return_dict": True,
        "tie_word_embeddings": False,
        "max_length": 20,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_theta": 4.0,
        "_own": 1,
        "text_config": {"vocab_size": 9, "dtype": "float16", "rope_theta": 3.0},
        "vision_config": {"model_type": "eye", "layers": [1, {"a": 2}]},
        "quantization_config": {"quant_method": "gptq", "bits": 4},
        "some_config": {"not": "a model"},
    }

    def test_every_key_of_the_file_is_kept(self, tmp_path: Path) -> None:
        """A file of an unknown architecture is saved with every key and value that it had."""
        write(tmp_path, self.FILE)
        config = PreTrainedConfig.from_pretrained(tmp_path)
        config.save_pretrained(tmp_path / "again")
        saved = json.loads((tmp_path / "again/config.json").read_text())
        assert saved.pop("transformers_version") == transformers.__version__
        assert saved == self.FILE

    def test_nested_ones_are_objects(self) -> None:
        """Parts that are configurations can be read and changed as such; other dicts stay dicts."""
        config = PreTrainedConfig.from_dict(self.FILE)
        assert config.model_type == "strange"
        assert config.vision_config.model_type == "eye"
        assert isinstance(config.quantization_config, dict)
        assert isinstance(config.some_config, dict)
        config.get_text_config().vocab_size = 128
        assert config.to_diff_dict()["text_config"]["vocab_size"] == 128
        assert self.FILE["text_config"]["vocab_size"] == 9


class TestFiles:
    def test_a_file_a_folder_and_a_subfolder(self, tmp_path: Path) -> None:
        """A configuration is found by its file, its folder, and in a folder's subfolder."""
        write(tmp_path / "sub", {"model_type": "llama", "vocab_size": 5}, "config.json")
        write(tmp_path, {"model_type": "llama", "vocab_size": 6}, "other.json")
        find = LlamaLikeConfig.from_pretrained
        assert find(tmp_path / "sub").vocab_size == 5
        assert find(str(tmp_path), subfolder="sub").vocab_size == 5
        assert find(tmp_path / "other.json").vocab_size == 6
        assert LlamaLikeConfig.from_json_file(tmp_path / "other.json").vocab_size == 6

    def test_what_is_missing_is_named(self, tmp_path: Path) -> None:
        """A folder without config.json, and a path that is not there, say so without the network."""
        with pytest.raises(OSError, match=r"config\.json does not exist.*is a folder without"):
            PreTrainedConfig.from_pretrained(tmp_path)
        with pytest.raises(OSError, match="neither a file nor a folder"):
            PreTrainedConfig.from_pretrained(tmp_path / "nowhere")

    @pytest.mark.parametrize("content", [b"{not json", b"\xff\xfe\x00", b"", b"[1]", b"3"])
    def test_what_is_not_a_json_object_is_named(self, tmp_path: Path, content: bytes) -> None:
        """A broken config.json is refused with its path."""
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(OSError, match=r"config\.json (is not a valid JSON|holds a JSON)"):
            PreTrainedConfig.from_pretrained(tmp_path)

    def test_a_saved_file_is_sorted_whole_and_readable_by_all(self, tmp_path: Path) -> None:
        """Saving gives sorted keys, two spaces, a last newline, the umask's mode and no leftovers."""
        before = os.umask(0o022)
        try:
            LlamaLikeConfig(**TINY).save_pretrained(tmp_path / "a" / "b")
        finally:
            os.umask(before)
        path = tmp_path / "a" / "b" / "config.json"
        text = path.read_text()
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert list(path.parent.iterdir()) == [path]

    def test_the_whole_can_be_written_too(self, tmp_path: Path) -> None:
        """With `use_diff=False` the file says every value."""
        config = LlamaLikeConfig(**TINY)
        config.to_json_file(tmp_path / "all.json", use_diff=False)
        assert json.loads((tmp_path / "all.json").read_text())["chunk_size_feed_forward"] == 0

    def test_saving_into_a_file_is_refused(self, tmp_path: Path) -> None:
        """A file where the folder should be is left alone."""
        (tmp_path / "file").write_text("mine")
        with pytest.raises(OSError, match="is a file"):
            PreTrainedConfig().save_pretrained(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"

    def test_generation_settings_are_refused(self, tmp_path: Path) -> None:
        """Settings of generation are dropped in reading, as there, and refused in saving."""
        config = LlamaLikeConfig(temperature=0.5)
        assert "temperature" not in config
        config.temperature = 0.5
        with pytest.raises(ValueError, match=r"temperature.*generation_config"):
            config.save_pretrained(tmp_path)
        assert not (tmp_path / "config.json").exists()

    def test_a_name_is_remembered_and_not_saved(self, llama: Path) -> None:
        """Where a configuration came from is known, and is no part of its file or its equality."""
        config = LlamaLikeConfig.from_pretrained(llama, name_or_path=str(llama))
        assert config.name_or_path == str(llama)
        assert "_name_or_path" not in config.to_diff_dict()
        assert config == LlamaLikeConfig.from_pretrained(llama)

    def test_another_model_type_is_noted(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Reading a file as another architecture is allowed, with a warning."""
        write(tmp_path, {"model_type": "mistral", "vocab_size": 5})
        assert LlamaLikeConfig.from_pretrained(tmp_path).to_dict()["model_type"] == "llama"
        assert "mistral" in caplog.text


class TestHub:
    def test_where_to_look_is_handed_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every argument about the Hub reaches huggingface_hub, none the configuration."""
        write(tmp_path, {"model_type": "llama", "vocab_size": 5})
        asked: dict[str, Any] = {}

        def download(repo_id: str, file_name: str, **kwargs: Any) -> str:
            asked.update(kwargs, repo_id=repo_id, file_name=file_name)
            return str(tmp_path / "config.json")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        config, unused = LlamaLikeConfig.from_pretrained(
            "owner/name",
            cache_dir=str(tmp_path),
            force_download=True,
            local_files_only=True,
            token="secret",
            revision="refs/pr/3",
            subfolder="inner",
            proxies={"https": "http://p"},
            return_unused_kwargs=True,
        )
        assert (config.vocab_size, unused) == (5, {})
        assert asked == {
            "repo_id": "owner/name",
            "file_name": "config.json",
            "subfolder": "inner",
            "revision": "refs/pr/3",
            "cache_dir": tmp_path,
            "force_download": True,
            "local_files_only": True,
            "token": "secret",
        }

    def test_a_cached_file_is_read_offline(self, tmp_path: Path) -> None:
        """What huggingface_hub's cache holds is found by repository, revision and subfolder."""
        commit = "0" * 40
        repo = tmp_path / "models--owner--name"
        write(repo / "snapshots" / commit / "deep", {"model_type": "llama", "vocab_size": 5})
        (repo / "refs" / "refs" / "pr").mkdir(parents=True)
        (repo / "refs" / "refs" / "pr" / "3").write_text(commit)
        config = LlamaLikeConfig.from_pretrained(
            "owner/name",
            cache_dir=tmp_path,
            local_files_only=True,
            revision="refs/pr/3",
            subfolder="deep",
        )
        assert config.vocab_size == 5

    def test_what_is_not_cached_says_so(self, tmp_path: Path) -> None:
        """Without the network and without the file, the text names file, repository and remedy."""
        with pytest.raises(OSError, match=r"config\.json of 'owner/name'.*not in the cache"):
            PreTrainedConfig.from_pretrained(
                "owner/name", cache_dir=tmp_path, local_files_only=True, token="hf_secret"
            )

    def test_a_name_that_no_repository_can_have(self) -> None:
        """A malformed name is an OSError that says what a name looks like."""
        with pytest.raises(OSError, match="owner/name"):
            PreTrainedConfig.from_pretrained("bad--name/..x")

    @pytest.mark.parametrize(
        ("failure", "text"),
        [
            (hub_errors.RepositoryNotFoundError, "neither a folder here nor a repository"),
            (hub_errors.GatedRepoError, "is gated"),
            (hub_errors.RevisionNotFoundError, "no revision 'v9'"),
            (hub_errors.RemoteEntryNotFoundError, "has no file config.json"),
            (hub_errors.HfHubHTTPError, "the Hub answered 503"),
        ],
    )
    def test_every_answer_of_the_hub_is_an_oserror(
        self, monkeypatch: pytest.MonkeyPatch, failure: Any, text: str
    ) -> None:
        """Each refusal of the Hub becomes an OSError that says which it was, never a token."""
        import httpx2

        response = httpx2.Response(503, request=httpx2.Request("GET", "https://hub"))

        def download(*args: Any, **kwargs: Any) -> str:
            raise failure("no", response=response)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        with pytest.raises(OSError, match=text) as caught:
            PreTrainedConfig.from_pretrained("owner/name", revision="v9", token="hf_secret")
        assert "hf_secret" not in str(caught.value)


class TestRefusals:
    def test_contradictions_are_refused(self) -> None:
        """Sizes, layers and tasks that contradict each other are refused at construction."""
        with pytest.raises(ValueError, match="multiple"):
            LlamaLikeConfig(hidden_size=30, num_attention_heads=4)
        with pytest.raises(ValueError, match="layer_types has 1 entries, expected 2"):
            LlamaLikeConfig(**TINY, layer_types=["full_attention"])
        with pytest.raises(ValueError, match="single_label_classification"):
            LlamaLikeConfig(problem_type="single_label_classification", num_labels=1)

    def test_a_rope_type_without_its_keys_is_refused(self) -> None:
        """A KeyError, as there, names the missing key."""
        with pytest.raises(KeyError, match="factor"):
            LlamaLikeConfig(rope_scaling={"type": "linear"})

    def test_saving_checks_again(self, tmp_path: Path) -> None:
        """A value that was made wrong after construction is not saved."""
        config = LlamaLikeConfig(**TINY)
        config.hidden_size = 33
        with pytest.raises(ValueError, match="multiple"):
            config.save_pretrained(tmp_path)
        assert not (tmp_path / "config.json").exists()

    def test_unknown_auto_classes_are_refused(self) -> None:
        """Registering for an auto class takes a name or a class that exists."""

        class Mine(PreTrainedConfig):
            model_type = "mine"

        Mine.register_for_auto_class()
        assert Mine._auto_class == "AutoConfig"
        assert PreTrainedConfig._auto_class is None
        with pytest.raises(ValueError, match="AutoNothing"):
            Mine.register_for_auto_class("AutoNothing")

    def test_sources_take_only_their_own_arguments(self) -> None:
        """The arguments that say where a file is are taken out, the rest stays."""
        kwargs = {"revision": None, "subfolder": "x", "vocab_size": 3}
        source = config_source.Source.taken_from(kwargs)
        assert (source.revision, source.subfolder, kwargs) == (None, "x", {"vocab_size": 3})
