"""Sixty families of transformers: blocks are their forward, and two ranks distil them as the plain loop does, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import inputs_for, tiny
from torch import Tensor

import pipestill as ps

transformers = pytest.importorskip("transformers")

CAUSAL = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM", "granite": "GraniteForCausalLM", "cohere": "CohereForCausalLM", "cohere2": "Cohere2ForCausalLM",
    "olmo": "OlmoForCausalLM", "olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM", "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM", "gptj": "GPTJForCausalLM", "gpt_bigcode": "GPTBigCodeForCausalLM",
    "ernie4_5_moe": "Ernie4_5_MoeForCausalLM", "opt": "OPTForCausalLM", "bloom": "BloomForCausalLM", "mpt": "MptForCausalLM",
    "falcon": "FalconForCausalLM", "starcoder2": "Starcoder2ForCausalLM", "stablelm": "StableLmForCausalLM",
    "persimmon": "PersimmonForCausalLM", "codegen": "CodeGenForCausalLM", "glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM",
    "helium": "HeliumForCausalLM", "smollm3": "SmolLM3ForCausalLM", "arcee": "ArceeForCausalLM", "apertus": "ApertusForCausalLM",
    "diffllama": "DiffLlamaForCausalLM", "exaone4": "Exaone4ForCausalLM", "ernie4_5": "Ernie4_5ForCausalLM",
    "biogpt": "BioGptForCausalLM", "xglm": "XGLMForCausalLM", "modernbert-decoder": "ModernBertDecoderForCausalLM",
    "mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "olmoe": "OlmoeForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM", "gpt_oss": "GptOssForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
    "mamba": "MambaForCausalLM", "mamba2": "Mamba2ForCausalLM", "bart": "BartForCausalLM",
    "falcon_mamba": "FalconMambaForCausalLM",
}  # fmt: skip
OTHERS = {
    "bert": "BertForMaskedLM", "distilbert": "DistilBertForMaskedLM", "electra": "ElectraForMaskedLM",
    "deberta-v2": "DebertaV2ForMaskedLM", "modernbert": "ModernBertForMaskedLM", "mpnet": "MPNetForMaskedLM",
    "xlm-roberta": "XLMRobertaForMaskedLM", "t5": "T5ForConditionalGeneration", "mbart": "MBartForConditionalGeneration",
    "pegasus": "PegasusForConditionalGeneration", "whisper": "WhisperForConditionalGeneration",
    "vit": "ViTForImageClassification", "deit": "DeiTForImageClassification", "swin": "SwinForImageClassification",
    "clip_vision_model": "CLIPVisionModel", "clip_text_model": "CLIPTextModel", "dinov2": "Dinov2ForImageClassification",
    "wav2vec2": "Wav2Vec2ForCTC", "hubert": "HubertForCTC",
}  # fmt: skip
FAMILIES = {**CAUSAL, **OTHERS}
IN_PROCESSES = ("llama", "gemma2", "mixtral", "t5", "wav2vec2")


def made(kind: str, seed: int) -> Any:
    return tiny(kind, FAMILIES[kind], seed)


def main_output(output: Any) -> Tensor:
    tensor: Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return tensor


def loss(student: Any, teacher: Any, target: Any) -> Tensor:
    return (main_output(student) - main_output(teacher)).square().mean()


def trained(kind: str, strategy: str, devices: int = 1, over: str | None = None) -> dict[str, Tensor]:
    """The student's weights after 2 steps at 2 microbatches, half of whose rows are padded, with dropout."""
    student, teacher = made(kind, 1), made(kind, 2)
    blocks = len(ps.BlockModel(student))
    trainer = ps.Trainer(
        ps.Distillation(teacher, student, loss), optimizer=torch.optim.AdamW, lr=1e-2, microbatches=2, strategy=strategy,
        **({} if strategy == "reference" else {"devices": devices, "student_partition": [blocks // 2, blocks - blocks // 2],
                                               "teacher_partition": [blocks // 2, blocks - blocks // 2]}),
    )  # fmt: skip
    trainer.fit([(inputs_for(student, seed=seed), None) for seed in (3, 5)], epochs=1)
    return {name: tensor.clone() for name, tensor in student.state_dict().items()}


def trained_all(kinds: tuple[str, ...]) -> list[dict[str, Tensor]]:
    """What each process of a group runs."""
    return [trained(kind, "1f1b", 2) for kind in kinds]


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


def test_there_are_sixty() -> None:
    assert len(FAMILIES) >= 60


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FAMILIES)
def test_blocks_give_what_the_forward_gives(kind: str) -> None:
    """In eval mode with padding, block by block and all in one replay."""
    model = made(kind, 0).eval()
    blocks, inputs = ps.BlockModel(model), inputs_for(model)
    assert len(blocks) >= 4
    with torch.no_grad():
        given = model(**inputs, **({"use_cache": False} if kind in CAUSAL or "decoder_input_ids" in inputs else {}))
        value: Any = inputs
        for block in blocks.blocks:
            value = block.call(value)
        for got in (value, blocks(inputs)):
            assert torch.equal(main_output(got), main_output(given))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("quick_plans")
@pytest.mark.parametrize("kind", FAMILIES)
def test_two_ranks_distil_it_as_the_plain_loop_does(kind: str) -> None:
    assert_equal(trained(kind, "1f1b", 2), trained(kind, "reference"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_distil_it_as_the_plain_loop_does() -> None:
    outcomes = ps.launch(trained_all, (IN_PROCESSES,), 2, threads=1, timeout_seconds=120.0)
    for kind, got in zip(IN_PROCESSES, outcomes, strict=True):
        assert_equal(got, trained(kind, "reference"))
