"""Growth: time and memory of the tower with one mask by patches and by studies, and of studies one after the other.

    python benchmarks/scale.py [--quick] [--check] [--runs 3] [--preset paper] [--side 128] [--picture docs/scale.png]

Every size runs in a process of its own, so that nothing an earlier one left behind counts. Time is the least of the runs.
Memory is the peak above what the process had with its weights and pixels; "working" is that less what is given back (five
feature maps, tokens, masks). The exponent is the slope of log time over log patches. "One after the other" opens, asks and
masks made-up scans with the bundled model in one process; memory is what the process has after each.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from common import PeakMemory, arguments, header

PATCHES = (1, 3, 8, 24)
STUDIES = (1, 4, 16)
EXPONENT = 1.1  # of time over patches and over studies, at most
WORKING = 1.5  # working memory of the largest size over that of the smallest, at most
LEFT = 1.05  # memory after the last study over that after the second, at most


def measure(preset: str, side: int, patches: int, studies: int, runs: int) -> dict[str, float]:
    """Seconds and bytes of one size, in this process."""
    import torch

    from ctinstruct_hf import CTInstructConfig, CTInstructSegmentationDecoder, CTInstructVisionModel
    from ctinstruct_hf.modeling.inference_ctinstruct import optimize_for_inference

    torch.manual_seed(0)
    config = CTInstructConfig.preset(preset)  # type: ignore[arg-type]
    depth = 32
    tower = optimize_for_inference(CTInstructVisionModel(config.vision_config).eval())
    decoder = optimize_for_inference(CTInstructSegmentationDecoder(config.segmentation_config).eval())
    query = torch.randn(1, config.segmentation_config.hidden_size)

    @torch.inference_mode()
    def once(pixels: torch.Tensor, grid: tuple[int, int, int, int], count: int) -> int:
        features = tower(pixels, [grid] * count)
        masks = decoder([query] * count, features.feature_maps, features.last_hidden_state, [grid] * count)
        given = [*features.feature_maps, features.last_hidden_state, *masks]
        return sum(one.numel() * one.element_size() for one in given)

    once(torch.randn(2, side, side), (1, 1, 1, 2), 1)  # weights are read, threads are up
    pixels = torch.randn(patches * studies * depth, side, side)
    grid = (patches, 1, 1, depth)
    gc.collect()
    seconds = []
    with PeakMemory() as memory:
        for _ in range(runs):
            start = time.perf_counter()
            given = once(pixels, grid, studies)
            seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "peak": memory.most / 1e9, "working": (memory.most - given) / 1e9}


def one_after_the_other(count: int) -> list[tuple[float, float]]:
    """(seconds, GB of the process afterwards) of each of `count` studies."""
    from ctinstruct_hf import Study
    from ctinstruct_hf.inference.study import load_model
    from ctinstruct_hf.phantoms import make_phantom

    model = load_model(None, "cpu")
    found = []
    for seed in range(count):
        volume = make_phantom(seed, (64, 96, 96), (5.0, 4.0, 4.0)).volume
        start = time.perf_counter()
        study = Study(volume, *model)
        study.report(max_new_tokens=24)
        study.segment(["liver", "heart"])
        study.diagnose("phantom")
        seconds = time.perf_counter() - start
        del study, volume
        gc.collect()
        found.append((seconds, PeakMemory.now() / 1e9))
    return found


def apart(*what: object) -> dict[str, float]:
    """`measure` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--size", ",".join(str(one) for one in what)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope of log time over log size."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def draw(path: Path, rows: dict[str, list[tuple[int, dict[str, float]]]]) -> None:
    """Time and memory over size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for what, marker in zip(rows, "os", strict=True):
        sizes = [size for size, _ in rows[what]]
        time_axes.plot(sizes, [one["seconds"] for _, one in rows[what]], marker=marker, label=what)
        memory_axes.plot(sizes, [one["peak"] for _, one in rows[what]], marker=marker, label=f"{what}: peak")
        memory_axes.plot(sizes, [one["working"] for _, one in rows[what]], marker=marker, ls=":", label=f"{what}: working")  # fmt: skip
    time_axes.set(xlabel="patches", ylabel="seconds", title="time", xscale="log", yscale="log")
    memory_axes.set(xlabel="patches", ylabel="GB above weights and pixels", title="memory")
    for axes in (time_axes, memory_axes):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def main() -> int:
    options = arguments(__doc__, preset="paper", side="128", picture="", size="")
    if options.size:
        preset, *numbers = options.size.split(",")
        print(json.dumps(measure(preset, *(int(one) for one in numbers))))
        return 0
    preset, side = ("tiny", 64) if options.quick else (options.preset, int(options.side))
    runs = 1 if options.quick else options.runs
    print(header("torch", "transformers", "ctinstruct-hf"))
    print(
        f"tower and decoder of the `{preset}` preset, patches of {side} x {side} x 32, one mask; ratio: seconds of a patch over those of the first size"
    )
    rows: dict[str, list[tuple[int, dict[str, float]]]] = {}
    missed = False
    for what, sizes in (("patches of one study", PATCHES), ("studies of one patch", STUDIES)):
        chosen = sizes[:2] if options.quick else sizes
        rows[what] = []
        for size in chosen:
            patches, studies = (size, 1) if sizes is PATCHES else (1, size)
            rows[what].append((size, apart(preset, side, patches, studies, runs)))
            one, first = rows[what][-1][1], rows[what][0][1]
            print(
                f"{size:3d} {what:22s} {one['seconds']:8.2f} s  ratio {one['seconds'] / size / first['seconds']:5.2f}  "
                f"peak {one['peak']:6.2f} GB  working {one['working']:6.2f} GB",
                flush=True,
            )
        slope = exponent([size for size, _ in rows[what]], [one["seconds"] for _, one in rows[what]])
        grown = rows[what][-1][1]["working"] / max(rows[what][0][1]["working"], 0.05)
        print(f"exponent {slope:.2f} (stated: at most {EXPONENT}); working memory x {grown:.2f} (at most {WORKING})")
        missed |= slope > EXPONENT or grown > WORKING
    after = one_after_the_other(3 if options.quick else STUDIES[-1])
    grown = after[-1][1] / after[1][1]
    print(
        f"{len(after)} studies one after the other: {np.median([one for one, _ in after]):.2f} s each, "
        f"memory after the second {after[1][1]:.3f} GB, after the last {after[-1][1]:.3f} GB: x {grown:.3f} (at most {LEFT})"
    )
    missed |= grown > LEFT
    if options.picture:
        draw(Path(options.picture), rows)
    return 1 if options.check and missed and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
