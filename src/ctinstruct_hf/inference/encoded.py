"""Scans encoded once, and conversations about them.

The vision tower runs once, and so does the language model over everything up to the end of the last image; each question
then costs only its words.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..data.samples import text_of
from ..data.templates import DISEASE_TOKEN, SEG_TOKEN
from ..errors import CTInstructError
from ..modeling.modeling_ctinstruct import CACHE_NAME, CTInstructForConditionalGeneration
from ..processing.processing_ctinstruct import CTInstructProcessor
from ..processing.volume import CTVolume
from .calibration import calibration_of
from .chat_templates import render_chat
from .models import first_bad

PREFIXES = 2  # key-value caches kept: with plain positions or not, or with other words before the last image

# a question about the scans, or turns {"role", "content"} that show them all and end in a question
Conversation = str | Sequence[dict[str, Any]]


@dataclass
class Reply:
    """An answer of the model.

    Attributes:
        text: with its special tokens.
        masks: logits [D, H, W] on the canvas of the last scan, one per `<SEG>`.
        probabilities: one per `<disease_confidence>`; empty where the diseases are not known.
    """

    text: str
    masks: list[torch.Tensor] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)


def question_of(conversation: Conversation) -> str:
    """The last question."""
    return conversation if isinstance(conversation, str) else text_of(conversation[-1])


class EncodedScans:
    """A scan, or several of a patient in the order given, and a model that answers about the last.

    Args:
        volumes: the scan or scans.
        model, processor: what `load_model` returns.
    """

    def __init__(
        self,
        volumes: CTVolume | Sequence[CTVolume],
        model: CTInstructForConditionalGeneration,
        processor: CTInstructProcessor,
    ) -> None:
        self.volumes = [volumes] if isinstance(volumes, CTVolume) else list(volumes)
        if not self.volumes:
            raise CTInstructError("A study needs at least one volume.")
        self.model = model
        self.processor = processor
        self._prefixes: dict[tuple[bool, tuple[int, ...]], Any] = {}

    @property
    def volume(self) -> CTVolume:
        """The last scan."""
        return self.volumes[-1]

    @functools.cached_property
    def batch(self) -> dict[str, torch.Tensor]:
        """`pixel_values`, `patch_grid` and `slice_mask` of the scans."""
        return dict(self.processor.image_processor(self.volumes, return_tensors="pt").to(self.model.device))

    @functools.cached_property
    def features(self) -> Any:
        """The tower's features and image tokens."""
        with torch.inference_mode():
            features: Any = self.model.get_image_features(**self.batch, return_dict=True)
        self._check(features.last_hidden_state, "The vision tower")
        return features

    def _check(self, numbers: torch.Tensor, part: str) -> None:
        """Raises CTInstructError where a part of the model gives NaN or infinity, and names the weight that does."""
        if bool(torch.isfinite(numbers).all()):
            return
        bad = first_bad(self.model)
        why = f"the weight {bad} does" if bad else f"its weights do not; in {self.model.dtype} it overflows"
        raise CTInstructError(f"{part} gives NaN or infinity: {why}.")

    def _ids(self, conversation: Conversation, answer: str | None = None) -> torch.Tensor:
        """Token ids [1, L] of the images, a question, and the beginning of an answer."""
        if isinstance(conversation, str):
            content = [*({"type": "image"} for _ in self.volumes), {"type": "text", "text": conversation}]
            conversation = [{"role": "user", "content": content}]
        text = render_chat(self.processor, conversation, add_generation_prompt=True)
        rows = [int(np.prod(row)) for row in self.batch["patch_grid"].tolist()]
        text = self.processor.expand([text], rows)[0] + (answer or "")
        ids = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return ids.to(self.model.device)

    def _positions(self, input_ids: torch.Tensor, plain: bool) -> torch.Tensor | None:
        """Positions [3, 1, L] for language models with three axes; None for other models."""
        if not self.model.config.uses_three_axis_rope:
            return None
        if plain:
            return torch.arange(input_ids.shape[1], device=input_ids.device)[None, None].expand(3, 1, -1)
        return self.model.model.get_rope_index(input_ids, self.batch["patch_grid"])[0]

    def _prefix_length(self, input_ids: torch.Tensor) -> int:
        """The number of tokens of [1, L] up to the end of the last image."""
        return int((input_ids[0] == self.model.config.vision_end_token_id).nonzero()[-1]) + 1

    def _prefix(self, input_ids: torch.Tensor, plain: bool) -> Any:
        """A copy of the key-value cache of everything up to the end of the last image.

        With `answer_positions="sequential"` an answer with special tokens reads the image at `plain` positions.
        """
        read = input_ids[:1, : self._prefix_length(input_ids)]  # the same in all rows
        key = (plain, tuple(read[0].tolist()))
        if key not in self._prefixes:
            outputs = self.model.model(
                input_ids=read, vision_features=self.features, position_ids=self._positions(read, plain), use_cache=True
            )
            self._check(outputs.last_hidden_state, "The language model")
            while len(self._prefixes) >= PREFIXES:
                self._prefixes.pop(next(iter(self._prefixes)))
            self._prefixes[key] = outputs[CACHE_NAME]
        return copy.deepcopy(self._prefixes[key])

    def _states(self, conversation: Conversation, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and hidden states after the images, up to the end of a given answer: ([1, L], [1, L, D])."""
        input_ids = self._ids(conversation, answer)
        special = (input_ids == self.model.config.seg_token_id) | (input_ids == self.model.config.disease_token_id)
        plain = self.model.config.answer_positions == "sequential" and bool(special.any())
        cache, length = self._prefix(input_ids, plain), self._prefix_length(input_ids)
        positions = self._positions(input_ids, plain)
        outputs = self.model.model(
            input_ids=input_ids[:, length:],
            attention_mask=torch.ones_like(input_ids),
            position_ids=None if positions is None else positions[..., length:],
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        return input_ids[:, length:], outputs.last_hidden_state

    def _states_together(self, pairs: Sequence[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and hidden states of several questions with answers that hold special tokens: ([B, L], [B, L, D]).

        Shorter rows are padded on the right, where none of their tokens attends.
        """
        rows = [self._ids(question, answer)[0] for question, answer in pairs]
        filler = self.processor.tokenizer.pad_token_id or 0
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
        plain = self.model.config.answer_positions == "sequential"
        cache, length = self._prefix(input_ids, plain), self._prefix_length(input_ids)
        cache.batch_repeat_interleave(len(rows))
        positions = [self._positions(row[None], plain) for row in input_ids]
        following = [row[..., length:] for row in positions if row is not None]
        outputs = self.model.model(
            input_ids=input_ids[:, length:],
            attention_mask=torch.ones_like(input_ids),
            position_ids=torch.cat(following, dim=1) if following else None,
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        return input_ids[:, length:], outputs.last_hidden_state

    def reply(self, conversations: Sequence[Conversation], max_new_tokens: int = 256, **generation: Any) -> list[Reply]:
        """The model's answers with masks and probabilities of their special tokens; see `write`, `outputs_of_answers`."""
        answers = self.write(conversations, max_new_tokens, **generation)
        return self.outputs_of_answers(list(zip(conversations, answers, strict=True)))

    @torch.inference_mode()
    def write(self, conversations: Sequence[Conversation], max_new_tokens: int = 256, **generation: Any) -> list[str]:
        """The model's answers with their special tokens, in a batch that reads the images once; equal to single answers.

        Args:
            conversations: about these scans.
            max_new_tokens, generation: as in `generate`; greedy by default.
        """
        options = {"do_sample": False, "max_new_tokens": max_new_tokens, **generation}
        rows = [self._ids(conversation) for conversation in conversations]
        if options.get("num_beams", 1) > 1 or options.get("num_return_sequences", 1) > 1:
            sequences = [
                self.model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), vision_features=self.features, **options
                )[0, ids.shape[1] :]
                for ids in rows
            ]
        else:
            sequences = self._generate(rows, options)
        return [self._until_its_end(new) for new in sequences]

    def _generate(self, rows: Sequence[torch.Tensor], options: dict[str, Any]) -> list[torch.Tensor]:
        """New tokens of prompts [1, L]; prompts that are equal up to the last image are answered together."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, ids in enumerate(rows):
            groups.setdefault(tuple(ids[0, : self._prefix_length(ids)].tolist()), []).append(row)
        sequences: dict[int, torch.Tensor] = {}
        for group in groups.values():
            batch, start = self._beside_each_other([rows[row] for row in group])
            sequences.update(zip(group, self.model.generate(**batch, **options)[:, start:], strict=True))
        return [sequences[row] for row in range(len(rows))]

    def _beside_each_other(self, rows: Sequence[torch.Tensor]) -> tuple[dict[str, Any], int]:
        """Inputs of `generate` for prompts [1, L] that begin with the same images, and where its new tokens begin.

        The images' keys and values are repeated; the questions are padded on the left, behind the images.
        """
        cache, length = self._prefix(rows[0], plain=False), self._prefix_length(rows[0])
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
            batch["position_ids"] = torch.cat([pad(row, 0) for row in positions if row is not None], dim=1)
        return batch, longest

    def _until_its_end(self, new: torch.Tensor) -> str:
        """The text of new tokens [L] up to the closing token; padding follows it."""
        closing = self.closing_tokens()
        ends = torch.isin(new, torch.tensor(closing, device=new.device)).nonzero()
        return self.processor.tokenizer.decode(new[: int(ends[0]) + 1] if len(ends) else new)

    def closing_tokens(self) -> list[int]:
        """Ids that end an answer."""
        closing = self.model.generation_config.eos_token_id
        closing = closing if isinstance(closing, list) else [closing]
        return [*(token for token in closing if token is not None), self.processor.tokenizer.eos_token_id]

    def prompt_tokens(self, conversation: Conversation) -> int:
        """How many tokens of scans and words the model reads before it answers."""
        return int(self._ids(conversation).shape[1])

    @torch.inference_mode()
    def outputs_of_answers(self, answered: Sequence[tuple[Conversation, str]]) -> list[Reply]:
        """Masks and probabilities of the special tokens of given answers; the mask decoder runs once over the scan for all.

        Args:
            answered: conversations, each with its answer.
        """
        replies = [Reply(text) for _, text in answered]
        counts, ids, states = [0] * len(answered), [], []
        for row, (conversation, text) in enumerate(answered):
            counts[row] = text.count(SEG_TOKEN)
            diseases = text.count(DISEASE_TOKEN)
            if not counts[row] and not diseases:
                continue
            row_ids, row_states = self._states(conversation, text)
            start = self._answer_start(row_ids, counts[row], diseases)
            ids.append(row_ids[:, start:])
            states.append(row_states[:, start:])
            replies[row].probabilities = self._probabilities(question_of(conversation), ids[-1], states[-1])
        if any(counts):
            painted = iter(
                self.model.answer_masks(
                    torch.cat(ids, dim=1), torch.cat(states, dim=1), self.features, self._image_tokens()
                )
                or []
            )
            for reply, count in zip(replies, counts, strict=True):
                reply.masks = [next(painted) for _ in range(count)]
        return replies

    def _answer_start(self, ids: torch.Tensor, masks: int, diseases: int) -> int:
        """Index in [1, L] from which the answer's special tokens begin; those before belong to earlier answers."""
        starts = [
            int((ids[0] == token).nonzero()[-count])
            for token, count in (
                (self.model.config.seg_token_id, masks),
                (self.model.config.disease_token_id, diseases),
            )
            if count
        ]
        return min(starts)

    def _probabilities(self, question: str, ids: torch.Tensor, states: torch.Tensor) -> list[float]:
        named = self.processor.named_diseases(question)
        try:
            rows = self.model.disease_rows(ids, None if named is None else torch.tensor(named))
        except CTInstructError:  # the answer has another number of tokens than any list
            rows = None
        scores = self.model.answer_diseases(ids, states, rows)
        if scores is None or rows is None:
            return []
        heads = [name for names in self.model.config.disease_lists.values() for name in names] or [""]
        calibration, values = calibration_of(self.model), scores.float().sigmoid().tolist()
        return [calibration.probability(heads[row], value) for row, value in zip(rows.tolist(), values, strict=True)]

    def _image_tokens(self) -> int:
        return len(self.batch["slice_mask"])


__all__ = ["Conversation", "EncodedScans", "Reply", "question_of"]
