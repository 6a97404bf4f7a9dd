"""The training run of `ckptd demo`: a small Llama language model, trained for real, in this process.

It learns the source text of ckptd itself, byte by byte, and saves checkpoints exactly in the order
in which the Hugging Face Trainer does: config, weights under a temporary name and renamed,
tokenizer, optimizer, scheduler, random state, `trainer_state.json` last; then it deletes the
checkpoint before. Any reader of Llama checkpoints loads the result. Run as a script with the output
folder as its argument.

Shapes: B batch, T time, D hidden, H heads, K head size, V vocabulary, F feed-forward.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

torch: Any = importlib.import_module("torch")
F: Any = importlib.import_module("torch.nn.functional")
save_file: Any = importlib.import_module("safetensors.torch").save_file

NUM_CHECKPOINTS = 3
_STEPS_BETWEEN = 40
_SPECIAL_TOKENS = ("<s>", "</s>", "<pad>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The model's dimensions."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    feed_forward: int = 384
    vocabulary: int = 256 + len(_SPECIAL_TOKENS)
    context: int = 96
    batch: int = 8


SIZES = Sizes()
_LEARNING_RATE = 5e-3
_BETAS = (0.9, 0.95)
_EPSILON = 1e-5
_THETA = 10000.0


def initial_weights(sizes: Sizes) -> dict[str, Any]:
    """Return fresh parameters under the names of a Llama checkpoint; the head is tied."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Any:
        return torch.randn((rows, columns), generator=generator).mul_(0.02).requires_grad_()

    def ones() -> Any:
        return torch.ones(sizes.hidden).requires_grad_()

    weights = {"model.embed_tokens.weight": matrix(sizes.vocabulary, sizes.hidden)}
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weights[f"{prefix}self_attn.{name}.weight"] = matrix(sizes.hidden, sizes.hidden)
        for name in ("gate_proj", "up_proj"):
            weights[f"{prefix}mlp.{name}.weight"] = matrix(sizes.feed_forward, sizes.hidden)
        weights[f"{prefix}mlp.down_proj.weight"] = matrix(sizes.hidden, sizes.feed_forward)
        weights[f"{prefix}input_layernorm.weight"] = ones()
        weights[f"{prefix}post_attention_layernorm.weight"] = ones()
    weights["model.norm.weight"] = ones()
    return weights


