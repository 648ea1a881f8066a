"""From logits to tokens: counter-based sampling, the same for a sequence whatever it is batched with.

Knows logits and a batch's sampling arrays; knows neither models nor sequences. Design rule 6:

    u = uniform(seed, output_index); banned ids out; temperature; keep top_k, of these top_p, of these min_p; inverse CDF.

Order of the masks: top_k most likely tokens; of their renormalised distribution the shortest prefix, most likely first,
that reaches top_p; of these the ones at least min_p times as likely as the most likely. Ties at a cut go to the lower id.
The inverse CDF runs in vocabulary order. Sums are kept in fp32 (torch accumulates them in fp64 on cpu) and run along one
row, so no row's result depends on the others. N: sampled rows, V: vocabulary, R: rows that are not greedy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from baton.engine.batch import Batch, Float32, Int64, Sampled, UInt64

UNIFORM_BITS = 24  # as many as an fp32 in [0, 1) holds exactly
# Enough, mostly, to find where top_p cuts; if not, the whole row is sorted.
FIRST_CANDIDATES = 1024
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def argmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Device.argmax, in plain torch."""
    ids = logits.argmax(dim=-1)  # of a NaN, where there is one
    return ids, torch.isfinite(logits.gather(1, ids.unsqueeze(1))).squeeze(1)


def draw(logits: Tensor, top_ids: Tensor, temperatures: Tensor, uniforms: Tensor) -> Tensor:
    """Device.draw, in plain torch."""
    wide = logits.float()
    return _inverse_cdf(torch.softmax(_tempered(wide, top_ids, temperatures), dim=-1), uniforms)


@dataclass(frozen=True, slots=True)
class Picks:
    """How ids are picked from rows of logits: by a device's operations, or by these here."""

    argmax: Callable[[Tensor], tuple[Tensor, Tensor]] = argmax
    draw: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = draw


def sample(logits: Tensor, batch: Batch, picks: Picks = Picks()) -> Sampled:
    """Draw one token per row.

    logits: [N, V], unmodified; left as they are. In fp32, or narrower: then rows are widened if they are cut or their logprobs asked
    for. batch: its N sampling rows. picks: the device's. Returns arrays of length N in host memory.
    A row from which nothing can be drawn is named in failed_rows and disturbs no other.
    """
    num_rows = logits.shape[0]
    assert num_rows == len(batch.seeds)
    logprobs, top_ids, top_logprobs = np.zeros(num_rows, np.float32), *_no_top(num_rows, int(batch.num_logprobs.max(initial=0)))
    if num_rows == 0:
        return Sampled(np.zeros(0, np.int64), logprobs, top_ids, top_logprobs)
    token_ids, failed_rows = _picked(logits, batch, picks)
    asked = np.flatnonzero(batch.num_logprobs >= 0)
    if len(asked):
        rows = torch.from_numpy(asked).to(logits.device)
        everything = torch.log_softmax(_widened(logits, asked), dim=-1)
        logprobs[asked] = everything.gather(1, token_ids[rows].unsqueeze(1)).squeeze(1).cpu().numpy()
        ids, values = _most_likely(everything, top_ids.shape[1])
        top_ids[asked], top_logprobs[asked] = ids.cpu().numpy(), values.cpu().numpy()
    return Sampled(token_ids.cpu().numpy(), logprobs, top_ids, top_logprobs, tuple(failed_rows.tolist()))


