"""The network in training: Qwen3-MoE with the parameter names of transformers and a faster expert layer.

B batch, S sequence, T = B*S tokens, H hidden, N heads, K key/value heads, D head, E experts, I expert width, A chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3MoeConfig

ROPE_THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Shape:
    """The few dials of the network; everything else follows."""

    vocab: int = 4096
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head: int = 64
    experts: int = 8
    chosen: int = 2
    expert_width: int = 128
    context: int = 4096
    eps: float = 1e-6

    def config(self, **tokens: Any) -> Qwen3MoeConfig:
        """The same shape in transformers' words; `tokens` are the special token ids."""
        return Qwen3MoeConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.expert_width * self.chosen,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head,
            num_experts=self.experts,
            num_experts_per_tok=self.chosen,
            moe_intermediate_size=self.expert_width,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            max_position_embeddings=self.context,
            rms_norm_eps=self.eps,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            tie_word_embeddings=True,
            **tokens,
        )


TINY = Shape(vocab=320, hidden=32, layers=2, heads=2, kv_heads=1, head=16, experts=4, expert_width=16)


class Norm(nn.Module):
    """Divides by the root mean square, in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def rotation(length: int, head: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, D] of the rotary embedding."""
    frequencies = ROPE_THETA ** -(torch.arange(0, head, 2).float() / head)
    angles = torch.outer(torch.arange(length).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x_BNSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    left, right = x_BNSD.chunk(2, dim=-1)
    return x_BNSD * cos_SD + torch.cat((-right, left), dim=-1) * sin_SD


class Attention(nn.Module):
    """Causal attention with normalised, rotated queries and keys."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = _linear(shape.hidden, shape.heads * shape.head)
        self.k_proj = _linear(shape.hidden, shape.kv_heads * shape.head)
        self.v_proj = _linear(shape.hidden, shape.kv_heads * shape.head)
        self.o_proj = _linear(shape.heads * shape.head, shape.hidden)
        self.q_norm = Norm(shape.head, shape.eps)
        self.k_norm = Norm(shape.head, shape.eps)

    def forward(self, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        heads = (*x_BSH.shape[:2], -1, self.shape.head)
        q_BNSD = _rotate(self.q_norm(self.q_proj(x_BSH).view(heads)).transpose(1, 2), cos_SD, sin_SD)
        k_BKSD = _rotate(self.k_norm(self.k_proj(x_BSH).view(heads)).transpose(1, 2), cos_SD, sin_SD)
        v_BKSD = self.v_proj(x_BSH).view(heads).transpose(1, 2)
        y_BNSD = F.scaled_dot_product_attention(q_BNSD, k_BKSD, v_BKSD, is_causal=True, enable_gqa=True)
        out: Tensor = self.o_proj(y_BNSD.transpose(1, 2).flatten(2))
        return out


class Router(nn.Module):
    """Chooses experts, in float32 also when the rest is not."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.chosen = shape.chosen
        self.weight = nn.Parameter(torch.empty(shape.experts, shape.hidden))

    def forward(self, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and indices of the chosen experts, and the load-balancing loss (1.0 when even)."""
        with torch.autocast("cpu", enabled=False):
            probs_TE = F.linear(x_TH.float(), self.weight).softmax(-1)
        top_TA, index_TA = probs_TE.topk(self.chosen, dim=-1)
        load_E = torch.bincount(index_TA.flatten(), minlength=probs_TE.shape[1]) / index_TA.numel()
        balance = probs_TE.shape[1] * (load_E * probs_TE.mean(0)).sum()
        return top_TA / top_TA.sum(-1, keepdim=True), index_TA, balance


class Experts(nn.Module):
    """All experts of a layer, stacked as transformers stacks them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(shape.experts, 2 * shape.expert_width, shape.hidden))
        self.down_proj = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.expert_width))

    def forward(self, x_TH: Tensor, weight_TA: Tensor, index_TA: Tensor) -> Tensor:
        """Sorts tokens by expert, so that each expert is one dense product over exactly its tokens."""
        order = index_TA.flatten().argsort(stable=True)
        counts = torch.bincount(index_TA.flatten(), minlength=len(self.gate_up_proj)).tolist()
        sorted_parts = torch.split(x_TH[order // index_TA.shape[1]], counts)
        gate_up = self.gate_up_proj.to(x_TH.dtype).unbind()
        down = self.down_proj.to(x_TH.dtype).unbind()
        outs = [_swiglu(part, *weights) for part, *weights in zip(sorted_parts, gate_up, down, strict=True)]
        y_TAH = torch.cat(outs)[order.argsort()].view(*index_TA.shape, -1)
        return torch.einsum("tah,ta->th", y_TAH, weight_TA.to(y_TAH.dtype))


def _swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


class MixtureOfExperts(nn.Module):
    """Router and experts."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = Router(shape)
        self.experts = Experts(shape)

    def forward(self, x_BSH: Tensor) -> tuple[Tensor, Tensor]:
        x_TH = x_BSH.flatten(0, 1)
        weight_TA, index_TA, balance = self.gate(x_TH)
        return self.experts(x_TH, weight_TA, index_TA).view_as(x_BSH), balance


class Layer(nn.Module):
    """Attention, then experts, each added to the stream."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MixtureOfExperts(shape)
        self.input_layernorm = Norm(shape.hidden, shape.eps)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)

    def forward(self, x_BSH: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> tuple[Tensor, Tensor]:
        x_BSH = x_BSH + self.self_attn(self.input_layernorm(x_BSH), cos_SD, sin_SD)
        y_BSH, balance = self.mlp(self.post_attention_layernorm(x_BSH))
        return x_BSH + y_BSH, balance


class Trunk(nn.Module):
    """Everything but the head."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head = shape.head
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.eps)

    def forward(self, tokens_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos_SD, sin_SD = (table.to(dtype) for table in rotation(tokens_BS.shape[1], self.head))
        x_BSH = self.embed_tokens(tokens_BS).to(dtype)
        balances = []
        for layer in self.layers:
            x_BSH, balance = layer(x_BSH, cos_SD, sin_SD)
            balances.append(balance)
        return self.norm(x_BSH), torch.stack(balances).mean()


class DemoModel(nn.Module):
    """`state_dict()` loads into transformers' Qwen3MoeForCausalLM; the head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                residual = name.endswith(("o_proj.weight", "down_proj"))
                nn.init.normal_(weight, std=0.02 / (2 * shape.layers) ** 0.5 if residual else 0.02)

    def forward(self, tokens_BS: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Logits [B, S, V] and the mean load-balancing loss; matrix products and activations in `dtype`."""
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            x_BSH, balance = self.model(tokens_BS, dtype)
            return F.linear(x_BSH, self.model.embed_tokens.weight), balance
