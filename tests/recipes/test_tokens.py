"""Tokenizers that are trained, and those that are read."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.texts import tokens

from pipestill.errors import ConfigError
from pipestill.recipes import text
from pipestill.recipes.tokens import open_tokens, trained_tokens

pytest.importorskip("tokenizers")


def test_a_vocabulary_is_the_same_every_time() -> None:
    """The library numbers the characters it begins with by chance, and breaks ties by these numbers."""
    train = trained_tokens.__wrapped__  # without its cache
    one, *others = (train(text.embedded()[:8], 400).tokenizer.get_vocab() for _ in range(4))
    assert all(other == one for other in others)
    assert sum(token.startswith("##") for token in one) > 100


def test_tokens_come_back_as_text() -> None:
    made = tokens()
    assert (made.pad, made.cls, made.sep, made.mask) == (0, 2, 3, 4)
    assert made.size <= 150
    (ids,) = made.encode(["The quick dog"])
    assert made.tokenizer.decode(ids) == "the quick dog"


def test_a_tokenizer_file_is_read_and_what_it_lacks_is_said(tmp_path: Path) -> None:
    tokens().tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = open_tokens(str(tmp_path / "tokenizer.json"))
    assert (again.size, again.mask, again.encode(["brown fox"])) == (tokens().size, 4, tokens().encode(["brown fox"]))
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.WordPiece({"[PAD]": 0, "[UNK]": 1}, unk_token="[UNK]")).save(
        str(tmp_path / "bare.json")
    )
    with pytest.raises(ConfigError, match=r"lacks \[CLS\], \[SEP\], \[MASK\]"):
        open_tokens(str(tmp_path / "bare.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read the tokenizer"):
        open_tokens(str(tmp_path / "broken.json"))
