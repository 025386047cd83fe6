"""Text to token ids and back, and the chat template. Imports no torch.

Only the template may produce control tokens: what a document or a question holds is encoded as plain text, so
`<|im_end|>` in a file is seven ordinary tokens and never ends a turn.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from nsa_models.errors import ModelError
from nsa_models.formats import read_config, read_json

DOCUMENT, QUESTION, SYSTEM = "\ue000document\ue001", "\ue000question\ue001", "\ue000system\ue001"
ANSWER, NEXT = "\ue000answer\ue001", "\ue000next\ue001"


def load_tokenizer(path: str | Path, template: str | None = None) -> "Tokenizer":
    """The tokenizer of a checkpoint directory: `tokenizer.json`, and `tokenizer_config.json` if there is one.

    template: a chat template in place of the checkpoint's; None = its own, "" = none: a plain layout. Raises
    ModelError if they are missing or unreadable, or hold more tokens than the checkpoint's vocabulary.
    """
    directory = Path(path)
    tokenizer = Tokenizer(directory, template)
    config = read_config(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"{directory / 'tokenizer.json'}: {tokenizer.vocab_size:,} tokens, but the checkpoint's vocabulary has "
            f"{config.vocab_size:,}; the tokenizer belongs to another model"
        )
    if any(i >= config.vocab_size for i in config.eos_token_ids):
        raise ModelError(f"{directory}: end token {max(config.eos_token_ids)} is beyond the vocabulary")
    tokenizer.eos_ids = config.eos_token_ids or tokenizer.eos_ids
    if tokenizer.adds_bos and tokenizer.bos_id is None:
        tokenizer.bos_id = config.bos_token_id
    return tokenizer


class Prompt(NamedTuple):
    """Ids around a document: what comes before it, the question behind it, and what lets the model answer."""

    before: list[int]
    question: list[int]
    close: list[int]

    @property
    def after(self) -> list[int]:
        return self.question + self.close


class Tokenizer:
    """`vocab_size` is one more than the largest id; `digest` identifies the files; `eos_ids` end an answer."""

    def __init__(self, directory: Path, template: str | None = None) -> None:
        raw = _read(directory / "tokenizer.json")
        settings_file = directory / "tokenizer_config.json"
        settings_raw = _read(settings_file) if settings_file.is_file() else b"{}"
        template_file = directory / "chat_template.jinja"
        template_raw = _read(template_file) if template_file.is_file() else b""
        if template is not None:
            template_raw = template.encode()
        self.digest = hashlib.sha256(b"\0".join((raw, settings_raw, template_raw))).hexdigest()
        self._text = _backend(raw, directory)
        self._text.encode_special_tokens = True  # a control token's spelling is text
        self._control = _backend(raw, directory)
        self.vocab_size = 1 + max(self._text.get_vocab(with_added_tokens=True).values(), default=-1)
        settings = read_json(settings_file) if settings_file.is_file() else {}
        self._named = {name: _spelling(settings, name, settings_file) for name in ("bos_token", "eos_token")}
        self._named = {name: text for name, text in self._named.items() if text}
        if template is None:
            template = _template(template_raw, settings, template_file if template_raw else settings_file)
        self._template = template
        self.adds_bos = bool(settings.get("add_bos_token"))
        self.bos_id = self._id("bos_token")
        eos = self._id("eos_token")
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        self._grammar_tokenizer = None  # made on demand: 0.2 s for 49,152 tokens

    @property
    def has_chat_template(self) -> bool:
        return bool(self._template)

    def _id(self, name: str) -> int | None:
        return self._control.token_to_id(self._named[name]) if name in self._named else None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text; no control token is added or recognized."""
        return self._text.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[int]]:
        """The same, and for each token the index of its first character in `text`."""
        encoding = self._text.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    def decode(self, ids: list[int]) -> str:
        return self._text.decode(ids, skip_special_tokens=True)

    def text(self, ids: list[int]) -> str:
        """The same with control tokens spelled out."""
        return self._text.decode(ids, skip_special_tokens=False)

    def stream(self) -> "Stream":
        """Decodes token by token; every piece is whole characters."""
        return Stream(self)

    def prompt(self, question: str, system: str | None = None) -> "Prompt":
        """What to put around the document, so that the model answers `question` about it.

        With the checkpoint's chat template: one user turn, the document and then the question; `system` None means
        the template's own. Without one: the document, `Question: ... Answer:`.
        """
        if not self._template:
            start = [self.bos_id] if self.adds_bos and self.bos_id is not None else []
            head = self.encode(system + "\n\n") if system else []
            return Prompt(start + head, self.encode(f"\n\nQuestion: {question}"), self.encode("\nAnswer:"))
        before, _, after = self._render(_messages(system)).partition(DOCUMENT)
        ids_before: list[int] = []
        head, found, tail = before.partition(SYSTEM)
        ids_before += self._encode_control(head)
        if found:
            ids_before += self.encode(system or "") + self._encode_control(tail)
        _, _, close = after.partition(QUESTION)
        return Prompt(ids_before, self.encode("\n\n" + question), self._encode_control(close))

    def follow_up(self, question: str, system: str | None = None) -> "Prompt":
        """What to put behind an answer, so that the model answers one more question; `before` ends the answer."""
        if not self._template:
            return Prompt([], self.encode(f"\n\nQuestion: {question}"), self.encode("\nAnswer:"))
        turns = [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": NEXT}]
        _, _, after = self._render([*_messages(system), *turns]).partition(ANSWER)
        between, _, close = after.partition(NEXT)
        return Prompt(self._encode_control(between), self.encode(question), self._encode_control(close))

    def for_grammars(self, vocab_size: int):
        """This vocabulary as llguidance's tokenizer, for logits of vocab_size."""
        if self._grammar_tokenizer is None:
            import llguidance

            if not self.eos_ids:
                raise ModelError("the checkpoint names no end token, so that JSON could not end; a schema needs one")
            raw = self._control.to_str()
            self._grammar_tokenizer = llguidance.LLTokenizer(raw, n_vocab=vocab_size, eos_token=list(self.eos_ids))
        return self._grammar_tokenizer

    @cached_property
    def _compiled(self):
        """The template, compiled once: that takes 1.5 ms, more than all else a short question needs around it."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        return environment.from_string(self._template)

    def _render(self, messages: list[dict]) -> str:
        try:
            text = self._compiled.render(messages=messages, add_generation_prompt=True, **self._named)
        except Exception as error:  # a template is a program: it may fail in any way
            raise ModelError(f"the chat template failed: {error or type(error).__name__}") from None
        contents = [message["content"] for message in messages]
        places = [text.find(content) for content in contents]
        if places != sorted(places) or any(text.count(content) != 1 for content in contents):
            raise ModelError(
                "the chat template drops, repeats or moves a message; give another, or none, as --chat-template"
            )
        return text

    def _encode_control(self, text: str) -> list[int]:
        return self._control.encode(text, add_special_tokens=False).ids


class Stream:
    """Turns ids into text as they come. A byte-level token may end inside a character: it waits for the rest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = 0  # ids[start:] are decoded: those before `whole` are the context of what follows them
        self.whole = 0
        self.given = 0  # characters of their text that were given out

    def push(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids[self.start :])
        stop = len(text.rstrip("\ufffd"))  # what the next token may turn into a character
        piece = text[self.given : stop]
        self.given = max(self.given, stop)
        if stop == len(text):
            self.start, self.whole = self.whole, len(self.ids)
            self.given = len(self.tokenizer.decode(self.ids[self.start :]))
        return piece

    def end(self) -> str:
        """What is left when no token will follow: incomplete bytes as U+FFFD."""
        piece = self.tokenizer.decode(self.ids[self.start :])[self.given :]
        self.start = self.whole = len(self.ids)
        self.given = 0
        return piece


def _messages(system: str | None) -> list[dict]:
    """A conversation with its first question, markers in the place of texts."""
    first = {"role": "user", "content": DOCUMENT + QUESTION}
    return [{"role": "system", "content": SYSTEM}, first] if system else [first]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; a checkpoint needs its tokenizer beside it") from None


def _backend(raw: bytes, directory: Path):
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{directory / 'tokenizer.json'}: not a tokenizer ({error})") from None
    tokenizer.no_truncation()  # some files carry the settings of their training: a document would end at 512 tokens
    tokenizer.no_padding()
    return tokenizer


def _spelling(settings: dict, name: str, file: Path) -> str | None:
    value = settings.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise ModelError(f"{file}: {name} must be a text, got {value!r}")
    return value


def _template(raw: bytes, settings: dict, file: Path) -> str | None:
    """The template of chat_template.jinja, else of tokenizer_config.json: a text, or a list of named ones."""
    try:
        found = raw.decode() or settings.get("chat_template")
    except UnicodeDecodeError as error:
        raise ModelError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from None
    if isinstance(found, list):
        named = {
            t.get("name"): t.get("template") for t in found if isinstance(t, dict) and isinstance(t.get("name"), str)
        }
        found = named.get("default")
    if found is not None and not isinstance(found, str):
        raise ModelError(f"{file}: chat_template must be a text or a list of named texts")
    return found
