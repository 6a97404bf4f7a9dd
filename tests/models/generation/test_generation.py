"""`generate` against transformers' own, token by token, on tiny random models."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from transformers.generation import stopping_criteria as oracle_criteria

from ckptd.models.generation import generation_config
from ckptd.models.generation.generation import (
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
)
from ckptd.models.generation.generation_config import GenerationConfig
from ckptd.models.native import gpt2, llama, t5

ROWS = 61
IDS: dict[str, int] = {"pad_token_id": 0, "eos_token_id": 2}
LLAMA: dict[str, Any] = {
    "vocab_size": ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "bos_token_id": 1,
    **IDS,
}
GPT2: dict[str, Any] = {
    "vocab_size": ROWS,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    **IDS,
}
T5: dict[str, Any] = {
    "vocab_size": ROWS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    **IDS,
}


@dataclass(frozen=True, repr=False)
class Pair:
    """The same weights, there and here."""

    theirs: Any
    ours: Any

    def both(self, *args: Any, seed: int = 5, **kwargs: Any) -> tuple[Any, Any]:
        """What both generate from the same arguments and the same seed."""
        torch.manual_seed(seed)
        expected = self.theirs.generate(*args, **kwargs)
        torch.manual_seed(seed)
        return expected, self.ours.generate(*args, **kwargs)

    def agree(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The tokens, after a comparison of both."""
        expected, made = self.both(*args, **kwargs)
        assert made.tolist() == expected.tolist()
        return made


def pair(theirs: tuple[Any, Any], ours: tuple[Any, Any], settings: dict[str, Any]) -> Pair:
    torch.manual_seed(11)
    there = theirs[1](theirs[0](**settings)).eval()
    here = ours[1](ours[0](**settings)).eval()
    found = here.load_state_dict(there.state_dict(), strict=False)
    assert not found.unexpected_keys
    return Pair(there, here)


def build(name: str) -> Pair:
    if name.startswith("llama"):
        return pair(
            (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            (llama.LlamaConfig, llama.LlamaForCausalLM),
            {**LLAMA, "tie_word_embeddings": name == "llama-tied"},
        )
    if name == "gpt2":
        return pair(
            (transformers.GPT2Config, transformers.GPT2LMHeadModel),
            (gpt2.GPT2Config, gpt2.GPT2LMHeadModel),
            GPT2,
        )
    seq2seq = pair(
        (transformers.T5Config, transformers.T5ForConditionalGeneration),
        (t5.T5Config, t5.T5ForConditionalGeneration),
        T5,
    )
    # A shared head would say again what it has just read, for ever.
    head = torch.nn.Parameter(torch.randn(ROWS, 32))
    seq2seq.theirs.lm_head.weight = head
    seq2seq.ours.lm_head.weight = head
    return seq2seq


BUILT: dict[str, Pair] = {}


def get(name: str) -> Pair:
    """One pair a module; tests leave it as it is."""
    if name not in BUILT:
        BUILT[name] = build(name)
    return BUILT[name]


@pytest.fixture(params=["llama", "llama-tied", "gpt2", "t5"])
def models(request: pytest.FixtureRequest) -> Pair:
    return get(request.param)


@pytest.fixture(params=["llama", "gpt2"])
def decoders(request: pytest.FixtureRequest) -> Pair:
    return get(request.param)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    generation_config.warn_once.cache_clear()
    yield
    torch.set_num_threads(before)


def prompts() -> torch.Tensor:
    """Three prompts of 7, 4 and 2 tokens, padded at the left."""
    ids = torch.randint(3, ROWS, (3, 7), generator=torch.Generator().manual_seed(3))
    ids[1, :3] = 0
    ids[2, :5] = 0
    return ids


def padded() -> dict[str, torch.Tensor]:
    return {"input_ids": prompts(), "attention_mask": (prompts() != 0).long()}


def endings(pair: Pair, num: int = 2) -> list[int]:
    """Tokens that the model really comes to say, so that rows end at different lengths."""
    free = pair.theirs.generate(**padded(), max_new_tokens=12, eos_token_id=None)[:, -12:]
    return [int(free[0, 4]), int(free[1, 7])][:num]


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_tokens_equal_transformers(models: Pair, use_cache: bool) -> None:
    """A batch with left padding gives transformers' tokens, with a cache and without."""
    models.agree(**padded(), max_new_tokens=18, use_cache=use_cache)


def test_the_models_say_different_things(models: Pair) -> None:
    """The oracle is worth something: the tiny models do not repeat one token for ever."""
    made = models.ours.generate(**padded(), max_new_tokens=24)
    assert len(set(made[:, 7:].flatten().tolist())) > 6


def test_a_padded_row_gives_what_it_gives_alone(models: Pair) -> None:
    """Left padding changes no row's tokens."""
    together = models.ours.generate(**padded(), max_new_tokens=10, eos_token_id=None)
    for row, ids in zip(together, prompts(), strict=True):
        alone = models.ours.generate(ids[ids != 0][None], max_new_tokens=10, eos_token_id=None)
        assert row[-10:].tolist() == alone[0, -10:].tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7, "top_k": 7},
        {"top_k": 0, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 12, "top_p": 0.7, "repetition_penalty": 1.4},
        {"top_k": 0, "min_p": 0.1, "renormalize_logits": True},
    ],
    ids=str,
)
def test_a_seed_draws_what_it_draws_in_transformers(models: Pair, settings: dict[str, Any]) -> None:
    """Sampling under the same torch seed gives the same tokens, whatever narrows the choice."""
    made = models.agree(**padded(), do_sample=True, max_new_tokens=10, **settings)
    assert made.tolist() != models.ours.generate(**padded(), max_new_tokens=10).tolist()


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.7, "use_cache": False},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 10},
        {"min_length": 14},
        {"max_length": 19, "max_new_tokens": None},
        {"forced_eos_token_id": 9},
        {"forced_bos_token_id": 9, "begin_suppress_tokens": [9, 10]},
        {"suppress_tokens": [5, 6, 7, 8]},
        {"pad_token_id": 4},
    ],
    ids=str,
)
def test_settings_act_as_in_transformers(models: Pair, settings: dict[str, Any]) -> None:
    """Each setting gives transformers' tokens, with several tokens that end a sequence."""
    given = {"max_new_tokens": 14, "eos_token_id": endings(models), **settings}
    models.agree(**padded(), **given)


