"""A start of the text projection with which a small decoder tells names apart at once. Not in the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...data.descriptions import texts_of
from ...data.mixture import MixtureEntry, first_rows
from ...modeling.pretraining_ctinstruct import CTInstructForPretraining


@torch.no_grad()
def spread_texts(model: CTInstructForPretraining, words: Any, entries: Sequence[MixtureEntry], most: int = 200) -> None:
    """Start the text projection so that the names, category sentences and some reports of a mixture are spread evenly.

    A sentence encoder puts "right lung" and "left lung" almost in one place, and a random projection leaves them there:
    the decoder then needs hundreds of steps to tell them apart. This is a start only; the projection is trained.
    """
    names: dict[str, None] = {}
    reports: list[str] = []
    for row in first_rows(entries, most):
        names |= dict.fromkeys(texts_of(row))
        reports += row["texts"][:1]
    texts = [*names, *reports[:most]]
    if len(texts) < 3:
        return
    training = model.training
    model.eval()
    read = torch.cat([model.encode_texts(*words(texts[first : first + 32])) for first in range(0, len(texts), 32)])
    model.train(training)
    middle = read.mean(0)
    _, sizes, directions = torch.linalg.svd(read - middle, full_matrices=False)
    width = model.text_projection.out_features
    kept = (sizes > 1e-3 * sizes[0]).nonzero().flatten()[:width]
    white = directions[kept] * (len(texts) ** 0.5 / sizes[kept])[:, None]  # unit variance along each
    turn = torch.linalg.qr(torch.randn(width, width))[0][:, : len(kept)] * (width / len(kept)) ** 0.5
    model.text_projection.weight.copy_(turn @ white)
    model.text_projection.bias.copy_(-(turn @ white) @ middle)
