"""A prepared data set to the Hub and back: rows only, by `datasets.push_to_hub`; scans and label files stay where they are.

Ids, patients and paths are replaced by numbers in an order of chance. What the numbers stand for is kept in a file of the
prepared data set, which is never sent; whoever has the scans and is given that file gets the rows with their paths.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import CTInstructError, check_repository, first_line, refusal
from ..files import write_whole
from ..processing.volume_files import inside
from .cases import META, SPLITS
from .prepared import describe, load_rows, named_files, write_rows
from .samples import KINDS, features

MAPPING = "published.json"  # {ids, patients, paths: {what it was: what was sent}}
Rows = dict[str, dict[str, list[dict[str, Any]]]]
Mapping = dict[str, dict[str, str]]
_PREFIXES = {"ids": "row", "patients": "patient", "paths": "file"}
# endings that a reader chooses by; nothing else of a name is kept
_ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr", ".npy", ".npz", ".zip", ".dcm", ".png", ".jpg", ".jpeg", ".bmp",
            ".tif", ".tiff")  # fmt: skip


def shareable_rows(folder: Path, root: Path | None) -> tuple[Rows, Mapping]:
    """Rows {kind: {split: rows}} as they would go, and what their numbers stand for.

    Numbers given by an earlier call, found in `published.json` of the folder, are kept.

    Args:
        folder: a prepared data set.
        root: the folder that holds all files.

    Raises:
        CTInstructError: for a path outside of `root`, and where a text holds a patient's name.
    """
    if not (folder / "dataset.json").exists():
        raise CTInstructError(f"{folder} is no prepared data set: make it with ctinstruct data prepare or import.")
    found: Rows = {}
    for kind in KINDS:
        for split in SPLITS:
            if list((folder / kind).glob(f"{split}-*.parquet")):
                found.setdefault(kind, {})[split] = list(load_rows(folder, kind, split))
    if not found:
        raise CTInstructError(f"{folder} has no rows.")
    rows = [row for splits in found.values() for part in splits.values() for row in part]
    for number, row in enumerate(rows):
        if _names_its_patient(row):
            raise CTInstructError(
                f"Row {number + 1} of {folder} holds its patient's name in a text: remove it from the text before rows go."
            )
        for file in named_files(row):
            file["path"] = _relative(file["path"], root, number + 1)
    mapping = read_mapping(folder / MAPPING) if (folder / MAPPING).exists() else {part: {} for part in _PREFIXES}
    _number(mapping["ids"], (row["id"] for row in rows), "ids")
    _number(mapping["patients"], (row["patient"] for row in rows if row.get("patient")), "patients")
    _number(mapping["paths"], (file["path"] for row in rows for file in named_files(row)), "paths")
    for row in rows:
        row["id"] = mapping["ids"][row["id"]]
        row["patient"] = mapping["patients"].get(row.get("patient") or "", "")
        for file in named_files(row):
            file["path"] = mapping["paths"].get(file["path"], file["path"])
        if isinstance(row.get("meta"), dict):
            row["meta"] = {name: value for name, value in row["meta"].items() if name in META}
    for splits in found.values():
        for part in splits.values():
            part.sort(key=lambda row: str(row["id"]))  # the order of the data set may follow names
    return found, mapping


def _number(known: dict[str, str], values: Iterable[str], part: str) -> None:
    """Give each value that has none yet the next number, in an order of chance."""
    new = sorted({value for value in values if value} - set(known))
    secrets.SystemRandom().shuffle(new)
    for value in new:
        ending = next((one for one in _ENDINGS if value.lower().endswith(one)), "") if part == "paths" else ""
        known[value] = f"{_PREFIXES[part]}-{len(known) + 1:06d}{ending}"


def read_mapping(path: Path) -> Mapping:
    """What `share` wrote beside the rows.

    Raises:
        CTInstructError: where it is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CTInstructError(f"{path} cannot be read as JSON: {first_line(error)}.") from error
    sound = isinstance(found, dict) and all(
        isinstance(found.get(part), dict) and all(isinstance(value, str) for value in found[part].values())
        for part in _PREFIXES
    )
    if not sound:
        raise CTInstructError(f"{path} is no {MAPPING} of ctinstruct data publish.")
    return {part: found[part] for part in _PREFIXES}


