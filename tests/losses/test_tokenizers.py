"""Two models' logits are compared only where they have one tokenizer."""

from __future__ import annotations

from typing import Any

import pytest

import pipestill as ps
from pipestill.losses import check_same_tokenizer


class Words:
    """A tokenizer of whole words; it marks their beginning with `prefix`."""

    def __init__(self, words: list[str], prefix: str = "") -> None:
        self.words = {word: number for number, word in enumerate(words)}
        self.prefix = prefix

    def get_vocab(self) -> dict[str, int]:
        return dict(reversed(self.words.items()))  # in no order, as transformers has it

    def encode(self, text: str) -> list[int]:
        return [self.words.get(self.prefix + word, 0) for word in text.split()]


WORDS = ["?", "The", "quick", "_The", "lazy"]


def test_one_tokenizer_has_a_number_of_words() -> None:
    assert check_same_tokenizer(Words(WORDS), Words(list(WORDS))) == 5


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (Words(["?", "The", "slow", "_The", "dull"]), r"token 2 is 'quick' for the teacher and 'slow' for the student \(5 and 5"),
        (Words(WORDS[:4]), r"token 4 is 'lazy' for the teacher and missing for the student \(5 and 4 tokens\)"),
        (Words([*WORDS, "<pad>"]), "token 5 is missing for the teacher and '<pad>' for the student"),
        (
            Words(WORDS, "_"),
            "divide 'The quick brown .*' in two ways: token 0 is 'The' for the teacher and '_The' for the student",
        ),
        (len, r"the student's tokenizer is builtin_function_or_method; expected one of transformers or tokenizers"),
    ],
)
def test_another_tokenizer_is_refused_with_the_first_token_that_differs(student: Any, message: str) -> None:
    with pytest.raises(ps.UserError, match=message):
        check_same_tokenizer(Words(WORDS), student)


def test_tokenizers_of_the_library_are_understood() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    kinds = [
        tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "?"))
        for words in (WORDS, ["?", "A"])
    ]
    assert check_same_tokenizer(kinds[0], kinds[0]) == 5
    with pytest.raises(ps.UserError, match="token 1 is 'The' for the teacher and 'A' for the student"):
        check_same_tokenizer(*kinds)
