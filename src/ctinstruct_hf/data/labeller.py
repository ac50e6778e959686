"""The 18 findings of CT-RATE from an English report, by rules: what is named, and whether it is said to be there.

A report is cut into sentences, a sentence into clauses of one statement each. In a clause, findings are found by pattern;
each is then present, absent or uncertain by the words around it: "no … was observed", "without …", "… has resolved",
"cannot be excluded". A finding that any clause says is present is present.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from ..errors import CTInstructError
from ..modeling.configuration_ctinstruct import CT_RATE_DISEASES

Status = Literal["present", "absent", "uncertain"]
FINDINGS: tuple[str, ...] = tuple(CT_RATE_DISEASES)

_LYMPH = r"(?:lymph[\s-]*nod(?:e|es|al|ule|ules)|\bLNs?\b|nodal|lymphatic (?:node|station)s?)"
_CALCIFIED = r"(?:calcif\w*|calcul\w* plaques?|ather\w*|arteriosclero\w*)"
_CORONARY = r"(?:coronar\w*|\bLAD\b|\bRCA\b|\bLCX\b|\bCX\b|\bLMCA\b|left anterior descending|circumflex)"
_AORTIC = (
    r"(?:aort(?:a|as|ic)\b(?! (?:valve|valvular|annul\w+|root valve))|supra-?aortic|(?<!pulmonary )(?<!coronary )arter(?:y|ies|ial)\b"
    r"|vascular|vessels?\b|arcus|aortoiliac|iliac|carotid|subclavian|brachiocephalic)"
)
_GAP = r"[^.;:]{0,70}?"
_THICK = r"(?:thick\w*|increase\w* in (?:wall )?thickness|cuffing|sheathing)"

# what names a finding; the alternatives of one finding are tried in turn
PATTERNS: dict[str, tuple[str, ...]] = {
    "medical material": (
        r"pace-?makers?|\bpacer\b|defibrillators?|\bICD\b|cardiac (?:battery|device)|cardiac implantable|electrodes?\b",
        r"(?<!conventional )catheters?\b|port-?a-?cath|chemo-?port|\bports?\b(?= (?:catheter|chamber|in|is|at|with|tip|seen|on))",
        r"\bstents?\b|\bstented\b|sutures?\b|suture material\w*|sternotomy (?:wires?|sutures?|changes)|sternal wires?|(?:median )?sternotomy",
        r"prosthe\w+|valve replacement|mechanical valve|(?:surgical|metal\w*|operation|operative|endovascular|hemo) (?:clips?|materials?)|\bclips?\b",
        r"(?:breast|silicone|dental|metallic|orthop\w+) implants?|\bimplants?\b|metallic (?:artifacts?|densit\w+|foreign|fixat\w+)",
        r"(?:endotracheal|nasogastric|tracheostomy|thora(?:x|cic|costomy)|chest|drainage|feeding|orogastric|gastrostomy|intubation|NG|ET) (?:tube|cannula|drain)s?",
        r"tracheostomy(?! scar)|cannulas?\b|\bintubat\w+|drainage (?:material|system)|pleural drain\w*|\bpigtail\b|\bdrains?\b",
        r"(?:screws?|plate|rod|fixat\w+) ?(?:and|,)? ?(?:plates?|screws?|fixation|materials?|instrument\w*|hardware)|stabilization materials?|hardware",
        r"(?:IVC|caval|vena cava) filter|\bgrafts?\b|embolization coils?|medical (?:material|device)s?|\bshunt catheter",
    ),
    "arterial wall calcification": (
        rf"{_CALCIFIED}{_GAP}{_AORTIC}",
        rf"{_AORTIC}{_GAP}{_CALCIFIED}",
        rf"(?:wall|mural|vascular) calcif\w+|{_CALCIFIED} (?:plaques?|wall changes)|ather\w+(?: \w+)? (?:changes|plaques?|disease|calcif\w+)|atherosclero\w+",
    ),
    "cardiomegaly": (
        r"cardiomegal\w*|\bbiventricular enlargement|cardiac enlargement|globally enlarged heart",
        r"(?:enlarged|enlargement of the|large|increased?|increase in(?: the)?) (?:heart|cardiac|cardiothoracic)(?! (?:rate|failure))(?: \w+){0,2}",
        r"(?:heart|cardiac|cardiothoracic)(?: (?:sizes?|silhouette|dimensions?|contours?|volume|ratio|index|chambers?|cavities|and|,|shadow|transverse|diameter|its))*"
        r"(?: (?:is|are|was|were|has|have|been|appears?|not|mildly|slightly|moderately|markedly|significantly|minimally|severely|diffusely|globally|also|the|in|been|overall|somewhat))*"
        r" (?:increased?|enlarged|larger|above normal|greater than normal|increase\b)",
    ),
    "pericardial effusion": (
        r"pericard\w+(?:[\s-](?:and|or|space|fluid|recess|leaves|the|cavity|in))* ?(?:effusions?|fluid|collection)",
        r"(?:effusions?|fluid)(?: \w+){0,6} (?:in|between|within|around|of) (?:the )?pericard\w+|hemopericardium",
    ),
    "coronary artery wall calcification": (
        rf"{_CALCIFIED}{_GAP}{_CORONARY}",
        rf"{_CORONARY}{_GAP}(?:{_CALCIFIED}|plaques?)",
        rf"plaques?{_GAP}{_CORONARY}",
    ),
    "hiatal hernia": (
        r"hiat(?:al|us|us'?s)?(?: \w+)?[\s-]*herni\w*|herni\w*(?: \w+){0,4} hiat\w+|hiat\w+(?: \w+){0,3} herni\w*",
        r"(?:para-?o?esophageal|sliding(?:[\s-]type)?(?: \w+){0,2}) herni\w*|herniat\w+ of the (?:stomach|gastric fundus)",
    ),
    "lymphadenopathy": (
        r"(?:lymph)?adenopath\w*|\bLAPs?\b",
        rf"(?:enlarged|enlarging|pathologic\w*|conglomerat\w*|bulky|necrotic|prominent|suspicious|metastatic|increased number and size of)(?:[\s-](?!nodule)[\w-]+,?){{0,6}}? {_LYMPH}",
        rf"{_LYMPH}{_GAP}(?:enlarged|enlargement|pathologic\w*|conglomerat\w*|metasta\w*|increased in size)",
        rf"{_LYMPH}{_GAP}(?P<size>\d[\d.,x×\s*]*(?:mm|cm))",
        rf"(?P<size2>\d[\d.,x×\s*]*(?:mm|cm)){_GAP}{_LYMPH}",
    ),
    "emphysema": (
        r"(?<!subcutaneous )(?<!mediastinal )(?<!cutaneous )(?<!wall )emphysem\w*",
        r"\bbulla\w*|\bbullous|\bblebs?\b",
    ),
    "atelectasis": (
        r"atelecta\w*|fibro-?atelecta\w*",
        r"(?:lobar|lung|pulmonary|lobe|segmental|passive|compressive)(?: \w+){0,2} collapse\w*|collapse\w*(?: \w+){0,4} (?:lobe|lung)s?|collapse-consolidation",
    ),
    "lung nodule": (r"(?:micro-?)?nodul(?:e|es|ar|arit\w+|ation)s?\b|coin lesion",),
    "lung opacity": (
        r"ground[\s-]*glass|\bGGOs?\b|\bGGNs?\b|crazy[\s-]*paving",
        r"(?<!contrast )opacit(?:y|ies)|opacif(?:ied|ication)s? (?:in|of) (?:the )?(?:\w+ ){0,3}(?:lung|lobe|hemithorax)",
        r"infiltrat(?:e|es|ion|ions|ive)\b",
        r"(?:densit(?:y|ies) increases?|increase[sd]?(?: in)? (?:pulmonary |parenchymal )?densit\w+|(?:patchy|consolidative|alveolar|nodular|hazy|parenchymal) densit(?:y|ies)|frosted glass)",
    ),
    "pulmonary fibrotic sequela": (
        r"sequel\w*",
        r"fibro(?:tic|sis|-?atelecta\w*|-?nodular|us bands?)\b|honey-?comb\w*|\bscars?\b|scarring|\bUIP\b",
        r"(?:pleuro)?parenchymal (?:\w+ )?bands?",
    ),
    "pleural effusion": (
        r"pleur\w+(?:[\s-](?:and|or|space|cavity|leaves|free|sided|in|the))* ?(?:effusions?|fluid|collections?)",
        r"(?:effusions?|fluid)(?: [\w,.-]+){0,10} (?:pleura\w*|hemithora\w+|fissures?|costophrenic|thora(?:x|cic cavity))",
        r"(?:pleura\w*|hemithora\w+|fissures?)(?: [\w,.-]+){0,8} (?:effusions?|fluid)",
        r"hydro-?(?:pneumo-?)?thorax|ha?emothora\w+|empyema|chylothorax",
        r"(?<!pericardial )(?<!joint )(?<!peritoneal )(?<!knee )(?<!pericardial and )(?<!abdominal )\beffusions?\b",
    ),
    "mosaic attenuation pattern": (r"mosaic\w*|air[\s-]trapping",),
    "peribronchial thickening": (
        rf"peri-?bronch\w*(?: \w+){{0,3}} {_THICK}",
        rf"{_THICK}(?: \w+){{0,6}} (?:peri-?)?bronch(?:us|i|ial|o\w+)\b|bronch(?:us|i|ial|iolar)\b(?: \w+){{0,4}} {_THICK}|airway(?:s)?(?: \w+){{0,2}} {_THICK}",
        r"thick-?walled bronchi|bronchial wall thick\w*|bronchitis",
    ),
    "consolidation": (r"consolidat\w*|air[\s-]?space disease|lobar pneumonia",),
    "bronchiectasis": (
        r"bronch(?:i|io|iol|iolo)?-?ecta\w*|ectatic (?:changes in the )?bronchi\w*|bronchi\w*(?: \w+){0,3} ecta\w+",
        r"dilat\w+ (?:of (?:the )?)?bronchi\w*|bronch(?:i|us|ial)\b(?: \w+){0,2} dilat\w+",
    ),
    "interlobular septal thickening": (
        rf"\b(?:inter-?|intra-?)?(?:lobular|lobar)?[\s-]*sept(?:a|al|um|ae|ations?)\b(?: \w+){{0,5}} {_THICK}",
        rf"{_THICK}(?: \w+){{0,6}} (?:inter|intra)-?lobular|{_THICK}(?: \w+){{0,3}} septa\w*|crazy[\s-]*paving|kerley|septal lines",
    ),
}

# where a name means something else: tested on the clause, around the mention
_ELSEWHERE: dict[str, str] = {
    "lung nodule": r"thyroid|adrenal|hepatic|\bliver|renal|kidney|splen|pancrea|breast|subcutaneous|cutaneous|skin\b|goiter|goitre|vocal|prostat|muscle|lymph",
    "lung opacity": r"fat(?:ty)? infiltrat|steatosis|\bliver|hepat|bone|bony|vertebra|chest wall|marrow|muscle|subcutaneous|mesenter|omental|renal|perirenal|contrast|opaque|thyroid|breast",
    "consolidation": r"fractur|callus|bone",
    "interlobular septal thickening": r"interventricular|interatrial|nasal|cardiac sept|heart|gallbladder",
    "atelectasis": r"vertebr|compression fractur|gall ?bladder|trachea(?!l)",
    "pulmonary fibrotic sequela": r"fractur|\bribs?\b|vertebr|infarct|\bliver|splen|renal|kidney|uter|breast|costal|bone|surgical scar|incision",
    "arterial wall calcification": r"lymph|granulom|nodul|pleura|thyroid|valve|valvular|annul|costal|cartilage|gall|renal pelvis|pulmonary parenchyma",
    "coronary artery wall calcification": r"lymph|granulom",
    "emphysema": r"subcutaneous|soft tissue",
    "medical material": r"intravenous contrast|contrast (?:material|medium|agent)",
    "pleural effusion": r"ascit|joint|peritone|perihepatic|perisplen|pelvic",
    "peribronchial thickening": r"$^",
    "hiatal hernia": r"umbilical|inguinal|bochdalek|morgagni|incisional|disc\b|disk",
}
_LUNG = r"lung|(?:upper|middle|lower) lobe|pulmon|pleur|parenchym|apic|apex|bronch|hemithora|segment|basal|lingul|subpleural|perifissur"

_SENTENCE = re.compile(
    r"(?<=[.!?;])(?<!\d\.)(?<!\bDr\.)(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bapprox\.)(?<!\bcf\.)\s+(?=\S)|(?<=\d\.)\s+(?=[A-Z])|[\r\n]+|(?<=[a-z]{2}\.)(?=[A-Z])|;"
)
_HEADING = re.compile(r"\s*(?:technique|findings?|impression|conclusion|opinion|summary|result)s?\s*:\s*(?=\S)", re.I)
_PREDICATE = (
    r"\b(?:is|are|was|were|has|have|had|shows?|showed|demonstrates?|demonstrated|reveals?|revealed|contains?|appears?|remains?"
    r"|persists?|attracted|draws?|there)\b"
    r"|(?<!\bis )(?<!\bare )(?<!\bwas )(?<!\bwere )(?<!\bbeen )(?<!\bnot )\b(?:observed|detected|noted|identified|seen|resolved|disappeared)\b(?=[,.;]|$| in\b| at\b| on\b)"
)
_BREAK = re.compile(
    r"\b(?:but|however|although|though|whereas|while|nevertheless|except(?:ing)?(?: for| from| that)?|other than|apart from"
    r"|aside from|besides|with the exception of|in addition to this|otherwise|yet)\b|\(|\)",
    re.I,
)
_SEPARATOR = re.compile(r",(?!\d)|\band\b|\bwith\b|\bas well as\b", re.I)
_NEW_START = re.compile(
    r",\s+(?=(?:with )?(?:no|without|not|there|an?|mild|moderate|severe|small|large|minimal|bilateral|diffuse|multiple|few|several|stable|unchanged|new"
    r"|the|also|in the)\b)",
    re.I,
)

# phrases that look like a negation and are none: the finding is there, it just did not change
_NO_CHANGE = re.compile(
    r"\b(?:no|without|not|nor|n't)(?: (?:a|an|any|been|being|have|has|shown?|demonstrated?|undergone?|significant\w*|substantial\w*|appreciable|"
    r"appreciably|relevant|interval|major|obvious|clear\w*|further|marked\w*|remarkabl[ey]|definite|evident|much))*"
    r" (?:chang\w*|increas\w*|decreas\w*|progress\w*|regress\w*|growth|grown?|differen\w*|alter\w*|enlargement of the (?:known|previous)\w*|"
    r"improv\w*|worsen\w*|deteriorat\w*)(?: in| of| was| is| were| from| compared)?|\bnot only\b|\bno longer limited\b",
    re.I,
)
_CHANGE_OF_SIZE = re.compile(r"cardio|heart", re.I)
_DOUBT = re.compile(
    r"\b(?:cannot|could not|can not|can't|couldn't|not) (?:be )?(?:\w+ )?(?:excluded|ruled out|distinguished)|\bnot excluded|"
    r"\b(?:possib\w+|probabl\w+|may (?:be|represent|indicate|reflect|suggest)|might|suspicio\w+|suspect\w*|questionable|equivocal|"
    r"suggest\w*|differential diagnos\w+|presumabl\w+|likely|could (?:be|represent)|concern(?:ing)? for|in favou?r of)\b|\?",
    re.I,
)
_NOT_ASKED = re.compile(r"\b(?:to )?(?:rule[ds]? out|exclude|evaluat\w+ (?:for|in terms of)|assess\w* for|query|screen\w* for|clinical(?:ly)? suspicion of|indication)\b", re.I)  # fmt: skip
_FORWARD = re.compile(
    r"\b(?:no|without|absence of|absent|free of|free from|negative for|lack of|lacks|neither|nor|denies|never|non-?existent|devoid of|"
    r"clear of|ruled out|excludes?|not|n't|resolution of|resolved|disappearance of)\b",
    re.I,
)
_BACKWARD = re.compile(
    r"\bnot\b|n't\b|\b(?:absent|negative|resolved|disappeared|no longer|excluded|ruled out|never|nonexistent|unremarkable|none|"
    r"(?:completely|totally|entirely) (?:regressed|cleared|resorbed|resolved)|cleared|replaced by|no finding|within normal limits|not present|regressed completely)\b"
    r"|:\s*(?:no|none|negative|absent|not)\b|\bno\s*[.]?$",
    re.I,
)
_NOT_ENLARGED = re.compile(
    r"\b(?:do(?:es)? not|did not|not|non|without) (?:\w+ ){0,2}(?:reach|exceed|pathologic\w*|enlarged|in pathologic\w*)|sub-?centimet\w*|"
    r"(?:less than|below|under|smaller than|<)\s*(?:1 ?cm|10 ?mm)|\bnormal(?:[\s-]sized| size)?\b|physiologic\w*|not reach\w*|millimetric (?:sized? )?lymph",
    re.I,
)
_NORMAL = re.compile(
    r"\b(?:physiologic\w*|within normal|normal limits|(?:is|are|was|were|of) (?:\w+ )?normal|natural|upper limits?)\b",
    re.I,
)
_SIZE = re.compile(r"\d+(?:[.,]\d+)?")


@dataclass(frozen=True)
class Mention:
    """One place where a report names a finding.

    Attributes:
        finding, status: which, and what is said of it.
        clause: the part of the sentence that says so.
        span: characters of its sentence in the report, start and end.
    """

    finding: str
    status: Status
    clause: str
    span: tuple[int, int] = (0, 0)


class ReportLabels(dict[str, bool]):
    """{finding: there or not}; names are found in either case, as CT-RATE's columns write them too."""

    def __missing__(self, name: str) -> bool:
        if name.lower() == name:
            raise KeyError(name)
        return self[name.lower()]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name.lower() if isinstance(name, str) else name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401, `get` itself


