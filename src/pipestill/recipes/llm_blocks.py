"""Replace the attentions and MLPs of a Llama-shaped model, block by block, and assemble the best model under a budget."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from pipestill import data, losses
from pipestill.errors import ConfigError
from pipestill.lr_schedules import cosine
from pipestill.model.seeding import derive
from pipestill.recipes import causal_data, causal_models
from pipestill.recipes.blockwise_recipe import BLOCK_LOSSES
from pipestill.recipes.causal_data import Batches
from pipestill.recipes.causal_models import Dtype, LlamaSizes
from pipestill.recipes.decoder_blocks import DecoderBlocksWorkload, task_of
from pipestill.recipes.decoder_candidates import KEEP, attention_problem, candidate, mlp_problem
from pipestill.recipes.decoder_parts import in_parts, real_hidden, replaced
from pipestill.recipes.image_recipe import problems_of
from pipestill.recipes.run_options import Numbers
from pipestill.recipes.training import Training, warmed_up, without_decay
from pipestill.recipes.weights import load_into

_SIZES = Numbers((4, 96, 4, 2, 256))
_ADAM: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8}


@dataclass(frozen=True)
class LlmBlocks:
    """Replace the attentions and MLPs of a Llama-shaped language model by smaller ones, block by block.

    Each candidate is trained alone to give what the teacher's block gives; all candidates of a block share one run of the
    teacher. Each is then scored in the teacher by itself. The best choice under a budget makes the student, which is then, unless
    fine_tuning_epochs is 0, distilled end to end. By default a small Llama is trained first, on the Python language reference.

    Args:
        teacher_model: directory or hub name of a Llama-shaped causal language model (Llama, Mistral, Qwen2, Qwen3), which brings
            its tokenizer
        teacher_dtype: type of the weights of a teacher_model; auto is that of its files
        teacher_sizes: layers, width, attention heads, heads of keys and values, and units of the MLP of a teacher made here
        data: JSON lines, a text file, a folder of .txt files, or a dataset saved with save_to_disk (default: the language
            reference of Python)
        validation: data to test with, in any form that data may have (default: the dataset's own split, else a tenth of the data)
        tokenizer: directory or hub name of a tokenizer, or a tokenizer.json (default: the teacher_model's, else one trained on
            the data)
        vocab_size: tokens that a teacher made here knows, and the most that a tokenizer trained here may have
        max_length: tokens of a packed row
        blocks: make one block of a layer's attention and one of its MLP (halves), or one of each layer
        attention: replacements of an attention, with commas between: linear, grouped-N (N heads of keys and values) or skip; none
            leaves all as they are
        mlp: replacements of an MLP, with commas between: 1/N (one of N units) or skip; none leaves all as they are
        block_loss: loss of each block's hidden states: mean squared error, that relative to the teacher's, or 1 - cosine
        budget: most that the chosen blocks may cost, as a fraction of the teacher's
        budget_of: measure of a block's cost: its parameters, or the seconds of its forward
        score_rows: rows of the training data on which candidates are scored
        temperature: temperature T that softens the logits of both models in the fine-tuning
        kd_ratio: weight of KL(teacher, student) in the fine-tuning; the cross entropy with the labels weighs the rest
        batch_size: rows of one update
        epochs: passes over the data for the blocks
        teacher_epochs: passes over the data for a teacher that is trained here
        fine_tuning_epochs: passes over the data end to end, after the blocks; 0 for none. The student without a teacher is
            trained for epochs and fine_tuning_epochs together
        lr: highest learning rate of the blocks; each rises in the warm-up and then falls along a cosine
        teacher_lr: highest learning rate of a teacher that is trained here, and of the student without a teacher
        fine_tuning_lr: highest learning rate of the fine-tuning
        warm_up: fraction of the steps in which learning rates rise
        weight_decay: AdamW's decay of matrices; norms and biases have none
    """

    name: ClassVar[str] = "llm-blocks"
    run_defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"strategy": "balanced", "microbatches": 2})

    teacher_model: str | None = None
    teacher_dtype: Dtype = "float32"
    teacher_sizes: Numbers = _SIZES
    data: str | None = None
    validation: str | None = None
    tokenizer: str | None = None
    vocab_size: int = 800
    max_length: int = 128
    blocks: Literal["halves", "layers"] = "halves"
    attention: str = "linear,grouped-1"
    mlp: str = "1/2,1/4"
    block_loss: Literal["mse", "normalised", "cosine"] = "normalised"
    budget: float = 0.5
    budget_of: Literal["parameters", "seconds"] = "parameters"
    score_rows: int = 64
    temperature: float = 1.0
    kd_ratio: float = 0.9
    batch_size: int = 8
    epochs: int = 1
    teacher_epochs: int = 5
    fine_tuning_epochs: int = 1
    lr: float = 2e-3
    teacher_lr: float = 4e-3
    fine_tuning_lr: float = 1e-3
    warm_up: float = 0.05
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        """Raise `ConfigError` with everything that cannot be."""
        least = {
            "vocab_size": 261, "max_length": 2, "score_rows": 1, "batch_size": 1, "epochs": 1, "teacher_epochs": 1,
            "fine_tuning_epochs": 0, "weight_decay": 0,
        }  # fmt: skip
        rates = ("budget", "temperature", "lr", "teacher_lr", "fine_tuning_lr")
        problems = problems_of(self, least, ("warm_up",), rates)
        if not 0.0 <= self.kd_ratio <= 1.0:
            problems.append(f"kd_ratio is {self.kd_ratio}; expected 0 to 1")
        given = ",".join(map(str, self.teacher_sizes))
        problems += [f"teacher_sizes is {given}; {problem}" for problem in LlamaSizes.problems(self.teacher_sizes)]
        attention, mlp = self._listed("attention"), self._listed("mlp")
        problems += [p for p in (*map(attention_problem, attention), *map(mlp_problem, mlp)) if p]
        if not attention and not mlp:
            problems.append("attention and mlp are none, so nothing is replaced; give candidates of one of them")
        if problems:
            raise ConfigError("; ".join(problems))

    def _listed(self, name: str) -> list[str]:
        """The candidates that an option names, each once."""
        given = getattr(self, name)
        return [] if given in ("none", "") else list(dict.fromkeys(part.strip() for part in given.split(",")))

    def names(self, parts: nn.Sequential) -> dict[str, list[str]]:
        """The names of the candidates for each part of a model that has some."""
        attention, mlp = self._listed("attention"), self._listed("mlp")
        both = [f"{a}+{m}" for a, m in product([KEEP, *attention], [KEEP, *mlp])][1:]
        listed = {"attention": attention, "mlp": mlp, "layer": both}
        found = {name: listed.get(name.partition("_")[0], []) for name, _ in parts.named_children()}
        return {name: several for name, several in found.items() if several}

    def workload(self, seed: int, num_samples: int | None = None) -> DecoderBlocksWorkload:
        """The teacher, the candidates, the data and how they are trained. Raises `DataError` and `ConfigError`."""
        texts = causal_data.open_texts(self.data, self.validation, seed)
        given = self.tokenizer or self.teacher_model
        tokenizer = (
            causal_data.open_tokenizer(given)
            if given
            else causal_data.trained_tokenizer(causal_data.strings(texts.train), self.vocab_size)
        )
        config = self._config(tokenizer)
        split = causal_data.examples(texts, tokenizer, self.max_length, "split", "all")
        collate = MarkedRows(data.PackCollator(self.max_length, causal_data.pad_of(tokenizer)))
        batches = Batches(True, self.max_length, causal_data.pad_of(tokenizer), self.batch_size)
        loader, tests = batches.loader(split.train, seed, num_samples), batches.test_loader(split.test)
        scored = Subset(loader.dataset, range(min(self.score_rows, len(loader.dataset))))  # type: ignore[arg-type]
        build = partial(self._teacher, config, derive(seed, "teacher"))
        names = self.names(build())
        block_loss = HiddenLoss(BLOCK_LOSSES[self.block_loss])
        tuning = self._training(self.fine_tuning_epochs, self.fine_tuning_lr)
        return DecoderBlocksWorkload(
            build=lambda: task_of(build(), names, block_loss),
            build_teacher=build,
            names=names,
            block_loss=block_loss,
            train_loader=DataLoader(loader.dataset, batch_size=self.batch_size, sampler=loader.sampler, collate_fn=collate),
            validation_loader=DataLoader(tests.dataset, batch_size=tests.batch_size, collate_fn=collate),
            score_loader=DataLoader(scored, batch_size=self.batch_size, collate_fn=collate),
            supervised_loss=losses.cross_entropy,
            metrics={"cross_entropy": losses.cross_entropy, "accuracy": losses.accuracy, "perplexity": losses.perplexity},
            pair_metrics={"agreement": losses.agreement},
            teacher_training=self._training(self.teacher_epochs, self.teacher_lr),
            student_training=self._training(self.epochs, self.lr),
            alone_training=self._training(self.epochs + self.fine_tuning_epochs, self.teacher_lr),
            fine_tuning=tuning if self.fine_tuning_epochs else None,
            fine_tuning_loss=losses.ForwardKL(self.temperature, kd_ratio=self.kd_ratio),
            budget=self.budget,
            budget_of=self.budget_of,
            teacher_origin=self.teacher_model,
            form={"config": config.to_dict(), "whole_layers": self.blocks == "layers"},
        )

    def _config(self, tokenizer: Any) -> Any:
        """The teacher's config; `ConfigError` where it does not fit the tokenizer or the length."""
        if self.teacher_model is None:
            config = causal_models.llama_config(LlamaSizes(*self.teacher_sizes), self.vocab_size, self.max_length, tokenizer)
        else:
            config = causal_models.read_config(self.teacher_model, "teacher")
        words, logits, positions = len(tokenizer), causal_models.vocab_size(config), causal_models.num_positions(config)
        problems = [] if words <= logits else [f"the tokenizer has {words} words and the teacher gives {logits} logits"]
        if positions is not None and positions < self.max_length:
            problems.append(f"max_length is {self.max_length}, but the teacher has positions for {positions} tokens")
        if problems:
            raise ConfigError("; ".join(problems))
        return config

    def _teacher(self, config: Any, seed: int) -> nn.Sequential:
        if self.teacher_model is None:
            return in_parts(causal_models.fresh(config, seed), self.blocks == "layers")
        model = causal_models.read_model(self.teacher_model, "teacher", self.teacher_dtype, seed)
        return in_parts(model, self.blocks == "layers")

    def _training(self, epochs: int, lr: float) -> Training:
        options = {**_ADAM, "weight_decay": self.weight_decay}
        return Training(epochs, torch.optim.AdamW, lr, options, warmed_up(cosine, self.warm_up), without_decay)


@dataclass(frozen=True)
class MarkedRows:
    """Packs rows, and marks which of their tokens are no padding."""

    pack: data.PackCollator

    def __call__(self, rows: Any) -> data.collate.Batch:
        """Make a batch."""
        inputs, targets = self.pack(rows)
        lengths = torch.tensor([sum(map(len, row)) for row in rows])
        return {**inputs, "real": torch.arange(self.pack.length) < lengths[:, None]}, targets


@dataclass(frozen=True)
class HiddenLoss:
    """A loss of hidden states, over the tokens that are no padding."""

    loss: losses.BlockLoss

    def __call__(self, student: Any, teacher: Any) -> torch.Tensor:
        """Compute the loss."""
        return self.loss(real_hidden(student), real_hidden(teacher))


def load(directory: str | Path) -> nn.Sequential:
    """Build the student that a run exported: from a batch's inputs to its `logits`.

    Args:
        directory: the run's folder `export`.
    """
    described = json.loads((Path(directory) / "config.json").read_text())
    config = causal_models.config_of(described["config"])
    parts = in_parts(causal_models.fresh(config, 0), described["whole_layers"])
    picks = described["blocks"]
    made = replaced(parts, lambda name, part: part if picks.get(name, KEEP) == KEEP else candidate(picks[name], part))
    load_into(made, Path(directory) / "model.safetensors")
    return made
