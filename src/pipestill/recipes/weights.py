"""Files of trained weights: written, read into a model, and how many there are."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pipestill.errors import ConfigError


def export(model: nn.Module, path: Path) -> None:
    """Write a model's state dict, under its own names, as safetensors (shared tensors once, under their first name)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seen: dict[int, str] = {}
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if seen.setdefault(id(tensor), name) == name
    }
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary)
    temporary.replace(path)


def load_into(model: nn.Module, path: str | Path) -> None:
    """Read weights that `export` wrote; `ConfigError` when they are not this model's."""
    if Path(path).is_dir():
        raise ConfigError(
            f"'{path}' is a folder, and --teacher takes a file of weights, such as its model.safetensors; a whole model is given "
            "as --teacher_model, where a recipe has that"
        )
    try:
        missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ConfigError(f"cannot read weights from '{path}': {error}") from None
    state = model.state_dict(keep_vars=True)
    lacking = [
        name for name in missing if not any(other is state[name] for key, other in state.items() if key not in missing)
    ]  # but what shares the tensor of a name that was there
    if unexpected or lacking:
        raise ConfigError(f"'{path}' holds another model: missing {missing[:3]}, unexpected {unexpected[:3]}")


def num_parameters(model: nn.Module) -> int:
    """Count a model's parameters, each once."""
    return sum(p.numel() for p in model.parameters())
