"""How close a model comes to another way of computing it: answers fed and free, and a text it has not read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.agreement import Agreement, Floats, Ids, Prefixes, perplexity
from bench.solo import Advance, Solo

Stage = Callable[[str, int], Advance]


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What every subject does: continue prompts [Q, L] by num_positions tokens each, and score windows [W, L + 1] of text."""

    prompts: Ids
    num_positions: int
    windows: Ids

    @property
    def num_answered(self) -> int:
        """Tokens of all answers."""
        return len(self.prompts) * self.num_positions

    @property
    def num_scored(self) -> int:
        """Tokens of all windows."""
        return self.windows[:, 1:].size


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model and how much of the task it does in one step. It is loaded when asked for, so that only one is in memory."""

    name: str
    open: Callable[[], Solo]
    sequences_per_step: int
    windows_per_step: int


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What the others are compared with."""

    answers: Ids
    chosen: Ids
    logprobs: Floats

    @classmethod
    def of(cls, subject: Subject, task: Task, stage: Stage) -> Reference:
        """Do the task, free running."""
        solo = subject.open()
        answers = solo.answers(task.prompts, task.num_positions, subject.sequences_per_step, stage("free running", task.num_answered))
        logprobs, chosen = solo.scores(task.windows, subject.windows_per_step, stage("held-out text", task.num_scored))
        return cls(answers, chosen, logprobs)

    @property
    def perplexity(self) -> float:
        """On the text."""
        return perplexity(self.logprobs)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A subject beside the reference.

    forced: on the reference's own answers, fed to both. text: on the held-out text, fed to both. free: each with its own answers.
    """

    name: str
    forced: Agreement
    text: Agreement
    perplexity: float
    perplexity_ratio: float
    free: Prefixes

    @classmethod
    def of(cls, subject: Subject, reference: Reference, task: Task, stage: Stage) -> Comparison:
        """Do the task, free running and fed with the reference's answers."""
        solo, size = subject.open(), subject.sequences_per_step
        free = solo.answers(task.prompts, task.num_positions, size, stage("free running", task.num_answered))
        forced = solo.answers(task.prompts, task.num_positions, size, stage("teacher-forced", task.num_answered), reference.answers)
        logprobs, chosen = solo.scores(task.windows, subject.windows_per_step, stage("held-out text", task.num_scored))
        return cls(
            subject.name,
            Agreement.of(reference.answers, forced),
            Agreement.of(reference.chosen, chosen),
            perplexity(logprobs),
            perplexity(logprobs) / reference.perplexity,
            Prefixes.of(reference.answers, free),
        )
