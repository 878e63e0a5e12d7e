"""Tokens of texts, of prompts with completions and of chats, with a mark at each token that counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipestill.arguments import shown
from pipestill.data.chat import render_answers
from pipestill.data.records import Record
from pipestill.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True)
class Encoding:
    """The tokens of one record, before any are cut off."""

    ids: list[int]
    counted: list[bool]
    """Whether each token is to be predicted."""


@dataclass(frozen=True, slots=True)
class _Pieces:
    """What a tokenizer gives for a text."""

    ids: list[int]
    ends: list[int]
    """The character of the text after each token's last."""
    added: list[bool]
    """Whether the tokenizer added the token: the text does not hold it."""


class Encoder:
    """Turns records into tokens with a tokenizer of `transformers` or of `tokenizers`.

    Args:
        tokenizer: the tokenizer. Chats need one of `transformers` with a chat template.
        end: append the tokenizer's end-of-sequence token to texts and completions, where they have none.
        answers: of chats, count "all" answers, or the "last" one only.

    Raises:
        ConfigError: it is no tokenizer.
    """

    def __init__(self, tokenizer: Any, end: bool = True, answers: Literal["all", "last"] = "all") -> None:
        self.is_chat = hasattr(tokenizer, "apply_chat_template")
        if not self.is_chat and not hasattr(tokenizer, "encode_batch"):
            raise ConfigError(f"tokenizer is {shown(tokenizer)}; expected one of transformers (AutoTokenizer) or of tokenizers")
        if answers not in ("all", "last"):
            raise ConfigError(f"answers is {shown(answers)}; expected all or last")
        self.tokenizer = tokenizer if self.is_chat else _unbounded(tokenizer)
        self.end_id: int | None = getattr(tokenizer, "eos_token_id", None) if end else None
        self.answers = answers

    def __call__(self, record: Record) -> Encoding:
        """Tokenize one record; `DataError` without its place for one that cannot be."""
        fields = record.fields
        if record.problem:
            raise DataError(record.problem)
        if "messages" in fields:
            return self._chat(_messages("messages", fields["messages"]), 0, fields)
        if "prompt" in fields and "completion" in fields:
            prompt, completion = fields["prompt"], fields["completion"]
            if isinstance(prompt, str) and isinstance(completion, str):
                return self._prompted(_unicode("prompt", prompt), _string("completion", completion))
            before = _messages("prompt", prompt)
            return self._chat([*before, *_messages("completion", completion)], len(before), fields)
        if "text" in fields:
            return self._text(_string("text", fields["text"]))
        held = ", ".join(map(repr, fields)) or "none"
        raise DataError(f"has the fields {held}; expected 'text', 'prompt' and 'completion', or 'messages'")

    def _text(self, text: str) -> Encoding:
        ids = self._pieces(text).ids
        return self._ended(Encoding(ids, [True] * len(ids)))

    def _prompted(self, prompt: str, completion: str) -> Encoding:
        """Count the tokens that hold a character of the completion, and what the tokenizer adds after them."""
        pieces = self._pieces(prompt + completion, boundary=len(prompt))
        last = max((i for i, added in enumerate(pieces.added) if not added), default=-1)
        counted = [
            (end > len(prompt) and not added) or (added and i > last)
            for i, (end, added) in enumerate(zip(pieces.ends, pieces.added, strict=True))
        ]
        return self._ended(Encoding(pieces.ids, counted))

    def _ended(self, made: Encoding) -> Encoding:
        if self.end_id is None or (made.ids and made.ids[-1] == self.end_id):
            return made
        return Encoding([*made.ids, self.end_id], [*made.counted, True])

    def _chat(self, messages: Sequence[Mapping[str, Any]], first: int, fields: Mapping[str, Any]) -> Encoding:
        if not self.is_chat:
            raise DataError("is a chat, and the tokenizer has no chat template; give a tokenizer of transformers that has one")
        ids, counted = render_answers(self.tokenizer, messages, first, fields.get("tools"), self.answers)
        return Encoding(ids, counted)

    def _pieces(self, text: str, boundary: int | None = None) -> _Pieces:
        """Tokens of a text. A tokenizer that tells no positions must give those before `boundary` as a beginning."""
        if not self.is_chat:
            made = self.tokenizer.encode(text)
            return _Pieces(made.ids, [end for _, end in made.offsets], [bool(m) for m in made.special_tokens_mask])
        if self.tokenizer.is_fast:
            made = self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
            ends = [end for _, end in made["offset_mapping"]]
            return _Pieces(made["input_ids"], ends, [bool(m) for m in made["special_tokens_mask"]])
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        ends = [len(text)] * len(ids)
        if boundary:
            before = self.tokenizer(text[:boundary], add_special_tokens=False, verbose=False)["input_ids"]
            start = next((i for i in range(len(ids)) if ids[i : i + len(before)] == before), None)
            if start is None:
                raise DataError("has a prompt whose tokens are no beginning of the whole's; use a fast tokenizer")
            ends[: start + len(before)] = [boundary] * (start + len(before))
        return _Pieces(ids, ends, [False] * len(ids))


def _unbounded(tokenizer: Any) -> Any:
    """A copy of a tokenizer of `tokenizers` that neither pads nor cuts."""
    if tokenizer.truncation is None and tokenizer.padding is None:
        return tokenizer
    copy = type(tokenizer).from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _string(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise DataError(f"has {name} {shown(value)}; expected text that is not empty")
    return _unicode(name, value)


def _unicode(name: str, text: str) -> str:
    """The text, unless it holds halves of surrogate pairs, which JSON can write and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x} at character {error.start}"
        raise DataError(f"has {name} with half of a surrogate pair ({found}), which is no text; mend or remove it") from None
    return text


def _messages(name: str, value: object) -> Sequence[Mapping[str, Any]]:
    """The messages of a chat; `DataError` that says which one is wrong."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"has {name} {shown(value)}; expected a list of messages, each with 'role' and 'content'")
    for number, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"has message {number} of {name} {shown(message)}; expected an object with 'role' and 'content'")
        if message.get("content") is None and not message.get("tool_calls"):
            raise DataError(f"has no 'content' in message {number} of {name}, of role {message['role']!r}")
    return value
