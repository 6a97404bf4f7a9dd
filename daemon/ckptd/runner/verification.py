"""Looking at the output before it is published: does it load, is it finite, does it run?

Blocking; loads the model with the model layer, which is imported on use. The source is loaded only
to be compared with, after the output was let go, so that two models are never in memory at once.
An architecture without a native module runs in transformers where the optional extra
`ckptd[transformers]` is installed; its own code only, never the checkpoint's.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptd.errors import CheckFailed
from ckptd.plan.draft import StageReport, Verification
from ckptd.quant import configuration
from ckptd.runner import memory
from ckptd.runner.evaluator import DeviceFailed

_NUM_TOKENS = 16
_LISTED = 5
_INPUTS = frozenset({"input_ids", "pixel_values"})
"""What a forward can be given here; models of sound and of other things are loaded alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found: `problems` is empty where all is well."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def card_section(self) -> str:
        """What the model card says of it, in Markdown."""
        lines = ["## Verified before publication", "", f"ckptd: {self.report.summary}."]
        compared = self.facts.get("difference")
        if compared is not None:
            lines.append(
                f"Largest difference to the source's logits: {compared['largest']:.3g} "
                f"(largest logit {compared['largest_logit']:.3g})."
            )
        if "generated" in self.facts:
            tokens = " ".join(map(str, self.facts["generated"]))
            lines.append(f"Greedy continuation, prompt included, as token ids: {tokens}")
        return "\n".join(lines)

    @property
    def report(self) -> StageReport:
        """The verdict as the report of the stage."""
        summary = "; ".join(self.problems) or "loads and is finite" + (
            ", runs" if "logits" in self.facts else ""
        )
        return StageReport(
            stage="verify",
            summary=summary,
            facts=self.facts,
            warnings=(*self.problems, *self.notes),
        )


def verify(
    folder: Path,
    wanted: Verification,
    *,
    source_path: Path,
    device: str,
    check: Callable[[], None] = lambda: None,
) -> Verdict:
    """Return what was found in the finished output in `folder`.

    `source_path` is the checkpoint that the output was made from; `device` is where the model is
    loaded; `check` is called between steps and may raise to stop.

    Raises:
        CheckFailed: something is wrong and the definition says `on_failure: fail`.
        DeviceFailed: the device is too small or lost, and `device` names it.
    """
    torch: Any = importlib.import_module("torch")
    chosen = importlib.import_module("ckptd.plan.evaluate").choose_device(device)
    try:
        found = _look(folder, wanted, source_path, chosen, check)
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        why = str(error).partition("\n")[0]
        if device != "auto":
            raise DeviceFailed(chosen, why) from error
    else:
        return _judged(found, wanted)
    torch.cuda.empty_cache()
    found = _look(folder, wanted, source_path, "cpu", check)
    found.notes.append(f"verified on the CPU, {chosen} was given up: {why}")
    return _judged(found, wanted)


def _look(
    folder: Path, wanted: Verification, source_path: Path, device: str, check: Callable[[], None]
) -> _Findings:
    """Return what is found in the output with everything on `device`."""
    torch: Any = importlib.import_module("torch")
    found = _Findings()
    with torch.inference_mode():
        logits, ids = _examine(folder, wanted, device, found, check)
        if wanted.compare and logits is not None and not found.problems:
            check()
            try:
                source = _source_logits(source_path, ids, device, found.dtype)
            except (OSError, RuntimeError, ValueError) as error:
                _raise_if_of_the_node(error)
                found.problems.append(f"it cannot be compared, the source does not load: {error}")
            else:
                _compare(logits, source, wanted.tolerance, found)
    return found


def _raise_if_of_the_node(error: Exception) -> None:
    """Raise `error` again where it says nothing about the model: memory, or the device."""
    torch: Any = importlib.import_module("torch")
    if memory.is_exhaustion(error) or isinstance(
        error, torch.OutOfMemoryError | torch.AcceleratorError
    ):
        raise error


def _judged(found: _Findings, wanted: Verification) -> Verdict:
    verdict = Verdict(
        problems=tuple(found.problems), notes=tuple(found.notes), facts=dict(found.facts)
    )
    if verdict.problems and wanted.on_failure == "fail":
        raise CheckFailed(
            "; ".join(verdict.problems),
            check="verify",
            hint="look at the output with -o, or set on_failure: hold_push to keep it unpublished",
        )
    return verdict


@dataclass(slots=True)
class _Findings:
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    dtype: Any = None
    """What the output was run in."""


