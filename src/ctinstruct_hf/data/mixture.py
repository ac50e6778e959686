"""Several data sets as one stream of batches: each of one task, drawn by weight, the same task on every process.

The schedule depends on the seed and the step alone, so a resumed run sees what an undisturbed one would have seen. Rows
are light; voxels are read by the collator, so that skipping to a step costs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from ..errors import CTInstructError

SHUFFLE_BUFFER = 1000  # rows of a streamed part


@dataclass
class MixtureEntry:
    """One part of a mixture.

    Attributes:
        name: for messages and logs.
        rows: a sequence of rows (a list, a `datasets.Dataset`), or a streamed `datasets.IterableDataset`.
        tasks: what a batch of it trains: stage one `contrastive`, `category`, `segmentation` or several at once; stage
            two a task of `samples.TASKS`.
        weight: how often it is drawn, relative to the others.
        batch_size: samples a batch of it; the mixture's own by default. Slices come in larger batches than volumes.
        lengths: of the rows' texts; batches are then made of rows of like length, which saves padding.
        groups: a number for each row; batches are then made of rows of one number, as far as they are full.
    """

    name: str
    rows: Any
    tasks: tuple[str, ...]
    weight: float = 1.0
    batch_size: int | None = None
    lengths: Sequence[int] | None = None
    groups: Sequence[int] | None = None


@dataclass
class Item:
    """A row on its way to the collator.

    Attributes:
        tasks: what its batch trains.
        draw: its number in the schedule, which seeds whatever is drawn for it.
        part: the name of its part.
        rows: of its part, where they are stored: one of them stands in where this one cannot be read.
    """

    row: dict[str, Any]
    tasks: tuple[str, ...]
    draw: int
    part: str = ""
    rows: Any = None

    def stand_ins(self, seed: int, most: int = 100) -> Iterator[Item]:
        """Rows of the same part and task in an order of chance, the same in a resumed run."""
        rng = np.random.default_rng([seed, 113, self.draw])
        for _ in range(most if self.rows is not None else 0):
            row = self.rows[int(rng.integers(len(self.rows)))]
            if row.get("task") == self.row.get("task") and row.get("id") != self.row.get("id"):
                yield replace(self, row=row)


def first_rows(entries: Sequence[MixtureEntry], most: int) -> Iterator[dict[str, Any]]:
    """Up to so many rows of each part, from its beginning: what is learned of a mixture's words without reading it all."""
    for entry in entries:
        yield from itertools.islice(iter(entry.rows), most)


def skips_allowed(most: float, entries: Sequence[MixtureEntry]) -> int:
    """How many samples may be passed over: a number, or a share below 1 of all rows of the parts.

    Raises:
        CTInstructError: for a negative number, and for a share of streamed parts.
    """
    if most < 0 or (most >= 1 and most != int(most)):
        raise CTInstructError(f"max_skipped is {most}: give a number of samples, or a share below 1.")
    if most >= 1 or most == 0:
        return int(most)
    if not all(hasattr(entry.rows, "__len__") for entry in entries):
        raise CTInstructError(f"max_skipped is the share {most} of streamed parts: give a number of samples.")
    return int(most * sum(len(entry.rows) for entry in entries))


def _shares(entries: Sequence[MixtureEntry]) -> np.ndarray:
    weights = np.array([entry.weight for entry in entries], dtype=float)
    if not len(entries) or (weights < 0).any() or not weights.sum() > 0:
        raise CTInstructError("The mixture has no part with a positive weight.")
    return weights / weights.sum()


def entry_of_step(shares: np.ndarray, seed: int, step: int) -> int:
    """Which part is drawn at a step; the same on every process."""
    return int(np.random.default_rng([seed, 101, step]).choice(len(shares), p=shares))


class Mixture(Dataset):
    """Rows of several parts, addressed by (part, row, draw)."""

    def __init__(self, entries: Sequence[MixtureEntry]) -> None:
        self.entries = list(entries)
        _shares(self.entries)
        for entry in self.entries:
            if entry.weight > 0 and not len(entry.rows):
                raise CTInstructError(f"'{entry.name}' has no rows to train on.")

    def __len__(self) -> int:
        return sum(len(entry.rows) for entry in self.entries)

    def __getitem__(self, place: tuple[int, int, int]) -> Item:
        part, row, draw = place
        entry = self.entries[part]
        return Item(entry.rows[row], entry.tasks, draw, entry.name, entry.rows)


