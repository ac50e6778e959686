"""From rows to batches: voxels are read here, in the loader's workers, and labels are put on the canvas."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..data.cases import MaskRef
from ..data.descriptions import describe_category, tokenize
from ..data.instructions import with_names
from ..data.mixture import Item, generator_of
from ..data.samples import AlignmentSample, InstructionSample, from_row, parts_of
from ..data.store import PatchStore, Prepared
from ..data.templates import SEG_TOKEN
from ..errors import CTInstructError
from ..modeling.vision_ctinstruct import CTInstructVisionOutput
from .augmentation import Augmentation

logger = logging.getLogger(__name__)


class SkippedSamples:
    """Counts the samples that could not be read, each once, over all workers of a process.

    Args:
        limit: more than this many end the training.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._count = multiprocessing.Value("l", 0)
        self._seen = multiprocessing.Array("q", limit + 1, lock=False)

    @property
    def count(self) -> int:
        return int(self._count.value)

    def add(self, name: str, error: Exception, part: str = "") -> None:
        """Raises CTInstructError when there are too many."""
        key = int.from_bytes(hashlib.blake2b(f"{part}\n{name}".encode(), digest_size=8).digest(), "big", signed=True)
        with self._count.get_lock():
            if key in self._seen[: self._count.value]:
                return
            self._seen[min(self._count.value, self.limit)] = key
            self._count.value += 1
        logger.warning("Sample '%s' is skipped: %s", name, error)
        if self.count > self.limit:
            raise CTInstructError(
                f"{self.count} samples could not be read, {self.limit} are allowed (max_skipped). The last: {error}"
            )


class _Collator:
    """What both stages share: samples that cannot be read are replaced, counted, and limited."""

    kind = ""

    def __init__(self, store: PatchStore, tokenizer: Any, max_length: int, seed: int, max_skipped: int) -> None:
        self.store, self.tokenizer, self.max_length, self.seed = store, tokenizer, max_length, seed
        self.skipped = SkippedSamples(max_skipped)
        self._last_good: dict[tuple[str, Any], Item] = {}

    def read_all(self, items: Sequence[Item], read: Callable[[Any, np.random.Generator], Any]) -> list[Any]:
        """What `read` makes of each sample. One that it cannot read is replaced by another of the same part and task: by the
        part's own rows, or by the last that could be read where they are streamed; a batch keeps its size and kind.
        """
        found = [(item, self._read_one(item, read)) for item in items]
        values = []
        for item, value in found:
            if value is None:
                value = next(
                    (other for one in item.stand_ins(self.seed) if (other := self._read_one(one, read)) is not None),
                    None,
                )
            if value is None and (last := self._last_good.get(self._kind(item))) is not None:
                value = self._read_one(replace(last, draw=item.draw), read)
            if value is None:
                raise CTInstructError(
                    f"No sample like '{item.row.get('id', '?')}', of the same part and task, can be read."
                )
            values.append(value)
        return values

    @staticmethod
    def _kind(item: Item) -> tuple[str, Any]:
        return item.part, item.row.get("task")

    def _read_one(self, item: Item, read: Callable[[Any, np.random.Generator], Any]) -> Any:
        """None where the sample cannot be read."""
        try:
            value = read(from_row(item.row, self.kind), generator_of(self.seed, item.draw))
        except CTInstructError as error:
            self.skipped.add(item.row.get("id", "?"), error, item.part)
            return None
        self._last_good[self._kind(item)] = item
        return value


def join_images(prepared: Sequence[Prepared]) -> dict[str, Any]:
    """`pixel_values`, `patch_grid` and `slice_mask` of several images."""
    joined = {name: torch.cat([one[name] for one in prepared]) for name in ("pixel_values", "patch_grid", "slice_mask")}
    return {**joined, "pixel_values": joined["pixel_values"].float()}


