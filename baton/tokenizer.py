"""Text to token ids and back, as the checkpoint's own files say: tokenizer.json, chat template, generation_config.json.

Knows the files of a checkpoint directory. Knows no requests, no network, no torch and no `transformers`: `encode`, `decode` and
`render_chat` give what its AutoTokenizer gives, and that is tested.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.errors import ConfigError, InvalidRequest
from baton.request import SamplingAsked

Json = Mapping[str, Any]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# What clients may not set through chat_template_kwargs: Baton says these itself.
_OWN_VALUES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
# What generation_config.json may ask of sampling that Baton does not do, with the values that ask for nothing.
_UNAPPLIED: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff", "diversity_penalty", "presence_penalty", "top_h"), (0,)),
    **dict.fromkeys(("frequency_penalty", "penalty_alpha", "min_length", "min_new_tokens", "exponential_decay_length_penalty"), (0,)),
    **dict.fromkeys(("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "stop_strings"), ([], {})),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), ()),
    **dict.fromkeys(("num_beams", "guidance_scale"), (1,)),
    "max_new_tokens": (),
}
_ONLY_SAMPLING = (("temperature", 1), ("top_k", 0), ("top_p", 1), ("min_p", 0))  # read where do_sample is true; with what is off


class Tokenizer:
    """One model's tokenizer. Immutable after `load` but for a cache of token bytes, so threads may share it.

    eos_ids: what ends an answer unless ignored: generation_config.json's, else config.json's, else the tokenizer's own.
    sampling_defaults: what generation_config.json recommends (only where it samples); None where it is silent.
    special_ids: tokens that skip_special_tokens leaves out.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        special_names: Mapping[str, str],
        template: jinja2.Template | None,
        sampling_defaults: SamplingAsked,
        eos_ids: tuple[int, ...],
    ) -> None:
        self._core = core
        self._template = template
        self._special_names = special_names
        self._bytes: dict[int, bytes] = {}
        self._decoders = tuple(_decoder_types(json.loads(core.to_str()).get("decoder")))
        self._char_bytes = _char_bytes() if self.is_byte_level else {}
        self.eos_ids = eos_ids
        self.sampling_defaults = sampling_defaults
        self.special_ids = frozenset(i for i, token in core.get_added_tokens_decoder().items() if token.special)
        self.vocab_size = core.get_vocab_size()
        self.whole_texts: Mapping[int, str | None] = _WholeTexts(self)

    @classmethod
    def load(cls, model_dir: str | Path) -> Tokenizer:
        """Read a checkpoint directory; ConfigError names the file that is missing or cannot be used."""
        root = Path(model_dir)
        config = _read_json(root / "special_tokens_map.json") | _read_json(root / "tokenizer_config.json")
        generation = _read_json(root / "generation_config.json")
        special_names = {name: text for name in _SPECIAL_NAMES if (text := _content(config.get(name)))}
        core = _read_core(root / "tokenizer.json", special_names.values())
        eos_ids = _eos_ids(generation, _read_json(root / "config.json"), core.token_to_id(special_names.get("eos_token", "")))
        return cls(core, special_names, _compile(_read_template(root, config), root), _sampling_defaults(generation), eos_ids)

    @property
    def is_byte_level(self) -> bool:
        """Whether every token stands for bytes of UTF-8 (GPT-2, Llama 3, Qwen)."""
        return self._decoders == ("ByteLevel",)

    @property
    def has_byte_fallback(self) -> bool:
        """Whether tokens like <0xE4> spell single bytes (Llama 2): a run of them is decoded as a whole."""
        return "ByteFallback" in self._decoders

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of `text`; with add_special_tokens the checkpoint's post-processor adds, say, a BOS token."""
        # The batch call releases the GIL and computes no offsets; `encode` holds the GIL throughout.
        return tuple(self._core.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of all `token_ids` at once. Ids outside the vocabulary have no text."""
        return self._core.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True, values: Json | None = None
    ) -> tuple[int, ...]:
        """Token ids of a conversation after the checkpoint's chat template, which writes all special tokens itself."""
        return self.encode(self.chat_text(messages, add_generation_prompt, values), add_special_tokens=False)

    def chat_text(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True, values: Json | None = None) -> str:
        """The conversation as the template writes it; InvalidRequest if there is no template or it refuses.

        values: what the client tells the template beside the messages, say {"enable_thinking": False}; one it does not read is ignored.
        """
        if self._template is None:
            raise InvalidRequest("this model has no chat template: send text prompts, or add a chat_template.jinja to the checkpoint")
        if not messages:
            raise InvalidRequest("messages must hold at least one message")
        own = {"messages": [_with_reasoning(m) for m in messages], "tools": None, "documents": None}
        given = {**self._special_names, **_harmless(values or {}), **own, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(given)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}") from error

    def token_text(self, token_id: int) -> str:
        """One token as people see it in logprobs; bytes that are no text by themselves are spelled `bytes:\\xe2\\x80`."""
        spelled = self.token_bytes(token_id)
        try:
            return spelled.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the UTF-8 text in the middle of an answer; empty outside the vocabulary."""
        if token_id not in self._bytes:
            self._bytes[token_id] = self._spell(self._core.id_to_token(token_id) or "")
        return self._bytes[token_id]

    def knows(self, token_id: int) -> bool:
        """Whether the id stands for a token; models may have more rows than their vocabulary has tokens."""
        return self._core.id_to_token(token_id) is not None

    def is_byte_token(self, token_id: int) -> bool:
        """Whether this token is one byte of a byte-fallback run, whose text is open until the run ends."""
        return self.has_byte_fallback and _BYTE_TOKEN.fullmatch(self._core.id_to_token(token_id) or "") is not None

    def _spell(self, token: str) -> bytes:
        if self.is_byte_level:  # like the library: a token with a character outside the table stands for itself
            return bytes(self._char_bytes[c] for c in token) if all(c in self._char_bytes for c in token) else token.encode()
        if self.has_byte_fallback and _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()


class _WholeTexts(dict[int, str | None]):
    """By token id: the text of a token that is whole characters by itself, else None. Fills as it is asked, with the vocabulary at most."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str | None:
        try:
            text = self._tokenizer.token_bytes(token_id).decode("utf-8")
        except UnicodeDecodeError:
            text = None
        if self._tokenizer.knows(token_id):
            self[token_id] = text
        return text


class _GenerationTag(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(source: str | None, root: Path) -> jinja2.Template | None:
    """The environment transformers gives to chat templates, which come from strangers and so run in a sandbox."""
    if source is None:
        return None
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the chat template of {root} cannot be compiled: {error}") from error


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _with_reasoning(message: Mapping[str, str]) -> dict[str, str]:
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    return {"thinking": reasoning, **message, "reasoning_content": reasoning} if reasoning else dict(message)


def _read_core(path: Path, special: Iterable[str]) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing: Baton reads the fast tokenizer. Save the checkpoint again with transformers' "
            "AutoTokenizer.from_pretrained(dir).save_pretrained(dir)"
        )
    try:
        core = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path} cannot be read by tokenizers {tokenizers.__version__}: {error}") from error
    core.no_truncation()
    core.no_padding()
    core.add_special_tokens([text for text in special if core.token_to_id(text) is not None])
    return core


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return content


