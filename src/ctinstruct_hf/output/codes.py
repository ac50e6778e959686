"""Codes of structures: SNOMED CT where it has one, else a private scheme whose name says so."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, replace
from typing import Any

PRIVATE_SCHEME = "99CTINSTRUCT"
NOTICE = "Research use only. Made by a model. Not a diagnosis."  # in every object
# key of a finding's measurements -> code, scheme and meaning
MEASUREMENTS = {
    "probability": ("122157", "DCM", "Probability"),
    "volume_ml": ("118565006", "SCT", "Volume"),
    "diameter_mm": ("81827009", "SCT", "Diameter"),
    "mean_hu": ("112031", "DCM", "Attenuation Coefficient"),
}
AGREEMENT = ("CTI-AGREEMENT", PRIVATE_SCHEME, "Agreement of report, probability, question and mask")
REPORT = ("18748-4", "Diagnostic imaging report")  # of LOINC

ANATOMY = ("123037004", "Anatomical Structure")
TISSUE = ("85756007", "Tissue")
ABNORMAL = ("49755003", "Morphologically Abnormal Structure")
# name -> (SNOMED CT code, meaning, category); a side is a modifier of the pair's code
CODES: dict[str, tuple[str, str, tuple[str, str]]] = {
    "body": ("38266002", "Entire body", ANATOMY),
    "lungs": ("39607008", "Lung", ANATOMY),
    "trachea": ("44567001", "Trachea", ANATOMY),
    "heart": ("80891009", "Heart", ANATOMY),
    "aorta": ("15825003", "Aorta", ANATOMY),
    "esophagus": ("32849002", "Esophagus", ANATOMY),
    "liver": ("10200004", "Liver", ANATOMY),
    "spleen": ("78961009", "Spleen", ANATOMY),
    "stomach": ("69695003", "Stomach", ANATOMY),
    "pancreas": ("15776009", "Pancreas", ANATOMY),
    "kidneys": ("64033007", "Kidney", ANATOMY),
    "urinary bladder": ("89837001", "Urinary bladder", ANATOMY),
    "spine": ("421060004", "Vertebral column", ANATOMY),
    "ribs": ("113197003", "Rib", ANATOMY),
    "sternum": ("56873002", "Sternum", ANATOMY),
    "bones": ("272673000", "Bone", ANATOMY),
    "muscle": ("91727004", "Muscle", TISSUE),
    "subcutaneous fat": ("67769000", "Subcutaneous fatty tissue", ANATOMY),
    "lung nodule": ("27925004", "Nodule", ABNORMAL),
    "pleural effusion": ("41699000", "Effusion", ABNORMAL),
    "pericardial effusion": ("41699000", "Effusion", ABNORMAL),
    "liver lesion": ("52988006", "Lesion", ABNORMAL),
    "kidney stone": ("56381008", "Calculus", ABNORMAL),
    "lymphadenopathy": ("30746006", "Lymphadenopathy", ABNORMAL),
}
SIDES = {
    "right": ("24028007", "Right"),
    "left": ("7771000", "Left"),
    "both": ("51440002", "Right and left"),
}
PAIRS = ("lung", "kidney")


# findings that a model gives probabilities of, as disorders of SNOMED CT
FINDINGS = {
    "arterial wall calcification": ("237897009", "Vascular calcification"),
    "atelectasis": ("46621007", "Atelectasis"),
    "bronchiectasis": ("12295008", "Bronchiectasis"),
    "cardiomegaly": ("8186001", "Cardiomegaly"),
    "consolidation": ("95436008", "Pulmonary consolidation"),
    "emphysema": ("87433001", "Pulmonary emphysema"),
    "hiatal hernia": ("84089009", "Hiatal hernia"),
    "kidney stone": ("95570007", "Kidney stone"),
    "liver lesion": ("300331000", "Lesion of liver"),
    "lymphadenopathy": ("30746006", "Lymphadenopathy"),
    "pericardial effusion": ("373945007", "Pericardial effusion"),
    "pleural effusion": ("60046008", "Pleural effusion"),
    "pneumothorax": ("36118008", "Pneumothorax"),
    "pulmonary fibrotic sequela": ("51615001", "Fibrosis of lung"),
}


@dataclass(frozen=True)
class Coded:
    """A structure or finding as DICOM codes it; `side` and `category` are a SNOMED CT code and its meaning."""

    label: str
    code: str
    scheme: str
    meaning: str
    category: tuple[str, str]
    side: tuple[str, str] | None


def plain_words(name: str) -> str:
    """A name by which the same finding is found again: lower case, one space between words."""
    return re.sub(r"[\s_-]+", " ", name.lower()).strip()


def coded_finding(name: str) -> Coded:
    """The code of a finding: of the disorder where there is one, else as `coded`."""
    found = coded(name)
    code = FINDINGS.get(plain_words(name))
    return found if code is None else replace(found, code=code[0], meaning=code[1], scheme="SCT")


def coded(name: str) -> Coded:
    """The code of a name; a name without one in SNOMED CT gets one of the private scheme, the same each time."""
    label = re.sub(r"[\\\x00-\x1f]", " ", name).strip()[:64] or "segment"
    words = plain_words(name)
    side, _, rest = words.partition(" ")
    side, organ = (side, f"{rest}s") if side in SIDES and rest in PAIRS else ("both", words)
    code, meaning, category = CODES.get(organ, (f"CTI{zlib.crc32(words.encode()):08X}", label, ANATOMY))
    scheme = "SCT" if organ in CODES else PRIVATE_SCHEME
    paired = organ in {f"{one}s" for one in PAIRS}
    return Coded(label, code, scheme, meaning, category, SIDES[side] if paired else None)


def private_scheme() -> Any:
    """The item of CodingSchemeIdentificationSequence that says what the private codes are."""
    from pydicom import Dataset

    item = Dataset()
    item.CodingSchemeDesignator = PRIVATE_SCHEME
    item.CodingSchemeName = "Private codes of ctinstruct-hf, research use only"
    item.CodingSchemeResponsibleOrganization = "ctinstruct-hf"
    return item


__all__ = [
    "AGREEMENT",
    "CODES",
    "MEASUREMENTS",
    "NOTICE",
    "PRIVATE_SCHEME",
    "REPORT",
    "SIDES",
    "Coded",
    "coded",
    "coded_finding",
    "plain_words",
    "private_scheme",
]
