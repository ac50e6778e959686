"""Conversations about findings that nobody has."""

from __future__ import annotations

from collections import Counter

from ctinstruct_hf.data.samples import text_of
from ctinstruct_hf.phantoms.imagined import imagined_conversation


def test_imagined_conversations_are_words_alone_of_every_kind() -> None:
    kinds: Counter[str] = Counter()
    for seed in range(300):
        messages = imagined_conversation(seed, turns=4)
        assert messages == imagined_conversation(seed, turns=4)
        assert [turn["role"] for turn in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(part["type"] == "text" for turn in messages for part in turn["content"])
        text = " ".join(text_of(turn) for turn in messages)
        assert "<SEG>" not in text
        assert "<disease_confidence>" not in text
        for kind, sign in (
            ("choice", "Answer:"),
            ("report", "Technique:"),
            ("count", "How many"),
            ("side", "which side"),
        ):
            kinds[kind] += sign in text
    assert 100 < kinds["choice"] < 230
    assert min(kinds.values()) > 10
    assert imagined_conversation(0) != imagined_conversation(1)


def test_where_nothing_or_all_is_present_there_are_other_questions(monkeypatch) -> None:
    from ctinstruct_hf.phantoms import imagined

    labels, _, phase = imagined.imagine(imagined.np.random.default_rng(0))
    monkeypatch.setattr(imagined, "imagine", lambda rng: (dict.fromkeys(labels, 0), [], phase))
    for seed in range(8):
        assert "Answer:" not in " ".join(text_of(turn) for turn in imagined_conversation(seed))
