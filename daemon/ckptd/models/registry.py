"""Which class runs which architecture: literal tables of names, imported on use.

Owns: model_type -> configuration class, and model_type -> model class for each kind of head, as
`(module, class)` strings, so that naming an architecture costs no import. Does not own: what users
register at run time (auto).
"""

from __future__ import annotations

import importlib
from typing import Any

Entry = tuple[str, str]

_NATIVE = "ckptd.models.native"

CONFIGS: dict[str, Entry] = {
    "bert": (f"{_NATIVE}.bert", "BertConfig"),
    "gemma2": (f"{_NATIVE}.gemma2", "Gemma2Config"),
    "gemma3_text": (f"{_NATIVE}.gemma3", "Gemma3TextConfig"),
    "gpt2": (f"{_NATIVE}.gpt2", "GPT2Config"),
    "gpt_neox": (f"{_NATIVE}.gpt_neox", "GPTNeoXConfig"),
    "granite": (f"{_NATIVE}.granite", "GraniteConfig"),
    "llama": (f"{_NATIVE}.llama", "LlamaConfig"),
    "mistral": (f"{_NATIVE}.mistral", "MistralConfig"),
    "mixtral": (f"{_NATIVE}.mixtral", "MixtralConfig"),
    "olmo2": (f"{_NATIVE}.olmo2", "Olmo2Config"),
    "phi3": (f"{_NATIVE}.phi3", "Phi3Config"),
    "qwen2": (f"{_NATIVE}.qwen2", "Qwen2Config"),
    "qwen3": (f"{_NATIVE}.qwen3", "Qwen3Config"),
    "qwen3_moe": (f"{_NATIVE}.qwen3_moe", "Qwen3MoeConfig"),
    "roberta": (f"{_NATIVE}.roberta", "RobertaConfig"),
    "smollm3": (f"{_NATIVE}.smollm3", "SmolLM3Config"),
    "t5": (f"{_NATIVE}.t5", "T5Config"),
    "vit": (f"{_NATIVE}.vit", "ViTConfig"),
}
"""The configuration class of each architecture that runs here."""

NATIVE_MODEL_TYPES: tuple[str, ...] = tuple(sorted(CONFIGS))
"""The architectures that run here, for messages."""

