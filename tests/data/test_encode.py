"""Which tokens of texts, of prompts with completions and of chats count."""

from __future__ import annotations

from typing import Any

import pytest
from support.chats import CHATML, FORGETFUL, MARKED, backend, tokenizer

import pipestill as ps

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a pipestill?"},
    {"role": "assistant", "content": "A still."},
    {"role": "user", "content": "Of what?"},
    {"role": "assistant", "content": "Of a refinery."},
]


def counted_text(record: dict[str, Any], made: Any, **options: Any) -> str:
    """The text of the tokens that count."""
    (example,) = ps.data.tokenize([record], made, **options)
    return str(getattr(made, "_tokenizer", made).decode(example.input_ids[example.counted].tolist(), skip_special_tokens=False))


def test_of_text_everything_counts_and_the_end_is_appended() -> None:
    (example,) = ps.data.tokenize([{"text": "A still."}], tokenizer())
    assert tokenizer().decode(example.input_ids) == "A still.<|end|>"
    assert example.counted.all()
    assert example.labels.tolist() == [*example.input_ids[1:].tolist(), -100]
    (bare,) = ps.data.tokenize([{"text": "A still."}], backend(), end=False)
    assert bare.input_ids.tolist() == example.input_ids[:-1].tolist()


@pytest.mark.parametrize(("prompt", "completion"), [("What? ", "A still."), ("Wh", "at is it"), ("", "All of it"), ("é", "à")])
def test_of_a_completion_every_token_counts_that_holds_some_of_it(prompt: str, completion: str) -> None:
    record = {"prompt": prompt, "completion": completion}
    found = counted_text(record, tokenizer())
    assert found.endswith(f"{completion}<|end|>")
    assert len(found) < len(prompt) + len(completion) + len("<|end|>") or len(prompt) < 3
    assert counted_text(record, backend()) == found.removesuffix("<|end|>")


def test_of_chats_the_answers_count_with_their_end() -> None:
    for template in (CHATML, MARKED):
        assert counted_text({"messages": CHAT}, tokenizer(template)) == "A still.<|end|>Of a refinery.<|end|>"
        assert counted_text({"messages": CHAT}, tokenizer(template), answers="last") == "Of a refinery.<|end|>"
        later = {"prompt": CHAT[:4], "completion": CHAT[4:]}
        assert counted_text(later, tokenizer(template)) == "Of a refinery.<|end|>"


def test_marks_of_the_template_and_differences_agree_token_by_token() -> None:
    ours, marked = (ps.data.tokenize([{"messages": CHAT}], tokenizer(template))[0] for template in (CHATML, MARKED))
    assert ours.input_ids.equal(marked.input_ids)
    assert ours.counted.equal(marked.counted)


def test_a_template_that_forgets_is_refused_with_the_token_that_differs() -> None:
    chat = [*CHAT[:2], {"role": "assistant", "content": "hm</think>A still."}, *CHAT[3:]]
    with pytest.raises(
        ps.UserError, match=r"record\[0\] is a chat whose answers cannot be told apart.*message 2.*token \d+ is 'h"
    ):
        ps.data.tokenize([{"messages": chat}], tokenizer(FORGETFUL))
    assert counted_text({"messages": chat}, tokenizer(FORGETFUL), answers="last") == "Of a refinery.<|end|>"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": CHAT[:2]}, "no message of role 'assistant'"),
        ({"messages": "hello"}, "expected a list of messages"),
        ({"messages": [{"content": "x"}]}, "message 0 of messages"),
        ({"messages": [{"role": "user"}]}, "no 'content' in message 0"),
        ({"prompt": "x", "completion": ""}, "has completion ''"),
        ({"text": 3}, "has text 3"),
        ({"text": "ab\ud83d"}, r"has text with half of a surrogate pair \(\\ud83d at character 2\)"),
        ({"prompt": "\udc00", "completion": "x"}, "has prompt with half of a surrogate pair"),
        ({"question": "x"}, "has the fields 'question'"),
    ],
)
def test_records_that_cannot_be_read_are_named(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ps.UserError, match=rf"record\[0\] .*{message}"):
        ps.data.tokenize([record], tokenizer())


def test_chats_need_a_template_and_a_tokenizer_that_has_one() -> None:
    for made in (tokenizer(None), backend()):
        with pytest.raises(ps.UserError, match="no chat template"):
            ps.data.tokenize([{"messages": CHAT}], made)
    with pytest.raises(ps.UserError, match="the template refuses: .*only users"):
        ps.data.tokenize([{"messages": CHAT}], tokenizer("{{ raise_exception('only users') }}"))


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(ps.UserError, match="expected one of transformers"):
        ps.data.tokenize([{"text": "x"}], "gpt2")


def test_a_tokenizer_that_pads_or_cuts_is_asked_for_all_tokens() -> None:
    import tokenizers

    made = tokenizers.Tokenizer.from_str(backend().to_str())
    made.enable_truncation(3)
    made.enable_padding(length=50)
    (example,) = ps.data.tokenize([{"text": "A generator is a function"}], made)
    assert made.decode(example.input_ids.tolist()) == "A generator is a function"


class Slow:
    """A tokenizer of `transformers` that tells no positions."""

    def __init__(self) -> None:
        self.made = tokenizer()

    is_fast = False
    eos_token_id = None

    def apply_chat_template(self, *given: Any, **options: Any) -> Any:
        return self.made.apply_chat_template(*given, **options)

    def __call__(self, text: str, **options: Any) -> Any:
        return self.made(text, **options)


def test_a_slow_tokenizer_must_give_the_prompts_tokens_first() -> None:
    made = Slow()
    (example,) = ps.data.tokenize([{"prompt": "A generator", "completion": " is"}], made)
    assert made.made.decode(example.input_ids[example.counted]) == " is"
    with pytest.raises(ps.UserError, match="no beginning of the whole's; use a fast tokenizer"):
        ps.data.tokenize([{"prompt": "A gener", "completion": "ator is"}], made)
