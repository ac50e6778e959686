"""Whether WordNet is installed."""

from __future__ import annotations

import pytest

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.evaluation import wordnet


def has_wordnet() -> bool:
    try:
        wordnet.find_wordnet()
    except CTInstructError:
        return False
    return True


needs_wordnet = pytest.mark.skipif(not has_wordnet(), reason=wordnet.HOW_TO_GET)