MODELS: dict[str, dict[str, Entry]] = {
    "base": {
        "bert": (f"{_NATIVE}.bert", "BertModel"),
        "gemma2": (f"{_NATIVE}.gemma2", "Gemma2Model"),
        "gemma3_text": (f"{_NATIVE}.gemma3", "Gemma3TextModel"),
        "gpt2": (f"{_NATIVE}.gpt2", "GPT2Model"),
        "gpt_neox": (f"{_NATIVE}.gpt_neox", "GPTNeoXModel"),
        "granite": (f"{_NATIVE}.granite", "GraniteModel"),
        "llama": (f"{_NATIVE}.llama", "LlamaModel"),
        "mistral": (f"{_NATIVE}.mistral", "MistralModel"),
        "mixtral": (f"{_NATIVE}.mixtral", "MixtralModel"),
        "olmo2": (f"{_NATIVE}.olmo2", "Olmo2Model"),
        "phi3": (f"{_NATIVE}.phi3", "Phi3Model"),
        "qwen2": (f"{_NATIVE}.qwen2", "Qwen2Model"),
        "qwen3": (f"{_NATIVE}.qwen3", "Qwen3Model"),
        "qwen3_moe": (f"{_NATIVE}.qwen3_moe", "Qwen3MoeModel"),
        "roberta": (f"{_NATIVE}.roberta", "RobertaModel"),
        "smollm3": (f"{_NATIVE}.smollm3", "SmolLM3Model"),
        "t5": (f"{_NATIVE}.t5", "T5Model"),
        "vit": (f"{_NATIVE}.vit", "ViTModel"),
    },
    "causal_lm": {
        "bert": (f"{_NATIVE}.bert", "BertLMHeadModel"),
        "gemma2": (f"{_NATIVE}.gemma2", "Gemma2ForCausalLM"),
        "gemma3_text": (f"{_NATIVE}.gemma3", "Gemma3ForCausalLM"),
        "gpt2": (f"{_NATIVE}.gpt2", "GPT2LMHeadModel"),
        "gpt_neox": (f"{_NATIVE}.gpt_neox", "GPTNeoXForCausalLM"),
        "granite": (f"{_NATIVE}.granite", "GraniteForCausalLM"),
        "llama": (f"{_NATIVE}.llama", "LlamaForCausalLM"),
        "mistral": (f"{_NATIVE}.mistral", "MistralForCausalLM"),
        "mixtral": (f"{_NATIVE}.mixtral", "MixtralForCausalLM"),
        "olmo2": (f"{_NATIVE}.olmo2", "Olmo2ForCausalLM"),
        "phi3": (f"{_NATIVE}.phi3", "Phi3ForCausalLM"),
        "qwen2": (f"{_NATIVE}.qwen2", "Qwen2ForCausalLM"),
        "qwen3": (f"{_NATIVE}.qwen3", "Qwen3ForCausalLM"),
        "qwen3_moe": (f"{_NATIVE}.qwen3_moe", "Qwen3MoeForCausalLM"),
        "roberta": (f"{_NATIVE}.roberta", "RobertaForCausalLM"),
        "smollm3": (f"{_NATIVE}.smollm3", "SmolLM3ForCausalLM"),
    },
    "masked_lm": {
        "bert": (f"{_NATIVE}.bert", "BertForMaskedLM"),
        "roberta": (f"{_NATIVE}.roberta", "RobertaForMaskedLM"),
    },
    "seq2seq_lm": {
        "t5": (f"{_NATIVE}.t5", "T5ForConditionalGeneration"),
    },
    "sequence_classification": {
        "bert": (f"{_NATIVE}.bert", "BertForSequenceClassification"),
        "gemma2": (f"{_NATIVE}.gemma2", "Gemma2ForSequenceClassification"),
        "gemma3_text": (f"{_NATIVE}.gemma3", "Gemma3TextForSequenceClassification"),
        "gpt2": (f"{_NATIVE}.gpt2", "GPT2ForSequenceClassification"),
        "gpt_neox": (f"{_NATIVE}.gpt_neox", "GPTNeoXForSequenceClassification"),
        "llama": (f"{_NATIVE}.llama", "LlamaForSequenceClassification"),
        "mistral": (f"{_NATIVE}.mistral", "MistralForSequenceClassification"),
        "mixtral": (f"{_NATIVE}.mixtral", "MixtralForSequenceClassification"),
        "olmo2": (f"{_NATIVE}.olmo2", "Olmo2ForSequenceClassification"),
        "phi3": (f"{_NATIVE}.phi3", "Phi3ForSequenceClassification"),
        "qwen2": (f"{_NATIVE}.qwen2", "Qwen2ForSequenceClassification"),
        "qwen3": (f"{_NATIVE}.qwen3", "Qwen3ForSequenceClassification"),
        "qwen3_moe": (f"{_NATIVE}.qwen3_moe", "Qwen3MoeForSequenceClassification"),
        "roberta": (f"{_NATIVE}.roberta", "RobertaForSequenceClassification"),
        "smollm3": (f"{_NATIVE}.smollm3", "SmolLM3ForSequenceClassification"),
        "t5": (f"{_NATIVE}.t5_heads", "T5ForSequenceClassification"),
    },
    "token_classification": {
        "bert": (f"{_NATIVE}.bert", "BertForTokenClassification"),
        "gemma2": (f"{_NATIVE}.gemma2", "Gemma2ForTokenClassification"),
        "gpt2": (f"{_NATIVE}.gpt2", "GPT2ForTokenClassification"),
        "gpt_neox": (f"{_NATIVE}.gpt_neox", "GPTNeoXForTokenClassification"),
        "llama": (f"{_NATIVE}.llama", "LlamaForTokenClassification"),
        "mistral": (f"{_NATIVE}.mistral", "MistralForTokenClassification"),
        "mixtral": (f"{_NATIVE}.mixtral", "MixtralForTokenClassification"),
        "phi3": (f"{_NATIVE}.phi3", "Phi3ForTokenClassification"),
        "qwen2": (f"{_NATIVE}.qwen2", "Qwen2ForTokenClassification"),
        "qwen3": (f"{_NATIVE}.qwen3", "Qwen3ForTokenClassification"),
        "qwen3_moe": (f"{_NATIVE}.qwen3_moe", "Qwen3MoeForTokenClassification"),
        "roberta": (f"{_NATIVE}.roberta", "RobertaForTokenClassification"),
        "smollm3": (f"{_NATIVE}.smollm3", "SmolLM3ForTokenClassification"),
        "t5": (f"{_NATIVE}.t5_heads", "T5ForTokenClassification"),
    },
    "question_answering": {
        "bert": (f"{_NATIVE}.bert", "BertForQuestionAnswering"),
        "gpt2": (f"{_NATIVE}.gpt2", "GPT2ForQuestionAnswering"),
        "gpt_neox": (f"{_NATIVE}.gpt_neox", "GPTNeoXForQuestionAnswering"),
        "llama": (f"{_NATIVE}.llama", "LlamaForQuestionAnswering"),
        "mistral": (f"{_NATIVE}.mistral", "MistralForQuestionAnswering"),
        "mixtral": (f"{_NATIVE}.mixtral", "MixtralForQuestionAnswering"),
        "qwen2": (f"{_NATIVE}.qwen2", "Qwen2ForQuestionAnswering"),
        "qwen3": (f"{_NATIVE}.qwen3", "Qwen3ForQuestionAnswering"),
        "qwen3_moe": (f"{_NATIVE}.qwen3_moe", "Qwen3MoeForQuestionAnswering"),
        "roberta": (f"{_NATIVE}.roberta", "RobertaForQuestionAnswering"),
        "smollm3": (f"{_NATIVE}.smollm3", "SmolLM3ForQuestionAnswering"),
        "t5": (f"{_NATIVE}.t5_heads", "T5ForQuestionAnswering"),
    },
    "image_classification": {
        "vit": (f"{_NATIVE}.vit", "ViTForImageClassification"),
    },
    "masked_image_modeling": {
        "vit": (f"{_NATIVE}.vit", "ViTForMaskedImageModeling"),
    },
    "multiple_choice": {
        "bert": (f"{_NATIVE}.bert", "BertForMultipleChoice"),
        "roberta": (f"{_NATIVE}.roberta", "RobertaForMultipleChoice"),
    },
    "next_sentence_prediction": {
        "bert": (f"{_NATIVE}.bert", "BertForNextSentencePrediction"),
    },
    "pretraining": {
        "bert": (f"{_NATIVE}.bert", "BertForPreTraining"),
        "gpt2": (f"{_NATIVE}.gpt2", "GPT2LMHeadModel"),
        "roberta": (f"{_NATIVE}.roberta", "RobertaForMaskedLM"),
        "t5": (f"{_NATIVE}.t5", "T5ForConditionalGeneration"),
    },
    "text_encoding": {
        "bert": (f"{_NATIVE}.bert", "BertModel"),
        "roberta": (f"{_NATIVE}.roberta", "RobertaModel"),
        "t5": (f"{_NATIVE}.t5", "T5EncoderModel"),
    },
}
"""The model class of each architecture, by the kind of head."""

