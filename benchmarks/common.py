"""What every benchmark shares: alternating runs in one process, a table of ratios, the machine in the header."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass
class Pair:
    """One comparison: seconds of both sides, run in turn."""

    name: str
    ours: list[float]
    theirs: list[float]
    least: float | None = None  # the ratio that the docs state

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def missed(self) -> bool:
        return self.least is not None and statistics.median(self.ratios) < self.least


def arguments(description: str | None, runs: int = 5, **more: str) -> argparse.Namespace:
    """`--quick`, `--check`, `--runs`, `--json`, and further options with their defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a smoke run with small inputs; its numbers mean nothing")
    parser.add_argument("--check", action="store_true", help="exit 1 where a ratio that the docs state is missed")
    parser.add_argument("--runs", type=int, default=runs)
    parser.add_argument("--json", type=Path, help="also write the figures here, as scripts/write_numbers.py reads them")
    for name, default in more.items():
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_args()


def alternate(
    name: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    runs: int,
    least: float | None = None,
    warm: bool = False,
) -> Pair:
    """Both sides in turn, after one run of each that does not count, unless they are `warm` already."""
    if not warm:
        ours()
        theirs()
    pair = Pair(name, [], [], least)
    for _ in range(runs):
        for side, kept in ((ours, pair.ours), (theirs, pair.theirs)):
            start = time.perf_counter()
            side()
            kept.append(time.perf_counter() - start)
    return pair


def header(*packages: str) -> str:
    """The machine and the versions."""
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} absent")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.system()} {platform.machine()}, {cores} cores, Python {platform.python_version()}, " + ", ".join(
        versions
    )


def table(pairs: list[Pair]) -> str:
    """Seconds of both sides and the ratio per pair of runs: median, least, most."""
    lines = [f"{'':44s} {'ours s':>9s} {'theirs s':>9s} {'ratio':>7s} {'min':>6s} {'max':>6s}"]
    for pair in pairs:
        stated = "" if pair.least is None else f"   stated: at least {pair.least:g}{'  MISSED' if pair.missed else ''}"
        lines.append(
            f"{pair.name:44s} {statistics.median(pair.ours):9.3f} {statistics.median(pair.theirs):9.3f} "
            f"{statistics.median(pair.ratios):7.2f} {min(pair.ratios):6.2f} {max(pair.ratios):6.2f}{stated}"
        )
    return "\n".join(lines)


def ratio(pair: Pair) -> str:
    """ "2.27 (1.93 … 2.38)": the median, least and most of theirs / ours."""
    if len(pair.ratios) == 1:
        return f"{pair.ratios[0]:.2f}, one pair of runs"
    return f"{statistics.median(pair.ratios):.2f} ({min(pair.ratios):.2f} … {max(pair.ratios):.2f})"


def write_figures(options: argparse.Namespace, **figures: str) -> None:
    """The figures by name, where `--json` asks for them."""
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class PeakMemory:
    """The most memory of this process above what it had at the start, sampled every few milliseconds."""

    def __init__(self, interval: float = 0.005) -> None:
        self.interval = interval
        self.most = 0

    @staticmethod
    def now() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def __enter__(self) -> PeakMemory:
        self.start = self.now()
        self.stop = threading.Event()

        def watch() -> None:
            while not self.stop.wait(self.interval):
                self.most = max(self.most, self.now() - self.start)

        self.thread = threading.Thread(target=watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.most = max(self.most, self.now() - self.start)
        self.stop.set()
        self.thread.join()
