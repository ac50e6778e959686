"""What a run will take, said before it begins and again after three steps; its curves as a picture."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..files import whole_file

MEASURED = 3  # steps after which the time to the end is known well enough


class Outlook(TrainerCallback):
    """Says what is trained, how many steps, and, after three of them, seconds a step, the time to the end and the memory.

    Args:
        progress: called with each sentence.
    """

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.progress = progress
        self._began = 0.0
        self._first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.progress(f"trained: {what_is_trained(model)}")
        self.progress(
            f"{state.max_steps - state.global_step} steps of {samples} sample{'s' * (samples != 1)} ({args.per_device_train_batch_size} at once), "
            f"on {args.device}, {memory(args.device)}; the time to the end is known after {MEASURED} steps"
        )
        self._began, self._first = time.monotonic(), state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step - self._first
        if done == 1:  # it reads a cold cache
            self._began = time.monotonic()
        elif done == MEASURED and state.is_world_process_zero:
            seconds = (time.monotonic() - self._began) / (MEASURED - 1)
            rest = (state.max_steps - state.global_step) * seconds
            self.progress(f"{seconds:.1f} s a step, {duration(rest)} to the end, {memory(args.device)}")


def what_is_trained(model: Any) -> str:
    """ "4.0 M of 7.4 M parameters (54 %): segmentation_decoder 3.9 M, …" by the parts of the model."""
    parts: dict[str, int] = {}
    trained = whole = 0
    for name, weight in model.named_parameters():
        whole += weight.numel()
        if weight.requires_grad:
            trained += weight.numel()
            part = _part(name)
            parts[part] = parts.get(part, 0) + weight.numel()
    listed = ", ".join(f"{part} {_number(count)}" for part, count in sorted(parts.items(), key=lambda one: -one[1]))
    return (
        f"{_number(trained)} of {_number(whole)} parameters ({100 * trained / max(whole, 1):.3g} %): {listed or 'none'}"
    )


def _part(name: str) -> str:
    """The part of the model that a weight belongs to; adapters by themselves."""
    if "lora_" in name:
        return "adapters"
    if "trainable_tokens" in name:
        return "new tokens"
    name = name.removeprefix("base_model.model.").removeprefix("module.").removeprefix("model.")
    return name.split(".")[0]


def _number(count: int) -> str:
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def duration(seconds: float) -> str:
    """ "40 s", "12 min", "3 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def memory(device: torch.device) -> str:
    """The most memory that was taken so far, of a GPU or of the process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB of GPU memory"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{most / 2**30:.1f} GB of memory"


class Pace:
    """Samples a second of all processes, and the share of the time that this one spent waiting for data."""

    def __init__(self) -> None:
        self._began, self._waited, self._samples = time.monotonic(), 0.0, 0

    def note(self, waited: float, batches: Sequence[dict[str, Any]]) -> None:
        """The batches of a step, and the seconds that they were waited for."""
        self._waited += waited
        self._samples += sum(len(batch["labels"] if "labels" in batch else batch["patch_grid"]) for batch in batches)

    def since_last(self, processes: int) -> dict[str, float]:
        """`samples_per_second` and `waiting_for_data` since this was last asked for."""
        passed = max(time.monotonic() - self._began, 1e-9)
        pace = {
            "samples_per_second": round(self._samples * processes / passed, 3),
            "waiting_for_data": round(self._waited / passed, 3),
        }
        self.__init__()  # type: ignore[misc]
        return pace


class Curves(TrainerCallback):
    """Draws `curves.png` of a run after each evaluation and at its end: losses, and the metrics of held-out rows, by step."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            draw_curves(state.log_history, Path(args.output_dir) / "curves.png")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_evaluate(args, state, control)


def draw_curves(history: list[dict[str, float]], path: Path) -> bool:
    """Losses in training on the left, held-out losses in the middle, other held-out metrics on the right; False where matplotlib
    (`pip install 'ctinstruct-hf[eval]'`) is missing or there is nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        for name, value in entry.items():
            if name == "loss" or name.endswith("_loss") or (name.startswith("eval_") and not _is_speed(name)):
                curves.setdefault(name, []).append((int(entry["step"]), value))
    if not curves:
        return False
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = ("training", "held out: losses", "held out: metrics")
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    for name, points in curves.items():
        panel = panels[0 if not name.startswith("eval_") else 1 if name.endswith("loss") else 2]
        panel.plot(*zip(*points, strict=True), marker=".", label=name.removeprefix("eval_"))
    for panel in panels:
        if panel.lines:
            panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return True


def _is_speed(name: str) -> bool:
    return name.endswith(("_runtime", "_per_second"))


__all__ = ["Curves", "Outlook", "Pace", "draw_curves", "what_is_trained"]