AUTO_CLASSES: dict[str, str] = {
    "AutoModel": "base",
    "AutoModelForCausalLM": "causal_lm",
    "AutoModelForImageClassification": "image_classification",
    "AutoModelForMaskedImageModeling": "masked_image_modeling",
    "AutoModelForMaskedLM": "masked_lm",
    "AutoModelForMultipleChoice": "multiple_choice",
    "AutoModelForNextSentencePrediction": "next_sentence_prediction",
    "AutoModelForPreTraining": "pretraining",
    "AutoModelForQuestionAnswering": "question_answering",
    "AutoModelForSeq2SeqLM": "seq2seq_lm",
    "AutoModelForSequenceClassification": "sequence_classification",
    "AutoModelForTextEncoding": "text_encoding",
    "AutoModelForTokenClassification": "token_classification",
}
"""The auto classes of this package, and the kind of head each one gives."""

_OTHER_AUTO_CLASSES = frozenset(
    [
        "AutoBackbone",
        "AutoConfig",
        "AutoFeatureExtractor",
        "AutoImageProcessor",
        "AutoProcessor",
        "AutoTokenizer",
        "AutoVideoProcessor",
    ]
) | {
    f"AutoModelFor{task}"
    for task in [
        "AudioClassification",
        "AudioFrameClassification",
        "AudioTokenization",
        "AudioXVector",
        "CTC",
        "Decision",
        "DepthEstimation",
        "DocumentQuestionAnswering",
        "ImageMatting",
        "ImageSegmentation",
        "ImageTextToText",
        "ImageToImage",
        "InstanceSegmentation",
        "KeypointDetection",
        "KeypointMatching",
        "MaskGeneration",
        "MultimodalLM",
        "NormalEstimation",
        "ObjectDetection",
        "PointmapEstimation",
        "PoseEstimation",
        "RNNT",
        "SemanticSegmentation",
        "SpeechSeq2Seq",
        "TDT",
        "TableQuestionAnswering",
        "TableRecognition",
        "TextRecognition",
        "TextToSpectrogram",
        "TextToWaveform",
        "TimeSeriesPrediction",
        "UniversalSegmentation",
        "VideoClassification",
        "VisualQuestionAnswering",
        "ZeroShotImageClassification",
        "ZeroShotObjectDetection",
    ]
}
"""Names that transformers has beside ours: code may be registered for them, which `auto_map` says."""


def imported(entry: Entry) -> Any:
    """Return the class that an entry names; its module is imported now.

    Raises:
        ImportError: the module is missing, or has no class of that name.
    """
    module_name, class_name = entry
    module = importlib.import_module(module_name)
    if not hasattr(module, class_name):
        raise ImportError(f"{module_name} has no class {class_name}, which the registry names")
    return getattr(module, class_name)


def check_auto_class(auto_class: str | type) -> str:
    """Return the name of an auto class, given by name or as the class.

    Raises:
        ValueError: no auto class has that name.
    """
    name = auto_class if isinstance(auto_class, str) else auto_class.__name__
    if name not in AUTO_CLASSES and name not in _OTHER_AUTO_CLASSES:
        raise ValueError(
            f"{name} is not an auto class; those that load here: AutoConfig, "
            f"{', '.join(AUTO_CLASSES)}"
        )
    return name


def find_class(name: str) -> Any:
    """Return the native class (model or configuration) of that name, or None."""
    tables = (CONFIGS, *MODELS.values())
    entries = (entry for table in tables for entry in table.values())
    found = next((entry for entry in entries if entry[1] == name), None)
    return None if found is None else imported(found)
