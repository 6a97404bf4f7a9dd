"""Mixture of experts: a router picks a few small MLPs for each token.

The experts are modules of their own, because that is how checkpoints name them; a forward visits
only those that some token chose, each once with all its tokens.

Shapes: N tokens of the batch, D hidden size, E experts, X chosen experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ckptd.models.layers import activations


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What a sparse layer consists of, and what its checkpoint calls it.

    `projections` are the names of gate, up and down; `module_name` that of the block in its layer.
    `normalises`: the weights of the chosen experts sum to one. `keeps_float32`: they stay float32
    when they meet the experts' results (Mixtral), instead of taking the dtype of the hidden states.
    `jitter` spreads the inputs by that share, in training.
    """

    num_experts: int
    num_chosen: int
    intermediate_size: int
    normalises: bool
    keeps_float32: bool
    module_name: str
    projections: tuple[str, str, str]
    jitter: float = 0.0


class Expert(nn.Module):
    """A gated MLP whose three projections carry the checkpoint's names."""

    def __init__(self, hidden_size: int, mixture: Mixture, activation: str) -> None:
        super().__init__()
        self._names = mixture.projections
        gate, up, down = self._names
        self.add_module(gate, nn.Linear(hidden_size, mixture.intermediate_size, bias=False))
        self.add_module(up, nn.Linear(hidden_size, mixture.intermediate_size, bias=False))
        self.add_module(down, nn.Linear(mixture.intermediate_size, hidden_size, bias=False))
        self.act_fn = activations.make(activation)

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        """(N, D) to (N, D)."""
        gate, up, down = (getattr(self, name) for name in self._names)
        out_ND: torch.Tensor = down(self.act_fn(gate(x_ND)) * up(x_ND))
        return out_ND


class SparseBlock(nn.Module):
    """Router (`gate`) and `experts`."""

    def __init__(self, hidden_size: int, mixture: Mixture, activation: str) -> None:
        super().__init__()
        self.mixture = mixture
        self.gate = nn.Linear(hidden_size, mixture.num_experts, bias=False)
        self.experts = nn.ModuleList(
            Expert(hidden_size, mixture, activation) for _ in range(mixture.num_experts)
        )

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts' weighted sum (B, T, D) and the router's logits (B * T, E)."""
        if self.training and self.mixture.jitter > 0:
            low, high = 1.0 - self.mixture.jitter, 1.0 + self.mixture.jitter
            x_BTD = x_BTD * torch.empty_like(x_BTD).uniform_(low, high)
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        logits_NE = self.gate(x_ND)
        weights_NX, chosen_NX = self._route(logits_NE)
        return self._mix(x_ND, weights_NX, chosen_NX).view_as(x_BTD), logits_NE

    def _route(self, logits_NE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probabilities_NE = logits_NE.softmax(dim=-1, dtype=torch.float32)
        weights_NX, chosen_NX = probabilities_NE.topk(self.mixture.num_chosen, dim=-1)
        if self.mixture.normalises:
            weights_NX = weights_NX / weights_NX.sum(dim=-1, keepdim=True)
        if not self.mixture.keeps_float32:
            weights_NX = weights_NX.to(logits_NE.dtype)
        return weights_NX, chosen_NX

    def _mix(
        self, x_ND: torch.Tensor, weights_NX: torch.Tensor, chosen_NX: torch.Tensor
    ) -> torch.Tensor:
        order = chosen_NX.flatten().argsort(stable=True)
        counts = torch.bincount(chosen_NX.flatten(), minlength=self.mixture.num_experts)
        # One transfer tells all group sizes; asking expert by expert would wait for each.
        groups = torch.split(x_ND[order // self.mixture.num_chosen], counts.tolist())
        pairs = zip(self.experts, groups, strict=True)
        results = [expert(group) for expert, group in pairs if len(group)]
        if not results:
            return torch.zeros_like(x_ND)
        weighted = torch.cat(results) * weights_NX.flatten()[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        # A token's results are summed at once, in float32 where the weights are, and rounded once.
        out_NXD = weighted[back].view(*chosen_NX.shape, -1)
        return out_NXD.sum(dim=1).to(x_ND.dtype)


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    *,
    num_chosen: int,
    attention_mask_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """How unevenly tokens are spread over experts (Switch Transformer, arXiv:2101.03961, eq. 4-6).

    Scalar float32, `num_chosen` when all experts are used alike, more when some are preferred.
    `router_logits` are (N, E), one a sparse layer; padding by the mask counts for nothing.
    """
    num_layers, num_experts = len(router_logits), router_logits[0].shape[-1]
    logits_LNE = torch.stack([logits.to(router_logits[0].device) for logits in router_logits])
    probabilities_LNE = logits_LNE.softmax(dim=-1)
    chosen_LNX = probabilities_LNE.topk(num_chosen, dim=-1).indices
    chosen_LNE = nn.functional.one_hot(chosen_LNX, num_experts).sum(dim=-2).float()
    weight_N = torch.ones(logits_LNE.shape[1], device=logits_LNE.device)
    if attention_mask_BT is not None:
        weight_N = attention_mask_BT.reshape(-1).to(weight_N)
    total = weight_N.sum() * num_layers
    share_E = (chosen_LNE * weight_N[:, None]).sum(dim=(0, 1)) / total
    probability_E = (probabilities_LNE.float() * weight_N[:, None]).sum(dim=(0, 1)) / total
    return (share_E * probability_E).sum() * num_experts
