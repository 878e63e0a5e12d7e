"""A tokenizer that is trained in a moment, chats, and a small causal model to feed with them."""

from functools import cache
from typing import Any

import torch

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A chat template that does not mark what is generated."""

MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The same template with marks."""

FORGETFUL = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A template that leaves out what earlier answers thought: what it writes of a chat's beginning is no beginning of the whole."""

SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]

TEXT = [
    "A generator is a function which returns an iterator. It looks like a normal function.",
    "What is a pipestill? A refinery's continuous still, in which heat runs through pipes.",
    "An iterator gives its items one at a time, and a generator makes an iterator of a function.",
]


@cache
def backend() -> Any:
    """A byte-level BPE of 300 tokens, of the library `tokenizers`."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def tokenizer(template: str | None = CHATML) -> Any:
    """The same one as a tokenizer of `transformers`, with a chat template."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=backend(), pad_token="<|pad|>", eos_token="<|end|>")
    made.chat_template = template
    return made


def llama(layers: int = 2, vocab: int = 300, seed: int = 0, attention: str = "sdpa") -> Any:
    """A Llama of two layers, 16 wide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, attn_implementation=attention, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()
