"""Tokenizers: trained on a text, or read from a file or a Hugging Face model."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipestill.errors import ConfigError
from pipestill.recipes.packages import needed

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CHARACTERS = 1_000  # most that a vocabulary begins with: writing of many signs is made of larger pieces


@dataclass(frozen=True)
class Tokens:
    """A tokenizer with the numbers of the tokens that BERT needs. `origin` is for messages."""

    tokenizer: Any
    origin: str
    size: int
    pad: int
    cls: int
    sep: int
    mask: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """List the tokens of each text, without [CLS] and [SEP]."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]


@lru_cache(maxsize=8)
def trained_tokens(texts: tuple[str, ...], vocab_size: int) -> Tokens:
    """Train a WordPiece vocabulary of lower-case text, of at most `vocab_size` tokens: the same for the same texts.

    The library numbers the characters that it begins with in an order of its own each time, and breaks ties by these
    numbers. So it is given them as tokens that are there already.
    """
    tokenizers = _tokenizers()
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    splitter = tokenizers.pre_tokenizers.BertPreTokenizer()
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for place, character in enumerate(word):
            characters[f"##{character}" if place else character] += count
    ranked = sorted(characters, key=lambda character: (-characters[character], character))
    begin = [*SPECIAL, *sorted(ranked[: min(_CHARACTERS, vocab_size - len(SPECIAL))])]

    def tokenizer(model: Any) -> Any:
        made = tokenizers.Tokenizer(model)
        made.normalizer, made.pre_tokenizer = normalizer, splitter
        made.decoder = tokenizers.decoders.WordPiece()
        return made

    trained = tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=begin, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    made = tokenizer(tokenizers.models.WordPiece(trained.get_vocab(), unk_token="[UNK]"))
    made.add_special_tokens(list(SPECIAL))
    return _tokens(made, "trained on the text", dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True)))


def open_tokens(path: str) -> Tokens:
    """Read a tokenizer from a tokenizer.json, or from the directory or hub name of a Hugging Face model."""
    if Path(path).is_file():
        tokenizers = _tokenizers()
        try:
            made = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # tokenizers raises plain Exception
            raise ConfigError(f"cannot read the tokenizer '{path}': {error}") from None
        return _tokens(made, f"'{path}'", {})
    from pipestill.recipes.language import from_pretrained

    fast = from_pretrained("AutoTokenizer", path, "tokenizer")
    made = getattr(fast, "backend_tokenizer", None)
    if made is None:
        raise ConfigError(f"the tokenizer '{path}' has no tokenizer.json; save it with a fast tokenizer's save_pretrained")
    made.no_padding()
    made.no_truncation()
    names = {name: getattr(fast, f"{name}_token") for name in ("pad", "cls", "sep", "mask")}
    return _tokens(made, f"'{path}'", {name: token for name, token in names.items() if token is not None})


def _tokens(made: Any, origin: str, names: dict[str, str]) -> Tokens:
    usual = {"pad": ("[PAD]", "<pad>"), "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>")}
    numbers: dict[str, int] = {}
    for name, known in usual.items():
        found = [made.token_to_id(token) for token in ((names[name],) if name in names else known)]
        if present := [number for number in found if number is not None]:
            numbers[name] = present[0]
    if missing := [known[0] for name, known in usual.items() if name not in numbers]:
        raise ConfigError(f"the tokenizer {origin} lacks {', '.join(missing)}, which masked language models need")
    return Tokens(made, origin, made.get_vocab_size(), **numbers)


def _tokenizers() -> Any:
    return needed("tokenizers", "text is read with tokenizers", "tokenizers")
