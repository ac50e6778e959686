"""The tokenizer of the tiny preset: its own words are one token each."""

from __future__ import annotations

import pytest

from ctinstruct_hf.data import templates
from ctinstruct_hf.phantoms import FINDINGS
from ctinstruct_hf.phantoms.vocabulary import SPECIAL_TOKENS, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def test_the_words_of_a_conversation_are_one_token_each(tokenizer) -> None:
    asked = templates.ask_choice(templates.WHICH_ALL[0], FINDINGS[:4])
    told = templates.weigh_choices(FINDINGS[:4], [True, False, False, True], [FINDINGS[0], FINDINGS[3]])
    text = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{told}<|im_end|>"
    tokens = tokenizer.tokenize(text)
    assert tokens[:3] == ["<|im_start|>", "user", "Ċ"]
    assert "assistant" in tokens
    words = "".join(" " if letter in ":,.()?\n" else letter for letter in f"{asked} {told}").split()
    assert {word for word in words if "Ġ" + word not in tokens and word not in tokens} == set()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_have_the_ids_of_the_config(tokenizer) -> None:
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
