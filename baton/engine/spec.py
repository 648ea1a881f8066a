"""What a model is, as plain values. Knows no tensors, no files and no devices; config_json.py makes these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """How Llama 3.1 stretches rotary frequencies beyond `original_positions`; formula in rotary.py."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """How YaRN (https://arxiv.org/abs/2309.00071) stretches rotary frequencies; formula in rotary.py.

    attention_factor multiplies cos and sin. truncate: correction range in whole dimensions.
    """

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by a factor."""

    factor: float


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding. interleaved: a pair is two neighbours (2i, 2i + 1) rather than (i, i + D / 2)."""

    theta: float
    scaling: Llama3Scaling | YarnScaling | LinearScaling | None = None
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class MlaSpec:
    """Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434): what is cached is one latent and one rotated key.

    query_rank: width of the compressed query, None if queries are projected at once. latent: width of the compressed keys and
    values (kv_lora_rank). nope, rope: widths of a head's unrotated and rotated part. value: width of a head's value.
    """

    query_rank: int | None
    latent: int
    nope: int
    rope: int
    value: int
    norm_eps: float = 1e-6


@dataclass(frozen=True, slots=True)
class GateSpec:
    """How a token's experts are chosen and weighed.

    Scores are softmax or sigmoid of the router's logits in float32. Choice goes by score + bias (if `biased`), within the best
    `top_groups` of `num_groups` equal runs of experts; a group counts by the sum of its two best ("top2") or its best ("max").
    Weights are the chosen scores without bias, divided by their sum if `normalize`, times `scale`.
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = False
    scale: float = 1.0
    biased: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """The routed experts of a model. sparse_layers[i]: whether layer i has experts in the place of a dense MLP.

    intermediate: of one expert. shared_intermediate: of the MLP beside them that every token visits; 0: none.
    """

    num_experts: int
    intermediate: int
    gate: GateSpec
    sparse_layers: tuple[bool, ...]
    shared_intermediate: int = 0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer with grouped-query or latent attention and gated MLPs.

    model_type: a name of config_json.ARCHITECTURES. hidden, intermediate, head_dim: widths. heads: query heads.
    dtype: of activations and KV cache, by its torch name; of weights too, unless they are quantized. quantization: "w8a8" (int8
    weights per channel, int8 activations per token) or None. For latent attention kv_heads and head_dim describe what is
    cached: one head of latent + rope. softmax_scale: what scores are multiplied by; for latent attention over nope + rope widths.

    qkv_bias, output_bias, mlp_bias: whether these projections have one; with latent attention qkv_bias means q_a_proj and
    kv_a_proj_with_mqa only (never q_proj, q_b_proj, kv_b_proj), output_bias o_proj. num_mtp_layers: layers of multi-token
    prediction that the checkpoint may hold as model.layers.{num_layers} and up; they are no part of the model.
    """

    model_type: str
    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rope: RopeSpec
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    dtype: str
    moe: MoeSpec | None = None
    mla: MlaSpec | None = None
    softmax_scale: float = 0.0
    quantization: Literal["w8a8"] | None = None
    num_mtp_layers: int = 0

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def part_dims(self) -> tuple[int, ...]:
        """Widths of what is cached per token and KV head: key and value, or latent beside rotated key as one."""
        return (self.head_dim,) if self.mla else (self.head_dim, self.head_dim)

    @property
    def rope_dim(self) -> int:
        """Width of the rotated part of a head."""
        return self.mla.rope if self.mla else self.head_dim

    def sparse(self, layer: int) -> bool:
        """Whether this layer has experts."""
        return self.moe is not None and self.moe.sparse_layers[layer]
