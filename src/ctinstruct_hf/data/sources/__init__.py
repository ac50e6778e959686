"""The public data sets of the paper: what each downloaded folder looks like, turned into cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from ..samples import Case, InstructionSample
from . import array_captions, ct_rate, pictures, rad_chestct, released_json, segmentations
from .common import Problem

Found = Case | InstructionSample | Problem
SOURCES: dict[str, Callable[[Path], Iterator[Found]]] = {
    "ct_rate": ct_rate.cases,
    "rad_chestct": rad_chestct.cases,
    "rp3d_cap": array_captions.rp3d_captions,
    "rp3d_vqa": array_captions.rp3d_questions,
    "m3d_cap": array_captions.m3d_captions,
    "m3d_vqa": array_captions.m3d_questions,
    "totalsegmentator": segmentations.totalsegmentator,
    "abdomen_1k": segmentations.abdomen_1k,
    "ct_org": segmentations.ct_org,
    "covid_19": segmentations.covid_19,
    "nnunet": segmentations.nnunet,
    "ucsd_ai4h": pictures.ucsd_ai4h,
    "sars_cov_2": pictures.sars_cov_2,
    "cc_ccii": pictures.cc_ccii,
    "radimagenet": pictures.radimagenet,
    "released": released_json.samples,
}
