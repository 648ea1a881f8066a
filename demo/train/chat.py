"""Conversations made mechanically from docstrings, so that the chat template is met with documentation.

Knows how a question is worded and how an answer is cut. Knows nothing of the template's tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal, TypedDict

from .corpus import Document, Entry

ANSWER_MAX = 700
SOURCE_MAX = 900
SYSTEM = "You are a helpful assistant who knows the Python standard library."

_ASK_DOC = {
    "function": (
        "What does {name} do?",
        "Explain {name}.",
        "Explain {short}.",
        "What is {name} for?",
        "Describe {name}",
    ),
    "class": ("What is {name}?", "Explain the class {name}.", "Describe {name}.", "What is a {short}?"),
    "module": (
        "What is the {name} module for?",
        "Explain the module {name}.",
        "Tell me about {name}.",
        "What is {name}?",
    ),
    "topic": ("Explain {name} in Python.", "Tell me about {name}.", "What should I know about {name}?"),
}
_ASK_USAGE = ("How do I use {name}?", "How is {name} called?", "What arguments does {name} take?", "Show me {name}.")
_ASK_SOURCE = ("Show me the source of {name}.", "How is {name} implemented?", "Write {name} in Python.")


class Message(TypedDict):
    """One message, as chat templates take it."""

    role: Literal["system", "user", "assistant"]
    content: str


def conversations(documents: list[Document], seed: int) -> Iterator[list[Message]]:
    """One to three questions about things of one file per conversation; every entry is asked about."""
    rng = random.Random(seed)
    for document in documents:
        turns = [turn for entry in document.entries for turn in _turns(entry, rng)]
        rng.shuffle(turns)
        while turns:
            count = rng.choice((1, 1, 1, 2, 3))
            yield _opening(rng) + [message for turn in turns[:count] for message in turn]
            del turns[:count]


def _opening(rng: random.Random) -> list[Message]:
    return [Message(role="system", content=SYSTEM)] if rng.random() < 0.2 else []


def _turns(entry: Entry, rng: random.Random) -> Iterator[tuple[Message, Message]]:
    yield _turn(rng.choice(_ASK_DOC[entry.kind]), entry, shortened(entry.doc))
    if entry.kind in ("function", "class"):
        yield _turn(rng.choice(_ASK_USAGE), entry, _fenced(entry.signature) + "\n\n" + shortened(entry.doc))
    if 0 < len(entry.source) <= SOURCE_MAX:
        yield _turn(rng.choice(_ASK_SOURCE), entry, _fenced(entry.source))


def _turn(question: str, entry: Entry, answer: str) -> tuple[Message, Message]:
    asked = question.format(name=entry.name, short=".".join(entry.name.split(".")[-2:]))
    return Message(role="user", content=asked), Message(role="assistant", content=answer)


def shortened(doc: str) -> str:
    """The first paragraphs of `doc` that fit an answer; at least one, cut at a line if it is too long alone."""
    paragraphs = doc.split("\n\n")
    answer = paragraphs[0]
    for paragraph in paragraphs[1:]:
        if len(answer) + len(paragraph) > ANSWER_MAX:
            break
        answer += "\n\n" + paragraph
    return answer if len(answer) <= ANSWER_MAX else answer[:ANSWER_MAX].rpartition("\n")[0] or answer[:ANSWER_MAX]


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"
