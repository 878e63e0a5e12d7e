"""The recipe `llm-blocks`: parts that equal the model, candidates made of its weights, the choice under a budget, a whole run."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pairwise import every_other

from pipestill import losses
from pipestill.errors import ConfigError, ModelError
from pipestill.recipes import causal_data, causal_models, llm_blocks
from pipestill.recipes.block_choice import Scored, choose, choose_scored
from pipestill.recipes.causal_models import LlamaSizes
from pipestill.recipes.decoder_candidates import LinearAttention, candidate, grouped, narrower
from pipestill.recipes.decoder_parts import Skip, in_parts, seen
from pipestill.recipes.llm_blocks import LlmBlocks
from pipestill.recipes.run import preflight, run_recipe
from pipestill.recipes.run_options import Numbers, RunOptions
from pipestill.train.run_directory import RunDirectory
from pipestill.verify import train_few

transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "teacher_sizes": Numbers((2, 16, 2, 2, 24)), "vocab_size": 270, "max_length": 16, "batch_size": 8, "score_rows": 8,
}  # fmt: skip
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


@pytest.fixture
def small(tmp_path: Path) -> str:
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"text": " ".join([WORDS[i % 12]] * (1 + i % 7))}) for i in range(60)))
    return str(path)


def tokenizer() -> Any:
    return causal_data.trained_tokenizer((" ".join(WORDS),) * 3, 270)


def llama(**changes: Any) -> Any:
    config = causal_models.llama_config(LlamaSizes(2, 16, 4, 2, 24), 270, 32, tokenizer())
    for name, value in changes.items():
        setattr(config, name, value)
    return causal_models.fresh(config, 1).eval()


def batch() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two rows of two examples each."""
    positions = torch.stack([torch.cat([torch.arange(n), torch.arange(12 - n)]) for n in (5, 12)])
    ids = torch.randint(0, 270, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": positions}, {"real": torch.ones_like(ids).bool()}


@pytest.mark.parametrize("whole_layers", [True, False])
def test_parts_give_what_the_model_gives(whole_layers: bool) -> None:
    model, (inputs, more) = llama(), batch()
    parts = in_parts(model, whole_layers)
    assert len(parts) == (4 if whole_layers else 6)
    assert torch.equal(parts({**inputs, **more})["logits"], model(**inputs, use_cache=False).logits)


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "Qwen3"])
def test_other_models_of_that_shape(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=270, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        head_dim=4, sliding_window=None,
    )  # fmt: skip
    parts = in_parts(causal_models.fresh(config, 0), False)
    inputs, more = batch()
    for name in ("linear", "grouped-1", "skip"):
        value = candidate(name, parts.attention_0)(parts.embeddings({**inputs, **more}))
        assert value["hidden"].isfinite().all()


def test_models_of_other_shapes_are_refused() -> None:
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=270))
    with pytest.raises(ModelError, match="GPT2LMHeadModel is not Llama-shaped"):
        in_parts(gpt, False)
    scaled = transformers.GraniteConfig(
        vocab_size=270, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, intermediate_size=24,
        residual_multiplier=0.3,
    )  # fmt: skip
    with pytest.raises(ModelError, match="its parts give other logits than its forward"):
        in_parts(causal_models.fresh(scaled, 0), False)


# -- candidates -------------------------------------------------------------------------------------------------------


def test_as_many_heads_of_equal_weights_are_the_same_attention() -> None:
    """The mean of equal heads is each of them."""
    attention = llama().model.layers[0].self_attn
    for name in ("k_proj", "v_proj"):
        weight = getattr(attention, name).weight.data
        weight[4:] = weight[:4]
    hidden, (inputs, _) = torch.randn(2, 12, 16), batch()
    rotary = llama().model.rotary_emb(hidden, inputs["position_ids"])
    options = {"position_embeddings": rotary, "attention_mask": seen(inputs["position_ids"])}
    fewer = grouped(attention, 1)
    torch.testing.assert_close(fewer(hidden, **options)[0], attention(hidden, **options)[0])
    assert fewer.k_proj.out_features == 4  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="'grouped-2' cannot replace an attention of 2 heads"):
        grouped(attention, 2)


