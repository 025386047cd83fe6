"""Text to token ids and back, and the chat template. Imports no torch.

Only the template may produce control tokens: what a document or a question holds is encoded as plain text, so
`<|im_end|>` in a file is seven ordinary tokens and never ends a turn.
"""

import hashlib
import json
from pathlib import Path

from nsa_models.errors import ModelError

DOCUMENT, QUESTION, SYSTEM = "\ue000document\ue001", "\ue000question\ue001", "\ue000system\ue001"


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """The tokenizer of a checkpoint directory: `tokenizer.json`, and `tokenizer_config.json` if there is one.

    Raises ModelError if they are missing or unreadable, or hold more tokens than the checkpoint's vocabulary.
    """
    from nsa_models.formats import read_config

    directory = Path(path)
    tokenizer = Tokenizer(directory)
    config = read_config(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise ModelError(
            f"{directory / 'tokenizer.json'}: {tokenizer.vocab_size:,} tokens, but the checkpoint's vocabulary has "
            f"{config.vocab_size:,}; the tokenizer belongs to another model"
        )
    tokenizer.eos_ids = config.eos_token_ids or tokenizer.eos_ids
    if tokenizer.adds_bos and tokenizer.bos_id is None:
        tokenizer.bos_id = config.bos_token_id
    return tokenizer


class Tokenizer:
    """`vocab_size` counts added tokens; `digest` identifies the files; `eos_ids` end an answer."""

    def __init__(self, directory: Path) -> None:
        raw = _read(directory / "tokenizer.json")
        settings_file = directory / "tokenizer_config.json"
        settings_raw = _read(settings_file) if settings_file.is_file() else b"{}"
        template_file = directory / "chat_template.jinja"
        template_raw = _read(template_file) if template_file.is_file() else b""
        self.digest = hashlib.sha256(b"\0".join((raw, settings_raw, template_raw))).hexdigest()
        self._text = _backend(raw, directory)
        self._text.encode_special_tokens = True  # a control token's spelling is text
        self._control = _backend(raw, directory)
        self.vocab_size = self._text.get_vocab_size(with_added_tokens=True)
        try:
            settings = json.loads(settings_raw)
        except ValueError as error:
            raise ModelError(f"{settings_file}: not JSON ({error})") from None
        self._named = {
            name: value["content"] if isinstance(value, dict) else value
            for name in ("bos_token", "eos_token")
            if (value := settings.get(name))
        }
        self._template = template_raw.decode() or settings.get("chat_template")
        if isinstance(self._template, list):  # several named templates
            self._template = next((t["template"] for t in self._template if t["name"] == "default"), None)
        self.adds_bos = bool(settings.get("add_bos_token"))
        self.bos_id = self._id("bos_token")
        eos = self._id("eos_token")
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)

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

    def stream(self) -> "Stream":
        """Decodes token by token; every piece is whole characters."""
        return Stream(self)

    def prompt(self, question: str, system: str | None = None) -> tuple[list[int], list[int]]:
        """Ids to put before and after the document's, so that the model answers `question` about it.

        With the checkpoint's chat template: one user turn, the document and then the question; `system` None means
        the template's own. Without one: the document, `Question: ... Answer:`.
        """
        if not self._template:
            start = [self.bos_id] if self.adds_bos and self.bos_id is not None else []
            head = self.encode(system + "\n\n") if system else []
            return start + head, self.encode(f"\n\nQuestion: {question}\nAnswer:")
        messages = [{"role": "system", "content": SYSTEM}] if system else []
        messages.append({"role": "user", "content": DOCUMENT + QUESTION})
        before, _, after = self._render(messages).partition(DOCUMENT)
        ids_before: list[int] = []
        head, found, tail = before.partition(SYSTEM)
        ids_before += self._encode_control(head)
        if found:
            ids_before += self.encode(system or "") + self._encode_control(tail)
        _, _, close = after.partition(QUESTION)
        return ids_before, self.encode("\n\n" + question) + self._encode_control(close)

    def _render(self, messages: list[dict]) -> str:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        try:
            text = environment.from_string(self._template).render(
                messages=messages, add_generation_prompt=True, **self._named
            )
        except (TemplateError, TypeError, AttributeError) as error:
            raise ModelError(f"the checkpoint's chat template failed: {error}") from None
        if DOCUMENT + QUESTION not in text or (len(messages) == 2 and SYSTEM not in text):
            raise ModelError("the checkpoint's chat template drops a message; remove the template or --system")
        return text

    def _encode_control(self, text: str) -> list[int]:
        return self._control.encode(text, add_special_tokens=False).ids


class Stream:
    """Turns ids into text as they come. A byte-level token may end inside a character: it waits for the rest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = 0  # ids[start:shown] are the context in which the next piece is decoded
        self.shown = 0

    def push(self, token: int) -> str:
        """The text that this token completes, possibly none."""
        self.ids.append(token)
        return self._advance(self.tokenizer.decode(self.ids[self.start :]))

    def _advance(self, text: str) -> str:
        if text.endswith("\ufffd") and len(self.ids) - self.shown < 8:  # a character has at most 4 bytes
            return ""
        known = self.tokenizer.decode(self.ids[self.start : self.shown])
        self.start, self.shown = self.shown, len(self.ids)
        return text[len(known) :]

    def end(self) -> str:
        """What is left when no token will follow: incomplete bytes as U+FFFD."""
        text = self.tokenizer.decode(self.ids[self.start :])
        known = self.tokenizer.decode(self.ids[self.start : self.shown])
        self.start = self.shown = len(self.ids)
        return text[len(known) :]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; a checkpoint needs its tokenizer beside it") from None


def _backend(raw: bytes, directory: Path):
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{directory / 'tokenizer.json'}: not a tokenizer ({error})") from None