def test_finished_rows_are_filled_with_the_pad_token(models: Pair) -> None:
    """After a row's ending token comes only padding, while the others go on."""
    ended = endings(models, num=1)
    made = models.agree(**padded(), max_new_tokens=20, eos_token_id=ended, pad_token_id=60)
    row = made[0].tolist()
    first = row.index(ended[0], 0 if models.ours.config.is_encoder_decoder else 7)
    assert set(row[first + 1 :]) <= {60}


def test_generation_ends_when_all_rows_have(decoders: Pair) -> None:
    """A batch whose rows all said an ending token is not filled up to the maximum."""
    every = list(range(3, ROWS))
    assert decoders.agree(**padded(), max_new_tokens=20, eos_token_id=every).shape == (3, 8)


def test_the_mask_is_inferred_from_padding(decoders: Pair) -> None:
    """Without an attention mask, pad tokens in the prompt are left out."""
    made = decoders.agree(prompts(), max_new_tokens=12)
    assert made.tolist() == decoders.ours.generate(**padded(), max_new_tokens=12).tolist()


def test_padding_that_is_also_an_ending_is_not_inferred(decoders: Pair) -> None:
    """Where pad and end are one token, nothing is left out, as in transformers."""
    decoders.agree(prompts(), max_new_tokens=12, eos_token_id=[0, 2])


def test_right_padding_is_logged_once(decoders: Pair, caplog: pytest.LogCaptureFixture) -> None:
    """A batch padded at the right is generated, and said to be wrong the first time."""
    ids = prompts().flip(1)
    with caplog.at_level(logging.WARNING, "ckptd"):
        for _ in range(2):
            decoders.agree(ids, attention_mask=(ids != 0).long(), max_new_tokens=3)
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("ckptd")]
    assert len(ours) == 1
    assert "right-padding" in ours[0]


def test_several_sequences_of_one_prompt(models: Pair) -> None:
    """`num_return_sequences` gives each prompt's sequences one after the other."""
    made = models.agree(**padded(), do_sample=True, num_return_sequences=3, max_new_tokens=9)
    assert len(made) == 9


def test_no_token_need_end_a_sequence(models: Pair) -> None:
    """With no ending token at all, every row has all the tokens asked for."""
    for none in (None, []):
        made = models.ours.generate(**padded(), max_new_tokens=6, eos_token_id=none)
        expected = models.theirs.generate(**padded(), max_new_tokens=6, eos_token_id=None)
        assert made.tolist() == expected.tolist()


