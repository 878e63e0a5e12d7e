"""The recipe `causal-lm`: its presets, what it refuses, the models and data that it takes, and that it learns from a teacher."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipestill import BlockModel, losses
from pipestill.errors import ConfigError, DataError, UserError
from pipestill.recipes import causal_data, causal_models
from pipestill.recipes.causal_lm import PRESETS, CausalLm
from pipestill.recipes.causal_models import LlamaSizes
from pipestill.recipes.run import preflight, run_recipe
from pipestill.recipes.run_options import Numbers, RunOptions
from pipestill.recipes.weights import load_into
from pipestill.train.run_directory import RunDirectory
from pipestill.verify import train_few

transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "teacher_sizes": Numbers((3, 16, 2, 1, 24)), "student_sizes": Numbers((2, 8, 2, 1, 16)), "vocab_size": 270,
    "max_length": 24, "batch_size": 8,
}  # fmt: skip
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@pytest.fixture
def small(tmp_path: Path) -> str:
    """Paragraphs that each repeat one word, so that the next token can be told from those before it."""
    path = tmp_path / "words.txt"
    path.write_text("\n\n".join(" ".join([WORDS[i * 5 % 12]] * (12 + i % 11)) for i in range(100)))
    return str(path)


@pytest.fixture
def lines(tmp_path: Path) -> str:
    """Records of several lengths."""
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"text": WORDS[i % 12] * (1 + i % 7)}) for i in range(60)))
    return str(path)


@pytest.fixture
def chats(tmp_path: Path) -> str:
    path = tmp_path / "chats.jsonl"
    records = [
        {"messages": [{"role": "user", "content": WORDS[i % 12]}, {"role": "assistant", "content": WORDS[(i + 1) % 12]}]}
        for i in range(40)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def tokenizer() -> Any:
    return causal_data.trained_tokenizer((" ".join(WORDS),) * 3, 270)


def saved(path: Path, layers: int = 3, width: int = 16, vocab_size: int = 272, seed: int = 1, **changes: Any) -> str:
    """A folder with a tiny Llama and its tokenizer."""
    words = tokenizer()
    config = causal_models.llama_config(LlamaSizes(layers, width, 2, 1, 24), vocab_size, 24, words)
    for name, value in changes.items():
        setattr(config, name, value)
    causal_models.save(causal_models.fresh(config, seed), words, path)
    return str(path)


def test_a_preset_is_a_published_pair() -> None:
    assert LlamaSizes(*PRESETS["llama-8b"].teacher_sizes) == LlamaSizes(32, 4096, 32, 8, 14336)
    assert LlamaSizes(*PRESETS["llama-8b"].student_sizes) == LlamaSizes(16, 2048, 32, 8, 8192)


def test_losses_by_name(small: str) -> None:
    def made(**options: Any) -> losses.LogitLoss:
        return CausalLm(**TINY, data=small, kd_ratio=0.5, **options).divergence(None)

    assert made() == losses.ForwardKL(2.0, kd_ratio=0.5)
    assert made(loss="reverse_kl", temperature=1.0) == losses.ReverseKL(1.0, kd_ratio=0.5)
    assert made(loss="jsd", beta=0.1) == losses.JSD(0.1, 2.0, kd_ratio=0.5)
    assert made(loss="total_variation") == losses.TotalVariation(2.0, kd_ratio=0.5)
    assert made(loss="top_k_kl", top_k=7) == losses.TopKKL(7, 2.0, kd_ratio=0.5)
    assert made(loss="logits_mse") == losses.LogitsMSE(kd_ratio=0.5)


@pytest.mark.parametrize(
    ("strategy", "devices", "packing"), [("fill", 2, True), pytest.param("1f1b", 3, False, marks=pytest.mark.slow)]
)
def test_strategies_are_bit_identical_to_the_plain_loop(strategy: str, devices: int, packing: bool, lines: str) -> None:
    """With packed rows, and with padded ones of several lengths."""
    recipe = CausalLm(**TINY, data=lines, packing=packing, truncate="end", loss="jsd")
    workload = recipe.workload(0)
    lengths = {inputs["input_ids"].shape[1] for inputs, _ in workload.train_loader}
    assert (len(lengths) > 1, workload.length_axis) == ((False, None) if packing else (True, 1))
    options = RunOptions(devices=devices, strategy=strategy, microbatches=3)
    got, _ = train_few(recipe, options, 2)
    plain, _ = train_few(recipe, RunOptions(strategy="reference", microbatches=3), 2)
    assert got.keys() == plain.keys()
    assert all(torch.equal(got[name], plain[name]) for name in plain)


def test_what_a_run_leaves_loads_and_generates(small: str, tmp_path: Path) -> None:
    recipe = CausalLm(**{**TINY, "max_length": 16, "batch_size": 64}, data=small, epochs=1, teacher_epochs=1)
    directory = RunDirectory.create(str(tmp_path / "run"), "causal-lm")
    summary = run_recipe(recipe, RunOptions(strategy="reference", microbatches=1), directory, quiet=True)
    metrics = json.loads((tmp_path / "run/summary.json").read_text())["metrics"]
    assert metrics == summary["metrics"]
    for model in ("teacher", "student", "student_alone"):
        assert metrics[model]["perplexity"] == pytest.approx(torch.tensor(metrics[model]["cross_entropy"]).exp().item(), rel=1e-4)
    assert metrics["teacher"]["agreement"] == 1.0
    assert summary["data"]["train"]["counted"] < summary["data"]["train"]["tokens"]

    loaded, words = (
        kind.from_pretrained(tmp_path / "run/export") for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    again = recipe.workload(0).build_student()
    assert not torch.equal(again.lm_head.weight, loaded.lm_head.weight)  # type: ignore[union-attr]
    again.load_state_dict(loaded.state_dict())
    prompt = {"input_ids": words("two two two", return_tensors="pt")["input_ids"], "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(loaded.generate(**prompt), again.generate(**prompt))  # type: ignore[operator]
    assert loaded.generation_config.eos_token_id == words.eos_token_id
    teacher = CausalLm(teacher_model=str(tmp_path / "run/teacher/export"), data=small, max_length=16)
    assert teacher.workload(0).teacher_origin is not None
    load_into(recipe.workload(0).build_teacher(), tmp_path / "run/teacher/export/model.safetensors")


@pytest.mark.slow
def test_the_distilled_student_says_what_its_teacher_says(small: str, tmp_path: Path) -> None:
    """On a text that says what the next word is, which the same student learns alone too; docs/causal_lm.md has the defaults."""
    recipe = CausalLm(**TINY, data=small, epochs=12, teacher_epochs=40, lr=1e-2, teacher_lr=2e-2)
    directory = RunDirectory.create(str(tmp_path / "run"), "causal-lm")
    metrics = run_recipe(recipe, RunOptions(devices=2, microbatches=2), directory, quiet=True)["metrics"]
    assert metrics["student"]["agreement"] > 0.9


def test_two_models_of_ones_own_with_vocabularies_padded_differently(chats: str, tmp_path: Path) -> None:
    teacher, student = saved(tmp_path / "teacher", vocab_size=288), saved(tmp_path / "student", 2, 8, vocab_size=272, seed=2)
    recipe = CausalLm(teacher_model=teacher, student_model=student, data=chats, max_length=24, batch_size=4, epochs=1)
    workload = recipe.workload(0)
    assert workload.loss.vocabulary == len(tokenizer())  # type: ignore[union-attr]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(student).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in workload.task().student.state_dict().items())
    options = RunOptions(devices=2, microbatches=2)
    got, _ = train_few(recipe, options, 2)
    plain, _ = train_few(recipe, options.as_reference(), 2)
    assert all(torch.equal(got[name], plain[name]) for name in plain)
    assert CausalLm(**{**vars(recipe), "vocabulary": 265}).workload(0).loss.vocabulary == 265  # type: ignore[union-attr]


def test_only_answers_of_chats_count(chats: str) -> None:
    inputs, targets = next(iter(CausalLm(**TINY, data=chats).workload(0).train_loader))
    words, row = tokenizer(), 0
    counted = targets["labels"][row] != -100
    assert 0 < counted.sum() < (inputs["input_ids"][row] != words.pad_token_id).sum() / 2


def test_a_student_of_as_many_layers_starts_as_the_teacher(small: str, tmp_path: Path) -> None:
    teacher = saved(tmp_path / "teacher")
    workload = CausalLm(teacher_model=teacher, student_layers=3, data=small, max_length=24, batch_size=4).workload(0)
    task, (inputs, _) = workload.task(), next(iter(workload.train_loader))
    task.teacher.eval(), task.student.eval()
    taught, got = (BlockModel(model)(inputs)["logits"] for model in (task.teacher, task.student))
    assert torch.equal(got, taught)
    half = CausalLm(teacher_model=teacher, data=small, max_length=24, batch_size=4).workload(0).task()
    assert half.student.config.num_hidden_layers == 1


def test_a_config_alone_gives_random_weights(small: str, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    saved(folder)
    (folder / "model.safetensors").unlink()
    models = [
        CausalLm(**{**TINY, "student_sizes": None}, student_model=str(folder), data=small).workload(seed) for seed in (0, 0, 1)
    ]
    first, same, other = (model.build_student().state_dict()["lm_head.weight"] for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_data_to_test_with_may_be_given(small: str, chats: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": word, "completion": " and more"}) for word in WORDS))
    split = causal_data.open_texts(small, str(prompts), 0)
    assert (len(split.train), len(split.test)) == (10, 12)
    own = causal_data.open_texts(chats, None, 0)
    assert (len(own.train), len(own.test)) == (36, 4)


def test_a_saved_data_set_may_have_a_split_to_test_with(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": [{"text": word} for word in WORDS], "test": [{"text": "one"}]}
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}).save_to_disk(tmp_path / "set")
    split = causal_data.open_texts(str(tmp_path / "set"), None, 0)
    assert (len(split.train), len(split.test)) == (12, 1)


# -- LoRA -------------------------------------------------------------------------------------------------------------


class FakeLora(torch.nn.Module):
    """What peft makes of a model, as far as the recipe looks at it."""

    def __init__(self, model: Any, config: Any) -> None:
        super().__init__()
        self.base_model, self.config = model.requires_grad_(False), config
        self.lora_a = torch.nn.Parameter(torch.randn(2))

    def save_pretrained(self, directory: Path) -> None:
        (Path(directory) / "adapter_config.json").write_text("{}")

    def merge_and_unload(self) -> Any:
        return self.base_model


def test_lora_is_made_by_peft_and_saved_merged(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(LoraConfig=lambda **options: options, get_peft_model=FakeLora)
    monkeypatch.setattr("pipestill.recipes.lora.needed", lambda *given: fake)
    folder = saved(tmp_path / "student", 2, 16)
    recipe = CausalLm(
        **{**TINY, "student_sizes": None}, student_model=folder, data=small, lora_rank=4, lora_targets="q_proj,v_proj"
    )
    workload = recipe.workload(0)
    made, again = workload.build_student(), workload.build_student()
    assert made.config == {
        "r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    assert torch.equal(made.lora_a, again.lora_a)
    assert workload.save is not None
    workload.save(made, tmp_path / "run" / "export")
    assert (tmp_path / "run" / "adapter").is_dir()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export").config.num_hidden_layers == 2


def test_missing_peft_is_named(small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # type: ignore[arg-type]
    folder = saved(tmp_path / "student", 2, 16)
    recipe = CausalLm(**{**TINY, "student_sizes": None}, student_model=folder, data=small, lora_rank=4)
    with pytest.raises(ConfigError, match="LoRA needs the package peft.*pip install 'peft"):
        recipe.workload(0).build_student()


def test_lora_students_over_two_stages(small: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = saved(tmp_path / "student", 2, 16)
    recipe = CausalLm(**{**TINY, "student_sizes": None}, student_model=folder, data=small, lora_rank=2, lora_dropout=0.1)
    options = RunOptions(devices=2, microbatches=2)
    got, _ = train_few(recipe, options, 2)
    plain, _ = train_few(recipe, options.as_reference(), 2)
    assert all(torch.equal(got[name], plain[name]) for name in plain)
    start = recipe.workload(0).build_student().state_dict()
    moved = {name for name, tensor in got.items() if not torch.equal(tensor, start[name])}
    assert moved
    assert all("lora_" in name for name in moved)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_all_problems_of_options_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        CausalLm(
            max_length=1, kd_ratio=2.0, temperature=0.0, epochs=0, lr=-1.0, teacher_sizes=Numbers((1, 2)), beta=-1.0, lora_rank=2,
            student_sizes=Numbers((2, 10, 4, 3, 8)),
        )  # fmt: skip
    for expected in (
        "max_length is 1; expected at least 2", "kd_ratio is 2.0; expected 0 to 1", "temperature is 0.0", "epochs is 0",
        "lr is -1.0", "teacher_sizes is 1,2; expected five numbers", "beta is -1.0", "lora_rank is for a student_model",
        "4 heads do not divide the width 10", "3 heads of keys do not divide 4 heads",
    ):  # fmt: skip
        assert expected in str(error.value)
    with pytest.raises(ConfigError, match="student_model and student_layers each say what the student is"):
        CausalLm(student_model="some", student_layers=2)
    with pytest.raises(ConfigError, match="teacher_sizes are those of a teacher made here"):
        CausalLm(teacher_model="some", teacher_sizes=Numbers((1, 2, 1, 1, 2)))


def test_models_that_do_not_fit_are_refused_before_training(small: str, tmp_path: Path) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            CausalLm(**{"data": small, "max_length": 24, **options}).workload(0)

    refused("no directory '/nowhere' with a tokenizer", teacher_model="/nowhere")
    teacher = saved(tmp_path / "teacher")
    refused("max_length is 48, but the teacher has positions for 24 tokens", teacher_model=teacher, max_length=48)
    refused("student_layers is 9, more than the teacher's 3", teacher_model=teacher, student_layers=9)
    refused("the tokenizer has 270 words and the teacher gives 261 logits", teacher_model=saved(tmp_path / "few", vocab_size=261))
    other = saved(tmp_path / "other")
    causal_data.trained_tokenizer(("other words than those",) * 3, 270).save_pretrained(other)
    refused("the tokenizers differ: token ", teacher_model=teacher, student_model=other)
    bert = transformers.T5Config(vocab_size=300, d_model=8, d_ff=8, num_layers=1, num_heads=1)
    bert.save_pretrained(tmp_path / "bert")
    refused("is of type 't5', which is no causal language model", teacher_model=str(tmp_path / "bert"), tokenizer=teacher)
    refused("no data at '/nowhere'", data="/nowhere")


def test_data_of_which_nothing_counts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n".join([json.dumps({"text": "wxyz"})] * 3))
    with pytest.raises(DataError, match="of which 2 records are to train on: no example is left"):
        CausalLm(**{**TINY, "vocab_size": 261, "truncate": "drop", "max_length": 2}, data=str(path)).workload(0)


def test_a_folder_is_no_file_of_weights(small: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder.*teacher_model"):
        preflight(CausalLm(**TINY, data=small), RunOptions(teacher=saved(tmp_path / "teacher")))
