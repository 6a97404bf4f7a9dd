"""Every native class with every head, small, and what goes into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

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
    "classifier_dropout": 0.0,
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
        "classifier_dropout": 0.0,
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
