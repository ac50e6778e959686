"""Training data: epochs after the first against the first, the loader against the training step, phantoms a second.

python benchmarks/data.py [--quick] [--check]
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import torch
from common import Pair, alternate, arguments, header, ratio, table, write_figures

from ctinstruct_hf import CTInstructForPretraining, CTInstructImageProcessor
from ctinstruct_hf.data.mixture import Item
from ctinstruct_hf.data.samples import AlignmentSample, ImageRef, MaskRef, to_row
from ctinstruct_hf.data.store import TINY_PATCH, PatchStore
from ctinstruct_hf.phantoms import ORGANS, make_phantom
from ctinstruct_hf.phantoms.tiny import tiny_config
from ctinstruct_hf.train.collator import AlignmentCollator


class Words:
    """Stands in for a tokenizer, whose time is not looked at."""

    def __call__(self, texts: list[str], **kwargs: object) -> dict[str, torch.Tensor]:
        ids = torch.arange(8, 8 + len(texts))[:, None].expand(-1, 4)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def write_scans(folder: Path, count: int, shape: tuple[int, int, int]) -> list[AlignmentSample]:
    """Scans with their label files as compressed NIfTI, as a segmentation data set has them."""
    samples = []
    for seed in range(count):
        phantom = make_phantom(seed, shape)
        scan, labels = folder / f"{seed}.nii.gz", folder / f"{seed}_labels.nii.gz"
        nib.save(phantom.volume.to_source(phantom.volume.hu), scan)
        phantom.volume.to_source(phantom.organ_map, labels)
        present = [name for name in phantom.structures if name != "body"][:6]
        masks = [MaskRef(name, str(labels), [ORGANS.index(name) + 1]) for name in present]
        samples.append(AlignmentSample(str(seed), ImageRef(str(scan)), "train", "benchmark", masks=masks))
    return samples


def epoch(store: PatchStore, samples: list[AlignmentSample]) -> None:
    for sample in samples:
        store.image(sample.image)
        for mask in sample.masks:
            store.mask(sample.image, mask)


def main() -> int:
    options = arguments(__doc__)
    print(header("torch", "ctinstruct-hf", "nibabel", "safetensors"))
    torch.set_num_threads(1)
    count, shape = (2, (32, 96, 96)) if options.quick else (6, (160, 320, 320))
    runs = 2 if options.quick else options.runs
    processor = CTInstructImageProcessor(patch_size=TINY_PATCH, max_patches=4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = write_scans(folder, count, shape)
        kept = PatchStore(processor, folder / "kept")
        epoch(kept, samples)
        number = iter(range(10**6))
        pairs = [
            alternate(
                "epoch after the first, against the first",
                lambda: epoch(kept, samples),
                lambda: epoch(PatchStore(processor, folder / f"first-{next(number)}"), samples),
                runs,
                None if options.quick else 10.0,
            )
        ]
        pairs.append(loader_against_step(kept, samples, runs, None if options.quick else 10.0))
    print(table(pairs))
    start = time.perf_counter()
    made = 2 if options.quick else 12
    for seed in range(made):
        make_phantom(seed, (32, 64, 64) if options.quick else (128, 160, 160))
    rate = made / (time.perf_counter() - start)
    size = "32 x 64 x 64" if options.quick else "128 x 160 x 160"
    print(f"phantoms of {size}: {rate:.1f} a second on one core")
    write_figures(
        options,
        epoch=f"{ratio(pairs[0])} times as fast",
        loader=f"{ratio(pairs[1])} times as fast",
        phantoms=f"{rate:.1f} a second on one core",
    )
    if options.check and (any(pair.missed for pair in pairs) or (not options.quick and rate < 3.5)):
        return 1
    return 0


def loader_against_step(store: PatchStore, samples: list[AlignmentSample], runs: int, least: float | None) -> Pair:
    """Making a batch of kept patches, against one training step of the tiny network on it, both on all cores."""
    collate = AlignmentCollator(store, Words(), masks_per_image=6)
    items = [Item(to_row(sample), ("segmentation",), draw) for draw, sample in enumerate(samples)]
    pairs = itertools.cycle([items[first : first + 2] for first in range(0, len(items), 2)])
    model = CTInstructForPretraining(tiny_config()).train()
    model.text_encoder.requires_grad_(False)
    batch = collate(next(pairs))

    def step() -> None:
        model.zero_grad()
        model(**batch).loss.backward()

    torch.set_num_threads(2)
    return alternate("a batch from the store, against a training step", lambda: collate(next(pairs)), step, runs, least)


if __name__ == "__main__":
    sys.exit(main())