def label_report(text: str, uncertain: bool = True) -> ReportLabels:
    """Which of CT-RATE's 18 findings an English report says are there.

    Args:
        text: the findings and impression as radiologists write them; leave the clinical question out.
        uncertain: what a finding counts as that is only called possible, or not excluded.

    Returns:
        {finding: there or not}, in the order of CT-RATE's columns, named as in `CTInstructConfig.disease_lists`. What is
        not mentioned is not there.

    Raises:
        CTInstructError: where the report is no text.
    """
    found: dict[str, set[Status]] = {}
    for mention in find_mentions(text):
        found.setdefault(mention.finding, set()).add(mention.status)
    accepted: set[Status] = {"present", "uncertain"} if uncertain else {"present"}
    return ReportLabels({name: bool(found.get(name, set()) & accepted) for name in FINDINGS})


def find_mentions(text: str, patterns: Mapping[str, Sequence[str]] | None = None) -> list[Mention]:
    """Every mention of findings in the order of the text, with what is said of it.

    Args:
        text: of a report.
        patterns: {finding: regular expressions that name it}; the 18 of CT-RATE by default.

    Raises:
        CTInstructError: where the report is no text.
    """
    if not isinstance(text, str):
        raise CTInstructError(f"a report must be text, not {type(text).__name__}.")
    return [
        Mention(finding, status, clause, span)
        for sentence, span in _sentences(text)
        for clause in _clauses(sentence)
        for finding, status in _read(clause, PATTERNS if patterns is None else patterns)
    ]


