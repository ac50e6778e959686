"""Encode once, ask many: a scan opened with a model, and every question about it by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.choices import chosen_option
from ..data.names import Names, disease_names, structure_names
from ..data.templates import (
    LETTERS,
    REPORT,
    answer_diagnosis,
    answer_segmentation,
    ask_choice,
    ask_diagnosis,
    ask_segmentation,
)
from ..errors import CTInstructError
from ..modeling.modeling_ctinstruct import CTInstructForConditionalGeneration
from ..output.folder import save_results
from ..output.results import Origin, Results
from ..processing.processing_ctinstruct import CTInstructProcessor
from ..processing.volume import CTVolume
from .calibration import calibration_of
from .comparison import compare_studies
from .consensus import agreed_report
from .encoded import EncodedScans, Reply
from .findings import Evidence, find_findings
from .fingerprint import model_fingerprint
from .fitness import Fitness, study_fitness
from .folders import BUNDLED_MODEL
from .models import load_model, load_processor, model_name, notes_on


class Answer(str):
    """An answer's text, with what its special tokens stand for.

    Attributes:
        masks: bool (depth, height, width) per `<SEG>`, on the volume's grid.
        probabilities: one per `<disease_confidence>`.
    """

    masks: list[np.ndarray]
    probabilities: list[float]

    def __new__(cls, text: str, masks: Sequence[np.ndarray] = (), probabilities: Sequence[float] = ()) -> Answer:
        answer = super().__new__(cls, text)
        answer.masks = list(masks)
        answer.probabilities = list(probabilities)
        return answer


def _check_names(argument: str, names: Sequence[str]) -> None:
    """Raises CTInstructError for no name, or for one without a letter or digit."""
    if not names:
        raise CTInstructError(f"{argument} is empty: give a name at least.")
    for name in names:
        if not isinstance(name, str) or not any(letter.isalnum() for letter in name):
            raise CTInstructError(f"{argument} has {name!r}: give names of letters or digits.")


def mask_names(question: str, count: int) -> list[str]:
    """Names for the masks of an answer: what was asked, numbered where there are several."""
    return [question[:60] + (f" ({number})" if count > 1 else "") for number in range(1, count + 1)]


class Study(EncodedScans):
    """One scan, or several of one patient in the order given, and a model that answers about it.

    Args:
        volumes: the scan or scans.
        model, processor: what `load_model` returns.
        names: {name: other names} beside those of `data/names.yaml`, see `data.names.read_names`.
    """

    def __init__(
        self,
        volumes: CTVolume | Sequence[CTVolume],
        model: CTInstructForConditionalGeneration,
        processor: CTInstructProcessor,
        names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(volumes, model, processor)
        self.results = Results()
        self.names = names
        self.evidence: dict[str, Evidence] = {}
        self.structures: Names = structure_names(model, processor, names)
        self.diseases: Names = disease_names(model, names)
        self.notes: list[str] = []

    @classmethod
    def open(
        cls,
        source: Any,
        model: str | tuple[CTInstructForConditionalGeneration, CTInstructProcessor] | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        quantize: str | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
        **reading: Any,
    ) -> Study:
        """Read a scan and make it ready for questions.

        Args:
            source: whatever `read_volume` takes, or a list of such for several scans of one patient.
            model: a folder, a name on the Hub, or (model, processor); the bundled model by default.
            device, dtype, revision, quantize: see `load_model`.
            names: {name: other names} that users write, beside the package's, see `data.names.read_names`.
            reading: further arguments of `read_volume` (spacing, series, window, max_bytes).

        Raises:
            CTInstructError: where the scan or the model cannot be read.
        """
        from ..processing.volume_reading import read_volume

        sources = source if isinstance(source, list | tuple) else [source]
        processor = model[1] if isinstance(model, tuple) else load_processor(model, revision)
        keep = processor.image_processor.intensity == "zscore"
        # the scan first: it is where things go wrong, and it is quick
        volumes = [read_volume(one, **{"keep_padding": keep, **reading}) for one in sources]
        network = model[0] if isinstance(model, tuple) else load_model(model, device, dtype, revision, quantize)[0]
        return cls(volumes, network, processor, names)

    @property
    def warnings(self) -> list[str]:
        """What was odd about the scan, which names were not known, what saving had to say, and whether the model is
        trained."""
        return [*self._scan_warnings, *self.results.notes, *notes_on(self.model.config)]

    @property
    def _scan_warnings(self) -> list[str]:
        return [*(note for volume in self.volumes for note in volume.warnings), *self.notes]

    def _note(self, notes: Iterable[str | None]) -> None:
        self.notes += [note for note in dict.fromkeys(notes) if note and note not in self.notes]

    # the questions

    def ask(self, question: str, *, max_new_tokens: int = 256, **generation: Any) -> Answer:
        """Ask in words.

        Args:
            question: anything; a request for masks or probabilities is answered with them where the model does so.
            max_new_tokens, generation: as in `generate`; greedy by default.
        """
        return self.ask_many([question], max_new_tokens=max_new_tokens, **generation)[0]

    @torch.inference_mode()
    def ask_many(self, questions: Sequence[str], *, max_new_tokens: int = 256, **generation: Any) -> list[Answer]:
        """Several questions in one batch over one reading of the images; each is answered as if alone.

        Args:
            questions: as in `ask`; names in them are written as the model knows them, see `data.names.Names.question`.
            max_new_tokens, generation: as in `generate`; greedy by default.
        """
        asked = [self.structures.question(question) for question in questions]
        self._note(note for _, notes in asked for note in notes)
        answers = []
        replies = self.reply([text for text, _ in asked], max_new_tokens, **generation)
        for question, (text, _), reply in zip(questions, asked, replies, strict=True):
            masks, probabilities = self._masks(text, reply), reply.probabilities
            answers.append(Answer(self.processor.write_out(reply.text, probabilities), masks, probabilities))
            self.results.answers.append((question, str(answers[-1])))
        return answers

    @torch.inference_mode()
    def report(self, *, consensus: int = 1, max_new_tokens: int = 512, **generation: Any) -> str:
        """A radiology report.

        Args:
            consensus: drafts, of which the one is kept that agrees best with the probabilities and with direct questions;
                the first is greedy, the others are sampled.
            max_new_tokens, generation: as in `generate`; greedy by default.
        """
        if consensus == 1:
            (self.results.report,) = self.write_plainly([REPORT[0]], max_new_tokens, generation)
        else:
            self.results.report = agreed_report(self, consensus, max_new_tokens, generation)
        return self.results.report

    def findings(self, names: str | Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
        """Probability, report, a direct question and mask of each finding, and whether they agree.

        The report is written where there is none yet. Masks that are not empty become masks of the study.

        Args:
            names: findings as people write them; every one of the model's lists by default.

        Returns:
            {name: {"probability", "threshold" from which it counts as there, "report" (present, absent, not mentioned),
            "sentences" (start, end, text), "question", "answer", "mask" (voxels, volume_ml … of
            `output.measure.measure_finding` and "mean_probability"; None where the model cannot mark it), "says" {source:
            there or not}, "agreement" (consistent, unchecked, or which sources say what), "disagree" (pairs of sources),
            "remarks" (where words and mask differ in size, side or number)}}.

        Raises:
            CTInstructError: for a name that the model does not know.
        """
        return find_findings(self, names)

    def fitness(self) -> Fitness:
        """Whether the scan is like those that the model was calibrated on (`ctinstruct calibrate`), and what is unusual."""
        found = study_fitness(self)
        self.results.fitness = found.to_json()
        self._note([found.warning])
        return found

    def compare(self, other: Study, names: str | Sequence[str] | None = None) -> dict[str, list[dict[str, Any]]]:
        """How each finding has grown since an earlier study of the same patient, in mm and per cent.

        See `inference.comparison.compare_studies`.
        """
        return compare_studies(self, other, names)

    @torch.inference_mode()
    def write_plainly(self, questions: Sequence[str], max_new_tokens: int, generation: dict[str, Any]) -> list[str]:
        """Texts with their special tokens written out, which are kept nowhere."""
        replies = self.reply(questions, max_new_tokens, **generation)
        return [self.processor.write_out(reply.text, reply.probabilities) for reply in replies]

    def _masks(self, question: str, reply: Reply) -> list[np.ndarray]:
        """The masks of an answer on the volume's grid."""
        named = self.processor.structures_named(question, reply.text)
        to_grid = self.processor.image_processor.mask_from_canvas
        return [to_grid(mask, self.volume, name=name) for mask, name in zip(reply.masks, named, strict=True)]

    @torch.inference_mode()
    def choose(self, question: str, options: Sequence[str]) -> str:
        """Multiple choice: the option that the model's answer names, or, where it names none, the likeliest as an answer.

        Raises:
            CTInstructError: for fewer than two options, or more than letters.
        """
        if not 2 <= len(options) <= len(LETTERS):
            raise CTInstructError(f"options has {len(options)} entries: give 2 to {len(LETTERS)}.")
        asked = ask_choice(question, options)
        (reply,) = self.reply([asked], 128)
        named = chosen_option(self.processor.write_out(reply.text), options)
        chosen = str(options[self._likeliest(asked, options) if named is None else named])
        self.results.answers.append((asked, chosen))
        return chosen

    def _likeliest(self, asked: str, options: Sequence[str]) -> int:
        scores = []
        for letter, option in zip(LETTERS, options, strict=False):
            answer = f"({letter}) {option}"
            ids, states = self._states(asked, answer)
            count = len(self.processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
            logits = self.model.lm_head(states[:, -count - 1 : -1]).float().log_softmax(-1)
            scores.append(float(logits.gather(-1, ids[:, -count:, None]).sum()))
        return int(np.argmax(scores))

    @torch.inference_mode()
    def segment(self, names: str | Sequence[str], threshold: float = 0.5) -> Any:
        """Masks by name.

        Args:
            names: a structure or finding, or several, as people write them: `structures` finds the model's names. A name
                that it does not know is asked as written, with a note in `warnings`.
            threshold: probability above which a voxel belongs to the mask. Whether there is one at all, `mask_floors` of
                the image processor tells.

        Returns:
            bool (depth, height, width) for one name, {name: mask} for several, by the names given; `volume.to_source` puts
            them on the file's grid.

        Raises:
            CTInstructError: for no name, or an empty one.
        """
        wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        _check_names("names", wanted)
        found = [self.structures.find(name) for name in wanted]
        self._note(one.note for one in found)
        asked = list(dict.fromkeys(name for one in found for name in one.names))
        level = float(np.log(threshold / (1 - threshold)))
        painted = {
            name: self.processor.image_processor.mask_from_canvas(mask, self.volume, level, name)
            for name, mask in zip(asked, self.mask_logits(asked), strict=True)
        }
        masks = {one.given: np.logical_or.reduce([painted[name] for name in one.names]) for one in found}
        kept = {name.casefold(): name for name in masks}  # names that differ by case only are one structure
        for name in list(self.results.masks):
            if kept.get(name.casefold(), name) != name:
                del self.results.masks[name]
        self.results.masks.update({name: masks[name] for name in kept.values()})
        self.results.unknown += [one.given for one in found if not one.known and one.given not in self.results.unknown]
        return masks[names] if isinstance(names, str) else masks

    @torch.inference_mode()
    def mask_logits(self, names: Sequence[str], together: bool = False) -> torch.Tensor:
        """[names, D, H, W] on the canvas: what `segment` makes masks of, for names as the model was taught them.

        Args:
            names: of structures.
            together: ask for all in one batch, which is quicker and equal up to rounding.
        """
        pairs = [
            (ask_segmentation([name]), answer_segmentation([name], self.model.config.names_masks)) for name in names
        ]
        read = [self._states_together(pairs)] if together else [self._states(*pair) for pair in pairs]
        queries = [
            row[marks == self.model.config.seg_token_id][-1]
            for ids, states in read
            for marks, row in zip(ids, states, strict=True)
        ]
        grids = [tuple(row) for row in self.batch["patch_grid"].tolist()]
        stop = self._image_tokens()
        rows = slice(stop - int(np.prod(grids[-1])), stop)
        return self.model.segmentation_decoder(
            self.model.segmentation_query(torch.stack(queries)),
            tuple(part[rows] for part in self.features.feature_maps),
            self.features.last_hidden_state[rows],
            grids[-1],
        )

    @torch.inference_mode()
    def diagnose(self, diseases: str | Sequence[str] | None = None) -> dict[str, float]:
        """Probabilities by disease.

        Args:
            diseases: names, or the name of one of the model's lists, as people write them; `all` lists by default. A model
                with one head per disease knows the diseases of its lists only.

        Returns:
            {name: probability}, by the names given.

        Raises:
            CTInstructError: for a disease that the model has no head for, for no name, or an empty one.
        """
        lists = self.model.config.disease_lists
        asked_for = self.diseases_asked(diseases) if isinstance(diseases, str) else diseases
        if asked_for is not None:
            _check_names("diseases", asked_for)
        groups = list(lists.values()) if asked_for is None else [list(asked_for)]
        found: dict[str, float] = {}
        calibration = calibration_of(self.model)
        for group in groups:
            named = {name: self.diseases.find(name) for name in group}
            asked = list(dict.fromkeys(one.names[0] for one in named.values()))
            rows = self.disease_rows(asked)
            self._note(one.note for one in named.values())
            ids, states = self._states(ask_diagnosis(asked), answer_diagnosis(asked))
            scores = self.model.answer_diseases(ids, states, torch.tensor(rows, device=states.device))
            assert scores is not None
            values = dict(zip(asked, scores.float().sigmoid().tolist(), strict=True))
            for name in group:
                found.setdefault(name, calibration.probability(named[name].names[0], values[named[name].names[0]]))
        self.results.diagnosis.update(found)
        return found

    def diseases_asked(self, text: str) -> list[str] | None:
        """The diseases of the list of that name, or those that a text names with commas; None for `all`.

        Raises:
            CTInstructError: for a disease that the model has no head for.
        """
        lists = self.model.config.disease_lists
        if text.strip().lower() == "all":
            return None
        listed = Names(lists, table={}).find(text)
        if listed.known:
            return list(lists[listed.names[0]])
        names = [name.strip() for name in text.split(",") if name.strip()]
        self.disease_rows(names)
        return names

    def disease_rows(self, names: Sequence[str]) -> list[int]:
        """Rows of the disease head: of the first list that has all names, or of the first that has each.

        Raises:
            CTInstructError: for a disease that the model has no head for.
        """
        if self.model.config.disease_head == "shared":
            return [0] * len(names)
        found = [self.diseases.find(name) for name in names]
        missing = [one for one in found if not one.known]
        if missing:
            nearest = dict.fromkeys(name for one in missing for name in one.nearest)
            hint = f" (did you mean {' or '.join(nearest)}?)" if nearest else ""
            lists = ", ".join(self.model.config.disease_lists)
            unknown = ", ".join(one.given for one in missing)
            marked = [one.given for one in missing if self.structures.find(one.given).known]
            advice = f" It can mark {', '.join(marked)}: ask for a mask." if marked else ""
            raise CTInstructError(f"The model has no head for {unknown}{hint}: its lists are {lists}.{advice}")
        wanted = [one.names[0] for one in found]
        start = 0
        for diseases in self.model.config.disease_lists.values():
            index = {name: start + number for number, name in enumerate(diseases)}
            if all(name in index for name in wanted):
                return [index[name] for name in wanted]
            start += len(diseases)
        return [self.model.config.disease_names.index(name) for name in wanted]

    def save(self, folder: str | Path, **options: Any) -> Path:
        """Write everything asked so far: `findings.json`, `report.txt`, `masks/`, `report.html`.

        See `output.folder.save_results` for the options.
        """
        write_out = self.processor.write_out
        written = replace(
            self.results,
            report=None if self.results.report is None else write_out(self.results.report),
            answers=[(question, write_out(answer)) for question, answer in self.results.answers],
        )
        save_results(written, self.volume, self._origin(), Path(folder), **options)
        self.results.notes, self.results.failures = written.notes, written.failures
        return Path(folder)

    def _origin(self) -> Origin:
        """The model and how it saw the scan, as the folder of results states them."""
        config, image_processor = self.model.config, self.processor.image_processor
        fit, intensity = image_processor.fit_of(self.volume), image_processor.intensity
        name = model_name(config)
        sizes = [" x ".join(map(str, sizes)) for sizes in (fit.resized, fit.grid)]
        facts = {
            "Seen by the model": f"{sizes[0]} voxels on a canvas of {sizes[1]} patches",
            "Model": name,
            "Intensities": f"{intensity}, {image_processor.hu_window} HU" if intensity == "window" else intensity,
        }
        return Origin(
            model=name,
            fingerprint=model_fingerprint(config),
            commit=getattr(config, "_commit_hash", None),
            facts=facts,
            diseases=list(dict.fromkeys(name for names in config.disease_lists.values() for name in names)),
            scan_warnings=self._scan_warnings,
            model_warnings=notes_on(config),
        )


__all__ = ["BUNDLED_MODEL", "Answer", "Results", "Study", "load_model", "load_processor"]
