"""Tiny random models of every family of transformers, made from the families' own configs, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("lru_width", "rnn_hidden_size"), 32),
    **dict.fromkeys(("hidden_dim", "intermediate_size", "d_ff", "ffn_dim", "n_inner", "d_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 3),
    **dict.fromkeys(("num_decoder_layers",), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("head_dim", "d_head", "d_kv", "rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "head_size", "mamba_d_state", "state_size"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "sliding_window", "patch_size", "max_source_positions"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "mamba_d_head", "num_mel_bins", "num_conv_pos_embeddings"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups", "n_groups", "bos_token_id"), 1),
    **dict.fromkeys(("layerdrop", "encoder_layerdrop", "decoder_layerdrop"), 0.0),
    "vocab_size": 99, "time_step_rank": 4, "image_size": 32, "num_channels": 3, "max_target_positions": 32, "pad_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 1, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
    "tie_word_embeddings": False,
}  # fmt: skip
"""Sizes for the fields that configs of many families share."""

MULTIPLIERS = {
    "logit_scale": 0.5, "logits_scaling": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
    "attention_multiplier": 0.3, "final_logit_softcapping": 1.5,
    "attn_logit_softcapping": 1.2, "scale_emb": 2.0, "dim_model_base": 16, "scale_depth": 1.3,
}  # fmt: skip
"""Numbers that forwards use between their layers, away from values at which they do nothing."""

OWN: dict[str, dict[str, Any]] = {
    "bart": {"dropout": 0.1}, "falcon": {"num_kv_heads": 4}, "gpt_neo": {"attention_types": [[["global", "local"], 2]],
    "num_layers": 4}, "swin": {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4,
    "num_attention_heads": None, "num_hidden_layers": None, "hidden_size": None},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2}, "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4},
    "nemotron": {"partial_rotary_factor": 0.5}, "wav2vec2": {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_feat_extract_layers": 2}, "hubert": {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_feat_extract_layers": 2}, "mpt": {"max_seq_len": 64},
    **{kind: {"head_dim": None, "num_key_value_heads": 4} for kind in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu")},
}  # fmt: skip
"""Fields that only some families have, or that other families take other values for."""


def tiny_config(kind: str, **options: Any) -> Any:
    """A config of a family, by its name in transformers, with few layers and small sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    base = config_class()
    settable = {name for name in SMALL if not isinstance(getattr(config_class, name, None), property)}
    fields = {name: SMALL[name] for name in settable if getattr(base, name, None) is not None}
    fields = {**fields, **OWN.get(kind, {}), **options}
    return config_class(**{name: value for name, value in fields.items() if value is not None})


def tiny(kind: str, model_class: str, seed: int = 0, **options: Any) -> Any:
    """A model with random weights, biases and norms included."""
    import transformers

    config = tiny_config(kind, **options)
    for name, value in MULTIPLIERS.items():
        if getattr(config, name, None) is not None and not isinstance(getattr(type(config), name, None), property):
            setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: nn.Module = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def texts(rows: int = 4, length: int = 10, *, seed: int = 1) -> dict[str, Tensor]:
    """Ids, with padding on the right in one row and on the left in another."""
    ids = torch.randint(5, 99, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, length - 3 :] = mask[2, :4] = 0
    return {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}


def inputs_for(model: Any, *, seed: int = 1) -> dict[str, Tensor]:
    """A batch of 4 rows for a model: padded texts, images or sounds."""
    main, generator = model.main_input_name, torch.Generator().manual_seed(seed)
    config = model.config
    if main == "pixel_values":
        inputs = {main: torch.randn(4, 3, 32, 32, generator=generator)}
    elif main == "input_values":
        inputs = {main: torch.randn(4, 400, generator=generator)}
    elif main == "input_features":
        inputs = {main: torch.randn(4, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)}
    else:
        inputs = texts(seed=seed)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = texts(seed=seed + 1)["input_ids"]
    return inputs
