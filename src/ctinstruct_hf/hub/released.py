"""The authors' checkpoint -> this package's format: `ctinstruct convert released`."""

from __future__ import annotations

from ..inference.released.checkpoint import Entry, find_checkpoint, read_entries
from ..inference.released.convert import convert_released
from ..inference.released.rules import HEAD, RULES, Rule, convert_tensor, our_names
from ..inference.released.stage_one import convert_stage_one, is_stage_one, stage_one_beside

__all__ = ["HEAD", "RULES", "Entry", "Rule", "convert_released", "convert_stage_one", "convert_tensor", "find_checkpoint",
           "is_stage_one", "our_names", "read_entries", "stage_one_beside"]  # fmt: skip
