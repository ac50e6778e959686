"""A prepared data set to the Hub and back: rows only, by `datasets.push_to_hub`; scans and label files stay where they are.

Paths in the rows become relative to a folder that whoever fetches the rows has too; patients get numbers that cannot be
traced back.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CTInstructError
from .prepared import describe, load_rows, write_rows
from .reading import is_phantom
from .samples import KINDS, SPLITS, features


def shareable_rows(folder: Path, root: Path | None) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """{kind: {split: rows}} as they would go: relative paths, patients by number.

    Args:
        folder: a prepared data set.
        root: the folder that the paths are made relative to; needed unless all scans are made up.

    Raises:
        CTInstructError: for a path outside of `root`.
    """
    if not (folder / "dataset.json").exists():
        raise CTInstructError(f"{folder} is no prepared data set: make it with ctinstruct data prepare or import.")
    salt = secrets.token_bytes(16)  # kept nowhere
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for kind in KINDS:
        for split in SPLITS:
            if list((folder / kind).glob(f"{split}-*.parquet")):
                rows = load_rows(folder, kind, split)
                found.setdefault(kind, {})[split] = [_shared(row, root, salt) for row in rows]
    if not found:
        raise CTInstructError(f"{folder} has no rows.")
    return found


def _shared(row: dict[str, Any], root: Path | None, salt: bytes) -> dict[str, Any]:
    for one in _files_of(row):
        one["path"] = _relative(one["path"], root, row["id"])
    if row.get("patient"):
        row["patient"] = hashlib.sha256(salt + str(row["patient"]).encode()).hexdigest()[:12]
    return row


def _files_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a row of either kind that name a file."""
    return [*(row["images"] if "images" in row else [row["image"]]), *row["masks"]]


def _relative(path: str, root: Path | None, sample: str) -> str:
    if not path or is_phantom(path):
        return path
    if root is None:
        raise CTInstructError(f"Sample '{sample}' names a file of this machine: give the folder of the data (--root).")
    try:
        return Path(path).resolve().relative_to(root.resolve()).as_posix()
    except ValueError as error:
        raise CTInstructError(f"Sample '{sample}' names {path}, which is not in {root}.") from error


def dataset_card(repository: str, rows: dict[str, dict[str, list[dict[str, Any]]]], source: str, license: str) -> str:
    """README.md of the data set, without the metadata that `push_to_hub` writes."""
    sources = sorted({str(row["source"]) for splits in rows.values() for part in splits.values() for row in part})
    lines = [f"# {repository.rpartition('/')[2]}", "", f"Rows for CTInstruct on {', '.join(sources)}. Research use only, never a diagnosis.", ""]  # fmt: skip
    lines += ["| kind | split | rows |", "|---|---|---|"]
    lines += [f"| {kind} | {split} | {len(part)} |" for kind, splits in rows.items() for split, part in splits.items()]
    lines += [
        "",
        "The rows name scans and label files by paths relative to the data's own folder; the files are not here: get them "
        f"from where {source} publishes them, under its terms. Patients are numbered anew.",
        "",
        "```",
        f"ctinstruct data fetch {repository} --root folder_of_the_scans -o data/{repository.rpartition('/')[2]}",
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
    tell: Callable[[str], None] = lambda step: None,
) -> dict[str, dict[str, int]]:
    """Send the rows of a prepared data set to the Hub.

    Args:
        folder: made by `ctinstruct data prepare` or `import`.
        repository: "user/name".
        root: see `shareable_rows`.
        private: who may see a new repository.
        license: of the rows.
        dry_run: send nothing.
        tell: called with the name of each step.

    Returns:
        {kind: {split: rows}}.

    Raises:
        CTInstructError: for paths outside of `root`, a bad name, and where the Hub refuses.
    """
    from datasets import Dataset, DatasetDict
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from ..hub.publish import check_repository, refusal

    check_repository(repository)
    rows = shareable_rows(folder, root)
    counts = {kind: {split: len(part) for split, part in splits.items()} for kind, splits in rows.items()}
    if dry_run:
        return counts
    source = json.loads((folder / "dataset.json").read_text(encoding="utf-8")).get("source", "the data set")
    try:
        for kind, splits in rows.items():
            tell(f"sending {kind}")
            tables = {split: Dataset.from_list(part, features=features(kind)) for split, part in splits.items()}
            DatasetDict(tables).push_to_hub(repository, config_name=kind, private=private)
        tell("sending the card")
        api = HfApi()
        head = Path(api.hf_hub_download(repository, "README.md", repo_type="dataset")).read_text(encoding="utf-8")
        card = _with_license(head, license) + dataset_card(repository, rows, source, license)
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


def fetch(repository: str, folder: Path, root: Path | None = None) -> dict[str, dict[str, int]]:
    """The rows of a data set on the Hub as a prepared one, with the paths of this machine.

    Args:
        repository: "user/name", sent by `share`.
        folder: where; must not hold a data set yet.
        root: the folder of the scans here.

    Returns:
        {kind: {split: rows}}.

    Raises:
        CTInstructError: where it is not there, or a path leads out of `root`.
    """
    from datasets import get_dataset_config_names, load_dataset

    from ..hub.publish import check_repository

    check_repository(repository)
    if (folder / "dataset.json").exists():
        raise CTInstructError(f"{folder} holds a data set already: name another folder.")
    try:
        loaded = {
            kind: load_dataset(repository, kind) for kind in get_dataset_config_names(repository) if kind in KINDS
        }
    except Exception as error:  # datasets raises many kinds
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CTInstructError(f"{repository} cannot be fetched: {first}") from error
    if not loaded:
        raise CTInstructError(f"{repository} has no rows for CTInstruct.")
    counts: dict[str, dict[str, int]] = {}
    for kind, splits in loaded.items():
        rows = [row for split in splits.values() for row in split]
        for row in rows:
            for one in _files_of(row):
                one["path"] = _absolute(one["path"], root, repository)
        write_rows(folder, kind, rows)
        counts[kind] = {name: len(split) for name, split in splits.items()}
    describe(folder, {"source": repository, "rows": counts})
    return counts


def _absolute(path: str, root: Path | None, repository: str) -> str:
    if not path or is_phantom(path):
        return path
    inside = PurePosixPath(path)
    if inside.is_absolute() or ".." in inside.parts:
        raise CTInstructError(f"{repository} names {path}, which leads out of the data's folder.")
    if root is None:
        raise CTInstructError(f"{repository} names files such as {path}: give the folder of the scans (--root).")
    return str(root.resolve() / inside)


__all__ = ["fetch", "share", "shareable_rows"]
