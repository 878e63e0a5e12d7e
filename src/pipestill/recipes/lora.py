"""LoRA: a student whose weights stay, beside small matrices that are trained (Hu et al. 2021), through peft."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipestill.errors import ConfigError
from pipestill.recipes.causal_models import save
from pipestill.recipes.packages import needed

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Lora:
    """How small matrices are added to a model: their rank, the factor alpha / rank, dropout before them, and where they are."""

    rank: int
    alpha: float
    dropout: float
    targets: str
    """Names of linear layers with commas between, such as q_proj,v_proj; or all-linear: all but the output layer."""

    def wrap(self, model: nn.Module, seed: int) -> nn.Module:
        """Add the matrices, initialised from `seed`; `ConfigError` where peft is missing, or finds no such layer."""
        peft = needed("peft", "LoRA needs the package peft", "'peft>=0.18'")
        targets = self.targets if self.targets == ALL_LINEAR else self.targets.split(",")
        config = peft.LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=targets, task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                wrapped: nn.Module = peft.get_peft_model(model, config)
            except ValueError as error:
                raise ConfigError(f"peft cannot add LoRA to the student: {' '.join(str(error).split())[:300]}") from None
        return wrapped


def save_merged(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a model with its LoRA added up, for `from_pretrained`, and the LoRA alone in a folder `adapter` beside it.

    A copy is merged, so the model is as it was.
    """
    adapter = directory.parent / "adapter"
    adapter.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(adapter)
    save(copy.deepcopy(model).merge_and_unload(), tokenizer, directory)
