"""Causal language models of transformers: made small, read from folders or the hub, begun from a teacher's layers, saved."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pipestill.errors import ConfigError
from pipestill.recipes.language import from_pretrained, spread, transformers

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
"""The type of a model's weights; auto is that of its files."""

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


@dataclass(frozen=True)
class LlamaSizes:
    """Sizes of a Llama: layers, their width, heads of queries and of keys, and units of its MLPs."""

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    intermediate_size: int

    @staticmethod
    def problems(sizes: Sequence[int]) -> list[str]:
        """List what is wrong with five numbers as sizes."""
        names = "layers, width, attention heads, heads of keys and values, units of the MLP"
        if len(sizes) != 5 or min(sizes) < 1:
            return [f"expected five numbers of at least 1: {names}"]
        _, width, heads, kv_heads, _ = sizes
        problems = [] if width % (2 * heads) == 0 else [f"{heads} heads do not divide the width {width} into even parts"]
        return problems + ([] if heads % kv_heads == 0 else [f"{kv_heads} heads of keys do not divide {heads} heads"])


def llama_config(sizes: LlamaSizes, vocab_size: int, positions: int, tokenizer: Any) -> Any:
    """Make the config of a Llama whose two ends are not tied, for the words of a tokenizer."""
    return transformers().LlamaConfig(
        vocab_size=vocab_size, hidden_size=sizes.hidden_size, num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads, intermediate_size=sizes.intermediate_size, max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip


def fresh(config: Any, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Make a model of a config, initialised from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: nn.Module = transformers().AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    return made


def read_config(path: str, role: str) -> Any:
    """Read the config of a causal language model in a folder or on the hub; `ConfigError` for a model of another kind."""
    config = from_pretrained("AutoConfig", path, role)
    if type(config) not in transformers().AutoModelForCausalLM._model_mapping:
        raise ConfigError(
            f"the {role} '{path}' is of type '{config.model_type}', which is no causal language model of transformers; "
            "choose one that AutoModelForCausalLM reads"
        )
    return config


def config_of(values: dict[str, Any]) -> Any:
    """Make the config that `to_dict` made these values of."""
    return transformers().AutoConfig.for_model(**values)


def read_model(path: str, role: str, dtype: Dtype, seed: int) -> nn.Module:
    """Read a causal language model from a folder or the hub; a folder with a config and no weights gives random ones."""
    if is_config_only(path):
        kind = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        return fresh(read_config(path, role), seed, kind)
    with quiet():
        model: nn.Module = from_pretrained("AutoModelForCausalLM", path, role, dtype=dtype)
    return model


def is_config_only(path: str) -> bool:
    """Tell whether a folder has a config and no weights."""
    folder = Path(path)
    return (folder / "config.json").is_file() and not any(any(folder.glob(pattern)) for pattern in _WEIGHTS)


def with_fewer_layers(config: Any, layers: int | None) -> Any:
    """Make a teacher's config with some of its layers (default: half), those of `spread`; lists of one entry a layer follow."""
    num_layers = config.num_hidden_layers
    layers = layers or max(1, num_layers // 2)
    if layers > num_layers:
        raise ConfigError(f"student_layers is {layers}, more than the teacher's {num_layers}")
    taken = spread(num_layers, layers)
    smaller = copy.deepcopy(config)
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == num_layers:
            setattr(smaller, name, [value[i] for i in taken])
    smaller.num_hidden_layers = layers
    return smaller


@torch.no_grad()
def start_from_teacher(teacher: Any, student: Any) -> None:
    """Give a student of fewer layers the teacher's weights, in place: those of some layers (see `spread`) and all others."""
    theirs, ours = (_layers_of(model) for model in (teacher, student))
    taken = spread(len(teacher.get_submodule(theirs)), len(student.get_submodule(ours)))
    source = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        found = name
        if name.startswith(f"{ours}."):
            number, _, rest = name[len(ours) + 1 :].partition(".")
            found = f"{theirs}.{taken[int(number)]}.{rest}"
        given = source.get(found)
        if given is None or given.shape != tensor.shape:
            raise ConfigError(
                f"the student's '{name}' {tuple(tensor.shape)} cannot begin as the teacher's "
                f"({'it has none' if given is None else tuple(given.shape)}); give --student_sizes or --student_model instead"
            )
        tensor.copy_(given)


def _layers_of(model: Any) -> str:
    """Find the name of a model's list of layers."""
    wanted = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return str(name)
    raise ConfigError(f"{type(model).__name__} has no list of {wanted} layers to begin a student from; give --student_model")


def save(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write a model with its tokenizer and generation config as `from_pretrained` reads them."""
    with quiet():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


@contextmanager
def quiet() -> Iterator[None]:
    """Switch off the bars by which transformers shows how far it has read or written a model: they would tear ours."""
    logging = transformers().utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def num_positions(config: Any) -> int | None:
    """Find the most tokens of a sequence that a model has positions for; None where it does not say."""
    for name in ("max_position_embeddings", "n_positions"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


def vocab_size(config: Any) -> int:
    """Find how many logits a model gives for a token."""
    size: int = config.get_text_config().vocab_size
    return size
