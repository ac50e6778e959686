"""Encode once, ask many: a scan opened with a model, and every question about it.

The vision tower and the language model's reading of the image run once per study; each question then costs its own words.
"""

from __future__ import annotations

import copy
import functools
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
from ..modeling.modeling_ctinstruct import CACHE_NAME, CTInstructForConditionalGeneration
from ..output.folder import save_results
from ..output.results import Origin, Results
from ..processing.processing_ctinstruct import CTInstructProcessor
from ..processing.volume import CTVolume
from .chat_templates import render_chat
from .fingerprint import model_fingerprint
from .folders import BUNDLED_MODEL
from .models import first_bad, load_model, load_processor, model_name, notes_on


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


class Study:
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
        self.volumes = [volumes] if isinstance(volumes, CTVolume) else list(volumes)
        if not self.volumes:
            raise CTInstructError("A study needs at least one volume.")
        self.model = model
        self.processor = processor
        self.results = Results()
        self.structures: Names = structure_names(model, processor, names)
        self.diseases: Names = disease_names(model, names)
        self.notes: list[str] = []
        self._prefixes: dict[bool, Any] = {}
        self._memory: dict[str, torch.Tensor] = {}

    @classmethod
    def open(
        cls,
        source: Any,
        model: str | tuple[CTInstructForConditionalGeneration, CTInstructProcessor] | None = None,
        *,
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
        **reading: Any,
    ) -> Study:
        """Read a scan and make it ready for questions.

        Args:
            source: whatever `read_volume` takes, or a list of such for several scans of one patient.
            model: a folder, a name on the Hub, or (model, processor); the bundled model by default.
            device, dtype, revision: see `load_model`.
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
        network = model[0] if isinstance(model, tuple) else load_model(model, device, dtype, revision)[0]
        return cls(volumes, network, processor, names)

    @property
    def volume(self) -> CTVolume:
        """The scan; the last one where there are several."""
        return self.volumes[-1]

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

    # the three things that are computed once

    @functools.cached_property
    def batch(self) -> dict[str, torch.Tensor]:
        """`pixel_values`, `patch_grid` and `slice_mask` of the scans."""
        return dict(self.processor.image_processor(self.volumes, return_tensors="pt").to(self.model.device))

    @functools.cached_property
    def features(self) -> Any:
        """The tower's features and image tokens."""
        with torch.inference_mode():
            features = self.model.get_image_features(**self.batch, return_dict=True)
        self._check(features.last_hidden_state, "The vision tower")
        return features

    def _check(self, numbers: torch.Tensor, part: str) -> None:
        """Raises CTInstructError where a part of the model gives NaN or infinity, and names the weight that does."""
        if bool(torch.isfinite(numbers).all()):
            return
        bad = first_bad(self.model)
        why = f"the weight {bad} does" if bad else f"its weights do not; in {self.model.dtype} it overflows"
        raise CTInstructError(f"{part} gives NaN or infinity: {why}.")

    def _ids(self, question: str, answer: str | None = None) -> torch.Tensor:
        """Token ids [1, L] of the images, a question, and the beginning of an answer."""
        content = [*({"type": "image"} for _ in self.volumes), {"type": "text", "text": question}]
        text = render_chat(self.processor, [{"role": "user", "content": content}], add_generation_prompt=True)
        rows = [int(np.prod(row)) for row in self.batch["patch_grid"].tolist()]
        text = self.processor.expand([text], rows)[0] + (answer or "")
        ids = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return ids.to(self.model.device)

    def _positions(self, input_ids: torch.Tensor, plain: bool) -> torch.Tensor | None:
        """Positions for language models with three axes; None where the model counts by itself."""
        if not self.model.config.uses_three_axis_rope:
            return None
        if plain:
            return torch.arange(input_ids.shape[1], device=input_ids.device)[None, None].expand(3, 1, -1)
        return self.model.model.get_rope_index(input_ids, self.batch["patch_grid"])[0]

    def _prefix(self, input_ids: torch.Tensor, plain: bool) -> tuple[int, Any]:
        """Length and a copy of the key-value cache of everything up to the end of the last image.

        With `answer_positions="sequential"` an answer with special tokens reads the image at other positions, so there
        may be two of them (`plain` or not).
        """
        length = int((input_ids[0] == self.model.config.vision_end_token_id).nonzero()[-1]) + 1
        if plain not in self._prefixes:
            positions = self._positions(input_ids[:, :length], plain)
            outputs = self.model.model(
                input_ids=input_ids[:, :length], vision_features=self.features, position_ids=positions, use_cache=True
            )
            self._check(outputs.last_hidden_state, "The language model")
            self._prefixes[plain] = outputs[CACHE_NAME]
        return length, copy.deepcopy(self._prefixes[plain])

    def _states(self, question: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and hidden states of a question and a given answer: ([1, L], [1, L, D])."""
        input_ids = self._ids(question, answer)
        special = (input_ids == self.model.config.seg_token_id) | (input_ids == self.model.config.disease_token_id)
        plain = self.model.config.answer_positions == "sequential" and bool(special.any())
        length, cache = self._prefix(input_ids, plain)
        positions = self._positions(input_ids, plain)
        outputs = self.model.model(
            input_ids=input_ids[:, length:],
            attention_mask=torch.ones_like(input_ids),
            position_ids=None if positions is None else positions[..., length:],
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        return input_ids[:, length:], outputs.last_hidden_state

    def _image_tokens(self) -> int:
        return len(self.batch["slice_mask"])

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
        for question, (text, masks, probabilities) in zip(
            questions, self._generate([text for text, _ in asked], max_new_tokens, generation), strict=True
        ):
            answers.append(Answer(self.processor.write_out(text, probabilities), masks, probabilities))
            self.results.answers.append((question, str(answers[-1])))
        return answers

    @torch.inference_mode()
    def report(self, *, max_new_tokens: int = 512, **generation: Any) -> str:
        """A radiology report."""
        ((text, _, probabilities),) = self._generate([REPORT[0]], max_new_tokens, generation)
        self.results.report = self.processor.write_out(text, probabilities)
        return self.results.report

    def _generate(
        self, questions: Sequence[str], max_new_tokens: int, generation: dict[str, Any]
    ) -> list[tuple[str, list[np.ndarray], list[float]]]:
        """Text, masks and probabilities of each question."""
        rows = [self._ids(question) for question in questions]
        options = {"do_sample": False, "max_new_tokens": max_new_tokens, **generation}
        if options.get("num_beams", 1) > 1 or options.get("num_return_sequences", 1) > 1:
            sequences = [
                self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), vision_features=self.features, **options
                )[0, ids.shape[1] :]
                for ids in rows
            ]
        else:
            batch, start = self._beside_each_other(rows)
            sequences = list(self.model.generate(**batch, **options)[:, start:])
        answers = [self._read_answer(question, new) for question, new in zip(questions, sequences, strict=True)]
        named = [
            self.processor.structures_named(question, text)
            for question, (text, _, _) in zip(questions, answers, strict=True)
        ]
        masks = self._paint([read for _, read, _ in answers], named)
        return [(text, painted, scores) for (text, _, scores), painted in zip(answers, masks, strict=True)]

    def _beside_each_other(self, rows: Sequence[torch.Tensor]) -> tuple[dict[str, Any], int]:
        """What `generate` needs for prompts [1, L] about the same images, and where its new tokens begin.

        The images' keys and values are repeated; the questions are padded on the left, behind the images.
        """
        length, cache = self._prefix(rows[0], plain=False)
        if len(rows) > 1:
            cache.batch_repeat_interleave(len(rows))
        longest = max(ids.shape[1] for ids in rows)
        filler = self.processor.tokenizer.pad_token_id or 0
        positions = [self._positions(ids, plain=False) for ids in rows]
        batch: dict[str, Any] = {CACHE_NAME: cache}

        def pad(values: torch.Tensor, value: int) -> torch.Tensor:
            missing = longest - values.shape[-1]
            between = values.new_full((*values.shape[:-1], missing), value)
            return torch.cat([values[..., :length], between, values[..., length:]], dim=-1)

        batch["input_ids"] = torch.cat([pad(ids, filler) for ids in rows])
        batch["attention_mask"] = torch.cat([pad(torch.ones_like(ids), 0) for ids in rows])
        if positions[0] is not None:
            batch["position_ids"] = torch.cat([pad(one, 0) for one in positions if one is not None], dim=1)
        return batch, longest

    def _paint(
        self, answers: Sequence[tuple[torch.Tensor, torch.Tensor] | None], named: Sequence[Sequence[str | None]]
    ) -> list[list[np.ndarray]]:
        """The masks of several answers, given by ids and states and the names of what they show, in one pass of the
        decoder over the scan."""
        read = [one for one in answers if one is not None]
        if not read:
            return [[] for _ in answers]
        ids, states = torch.cat([one[0] for one in read], dim=1), torch.cat([one[1] for one in read], dim=1)
        painted = iter(self.model.answer_masks(ids, states, self.features, self._image_tokens()) or [])
        return [
            [
                self.processor.image_processor.mask_from_canvas(next(painted), self.volume, name=name)
                for name in ([] if one is None else names)
            ]
            for one, names in zip(answers, named, strict=True)
        ]

    def _read_answer(
        self, question: str, new: torch.Tensor
    ) -> tuple[str, tuple[torch.Tensor, torch.Tensor] | None, list[float]]:
        """The text of new tokens; ids and states of the answer where it has special tokens; its probabilities."""
        closing = self.model.generation_config.eos_token_id
        closing = closing if isinstance(closing, list) else [closing]
        closing = [*(one for one in closing if one is not None), self.processor.tokenizer.eos_token_id]
        ends = torch.isin(new, torch.tensor(closing, device=new.device)).nonzero()
        if len(ends):  # what follows fills the batch
            new = new[: int(ends[0]) + 1]
        text = self.processor.tokenizer.decode(new)
        specials = (self.model.config.seg_token_id, self.model.config.disease_token_id)
        if not any(int(token) in specials for token in new):
            return text, None, []
        ids, states = self._states(question, text)
        named = self.processor.named_diseases(question)
        try:
            rows = self.model.disease_rows(ids, None if named is None else torch.tensor(named))
        except CTInstructError:  # the answer has another number of tokens than any list: they stay as they are
            rows = None
        scores = self.model.answer_diseases(ids, states, rows)
        return text, (ids, states), [] if scores is None else scores.float().sigmoid().tolist()

    @torch.inference_mode()
    def choose(self, question: str, options: Sequence[str]) -> str:
        """Multiple choice: the option that the model's answer names, or, where it names none, the likeliest as an answer.

        Raises:
            CTInstructError: for fewer than two options, or more than letters.
        """
        if not 2 <= len(options) <= len(LETTERS):
            raise CTInstructError(f"options has {len(options)} entries: give 2 to {len(LETTERS)}.")
        asked = ask_choice(question, options)
        ((said, _, _),) = self._generate([asked], 128, {})
        place = chosen_option(self.processor.write_out(said, []), options)
        chosen = str(options[self._likeliest(asked, options) if place is None else place])
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
        return masks[names] if isinstance(names, str) else masks

    @torch.inference_mode()
    def mask_logits(self, names: Sequence[str]) -> torch.Tensor:
        """[names, D, H, W] on the canvas: what `segment` makes masks of, for names as the model was taught them."""
        queries = []
        for name in names:
            answer = answer_segmentation([name], self.model.config.names_masks)
            ids, states = self._states(ask_segmentation([name]), answer)
            queries.append(states[ids == self.model.config.seg_token_id][-1])
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
        for group in groups:
            named = {name: self.diseases.find(name) for name in group}
            asked = list(dict.fromkeys(one.names[0] for one in named.values()))
            rows = self.disease_rows(asked)
            self._note(one.note for one in named.values())
            ids, states = self._states(ask_diagnosis(asked), answer_diagnosis(asked))
            scores = self.model.answer_diseases(ids, states, torch.tensor(rows, device=states.device))
            values = dict(zip(asked, scores.float().sigmoid().tolist(), strict=True))
            for name in group:
                found.setdefault(name, values[named[name].names[0]])
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
