"""Nothing quantized may remain, and no plain model is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from ckptd.checkpoint import checkpoint, dtypes
from ckptd.checkpoint.dtypes import Dtype
from ckptd.errors import CheckpointUnsupported
from ckptd.quant import leftovers

DATA = Path(__file__).parents[1] / "data" / "quant"
HERE = Path("folder")
WEIGHT = {"layers.0.up.weight": (Dtype.BF16, (256, 512))}


def _check(name: str, dtype: Dtype, *shape: int) -> None:
    leftovers.check({**WEIGHT, name: (dtype, shape)}, path=HERE)


@pytest.mark.parametrize(
    "dtype",
    [
        Dtype.I8, Dtype.U8, Dtype.I16, Dtype.U16, Dtype.U32, Dtype.U64, Dtype.F4,
        Dtype.F6_E2M3, Dtype.F6_E3M2, Dtype.F8_E4M3, Dtype.F8_E5M2, Dtype.F8_E8M0,
        Dtype.F8_E4M3FNUZ, Dtype.F8_E5M2FNUZ,
    ],
)  # fmt: skip
def test_codes_are_refused_by_their_dtype(dtype: Dtype) -> None:
    """Whatever its name, a tensor of such a type is no weight."""
    with pytest.raises(CheckpointUnsupported, match=r"'anything'.*would remain"):
        _check("anything", dtype, 8, 8)


@pytest.mark.parametrize("dtype", [Dtype.I32, Dtype.I64])
def test_words_of_codes_are_refused_by_their_size(dtype: Dtype) -> None:
    """A matrix of integers, or a long list, that no model is known to have."""
    for shape in ((64, 512), (5000,)):
        with pytest.raises(CheckpointUnsupported, match="integers"):
            _check("layers.0.down.anything", dtype, *shape)


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("embeddings.position_ids", Dtype.I64, (1, 40_000)),
        ("text.token_type_ids", Dtype.I64, (1, 512)),
        ("attention.self.relative_position_index", Dtype.I64, (49, 49)),
        ("norm.num_batches_tracked", Dtype.I64, ()),
        ("layers.0.mlp.gate.tid2eid", Dtype.I64, (129_280, 6)),
        ("summary_idxs", Dtype.I64, (2,)),
        ("layers.0.attention.bias", Dtype.BOOL, (1, 1, 2048, 2048)),
        ("layers.0.attention.bias", Dtype.U8, (1, 1, 2048, 2048)),
        ("freqs_cis", Dtype.C64, (32, 64)),
        ("codec.offsets", Dtype.I32, (8,)),
        ("lambda_1", Dtype.F32, (192,)),
        ("layer.layer_scale1.lambda1", Dtype.F32, (192,)),
        ("logit_scale", Dtype.F32, ()),
        ("router.scale", Dtype.BF16, (2048,)),
        ("layers.0.up.scale", Dtype.BF16, (256,)),
        ("attention_biases", Dtype.F32, (4, 49)),
        ("moe.balancing_biases", Dtype.F32, (16,)),
        ("quantizer.codebooks", Dtype.F32, (8, 2048, 64)),
        ("experts.per_expert_scale", Dtype.F32, (128,)),
        ("global_scale", Dtype.F32, (1,)),
        ("attention.q_norm.scale", Dtype.BF16, (128,)),
    ],
)
def test_buffers_and_plain_scales_stay(name: str, dtype: Dtype, shape: tuple[int, ...]) -> None:
    """Positions, counters, masks and the parameters called scale that models have."""
    _check(name, dtype, *shape)


@pytest.mark.parametrize(
    "leaf",
    [
        "up.weight_scale", "up.weight_scale_inv", "up.weight_scale_2", "up.weight_global_scale",
        "up.weight_zero_point", "up.input_scale", "up.input_global_scale", "up.output_scale",
        "up.activation_scale", "up.qscale_weight", "up.qscale_act", "up.pre_quant_scale",
        "attn.k_scale", "k_proj.k_scale", "attn.v_scale", "attn.kv_scale", "attn.k_cache_scale",
        "up.qzeros", "up.g_idx", "up.weight_g_idx", "up.qbiases", "up.weight.absmax",
        "up.weight.quant_map", "up.weight.nested_absmax", "up.weight.nested_quant_map",
        "up.SCB", "up.weight._scale", "up.weight._shift", "up.input_activation_scale",
        "embed.embedding_scale", "experts.gate_up_proj_scale_inv", "experts.down_proj_scale",
        "experts.gate_up_proj_scales", "experts.gate_up_proj_weight_scale", "up.weight_scales",
        "experts.down_proj_input_scale", "experts.w2_weight_scale_2", "up._weight_qdata",
        "up.suh", "up.SU", "up.Wscale", "up.forward_hadamard_matrix", "up.zero_scale",
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (256,), (256, 4)])
def test_an_orphan_of_floats_is_refused_by_its_name(leaf: str, shape: tuple[int, ...]) -> None:
    """Names that only quantization gives, whatever the shape."""
    with pytest.raises(CheckpointUnsupported, match="nothing consumed"):
        _check(f"layers.0.{leaf}", Dtype.F32, *shape)


@pytest.mark.parametrize("leaf", ["scale", "scales", "zero", "zeros", "biases", "codebooks"])
def test_a_grid_beside_a_weight_is_refused(leaf: str) -> None:
    """A matrix `X.scale` beside a matrix `X.weight` is one of its scales; elsewhere it is not."""
    with pytest.raises(CheckpointUnsupported, match="grid beside a weight"):
        _check(f"layers.0.up.{leaf}", Dtype.BF16, 256, 4)
    _check(f"layers.0.norm.{leaf}", Dtype.BF16, 256, 4)


def test_the_first_is_named_and_the_others_counted() -> None:
    """People see one tensor with its dtype and shape, and how many more there are."""
    tensors = {f"layers.{i}.up.weight": (Dtype.F8_E4M3, (8, 8)) for i in range(4)}
    with pytest.raises(CheckpointUnsupported) as caught:
        leftovers.check(tensors, path=HERE)
    assert "layers.0.up.weight" in str(caught.value)
    assert "F8_E4M3 [8, 8] and 3 more tensors" in str(caught.value)


@pytest.mark.parametrize(
    "folder", sorted(DATA.glob("*/model*.safetensors")), ids=lambda p: p.parent.name
)
def test_what_is_quantized_is_refused_as_it_lies(folder: Path) -> None:
    """Every checkpoint of the tests that real libraries wrote would be caught undecoded."""
    found = checkpoint.open_checkpoint(folder.parent).tensors
    with pytest.raises(CheckpointUnsupported):
        leftovers.check(
            {name: (one.spec.dtype, one.spec.shape) for name, one in found.items()}, path=HERE
        )


SMALL = {"num_hidden_layers": 1}
MODELS: dict[str, tuple[PreTrainedConfig, str]] = {
    "beit": (transformers.BeitConfig(**SMALL), "BeitModel"),
    "dinov2": (transformers.Dinov2Config(**SMALL), "Dinov2Model"),
    "swin": (transformers.SwinConfig(depths=[1], num_heads=[2]), "SwinModel"),
    "convnext": (transformers.ConvNextConfig(depths=[1, 1, 1, 1]), "ConvNextModel"),
    "clip": (transformers.CLIPVisionConfig(**SMALL), "CLIPVisionModel"),
    "siglip": (transformers.SiglipTextConfig(**SMALL), "SiglipTextModel"),
    "levit": (transformers.LevitConfig(), "LevitModel"),
    "ibert": (transformers.IBertConfig(quant_mode=True, **SMALL), "IBertModel"),
    "gpt_neox": (transformers.GPTNeoXConfig(**SMALL), "GPTNeoXForCausalLM"),
    "gemma2": (transformers.Gemma2Config(**SMALL), "Gemma2ForCausalLM"),
    "gemma3n": (transformers.Gemma3nTextConfig(num_kv_shared_layers=0, **SMALL),
                "Gemma3nForCausalLM"),
    "mimi": (transformers.MimiConfig(**SMALL), "MimiModel"),
    "encodec": (transformers.EncodecConfig(), "EncodecModel"),
    "wav2vec2": (transformers.Wav2Vec2Config(**SMALL), "Wav2Vec2ForPreTraining"),
    "mamba": (transformers.MambaConfig(**SMALL), "MambaForCausalLM"),
    "vits": (transformers.VitsConfig(**SMALL), "VitsModel"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_plain_architectures_are_not_refused(kind: str) -> None:
    """Models with parameters called scale, lambda, biases or codebooks, and integer buffers."""
    config, name = MODELS[kind]
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    leftovers.check(
        {
            key: (dtypes.from_torch_name(str(value.dtype)), tuple(value.shape))
            for key, value in model.state_dict().items()
        },
        path=HERE,
    )
