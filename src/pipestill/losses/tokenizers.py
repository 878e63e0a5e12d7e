"""Checks that two tokenizers are one: logits of words can be compared only where each index is the same word."""

from typing import Any

from pipestill.errors import ConfigError

_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n\treturn [1, 2.50, 'naïve café', 1234567]",
    "  Ünïcode: 日本語, Ελληνικά — “quotes” 🙂  ",
)
"""Texts that tokenizers with the same words may still divide in different ways."""


def check_same_tokenizer(teacher_tokenizer: Any, student_tokenizer: Any) -> int:
    """Refuse two tokenizers that differ in a word, or divide a text in another way; return how many words they know.

    That number is what losses take as `vocabulary`, where the models have more logits than the tokenizer has words.

    Args:
        teacher_tokenizer: the tokenizer of the teacher: one of `transformers`, or a `tokenizers.Tokenizer`.
        student_tokenizer: the tokenizer of the student.

    Raises:
        ConfigError: they differ; names the first word that does, by its number.
    """
    teacher, student = (_words(name, one) for name, one in (("teacher", teacher_tokenizer), ("student", student_tokenizer)))
    for number in sorted(teacher.keys() | student.keys()):
        ours, theirs = student.get(number), teacher.get(number)
        if ours != theirs:
            raise ConfigError(
                f"the tokenizers differ: token {number} is {_shown(theirs)} for the teacher and {_shown(ours)} for the student "
                f"({len(teacher)} and {len(student)} tokens); logits can be compared only between models of one tokenizer, so "
                "choose another pair, or a loss of hidden states"
            )
    for text in _PROBES:
        divided = [_ids(one, text) for one in (teacher_tokenizer, student_tokenizer)]
        if divided[0] != divided[1]:
            at = next((i for i, (a, b) in enumerate(zip(*divided, strict=False)) if a != b), min(map(len, divided)))
            theirs, ours = (
                words.get(ids[at]) if at < len(ids) else None for words, ids in zip((teacher, student), divided, strict=True)
            )
            raise ConfigError(
                f"the tokenizers have the same words, but divide {text!r} in two ways: token {at} is {_shown(theirs)} for the "
                f"teacher and {_shown(ours)} for the student; give both models the ids of one tokenizer"
            )
    return max(teacher, default=-1) + 1


def _words(role: str, tokenizer: Any) -> dict[int, str]:
    """A tokenizer's words by number."""
    if not callable(getattr(tokenizer, "get_vocab", None)) or not callable(getattr(tokenizer, "encode", None)):
        raise ConfigError(
            f"the {role}'s tokenizer is {type(tokenizer).__name__}; expected one of transformers or tokenizers, with get_vocab() "
            "and encode(text)"
        )
    return {number: word for word, number in tokenizer.get_vocab().items()}


def _ids(tokenizer: Any, text: str) -> list[int]:
    encoded = tokenizer.encode(text)
    return list(getattr(encoded, "ids", encoded))


def _shown(word: str | None) -> str:
    return "missing" if word is None else repr(word)