def uniform(seeds: UInt64, output_indices: Int64) -> Float32:
    """[N] numbers in [0, 1), multiples of 2**-24: splitmix64(splitmix64(seed) + output_index), its upper 24 bits.

    splitmix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    mixed = _splitmix64(_splitmix64(seeds) + output_indices.astype(np.uint64))
    return (mixed >> np.uint64(64 - UNIFORM_BITS)).astype(np.float32) * np.float32(2.0**-UNIFORM_BITS)


def _splitmix64(state: UInt64) -> UInt64:
    mixed = state + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    return mixed ^ (mixed >> np.uint64(31))


def _no_top(num_rows: int, num_columns: int) -> tuple[Int64, Float32]:
    return np.zeros((num_rows, num_columns), np.int64), np.zeros((num_rows, num_columns), np.float32)


def _picked(logits: Tensor, batch: Batch, picks: Picks) -> tuple[Tensor, Int64]:
    """[N] token ids, and the rows that have none. Greedy rows: the largest logit, the lowest id of equal ones."""
    token_ids, finite = picks.argmax(logits)
    limited = np.diff(batch.banned_starts) > 0
    if limited.any():
        rows = torch.from_numpy(np.flatnonzero(limited)).to(logits.device)
        token_ids[rows], finite[rows] = picks.argmax(_allowed(logits, batch, np.flatnonzero(limited)))
    drawable = finite.cpu().numpy()
    hot = drawable & (batch.temperatures > 0)
    cut = limited | _is_cut(batch, logits.shape[1])
    for chosen, pick in ((np.flatnonzero(hot & ~cut), _drawn), (np.flatnonzero(hot & cut), _drawn_of_some)):
        if len(chosen):
            rows = torch.from_numpy(chosen).to(logits.device)
            token_ids[rows] = pick(logits, batch, chosen, token_ids[rows], picks)
    return token_ids, np.flatnonzero(~drawable)


def _is_cut(batch: Batch, vocab: int) -> NDArray[np.bool_]:
    """[N] whether a row draws from some of its ids only, apart from those that are banned."""
    return ((batch.top_ks > 0) & (batch.top_ks < vocab)) | (batch.top_ps < 1) | (batch.min_ps > 0)


def _drawn(logits: Tensor, batch: Batch, hot: Int64, top_ids: Tensor, picks: Picks) -> Tensor:
    """[R] ids, out of all."""
    rows = logits if len(hot) == len(logits) else logits[torch.from_numpy(hot).to(logits.device)]
    return picks.draw(rows, top_ids, _temperatures(logits, batch, hot), _uniforms(logits, batch, hot))


def _drawn_of_some(logits: Tensor, batch: Batch, hot: Int64, top_ids: Tensor, picks: Picks) -> Tensor:
    """[R] ids, out of those that are neither banned nor cut off."""
    probs = torch.softmax(_tempered(_allowed(logits, batch, hot), top_ids, _temperatures(logits, batch, hot)), dim=-1)
    return _inverse_cdf(_kept_weights(probs, batch, hot), _uniforms(logits, batch, hot))


def _temperatures(logits: Tensor, batch: Batch, hot: Int64) -> Tensor:
    return torch.from_numpy(batch.temperatures[hot]).to(logits.device)


def _uniforms(logits: Tensor, batch: Batch, hot: Int64) -> Tensor:
    return torch.from_numpy(uniform(batch.seeds[hot], batch.output_indices[hot])).to(logits.device)


def _allowed(logits: Tensor, batch: Batch, rows: Int64) -> Tensor:
    """[R, V] fp32: these rows, -inf for what is banned. Ids beyond the vocabulary, which an end-of-sequence id may be, are so by nature."""
    wide = _widened(logits, rows)
    index = [(i, id) for i, row in enumerate(rows.tolist()) for id in _banned(batch, row) if id < logits.shape[1]]
    if not index:
        return wide
    on_device = torch.tensor(index, dtype=torch.int64, device=logits.device).unbind(1)
    return wide.index_put_(on_device, torch.tensor(-torch.inf, device=logits.device))


def _banned(batch: Batch, row: int) -> list[int]:
    banned: list[int] = batch.banned_ids[batch.banned_starts[row] : batch.banned_starts[row + 1]].tolist()
    return banned


def _widened(logits: Tensor, rows: Int64) -> Tensor:
    """[R, V] fp32, a copy."""
    return logits[torch.from_numpy(rows).to(logits.device)].float()


def _tempered(logits: Tensor, top_ids: Tensor, temperatures: Tensor) -> Tensor:
    """logits [R, V] fp32, relative to each row's largest, over its temperature: so a tiny one cannot overflow."""
    return (logits - logits.gather(1, top_ids.unsqueeze(1))) / temperatures.unsqueeze(1)


