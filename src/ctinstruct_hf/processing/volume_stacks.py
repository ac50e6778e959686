"""The images under a SeriesInstanceUID, grouped into the stacks that each make a scan.

Images of different patients, frames of reference, reconstructions, phases or grids are never stacked on each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from .volume import CTInstructError
from .volume_headers import integer, some, text
from .volume_slices import Slice

Group = tuple[str, list[Slice]]  # (label, images)

# a stack with fewer images than this share of the largest stack's is left out and named; with more, a choice is asked for
FEW = 0.25
# a gap of missing slices is bridged up to these steps or mm, whichever is larger
GAP_STEPS, GAP_MM = 6, 15.0
# relative difference of pixel spacings, difference of direction cosines (0.11 degrees)
SAME_SPACING, SAME_DIRECTION = 1e-3, 2e-3
# images that differ in these are never the same scan
HARD_MARKS = ("patient", "frame of reference", "stack", "temporal position", "kernel")
# images that differ in these are several scans where their positions alternate
SOFT_MARKS = ("acquisition", "cardiac phase", "number", "description", "tube voltage", "thickness", "image type")


def stacks_of(
    images: list[Slice], notes: list[str]
) -> tuple[list[tuple[str, list[Slice], list[str]]], list[tuple[str, list[Slice], str]]]:
    """(label, images by position, notes) of each stack, the largest first, and (label, images, reason) of what is left out.

    Raises:
        CTInstructError: where no stack is left.
    """
    groups: list[Group] = [("", _with_position(_without_copies(images, notes), notes))]
    if len(groups[0][1]) == 1:
        return [("", groups[0][1], [])], []
    for mark in ("patient", "frame of reference", "kernel"):
        if len({image.marks[mark] for image in groups[0][1]}) == len(groups[0][1]) > 2:
            notes.append(f"Each image has another {mark}: this is ignored.")
    splits: list[Callable[[list[Slice]], list[Group]]] = [_by_grid, _by_marks, *map(_by_mark, SOFT_MARKS), _by_gap]
    for split in splits:
        groups = [
            (", ".join(part for part in (label, more) if part), part)
            for label, whole in groups
            for more, part in split(whole)
        ]
    groups.sort(key=lambda group: (-len(group[1]), group[0]))
    few = FEW * len(groups[0][1])
    stacks, left_out = [], []
    for label, part in groups:
        if len(part) < few:
            left_out.append((label, part, "are few beside the others"))
            names = some([image.path.name for image in part])
            notes.append(f"Left out of the series ({label}): {names}.")
            continue
        more: list[str] = []
        try:
            stacks.append((label, _without_repeats(part, more), more))
        except CTInstructError as error:
            if not stacks:  # the largest, or all as large
                raise
            left_out.append((label, part, f"cannot be read: {error}"))
            notes.append(f"Left out of the series ({label}): {error}")
    if len(stacks) == 1 and len(groups) == 1 + sum(len(part) < few for _, part in groups):
        stacks = [("", *stacks[0][1:])]
    return stacks, left_out


def _without_copies(images: list[Slice], notes: list[str]) -> list[Slice]:
    """Each image once: the same SOPInstanceUID, frame and position is the same image, wherever it lies."""
    kept: dict[tuple[object, ...], Slice] = {}
    for image in images:
        uid = text(image.header, "SOPInstanceUID") or str(image.path)
        position = None if image.position is None else tuple(image.position)
        kept.setdefault((uid, image.frame, position), image)
    if len(kept) < len(images):
        notes.append(f"{len(images) - len(kept)} images lie there twice (copies) and are read once.")
    return list(kept.values())


def _with_position(images: list[Slice], notes: list[str]) -> list[Slice]:
    """The images that have a position and an orientation; a single image without them is taken as axial at 0."""
    lost = [image for image in images if image.position is None or image.orientation is None]
    if not lost:
        return images
    if len(images) == 1:
        image = images[0]
        what = "position" if image.position is None else ""
        if image.orientation is None:
            what += (" and " if what else "") + "orientation"
            image.orientation = np.eye(3)[:2]
            notes.append(f"{image.path.name} has no {what}: it is taken as axial, left and right may be swapped.")
        else:
            notes.append(f"{image.path.name} has no {what}: it is placed at 0.")
        image.position = np.zeros(3) if image.position is None else image.position
        return images
    what = "position" if any(image.position is None for image in lost) else "orientation"
    if len(lost) == len(images):
        raise CTInstructError(
            f"{lost[0].path.name} and its series have no slice {what}s: they cannot be ordered, give a single image or "
            "another format."
        )
    names = some([image.path.name for image in lost])
    notes.append(f"Left out, without a slice {what}: {names}.")
    return [image for image in images if image.position is not None and image.orientation is not None]


def _by_grid(images: list[Slice]) -> list[Group]:
    """Images of like size, pixel spacing and orientation, with the tolerance of rounded headers."""
    sizes = np.array([(integer(image.header, "Rows"), integer(image.header, "Columns")) for image in images])
    spacings = np.array([image.pixel_spacing or (0.0, 0.0) for image in images])
    planes = np.array([image.orientation.ravel() for image in images])
    left = np.arange(len(images))
    groups: list[Group] = []
    while len(left):
        first = left[0]
        alike = (
            (sizes[left] == sizes[first]).all(axis=1)
            & (np.abs(spacings[left] - spacings[first]) <= SAME_SPACING * spacings[first]).all(axis=1)
            & (np.abs(planes[left] - planes[first]) <= SAME_DIRECTION).all(axis=1)
        )
        rows, columns = sizes[first]
        axis = "xyz"[int(np.abs(np.cross(*images[first].orientation)).argmax())]
        label = f"{columns} x {rows} pixels of {spacings[first][1]:.3g} mm, stacked along {axis}"
        groups.append((label, [images[index] for index in left[alike]]))
        left = left[~alike]
    return groups if len(groups) > 1 else [("", images)]


def _by_marks(images: list[Slice]) -> list[Group]:
    """Images alike in every mark that no scan mixes; a mark that differs in each image is ignored."""
    differ = [mark for mark in HARD_MARKS if 1 < len({image.marks[mark] for image in images}) < len(images)]
    if len(images) == 2:
        differ = [mark for mark in HARD_MARKS if images[0].marks[mark] != images[1].marks[mark]]
    return _grouped(images, differ)


def _by_mark(mark: str) -> Callable[[list[Slice]], list[Group]]:
    """Split by a mark whose values alternate along the normal; stacks behind each other are the same scan."""

    def split(images: list[Slice]) -> list[Group]:
        values = {image.marks[mark] for image in images}
        if not 1 < len(values) < len(images):
            return [("", images)]
        normal = np.cross(*images[0].orientation)
        ordered = sorted(images, key=lambda image: (image.along(normal), image.marks[mark]))
        changes = sum(image.marks[mark] != after.marks[mark] for image, after in itertools.pairwise(ordered))
        groups = _grouped(images, [mark])
        shared = _repeats(images)
        mixed = changes >= 2 * len(values) or (
            shared > sum(_repeats(part) for _, part in groups) and all(len(part) > 1 for _, part in groups)
        )
        return groups if mixed else [("", images)]

    return split


def _grouped(images: list[Slice], marks: list[str]) -> list[Group]:
    if not marks:
        return [("", images)]
    groups: dict[tuple[str, ...], list[Slice]] = {}
    for image in images:
        groups.setdefault(tuple(image.marks[mark] for mark in marks), []).append(image)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    numbered = {  # a patient or a UID is counted, not named
        mark: {value: str(number) for number, value in enumerate(dict.fromkeys(key[k] for key, _ in ordered), 1)}
        for k, mark in enumerate(marks)
        if mark in ("patient", "frame of reference")
    }

    def label(key: tuple[str, ...]) -> str:
        shown = (numbered.get(mark, {}).get(value, value) or "unknown" for mark, value in zip(marks, key, strict=True))
        return ", ".join(f"{mark} {value}" for mark, value in zip(marks, shown, strict=True))

    return [(label(key), part) for key, part in ordered]


def _by_gap(images: list[Slice]) -> list[Group]:
    """Images that lie behind each other without a gap that no missing slice explains."""
    groups: list[Group] = []
    for beside, part in _by_axis(images):
        normal = np.cross(*part[0].orientation)
        part = sorted(part, key=lambda image: image.along(normal))
        distances = np.array([image.along(normal) for image in part])
        steps = np.diff(distances)
        apart = steps[steps > 1e-3]
        usual = float(np.sort(apart)[(len(apart) - 1) // 2]) if len(apart) else 0.0  # the lower median
        ends = [0, *(np.flatnonzero(steps > max(GAP_STEPS * usual, GAP_MM)) + 1).tolist(), len(part)]
        for start, end in itertools.pairwise(ends):
            reach = f"{distances[start]:.0f} to {distances[end - 1]:.0f} mm along the stack"
            groups.append((", ".join(filter(None, (beside, reach if len(ends) > 2 else ""))), part[start:end]))
    return groups


def _by_axis(images: list[Slice]) -> Iterator[Group]:
    """Images on a straight line, upright or tilted, and those more than half a field of view beside it."""
    first = images[0]
    normal = np.cross(*first.orientation)
    ordered = sorted(images, key=lambda image: image.along(normal))
    positions = np.array([image.position for image in ordered])
    distances, drift = positions @ normal, (positions - first.position) @ first.orientation.T  # [n], [n, 2]
    steps = np.diff(distances)
    wide = steps > 1e-3
    slope = np.median(np.diff(drift, axis=0)[wide] / steps[wide, None], axis=0) if wide.any() else np.zeros(2)
    rest = drift - distances[:, None] * slope
    rest -= np.median(rest, axis=0)
    rows, columns = integer(first.header, "Rows"), integer(first.header, "Columns")
    spacing = first.pixel_spacing or (1.0, 1.0)
    stray = (np.abs(rest) > 0.5 * np.array([columns * spacing[1], rows * spacing[0]])).any(axis=1)
    if stray.any() and not stray.all():
        yield "beside the others", [image for image, is_stray in zip(ordered, stray, strict=True) if is_stray]
    yield "", [image for image, is_stray in zip(ordered, stray, strict=True) if not is_stray or stray.all()]


def _repeats(images: list[Slice]) -> int:
    """How many images share a position with the image before them."""
    normal = np.cross(*images[0].orientation)
    return len(_repeated(np.sort([image.along(normal) for image in images])))


def _repeated(distances: np.ndarray) -> np.ndarray:
    """Indices of slices at the position of the slice before: closer than a tenth of the usual step."""
    steps = np.diff(distances)
    apart = steps[steps > 1e-3]
    usual = float(np.quantile(apart, 0.75)) if len(apart) else 0.0
    repeated: list[int] = []
    last = 0
    for index in range(1, len(distances)):
        if distances[index] - distances[last] < max(1e-3, 0.1 * usual):
            repeated.append(index)
        else:
            last = index
    return np.array(repeated, dtype=int)


def _without_repeats(images: list[Slice], notes: list[str]) -> list[Slice]:
    """The images by position, each position once. Raises CTInstructError where many positions hold several images."""
    normal = np.cross(*images[0].orientation)
    images = sorted(images, key=lambda image: image.along(normal))
    distances = np.array([image.along(normal) for image in images])
    name = images[0].path.name
    repeated = _repeated(distances)
    positions = len(images) - len(repeated)
    if len(repeated):
        if positions == 1 or len(repeated) > FEW * positions:
            raise CTInstructError(
                f"The series of {name} has {len(repeated) + positions} images at {positions} positions (4D, or several "
                "reconstructions) and nothing in their headers tells them apart: give the files of one scan."
            )
        notes.append(f"{len(repeated)} repeated slices are left out, the first at each position is kept.")
        images = [image for index, image in enumerate(images) if index not in set(repeated.tolist())]
        distances = np.delete(distances, repeated)
    combs = [np.diff(distances[start::2]) for start in (0, 1)]
    if len(images) >= 8 and not _even(np.diff(distances)) and _even(np.concatenate(combs)):
        raise CTInstructError(
            f"The series of {name} holds two sets of images between each other, and nothing in their headers tells them "
            "apart: give the files of one scan."
        )
    acquisitions = len({image.marks["acquisition"] for image in images})
    if 1 < acquisitions < len(images):
        notes.append(f"The series is put together of {acquisitions} acquisitions, one behind the other.")
    cosines = np.array([image.orientation.ravel() for image in images])
    turn = float(np.abs(cosines - cosines[0]).max())
    if turn * max(integer(images[0].header, "Rows"), integer(images[0].header, "Columns")) > 0.5:
        notes.append(f"Orientations of slices differ by {np.degrees(turn):.2f} degrees: the first is used for all.")
    return images


def _even(steps: np.ndarray) -> bool:
    return bool((np.abs(steps - np.median(steps)) <= max(0.02, 0.02 * float(np.median(steps)))).all())