def test_embeddings_stand_for_the_prompt(decoders: Pair) -> None:
    """`inputs_embeds` give only new tokens, the same that their ids give."""
    embeds = decoders.ours.get_input_embeddings()(prompts()).detach()
    given = {"attention_mask": padded()["attention_mask"], "max_new_tokens": 10}
    made = decoders.agree(inputs_embeds=embeds, **given)
    assert made.tolist() == decoders.ours.generate(prompts(), **given)[:, 7:].tolist()
    decoders.agree(inputs_embeds=embeds, input_ids=prompts(), **given)
    decoders.agree(inputs_embeds=embeds, attention_mask=given["attention_mask"], max_length=12)


def test_a_prompt_may_be_missing(decoders: Pair) -> None:
    """Without inputs, a sequence starts from `bos_token_id`."""
    assert decoders.agree(max_new_tokens=5)[0, 0] == 1


def test_a_mask_longer_than_a_row_may_be_boolean(decoders: Pair) -> None:
    """A mask of booleans is as good as one of integers."""
    mask = prompts() != 0
    made = decoders.ours.generate(prompts(), attention_mask=mask, max_new_tokens=8)
    assert made.tolist() == decoders.ours.generate(**padded(), max_new_tokens=8).tolist()


def test_the_answer_with_everything(models: Pair) -> None:
    """`return_dict_in_generate` gives scores, logits and states as transformers does, and the cache."""
    expected, made = models.both(
        **padded(),
        max_new_tokens=6,
        repetition_penalty=1.3,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
    )
    seq2seq = models.ours.config.is_encoder_decoder
    assert type(made) is (GenerateEncoderDecoderOutput if seq2seq else GenerateDecoderOnlyOutput)
    assert made.sequences.tolist() == expected.sequences.tolist()
    for name in ("scores", "logits"):
        torch.testing.assert_close(getattr(made, name), getattr(expected, name))
    states = "decoder_hidden_states" if seq2seq else "hidden_states"
    torch.testing.assert_close(made[states], expected[states], atol=2e-4, rtol=1e-4)
    assert made.past_key_values.get_seq_length() == made.sequences.shape[1] - 1


def test_attentions_are_returned_step_by_step() -> None:
    """`output_attentions` gives one tuple of layers a step, with transformers' values."""
    models = pair(
        (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        (llama.LlamaConfig, llama.LlamaForCausalLM),
        {**LLAMA, "attn_implementation": "eager"},
    )
    expected, made = models.both(
        **padded(), max_new_tokens=3, return_dict_in_generate=True, output_attentions=True
    )
    assert [step[0].shape for step in made.attentions] == [
        step[0].shape for step in expected.attentions
    ]


def test_transition_scores_equal_transformers(models: Pair) -> None:
    """The log-probabilities of the chosen tokens are transformers'."""
    expected, made = models.both(
        **padded(), max_new_tokens=6, return_dict_in_generate=True, output_scores=True
    )
    for normalize in (False, True):
        torch.testing.assert_close(
            models.ours.compute_transition_scores(
                made.sequences, made.scores, normalize_logits=normalize
            ),
            models.theirs.compute_transition_scores(
                expected.sequences, expected.scores, normalize_logits=normalize
            ),
        )


def test_a_cache_can_be_continued(decoders: Pair) -> None:
    """A cache goes on as if there had been no break, with the whole sequence or the whole mask."""
    whole = decoders.ours.generate(**padded(), max_new_tokens=12, eos_token_id=None)
    first = decoders.ours.generate(
        **padded(), max_new_tokens=5, eos_token_id=None, return_dict_in_generate=True
    )
    ones = torch.ones(3, 5, dtype=torch.long)
    mask = torch.cat([padded()["attention_mask"], ones], dim=1)
    again = decoders.ours.generate(
        first.sequences,
        attention_mask=mask,
        past_key_values=copy.deepcopy(first.past_key_values),
        max_new_tokens=7,
        eos_token_id=None,
    )
    assert again.tolist() == whole.tolist()
    shorter = decoders.ours.generate(
        first.sequences[:, -1:],
        attention_mask=mask,
        past_key_values=first.past_key_values,
        max_new_tokens=7,
        eos_token_id=None,
    )
    assert shorter[:, 1:].tolist() == whole[:, -7:].tolist()


def test_a_cache_without_padding_can_be_continued(decoders: Pair) -> None:
    """Where no mask is needed, the whole sequence and the cache are enough."""
    whole = decoders.ours.generate(prompts()[:1], max_new_tokens=9, eos_token_id=None)
    first = decoders.ours.generate(
        prompts()[:1], max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True
    )
    again = decoders.ours.generate(
        first.sequences, past_key_values=first.past_key_values, max_new_tokens=5, eos_token_id=None
    )
    assert again.tolist() == whole.tolist()


def test_a_cache_that_saw_everything_is_refused(decoders: Pair) -> None:
    """A cache with nothing left to say to it is a ValueError that says what to give."""
    first = decoders.ours.generate(
        **padded(), max_new_tokens=5, eos_token_id=None, return_dict_in_generate=True
    )
    with pytest.raises(ValueError, match="give the whole sequence"):
        decoders.ours.generate(
            prompts()[:, -1:], past_key_values=first.past_key_values, max_new_tokens=2
        )


def test_the_encoder_runs_once() -> None:
    """An encoder-decoder model encodes once, whatever the number of tokens."""
    models = get("t5")
    calls = []
    encoder = models.ours.get_encoder()
    handle = encoder.register_forward_hook(lambda *_: calls.append(1))
    models.ours.generate(**padded(), max_new_tokens=6)
    handle.remove()
    assert len(calls) == 1


def test_an_encoder_may_have_run_before() -> None:
    """`encoder_outputs` stand for the inputs, as in transformers."""
    models = get("t5")
    with torch.no_grad():
        theirs = models.theirs.get_encoder()(**padded())
        ours = models.ours.get_encoder()(**padded())
    mask = padded()["attention_mask"]
    expected = models.theirs.generate(encoder_outputs=theirs, attention_mask=mask, max_new_tokens=9)
    made = models.ours.generate(encoder_outputs=ours, attention_mask=mask, max_new_tokens=9)
    assert made.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "given",
    [
        {"decoder_input_ids": torch.tensor([[7, 8], [9, 10], [11, 12]])},
        {"decoder_input_ids": torch.tensor([[0, 8], [0, 10], [0, 12]])},
        {"decoder_start_token_id": 5},
        {"decoder_start_token_id": [5, 6, 7]},
    ],
)
def test_what_the_decoder_starts_with(given: dict[str, Any]) -> None:
    """A caller's start token and first decoder tokens are taken as transformers takes them."""
    get("t5").agree(**padded(), max_new_tokens=8, **copy.deepcopy(given))


