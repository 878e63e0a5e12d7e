"""BERT teachers and DistilBERT students, of transformers' ordinary classes."""

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipestill.errors import ConfigError
from pipestill.model.seeding import seeded
from pipestill.recipes.packages import needed


@dataclass(frozen=True)
class Sizes:
    """Sizes of a BERT: layers, their width, heads and units between, vocabulary, and most tokens of a sequence."""

    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    vocab_size: int
    positions: int


def transformers() -> Any:
    """Import the library; `ConfigError` where it is missing."""
    return needed("transformers", "language models are those of transformers", "'transformers>=5.20'")


def from_pretrained(kind: str, path: str, what: str, **options: Any) -> Any:
    """Read an object of transformers' class `kind` from a directory or by a hub name; `ConfigError` where there is none."""
    library = transformers()
    local = Path(path).exists() or path.startswith((".", "/", "~"))
    if local and not Path(path).is_dir():
        raise ConfigError(f"no directory '{path}' with a {what}; pass one that save_pretrained wrote, or a hub name")
    try:
        return getattr(library, kind).from_pretrained(path, **options)
    except Exception as error:  # transformers, the hub's client and safetensors each raise kinds of their own
        raise ConfigError(f"cannot read the {what} '{path}': {' '.join(str(error).split())[:300]}") from None


def read_sizes(path: str) -> Sizes:
    """Read the sizes of a saved BERT; `ConfigError` for a model of another family."""
    config = _config(path, "teacher", "bert")
    return Sizes(
        config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.intermediate_size,
        config.vocab_size, config.max_position_embeddings,
    )  # fmt: skip


def read_student_sizes(path: str) -> Sizes:
    """Read the sizes of a saved DistilBERT; `ConfigError` for a model of another family."""
    config = _config(path, "student", "distilbert")
    return Sizes(
        config.n_layers, config.dim, config.n_heads, config.hidden_dim, config.vocab_size, config.max_position_embeddings
    )


def _config(path: str, role: str, family: str) -> Any:
    """Read the config of a saved model of a family; `ConfigError` for one of another."""
    config = from_pretrained("AutoConfig", path, role)
    if config.model_type != family:
        raise ConfigError(f"the {role} '{path}' is a model of type '{config.model_type}'; expected '{family}'")
    return config


def load_student(path: str, student: nn.Module) -> None:
    """Give a DistilBERT the weights of a saved one of its sizes, in place."""
    student.load_state_dict(from_pretrained("DistilBertForMaskedLM", path, "student").state_dict())


def bert(sizes: Sizes, *, dropout: float, pad: int, tied: bool, seed: int) -> nn.Module:
    """A BERT for masked tokens, initialised from `seed`. `tied`: its output layer shares the embeddings' weights."""
    library = transformers()
    config = library.BertConfig(
        vocab_size=sizes.vocab_size, hidden_size=sizes.hidden_size, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, intermediate_size=sizes.intermediate_size,
        max_position_embeddings=sizes.positions, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        pad_token_id=pad, tie_word_embeddings=tied,
    )  # fmt: skip
    made: nn.Module = seeded(seed, lambda: library.BertForMaskedLM(config))
    head: Any = made.get_submodule("cls.predictions")
    if head.bias is not head.decoder.bias:
        head.bias.requires_grad_(False)  # read by nothing where nothing is tied
    return made


def distilbert(sizes: Sizes, *, dropout: float, pad: int, tied: bool, seed: int) -> nn.Module:
    """A DistilBERT for masked tokens, initialised from `seed`. `tied`: its output layer shares the embeddings' weights."""
    library = transformers()
    config = library.DistilBertConfig(
        vocab_size=sizes.vocab_size, dim=sizes.hidden_size, n_layers=sizes.layers, n_heads=sizes.heads,
        hidden_dim=sizes.intermediate_size, max_position_embeddings=sizes.positions, dropout=dropout,
        attention_dropout=dropout, pad_token_id=pad, tie_word_embeddings=tied,
    )  # fmt: skip
    return seeded(seed, lambda: library.DistilBertForMaskedLM(config))  # type: ignore[no-any-return]


def spread(layers: int, fewer: int) -> list[int]:
    """List the layers that a smaller model takes: the first, the last and others evenly between (0, 2, 4, 7, 9, 11 of 12)."""
    return [round(i * (layers - 1) / max(1, fewer - 1)) for i in range(fewer)]


@torch.no_grad()
def start_from_teacher(teacher: Any, student: Any) -> None:
    """Initialise a DistilBERT from a BERT of its width, in place: embeddings, some of the layers (see `spread`) and the head.

    DistilBERT has no table of token types, so that of type 0, which all tokens here are of, is added to the positions'. With
    as many layers, the student then does what the teacher does (Sanh et al. 2019, section 3).
    """
    ours, theirs = student.distilbert, teacher.bert
    words, there = ours.embeddings, theirs.embeddings
    words.word_embeddings.weight.copy_(there.word_embeddings.weight)
    positions = there.position_embeddings.weight[: len(words.position_embeddings.weight)]
    words.position_embeddings.weight.copy_(positions + there.token_type_embeddings.weight[0])
    words.LayerNorm.load_state_dict(there.LayerNorm.state_dict())
    taken = spread(len(theirs.encoder.layer), len(ours.transformer.layer))
    for mine, number in zip(ours.transformer.layer, taken, strict=True):
        layer = theirs.encoder.layer[number]
        for module, source in (
            (mine.attention.q_lin, layer.attention.self.query), (mine.attention.k_lin, layer.attention.self.key),
            (mine.attention.v_lin, layer.attention.self.value), (mine.attention.out_lin, layer.attention.output.dense),
            (mine.sa_layer_norm, layer.attention.output.LayerNorm), (mine.ffn.lin1, layer.intermediate.dense),
            (mine.ffn.lin2, layer.output.dense), (mine.output_layer_norm, layer.output.LayerNorm),
        ):  # fmt: skip
            module.load_state_dict(source.state_dict())
    head = teacher.cls.predictions
    student.vocab_transform.load_state_dict(head.transform.dense.state_dict())
    student.vocab_layer_norm.load_state_dict(head.transform.LayerNorm.state_dict())
    student.vocab_projector.weight.copy_(head.decoder.weight)
    student.vocab_projector.bias.copy_(head.decoder.bias)


def freeze_positions(student: Any) -> None:
    """Keep the position embeddings as they are."""
    student.distilbert.embeddings.position_embeddings.weight.requires_grad_(False)


@cache
def warn_of_random_teacher(preset: str) -> None:
    """Warn on stderr, once a process, of a teacher that teaches nothing."""
    print(
        f"warning: the teacher has random weights (preset {preset} without --teacher_model): this shows speed, and teaches "
        "the student nothing",
        file=sys.stderr,
    )
