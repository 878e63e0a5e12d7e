"""Chats as tokens, by the tokenizer's own template, of which only the answers count."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pipestill.errors import DataError

_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
Messages = Sequence[Mapping[str, Any]]


def render_answers(
    tokenizer: Any, messages: Messages, first: int, tools: Any, answers: Literal["all", "last"]
) -> tuple[list[int], list[bool]]:
    """Tokens of a chat, and which of them are of an answer: a message of the role "assistant".

    A template that marks what a model generates (`{% generation %}`) says so itself. With any other template, an answer is what
    the chat up to it has more than the chat before it with the prompt to answer. That is right only where the one is the
    beginning of the other and both are of the whole chat, which is checked token by token.

    Args:
        tokenizer: a tokenizer of `transformers`.
        messages: the chat.
        first: the number of the first message that may count.
        tools: what the template is told of tools; None for none.
        answers: "all" answers count, or the "last" one only.

    Raises:
        DataError: there is no answer or no template, or the template does not tell which tokens are of the answers.
    """
    numbers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
    if not numbers:
        raise DataError("has no message of role 'assistant', so that nothing of it would count")
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("is a chat, and the tokenizer has no chat template; set tokenizer.chat_template")
    template = _Template(tokenizer, tools)
    if _GENERATION.search(tokenizer.get_chat_template(tools=tools)) and tokenizer.is_fast:
        return _marked(template, messages, first, answers)
    ids = template.render(messages)
    counted = [False] * len(ids)
    for number in numbers if answers == "all" else numbers[-1:]:
        start, end = _answer(template, messages, number, ids, to_the_end=number == len(messages) - 1)
        for place in range(start, _after_last(ids, tokenizer.eos_token_id, start, end)):
            counted[place] = True
    return ids, counted


def _marked(
    template: "_Template", messages: Messages, first: int, answers: Literal["all", "last"]
) -> tuple[list[int], list[bool]]:
    """Tokens and marks by the template's own generation mask."""
    made = template.call(messages, return_assistant_tokens_mask=True)
    ids, counted = list(made["input_ids"]), [bool(mark) for mark in made["assistant_masks"]]
    if first:
        before = template.render(messages[:first])
        template.check_beginning(before, ids, f"the first {first} messages", "the whole chat")
        counted[: len(before)] = [False] * len(before)
    if answers == "last":
        end = max((i + 1 for i, mark in enumerate(counted) if mark), default=0)
        start = max((i + 1 for i, mark in enumerate(counted[:end]) if not mark), default=0)
        counted[:start] = [False] * start
    if not any(counted):
        raise DataError("has an answer of which the chat template marks no token as generated; mend its {% generation %} marks")
    return ids, counted


def _answer(template: "_Template", messages: Messages, number: int, ids: list[int], to_the_end: bool) -> tuple[int, int]:
    """Where the tokens of one answer are among those of the whole chat."""
    before = template.render(messages[:number], add_generation_prompt=True)
    template.check_beginning(before, ids, f"the chat before message {number}, with the prompt to answer", "the whole chat")
    if to_the_end:
        return len(before), len(ids)
    after = template.render(messages[: number + 1])
    template.check_beginning(after, ids, f"the chat up to message {number}", "the whole chat")
    if len(after) < len(before):
        raise DataError(f"has message {number} of which the chat template writes no token")
    return len(before), len(after)


def _after_last(ids: Sequence[int], token: int | None, start: int, end: int) -> int:
    """The place after the last `token` in a range, or its end: a model that generates stops at it, so the rest is no answer."""
    return next((place + 1 for place in range(end - 1, start - 1, -1) if ids[place] == token), end)


class _Template:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Any, tools: Any) -> None:
        self.tokenizer = tokenizer
        self.tools = tools

    def call(self, messages: Messages, **options: Any) -> Mapping[str, Any]:
        """Tokens of messages; `DataError` where the template refuses them."""
        try:
            made: Mapping[str, Any] = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tools=self.tools, tokenize=True, return_dict=True, **options
            )
        except Exception as error:  # templates raise what their writers chose
            raise DataError(f"is a chat that the template refuses: {type(error).__name__}: {error}") from None
        return made

    def render(self, messages: Messages, **options: Any) -> list[int]:
        return list(self.call(messages, **options)["input_ids"])

    def check_beginning(self, short: list[int], long: list[int], what: str, whole: str) -> None:
        """Raise `DataError` with the first token that differs where `short` is no beginning of `long`."""
        if long[: len(short)] == short:
            return
        place = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), min(len(short), len(long)))
        ours, theirs = (repr(self.tokenizer.decode(ids[place : place + 1])) for ids in (short, long))
        raise DataError(
            f"is a chat whose answers cannot be told apart: by the template, {what} is no beginning of {whole} (token {place} is "
            f"{ours}, and {theirs} in the whole); mark answers in the template with {{% generation %}}, or use answers='last'"
        )
