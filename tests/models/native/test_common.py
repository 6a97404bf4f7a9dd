"""What holds for every native class with every head: the parts of transformers' own model tests."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ckptd.models import registry

VOCABULARY, WIDTH, LAYERS, HEADS = 41, 16, 2, 4
PAD, LENGTH = 0, 7
DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 48,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": 3,
}
WITHOUT_GROUPS = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
GEMMA = DECODER | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
ENCODER = WITHOUT_GROUPS | {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TINY: dict[str, dict[str, Any]] = {
    "bert": ENCODER,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": 48,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "summary_first_dropout": 0.0,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": 3,
    },
    "gpt_neox": WITHOUT_GROUPS,
    "granite": DECODER,
    "llama": DECODER,
    "mistral": DECODER | {"sliding_window": 5},
    "mixtral": DECODER | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "olmo2": DECODER,
    "phi3": DECODER,
    "qwen2": DECODER,
    "qwen3": DECODER | {"head_dim": 8},
    "qwen3_moe": DECODER
    | {"head_dim": 8, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
    "roberta": ENCODER,
    "smollm3": DECODER,
    "t5": {
        "vocab_size": VOCABULARY,
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "dropout_rate": 0.0,
        "decoder_start_token_id": PAD,
        "num_labels": 3,
    },
    "vit": {
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": 8,
        "patch_size": 4,
        "encoder_stride": 4,
        "num_labels": 3,
    },
}
"""A small configuration of every native architecture, without dropout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One class of one architecture, and the kind of head it is."""

    model_type: str
    head: str
    name: str

    @property
    def cls(self) -> Any:
        """The class."""
        return registry.imported(registry.MODELS[self.head][self.model_type])

    @property
    def is_text(self) -> bool:
        """Whether tokens go in."""
        return self.model_type != "vit"

    def config(self, **values: Any) -> Any:
        """Return the small configuration; `values` override."""
        own = {"num_labels": 2} if self.head == "question_answering" else {}
        config_class = registry.imported(registry.CONFIGS[self.model_type])
        return config_class(**(TINY[self.model_type] | own | values))

    def model(self, **values: Any) -> Any:
        """Return a model whose every weight is off its initial value, for evaluation."""
        torch.manual_seed(0)
        model = self.cls(self.config(**values))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    def inputs(self, rows: int = 2, *, labels: bool = False) -> dict[str, Any]:
        """Return inputs of the class; with `labels` what gives a loss, too."""
        generator = torch.Generator().manual_seed(1)
        if not self.is_text:
            given: dict[str, Any] = {
                "pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)
            }
        else:
            shape = (rows, 2, LENGTH) if self.head == "multiple_choice" else (rows, LENGTH)
            given = {"input_ids": torch.randint(3, VOCABULARY, shape, generator=generator)}
            if self.model_type == "t5":
                given["input_ids"][..., -1] = 1  # the end token
            if self.name in {"T5Model", "T5ForConditionalGeneration"}:
                given["decoder_input_ids"] = given["input_ids"].flip(1)
        return given | (self._labels(rows, given) if labels else {})

    def _labels(self, rows: int, given: dict[str, Any]) -> dict[str, Any]:
        one = torch.arange(rows) % 2
        if self.head == "question_answering":
            return {"start_positions": one, "end_positions": one + 2}
        if self.head == "masked_image_modeling":
            return {"bool_masked_pos": torch.tensor([[True, False, True, False]]).expand(rows, 4)}
        if self.name == "BertForPreTraining":
            return {"labels": given["input_ids"], "next_sentence_label": one}
        if self.head == "token_classification":
            return {"labels": given["input_ids"] % 3}
        if self.head in {"base", "text_encoding"}:
            return {}
        each = {"causal_lm", "masked_lm", "seq2seq_lm", "pretraining"}
        return {"labels": given["input_ids"] if self.head in each else one}


CASES = [
    Case(model_type=model_type, head=head, name=class_name)
    for head, table in registry.MODELS.items()
    for model_type, (_, class_name) in table.items()
    # The tables of these two heads name classes of others, but for two.
    if head not in {"pretraining", "text_encoding"}
    or class_name in {"BertForPreTraining", "T5EncoderModel"}
]
WITH_LOSS = [case for case in CASES if case.head not in {"base", "text_encoding"}]
TEXT = [case for case in CASES if case.is_text]
CAUSAL = [case for case in CASES if case.head in {"causal_lm", "seq2seq_lm"}]
ONE_EACH = list({case.model_type: case for case in CASES}.values())


def name_of(case: Case) -> str:
    """Return what a case is called."""
    return case.name


def first_of(output: Any) -> torch.Tensor:
    """Return the main answer of a forward: logits, or the last hidden state."""
    names = ("logits", "prediction_logits", "start_logits", "reconstruction", "last_hidden_state")
    return next(output[name] for name in names if name in output)


def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the main answer without gradients."""
    with torch.no_grad():
        return first_of(model(**inputs))


