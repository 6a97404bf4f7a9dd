"""T5 against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from ckptd.models.layers.outputs import BaseModelOutput
from ckptd.models.native import t5
from ckptd.models.native.t5_layers import RelativeAttentionBias
from tests.models.native import oracle

SMALL: dict[str, Any] = {
    "vocab_size": oracle.ROWS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    # Unscaled scores and embeddings of variance 1 make large numbers, and these large differences.
    "initializer_factor": 0.3,
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
NAMES = ("T5Model", "T5ForConditionalGeneration")


def test_defaults() -> None:
    """A configuration without arguments is that of transformers, and what follows from them."""
    oracle.same_config("T5Config")
    oracle.same_config("T5Config", num_layers=3, feed_forward_proj="gated-silu")
    oracle.same_config("T5Config", hidden_size=8, scale_decoder_outputs=False)


def test_untied_flag() -> None:
    """`tie_word_embeddings=False` stays what it is, which transformers forgets."""
    found = t5.T5Config(**GATED).to_dict()
    expected = transformers.T5Config(**GATED).to_dict()
    assert found == expected | {"tie_word_embeddings": False}
    assert found["scale_decoder_outputs"] is False


def test_untied_head(tmp_path: Any) -> None:
    """A head of its own is saved, read back and kept by ties and resizes; the stacks' copies go."""
    model = t5.T5ForConditionalGeneration(t5.T5Config(**SMALL | GATED)).eval()
    assert model.lm_head.weight is not model.shared.weight
    assert model.encoder.embed_tokens is model.shared
    model.save_pretrained(tmp_path)
    names = set(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert {"shared.weight", "lm_head.weight"} <= names
    assert not {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"} & names
    given = {"input_ids": oracle.ids(), "decoder_input_ids": oracle.ids(seed=1)}
    ours = t5.T5ForConditionalGeneration.from_pretrained(tmp_path)
    theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        for again in (ours, theirs):
            oracle.close(model(**given).logits, again(**given).logits)
    ours.resize_token_embeddings(oracle.ROWS + 5)
    assert ours.lm_head.weight is not ours.shared.weight
    assert len(ours.lm_head.weight) == len(ours.decoder.embed_tokens.weight) == oracle.ROWS + 5


def test_unknown_mlp() -> None:
    """A name that is neither an activation nor a gated one is refused."""
    with pytest.raises(ValueError, match="feed_forward_proj"):
        t5.T5Config(feed_forward_proj="wide-gelu")


@pytest.mark.parametrize("name", [*NAMES, "T5EncoderModel"])
def test_declarations(name: str) -> None:
    """Class attributes, ties and the forward's arguments are those of transformers."""
    oracle.same_class(name)


@pytest.mark.parametrize("switches", [{}, GATED])
@pytest.mark.parametrize("name", [*NAMES, "T5EncoderModel"])
def test_state(name: str, switches: dict[str, Any]) -> None:
    """Tensors, counts and buffers are those of the files transformers writes."""
    oracle.same_state(oracle.pair(name, **SMALL, **switches))


@pytest.mark.parametrize("switches", [{}, GATED])
@pytest.mark.parametrize("mask", oracle.MASKS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", NAMES)
def test_forward(name: str, implementation: str, mask: str, switches: dict[str, Any]) -> None:
    """Every output of both halves is that of transformers, with padding in either."""
    given = oracle.MASKS[mask]
    oracle.compare(
        oracle.pair(name, implementation, **SMALL, **switches),
        input_ids=oracle.ids(),
        attention_mask=given,
        decoder_input_ids=oracle.ids(length=5, seed=1),
        decoder_attention_mask=None if given is None else given[:, 1:6],
        output_hidden_states=True,
        output_attentions=implementation == "eager",
    )


@pytest.mark.parametrize("mask", oracle.MASKS)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_encoder(implementation: str, mask: str) -> None:
    """The encoder alone gives what it gives in transformers."""
    oracle.compare(
        oracle.pair("T5EncoderModel", implementation, **SMALL),
        input_ids=oracle.ids(),
        attention_mask=oracle.MASKS[mask],
        output_hidden_states=True,
        output_attentions=implementation == "eager",
    )


def test_far_positions() -> None:
    """Distances beyond the exact buckets, and beyond the last, are those of transformers."""
    switches = {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}
    oracle.compare(
        oracle.pair("T5ForConditionalGeneration", **SMALL, **switches),
        input_ids=oracle.ids(length=70),
        decoder_input_ids=oracle.ids(length=60, seed=1),
    )


def test_vectors() -> None:
    """Vectors may stand for the tokens of both halves."""
    oracle.compare(
        oracle.pair("T5ForConditionalGeneration", **SMALL),
        inputs_embeds=oracle.vectors(2, oracle.LENGTH, 32),
        decoder_inputs_embeds=oracle.vectors(2, 4, 32, seed=1),
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", oracle.MASKS)
def test_cache(implementation: str, mask: str) -> None:
    """In steps the logits are those of one call, and the encoder's keys are computed once."""
    both = oracle.pair("T5ForConditionalGeneration", implementation, **SMALL)
    given = {"input_ids": oracle.ids(), "attention_mask": oracle.MASKS[mask]}
    decoder_ids = oracle.ids(length=6, seed=1)
    ours: Any = None
    theirs: Any = None
    with torch.no_grad():
        whole = both.ours(**given, decoder_input_ids=decoder_ids, use_cache=False)
        assert whole.past_key_values is None
        encoded = both.ours.get_encoder()(**given)
        for start, stop in ((0, 2), (2, 3), (3, 6)):
            new = decoder_ids[:, start:stop]
            expected = both.theirs(**given, decoder_input_ids=new, cache=theirs)
            found = both.ours(
                encoder_outputs=encoded,
                attention_mask=given["attention_mask"],
                decoder_input_ids=new,
                past_key_values=ours,
            )
            oracle.same(expected, found)
            oracle.close(whole.logits[:, start:stop], found.logits)
            ours, theirs = found.past_key_values, expected["cache"]
    assert ours.get_seq_length() == 6
    assert ours.is_updated == {0: True, 1: True, 2: True}


@pytest.mark.parametrize("switches", [{}, GATED])
def test_loss(switches: dict[str, Any]) -> None:
    """Labels are shifted to become the decoder's input, and -100 does not count."""
    labels = oracle.ids(length=5, seed=1)
    labels[1, 3:] = -100
    both = oracle.pair("T5ForConditionalGeneration", **SMALL, **switches)
    oracle.compare(both, input_ids=oracle.ids(), labels=labels)


def test_shift_right() -> None:
    """The decoder reads its start token, then the labels, -100 as padding."""
    model = oracle.pair("T5ForConditionalGeneration", **SMALL).ours
    labels = torch.tensor([[7, 8, 9], [7, -100, -100]])
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    assert shifted.tolist() == [[0, 7, 8], [0, 7, 0]]
    assert labels[1, 1] == -100


def test_start_token_is_needed() -> None:
    """Labels cannot be shifted without a start token; the error names it."""
    model = t5.T5ForConditionalGeneration(t5.T5Config(**SMALL | {"decoder_start_token_id": None}))
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        model(oracle.ids(), labels=oracle.ids())


def test_encoder_outputs() -> None:
    """An encoder's output can be given, as an output or as a tuple, instead of its input."""
    model = oracle.pair("T5ForConditionalGeneration", **SMALL).ours
    decoder_ids = oracle.ids(length=4, seed=1)
    with torch.no_grad():
        whole = model(oracle.ids(), decoder_input_ids=decoder_ids)
        encoded = model.encoder(oracle.ids())
        for given in (encoded, encoded.to_tuple(), BaseModelOutput(encoded[0])):
            found = model(encoder_outputs=given, decoder_input_ids=decoder_ids)
            oracle.close(whole.logits, found.logits)


def test_tuples() -> None:
    """Without `return_dict` the answer is a tuple of the fields that are there."""
    both = oracle.pair("T5ForConditionalGeneration", **SMALL)
    given = {
        "input_ids": oracle.ids(),
        "decoder_input_ids": oracle.ids(length=4, seed=1),
        "use_cache": False,
        "output_hidden_states": True,
        "return_dict": False,
    }
    with torch.no_grad():
        oracle.close(both.theirs(**given), both.ours(**given))


@pytest.mark.parametrize("given", [{}, {"decoder_input_ids": oracle.ids()}])
def test_inputs_are_needed(given: dict[str, Any]) -> None:
    """Either half without input is refused."""
    model = t5.T5Model(t5.T5Config(**SMALL))
    inputs = {} if given else {"input_ids": oracle.ids()}
    with pytest.raises(ValueError, match="exactly one"):
        model(**inputs, **given)


def test_one_embedding() -> None:
    """Both stacks, and the head, read one parameter; replacing it replaces it in both stacks."""
    model = t5.T5ForConditionalGeneration(t5.T5Config(**SMALL))
    assert model.get_input_embeddings() is model.shared
    assert model.lm_head.weight is model.shared.weight
    assert model.encoder.embed_tokens.weight is model.shared.weight
    other = torch.nn.Embedding(5, 32)
    model.set_input_embeddings(other)
    assert model.encoder.embed_tokens is other
    assert model.decoder.get_input_embeddings() is other


def test_halves() -> None:
    """Encoder and decoder are found under their documented names."""
    model = t5.T5ForConditionalGeneration(t5.T5Config(**SMALL))
    assert model.get_encoder() is model.encoder
    assert model.get_decoder() is model.decoder


def test_initial_weights() -> None:
    """Every matrix starts with the deviation that T5 derives from its sizes."""
    torch.manual_seed(0)
    values = SMALL | {"d_model": 64, "d_kv": 16, "d_ff": 100, "initializer_factor": 2.0}
    model = t5.T5ForConditionalGeneration(t5.T5Config(**values))
    expected = {
        "q.weight": (64 * 16) ** -0.5,
        "k.weight": 64**-0.5,
        "v.weight": 64**-0.5,
        ".o.weight": 64**-0.5,
        "wi.weight": 64**-0.5,
        "wo.weight": 100**-0.5,
        "shared.weight": 1.0,
    }
    for name, parameter in model.named_parameters():
        for suffix, std in expected.items():
            if name.endswith(suffix):
                assert parameter.std().item() == pytest.approx(2 * std, rel=0.1), name
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.full_like(parameter, 2.0))
    bias = model.get_submodule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias")
    assert isinstance(bias, RelativeAttentionBias)
    assert bias.weight.std().item() == pytest.approx(2 * 64**-0.5, rel=0.3)


def test_float16_keeps_the_last_projection() -> None:
    """With `wo` kept in float32, as loading does for float16, the halves still fit together."""
    model = t5.T5ForConditionalGeneration(t5.T5Config(**SMALL)).half().eval()
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    with torch.no_grad():
        logits = model(oracle.ids(), decoder_input_ids=oracle.ids()).logits
    assert logits.dtype == torch.float16
    assert logits.isfinite().all()


def test_checkpointing() -> None:
    """Gradients are the same when activations are computed twice."""
    model = t5.T5ForConditionalGeneration(t5.T5Config(**SMALL, dropout_rate=0.0))
    oracle.same_gradients(model, input_ids=oracle.ids(), labels=oracle.ids(seed=1))


@pytest.mark.parametrize("switches", [{}, GATED])
def test_ours_read_there(switches: dict[str, Any], tmp_path: Any) -> None:
    """Weights under our names load in transformers without a missing or an unexpected key."""
    both = oracle.make("T5ForConditionalGeneration", "sdpa", SMALL | switches)
    both.ours.save_pretrained(tmp_path)
    again, info = transformers.T5ForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    given = {"input_ids": oracle.ids(), "decoder_input_ids": oracle.ids(seed=1)}
    with torch.no_grad():
        oracle.close(again(**given).logits, both.ours(**given).logits)
