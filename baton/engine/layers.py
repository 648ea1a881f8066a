"""The layers of a decoder, and the stack of them. Knows no model by name. T: tokens of the step, H: hidden."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from baton.engine.attention import Attention
from baton.engine.devices import LayerCache
from baton.engine.norm import RMSNorm
from baton.engine.projections import ColumnParallel, Part, RowParallel, VocabParallel
from baton.engine.setting import Setting, Step, Wanted
from baton.engine.weights import Piece

# Hidden states [T, H] as two summands: what the last layer gave and what went in, None where nothing did. The norm that comes next
# adds them up, in one pass over memory.
Hidden = tuple[torch.Tensor, torch.Tensor | None]


class Mlp:
    """A gated MLP: of a dense layer, or shared by all tokens beside routed experts. intermediate: None for the dense layers' width."""

    def __init__(self, setting: Setting, intermediate: int | None = None) -> None:
        spec = setting.spec
        width = spec.intermediate if intermediate is None else intermediate
        columns = setting.placement.columns(width)
        parts = [Part(name, columns, width) for name in ("gate_proj", "up_proj")]
        self._gate_up = ColumnParallel(setting, spec.hidden, parts, spec.mlp_bias)
        self._down = RowParallel(setting, columns, width, spec.hidden, spec.mlp_bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] -> [T, H]."""
        return self._down(self._gate_up.gated(x))

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's summand of the result, [T, H], for whoever adds more before it is reduced. Without a bias of down_proj."""
        return self._down.partial(self._gate_up.gated(x))

    def prepare(self) -> None:
        """Once, after loading."""
        self._gate_up.prepare(gated=True)
        self._down.prepare()

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """Everything under `prefix`.mlp."""
        yield from self._gate_up.pieces(prefix)
        yield from self._down.pieces(f"{prefix}.down_proj")


class AttentionLayer(Protocol):
    """The first half of a block: grouped-query or latent attention."""

    def __call__(self, x: torch.Tensor, step: Step, cache: LayerCache, wanted: Wanted | None = None) -> torch.Tensor:
        """x [T, H] -> [T, H], or of the wanted rows [N, H]; the step's part of the cache is written first."""
        ...

    def prepare(self) -> None:
        """Bring weights into the device's form: once, after loading."""
        ...

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """What fills it."""
        ...


class FeedForward(Protocol):
    """The second half of a block: dense or routed."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] -> [T, H]."""
        ...

    def prepare(self) -> None:
        """Bring weights into the device's form: once, after loading."""
        ...

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """What fills it."""
        ...


class Block:
    """One pre-norm decoder layer. attention: grouped-query attention if not given."""

    def __init__(self, setting: Setting, feed_forward: FeedForward, attention: AttentionLayer | None = None) -> None:
        self._attention, self._feed_forward = attention or Attention(setting), feed_forward
        self._before, self._between = RMSNorm(setting, setting.spec.hidden), RMSNorm(setting, setting.spec.hidden)

    def __call__(self, hidden: Hidden, step: Step, cache: LayerCache, wanted: Wanted | None = None) -> Hidden:
        """Hidden states of all rows -> of all, or of the wanted ones."""
        x, residual = self._before.add(*hidden)
        x = self._attention(x, step, cache, wanted)
        x, residual = self._between.add(x, residual if wanted is None else residual[wanted.rows])
        return self._feed_forward(x), residual

    def prepare(self) -> None:
        """Once, after loading."""
        self._attention.prepare()
        self._feed_forward.prepare()

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """Everything of the layer `prefix`."""
        yield from self._before.pieces(f"{prefix}.input_layernorm")
        yield from self._attention.pieces(f"{prefix}.self_attn")
        yield from self._between.pieces(f"{prefix}.post_attention_layernorm")
        yield from self._feed_forward.pieces(f"{prefix}.mlp")


class Decoder:
    """A stack of blocks between an embedding and a head: every model that Baton knows so far."""

    def __init__(self, setting: Setting, blocks: Sequence[Block]) -> None:
        self._blocks = tuple(blocks)
        self._embedding = VocabParallel(setting)
        self._head = self._embedding if setting.spec.tie_embeddings else VocabParallel(setting)
        self._norm = RMSNorm(setting, setting.spec.hidden)
        first = setting.spec.num_layers
        self._beyond = tuple(f"model.layers.{layer}." for layer in range(first, first + setting.spec.num_mtp_layers))

    def __call__(self, step: Step) -> Hidden:
        """The last hidden states of the step's wanted rows [N, H], before the final norm.

        A rank with T = 0 takes part in the collectives of its domain. Of the other rows the last layer only writes keys and values.
        """
        hidden: Hidden = self._embedding.embed(step.token_ids), None
        for block, cache in zip(self._blocks[:-1], step.caches[:-1], strict=True):
            step.between_layers()
            hidden = block(hidden, step, cache)
        step.between_layers()
        return self._blocks[-1](hidden, step, step.caches[-1], step.wanted)

    def logits(self, hidden: Hidden) -> torch.Tensor | None:
        """hidden [N, H] -> [N, vocab] on the leader; None on the others. Uses hidden up."""
        return self._head.logits(self._norm.add(*hidden)[0])

    def prepare(self) -> None:
        """Bring all weights into the device's form, one after the other: once, after loading; nothing can be loaded afterwards."""
        for block in self._blocks:
            block.prepare()
        self._head.prepare(looked_up=self._head is self._embedding)

    def pieces(self) -> Iterator[Piece]:
        """What fills the model, under the names that transformers gives."""
        yield from self._embedding.pieces("model.embed_tokens")
        for layer, block in enumerate(self._blocks):
            yield from block.pieces(f"model.layers.{layer}")
        yield from self._norm.pieces("model.norm")
        if self._head is not self._embedding:
            yield from self._head.pieces("lm_head")

    def spare(self) -> tuple[str, ...]:
        """Checkpoint tensors that may be there and are not needed; a name that ends with a dot means all below it."""
        return (*(("lm_head.weight",) if self._head is self._embedding else ()), *self._beyond)
