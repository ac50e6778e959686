"""What stage two takes over from stage one beside the tower: how its texts prompted the decoder, and what its category
grain reads from a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ...data.descriptions import describe_category, texts_of
from ...data.mixture import MixtureEntry, first_rows
from ...data.samples import ImageRef
from ...errors import CTInstructError
from ...modeling.pretraining_ctinstruct import CTInstructForPretraining
from .token_store import TokenStore

ALIGNED = "stage one"  # the list of diseases in a stage-one model's config: the names of its category grain
Texts = Callable[[Sequence[str]], torch.Tensor]


def load_stage_one(folder: str) -> tuple[CTInstructForPretraining, Texts]:
    """A stage-one model, and its embeddings [texts, D_text] of texts, before any normalisation.

    Raises:
        CTInstructError: where the folder holds no stage-one model with its tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        model = CTInstructForPretraining.from_pretrained(folder, use_safetensors=True).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CTInstructError(
            f"vision: {folder} has no text encoder, which align_prompts and start_bridger need."
        ) from error

    def embed(texts: Sequence[str]) -> torch.Tensor:
        words = tokenizer(list(texts), return_tensors="pt", padding=True)
        return model.embed_texts(words["input_ids"], words["attention_mask"])

    return model, embed


@torch.no_grad()
def start_bridger(
    bridger: nn.Module,
    stage_one: CTInstructForPretraining,
    embed: Texts,
    tokens: TokenStore,
    entries: Sequence[MixtureEntry],
    most_images: int = 200,
) -> None:
    """Start the bridger so that what the category grain reads from a token is as loud as all the rest of it.

    A token's similarity to the text of a kidney stone is a small part of how tokens differ, and a language model that has
    to find it among hundreds of numbers may not. Each such similarity is brought to mean 0 and deviation 1 over the
    mixture's tokens and gets a direction of its own in the language model's space, beside the usual random start. This is a
    start only; the bridger is trained. Not in the paper.

    Args:
        bridger: its first linear layer is changed, [D_lm, D].
        stage_one: gives the category projection.
        embed: its texts.
        tokens: of the frozen tower.
        entries: the mixture; its names of structures and categories, and stage one's own categories, are the texts.
        most_images: so many images of it give means and deviations.
    """
    known = stage_one.config.disease_lists.get(ALIGNED, [])
    names = dict.fromkeys(describe_category(name) for name in known)
    images: dict[str, ImageRef] = {}
    for row in first_rows(entries, 10_000):
        names |= dict.fromkeys(texts_of(row))
        if len(images) < most_images:
            images |= {image["path"]: ImageRef(**image) for image in row["images"]}
    if not names or not images:
        return
    whole = getattr(bridger, "modules_to_save", None)  # beside adapters, a copy is trained
    trained = [bridger] if whole is None else list(whole.values())
    layers = [next(layer for layer in one.modules() if isinstance(layer, nn.Linear)) for one in trained]
    first = layers[0]
    texts = F.normalize(embed(list(names)), dim=-1)
    directions = (texts @ stage_one.category_projection.weight)[: min(first.weight.shape)]  # [texts, D]
    seen = torch.cat([tokens.image(image)["tokens"].float() for image in images.values()]) @ directions.T
    spread = seen.std(0).clamp(min=1e-6)
    place = torch.linalg.qr(torch.randn(first.out_features, len(directions)))[0]  # a direction of D_lm each
    new = place @ (directions / spread[:, None])
    shift = place @ (seen.mean(0) / spread)
    for layer in layers:
        layer.weight.add_(new.to(layer.weight))
        if layer.bias is not None:
            layer.bias.sub_(shift.to(layer.bias))


__all__ = ["ALIGNED", "load_stage_one", "start_bridger"]