def logits(weights: dict[str, Any], tokens_BT: Any, sizes: Sizes) -> Any:
    """Return the next-token logits (B, T, V) of a Llama with these weights."""
    x_BTD = weights["model.embed_tokens.weight"][tokens_BT]
    rotation = _rotation(tokens_BT.shape[1], sizes.hidden // sizes.heads)
    for layer in range(sizes.layers):
        prefix = f"model.layers.{layer}."
        normed = _norm(x_BTD, weights[f"{prefix}input_layernorm.weight"])
        x_BTD = x_BTD + _attention(weights, prefix + "self_attn.", normed, rotation, sizes)
        normed = _norm(x_BTD, weights[f"{prefix}post_attention_layernorm.weight"])
        gate = F.silu(normed @ weights[f"{prefix}mlp.gate_proj.weight"].T)
        up = normed @ weights[f"{prefix}mlp.up_proj.weight"].T
        x_BTD = x_BTD + (gate * up) @ weights[f"{prefix}mlp.down_proj.weight"].T
    return _norm(x_BTD, weights["model.norm.weight"]) @ weights["model.embed_tokens.weight"].T


def _norm(x_BTD: Any, scale_D: Any) -> Any:
    return x_BTD * torch.rsqrt(x_BTD.pow(2).mean(-1, keepdim=True) + _EPSILON) * scale_D


def _rotation(length: int, head_size: int) -> tuple[Any, Any]:
    frequencies = _THETA ** (-torch.arange(0, head_size, 2) / head_size)
    angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _attention(
    weights: dict[str, Any], prefix: str, x_BTD: Any, rotation: tuple[Any, Any], sizes: Sizes
) -> Any:
    batch, length, hidden = x_BTD.shape

    def project(name: str) -> Any:
        y_BTD = x_BTD @ weights[f"{prefix}{name}.weight"].T
        return y_BTD.view(batch, length, sizes.heads, -1).transpose(1, 2)

    q, k, v = (project(name) for name in ("q_proj", "k_proj", "v_proj"))
    mixed = F.scaled_dot_product_attention(
        _rotated(q, rotation), _rotated(k, rotation), v, is_causal=True
    )
    return (
        mixed.transpose(1, 2).reshape(batch, length, hidden) @ weights[f"{prefix}o_proj.weight"].T
    )


def _rotated(x_BHTK: Any, rotation: tuple[Any, Any]) -> Any:
    cos, sin = rotation
    first, second = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos + torch.cat((-second, first), dim=-1) * sin


def train(run_path: Path) -> None:
    """Train, leaving the last checkpoint of `NUM_CHECKPOINTS` in `run_path`."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sources = sorted(Path(__file__).parent.parent.rglob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in sources)), dtype=torch.uint8)
    weights = initial_weights(SIZES)
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
    history: list[dict[str, Any]] = []
    for step in range(1, NUM_CHECKPOINTS * _STEPS_BETWEEN + 1):
        starts = torch.randint(len(text) - SIZES.context - 1, (SIZES.batch,))
        batch = torch.stack([text[s : s + SIZES.context + 1] for s in starts.tolist()]).long()
        predicted = logits(weights, batch[:, :-1], SIZES)
        loss = F.cross_entropy(predicted.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        _update(weights, moments, step)
        history.append({"step": step, "loss": round(loss.item(), 4)})
        if step % _STEPS_BETWEEN == 0:
            save(run_path, step, weights, moments, history)
            print(json.dumps(history[-1]), flush=True)  # noqa: T201 (the demo reads this)


def _update(weights: dict[str, Any], moments: dict[str, tuple[Any, Any]], step: int) -> None:
    """One step of Adam (Kingma and Ba 2015); torch.optim would take seconds to import."""
    with torch.no_grad():
        for name, weight in weights.items():
            mean, square = moments[name]
            mean.lerp_(weight.grad, 1 - _BETAS[0])
            square.lerp_(weight.grad.square(), 1 - _BETAS[1])
            size = _LEARNING_RATE / (1 - _BETAS[0] ** step)
            scale = (square / (1 - _BETAS[1] ** step)).sqrt_().add_(1e-8)
            weight.addcdiv_(mean, scale, value=-size)
            weight.grad = None


def save(
    run_path: Path,
    step: int,
    weights: dict[str, Any],
    moments: dict[str, tuple[Any, Any]],
    history: list[dict[str, Any]],
) -> None:
    """Write `checkpoint-<step>` and then delete the ones before, as save_total_limit=1 does."""
    folder = run_path / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    _write_json(folder / "config.json", _config())
    _write_json(folder / "generation_config.json", {"bos_token_id": 256, "eos_token_id": 257})
    tensors = {name: value.detach().to(torch.bfloat16) for name, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "tokenizer.json", _tokenizer())
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
        },
    )
    torch.save({"output_dir": str(run_path)}, folder / "training_args.bin")
    torch.save(moments, folder / "optimizer.pt")
    torch.save({"last_epoch": step}, folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    _write_json(folder / "trainer_state.json", {"global_step": step, "log_history": history})
    for old in run_path.glob("checkpoint-*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def _config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": SIZES.hidden,
        "intermediate_size": SIZES.feed_forward,
        "num_hidden_layers": SIZES.layers,
        "num_attention_heads": SIZES.heads,
        "num_key_value_heads": SIZES.heads,
        "max_position_embeddings": SIZES.context,
        "rms_norm_eps": _EPSILON,
        "rope_theta": _THETA,
        "hidden_act": "silu",
        "vocab_size": SIZES.vocabulary,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "dtype": "bfloat16",
    }


def _tokenizer() -> dict[str, Any]:
    """A byte-level tokenizer without merges: token i is byte i.

    Byte-level vocabularies write each byte as a printable character: printable Latin-1 bytes as
    themselves, the others as the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    characters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 256 + i, "content": token, "special": True, **special}
            for i, token in enumerate(_SPECIAL_TOKENS)
        ],
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "vocab": {character: byte for byte, character in enumerate(characters)},
            "merges": [],
        },
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
