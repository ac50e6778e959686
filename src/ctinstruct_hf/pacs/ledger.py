"""Which studies `ctinstruct watch` has answered: an SQLite file that survives whatever ends the process."""

from __future__ import annotations

import csv
import fcntl
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from ..errors import CTInstructError
from ..files import whole_file


@dataclass
class Entry:
    """What is known of one study.

    Attributes:
        key: a hash of what identifies it.
        name: of its folder of results.
        state: answering (begun), sending (results are on disk and not stored yet), done, failed or skipped.
        attempts: how often answering has begun.
        error: a sentence; of a study that is done, what went wrong with a part of it.
        source: how the operator finds it: a name in the folder, or its UID where that may be kept.
    """

    key: str
    name: str
    state: str
    attempts: int = 0
    error: str = ""
    source: str = ""


class Ledger:
    """The ledger of an output folder, for one process at a time.

    Raises:
        CTInstructError: where another process has it, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".watch.lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CTInstructError(
                f"Another ctinstruct watch works in {folder}: give each an output of its own."
            ) from error
        except OSError as error:
            raise CTInstructError(f"{folder} cannot be written: {error.strerror or error}.") from error
        try:
            self._base = sqlite3.connect(folder / "watch.sqlite", isolation_level=None, check_same_thread=False)
            self._base.execute("PRAGMA synchronous=FULL")
            self._base.execute(
                "CREATE TABLE IF NOT EXISTS studies (number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT UNIQUE NOT NULL, "
                "state TEXT NOT NULL, attempts INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '', "
                "source TEXT NOT NULL DEFAULT '')"
            )
        except sqlite3.DatabaseError as error:
            raise CTInstructError(f"{folder / 'watch.sqlite'} is no ledger of ctinstruct watch ({error}).") from error

    def close(self) -> None:
        self._base.close()
        self._lock.close()

    def find(self, key: str) -> Entry | None:
        found = self._base.execute(
            "SELECT key, number, state, attempts, error, source FROM studies WHERE key = ?", (key,)
        ).fetchone()
        return None if found is None else _entry(found)

    def begin(self, key: str, source: str = "") -> Entry:
        """Enter a study, or count one more attempt."""
        self._base.execute(
            "INSERT INTO studies (key, state, attempts, source) VALUES (?, 'answering', 1, ?) "
            "ON CONFLICT (key) DO UPDATE SET attempts = attempts + 1",
            (key, source),
        )
        found = self.find(key)
        assert found is not None
        return found

    def move(self, entry: Entry, state: str, error: str = "") -> None:
        """Set a study's state."""
        entry.state, entry.error = state, error
        self._base.execute("UPDATE studies SET state = ?, error = ? WHERE key = ?", (state, error, entry.key))
        if error:
            self.write_failures()

    def entries(self, *states: str) -> list[Entry]:
        """All studies in these states, or in any."""
        rows = self._base.execute("SELECT key, number, state, attempts, error, source FROM studies ORDER BY number")
        return [entry for entry in map(_entry, rows) if not states or entry.state in states]

    def write_failures(self) -> None:
        """`failures.csv`: the folder's name, how to find the study, its state, and what went wrong."""
        with whole_file(self.folder / "failures.csv") as draft, draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["study", "source", "state", "error"])
            writer.writerows((one.name, one.source, one.state, one.error) for one in self.entries() if one.error)


def _entry(row: tuple[str, int, str, int, str, str]) -> Entry:
    key, number, state, attempts, error, source = row
    return Entry(key, f"study-{number:06d}", state, attempts, error, source)


__all__ = ["Entry", "Ledger"]