def _examine(
    folder: Path, wanted: Verification, device: str, found: _Findings, check: Callable[[], None]
) -> tuple[Any, Any]:
    """Load and run the output; return its logits on the host, where it has any, and the tokens."""
    try:
        model, info = _load(folder, device)
    except (OSError, RuntimeError, ValueError) as error:
        _raise_if_of_the_node(error)
        found.problems.append(f"it does not load: {error}")
        return None, None
    check()
    found.facts["parameters"] = model.num_parameters()
    found.dtype = model.dtype
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in info[kind])
        if names:
            found.problems.append(f"{kind.replace('_', ' ')}: {_some(names)}")
    _check_finite(model, found)
    if not wanted.forward or found.problems:
        return None, None
    if _is_backed(model):
        model = _elsewhere(folder, model, device, found)
        if model is None:
            return None, None
    if model.main_input_name not in _INPUTS:
        found.notes.append(f"not run: it takes {model.main_input_name}, which nobody makes here")
        return None, None
    ids = _tokens(model, wanted, device)
    try:
        logits = _run(model, ids)
    except (RuntimeError, ValueError) as error:
        _raise_if_of_the_node(error)
        found.problems.append(f"a forward fails: {error}")
        return None, None
    found.facts["logits"] = {"shape": list(logits.shape)}
    if not bool(logits.isfinite().all()):
        found.problems.append("a forward gives values that are not finite")
    check()
    if wanted.generate and model.can_generate() and not found.problems:
        made = model.generate(ids, max_new_tokens=wanted.generate, do_sample=False)
        found.facts["generated"] = made[0].tolist()
    return logits, ids


def _run(model: Any, ids: Any) -> Any:
    """Return the first output of a forward, on the host and in float32."""
    output = model(**{model.main_input_name: ids, **_decoder_input(model, ids)})
    return output[0].float().cpu()


def _elsewhere(path: Path, backed: Any, device: str, found: _Findings) -> Any:
    """Return the checkpoint in transformers, where that is installed and knows its class."""
    name = (getattr(backed.config, "architectures", None) or [backed.config.model_type])[0]
    cls = None
    if importlib.util.find_spec("transformers") is not None:
        cls = getattr(importlib.import_module("transformers"), str(name), None)
    if cls is None:
        note = f"not run: {name} has no forward here; ckptd[transformers] may know it"
        found.notes.append(note)
        return None
    found.facts["forward"] = "transformers"
    if backed.dequantized_from is None:
        return cls.from_pretrained(path, trust_remote_code=False).to(device).eval()
    # transformers would want the library that quantized it, and is wrong for several.
    config = cls.config_class.from_dict(backed.config.to_diff_dict())
    state = backed.state_dict()
    return cls.from_pretrained(None, config=config, state_dict=state).to(device).eval()


def _load(folder: Path, device: str, *, decoded_to: Any = None) -> tuple[Any, Any]:
    """Return the model of the class that config.json names, and the loading report.

    `decoded_to` is the dtype of a quantized checkpoint's model; plain ones have one of their own.
    """
    auto: Any = importlib.import_module("ckptd.models.auto")
    registry: Any = importlib.import_module("ckptd.models.registry")
    config = auto.AutoConfig.from_pretrained(folder)
    dtype = decoded_to if configuration.declared(config.to_dict()) else None
    names = getattr(config, "architectures", None) or [""]
    cls = registry.find_class(names[0]) or auto.AutoModel
    loaded: tuple[Any, Any] = cls.from_pretrained(
        folder, output_loading_info=True, device=device, dtype=dtype
    )
    return loaded


def _is_backed(model: Any) -> bool:
    """Whether the model has no forward of its own."""
    return isinstance(model, importlib.import_module("ckptd.models.backed").BackedModel)


def _source_logits(path: Path, ids: Any, device: str, dtype: Any) -> Any:
    """Return what the source computes; a quantized one in the dtype that the output has."""
    model, _ = _load(path, device, decoded_to=dtype)
    if _is_backed(model):
        model = _elsewhere(path, model, device, _Findings())
    return _run(model, ids)


def _compare(logits: Any, source: Any, tolerance: float, found: _Findings) -> None:
    """Note how far the logits are from the source's, on the vocabulary that both have."""
    width = min(logits.shape[-1], source.shape[-1])
    ours, theirs = logits[..., :width], source[..., :width]
    difference = float((ours - theirs).abs().max())
    largest = float(theirs.abs().max())
    found.facts["difference"] = {"largest": difference, "largest_logit": largest}
    if difference > tolerance * max(largest, 1e-30):
        found.problems.append(
            f"logits differ from the source's by {difference:.3g} where the largest is "
            f"{largest:.3g} (tolerance {tolerance:g} of it)"
        )


def _check_finite(model: Any, found: _Findings) -> None:
    bad = [
        name
        for name, value in model.named_parameters()
        if value.is_floating_point() and not bool(value.float().isfinite().all())
    ]
    if bad:
        found.problems.append(f"values that are not finite in {_some(bad)}")


def _tokens(model: Any, wanted: Verification, device: str) -> Any:
    """Return the input to run: the tokens asked for, else a fixed sequence, or a grey picture."""
    torch: Any = importlib.import_module("torch")
    config = model.config
    if model.main_input_name == "pixel_values":
        shape = (1, config.num_channels, config.image_size, config.image_size)
        return torch.full(shape, 0.5, dtype=model.dtype, device=device)
    size = int(config.get_text_config().vocab_size)
    tokens = wanted.tokens or tuple((7 * n + 1) % size for n in range(_NUM_TOKENS))
    return torch.tensor([[token % size for token in tokens]], device=device)


def _decoder_input(model: Any, ids: Any) -> dict[str, Any]:
    if getattr(model.config, "is_encoder_decoder", False):
        return {"decoder_input_ids": ids}
    return {}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
