"""Scans and words in, a batch out; logits in, masks, probabilities and written answers out."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .image_processing_ctinstruct import as_auto_class, flatten_images, settings_of
from .volume import CTInstructError, CTVolume

SEG_TOKEN = "<SEG>"
DISEASE_TOKEN = "<disease_confidence>"
IMAGE_TOKEN = "<|image_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"

# Qwen2-VL's template, without its default system message
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# call options that a tokenizer may have been made with
_TOKENIZER_OPTIONS = ("padding", "max_length", "truncation")
_NAMED = re.compile(r"presence of (?P<names>[^.?!\n]+)", re.IGNORECASE)


class CTInstructProcessor(ProcessorMixin):
    """Image processor and tokenizer together.

    Args:
        image_processor: a `CTInstructImageProcessor`.
        tokenizer: a fast tokenizer with `<|vision_start|>`, `<|image_pad|>`, `<|vision_end|>`, `<SEG>` and
            `<disease_confidence>` as single tokens.
        chat_template: Jinja; Qwen2-VL's by default.
        disease_lists: {name: diseases}, those of the model's config; kept in the order of their names, as there.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        disease_lists: dict[str, list[str]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_token = IMAGE_TOKEN
        self.disease_lists = dict(sorted((disease_lists or {}).items()))
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        vocabulary = tokenizer.get_vocab()
        missing = [
            token
            for token in (VISION_START, IMAGE_TOKEN, VISION_END, SEG_TOKEN, DISEASE_TOKEN)
            if token not in vocabulary
        ]
        if missing:
            raise CTInstructError(f"The tokenizer lacks the tokens {', '.join(missing)}: add them as special tokens.")
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        spacing: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """A batch for the model.

        Args:
            images: whatever `read_volume` takes, one or a (nested) list, in the order of `<|image_pad|>` in the texts.
            text: one or several prompts with one `<|image_pad|>` per image; each becomes one per slice of its patches.
            spacing: mm (depth, height, width) of images given as arrays.
            kwargs: `return_tensors` ("pt" by default), settings of the image processor, or arguments of the tokenizer
                (padding is on by default); `images_kwargs` and `text_kwargs` as everywhere in Transformers.

        Returns:
            `input_ids`, `attention_mask`, `pixel_values`, `patch_grid`, `slice_mask`, and `disease_ids` where every
            prompt that speaks of diseases names known ones ("... the presence of calcification and bronchiectasis.").

        Raises:
            CTInstructError: where texts and images do not fit each other, or an image cannot be read.
        """
        if images is None and text is None:
            raise CTInstructError("Give images, text or both.")
        return_tensors = kwargs.pop("return_tensors", "pt")
        image_options, text_options = self.split_options(kwargs)
        data: dict[str, Any] = {}
        if images is not None:
            images = flatten_images(images)
            data.update(self.image_processor(images, spacing=spacing, return_tensors=return_tensors, **image_options))
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            grid = data["patch_grid"] if images is not None else []
            expanded = self.expand(texts, [math.prod(int(side) for side in row) for row in grid])
            data.update(self.tokenizer(expanded, return_tensors=return_tensors, **text_options))
            ids = self.disease_ids_of(texts)
            if ids:
                data["disease_ids"] = ids
        return BatchFeature(data, tensor_type=return_tensors)

    def split_options(self, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of a call for the image processor and for the tokenizer."""
        images, text = dict(options.pop("images_kwargs", {})), dict(options.pop("text_kwargs", {}))
        common = options.pop("common_kwargs", {})
        for name in ("videos_kwargs", "audio_kwargs"):
            options.pop(name, None)
        names = inspect.signature(type(self.image_processor).__init__).parameters
        twice = sorted(name for name in options if name in images or name in text)
        if twice:
            raise CTInstructError(
                f"{', '.join(twice)} is given twice: as itself and inside images_kwargs or text_kwargs."
            )
        for name, value in {**options, **common}.items():
            (images if name in names else text).setdefault(name, value)
        for name in ("return_tensors", "device"):
            images.pop(name, None)
            text.pop(name, None)
        own = {name: value for name, value in self.tokenizer.init_kwargs.items() if name in _TOKENIZER_OPTIONS}
        return images, {"padding": True, "padding_side": "left", "add_special_tokens": False, **own, **text}

    def expand(self, texts: list[str], tokens: Sequence[int]) -> list[str]:
        """Each `<|image_pad|>` repeated to one per slice of its image."""
        places = sum(text.count(IMAGE_TOKEN) for text in texts)
        if places != len(tokens):
            raise CTInstructError(
                f"The texts have {places} {IMAGE_TOKEN} for {len(tokens)} images: one each is needed."
            )
        counts = iter(tokens)
        return [re.sub(re.escape(IMAGE_TOKEN), lambda _: IMAGE_TOKEN * next(counts), text) for text in texts]

    def disease_ids_of(self, texts: Iterable[str]) -> list[int] | None:
        """Ids of the diseases that prompts name, one after the other; None where a prompt's cannot be told."""
        ids: list[int] = []
        for text in texts:
            found = self.named_diseases(text)
            if found is not None:
                tokens = text.count(DISEASE_TOKEN)
                if tokens not in (0, len(found)):
                    return None
                ids.extend(found)
            elif DISEASE_TOKEN in text:
                return None
        return ids or None

    def named_diseases(self, text: str) -> list[int] | None:
        """Ids of the diseases after the last "presence of", all of one list; None where they are not known."""
        matches = list(_NAMED.finditer(text))
        if not matches:
            return None
        return self.disease_rows_of(
            [part.strip() for part in re.split(r",\s*(?:and\s+)?|\s+and\s+", matches[-1]["names"])]
        )

    def disease_rows_of(self, names: Sequence[str]) -> list[int] | None:
        """Ids of diseases, from the first list that has them all; None where no list does."""
        wanted = [name.lower() for name in names]
        start = 0
        for diseases in self.disease_lists.values():
            known = {disease.lower(): start + index for index, disease in enumerate(diseases)}
            if wanted and all(name in known for name in wanted):
                return [known[name] for name in wanted]
            start += len(diseases)
        return None

    def post_process_segmentation(
        self,
        outputs: Any,
        volumes: CTVolume | Sequence[CTVolume],
        threshold: float = 0.5,
        names: Sequence[str | None] | None = None,
    ) -> list[np.ndarray]:
        """Masks on the volumes' own grids.

        Args:
            outputs: of `forward` or `generate`, with `mask_logits`, or the list of mask logits itself.
            volumes: the `CTVolume` of each `<SEG>`, or the one that all are about.
            threshold: probability above which a voxel belongs to the mask.
            names: of the structures, see `structures_named`: a mask that does not reach the floor of its structure in
                `image_processor.mask_floors` is left empty. Without names, none is.

        Returns:
            One bool (depth, height, width) per `<SEG>`; `volume.to_source(mask)` puts it on the file's grid.
        """
        logits = outputs if isinstance(outputs, list | tuple) else outputs.mask_logits or []
        listed = [volumes] * len(logits) if isinstance(volumes, CTVolume) else list(volumes)
        if len(listed) == 1:
            listed = listed * len(logits)
        if len(listed) != len(logits):
            raise CTInstructError(f"There are {len(logits)} masks for {len(listed)} volumes: give one each.")
        if names is not None and len(names) != len(logits):
            raise CTInstructError(f"There are {len(logits)} masks for {len(names)} names: give one each.")
        level = float(np.log(threshold / (1 - threshold)))
        return [
            self.image_processor.mask_from_canvas(mask, volume, level, name)
            for mask, volume, name in zip(logits, listed, names or [None] * len(logits), strict=True)
        ]

    def structures_named(self, question: str, answer: str) -> list[str | None]:
        """Which structure with a floor each `<SEG>` of an answer is about: the name before it ("heart <SEG>"), or the one
        that the question has ("Where is the heart?", "it is <SEG>"); None where it is another or cannot be told."""
        known = sorted(self.image_processor.mask_floors, key=len, reverse=True)
        before = [part.rstrip().lower() for part in answer.split(SEG_TOKEN)[:-1]]
        asked = next((name for name in known if name.lower() in question.lower()), None) if len(before) == 1 else None
        return [next((name for name in known if part.endswith(name.lower())), asked) for part in before]

    def post_process_diagnosis(
        self, outputs: Any, diseases: Sequence[str] | None = None
    ) -> dict[str, float] | list[dict[str, float]]:
        """Probabilities by disease.

        Args:
            outputs: of `forward` or `generate`, with `disease_logits`.
            diseases: names in the order of the `<disease_confidence>` tokens; a list of names per sample for a batch.
                Without it, the known list of that length.

        Returns:
            {disease: probability}, or a list of them for a list of lists.
        """
        logits = outputs.disease_logits
        if logits is None:
            return {}
        scores = torch.as_tensor(logits).detach().float().sigmoid().flatten().tolist()
        if diseases is None:
            fitting = [names for names in self.disease_lists.values() if len(names) == len(scores)]
            if len(fitting) != 1:
                raise CTInstructError(
                    f"There are {len(scores)} probabilities and no single list of that length: pass diseases."
                )
            diseases = fitting[0]
        nested = bool(diseases) and not isinstance(diseases[0], str)
        groups: Sequence[Sequence[str]] = diseases if nested else [diseases]  # type: ignore[assignment]
        if sum(len(names) for names in groups) != len(scores):
            raise CTInstructError(
                f"There are {len(scores)} probabilities for {sum(len(names) for names in groups)} diseases."
            )
        rest = iter(scores)
        results = [{name: next(rest) for name in names} for names in groups]
        return results if nested else results[0]

    def write_out(self, text: str, probabilities: Iterable[float] = ()) -> str:
        """An answer for people: "calcification 0.90, bronchiectasis 0.20" for its `<disease_confidence>`, "unknown" where a
        probability is missing, "[mask]" for `<SEG>`; other special tokens are left out."""
        rest = iter(probabilities)

        def number(token: re.Match[str]) -> str:
            value = next(rest, None)
            return "unknown" if value is None else f"{value:.2f}"

        text = re.sub(re.escape(DISEASE_TOKEN), number, text).replace(SEG_TOKEN, "[mask]")
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, "")
        return text.strip()

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Decoded texts, as pipelines ask for them."""
        return self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers, without `auto_map`, which belongs to the saved file only."""
        return settings_of(self, super().to_dict())

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As in Transformers; the folder then loads with `trust_remote_code=True` without this package."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:  # what the last call set is no part of the tokenizer
            backend.no_padding()
            backend.no_truncation()
        with as_auto_class(self, "AutoProcessor"), as_auto_class(self.image_processor, "AutoImageProcessor"):
            saved = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        settings_file = Path(save_directory) / "tokenizer_config.json"
        if settings_file.exists():  # how it was loaded is no part of the tokenizer
            settings = json.loads(settings_file.read_text(encoding="utf-8"))
            kept = {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only")}
            settings_file.write_text(
                json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        return saved

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


__all__ = ["CTInstructProcessor"]
