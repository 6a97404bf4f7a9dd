"""What the documented page promises to people who define models of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import nn

from ckptd.models import backed
from ckptd.models.base import PreTrainedModel
from ckptd.models.checkpointing import GradientCheckpointingLayer
from ckptd.models.config.config import PreTrainedConfig
from ckptd.models.layers import attention
from ckptd.models.native import llama


class PageConfig(PreTrainedConfig):
    model_type = "page"


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.other = nn.Linear(2, 2)


class Page(PreTrainedModel):
    """A rule for a module's own parameters that reaches into the modules below it."""

    config: PageConfig

    def __init__(self, config: PageConfig, *, has_head: bool = False) -> None:
        super().__init__(config)
        self.cell = Cell()
        if has_head:
            self.head = nn.Linear(2, 2)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Cell):
            nn.init.constant_(module.inner.weight, 5.0)
            module.other.weight.data.fill_(6.0)
            with torch.no_grad():
                module.other.bias[0] = 7.0
        elif isinstance(module, PreTrainedModel) and hasattr(module, "head"):
            module.head.bias.data.fill_(8.0)
            module.cell.inner.bias.data *= 9.0


class PageWithHead(Page):
    def __init__(self, config: PageConfig) -> None:
        super().__init__(config, has_head=True)


def test_the_annotation_of_config_names_the_class(tmp_path: Path) -> None:
    """A class that only annotates `config` has a `config_class`, and so have those below it."""
    Page(PageConfig()).save_pretrained(tmp_path)
    assert Page.config_class is PageWithHead.config_class is PageConfig
    assert type(Page.from_pretrained(tmp_path).config) is PageConfig


def test_a_rule_that_reaches_below_leaves_loaded_values_alone(tmp_path: Path) -> None:
    """Initialising what is missing never writes into what was loaded, however the rule writes."""
    made = Page(PageConfig())
    assert made.cell.inner.weight.unique().tolist() == [5.0]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(1.5)
    made.save_pretrained(tmp_path)
    loaded, info = PageWithHead.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"head.weight", "head.bias"}
    assert loaded.head.bias.tolist() == [8.0, 8.0]
    for parameter in loaded.cell.parameters():
        assert parameter.unique().tolist() == [1.5]


class Step(GradientCheckpointingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 2)

    def forward(self, hidden: torch.Tensor, *, context: torch.Tensor) -> Any:
        return torch.tanh(self.lin(hidden)) + context


class Steps(PreTrainedModel):
    """Layers that all read one tensor by name, which itself comes from a layer."""

    config_class = PageConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: PageConfig) -> None:
        super().__init__(config)
        self.first = nn.Linear(2, 2)
        self.steps = nn.ModuleList(Step() for _ in range(2))
        self.post_init()

    def forward(self, hidden: torch.Tensor) -> Any:
        context = self.first(hidden)
        for step in self.steps:
            hidden = step(hidden, context=context)
        return hidden


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_reach_what_a_layer_reads_by_name(use_reentrant: bool) -> None:
    """Checkpointed layers that share a tensor by name give the gradients of plain ones."""
    torch.manual_seed(0)
    model = Steps(PageConfig()).train()
    hidden = torch.randn(3, 2, requires_grad=True)
    model(hidden).sum().backward()
    expected = [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(hidden).sum().backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    torch.testing.assert_close(found, expected)


def test_an_attention_choice_for_a_part_that_is_not_there_is_skipped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A dict may name parts that this model has not; the log says so."""
    model = Page(PageConfig())
    model.set_attn_implementation({"vision_config": "eager", "": "eager"})
    assert model.config._attn_implementation == "eager"
    assert "vision_config" in caplog.text


def test_a_decoder_that_was_set_is_found() -> None:
    """`set_decoder` mirrors `get_decoder` where the decoder is the whole model below a head."""
    config = llama.LlamaConfig(**SMALL)
    whole, decoder = llama.LlamaForCausalLM(config), llama.LlamaModel(config)
    whole.set_decoder(decoder)
    assert whole.get_decoder() is whole.model is decoder
    decoder.set_decoder(whole)
    assert decoder.get_decoder() is decoder


def test_a_row_that_sees_nothing_is_finite_in_double_precision() -> None:
    """The lowest number of float64 is none of float32's: eager attention stays in float64."""
    query = torch.randn(1, 1, 2, 4, dtype=torch.float64)
    mask = torch.full((1, 1, 2, 2), torch.finfo(torch.float64).min, dtype=torch.float64)
    out, weights = attention.attend("eager", query, query, query, mask, scale=0.5)
    assert weights is not None
    assert weights.dtype == torch.float64
    torch.testing.assert_close(out, query.mean(2, keepdim=True).expand_as(out))


class WholeConfig(PreTrainedConfig):
    model_type = "page-whole"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": llama.LlamaConfig}


class Whole(PreTrainedModel):
    """A model of a user around a native one, which itself has no attention."""

    config_class = WholeConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.text = llama.LlamaModel(config.text_config)
        self.post_init()


SMALL: dict[str, Any] = {
    "vocab_size": 9,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_every_part_attends_as_its_own_model_can() -> None:
    """A part is held to what its model supports, named ones only are changed, errors change none."""
    model = Whole(WholeConfig(text_config=llama.LlamaConfig(**SMALL)))
    model.set_attn_implementation("eager")
    model.set_attn_implementation({"text_config": "sdpa"})
    assert model.text.config._attn_implementation == "sdpa"
    model.set_attn_implementation({"text_config": "sdpa", "": "eager"})
    found = (model.config._attn_implementation, model.text.config._attn_implementation)
    assert found == ("eager", "sdpa")
    with pytest.raises(ValueError, match="Whole does not support"):
        model.set_attn_implementation({"text_config": "eager", "": "sdpa"})
    assert model.text.config._attn_implementation == "sdpa"


def test_the_base_class_loads_every_architecture(tmp_path: Path) -> None:
    """`PreTrainedModel.from_pretrained` gives the class config.json names, or a backed model."""
    llama.LlamaForCausalLM(llama.LlamaConfig(**SMALL)).save_pretrained(tmp_path / "native")
    native, info = PreTrainedModel.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert type(native) is llama.LlamaForCausalLM
    assert not any(info.values())
    transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=9,
            hidden_size=8,
            word_embed_proj_dim=8,
            ffn_dim=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=9,
        )
    ).save_pretrained(tmp_path / "other")
    other = PreTrainedModel.from_pretrained(tmp_path / "other", dtype=torch.bfloat16)
    assert isinstance(other, backed.BackedModel)
    assert other.dtype is torch.bfloat16
    with pytest.raises(ValueError, match="name of a folder"):
        PreTrainedModel.from_pretrained(None)


@pytest.mark.parametrize("num_items", [None, 7])
def test_labels_that_are_shifted_already_are_taken_as_they_are(num_items: int | None) -> None:
    """`shift_labels` gives transformers' loss, whatever the labels are."""
    values = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    values |= {"num_attention_heads": 2}
    original = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()
    model = llama.LlamaForCausalLM(llama.LlamaConfig(**values)).eval()
    model.load_state_dict(original.state_dict())
    ids = torch.arange(12).reshape(2, 6)
    given = {"input_ids": ids, "labels": ids, "shift_labels": (ids * 5 + 3) % 31}
    if num_items is not None:
        given["num_items_in_batch"] = torch.tensor(num_items)
    torch.testing.assert_close(model(**given).loss, original(**given).loss)