def test_a_model_starts_with_the_settings_of_its_configuration(models: Pair) -> None:
    """A new model's generation_config is the one that transformers gives it."""
    expected = models.theirs.generation_config.to_diff_dict()
    made = models.ours.generation_config.to_diff_dict()
    for settings in (expected, made):
        settings.pop("transformers_version", None)
    assert made == expected


def test_settings_of_a_call_come_before_the_configurations(decoders: Pair) -> None:
    """A call's keyword comes before its generation_config, and that before the model's own."""
    own = copy.deepcopy(decoders.ours)
    own.generation_config.max_new_tokens = 3
    config = GenerationConfig(max_new_tokens=4)
    lengths = [
        own.generate(prompts(), eos_token_id=None, **given).shape[1] - 7
        for given in ({}, {"generation_config": config}, {"max_new_tokens": 5})
    ]
    assert lengths == [3, 4, 5]
    assert own.generate(prompts(), config, max_new_tokens=6, eos_token_id=None).shape[1] == 13


def test_no_configuration_is_changed(models: Pair) -> None:
    """The model's configurations and the caller's are after a call what they were."""
    config = GenerationConfig(max_new_tokens=4, top_k=3, do_sample=True)
    before = (
        models.ours.generation_config.to_dict(),
        models.ours.config.to_dict(),
        config.to_dict(),
    )
    models.ours.generate(**padded(), generation_config=config, temperature=0.5)
    after = (
        models.ours.generation_config.to_dict(),
        models.ours.config.to_dict(),
        config.to_dict(),
    )
    assert after == before


def test_the_mode_of_the_model_is_left_alone(decoders: Pair) -> None:
    """A model in training mode stays there, an evaluating one too; no graph is kept."""
    model = copy.deepcopy(decoders.ours)
    for mode in (True, False):
        model.train(mode)
        made = model.generate(
            prompts(), max_new_tokens=2, return_dict_in_generate=True, output_logits=True
        )
        assert model.training is mode
        assert not made.logits[0].requires_grad


def test_inference_mode_gives_the_same_tokens(decoders: Pair) -> None:
    """Under `torch.inference_mode` the tokens are the same."""
    with torch.inference_mode():
        inside = decoders.ours.generate(**padded(), max_new_tokens=5)
    assert inside.tolist() == decoders.ours.generate(**padded(), max_new_tokens=5).tolist()