class AlignmentCollator(_Collator):
    """Stage one: `AlignmentSample` rows to the arguments of `CTInstructForPretraining.forward`.

    Args:
        store: reads and keeps patches.
        tokenizer: of the text encoder.
        masks_per_image: how many structures of an image a batch asks for.
        absent_share: how often a structure that is known to be absent is asked for.
        max_length: tokens of a text; longer ones are cut.
        seed: of what is drawn: one text an image, the structures.
        max_skipped: so many unreadable samples are replaced before training ends.
        balance_masks: every name counts alike in a batch, however many of its images have it; else every mask does.
        join_masks: masks of one name in a batch of small images are one mask over all of them, see `masks_loss`.
    """

    kind = "alignment"

    def __init__(
        self,
        store: PatchStore,
        tokenizer: Any,
        masks_per_image: int = 6,
        absent_share: float = 0.15,
        max_length: int = 256,
        seed: int = 0,
        max_skipped: int = 100,
        balance_masks: bool = False,
        join_masks: bool = False,
    ) -> None:
        super().__init__(store, tokenizer, max_length, seed, max_skipped)
        self.balance_masks, self.join_masks = balance_masks, join_masks
        tokenizer.padding_side = "right"  # encoders count positions from the left: padding there would shift them
        self.masks_per_image, self.absent_share = masks_per_image, absent_share

    def words(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids and attention_mask [texts, L]."""
        return tokenize(self.tokenizer, texts, self.max_length)

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        tasks = items[0].tasks
        read: list[tuple[AlignmentSample, Prepared, list[MaskRef], list[torch.Tensor], np.random.Generator]]
        read = self.read_all(items, lambda sample, rng: self._read(sample, tasks, rng))
        samples = [one[0] for one in read]
        batch = join_images([one[1] for one in read])
        if "contrastive" in tasks:
            self._add_texts(batch, samples, [one[4] for one in read])
        if "category" in tasks:
            self._add_categories(batch, samples)
        if "segmentation" in tasks:
            self._add_masks(batch, [one[2] for one in read], [one[3] for one in read])
        return batch

    def _read(
        self, sample: AlignmentSample, tasks: Sequence[str], rng: np.random.Generator
    ) -> tuple[AlignmentSample, Prepared, list[MaskRef], list[torch.Tensor], np.random.Generator]:
        prepared = self.store.image(sample.image)
        chosen = self.choose_masks(sample, rng) if "segmentation" in tasks else []
        return sample, prepared, chosen, [self.store.mask(sample.image, mask) for mask in chosen], rng

    def choose_masks(self, sample: AlignmentSample, rng: np.random.Generator) -> list[MaskRef]:
        """Structures to ask for: findings (those with a category label) as often as organs, some of them absent."""
        categories = {label.name for label in sample.labels}
        groups: dict[tuple[bool, bool], list[MaskRef]] = {}
        for mask in sample.masks:
            groups.setdefault((mask.name in categories, bool(mask.path)), []).append(mask)
        for group in groups.values():
            rng.shuffle(group)  # type: ignore[arg-type]
        chosen: list[MaskRef] = []
        while len(chosen) < self.masks_per_image and any(groups.values()):
            wanted = (bool(rng.integers(2)), bool(rng.random() >= self.absent_share))
            full = [key for key, group in groups.items() if group]
            if chosen and not any(present for _, present in full):
                break  # all that is there has been asked for
            # the group that was drawn, or the one most like it that still has something
            key = max(full, key=lambda one: (one == wanted, one[1] == wanted[1], one[0] == wanted[0]))
            chosen.append(groups[key].pop())
        return chosen

    def _add_texts(
        self, batch: dict[str, Any], samples: Sequence[AlignmentSample], rngs: Sequence[np.random.Generator]
    ) -> None:
        owners = [index for index, sample in enumerate(samples) if sample.texts]
        if not owners:
            return
        texts = [samples[index].texts[int(rngs[index].integers(len(samples[index].texts)))] for index in owners]
        batch["input_ids"], batch["attention_mask"] = self.words(texts)
        batch["text_images"] = torch.tensor(owners)

    def _add_categories(self, batch: dict[str, Any], samples: Sequence[AlignmentSample]) -> None:
        names = list(dict.fromkeys(label.name for sample in samples for label in sample.labels))
        if not names:
            return
        batch["class_input_ids"], batch["class_attention_mask"] = self.words(
            [describe_category(name) for name in names]
        )
        labels = torch.full((len(samples), len(names)), -1.0)
        for row, sample in enumerate(samples):
            for label in sample.labels:
                labels[row, names.index(label.name)] = label.value
        batch["class_labels"] = labels

    def _add_masks(
        self, batch: dict[str, Any], masks: Sequence[Sequence[MaskRef]], canvases: Sequence[Sequence[torch.Tensor]]
    ) -> None:
        names = [mask.name for group in masks for mask in group]
        owners = [index for index, group in enumerate(masks) for _ in group]
        labels = [canvas for group in canvases for canvas in group]
        if not names:  # a mask of padding only: all processes run the decoder, whose batch norm may wait for the others
            z, y, x, s = batch["patch_grid"][0].tolist()
            height, width = batch["pixel_values"].shape[-2:]
            names, owners = ["nothing"], [0]
            labels = [torch.full((z * s, y * height, x * width), -1, dtype=torch.int8)]
        batch["mask_input_ids"], batch["mask_attention_mask"] = self.words(names)
        batch["mask_images"] = torch.tensor(owners)
        batch["mask_labels"] = labels
        if self.balance_masks:
            kinds = [(name, bool((canvas > 0).any())) for name, canvas in zip(names, labels, strict=True)]
            counts = Counter(kinds)
            batch["mask_weights"] = torch.tensor([1.0 / counts[kind] for kind in kinds])
        if self.join_masks:
            batch["mask_groups"] = torch.tensor([names.index(name) for name in names])


def spell(
    processor: Any, messages: Sequence[dict[str, Any]], counts: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """Ids of a conversation and labels: −100 but on answers, each with its closing token.

    Args:
        processor: a `CTInstructProcessor`.
        messages: turns.
        counts: tokens of each image that they show.

    Raises:
        CTInstructError: where the chat template does not write a conversation turn by turn.
    """
    rest = list(counts)
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for index, turn in enumerate(messages):
        answers = turn["role"] == "assistant"
        written = [(processor.apply_chat_template(messages[: index + 1]), answers)]
        if answers:  # what generation begins with belongs to the question
            written.insert(0, (processor.apply_chat_template(messages[:index], add_generation_prompt=True), False))
        for whole, learned in written:
            if not whole.startswith(done):
                raise CTInstructError("the chat template does not write a conversation turn by turn.")
            text = whole[len(done) :]
            text = processor.expand([text], [rest.pop(0) for _ in range(text.count(processor.image_token))])[0]
            new = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += new
            labels += new if learned else [-100] * len(new)
            done = whole
    return ids, labels


class InstructionCollator(_Collator):
    """Stage two: `InstructionSample` rows to the arguments of `CTInstructForConditionalGeneration.forward`.

    Labels are −100 but on answers, each with its closing token. Masks come in the order of `<SEG>`, disease labels in the
    order of `<disease_confidence>`, −1 where unknown.

    Args:
        store: reads and keeps patches.
        processor: of the model.
        max_length: tokens of a conversation; longer samples are skipped, since cutting would tear images apart.
        padding_side: left or right.
        seed, max_skipped: see `AlignmentCollator`.
        tokens: a store of the frozen tower's tokens, read instead of patches where a batch has no masks.
        names_masks: as in the model's config: answers of the paper's phrasing get the structure's name.
        prompts: gives [names, D_text] for names of structures: `<SEG>` is then taught by `prompt_labels`, no mask is read.
        augmentation: changes each image and its masks together; None leaves them as they are.
    """

    kind = "instructions"

    def __init__(
        self,
        store: PatchStore,
        processor: Any,
        max_length: int = 4096,
        padding_side: str = "right",
        seed: int = 0,
        max_skipped: int = 100,
        tokens: Any = None,
        prompts: Callable[[Sequence[str]], torch.Tensor] | None = None,
        names_masks: bool = False,
        augmentation: Augmentation | None = None,
    ) -> None:
        super().__init__(store, processor.tokenizer, max_length, seed, max_skipped)
        if padding_side not in ("left", "right"):
            raise CTInstructError(f"padding_side is '{padding_side}': use left or right.")
        self.processor, self.padding_side, self.tokens = processor, padding_side, tokens
        self.prompts, self.names_masks, self.augmentation = prompts, names_masks, augmentation

    def __call__(self, items: Sequence[Item | dict[str, Any]]) -> dict[str, Any]:
        """A batch from items of a mixture, or from plain rows as a `datasets.Dataset` gives them."""
        listed = [one if isinstance(one, Item) else Item(one, (), index) for index, one in enumerate(items)]
        paints = self.prompts is None and any(item.row.get("masks") for item in listed)
        light = self.tokens is not None and not paints
        read = self.read_all(listed, lambda sample, rng: self._read(sample, light, rng))
        longest = max(len(one["input_ids"]) for one in read)
        batch: dict[str, Any] = {
            name: torch.stack([self._padded(one[name], longest, value) for one in read])
            for name, value in (("input_ids", self._pad_id), ("attention_mask", 0), ("labels", -100))
        }
        images = [image for one in read for image in one["images"]]
        if light:
            batch["vision_features"] = CTInstructVisionOutput(
                last_hidden_state=torch.cat([image["tokens"] for image in images]).float(),
                patch_grid=torch.cat([image["patch_grid"] for image in images]),
            )
        else:
            batch |= join_images(images)
        masks = [mask for one in read for mask in one["masks"]]
        if masks:
            batch["mask_labels"] = masks
        names = [name for one in read for name in one["names"]]
        if self.prompts is not None and names:
            batch["prompt_labels"] = self.prompts(names)
        values = [value for one in read for value in one["disease_labels"]]
        if values:
            batch["disease_labels"] = torch.tensor(values)
            batch["disease_ids"] = torch.tensor([row for one in read for row in one["disease_ids"]])
        return batch

    @property
    def _pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def _padded(self, row: torch.Tensor, length: int, value: int) -> torch.Tensor:
        missing = length - len(row)
        sides = (missing, 0) if self.padding_side == "left" else (0, missing)
        return torch.nn.functional.pad(row, sides, value=value)

    def _read(self, sample: InstructionSample, light: bool, rng: np.random.Generator | None = None) -> dict[str, Any]:
        images = [self.tokens.image(image) if light else self.store.image(image) for image in sample.images]
        masks = self._masks(sample) if self.prompts is None else []
        if self.augmentation is not None and rng is not None and not light:
            images, masks = self._augmented(images, masks, rng)
        counts = [int(np.prod(row)) for image in images for row in image["patch_grid"].tolist()]
        if self.names_masks:
            sample = with_names(sample)
        input_ids, labels = self.words(sample, counts)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "attention_mask": torch.ones_like(input_ids),
            "images": images,
            "masks": [mask for _, mask in masks],
            "names": [mask.name for mask in sample.masks],
            "disease_labels": [float(label.value) for label in sample.labels],
            "disease_ids": self._diseases(sample),
        }

    def words(self, sample: InstructionSample, counts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels [L] of a conversation.

        Raises:
            CTInstructError: where it is too long, or the chat template does not write it turn by turn.
        """
        try:
            ids, labels = spell(self.processor, sample.messages, counts)
        except CTInstructError as error:
            raise CTInstructError(f"sample '{sample.id}': {error}") from error
        if len(ids) > self.max_length:
            raise CTInstructError(f"sample '{sample.id}' has {len(ids)} tokens, max_length is {self.max_length}.")
        return torch.tensor(ids), torch.tensor(labels)

    def _augmented(
        self, images: list[Prepared], masks: list[tuple[int, torch.Tensor]], rng: np.random.Generator
    ) -> tuple[list[Prepared], list[tuple[int, torch.Tensor]]]:
        """Each image changed with the masks that are on it."""
        assert self.augmentation is not None
        changed = []
        moved = dict(enumerate(masks))
        for number, image in enumerate(images):
            mine = [place for place, (owner, _) in enumerate(masks) if owner == number]
            image, canvases = self.augmentation(image, [masks[place][1] for place in mine], rng)
            changed.append(image)
            moved |= {place: (number, canvas) for place, canvas in zip(mine, canvases, strict=True)}
        return changed, [moved[place] for place in range(len(masks))]

    def _masks(self, sample: InstructionSample) -> list[tuple[int, torch.Tensor]]:
        """(number of the image, canvas) in the order of `<SEG>`, each of the image last shown before it."""
        masks = iter(sample.masks)
        found: list[tuple[int, torch.Tensor]] = []
        shown = 0
        for turn in sample.messages:
            for part in parts_of(turn):
                if part["type"] == "image":
                    shown += 1
                elif turn["role"] == "assistant":
                    asked = (part.get("text") or "").count(SEG_TOKEN)
                    image = sample.images[shown - 1]
                    found += [(shown - 1, self.store.mask(image, next(masks))) for _ in range(asked)]
        return found

    def _diseases(self, sample: InstructionSample) -> list[int]:
        """Which row of the disease head each `<disease_confidence>` is.

        Raises:
            CTInstructError: for diseases that are in no list of the model.
        """
        names = [label.name.lower() for label in sample.labels]
        if not names:
            return []
        rows = self.processor.disease_rows_of(names)
        if rows is not None:
            return rows
        raise CTInstructError(
            f"sample '{sample.id}' asks about {', '.join(names[:3])} …: no disease list has them all."
        )


class PreferenceCollator(InstructionCollator):
    """Pairs of answers for TRL's `DPOTrainer`: rows of `InstructionSample` with a `rejected` answer beside the last one.

    The batch holds the samples with the preferred answers, then the same ones with the rejected; `completion_mask` is 1 on
    answers. Preference is about words: masks and diagnoses take no part in it.
    """

    def _read_one(self, item: Item, read: Callable[[Any, np.random.Generator], Any]) -> Any:
        value = super()._read_one(item, read)
        if value is None:  # another sample would not be the other answer to this question
            raise CTInstructError("A pair of answers could not be read in full: both sides are needed.")
        return value

    def __call__(self, items: Sequence[Item | dict[str, Any]]) -> dict[str, Any]:
        listed = [one.row if isinstance(one, Item) else dict(one) for one in items]
        chosen, rejected = [], []
        for row in listed:
            text = row.pop("rejected", None)
            if not isinstance(text, str):
                raise CTInstructError(f"sample '{row.get('id', '?')}' has no rejected answer.")
            answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
            chosen.append({**row, "masks": [], "labels": []})
            rejected.append({**row, "messages": [*row["messages"][:-1], answer], "masks": [], "labels": []})
        batch = super().__call__([*chosen, *rejected])
        batch["completion_mask"] = (batch.pop("labels") != -100).long()
        return batch