def test_every_architecture_is_tried() -> None:
    """An architecture without a row here is not tested."""
    assert TINY.keys() == registry.CONFIGS.keys()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_save_and_load(case: Case, tmp_path: Path) -> None:
    """What was saved loads with nothing missing, every bit the same, and answers the same."""
    model = case.model()
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    loaded, info = case.cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    inputs = case.inputs()
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    assert loaded.config.to_dict() == {**model.config.to_dict(), "dtype": "float32"}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_ties(case: Case, tmp_path: Path) -> None:
    """Tied names are one parameter, fresh, copied and loaded, and only one of them is in the file."""
    model = case.model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for one in (model, copy.deepcopy(model), case.cls.from_pretrained(tmp_path)):
        for target, source in one.all_tied_weights_keys.items():
            assert one.get_parameter(target) is one.get_parameter(source)
            assert target not in stored
            assert source in stored
    declared = model._tied_weights_keys or {}
    assert declared.items() <= model.all_tied_weights_keys.items()


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_untied_weights_are_saved_each(case: Case, tmp_path: Path) -> None:
    """Without the flag a head has a matrix of its own, in the file as well."""
    model = case.model(tie_word_embeddings=False)
    head = model.get_output_embeddings()
    model.save_pretrained(tmp_path)
    loaded, info = case.cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    if head is not None:
        assert head.weight is not model.get_input_embeddings().weight
        assert torch.equal(loaded.get_output_embeddings().weight, head.weight)


