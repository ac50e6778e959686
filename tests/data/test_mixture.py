"""The schedule: by weight, one task a step on all processes, the same after a resume; patches are prepared once."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from datasets_on_disk import nifti
from torch.utils.data import DataLoader

from ctinstruct_hf import CTInstructError, CTInstructImageProcessor
from ctinstruct_hf.data import reading as reading_module
from ctinstruct_hf.data import store as store_module
from ctinstruct_hf.data.cases import ImageRef, Label, MaskRef
from ctinstruct_hf.data.mixture import Mixture, MixtureBatches, MixtureEntry, StreamedMixture, skips_allowed
from ctinstruct_hf.data.parts import check_part, choices_from_labels, join_turns, load_part
from ctinstruct_hf.data.prepare import open_rows
from ctinstruct_hf.data.prepared import write_rows
from ctinstruct_hf.data.reading import open_mask, open_volume
from ctinstruct_hf.data.samples import TASKS, AlignmentSample, InstructionSample, from_row, text_of, to_row
from ctinstruct_hf.data.store import PatchStore
from ctinstruct_hf.evaluation.run import options_of
from ctinstruct_hf.evaluation.text import chosen_option
from ctinstruct_hf.phantoms import phantom_of
from ctinstruct_hf.train.collator import AlignmentCollator

PATCH = {"depth": 8, "height": 32, "width": 32}


def rows(name: str, count: int) -> list[dict[str, Any]]:
    return [{"id": f"{name}{index}"} for index in range(count)]


def mixture() -> Mixture:
    return Mixture([
        MixtureEntry("a", rows("a", 5), ("contrastive",), 3.0),
        MixtureEntry("b", rows("b", 7), ("segmentation",), 1.0, batch_size=4),
        MixtureEntry("never", [], ("category",), 0.0),
    ])  # fmt: skip


def test_parts_are_drawn_by_weight_and_every_row_once_an_epoch() -> None:
    batches = list(MixtureBatches(mixture(), 2, 400, seed=1))
    parts = Counter(batch[0][0] for batch in batches)
    assert 0.68 < parts[0] / 400 < 0.82
    assert parts[2] == 0
    assert {len(batch) for batch in batches if batch[0][0] == 1} == {4}
    assert all(len({place[0] for place in batch}) == 1 for batch in batches)
    seen = [row for batch in batches if batch[0][0] == 0 for _, row, _ in batch]
    assert all(sorted(seen[first : first + 5]) == list(range(5)) for first in range(0, 50, 5))
    draws = [draw for batch in batches for _, _, draw in batch]
    assert len(set(draws)) == len(draws)


def test_the_schedule_is_the_seeds_alone_and_processes_agree_on_the_task() -> None:
    whole = list(MixtureBatches(mixture(), 2, 60, seed=3))
    assert whole == list(MixtureBatches(mixture(), 2, 60, seed=3))
    assert whole != list(MixtureBatches(mixture(), 2, 60, seed=4))
    shards = [list(MixtureBatches(mixture(), 2, 60, seed=3, rank=rank, world_size=2)) for rank in (0, 1)]
    assert len(shards[0]) == len(shards[1]) == 60
    for mine, theirs, one in zip(*shards, whole, strict=True):
        assert mine[0][0] == theirs[0][0] == one[0][0]
        assert len(mine) == len(theirs)
        assert not {draw for *_, draw in mine} & {draw for *_, draw in theirs}


def test_a_mixture_without_rows_or_weight_is_refused() -> None:
    with pytest.raises(CTInstructError, match="'empty' has no rows"):
        Mixture([MixtureEntry("empty", [], ("category",))])
    with pytest.raises(CTInstructError, match="positive weight"):
        Mixture([MixtureEntry("a", rows("a", 1), ("category",), 0.0)])


def streamed(rank: int = 0, world: int = 1, start: int = 0) -> StreamedMixture:
    from datasets import IterableDataset

    def part(name: str, count: int) -> Any:
        return IterableDataset.from_generator(lambda: iter(rows(name, count)))

    entries = [MixtureEntry("a", part("a", 40), ("contrastive",)), MixtureEntry("b", part("b", 40), ("segmentation",))]
    return StreamedMixture(entries, 2, seed=5, rank=rank, world_size=world, start=start, buffer=8)


def test_streamed_processes_agree_on_the_task_and_share_out_the_rows() -> None:
    steps = [list(itertools.islice(iter(streamed(rank, 2)), 15)) for rank in (0, 1)]
    for mine, theirs in zip(*steps, strict=True):
        assert mine[0].tasks == theirs[0].tasks
    first = [{item.row["id"] for batch in part for item in batch} for part in steps]
    assert not first[0] & first[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_it_stopped(workers: int) -> None:
    def ids(start: int, count: int) -> list[list[str]]:
        loader = DataLoader(streamed(start=start), batch_size=None, num_workers=workers, collate_fn=lambda batch: batch)
        return [[item.row["id"] for item in batch] for batch in itertools.islice(loader, count)]

    assert ids(3, 5) == ids(0, 8)[3:]


def test_patches_are_prepared_once_and_labels_lie_on_the_canvas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nifti(tmp_path / "scan.nii.gz")
    nifti(tmp_path / "labels.nii.gz", (1, 2))
    image = ImageRef(str(tmp_path / "scan.nii.gz"))
    processor = CTInstructImageProcessor(patch_size=PATCH)
    stores = [PatchStore(processor, tmp_path / "cache"), PatchStore(processor)]
    masks = [
        MaskRef("one", str(tmp_path / "labels.nii.gz"), [1]),
        MaskRef("all", str(tmp_path / "labels.nii.gz")),
        MaskRef("none"),
    ]
    for store in stores:
        prepared = store.image(image)
        expected = processor(images=[image.path], return_tensors="pt")
        torch.testing.assert_close(prepared["pixel_values"].float(), expected["pixel_values"], atol=1e-3, rtol=1e-3)
        assert prepared["patch_grid"].tolist() == expected["patch_grid"].tolist()
        volume = open_volume(image)
        for mask in masks:
            canvas = store.mask(image, mask)
            kept = processor.labels_to_canvas(open_mask(mask, volume).astype(np.uint8), volume)
            assert torch.equal(canvas, kept)
        assert not (store.mask(image, masks[2]) > 0).any()
    monkeypatch.setattr(store_module, "open_volume", lambda image: pytest.fail("read again"))
    again = PatchStore(processor, tmp_path / "cache")
    assert torch.equal(again.image(image)["pixel_values"], stores[0].image(image)["pixel_values"])
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_changed_file_or_setting_is_prepared_anew(tmp_path: Path) -> None:
    nifti(tmp_path / "scan.nii.gz")
    image = ImageRef(str(tmp_path / "scan.nii.gz"))
    processor = CTInstructImageProcessor(patch_size=PATCH)
    before = PatchStore(processor, tmp_path / "cache").image(image)["pixel_values"]
    nifti(tmp_path / "scan.nii.gz", stored=400)
    after = PatchStore(processor, tmp_path / "cache").image(image)["pixel_values"]
    assert not torch.equal(before, after)
    other = CTInstructImageProcessor(patch_size=PATCH, hu_window=(-160, 240))
    assert not torch.equal(PatchStore(other, tmp_path / "cache").image(image)["pixel_values"], after)


def test_all_label_files_of_an_image_share_one_map_in_the_cache(tmp_path: Path) -> None:
    nifti(tmp_path / "scan.nii.gz")
    rng = np.random.default_rng(3)
    masks = [MaskRef(f"m{number}", str(tmp_path / f"m{number}.nii.gz")) for number in range(9)]
    for number, mask in enumerate(masks):  # overlapping; the last has so many labels that a map cannot tell all apart
        labels = rng.integers(0, 2 if number < 8 else 128, (12, 10, 4)).astype(np.uint8)
        labels[6:] = 0 if number < 8 else labels[6:]
        if 1 < number < 8:
            labels[number - 1 :] = 0
        nib.save(nib.Nifti1Image(labels, np.diag([1.0, 1.0, 2.0, 1.0])), mask.path)
    masks += [MaskRef("some", masks[8].path, [3, 77]), MaskRef("gone")]
    image = ImageRef(str(tmp_path / "scan.nii.gz"))
    processor = CTInstructImageProcessor(patch_size=PATCH)
    plain = [PatchStore(processor).mask(image, mask) for mask in masks]
    for order in (range(11), reversed(range(11)), [3, 8, 10]):
        stores = [PatchStore(processor, tmp_path / "cache"), PatchStore(processor, tmp_path / "cache")]  # two processes
        for number in order:
            assert torch.equal(stores[number % 2].mask(image, masks[number]), plain[number])
    assert (
        len(list((tmp_path / "cache").rglob("*.safetensors"))) == 3
    )  # patches, a map, the file that it has no room for
    nib.save(nib.Nifti1Image(np.ones((12, 10, 4), np.uint8), np.diag([1.0, 1.0, 2.0, 1.0])), masks[0].path)
    assert (PatchStore(processor, tmp_path / "cache").mask(image, masks[0]) != 0).all()


def test_the_oldest_files_make_room_where_the_cache_has_a_limit(tmp_path: Path) -> None:
    images = []
    for number in range(6):
        nifti(tmp_path / f"{number}.nii.gz", stored=100 * number)
        images.append(ImageRef(str(tmp_path / f"{number}.nii.gz")))
    processor = CTInstructImageProcessor(patch_size=PATCH)
    PatchStore(processor, tmp_path / "one").image(images[0])
    (one,) = (tmp_path / "one").rglob("*.safetensors")
    limit = 3.5 * one.stat().st_size / 1e9
    store = PatchStore(processor, tmp_path / "cache", limit)
    for image in images:
        prepared = store.image(image)
        assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.safetensors")) <= limit * 1e9
    kept = {path.stem for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert kept == {store.key(image) for image in images[-3:]}
    assert torch.equal(PatchStore(processor, tmp_path / "cache", limit).image(images[-1])["pixel_values"], prepared["pixel_values"])  # fmt: skip
    again = PatchStore(processor, tmp_path / "cache", limit).image(images[0])["pixel_values"]
    assert torch.equal(again, PatchStore(processor).image(images[0])["pixel_values"])
    with pytest.raises(CTInstructError, match="cache_limit is 0: give a number of GB above 0"):
        PatchStore(processor, tmp_path / "cache", 0)


class Words:
    """A tokenizer in the smallest."""

    def __call__(self, texts: list[str], **kwargs: Any) -> dict[str, torch.Tensor]:
        most = max(len(text) for text in texts)
        ids = torch.tensor([[ord(sign) % 90 + 8 for sign in text.ljust(most)] for text in texts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def aligned(tmp_path: Path, name: str, **more: Any) -> dict[str, Any]:
    return to_row(AlignmentSample(name, ImageRef(str(tmp_path / f"{name}.nii.gz")), "train", "mine", **more))


def items(rows: list[dict[str, Any]], tasks: tuple[str, ...]) -> list[Any]:
    return [Mixture([MixtureEntry("x", rows, tasks)])[0, index, index] for index in range(len(rows))]


def test_the_collator_puts_together_whatever_labels_there_are(tmp_path: Path) -> None:
    for name in ("a", "b"):
        nifti(tmp_path / f"{name}.nii.gz")
    nifti(tmp_path / "labels.nii.gz", (1, 2))
    store = PatchStore(CTInstructImageProcessor(patch_size=PATCH))
    collate = AlignmentCollator(store, Words(), masks_per_image=2, absent_share=1.0)
    masks = [MaskRef("one", str(tmp_path / "labels.nii.gz"), [1]), MaskRef("gone")]
    rows = [
        aligned(tmp_path, "a", texts=["Text."], labels=[Label("x", 1)], masks=masks),
        aligned(tmp_path, "b", labels=[Label("y", 0)]),
    ]
    batch = collate(items(rows, ("contrastive", "category", "segmentation")))
    assert batch["text_images"].tolist() == [0]
    assert batch["class_labels"].tolist() == [[1, -1], [-1, 0]]
    assert batch["mask_images"].tolist() == [0, 0]
    assert sorted(int((mask > 0).any()) for mask in batch["mask_labels"]) == [0, 1]
    collate.absent_share = 0.0  # then only what is there
    present = collate(items(rows[:1], ("segmentation",)))["mask_labels"]
    assert [int((mask > 0).any()) for mask in present] == [1]
    collate.absent_share, collate.balance_masks = 1.0, True
    weights = collate(items([rows[0], rows[0], rows[1]], ("segmentation",)))["mask_weights"]
    assert weights.tolist() == [0.5, 0.5, 0.5, 0.5]  # each name twice
    collate.join_masks = True
    joined = collate(items([rows[0], rows[0], rows[1]], ("segmentation",)))
    names = [tuple(ids) for ids in joined["mask_input_ids"].tolist()]
    assert joined["mask_groups"].tolist() == [names.index(name) > 0 for name in names]  # by name, over both images
    padding = collate(items(rows[1:], ("segmentation",)))["mask_labels"]
    assert [set(mask.unique().tolist()) for mask in padding] == [
        {-1}
    ]  # nothing known of it: every process still decodes
    assert len(batch["pixel_values"]) == batch["patch_grid"].prod(1).sum()
    only = collate(items(rows, ("category",)))
    assert not {"input_ids", "mask_input_ids"} & set(only)


def test_unreadable_samples_are_replaced_counted_once_and_limited(tmp_path: Path) -> None:
    nifti(tmp_path / "a.nii.gz")
    for name in "bcd":
        (tmp_path / f"{name}.nii.gz").write_bytes(b"nothing")
    collate = AlignmentCollator(PatchStore(CTInstructImageProcessor(patch_size=PATCH)), Words(), max_skipped=2)
    good, *bad = (aligned(tmp_path, name, texts=["Text."]) for name in "abcd")
    batch = collate(items([good, bad[0]], ("contrastive",)))
    assert (len(batch["input_ids"]), collate.skipped.count) == (2, 1)
    for _ in range(3):  # it counts once; the last good one of its part stands in
        assert len(collate(items(bad[:1], ("contrastive",)))["input_ids"]) == 1
    assert collate.skipped.count == 1
    collate(items(bad[:2], ("contrastive",)))
    with pytest.raises(CTInstructError, match=r"3 samples could not be read, 2 are allowed .*d\.nii\.gz"):
        collate(items(bad, ("contrastive",)))


def test_what_stands_in_is_of_the_same_part_and_task(tmp_path: Path) -> None:
    for name in ("report", "mask", "other"):
        nifti(tmp_path / f"{name}.nii.gz", stored={"report": -900, "mask": -300, "other": 100}[name])
    nifti(tmp_path / "labels.nii.gz", (1,))
    (tmp_path / "broken.nii.gz").write_bytes(b"nothing")
    masks = [MaskRef("one", str(tmp_path / "labels.nii.gz"))]
    segmented = [aligned(tmp_path, name, masks=masks) for name in ("mask", "broken")]
    mixture = Mixture([
        MixtureEntry("words", [aligned(tmp_path, "report", texts=["Text."])], ("contrastive",)),
        MixtureEntry("masks", segmented, ("segmentation",)),
    ])  # fmt: skip
    store = PatchStore(CTInstructImageProcessor(patch_size=PATCH))

    def batches() -> list[dict[str, Any]]:
        collate = AlignmentCollator(store, Words())
        return [collate([mixture[0, 0, 0]]), collate([mixture[1, 1, 1]]), collate([mixture[1, 1, 2], mixture[1, 0, 3]])]

    first, broken, both = batches()
    assert "input_ids" in first
    assert "mask_labels" in broken  # not the last that was read, which is of another part
    expected = store.image(ImageRef(str(tmp_path / "mask.nii.gz")))["pixel_values"].float()
    assert torch.equal(broken["pixel_values"], expected)
    assert (len(both["mask_labels"]), len(both["patch_grid"])) == (2, 2)
    rows = [
        {**to_row(turned(tmp_path, name, task)), "id": f"{name} {task}"}
        for name, task in (("broken", "question"), ("report", "report"), ("other", "question"))
    ]
    part = Mixture([MixtureEntry("x", rows, ())])
    assert {item.row["id"] for item in part[0, 0, 5].stand_ins(0)} == {"other question"}
    assert [item.row["id"] for item in part[0, 0, 5].stand_ins(0)] == [
        item.row["id"] for item in part[0, 0, 5].stand_ins(0)
    ]


def turned(tmp_path: Path, name: str, task: str) -> InstructionSample:
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "No."}]}]
    return InstructionSample(name, [ImageRef(str(tmp_path / f"{name}.nii.gz"))], turns, task, "train", "mine")


def test_samples_that_may_be_skipped_are_a_number_or_a_share_of_all_rows() -> None:
    parts = [MixtureEntry("a", rows("a", 150), ()), MixtureEntry("b", rows("b", 50), ())]
    assert [skips_allowed(most, parts) for most in (0, 7, 0.1)] == [0, 7, 20]
    for most, told in ((-1, "max_skipped is -1"), (2.5, r"max_skipped is 2\.5")):
        with pytest.raises(CTInstructError, match=told):
            skips_allowed(most, parts)
    with pytest.raises(CTInstructError, match=r"share 0\.1 of streamed parts"):
        skips_allowed(0.1, streamed().entries)


def test_rows_that_lack_what_their_tasks_need_are_left_out_when_a_part_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = [
        aligned(tmp_path, "a", texts=["Text."]),
        aligned(tmp_path, "b", labels=[Label("x", 1)]),
        aligned(tmp_path, "c", labels=[Label("x", 0)], masks=[MaskRef("one")], texts=["Text."]),
    ]
    write_rows(tmp_path / "set", "alignment", made)

    def kept(*tasks: str, **more: Any) -> list[str]:
        part = load_part({"dataset": str(tmp_path / "set"), "name": "mine", "tasks": list(tasks), **more}, "alignment")
        return [row["id"] for row in part.rows]

    assert kept() == ["a", "b", "c"]
    assert not caplog.records
    assert kept("contrastive") == ["a", "c"]
    assert "Part 'mine': 1 of 3 rows have nothing for contrastive and are left out." in caplog.text
    assert kept("category", "segmentation") == ["b", "c"]
    assert kept("segmentation", streaming=True) == ["c"]
    write_rows(tmp_path / "words", "alignment", made[:1])
    with pytest.raises(CTInstructError, match="none of its 1 rows has what segmentation needs"):
        kept("segmentation", dataset=str(tmp_path / "words"))


@pytest.mark.parametrize("files", [1, 4])
def test_streamed_readers_share_out_files_or_rows_by_split_dataset_by_node(tmp_path: Path, files: int) -> None:
    made = [aligned(tmp_path, f"{number:03d}", texts=["Text."]) for number in range(40)]
    for number in range(files):
        write_rows(tmp_path / f"{number}", "alignment", made[number::files])
        target = tmp_path / "set" / "alignment" / f"train-{number:05d}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{number}" / "alignment" / "train-00000.parquet").rename(target)
    part = load_part({"dataset": str(tmp_path / "set"), "tasks": ["contrastive"], "streaming": True}, "alignment")
    readers = [StreamedMixture([part], 2, seed=3, rank=rank, world_size=2, buffer=5) for rank in (0, 1)]
    epoch = [[item.row["id"] for batch in itertools.islice(iter(reader), 10) for item in batch] for reader in readers]
    assert sorted(epoch[0] + epoch[1]) == [f"{number:03d}" for number in range(40)]
    assert epoch[0] != sorted(epoch[0])


def test_a_sample_with_eight_masks_opens_its_scan_once_and_no_more_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: Counter[str] = Counter()
    read = reading_module.read_volume

    def counted(source: Any, **more: Any) -> Any:
        opened[Path(source).name] += 1
        return read(source, **more)

    monkeypatch.setattr(reading_module, "read_volume", counted)
    nifti(tmp_path / "scan.nii.gz")
    masks = [MaskRef(f"m{number}", str(tmp_path / f"m{number}.nii.gz")) for number in range(8)]
    for number, mask in enumerate(masks):
        nifti(Path(mask.path), (1 + number % 5,))
    image = ImageRef(str(tmp_path / "scan.nii.gz"))
    for settings in ({}, {"intensity": "zscore"}, {"axes": "file"}, {"target_spacing": (2.0, 1.5, 1.5)}):
        processor = CTInstructImageProcessor(patch_size=PATCH, **settings)
        expected = [processor.labels_to_canvas(open_mask(mask, open_volume(image)).astype(np.uint8), open_volume(image)) for mask in masks]  # fmt: skip
        for folder in (None, tmp_path / "cache"):
            opened.clear()
            store = PatchStore(processor, folder)
            store.image(image)
            assert all(
                torch.equal(store.mask(image, mask), canvas) for mask, canvas in zip(masks, expected, strict=True)
            )
            assert opened["scan.nii.gz"] == 1
        opened.clear()
        again = PatchStore(processor, tmp_path / "cache")
        again.image(image)
        nifti(tmp_path / "new.nii.gz", (3,))
        again.mask(image, MaskRef("new", str(tmp_path / "new.nii.gz")))
        assert opened["scan.nii.gz"] == ("intensity" in settings)  # cropped by its HU, which the cache does not keep
        (tmp_path / "new.nii.gz").unlink()


def test_findings_are_asked_for_as_often_as_organs(tmp_path: Path) -> None:
    organs = [MaskRef(f"organ {index}", "x") for index in range(20)]
    sample = AlignmentSample("a", ImageRef("x"), "train", "mine", labels=[Label("nodule", 1), Label("fluid", 0)],
                             masks=[*organs, MaskRef("nodule", "x"), MaskRef("fluid")])  # fmt: skip
    collate = AlignmentCollator(PatchStore(CTInstructImageProcessor(patch_size=PATCH)), Words(), masks_per_image=1)
    chosen = Counter(collate.choose_masks(sample, np.random.default_rng(seed))[0].name for seed in range(400))
    assert 130 < chosen["nodule"] < 240
    assert 10 < chosen["fluid"] < 110
    assert asdict(sample)["masks"][0]["name"] == "organ 0"


def test_questions_about_one_scan_become_a_conversation() -> None:
    rows = list(open_rows("phantoms:slice:0-2", "instructions", "train"))
    joined = join_turns(rows, 4)
    samples = [from_row(row, "instructions") for row in joined]  # each is whole: one image, masks and labels by token
    asked = sorted(turn["content"][-1]["text"] for row in rows for turn in row["messages"] if turn["role"] == "user")
    told = sorted(turn["content"][-1]["text"] for row in joined for turn in row["messages"] if turn["role"] == "user")
    assert asked == told
    assert max(len(sample.messages) for sample in samples) == 8  # type: ignore[union-attr]
    assert len(samples) < len(rows) / 3
    assert join_turns(rows, 4) == joined
    with pytest.raises(CTInstructError, match="turns: 0: give"):
        check_part({"phantoms": {"seeds": [0, 2]}, "turns": 0}, "instructions", TASKS)


def test_choices_are_made_from_labels() -> None:
    """Right answers by the labels, one or any number of them, and no two conversations of a scan are alike."""
    rows = list(open_rows("phantoms:trunk:0-3", "instructions", "train"))
    rows[0]["labels"] = []  # whatever its task, a row without labels is no source
    made = choices_from_labels(rows, conversations=8, turns=4)
    samples = [from_row(row, "instructions") for row in made]
    assert len(samples) == 24
    assert len({repr(sample.messages) for sample in samples}) == 24  # type: ignore[union-attr]
    asked_for, sizes, numbers = set(), set(), set()
    for sample in samples:
        assert sample.task == "multiple_choice"  # type: ignore[union-attr]
        labels = phantom_of(sample.id.split("/")[0]).labels
        turns = sample.messages  # type: ignore[union-attr]
        assert len(turns) == 8
        for asked, told in zip(turns[::2], turns[1::2], strict=True):
            question, answer = text_of(asked), text_of(told)
            wanted, several = int("present" in question), "findings are" in question
            options = dict(re.findall(r"\(([A-D])\) ([^(]+?)(?= \(|$)", question))
            assert list(options) == list("ABCD"[: len(options)])
            assert len(options) == 1 or list(options.values()) == options_of(question)
            weighed, chosen = answer.split(" Answer: ")
            right = [letter for letter, one in options.items() if labels[one] == wanted]
            assert weighed == " ".join(
                f"({letter}) {one}? {('No', 'Yes')[labels[one]]}{f' ({letter})' if letter in right else ''}."
                for letter, one in options.items()
            )
            assert chosen == (", ".join(f"({letter}) {options[letter]}" for letter in right) or "none")
            if not several:
                assert len(right) == 1
                assert chosen_option(answer, list(options.values())) == "ABCD".index(right[0])
            asked_for.add((wanted, several))
            sizes.add(len(options))
            numbers.add(len(right))
    assert asked_for == {(0, False), (0, True), (1, False), (1, True)}
    assert sizes == {1, 2, 3, 4}
    assert numbers == {0, 1, 2, 3, 4}
    assert choices_from_labels(rows, 8, 4) == made
    single = [{**row, "labels": [{"name": "a", "value": 1}, {"name": "b", "value": 0}]} for row in rows[:1]]
    for row in choices_from_labels(single, 8, 4):  # both, there are no others
        assert all("(C)" not in text_of(turn) for turn in row["messages"][::2])
    for row in rows:  # nothing to choose between
        row["labels"] = [{**label, "value": 1} for label in row["labels"]]
    assert choices_from_labels(rows, 5) == []


def test_a_part_of_choices_from_labels() -> None:
    part = {"phantoms": {"kind": "trunk", "seeds": [0, 2]}, "choices_from_labels": 2, "turns": 3, "name": "choices"}
    entry = load_part(part, "instructions")
    assert len(entry.rows) == 4
    with pytest.raises(CTInstructError, match="choices_from_labels: many: give"):
        check_part({**part, "choices_from_labels": "many"}, "instructions", TASKS)
