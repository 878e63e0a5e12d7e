"""Distil a BERT into a DistilBERT of fewer layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader

from pipestill import losses
from pipestill.arguments import raise_problems
from pipestill.lr_schedules import linear
from pipestill.model.seeding import derive
from pipestill.recipes import language
from pipestill.recipes.distillation import DistillationWorkload
from pipestill.recipes.image_recipe import problems_of
from pipestill.recipes.language import Sizes
from pipestill.recipes.masking import Masking, fixed
from pipestill.recipes.sequences import ByLengthSampler, Sequences, cut_corpus
from pipestill.recipes.text import open_text
from pipestill.recipes.tokens import Tokens, open_tokens, trained_tokens
from pipestill.recipes.training import Training, warmed_up, without_decay
from pipestill.runtime.world import in_main_process

RANDOM = "random"
_ADAM = {"betas": (0.9, 0.98), "eps": 1e-6}
_PADDING = 128  # most tokens that a model's vocabulary may have beyond its tokenizer's, to be a round number


@dataclass(frozen=True)
class Preset:
    """Sizes of both models, and how long to train."""

    layers: int
    student_layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    vocab_size: int
    max_length: int
    positions: int
    batch_size: int
    epochs: int
    lr: float
    dropout: float


PRESETS = {
    "reference": Preset(4, 2, 128, 4, 512, 2_000, 64, 64, 16, 4, 1e-3, 0.0),
    "bert-base": Preset(12, 6, 768, 12, 3072, 30_522, 512, 512, 24, 3, 5e-4, 0.1),
    "bert-large": Preset(24, 12, 1024, 16, 4096, 30_522, 512, 512, 24, 3, 5e-4, 0.1),
}
"""An embedded one; BERT-base -> DistilBERT (Sanh et al. 2019); BERT-large -> DistilBERT-large (TSPipe, Lim et al. 2022)."""

_OF_THE_TEACHER = ("layers", "hidden_size", "heads", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class DistilBert:
    """Distil a BERT into a DistilBERT by its softened logits, masked tokens and last hidden states.

    By default a small BERT is trained first, on the Python language reference that ships with CPython. What is not given is
    the preset's, shown by --print_config.

    Args:
        preset: sizes, batch and epochs: reference (a small BERT on embedded text), or those published for bert-base and
            bert-large
        teacher_model: directory or hub name of a BERT to distil, which brings its sizes and its tokenizer; without it, the
            published presets distil a teacher of random weights, which shows speed and teaches nothing
        student_model: directory or hub name of a DistilBERT to start from (default: a student that starts from layers of the
            teacher)
        data: a text file, a folder of .txt files, or a dataset saved with save_to_disk (default: the language reference of
            Python)
        tokenizer: a tokenizer.json, or directory or hub name of a tokenizer (default: the teacher model's, or one trained on the
            text)
        vocab_size: tokens that the models know, and the most that a tokenizer trained here may have
        max_length: most tokens of a sequence
        group_by_length: make batches of sequences of similar length and pad them to the longest; else all are padded to
            max_length
        mask_probability: fraction of the tokens that are masked, to be predicted
        layers: layers of the teacher
        student_layers: layers of the student (default with a teacher_model: half as many as it has)
        hidden_size: width of the hidden states of both models
        heads: attention heads of each layer
        intermediate_size: units in the feed-forward network of each layer
        dropout: fraction of units and of attention that both models drop while they train
        temperature: temperature T that softens the logits of both models
        soft_target_weight: weight of T^2 KL(teacher, student) over all tokens
        cross_entropy_weight: weight of the cross entropy with the masked tokens
        cosine_weight: weight of 1 - cosine similarity of the last hidden states
        freeze_positions: leave the student's position embeddings as the teacher's are
        tie_embeddings: let the output layer share the weights of the embeddings, whose gradients stages then exchange
        batch_size: sequences of one update
        epochs: passes over the data for the student, with and without a teacher
        teacher_epochs: passes over the data for a teacher that is trained here
        lr: highest learning rate of the student; it rises in the warm-up and then falls evenly to 0
        teacher_lr: highest learning rate of a teacher that is trained here; it rises in the warm-up and then falls evenly to 0
        warm_up: fraction of the steps in which learning rates rise
        weight_decay: AdamW's decay of matrices; biases and norms have none
    """

    name: ClassVar[str] = "distilbert"
    run_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"microbatches": 4})  # batches are small

    # None stands for the preset's value, which replaces it at once, or for the teacher model's.
    preset: Literal["reference", "bert-base", "bert-large"] = "reference"
    teacher_model: str | None = None
    student_model: str | None = None
    data: str | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    max_length: int = None  # type: ignore[assignment]
    group_by_length: bool = True
    mask_probability: float = 0.15
    layers: int | None = None
    student_layers: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    intermediate_size: int | None = None
    dropout: float = None  # type: ignore[assignment]
    temperature: float = 2.0
    soft_target_weight: float = 5.0
    cross_entropy_weight: float = 2.0
    cosine_weight: float = 1.0
    freeze_positions: bool = True
    tie_embeddings: bool = False
    batch_size: int = None  # type: ignore[assignment]
    epochs: int = None  # type: ignore[assignment]
    teacher_epochs: int = 8
    lr: float = None  # type: ignore[assignment]
    teacher_lr: float = 1e-3
    warm_up: float = 0.05
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        """Raise `ConfigError` with everything that cannot be."""
        theirs = set(_OF_THE_TEACHER) if self.teacher_model is not None else set()
        problems = [
            f"{name} is {getattr(self, name)}, but it is that of the teacher_model; leave it out"
            for name in _OF_THE_TEACHER
            if name in theirs and getattr(self, name) is not None
        ]
        if theirs:
            theirs.add("student_layers")
        for name, value in vars(PRESETS[self.preset]).items() if not problems else ():
            if name in vars(self) and name not in theirs and getattr(self, name) is None:
                object.__setattr__(self, name, value)
        raise_problems(problems or self._problems())

    def _problems(self) -> list[str]:
        least = {
            "vocab_size": 100, "max_length": 8, "layers": 1, "student_layers": 1, "hidden_size": 2, "heads": 1,
            "intermediate_size": 1, "batch_size": 1, "epochs": 1, "teacher_epochs": 1,
        }  # fmt: skip
        weights = ("soft_target_weight", "cross_entropy_weight", "cosine_weight")
        problems = problems_of(self, least, ("dropout", "warm_up"), ("temperature", "lr", "teacher_lr"))
        problems += [
            f"{name} is {getattr(self, name)}; expected 0 or more"
            for name in (*weights, "weight_decay")
            if not getattr(self, name) >= 0
        ]
        if not any(getattr(self, name) for name in weights):
            problems.append(f"{', '.join(weights)} are all 0; expected one that is more")
        if not 0.0 < self.mask_probability < 1.0:
            problems.append(f"mask_probability is {self.mask_probability}; expected more than 0 and less than 1")
        if self.hidden_size and self.heads and self.heads > 0 and self.hidden_size % self.heads:
            problems.append(f"hidden_size is {self.hidden_size}, which {self.heads} heads do not divide")
        if self.layers and self.student_layers and self.student_layers > self.layers and self.student_model is None:
            problems.append(f"student_layers is {self.student_layers}, more than the teacher's {self.layers}")
        return problems

    def workload(self, seed: int, num_samples: int | None = None) -> DistillationWorkload:
        """Build models, batches of text and trainings. Raises `DataError` and `ConfigError` for what does not fit."""
        teacher, student = self.sizes()
        corpus = open_text(self.data, seed)
        tokens = self.tokens(corpus.train)
        self._check(teacher, student, tokens)
        train, test = cut_corpus(corpus, tokens, self.max_length)
        masking = Masking(tokens, self.max_length, self.mask_probability, self.group_by_length)
        seen = train if num_samples is None else train.first(num_samples)
        published = self.teacher_model is not None or self.preset != "reference"
        common: dict[str, Any] = {"dropout": self.dropout, "pad": tokens.pad}
        return DistillationWorkload(
            build_teacher=partial(self._teacher, teacher, published, common, derive(seed, "teacher")),
            build_student=partial(language.distilbert, student, **common, tied=self.tie_embeddings, seed=derive(seed, "student")),
            loss=losses.MaskedDistillation(
                self.temperature, self.soft_target_weight, self.cross_entropy_weight, self.cosine_weight
            ),
            supervised_loss=losses.cross_entropy,
            metrics={"cross_entropy": losses.cross_entropy, "accuracy": losses.accuracy, "perplexity": losses.perplexity},
            train_loader=self._loader(seen, masking),
            validation_loader=DataLoader(fixed(test, masking, 2 * self.batch_size, seed), batch_size=None),  # type: ignore[arg-type]
            teacher_training=self._training(self.teacher_epochs, self.teacher_lr),
            student_training=self._training(self.epochs, self.lr),
            length_axis=1 if self.group_by_length else None,
            prepare=self._prepare,
            teacher_origin=(self.teacher_model or RANDOM) if published else None,
        )

    def sizes(self) -> tuple[Sizes, Sizes]:
        """Find the sizes of the teacher and of the student."""
        if self.teacher_model is not None:
            teacher = language.read_sizes(self.teacher_model)
        else:
            assert self.layers and self.hidden_size and self.heads and self.intermediate_size and self.vocab_size
            positions = max(PRESETS[self.preset].positions, self.max_length)
            teacher = Sizes(self.layers, self.hidden_size, self.heads, self.intermediate_size, self.vocab_size, positions)
        if self.student_model is not None:
            return teacher, language.read_student_sizes(self.student_model)
        fewer = self.student_layers or max(1, teacher.layers // 2)
        return teacher, Sizes(fewer, *list(vars(teacher).values())[1:])

    def tokens(self, texts: tuple[str, ...]) -> Tokens:
        """Open the tokenizer that is given, or else the teacher model's, or train one on `texts`."""
        given = self.tokenizer or self.teacher_model
        if given is not None:
            return open_tokens(given)
        assert self.vocab_size is not None
        return trained_tokens(texts, self.vocab_size)

    def _check(self, teacher: Sizes, student: Sizes, tokens: Tokens) -> None:
        """Raise `ConfigError` with everything about models and tokens that does not fit together."""
        problems = []
        if tokens.size > teacher.vocab_size:
            problems.append(
                f"the tokenizer {tokens.origin} has {tokens.size} tokens, the teacher's vocabulary {teacher.vocab_size}"
                + ("; give --vocab_size" if self.teacher_model is None else "; give the tokenizer that it was trained with")
            )
        elif self.teacher_model is not None and tokens.size + _PADDING <= teacher.vocab_size:
            problems.append(
                f"the tokenizer {tokens.origin} has {tokens.size} tokens, the vocabulary of the teacher "
                f"'{self.teacher_model}' {teacher.vocab_size}; give the tokenizer that it was trained with"
            )
        if student.vocab_size != teacher.vocab_size:
            problems.append(
                f"the student '{self.student_model}' has a vocabulary of {student.vocab_size} tokens and the teacher of "
                f"{teacher.vocab_size}; their logits cannot be compared, so choose models of one tokenizer"
            )
        if student.hidden_size != teacher.hidden_size and self.cosine_weight:
            problems.append(
                f"the student's hidden states have {student.hidden_size} features and the teacher's "
                f"{teacher.hidden_size}; choose models of one width, or --cosine_weight 0"
            )
        if self.student_model is None and student.layers > teacher.layers:
            problems.append(f"student_layers is {student.layers}, more than the teacher's {teacher.layers}")
        problems += [
            f"max_length is {self.max_length}, but the {role} has positions for {sizes.positions} tokens"
            for role, sizes in (("teacher", teacher), ("student", student))
            if sizes.positions < self.max_length
        ]
        raise_problems(problems)

    def _loader(self, data: Sequences, masking: Masking) -> DataLoader[Any]:
        sampler = ByLengthSampler(data.lengths(), self.batch_size) if self.group_by_length else None
        return DataLoader(data, batch_size=self.batch_size, sampler=sampler, shuffle=sampler is None, collate_fn=masking)

    def _training(self, epochs: int, lr: float) -> Training:
        options = {**_ADAM, "weight_decay": self.weight_decay}
        return Training(epochs, torch.optim.AdamW, lr, options, warmed_up(linear, self.warm_up), without_decay)

    def _teacher(self, sizes: Sizes, published: bool, common: Mapping[str, Any], seed: int) -> nn.Module:
        if self.teacher_model is not None:
            model: nn.Module = language.from_pretrained("BertForMaskedLM", self.teacher_model, "teacher")
            return model
        if published and in_main_process():
            language.warn_of_random_teacher(self.preset)
        return language.bert(sizes, **common, tied=published or self.tie_embeddings, seed=seed)

    def _prepare(self, teacher: nn.Module, student: nn.Module) -> None:
        """Initialise the student. Only now are positions frozen: without a teacher, they have to be learnt."""
        if self.student_model is not None:
            language.load_student(self.student_model, student)
        else:
            language.start_from_teacher(teacher, student)
        if self.freeze_positions:
            language.freeze_positions(student)
