"""The training loop: schedule, gradient accumulation, held-out losses, checkpoints.

The rate warms up, stays, then falls along a cosine. Because it stays, a run may be resumed with another `steps`
before its fall begins and still equal a run that had that number from the start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .data import Windows, even_windows
from .model import DemoModel
from .optimizer import optimizers

BALANCE_WEIGHT = 0.01


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, how much and how fast."""

    steps: int
    seed: int = 0
    tokens_per_step: int = 8192
    micro_tokens: int = 2048
    early_length: int = 256
    late_length: int = 512
    warmup: int = 40
    fall: float = 0.4
    muon_lr: float = 5e-3
    adam_lr: float = 3e-3
    check_every: int = 100

    @property
    def fall_start(self) -> int:
        return int(self.steps * (1 - self.fall))

    def rate(self, step: int) -> float:
        """The factor on both learning rates."""
        if step < self.fall_start:
            return min(1.0, (step + 1) / self.warmup)
        left = (self.steps - step) / (self.steps - self.fall_start)
        return 0.02 + 0.98 * (0.5 - 0.5 * math.cos(math.pi * left))

    def length(self, step: int) -> int:
        """Short windows are cheaper; long ones, for the last part, teach the distances."""
        return self.early_length if step < self.fall_start else self.late_length


@dataclass(frozen=True, slots=True)
class Check:
    """What was measured at one step."""

    step: int
    train_loss: float
    held_out_loss: float
    seconds: float


@dataclass(slots=True)
class Progress:
    """What a checkpoint remembers besides weights and optimizers."""

    step: int = 0
    seconds: float = 0.0
    checks: list[Check] = field(default_factory=list)


class Trainer:
    """Owns the optimizers and the progress of one model's run."""

    def __init__(self, model: DemoModel, plan: Plan, train: Tensor, held_out: Tensor) -> None:
        self.model, self.plan = model, plan
        self.windows, self.held_out = Windows(train, plan.seed), held_out
        self.optimizers = optimizers(model, plan.muon_lr, plan.adam_lr)
        self.base_rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.progress = Progress()

    def run(self, on_check: Callable[[Progress], None]) -> Progress:
        bar = tqdm(total=self.plan.steps, initial=self.progress.step, unit="step", mininterval=5.0)
        recent: list[float] = []
        while self.progress.step < self.plan.steps:
            recent.append(self._timed_step(bar))
            if self.progress.step % self.plan.check_every == 0 or self.progress.step == self.plan.steps:
                self._check(sum(recent) / len(recent), bar)
                recent.clear()
                on_check(self.progress)
        bar.close()
        return self.progress

    def _timed_step(self, bar: tqdm[None]) -> float:
        start = time.monotonic()
        loss = self._step(self.progress.step)
        took = time.monotonic() - start
        self.progress.step += 1
        self.progress.seconds += took
        bar.set_postfix_str(f"loss {loss:.3f}, {self.plan.tokens_per_step / took:,.0f} tokens/s", refresh=False)
        bar.update()
        return loss

    def _step(self, step: int) -> float:
        length = self.plan.length(step)
        batch = self.windows.batch(step, self.plan.tokens_per_step // length, length)
        parts = torch.split(batch, max(1, self.plan.micro_tokens // length))
        total = 0.0
        for part in parts:
            loss, balance = self._losses(part)
            ((loss + BALANCE_WEIGHT * balance) * (len(part) / len(batch))).backward()  # type: ignore[no-untyped-call]
            total += loss.item() * len(part) / len(batch)
        self._update(self.plan.rate(step))
        return total

    def _losses(self, part: Tensor) -> tuple[Tensor, Tensor]:
        logits, balance = self.model(part[:, :-1], torch.bfloat16)
        return F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten()), balance

    def _update(self, rate: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, base in zip(groups, self.base_rates, strict=True):
            group["lr"] = base * rate
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def _check(self, train_loss: float, bar: tqdm[None]) -> None:
        check = Check(self.progress.step, train_loss, self.held_out_loss(rows=40), self.progress.seconds)
        self.progress.checks.append(check)
        bar.write(f"step {check.step}: train {check.train_loss:.4f}, held out {check.held_out_loss:.4f}")

    @torch.no_grad()
    def held_out_loss(self, rows: int) -> float:
        windows = even_windows(self.held_out, rows, self.plan.late_length)
        parts = torch.split(windows, max(1, self.plan.micro_tokens // self.plan.late_length))
        return sum(self._losses(part)[0].item() * len(part) for part in parts) / len(windows)

    def save(self, path: Path) -> None:
        """Writes beside, then renames: an interruption leaves the previous checkpoint whole."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save({"model": self.model.state_dict(), "optimizers": states, "progress": asdict(self.progress)}, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        progress = saved["progress"]
        checks = [Check(**check) for check in progress["checks"]]
        self.progress = Progress(progress["step"], progress["seconds"], checks)