def _read_template(root: Path, config: Json) -> str | None:
    if (path := root / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    source = _read_json(root / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(source, list):  # older checkpoints: [{"name": …, "template": …}, …]
        source = {item["name"]: item["template"] for item in source}
    return source.get("default") if isinstance(source, dict) else source


def _eos_ids(generation: Json, model: Json, own: int | None) -> tuple[int, ...]:
    asked = next((c["eos_token_id"] for c in (generation, model) if c.get("eos_token_id") is not None), own)
    ids = asked if isinstance(asked, list) else [asked]
    if not all(isinstance(i, int) for i in ids if i is not None):
        raise ConfigError(f"eos_token_id must be an id or a list of ids, not {asked!r}")
    return tuple(i for i in ids if i is not None)


def _sampling_defaults(generation: Json) -> SamplingAsked:
    if generation.get("do_sample") is not True:
        return SamplingAsked()
    get = generation.get
    return SamplingAsked(temperature=get("temperature"), top_k=get("top_k"), top_p=get("top_p"), min_p=get("min_p"))


def unapplied_sampling(model_dir: str | Path) -> tuple[str, ...]:
    """What generation_config.json recommends for sampling and Baton does not do, as "field value"; empty if all of it is applied."""
    generation = _read_json(Path(model_dir) / "generation_config.json")
    asked = {name: generation[name] for name in _UNAPPLIED if generation.get(name) is not None}
    found = [f"{name} {value}" for name, value in asked.items() if value not in _UNAPPLIED[name]]
    if generation.get("do_sample") is not True:
        found += [
            f"{name} {generation[name]} (do_sample is not true)" for name, off in _ONLY_SAMPLING if generation.get(name) not in (None, off)
        ]
    return tuple(found)


def _harmless(values: Json) -> Json:
    if taken := sorted(_OWN_VALUES & values.keys()):
        raise InvalidRequest(f"chat_template_kwargs may not set {', '.join(taken)}", param="chat_template_kwargs")
    return values


def _content(token: Any) -> str:
    """A special token as tokenizer_config.json writes it: its text, or an object with it."""
    return (token.get("content") if isinstance(token, dict) else token) or ""


def _decoder_types(decoder: Json | None) -> list[str]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [name for part in decoder["decoders"] for name in _decoder_types(part)]
    return [decoder["type"]]


def _char_bytes() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for their own byte, the others for 256, 257, … in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