def _sentences(text: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Each sentence in plain form, and its characters in the text without a heading in front."""
    plain = re.sub(r"[‐-―]", "-", text)  # as long as the text
    plain = re.sub(r"(?<=\d)\s+(?=(?:mm|cm)\b)", lambda match: " " * len(match[0]), plain)
    cuts = [(match.start(), match.end()) for match in _SENTENCE.finditer(plain)]
    for (_, start), (stop, _) in pairwise([(0, 0), *cuts, (len(plain), len(plain))]):
        sentence = plain[start:stop]
        if sentence.strip():
            heading = _HEADING.match(sentence)
            first = start + (heading.end() if heading else len(sentence) - len(sentence.lstrip()))
            yield _spell_out(" ".join(sentence.split())), (first, start + len(sentence.rstrip()))


def _spell_out(sentence: str) -> str:
    """Joint heads get their own: "pleural or pericardial effusion" -> "pleural effusion or pericardial effusion"."""
    joint = r"(?:\s*[-/,]\s*|,?\s+(?:and/or|and|or|nor)\s+)"
    sentence = re.sub(
        rf"\b(pleural|pericardial)({joint})(?:(thickening)({joint}))?(pleural|pericardial) (effusions?|fluid)",
        lambda m: f"{m[1]} {m[6]}{_spaced(m[2])}{m[5]} {m[6]}",
        sentence,
        flags=re.I,
    )
    sentence = re.sub(
        rf"\b(pleural|pericardial) thickening({joint})effusion", r"\1 effusion\2thickening", sentence, flags=re.I
    )
    sentence = re.sub(r"\beffusion\s*-\s*thickening", "effusion or thickening", sentence, flags=re.I)
    sentence = re.sub(r"\bthickening\s*-\s*effusion", "effusion or thickening", sentence, flags=re.I)
    return sentence


def _spaced(joint: str) -> str:
    return f" {joint.strip()} " if joint.strip() in "-/" else joint


def _clauses(sentence: str) -> Iterator[str]:
    """Parts of a sentence that make one statement each."""
    for part in _BREAK.split(sentence):
        for piece in _NEW_START.split(part or ""):
            yield from _one_predicate_each(piece)


def _one_predicate_each(part: str) -> Iterator[str]:
    """Cut between two predicates, at the first separator after the one before."""
    start = 0
    verbs = [match for match in re.finditer(_PREDICATE, part, re.I) if not _relative(part, match.start())]
    for before, after in pairwise(verbs):
        cut = _SEPARATOR.search(part, max(before.end(), start), after.start())
        if cut and cut.start() > start:
            yield part[start : cut.start()].strip(" ,")
            start = cut.start() if cut[0].lower() == "with" else cut.end()
    yield part[start:].strip(" ,")


def _relative(part: str, place: int) -> bool:
    """Whether a verb belongs to "which is", "that are", "the largest of which is"."""
    return bool(re.search(r"\b(?:which|that|who|whose)\s*$", part[:place]))


def _read(clause: str, patterns: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, Status]]:
    """(finding, what is said of it) of a clause."""
    if not clause:
        return
    shadow = _NO_CHANGE.sub(lambda match: "~" * len(match[0]), clause)
    for finding, names in patterns.items():
        spans: list[tuple[int, int]] = []
        for pattern in names:
            for match in re.finditer(pattern, clause, re.I):
                if any(start <= match.start() and match.end() <= stop for start, stop in spans):
                    continue
                if _means_something_else(finding, clause, match):
                    continue
                spans.append(match.span())
                yield finding, _status(finding, clause, shadow, match)


def _means_something_else(finding: str, clause: str, match: re.Match[str]) -> bool:
    if match[0].lower() == finding:  # in its own words, whatever is listed beside it
        return False
    elsewhere = _ELSEWHERE.get(finding)
    if finding == "lymphadenopathy":
        size = match.groupdict().get("size") or match.groupdict().get("size2")
        if size is not None and _short_axis(size) < 10:
            return True
        return bool(_NOT_ENLARGED.search(clause)) and not re.search(r"adenopath", match[0], re.I) and size is None
    if finding == "arterial wall calcification":
        named = re.sub(
            _CORONARY + r"(?: (?:and|,) " + _CORONARY + r")*(?: arter\w+)?(?: walls?)?", "", match[0], flags=re.I
        )
        if re.search(_CORONARY, clause, re.I) and not re.search(_AORTIC, re.sub(_CORONARY + r"(?: arter\w+)?(?: wall\w*)?", "", clause, flags=re.I), re.I):  # fmt: skip
            return True
        if not re.search(_CALCIFIED, named, re.I) and not re.search(r"wall|mural|vascular", named, re.I):
            return True
    if (
        finding == "lung opacity"
        and "densit" in match[0].lower()
        and re.search(r"sequel|fibro", clause[: match.start()], re.I)
    ):
        return True
    if elsewhere is None:
        return False
    near = clause[max(0, match.start() - 45) : match.end() + 45]
    other = re.search(elsewhere, near, re.I)
    if other is None:
        return False
    if finding in ("lung nodule", "lung opacity", "pulmonary fibrotic sequela", "consolidation", "emphysema"):
        return not re.search(_LUNG, near, re.I)
    if finding == "medical material":
        return re.search(r"material|agent|medium", match[0], re.I) is not None
    if finding == "pleural effusion":
        return not re.search(r"pleur|thora", match[0], re.I)
    return True


def _short_axis(size: str) -> float:
    """mm of "12 x 9 mm": the smaller number."""
    numbers = [float(one.replace(",", ".")) for one in _SIZE.findall(size)]
    return min(numbers, default=0.0) * (10.0 if "cm" in size.lower() else 1.0)


def _status(finding: str, clause: str, shadow: str, match: re.Match[str]) -> Status:
    before, after = shadow[: match.start()], shadow[match.end() :]
    if finding == "cardiomegaly" and re.search(r"~", shadow[match.start() : match.end()]):
        return "absent"  # "the heart size is not increased"
    if finding == "cardiomegaly" and not match[0].lower().startswith(
        "cardiomeg"
    ):  # there a growth is the finding itself
        before, after = clause[: match.start()], clause[match.end() :]
    inside = shadow[match.start() : match.end()]
    doubt = _DOUBT.search(clause)
    if doubt and re.search(r"exclud|ruled out|distinguish", doubt[0], re.I):
        return "uncertain"
    if _negated_before(before) or _negated_after(after) or _negated_inside(inside):
        return "absent"
    if finding in ("cardiomegaly", "pericardial effusion", "lymphadenopathy") and _NORMAL.search(after):
        return "absent"
    if _NOT_ASKED.search(before):
        return "absent"
    return "uncertain" if doubt else "present"


def _negated_before(before: str) -> bool:
    """A negation to the left whose reach has not ended: it ends with its own predicate and what follows that."""
    for word in _FORWARD.finditer(before):
        between = before[word.end() :]
        if word[0].lower() in ("no", "without", "neither", "nor", "not", "n't") and re.search(
            r"\b(?:is|are|was|were) (?:seen|observed|detected|noted|identified|present)\b.*\b(?:and|with)\b", between
        ):
            continue
        return True
    return False


def _negated_after(after: str) -> bool:
    after = re.sub(r",\s*(?:which|that|who)\b[^,]*,", ",", after)  # "…, which was seen before, …"
    word = _BACKWARD.search(after)
    if word is None:
        return False
    # "nodules without calcification", "effusion with no loculation": the negation belongs to what follows it
    lead = after[: word.start()]
    if re.search(r"\b(?:with|without|which|that)\b", lead):
        return False
    return not re.search(r",\s*$", lead) or word[0].lower() not in ("not",)


def _negated_inside(inside: str) -> bool:
    return bool(re.search(r"\b(?:no|not|without|n't|free (?:of|from)|devoid of)\b", inside, re.I))


__all__ = ["FINDINGS", "PATTERNS", "Mention", "ReportLabels", "find_mentions", "label_report"]