class MixtureBatches(Sampler[list[tuple[int, int, int]]]):
    """The schedule: `count` batches of places in a `Mixture` for one of several processes.

    Batches are numbered over all processes, which take them in turn; those of one step share their part.

    Args:
        mixture: the parts.
        batch_size: samples a batch.
        count: batches of this process.
        seed: of the draws.
        rank, world_size: this process among all.
    """

    def __init__(
        self, mixture: Mixture, batch_size: int, count: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.mixture, self.batch_size, self.count = mixture, batch_size, count
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.shares = _shares(mixture.entries)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        taken = [0] * len(self.shares)
        drawn = 0
        orders: dict[tuple[int, int], np.ndarray] = {}
        part = 0
        for number in range(self.count * self.world_size):
            if number % self.world_size == 0:
                part = entry_of_step(self.shares, self.seed, number // self.world_size)
            length = len(self.mixture.entries[part].rows)
            batch = []
            for _ in range(self.mixture.entries[part].batch_size or self.batch_size):
                epoch, place = divmod(taken[part], length)
                if (part, epoch) not in orders:
                    orders = {key: order for key, order in orders.items() if key[0] != part}
                    orders[part, epoch] = self._order(part, epoch)
                batch.append((part, int(orders[part, epoch][place]), drawn))
                taken[part] += 1
                drawn += 1
            if number % self.world_size == self.rank:
                yield batch

    def _order(self, part: int, epoch: int) -> np.ndarray:
        """The rows of a part in the order of an epoch: at random, in batches of one group, and of like length, where these are known."""
        entry = self.mixture.entries[part]
        rng = np.random.default_rng([self.seed, 103, part, epoch])
        order = rng.permutation(len(entry.rows))
        if entry.lengths is None and len(set(entry.groups or ())) < 2:
            return order
        size = entry.batch_size or self.batch_size
        lengths = np.zeros(len(order)) if entry.lengths is None else np.asarray(entry.lengths)
        groups = np.zeros(len(order)) if entry.groups is None else np.asarray(entry.groups)
        batches: list[np.ndarray] = []
        for group in np.unique(groups):
            members = order[groups[order] == group]
            for first in range(0, len(members), size * 50):  # sorted within some batches, which keeps it random
                block = members[first : first + size * 50]
                block = block[np.argsort(lengths[block], kind="stable")]
                batches += [block[start : start + size] for start in range(0, len(block), size)]
        whole, rest = [one for one in batches if len(one) == size], [one for one in batches if len(one) < size]
        places = rng.permutation(len(whole))
        return np.concatenate([*(whole[place] for place in places), *rest])


class StreamedMixture(IterableDataset):
    """The same over `datasets` that are streamed: yields whole batches, lists of `Item`.

    Each worker of each process reads its own share of every part, by `split_dataset_by_node`: whole files where they can be dealt
    out evenly, else each its own rows. All agree on the part of a step.

    Args:
        entries: parts whose rows are `datasets.IterableDataset`s.
        batch_size: samples a batch.
        seed: of the draws.
        rank, world_size: this process among all.
        start: the first step, after a resume: earlier rows are passed over without being read.
        buffer: rows in the shuffle buffer of each part in each reader; 0 keeps the stored order.
    """

    def __init__(
        self,
        entries: Sequence[MixtureEntry],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        buffer: int = SHUFFLE_BUFFER,
    ) -> None:
        self.entries, self.batch_size, self.seed = list(entries), batch_size, seed
        self.rank, self.world_size, self.start, self.buffer = rank, world_size, start, buffer
        self.shares = _shares(self.entries)

    def _rows(self, part: int, reader: int, readers: int) -> Iterator[dict[str, Any]]:
        from datasets.distributed import split_dataset_by_node

        epoch = 0
        while True:
            rows = self.entries[part].rows
            if self.buffer:
                rows = rows.shuffle(seed=self.seed + epoch, buffer_size=self.buffer)
            rows = split_dataset_by_node(rows, reader, readers)
            seen = False
            for block in rows.iter(batch_size=64):  # unlike iteration, the same in every worker
                for values in zip(*block.values(), strict=True):
                    seen = True
                    yield dict(zip(block, values, strict=True))
            if not seen:
                raise CTInstructError(f"'{self.entries[part].name}' has too few rows for {readers} readers.")
            epoch += 1

    def __iter__(self) -> Iterator[list[Item]]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        number = (number + self.start) % workers  # batches are taken from worker 0 first, whatever the start
        reader, readers = self.rank * workers + number, self.world_size * workers
        streams = [self._rows(part, reader, readers) for part in range(len(self.entries))]
        step = number
        while True:
            part = entry_of_step(self.shares, self.seed, step)
            entry = self.entries[part]
            rows = [next(streams[part]) for _ in range(entry.batch_size or self.batch_size)]
            if step >= self.start:
                first = (step * self.world_size + self.rank) * 10_000
                yield [Item(row, entry.tasks, first + offset, entry.name) for offset, row in enumerate(rows)]
            step += workers


def generator_of(seed: int, draw: int) -> np.random.Generator:
    """The random numbers of one item, the same in every process, worker and resumed run."""
    return np.random.default_rng([seed, 107, draw])
