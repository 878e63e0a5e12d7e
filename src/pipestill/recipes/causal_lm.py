"""Distil a causal language model into a smaller one, token by token."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from pipestill import losses
from pipestill.errors import ConfigError
from pipestill.lr_schedules import cosine
from pipestill.model.seeding import derive
from pipestill.recipes import causal_data, causal_models, language
from pipestill.recipes.causal_data import Batches, Truncation
from pipestill.recipes.causal_models import Dtype, LlamaSizes
from pipestill.recipes.distillation import DistillationWorkload
from pipestill.recipes.image_recipe import problems_of
from pipestill.recipes.lora import ALL_LINEAR, Lora, save_merged
from pipestill.recipes.recipe import filled
from pipestill.recipes.run_options import Numbers
from pipestill.recipes.training import Training, warmed_up, without_decay
from pipestill.runtime.world import in_main_process

RANDOM = "random"
_ADAM: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}

LossName = Literal["forward_kl", "reverse_kl", "jsd", "total_variation", "top_k_kl", "logits_mse"]
LOSSES: dict[str, type[losses.LogitLoss]] = {
    "forward_kl": losses.ForwardKL, "reverse_kl": losses.ReverseKL, "jsd": losses.JSD,
    "total_variation": losses.TotalVariation, "top_k_kl": losses.TopKKL, "logits_mse": losses.LogitsMSE,
}  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """Sizes of both models, and how long to train. Sizes: layers, width, attention heads, heads of keys, units of the MLP."""

    teacher_sizes: tuple[int, ...]
    student_sizes: tuple[int, ...]
    vocab_size: int
    max_length: int
    batch_size: int
    teacher_epochs: int
    epochs: int
    lr: float
    teacher_lr: float


PRESETS = {
    "reference": Preset((4, 96, 4, 2, 256), (2, 48, 4, 2, 128), 800, 128, 8, 6, 4, 5e-3, 4e-3),
    "llama-8b": Preset((32, 4096, 32, 8, 14336), (16, 2048, 32, 8, 8192), 128_256, 2_048, 32, 1, 1, 1e-4, 1e-4),
}
"""An embedded pair; and Llama 3.1 8B -> the sizes of Llama 3.2 1B, to plan with: its batch, lengths and rates are usual ones."""


@dataclass(frozen=True)
class CausalLm:
    """Distil a causal language model of transformers into another, over the tokens that count.

    By default a small Llama is trained first, on the Python language reference that ships with CPython. With --teacher_model
    and --student_model, any two models of one tokenizer. What is not given is the preset's, shown by --print_config.

    Args:
        preset: sizes, batch and epochs: reference (a small pair on embedded text), or llama-8b (Llama 3.1 8B into the sizes of
            Llama 3.2 1B, with random weights: to plan with)
        teacher_model: directory or hub name of a causal language model to distil, which brings its tokenizer
        student_model: directory or hub name of the student; a directory that has a config and no weights gives random ones
        data: JSON lines of text, of prompts with completions or of chats; a text file, a folder of .txt files, or a dataset
            saved with save_to_disk (default: the language reference of Python)
        validation: data to test with, in any form that data may have (default: the dataset's own split, else a tenth of the data)
        tokenizer: directory or hub name of a tokenizer, or a tokenizer.json (default: the teacher_model's, else the
            student_model's, else one trained on the data)
        vocab_size: tokens that a teacher made here knows, and the most that a tokenizer trained here may have
        vocabulary: logits that are compared, the first ones (default: as many as the tokenizer has words, where one of two given
            models has more)
        max_length: most tokens of an example, and the tokens of a packed row
        truncate: split longer examples into several, cut off their end or start, drop or refuse them
        answers: which answers of a chat count
        packing: put several examples into one row, of which none attends to another; else rows are padded to similar lengths
        teacher_sizes: layers, width, attention heads, heads of keys and values, and units of the MLP of a teacher made here
        student_sizes: layers, width, attention heads, heads of keys and values, and units of the MLP of a student made here, a
            Llama of random weights
        student_layers: make the student of this many of the teacher's layers and of its other weights (default with a
            teacher_model: half of its layers). The student without a teacher starts from random weights
        loss: divergence of the two models' logits
        kd_ratio: weight of the divergence, 0 to 1; the cross entropy with the labels weighs the rest
        temperature: temperature T that softens the logits of both models, except in logits_mse
        beta: share of the teacher in the mixture of the loss jsd, 0 to 1
        top_k: classes that the loss top_k_kl compares one by one
        batch_size: rows of one update
        epochs: passes over the data for the student, with and without a teacher
        teacher_epochs: passes over the data for a teacher that is trained here
        lr: highest learning rate of the student; it rises in the warm-up and then falls along a cosine
        teacher_lr: highest learning rate of a teacher that is trained here, likewise
        warm_up: fraction of the steps in which learning rates rise
        weight_decay: AdamW's decay of matrices; norms and biases have none
        lora_rank: rank of the matrices that are trained beside a student_model's weights, which stay; 0 trains the weights
        lora_alpha: factor of these matrices' product, times the rank
        lora_dropout: fraction of their inputs that is dropped while they train
        lora_targets: names of the linear layers that have them, such as q_proj,v_proj
        teacher_dtype: type of the weights of a teacher_model; auto is that of its files
        student_dtype: type of the weights of a student_model
    """

    name: ClassVar[str] = "causal-lm"
    run_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"microbatches": 4})  # batches are small

    # None stands for the preset's value, which replaces it at once, or for what the models say.
    preset: Literal["reference", "llama-8b"] = "reference"
    teacher_model: str | None = None
    student_model: str | None = None
    data: str | None = None
    validation: str | None = None
    tokenizer: str | None = None
    vocab_size: int = None  # type: ignore[assignment]
    vocabulary: int | None = None
    max_length: int = None  # type: ignore[assignment]
    truncate: Truncation = "split"
    answers: Literal["all", "last"] = "all"
    packing: bool = True
    teacher_sizes: Numbers | None = None
    student_sizes: Numbers | None = None
    student_layers: int | None = None
    loss: LossName = "forward_kl"
    kd_ratio: float = 0.9
    temperature: float = 2.0
    beta: float = 0.5
    top_k: int = 64
    batch_size: int = None  # type: ignore[assignment]
    epochs: int = None  # type: ignore[assignment]
    teacher_epochs: int = None  # type: ignore[assignment]
    lr: float = None  # type: ignore[assignment]
    teacher_lr: float = None  # type: ignore[assignment]
    warm_up: float = 0.05
    weight_decay: float = 0.1
    lora_rank: int = 0
    lora_alpha: float = 2.0
    lora_dropout: float = 0.0
    lora_targets: str = ALL_LINEAR
    teacher_dtype: Dtype = "float32"
    student_dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Raise `ConfigError` with everything that cannot be."""
        problems = self._clashes()
        preset = dict(vars(PRESETS[self.preset]))
        if self.teacher_model is not None or self.student_layers is not None:
            preset["student_sizes"] = None
        if self.student_model is not None:
            preset["student_sizes"] = None
        if self.teacher_model is not None:
            preset["teacher_sizes"] = None
        filled(self, {name: value for name, value in preset.items() if value is not None})
        if problems := problems + self._problems():
            raise ConfigError("; ".join(problems))

    def _clashes(self) -> list[str]:
        """Options that say the same thing twice."""
        problems = []
        if self.teacher_model is not None and self.teacher_sizes is not None:
            problems.append("teacher_sizes are those of a teacher made here, and a teacher_model is given; leave one out")
        ways = [name for name in ("student_model", "student_sizes", "student_layers") if getattr(self, name) is not None]
        if len(ways) > 1:
            problems.append(f"{' and '.join(ways)} each say what the student is; give one of them")
        if self.lora_rank and self.student_model is None:
            problems.append("lora_rank is for a student_model, whose weights stay; give one, or leave out lora_rank")
        return problems

    def _problems(self) -> list[str]:
        least = {
            "vocab_size": 261, "vocabulary": 2, "max_length": 2, "student_layers": 1, "top_k": 1, "batch_size": 1, "epochs": 1,
            "teacher_epochs": 1, "lora_rank": 0, "weight_decay": 0,
        }  # fmt: skip
        problems = problems_of(self, least, ("warm_up", "lora_dropout"), ("temperature", "lr", "teacher_lr", "lora_alpha"))
        problems += [
            f"{name} is {getattr(self, name)}; expected 0 to 1"
            for name in ("kd_ratio", "beta")
            if not 0.0 <= getattr(self, name) <= 1.0
        ]
        for name in ("teacher_sizes", "student_sizes"):
            sizes = getattr(self, name)
            if sizes is not None:
                problems += [f"{name} is {','.join(map(str, sizes))}; {problem}" for problem in LlamaSizes.problems(sizes)]
        return problems

    def workload(self, seed: int, num_samples: int | None = None) -> DistillationWorkload:
        """The models, the data and how they are trained. Raises `DataError` and `ConfigError` for what does not fit."""
        texts = causal_data.open_texts(self.data, self.validation, seed)
        tokenizer = self._tokenizer(texts)
        teacher, student = self._configs(tokenizer)
        vocabulary = self._vocabulary(teacher, student, tokenizer)
        split = causal_data.examples(texts, tokenizer, self.max_length, self.truncate, self.answers)
        batches = Batches(self.packing, self.max_length, causal_data.pad_of(tokenizer), self.batch_size)
        made_here = self.teacher_model is None and self.preset == "reference"
        return DistillationWorkload(
            build_teacher=partial(self._teacher, teacher, derive(seed, "teacher")),
            build_student=partial(self._student, student, derive(seed, "student")),
            loss=self.divergence(vocabulary),
            supervised_loss=losses.cross_entropy,
            metrics={"cross_entropy": losses.cross_entropy, "accuracy": losses.accuracy, "perplexity": losses.perplexity},
            pair_metrics={"agreement": losses.agreement},
            train_loader=batches.loader(split.train, seed, num_samples),
            validation_loader=batches.test_loader(split.test),
            teacher_training=self._training(self.teacher_epochs, self.teacher_lr),
            student_training=self._training(self.epochs, self.lr),
            length_axis=None if self.packing else 1,
            prepare=causal_models.start_from_teacher if self._starts_from_teacher else None,
            teacher_origin=None if made_here else self.teacher_model or RANDOM,
            save=partial(_save, tokenizer),
            described={"data": split.figures()},
        )

    def divergence(self, vocabulary: int | None) -> losses.LogitLoss:
        """The distillation's loss."""
        own: dict[str, Any] = {"beta": self.beta} if self.loss == "jsd" else {"k": self.top_k} if self.loss == "top_k_kl" else {}
        if self.loss != "logits_mse":
            own["temperature"] = self.temperature
        return LOSSES[self.loss](kd_ratio=self.kd_ratio, vocabulary=vocabulary, **own)

    @property
    def _starts_from_teacher(self) -> bool:
        return self.student_model is None and self.student_sizes is None

    def _tokenizer(self, texts: causal_data.Texts) -> Any:
        """The tokenizer: as given, the models' (which is one), or trained on the data."""
        of_models = [path for path in (self.teacher_model, self.student_model) if path and causal_data.has_tokenizer(path)]
        if self.tokenizer is not None:
            return causal_data.open_tokenizer(self.tokenizer)
        if len(of_models) == 2:
            losses.check_same_tokenizer(*map(causal_data.open_tokenizer, of_models))
        if of_models:
            return causal_data.open_tokenizer(of_models[0])
        return causal_data.trained_tokenizer(causal_data.strings(texts.train), self.vocab_size)

    def _configs(self, tokenizer: Any) -> tuple[Any, Any]:
        """The configs of the teacher and of the student."""
        if self.teacher_model is not None:
            teacher = causal_models.read_config(self.teacher_model, "teacher")
        else:
            assert self.teacher_sizes is not None
            sizes = LlamaSizes(*self.teacher_sizes)
            teacher = causal_models.llama_config(sizes, self.vocab_size, self.max_length, tokenizer)
        if self.student_model is not None:
            return teacher, causal_models.read_config(self.student_model, "student")
        if self.student_sizes is not None:
            vocab_size = causal_models.vocab_size(teacher)
            return teacher, causal_models.llama_config(LlamaSizes(*self.student_sizes), vocab_size, self.max_length, tokenizer)
        return teacher, causal_models.with_fewer_layers(teacher, self.student_layers)

    def _vocabulary(self, teacher: Any, student: Any, tokenizer: Any) -> int | None:
        """How many logits are compared; `ConfigError` with everything about models and tokens that does not fit together."""
        words, problems = len(tokenizer), []
        for role, config in (("teacher", teacher), ("student", student)):
            size, positions = causal_models.vocab_size(config), causal_models.num_positions(config)
            if size < words:
                problems.append(
                    f"the tokenizer has {words} words and the {role} gives {size} logits; give the tokenizer that it was trained "
                    "with (--tokenizer)" if getattr(self, f"{role}_model") else f"the tokenizer has {words} words, more than "
                    f"vocab_size {size}; give --vocab_size {words}"
                )  # fmt: skip
            if positions is not None and positions < self.max_length:
                problems.append(f"max_length is {self.max_length}, but the {role} has positions for {positions} tokens")
        if problems:
            raise ConfigError("; ".join(dict.fromkeys(problems)))
        given = self.teacher_model is not None or self.student_model is not None
        padded = given and max(map(causal_models.vocab_size, (teacher, student))) > words
        return self.vocabulary or (words if padded else None)

    def _training(self, epochs: int, lr: float) -> Training:
        options = {**_ADAM, "weight_decay": self.weight_decay}
        return Training(epochs, torch.optim.AdamW, lr, options, warmed_up(cosine, self.warm_up), without_decay)

    def _teacher(self, config: Any, seed: int) -> nn.Module:
        if self.teacher_model is not None:
            return causal_models.read_model(self.teacher_model, "teacher", self.teacher_dtype, seed)
        if self.preset != "reference" and in_main_process():
            language.warn_of_random_teacher(self.preset)
        return causal_models.fresh(config, seed)

    def _student(self, config: Any, seed: int) -> nn.Module:
        if self.student_model is None:
            return causal_models.fresh(config, seed)
        model = causal_models.read_model(self.student_model, "student", self.student_dtype, seed)
        if not self.lora_rank:
            return model
        lora = Lora(self.lora_rank, self.lora_alpha * self.lora_rank, self.lora_dropout, self.lora_targets)
        return lora.wrap(model, derive(seed, "lora"))


def _save(tokenizer: Any, model: Any, directory: Path) -> None:
    """Write a model as `from_pretrained` reads it, LoRA added up."""
    (save_merged if hasattr(model, "merge_and_unload") else causal_models.save)(model, tokenizer, directory)