def _texts_of(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _texts_of(value)


def _names_its_patient(row: dict[str, Any]) -> bool:
    """Whether a text has the patient's name or number, whole or all its words."""
    patient = str(row.get("patient") or "")
    words = [word.lower() for word in re.findall(r"\w+", patient.replace("_", " "))]
    if len(patient) < 4:
        return False
    fields = [row.get(part) for part in ("messages", "texts", "labels", "meta")]
    named = any(len(word) > 2 and not word.isdigit() for word in words)
    for text in _texts_of(fields):
        if re.search(rf"(?<!\w){re.escape(patient)}(?!\w)", text, re.IGNORECASE):
            return True
        if named and len(words) > 1 and set(words) <= set(re.findall(r"\w+", text.lower())):
            return True
    return False


def _relative(path: str, root: Path | None, number: int) -> str:
    if not path:
        return path
    if root is None:
        raise CTInstructError(f"Row {number} names a file of this machine: give the folder of the data (--root).")
    try:
        return Path(path).resolve().relative_to(root.resolve()).as_posix()
    except ValueError as error:
        raise CTInstructError(f"Row {number} names {path}, which is not in {root}.") from error


def dataset_card(repository: str, rows: Rows, license: str) -> str:
    """README.md of the data set, without the metadata that `push_to_hub` writes."""
    sources = sorted({str(row["source"]) for splits in rows.values() for part in splits.values() for row in part})
    lines = [f"# {repository.rpartition('/')[2]}", "", f"Rows for CTInstruct on {', '.join(sources)}. Research use only, never a diagnosis.", ""]  # fmt: skip
    lines += ["| kind | split | rows |", "|---|---|---|"]
    lines += [f"| {kind} | {split} | {len(part)} |" for kind, splits in rows.items() for split, part in splits.items()]
    lines += [
        "",
        "Scans and label files are not here: get them from where they are published, under their terms. Rows, patients and "
        f"files are numbered by chance; who sent the rows has `{MAPPING}`, which gives the files their names back.",
        "",
        "```",
        f"ctinstruct data fetch {repository} --root folder_of_the_scans --mapping {MAPPING} -o data/{repository.rpartition('/')[2]}",
        "```",
        "",
        f"Licence of the rows: {license}.",
        "",
    ]
    return "\n".join(lines)


def share(
    folder: Path,
    repository: str,
    root: Path | None = None,
    *,
    private: bool = True,
    license: str = "other",
    dry_run: bool = False,
    progress: Callable[[str], None] = lambda step: None,
) -> dict[str, dict[str, int]]:
    """Send the rows of a prepared data set to the Hub; what their numbers stand for stays in `published.json` of the folder.

    Args:
        folder: made by `ctinstruct data prepare` or `import`.
        repository: "user/name".
        root: see `shareable_rows`.
        private: who may see a new repository.
        license: of the rows.
        dry_run: send nothing.
        progress: called with the name of each step.

    Returns:
        {kind: {split: rows}}.

    Raises:
        CTInstructError: for paths outside of `root`, a bad name, and where the Hub refuses.
    """
    from datasets import Dataset, DatasetDict
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    check_repository(repository)
    rows, mapping = shareable_rows(folder, root)
    counts = {kind: {split: len(part) for split, part in splits.items()} for kind, splits in rows.items()}
    if dry_run:
        return counts
    write_whole(folder / MAPPING, json.dumps(mapping, indent=1, ensure_ascii=False))
    os.chmod(folder / MAPPING, 0o600)
    try:
        for kind, splits in rows.items():
            progress(f"sending {kind}")
            tables = {split: Dataset.from_list(part, features=features(kind)) for split, part in splits.items()}
            DatasetDict(tables).push_to_hub(repository, config_name=kind, private=private)
        progress("sending the card")
        api = HfApi()
        head = Path(api.hf_hub_download(repository, "README.md", repo_type="dataset")).read_text(encoding="utf-8")
        card = _with_license(head, license) + dataset_card(repository, rows, license)
        api.upload_file(
            path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repository, repo_type="dataset"
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise refusal(repository, error) from error
    return counts


def _with_license(card: str, license: str) -> str:
    """The metadata between the dashes of a card, with the licence and tags in it."""
    import yaml

    meta = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
    meta |= {"license": license, "tags": ["medical", "ct", "ctinstruct"]}
    return f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)}---\n\n"


def fetch(
    repository: str, folder: Path, root: Path | None = None, mapping: Path | None = None
) -> dict[str, dict[str, int]]:
    """The rows of a data set on the Hub as a prepared one, with the paths of this machine.

    Args:
        repository: "user/name", sent by `share`.
        folder: where; must not hold a data set yet.
        root: the folder of the scans here.
        mapping: `published.json` of who sent the rows, which gives the files their names; without it they are expected
            under their numbers.

    Returns:
        {kind: {split: rows}}.

    Raises:
        CTInstructError: where it is not there, or a path leads out of `root`.
    """
    from datasets import get_dataset_config_names, load_dataset

    check_repository(repository)
    if (folder / "dataset.json").exists():
        raise CTInstructError(f"{folder} holds a data set already: name another folder.")
    names = {} if mapping is None else {new: old for old, new in read_mapping(mapping)["paths"].items()}
    try:
        loaded = {
            kind: load_dataset(repository, kind) for kind in get_dataset_config_names(repository) if kind in KINDS
        }
    except Exception as error:  # datasets raises many kinds
        raise CTInstructError(f"{repository} cannot be fetched: {first_line(error)}.") from error
    if not loaded:
        raise CTInstructError(f"{repository} has no rows for CTInstruct.")
    counts: dict[str, dict[str, int]] = {}
    for kind, splits in loaded.items():
        rows = [row for split in splits.values() for row in split]
        for row in rows:
            for one in named_files(row):
                one["path"] = _absolute(names.get(one["path"], one["path"]), root, repository)
        write_rows(folder, kind, rows)
        counts[kind] = {name: len(split) for name, split in splits.items()}
    describe(folder, {"source": repository, "rows": counts})
    return counts


def _absolute(path: str, root: Path | None, repository: str) -> str:
    if not path:
        return path
    if root is None:
        raise CTInstructError(f"{repository} names files such as {path}: give the folder of the scans (--root).")
    return str(inside(root.resolve(), path, repository))


__all__ = ["MAPPING", "fetch", "read_mapping", "share", "shareable_rows"]
