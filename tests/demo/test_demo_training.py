"""The path from text to model, on a toy shape: it exports, resumes exactly and never mixes the two sides."""

from argparse import Namespace

import pytest
import torch
from transformers import AutoTokenizer

from demo.train.__main__ import run
from demo.train.chat import ANSWER_MAX, conversations, shortened
from demo.train.corpus import Corpus, Document, Entry
from demo.train.data import Windows
from demo.train.export import export, verify
from demo.train.loop import Plan, Trainer
from demo.train.model import TINY, DemoModel
from demo.train.optimizer import orthogonal
from demo.train.tokenizer import train_tokenizer

pytestmark = pytest.mark.demo


def _document(number: int) -> Document:
    entry = Entry(f"toy.f{number}", "function", f"toy.f{number}(x)", f"Return {number} times x, or raise ValueError.", "")
    return Document(f"toy{number}.py", f'def f{number}(x):\n    """{entry.doc}"""\n    return {number} * x\n' * 9, (entry,))


@pytest.fixture(autouse=True)
def one_thread():
    """On toy shapes threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    corpus = Corpus(tuple(_document(number) for number in range(80)))
    assert corpus.side(held_out=True)
    return corpus


def _plan(steps: int) -> Plan:
    return Plan(steps, tokens_per_step=64, micro_tokens=32, early_length=32, late_length=32, fall=0.0, check_every=steps)


def _trainer(steps: int) -> Trainer:
    torch.manual_seed(0)
    tokens = torch.randint(TINY.vocab, (2000,), generator=torch.Generator().manual_seed(1))
    return Trainer(DemoModel(TINY), _plan(steps), tokens, tokens)


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path):
    unbroken, broken, resumed = _trainer(4), _trainer(2), _trainer(4)
    unbroken.run(lambda progress: None)
    broken.run(lambda progress: broken.save(tmp_path / "checkpoint.pt"))
    resumed.resume(tmp_path / "checkpoint.pt")
    assert resumed.run(lambda progress: None).step == 4
    weights = resumed.model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in unbroken.model.state_dict().items())
    assert not torch.equal(broken.model.model.embed_tokens.weight, unbroken.model.model.embed_tokens.weight)


def test_a_run_exports_what_it_trained(tmp_path, corpus):
    options = Namespace(steps=2, seed=0, tiny=True, compile=False, checkpoint=None, out=tmp_path / "model")
    run(options, TINY, _plan(2), corpus)  # the export itself compares transformers' logits with ours
    assert AutoTokenizer.from_pretrained(options.out).eos_token == "<|im_end|>"
    assert "| Steps | 2 of 2 |" in (options.out / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_export_that_computes_something_else_is_refused(tmp_path):
    model = DemoModel(TINY)
    tokenizer = train_tokenizer(["def f(): return 1\n" * 9], TINY.vocab, TINY.context)
    export(model, tokenizer, tmp_path / "model", lambda folder: "")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match="differ"):
        verify(model, tmp_path / "model")


def test_a_file_lies_on_one_side_only(corpus):
    sides = [{document.file for document in corpus.side(held_out=held_out)} for held_out in (True, False)]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[0] | sides[1]) == len(corpus.documents)


def test_every_entry_is_asked_about(corpus):
    asked = "".join(message["content"] for chat in conversations(list(corpus.documents), seed=0) for message in chat)
    assert all(entry.name in asked for document in corpus.documents for entry in document.entries)


def test_answers_are_cut_at_paragraphs_or_lines():
    assert shortened("one\n\n" + "x" * ANSWER_MAX) == "one"
    assert shortened("x\n" * ANSWER_MAX).endswith("x")


def test_an_epoch_visits_every_window_once():
    windows = Windows(torch.arange(1000), seed=0)
    rows = torch.cat([windows.batch(step, rows=6, length=20) for step in range(8)])
    assert rows.shape == (48, 21)
    assert len(rows[:, 0].unique()) == 48
    assert rows[:, :-1].unique().numel() == 48 * 20


def test_muon_flattens_the_spectrum():
    matrices = torch.randn(3, 64, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.5 and values.max() < 1.4