def test_a_narrower_mlp_keeps_the_largest_units() -> None:
    mlp = llama().model.layers[0].mlp
    mlp.down_proj.weight.data[:, ::2] = 0.0
    half, hidden = narrower(mlp, 2), torch.randn(3, 16)
    torch.testing.assert_close(half(hidden), mlp(hidden))
    assert half.up_proj.out_features == 12  # type: ignore[union-attr]


def test_linear_attention_sees_its_own_example_up_to_itself() -> None:
    model, (inputs, _) = llama(), batch()
    linear, hidden = LinearAttention(model.model.layers[0].self_attn), torch.randn(2, 12, 16)
    options = {
        "position_embeddings": model.model.rotary_emb(hidden, inputs["position_ids"]),
        "attention_mask": seen(inputs["position_ids"]),
    }
    before = linear(hidden, **options)[0]
    changed = hidden.clone()
    changed[0, 4] += 1.0
    moved = (linear(changed, **options)[0] != before).any(-1)
    assert moved[0].tolist() == [False] * 4 + [True] + [False] * 7  # the example ends there
    changed = hidden.clone()
    changed[1, 4] += 1.0
    moved = (linear(changed, **options)[0] != before).any(-1)
    assert moved[1].tolist() == [False] * 4 + [True] * 8


def test_halves_that_are_kept_do_not_learn() -> None:
    parts = in_parts(llama(), True)
    made = candidate("linear+keep", parts.layer_0)
    assert not any(p.requires_grad for p in made.mlp.parameters())  # type: ignore[union-attr]
    assert all(p.requires_grad for p in made.attention.parameters())  # type: ignore[union-attr]
    assert isinstance(candidate("skip+1/2", parts.layer_0).attention, Skip)


# -- the choice -------------------------------------------------------------------------------------------------------


def test_the_choice_is_the_best_under_its_budget() -> None:
    """Against all choices there are."""
    generator = torch.Generator().manual_seed(0)
    options = [[(float(a), float(b)) for a, b in torch.rand(3, 2, generator=generator)] for _ in range(5)]
    for budget in (1.0, 1.8, 2.5, 5.0):
        sums = [tuple(sum(one[i] for one in several) for i in (0, 1)) for several in product(*options)]
        best = min((loss for cost, loss in sums if cost <= budget), default=None)
        picked = choose(options, budget)
        if best is None:
            assert picked is None
            continue
        assert picked is not None
        assert sum(one[i][0] for one, i in zip(options, picked, strict=True)) <= budget
        assert sum(one[i][1] for one, i in zip(options, picked, strict=True)) == pytest.approx(best)


def test_without_a_choice_in_the_budget_the_cheapest_is_taken() -> None:
    table = [Scored("a", "keep", 10, 1.0, 0.0, 0.0), Scored("a", "1/2", 5, 2.0, 0.1, 0.2)]
    assert choose_scored(table, 0.1, "parameters") == ([table[1]], 0.5)
    assert choose_scored(table, 0.1, "seconds") == ([table[0]], 1.0)
    assert choose_scored(table, 1.0, "parameters") == ([table[0]], 1.0)


# -- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", every_other(["layers", "halves"]))
def test_strategies_are_bit_identical_to_the_plain_loop(blocks: Any, small: str) -> None:
    recipe = LlmBlocks(**TINY, data=small, blocks=blocks, mlp="1/2,skip")
    options = RunOptions(devices=2, strategy="relay")
    got, _ = train_few(recipe, options, 2)
    plain, _ = train_few(recipe, options.as_reference(), 2)
    assert got.keys() == plain.keys()
    assert all(torch.equal(got[name], plain[name]) for name in plain)