@pytest.mark.parametrize("case", TEXT, ids=name_of)
@pytest.mark.parametrize("rows", [VOCABULARY + 10, VOCABULARY - 15])
def test_resized_models_run_and_load(case: Case, rows: int, tmp_path: Path) -> None:
    """After a resize the model runs with its last token, trains, saves and loads."""
    model = case.model(pad_token_id=PAD)
    before = model.get_input_embeddings().weight.detach().clone()
    embedding = model.resize_token_embeddings(rows)
    kept = min(rows, VOCABULARY)
    assert torch.equal(embedding.weight[:kept], before[:kept])
    assert (embedding.num_embeddings, model.config.vocab_size) == (rows, rows)
    inputs = case.inputs()
    for name in ("input_ids", "decoder_input_ids"):
        if name in inputs:
            inputs[name] = inputs[name].clamp(max=rows - 1)
            inputs[name][..., 0] = rows - 1
    answer = first_of(model(**inputs))
    answer.float().sum().backward()
    assert embedding.weight.grad.shape[0] == rows
    model.save_pretrained(tmp_path)
    assert torch.equal(run(case.cls.from_pretrained(tmp_path), inputs), answer)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_hidden_states_and_attentions(case: Case) -> None:
    """Each layer's states and attention weights are given when asked, by argument and by config."""
    model = case.model()
    model.set_attn_implementation("eager")
    inputs = case.inputs()
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        output = model(**inputs, **asked)
        model.config.output_hidden_states = model.config.output_attentions = True
        configured = model(**inputs)
        model.config.output_hidden_states = model.config.output_attentions = False
        plain = model(**inputs)
    prefixes = ("decoder_", "encoder_") if "encoder_last_hidden_state" in output else ("",)
    for prefix in prefixes:
        states, weights = output[f"{prefix}hidden_states"], output[f"{prefix}attentions"]
        assert len(states) == LAYERS + 1
        assert len(weights) == LAYERS
        assert {state.shape[-1] for state in states} == {WIDTH}
        assert {weight.shape[1] for weight in weights} == {HEADS}
        for weight in weights:
            torch.testing.assert_close(weight.sum(-1), torch.ones_like(weight.sum(-1)))
        assert all(map(torch.equal, configured[f"{prefix}hidden_states"], states))
        assert f"{prefix}hidden_states" not in plain
        assert f"{prefix}attentions" not in plain
    torch.testing.assert_close(first_of(output), first_of(plain))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_hidden_states_carry_gradients(case: Case) -> None:
    """States and attention weights that are given can be trained through."""
    model = case.model()
    model.set_attn_implementation("eager")
    output = model(**case.inputs(), output_hidden_states=True, output_attentions=True)
    prefix = "encoder_" if "encoder_hidden_states" in output else ""
    kept = (output[f"{prefix}hidden_states"][0], output[f"{prefix}attentions"][0])
    for tensor in kept:
        tensor.retain_grad()
    first_of(output).flatten()[0].backward(retain_graph=True)
    assert all(tensor.grad is not None for tensor in kept)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_tuple_is_the_same_answer(case: Case) -> None:
    """`return_dict=False`, as argument or in the configuration, gives the fields as a tuple."""
    model = case.model()
    inputs = case.inputs(labels=True)
    with torch.no_grad():
        whole = model(**inputs, output_hidden_states=True)
        parts = model(**inputs, output_hidden_states=True, return_dict=False)
    assert isinstance(parts, tuple)
    assert len(parts) == len(whole)
    for one, other in zip(whole.to_tuple(), parts, strict=True):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_attention_implementations_agree(case: Case) -> None:
    """`eager` and `sdpa` answer alike, with a padding mask as well."""
    model = case.model()
    inputs = case.inputs()
    if case.is_text:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][0, ..., :2] = 0
    answers = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        answers.append(run(model, inputs))
    per_token = answers[0].dim() == 3 or case.head == "question_answering"
    if case.is_text and per_token and case.head != "multiple_choice":
        answers = [answer[:, 2:] for answer in answers]  # what padding says means nothing
    torch.testing.assert_close(*answers, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", TEXT, ids=name_of)
def test_vectors_stand_for_tokens(case: Case) -> None:
    """`inputs_embeds` of the tokens answer what the tokens answer."""
    model = case.model()
    inputs = case.inputs()
    if case.name == "T5ForSequenceClassification":
        with pytest.raises(NotImplementedError, match="T5ForSequenceClassification"):
            model(inputs_embeds=torch.ones(1, 2, WIDTH))
        return
    tokens = dict(inputs)
    embed = model.get_input_embeddings()
    for name, new in (
        ("input_ids", "inputs_embeds"),
        ("decoder_input_ids", "decoder_inputs_embeds"),
    ):
        if name in inputs:
            with torch.no_grad():
                inputs[new] = embed(inputs.pop(name))
    if case.name == "T5ForQuestionAnswering":
        inputs["decoder_input_ids"] = model._shift_right(tokens["input_ids"])
    if case.head == "sequence_classification" and case.model_type not in {"bert", "roberta"}:
        tokens = {name: value[:1] for name, value in tokens.items()}
        inputs = {name: value[:1] for name, value in inputs.items()}
    torch.testing.assert_close(run(model, inputs), run(model, tokens))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_row_is_the_same_in_a_batch(case: Case) -> None:
    """Rows do not see each other: alone and in a batch a row answers alike."""
    model = case.model()
    inputs = case.inputs(rows=3)
    together = run(model, inputs)
    alone = run(model, {name: value[1:2] for name, value in inputs.items()})
    torch.testing.assert_close(alone, together[1:2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", WITH_LOSS, ids=name_of)
def test_training_reaches_every_weight(case: Case) -> None:
    """The loss is finite and every parameter gets a gradient, with checkpointed layers the same."""
    model = case.model().train()
    inputs = case.inputs(labels=True)
    gradients = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.zero_grad()
        output = model(**inputs)
        assert output.loss.isfinite()
        output.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    lacking = {name for name, gradient in gradients[0].items() if gradient is None}
    assert lacking == {name for name in lacking if is_unused(case, name)}
    for name in gradients[0].keys() - lacking:
        torch.testing.assert_close(gradients[0][name], gradients[1][name])
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def is_unused(case: Case, name: str) -> bool:
    """Whether a loss does not depend on a parameter: experts that no token chose."""
    return "experts" in name and case.model_type in {"mixtral", "qwen3_moe"}


@pytest.mark.parametrize("case", CAUSAL, ids=name_of)
def test_generation_with_a_cache_equals_that_without(case: Case) -> None:
    """Greedy tokens are the same with and without cache, also for a batch padded on the left."""
    values = {"is_decoder": True} if case.model_type in {"bert", "roberta"} else {}
    model = case.model(**values)
    ids = case.inputs()["input_ids"]
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = PAD, 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        cached = model.generate(ids, attention_mask=mask, use_cache=True, **options)
        plain = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, plain)
    assert cached.shape[1] >= 6


@pytest.mark.parametrize("case", CAUSAL, ids=name_of)
def test_padding_on_the_left_changes_nothing(case: Case) -> None:
    """The last position answers the same however much padding stands before the row."""
    values = {"is_decoder": True} if case.model_type in {"bert", "roberta"} else {}
    model = case.model(**values)
    ids = case.inputs()["input_ids"]
    padded = torch.nn.functional.pad(ids, (4, 0), value=PAD)
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    inputs = {"input_ids": padded, "attention_mask": mask}
    alone: dict[str, Any] = {"input_ids": ids}
    if case.model_type == "t5":
        inputs["decoder_input_ids"] = alone["decoder_input_ids"] = ids
    else:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if case.model_type == "roberta":  # whose positions start behind the pad token's
            del inputs["position_ids"]
            return_to = model.config.pad_token_id
            inputs["position_ids"] = (mask.cumsum(1) * mask) + return_to
    torch.testing.assert_close(
        run(model, inputs)[:, -1], run(model, alone)[:, -1], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_runs(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    """A model that is loaded in a dtype is in it, answers in it, and nearly the same."""
    model = case.model()
    model.save_pretrained(tmp_path)
    loaded = case.cls.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == loaded.config.dtype == dtype
    inputs = case.inputs()
    typed = {n: v.to(dtype) if v.is_floating_point() else v for n, v in inputs.items()}
    answer = run(loaded, typed)
    assert answer.dtype == dtype
    torch.testing.assert_close(answer.double(), run(model, inputs).double(), atol=0.25, rtol=0.1)


@pytest.mark.parametrize("case", ONE_EACH, ids=name_of)
def test_what_is_missing_gets_the_initial_distribution(case: Case, tmp_path: Path) -> None:
    """A model of a file with nothing in it is a fresh one: the same seed, the same values."""
    model = case.model()
    model.save_pretrained(tmp_path)
    save_file({"nothing": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.manual_seed(3)
    loaded = case.cls.from_pretrained(tmp_path)
    fresh = case.cls(case.config())
    for name, parameter in loaded.named_parameters():
        wanted = fresh.get_parameter(name)
        assert parameter.isfinite().all(), name
        assert abs(parameter.mean() - wanted.mean()) <= 4 * wanted.std(correction=0) + 1e-6, name
        assert (parameter.std(correction=0) == 0) == (wanted.std(correction=0) == 0), name


@pytest.mark.parametrize("case", WITH_LOSS, ids=name_of)
def test_other_labels_give_a_new_head(case: Case, tmp_path: Path) -> None:
    """A head with other labels is refused, and given new values where that is asked for."""
    model = case.model()
    model.save_pretrained(tmp_path)
    sized = [n for n, p in model.named_parameters() if p.shape[0] == model.config.num_labels]
    if not sized:
        assert case.head not in {"sequence_classification", "token_classification"}
        return
    with pytest.raises(RuntimeError, match="size mismatch"):
        case.cls.from_pretrained(tmp_path, num_labels=5)
    loaded, info = case.cls.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, _, _ in info["mismatched_keys"]} == set(sized)
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_first_argument_is_the_main_input(case: Case) -> None:
    """`forward` takes its main input first, under the documented name."""
    parameters = list(inspect.signature(case.cls.forward).parameters)
    assert parameters[1] == case.cls.main_input_name


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_body_and_its_heads_load_from_each_other(case: Case, tmp_path: Path) -> None:
    """A head takes its body from the base model's folder, and the base model from the head's."""
    base_class = registry.imported(registry.MODELS["base"][case.model_type])
    model = case.model()
    model.save_pretrained(tmp_path / "head")
    body, info = base_class.from_pretrained(tmp_path / "head", output_loading_info=True)
    state = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    for name, tensor in body.state_dict().items():
        if name not in info["missing_keys"]:
            assert torch.equal(tensor, state.get(prefix + name, state.get(name))), name
    assert all("pooler" in name or "decoder" in name for name in info["missing_keys"])
    body.save_pretrained(tmp_path / "base")
    again, info = case.cls.from_pretrained(tmp_path / "base", output_loading_info=True)
    own = set(dict(again.named_parameters())) - set(again.all_tied_weights_keys)
    inner = {prefix + name for name in body.state_dict()} | set(body.state_dict())
    assert info["missing_keys"] <= own - inner


@pytest.mark.parametrize("case", ONE_EACH, ids=name_of)
def test_the_configuration_comes_back(case: Case, tmp_path: Path) -> None:
    """A configuration that is saved and loaded is the same, key by key, and JSON."""
    config = case.config(num_labels=4)
    config.save_pretrained(tmp_path)
    again = type(config).from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == case.model_type