def test_own_processors_and_criteria(models: Pair) -> None:
    """Callables of the caller, and criteria of transformers, act as they do there."""
    seen: list[int] = []

    def no_even(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, ::2] = -float("inf")
        return scores

    def after_four(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(ids.shape[1])
        return torch.full((len(ids),), len(seen) % 4 == 0)

    models.agree(
        **padded(),
        max_new_tokens=9,
        logits_processor=transformers.LogitsProcessorList([no_even]),
        stopping_criteria=transformers.StoppingCriteriaList([after_four]),
        do_sample=True,
    )
    assert len(seen) == 8


def test_a_criterion_may_end_single_rows(decoders: Pair) -> None:
    """A criterion that answers row by row fills the finished ones with padding."""
    ended = endings(decoders, num=1)
    criteria = transformers.StoppingCriteriaList([oracle_criteria.EosTokenCriteria(ended)])
    decoders.agree(**padded(), max_new_tokens=12, eos_token_id=None, stopping_criteria=criteria)


def test_time_ends_generation(decoders: Pair) -> None:
    """`max_time` of nothing gives one token."""
    assert decoders.ours.generate(prompts(), max_new_tokens=9, max_time=0.0).shape[1] == 8


class Listener:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.said: list[list[Any]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.said.append(value.tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_the_prompt_and_every_step(models: Pair) -> None:
    """`put` gets what it gets from transformers, `end` comes last."""
    there, here = Listener(), Listener()
    models.theirs.generate(**padded(), max_new_tokens=4, streamer=there)
    models.ours.generate(**padded(), max_new_tokens=4, streamer=here)
    assert here.said == there.said
    assert here.ended


def test_twenty_new_tokens_by_default(decoders: Pair) -> None:
    """Without a length, up to 20 new tokens are made, and a warning says so."""
    with pytest.warns(UserWarning, match="max_length"):
        expected = decoders.theirs.generate(prompts(), eos_token_id=None)
    with pytest.warns(UserWarning, match="max_new_tokens"):
        made = decoders.ours.generate(prompts(), eos_token_id=None)
    assert made.tolist() == expected.tolist()
    assert made.shape[1] == 27


def test_a_minimum_above_the_maximum_is_warned_about(decoders: Pair) -> None:
    """A minimum that cannot be reached is a UserWarning; the maximum holds."""
    given = {"max_new_tokens": 3, "min_new_tokens": 5}
    with pytest.warns(UserWarning, match="maximum holds"):
        assert decoders.ours.generate(prompts(), **given).shape[1] == 10


REFUSED: dict[str, Callable[[Any], Any]] = {
    "max_length": lambda model: model.generate(prompts(), max_length=7),
    "max_new_tokens": lambda model: model.generate(prompts(), max_new_tokens=0),
    "misspelt": lambda model: model.generate(prompts(), max_new_tokens=2, misspelt=1),
    "num_return_sequences": lambda model: model.generate(prompts(), num_return_sequences=2),
    "inputs": lambda model: model.generate(prompts(), input_ids=prompts(), max_new_tokens=2),
    "bos_token_id": lambda model: model.generate(max_new_tokens=2, bos_token_id=None),
    "attention_mask": lambda model: model.generate(
        prompts(), attention_mask=torch.ones(3, 1, 7, 7), max_new_tokens=2
    ),
    "temperature": lambda model: model.generate(
        prompts(), do_sample=True, temperature=0.0, max_new_tokens=2
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_are_refused_as_in_transformers(name: str) -> None:
    """What transformers answers with ValueError is one here, and the text names the argument."""
    models = get("llama")
    with pytest.raises(ValueError):
        REFUSED[name](models.theirs)
    with pytest.raises(ValueError, match=name):
        REFUSED[name](models.ours)


@pytest.mark.parametrize(
    "given",
    [
        {"num_beams": 3},
        {"stop_strings": ["x"]},
        {"assistant_model": "another"},
        {"prefix_allowed_tokens_fn": print},
        {"do_sample": True, "typical_p": 0.5},
        {"guidance_scale": 2.0},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_what_there_is_not_is_named(given: dict[str, Any]) -> None:
    """What is not supported is a ValueError that names it and what there is instead."""
    with pytest.raises(
        ValueError, match=rf"{list(given)[-1]}.*it does greedy decoding and sampling"
    ):
        get("llama").ours.generate(prompts(), max_new_tokens=2, **given)