def test_a_run_scores_chooses_tunes_and_exports(small: str, tmp_path: Path) -> None:
    recipe = LlmBlocks(**TINY, data=small, budget=0.7)
    recipe = LlmBlocks(**{**vars(recipe), "teacher_epochs": 1, "attention": "linear,grouped-1,skip", "mlp": "1/2"})
    directory = RunDirectory.create(str(tmp_path / "run"), "llm-blocks")
    summary = run_recipe(recipe, RunOptions(strategy="reference", microbatches=1), directory, quiet=True)
    assert json.loads((tmp_path / "run/summary.json").read_text())["library"] == summary["library"]
    library = summary["library"]
    rows = library["candidates"]
    assert [(row["block"], row["candidate"]) for row in rows[:6]] == [
        ("attention_0", "keep"), ("attention_0", "linear"), ("attention_0", "grouped-1"), ("attention_0", "skip"),
        ("mlp_0", "keep"), ("mlp_0", "1/2"),
    ]  # fmt: skip
    assert all(row["kl"] == 0.0 == row["block_loss"] for row in rows if row["candidate"] == "keep")
    assert all(row["kl"] > 0.0 for row in rows if row["candidate"] != "keep")
    assert library["cost"] <= 0.7
    chosen = [row for row in rows if row["chosen"]]
    assert [row["block"] for row in chosen] == ["attention_0", "mlp_0", "attention_1", "mlp_1"]
    assert set(summary["metrics"]) == {"teacher", "blocks", "student", "student_alone", "parameters"}
    assert summary["metrics"]["teacher"]["agreement"] == 1.0
    assert summary["metrics"]["parameters"]["student"] < summary["metrics"]["parameters"]["teacher"]

    network = llm_blocks.load(tmp_path / "run/export").eval()
    validation = recipe.workload(0).validation_loader
    total = sum(losses.cross_entropy.sums(network(i), t)["cross_entropy"] for i, t in validation)
    count = sum(losses.cross_entropy.counts(t)["cross_entropy"] for _, t in validation)
    assert float(total) / count == pytest.approx(summary["metrics"]["student"]["cross_entropy"], rel=1e-5)


@pytest.mark.slow
def test_a_run_on_more_devices_chooses_alike(small: str, tmp_path: Path) -> None:
    recipe = LlmBlocks(**TINY, data=small, teacher_epochs=1)
    found = []
    for devices in (1, 2):
        directory = RunDirectory.create(str(tmp_path / f"run{devices}"), "llm-blocks")
        strategy = "reference" if devices == 1 else "balanced"
        summary = run_recipe(recipe, RunOptions(devices=devices, strategy=strategy), directory, quiet=True)
        found.append([(row["block"], row["candidate"], row["chosen"]) for row in summary["library"]["candidates"]])
    assert found[0] == found[1]


def test_what_cannot_be_is_refused_at_once(small: str) -> None:
    with pytest.raises(ConfigError) as error:
        LlmBlocks(attention="sparse,grouped-0", mlp="1/1", kd_ratio=2.0, budget=0.0, epochs=0)
    for expected in (
        "no attention 'sparse'; expected linear, grouped-N", "no attention 'grouped-0'", "no MLP '1/1'; expected 1/N",
        "kd_ratio is 2.0", "budget is 0.0", "epochs is 0",
    ):  # fmt: skip
        assert expected in str(error.value)
    with pytest.raises(ConfigError, match="nothing is replaced"):
        LlmBlocks(attention="none", mlp="none")
    with pytest.raises(ConfigError, match="budget is 0.2, but the smallest candidates together have 0."):
        preflight(LlmBlocks(**TINY, data=small, budget=0.2), RunOptions(strategy="reference"))
    with pytest.raises(ConfigError, match="'grouped-3' cannot replace"):
        preflight(LlmBlocks(**TINY, data=small, attention="grouped-3"), RunOptions(strategy="reference"))
