"""Scans and words to a batch; logits to masks, probabilities and answers for people."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import logging

from .arguments_ctinstruct import CTInstructProcessorKwargs
from .image_fetching import from_base64
from .image_processing_ctinstruct import as_auto_class, flatten_images, settings_of
from .labels_ctinstruct import CTInstructBatch
from .volume import CTInstructError, CTVolume, is_volume

logger = logging.get_logger(__name__)

SEG_TOKEN = "<SEG>"
DISEASE_TOKEN = "<disease_confidence>"
IMAGE_TOKEN = "<|image_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"

# Qwen2-VL's template, without its default system message
_BEGIN = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)
_CLOSE = "<|im_end|>\n"
_END = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# the same text without marks around the assistant's, as older saved folders have it
_PLAIN_TEMPLATE = _BEGIN + _CONTENT + _CLOSE + _END
CHAT_TEMPLATE = (
    f"{_BEGIN}{{% set content %}}{_CONTENT}{_CLOSE}{{% endset %}}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ content }}{% endgeneration %}"
    "{% else %}{{ content }}{% endif %}" + _END
)
# call options that a tokenizer may have been made with
_TOKENIZER_OPTIONS = ("padding", "max_length", "truncation")
_IMAGE_KEYS = ("image", "url", "path", "base64")  # keys of a message's image
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

    valid_processor_kwargs: Any = CTInstructProcessorKwargs
    # defaults of calls
    text_kwargs = {"padding": True, "padding_side": "left", "add_special_tokens": False, "return_tensors": "pt"}
    images_kwargs = {"return_tensors": "pt"}

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
        if chat_template in (None, "", _PLAIN_TEMPLATE):
            chat_template = CHAT_TEMPLATE
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        vocabulary = tokenizer.get_vocab()
        missing = [
            token
            for token in (VISION_START, IMAGE_TOKEN, VISION_END, SEG_TOKEN, DISEASE_TOKEN)
            if token not in vocabulary
        ]
        if missing:
            raise CTInstructError(f"The tokenizer lacks the tokens {', '.join(missing)}: add them as special tokens.")
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self._vision_token_ids = tuple(tokenizer.convert_tokens_to_ids([VISION_START, IMAGE_TOKEN, VISION_END]))

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """A batch for the model.

        Args:
            images: what `CTInstructImageProcessor.read` takes, a list of it in the order of `<|image_pad|>` in the texts,
                or a list of images per text.
            text: a prompt or a list, with an `<|image_pad|>` per image, which is repeated for each slice of its patches.
            kwargs: `spacing` in mm (depth, height, width) of images given as arrays, settings of the image processor,
                arguments of the tokenizer (padding is on by default), `return_tensors` ("pt" by default),
                `return_mm_token_type_ids`, `return_text_replacement_offsets`; `images_kwargs` and `text_kwargs` as
                everywhere in Transformers.

        Returns:
            `input_ids`, `attention_mask`, `pixel_values`, `patch_grid`, `slice_mask`, and `disease_ids` where every
            prompt about diseases names known diseases ("... the presence of calcification and bronchiectasis.").
            `labels` put into it are −100 at image and vision tokens.

        Raises:
            CTInstructError: for unknown arguments, videos and audio, where texts and images do not fit each other, where
                `max_length` would cut image tokens, or where an image cannot be read.
        """
        if any(kwargs.pop(name, None) is not None for name in ("videos", "audio")):
            raise CTInstructError("CTInstruct reads images and text: videos and audio cannot be given.")
        kwargs = self._check_arguments(kwargs)
        if text is not None and isinstance(images, list | tuple) and not flatten_images(images):
            images = None  # a batch of texts alone
        try:
            batch = CTInstructBatch(super().__call__(images=images, text=text, **kwargs).data)
        except CTInstructError:
            raise
        except (StrictDataclassError, ValueError) as error:
            raise CTInstructError(" ".join(str(error).split())) from error
        batch.vision_token_ids = self._vision_token_ids
        ids = self.disease_ids_of([text] if isinstance(text, str) else text or [])
        if ids:
            tensors = next((value for name, value in batch.items() if name in ("input_ids", "pixel_values")), None)
            batch["disease_ids"] = (
                torch.tensor(ids)
                if isinstance(tensors, torch.Tensor)
                else np.array(ids)
                if isinstance(tensors, np.ndarray)
                else ids
            )
        return batch

    def _check_arguments(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that the processor takes.

        Those of `generate`, which pipelines of Transformers hand on to the processor, are left out with a warning.

        Raises:
            CTInstructError: for an argument that nothing here takes.
        """
        groups = self.valid_processor_kwargs.__annotations__
        known = {name: set(groups[name].__annotations__) for name in ("images_kwargs", "text_kwargs")}
        flat = {*groups, *known["images_kwargs"], *known["text_kwargs"], "common_kwargs", "return_metadata"}
        flat |= set(groups["videos_kwargs"].__annotations__)  # chat templates are always called with them
        unknown = set(options) - (flat - {"videos_kwargs", "audio_kwargs"})
        unknown |= {name for group, names in known.items() for name in set(options.get(group) or {}) - names}
        unknown |= set(options.get("common_kwargs") or {}) - flat
        of_generate = {name for name in unknown if hasattr(GenerationConfig(), name)}
        if of_generate:
            names = ", ".join(sorted(of_generate))
            logger.warning(f"{names}: no effect here; give it to `generate`, in a pipeline as `generate_kwargs`.")
        if unknown - of_generate:
            raise CTInstructError(f"{', '.join(sorted(unknown - of_generate))}: the processor has no such argument.")
        return {name: value for name, value in options.items() if name not in of_generate}

    def validate_inputs(self, images: Any = None, text: Any = None, *args: Any, **kwargs: Any) -> None:
        """Raises CTInstructError where texts and images do not fit each other."""
        if images is None and text is None:
            raise CTInstructError("Give images, text or both.")
        if text is None:
            return
        if not isinstance(text, list) or not all(isinstance(prompt, str) for prompt in text):
            raise CTInstructError("text is neither a string nor a list of strings.")
        self._check_image_count(text, 0 if images is None else len(flatten_images(images)))
        if isinstance(images, list | tuple) and all(isinstance(part, list | tuple) for part in images):
            if len(images) != len(text):
                raise CTInstructError(f"images has {len(images)} lists for {len(text)} texts: give one per text.")
            for prompt, part in zip(text, images, strict=True):
                self._check_image_count([prompt], len(flatten_images(part)))

    def _merge_kwargs(
        self,
        ModelProcessorKwargs: Any = None,
        tokenizer_init_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        settings = {name: value for name, value in (tokenizer_init_kwargs or {}).items() if name in _TOKENIZER_OPTIONS}
        return super()._merge_kwargs(ModelProcessorKwargs, settings, *args, **kwargs)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[BatchFeature, list[str]]:
        batch = self.image_processor(flatten_images(images), **kwargs)
        return batch, [self.replace_image_token(batch, index) for index in range(len(batch["patch_grid"]))]

    def replace_image_token(self, image_inputs: Mapping[str, Any], image_idx: int, **kwargs: Any) -> str:
        """One `<|image_pad|>` per slice of the patches of an image."""
        return IMAGE_TOKEN * int(np.prod([int(side) for side in image_inputs["patch_grid"][image_idx]]))

    def _check_special_mm_tokens(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._check_special_mm_tokens(*args, **kwargs)
        except ValueError as error:
            raise CTInstructError("max_length cuts image tokens: raise it, or pass truncation=False.") from error

    def _check_image_count(self, texts: Sequence[str], images: int) -> None:
        tokens = sum(text.count(IMAGE_TOKEN) for text in texts)
        if tokens != images:
            raise CTInstructError(
                f"The texts have {tokens} {IMAGE_TOKEN} for {images} images: one each is needed, the number of {IMAGE_TOKEN} "
                "tokens in the prompts should be the same as the number of images."
            )

    def expand(self, texts: list[str], tokens: Sequence[int]) -> list[str]:
        """Each `<|image_pad|>` repeated as often as its image has slices in all patches (`tokens`)."""
        self._check_image_count(texts, len(tokens))
        return self.get_text_with_replacements(list(texts), [IMAGE_TOKEN * count for count in tokens])[0]

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in Transformers, of messages whose content is text, or a list of {"type": "text", "text": …},
        {"type": "image", "image": …} (or `url`, `path`, `base64`, or none of them where images come apart) and
        {"type": "image_url", "image_url": {"url": …}}.

        Control tokens in a message become text: `<|im_end|>` gets a blank after its first character. Only the assistant's
        text may hold `<SEG>` and `<disease_confidence>`.

        Raises:
            CTInstructError: for any other content.
        """
        listed = list(conversation)
        if not listed:
            raise CTInstructError("The conversation has no message.")
        single = isinstance(listed[0], Mapping)
        checked = [
            [self._checked(message) for message in getattr(messages, "messages", messages)]
            for messages in ([listed] if single else listed)
        ]
        return super().apply_chat_template(checked[0] if single else checked, chat_template, *args, **kwargs)

    def _checked(self, message: Any) -> dict[str, Any]:
        """A message whose content the template knows, without control tokens."""
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise CTInstructError("A message has no role: give {'role': 'user', 'content': …}.")
        answers = (SEG_TOKEN, DISEASE_TOKEN) if message["role"] == "assistant" else ()
        content = message.get("content")
        if isinstance(content, str):
            content = self._without_control_tokens(content, answers)
        elif isinstance(content, list | tuple):
            content = [self._checked_part(part, answers) for part in content]
        elif content is not None:
            raise CTInstructError(f"A message's content is {type(content).__name__}: give text or a list of parts.")
        return {**message, "role": self._without_control_tokens(message["role"]), "content": content or ""}

    def _checked_part(self, part: Any, allowed: Sequence[str]) -> dict[str, Any]:
        content = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if content == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": self._without_control_tokens(part["text"], allowed)}
        if content == "image":
            image = {name: part[name] for name in _IMAGE_KEYS if part.get(name) is not None}
            if "base64" in image:
                image["image"] = from_base64(image.pop("base64"))
            return {"type": "image", **image}
        if content == "image_url" and part.get("image_url"):
            url = part["image_url"]
            return {"type": "image", "image": url["url"] if isinstance(url, Mapping) else url}
        raise CTInstructError(
            f"A message has content of the type '{content}': known are text (with 'text'), image and image_url."
        )

    def _without_control_tokens(self, text: str, allowed: Sequence[str] = ()) -> str:
        """Text that the tokenizer reads as text: `<SEG>` becomes `< SEG>`, but for `allowed` tokens."""
        ours = (VISION_START, IMAGE_TOKEN, VISION_END, SEG_TOKEN, DISEASE_TOKEN, "<|im_start|>", "<|im_end|>")
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        tokens = sorted({*ours, *special} - set(allowed), key=len, reverse=True)
        pattern = "|".join(re.escape(token) for token in tokens if len(token) > 1)
        return re.sub(pattern, lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def disease_ids_of(self, texts: Iterable[str]) -> list[int] | None:
        """Ids of the diseases that prompts name, in their order; None where those of a prompt are not known."""
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
        """Ids of the diseases after the last "presence of", all of the same list; None where they are not known."""
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
        """Masks on the volumes' grids.

        Args:
            outputs: of `forward` or `generate`, with `mask_logits`, or the list of mask logits itself.
            volumes: the `CTVolume` of each `<SEG>`, or a single volume for all.
            threshold: probability above which a voxel belongs to the mask.
            names: of the structures, see `structures_named`: a mask that does not reach the floor of its structure in
                `image_processor.mask_floors` is left empty. Without names, none is.

        Returns:
            One bool (depth, height, width) per `<SEG>`; `volume.to_source(mask)` puts it on the file's grid.
        """
        logits = outputs if isinstance(outputs, list | tuple) else outputs.mask_logits or []
        listed = [volumes] * len(logits) if is_volume(volumes) else list(volumes)  # type: ignore[arg-type]
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
        """The structure with a floor that each `<SEG>` of an answer is about: the name before it ("heart <SEG>") or, for a
        single `<SEG>`, the name in the question ("Where is the heart?"); None where neither is known."""
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
        self._tidy(Path(save_directory))
        return saved

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        self._tidy(Path(working_dir))  # before the files are sent
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _tidy(self, folder: Path) -> None:
        """Remove from the saved settings how the tokenizer was loaded."""
        settings_file = folder / "tokenizer_config.json"
        if settings_file.exists():
            settings = json.loads(settings_file.read_text(encoding="utf-8"))
            kept = {name: value for name, value in settings.items() if name not in ("is_local", "local_files_only")}
            settings_file.write_text(
                json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
            )

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]


__all__ = ["CTInstructProcessor"]