def _kept_weights(probs: Tensor, batch: Batch, hot: Int64) -> Tensor:
    """probs [R, V] with 0 where masked; not renormalised."""
    vocab = probs.shape[1]
    top_ks = np.where((batch.top_ks[hot] <= 0) | (batch.top_ks[hot] > vocab), vocab, batch.top_ks[hot]).astype(np.int64)
    cut = np.flatnonzero((top_ks < vocab) | (batch.top_ps[hot] < 1))
    if len(cut):
        rows = torch.from_numpy(cut).to(probs.device)
        bounds = (torch.from_numpy(top_ks[cut]).to(probs.device), torch.from_numpy(batch.top_ps[hot[cut]]).to(probs.device))
        probs[rows] = _cut(probs[rows], *bounds)
    if np.any(batch.min_ps[hot] > 0):
        floors = torch.from_numpy(batch.min_ps[hot]).to(probs.device).unsqueeze(1) * probs.amax(dim=-1, keepdim=True)
        probs = probs.where(probs >= floors, 0)
    return probs


def _cut(probs: Tensor, top_ks: Tensor, top_ps: Tensor) -> Tensor:
    """probs [C, V] with 0 for what top_ks [C] and top_ps [C] leave out. Only values are sorted; ties are settled by id."""
    largest, num_kept = _kept(probs, top_ks, top_ps)
    threshold = largest.gather(1, (num_kept - 1).unsqueeze(1))
    num_above = (largest > threshold).sum(dim=1)
    tied = probs == threshold
    room = num_kept - num_above
    if bool((tied.sum(dim=1) > room).any()):
        tied &= tied.cumsum(dim=1) <= room.unsqueeze(1)
    return probs.where((probs > threshold) | tied, 0)


def _kept(probs: Tensor, top_ks: Tensor, top_ps: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probabilities of each row in descending order, and how many of them are kept, at least 1."""
    vocab = probs.shape[1]
    bounded = top_ks < vocab
    wanted = int(top_ks[bounded].max()) if bool(bounded.any()) else 0
    if bool((~bounded).any()):
        wanted = max(wanted, min(FIRST_CANDIDATES, vocab))
    largest = probs.topk(wanted, dim=1).values
    num_kept = _num_kept(largest, vocab, top_ks, top_ps)
    # An unbounded row whose every candidate was kept may go on behind them.
    if wanted < vocab and bool(((num_kept == wanted) & (top_ks > wanted)).any()):
        largest = probs.sort(dim=1, descending=True).values
        num_kept = _num_kept(largest, vocab, top_ks, top_ps)
    return largest, num_kept


def _num_kept(largest: Tensor, vocab: int, top_ks: Tensor, top_ps: Tensor) -> Tensor:
    in_top_k = torch.arange(largest.shape[1], device=largest.device).unsqueeze(0) < top_ks.unsqueeze(1)
    until = largest.cumsum(dim=1)
    before = torch.nn.functional.pad(until[:, :-1], (1, 0))
    # Without top_k the whole row is 1 by definition: a sum over the candidates would depend on how many there are.
    total = until.gather(1, top_ks.clamp(max=largest.shape[1]).unsqueeze(1) - 1)
    total = total.where((top_ks < vocab).unsqueeze(1), 1.0)
    kept = in_top_k & ((before < top_ps.unsqueeze(1) * total) | (top_ps >= 1).unsqueeze(1))
    return kept.sum(dim=1).clamp(min=1)


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """[R] the first id whose cumulative weight exceeds uniforms [R] times the row's sum; never one of weight 0."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = uniforms.unsqueeze(1) * total
    # Uniforms are below 1, but their product with the sum may round up to the sum.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def _most_likely(logprobs: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row in descending order, lower ids first among equals: ids [A, count] and values."""
    bits = (logprobs + 0.0).view(torch.int32).to(torch.int64)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    ids = torch.arange(logprobs.shape[1], device=logprobs.device)
    keys = (ordered << 32) - ids
    top = keys.topk(count, dim=1).indices
    return top, logprobs.gather(1, top)
