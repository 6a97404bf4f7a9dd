"""Outputs are mapping, object and sequence at once."""

from __future__ import annotations

import dataclasses
import inspect
import pickle

import pytest
import torch
import transformers.modeling_outputs as theirs
from torch.utils import _pytree as pytree

from ckptd.models.layers import outputs
from ckptd.models.layers.outputs import CausalLMOutputWithPast, ModelOutput

CLASSES = [
    value
    for _, value in inspect.getmembers(outputs, inspect.isclass)
    if issubclass(value, ModelOutput) and value is not ModelOutput
]


def _output() -> CausalLMOutputWithPast:
    return CausalLMOutputWithPast(logits=torch.ones(2), hidden_states=(torch.zeros(1),))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_fields_are_those_of_transformers(kind: type[ModelOutput]) -> None:
    """Each class has transformers' fields in transformers' order (the cache by its 5.0 name)."""
    original = [field.name for field in dataclasses.fields(getattr(theirs, kind.__name__))]
    expected = ["past_key_values" if name == "cache" else name for name in original]
    assert [field.name for field in dataclasses.fields(kind)] == expected


def test_three_ways_of_access() -> None:
    """Name, attribute and position give the same object; None fields are no items."""
    output = _output()
    assert output["logits"] is output.logits
    assert output.logits is output[0]
    assert list(output) == ["logits", "hidden_states"]
    assert len(output[:2]) == 2
    assert output.loss is None
    assert "loss" not in output
    with pytest.raises(KeyError):
        output["loss"]


def test_assignment_by_either_way() -> None:
    """Setting an attribute or an item sets both; setting None takes the item away."""
    output = _output()
    output.loss = torch.tensor(1.0)
    output["attentions"] = ()
    assert output["loss"] is output.loss
    assert output.attentions == ()
    output.loss = None
    assert "loss" not in output


def test_fields_are_fixed() -> None:
    """What would add or remove fields is refused."""
    output = _output()
    for change in (
        lambda: output.pop("logits"),
        lambda: output.update(a=1),
        lambda: output.setdefault("a", 1),
        lambda: output.__delitem__("logits"),
    ):
        with pytest.raises(TypeError):
            change()


def test_a_mapping_fills_the_fields() -> None:
    """A mapping as the only argument is read by name, as accelerate rebuilds outputs."""
    copy = CausalLMOutputWithPast(dict(_output()))  # type: ignore[arg-type]
    assert list(copy) == ["logits", "hidden_states"]
    assert copy.loss is None


def test_trees_and_pickles() -> None:
    """Outputs are trees of tensors for torch, and survive pickling."""
    leaves, shape = pytree.tree_flatten(_output())
    assert len(leaves) == 2
    again = pytree.tree_unflatten([leaf + 1 for leaf in leaves], shape)
    assert isinstance(again, CausalLMOutputWithPast)
    assert torch.equal(again.logits, torch.full((2,), 2.0))
    assert list(pickle.loads(pickle.dumps(again))) == list(again)
