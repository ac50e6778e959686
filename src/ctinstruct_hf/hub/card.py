"""The model card of a folder: metadata that the Hub reads, what the model is for, its numbers, and how to use it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import CTInstructError
from ..files import write_whole
from ..inference.folders import identify, require

# metric of an evaluation -> how the Hub names it
_METRICS = {
    "auc": ("roc_auc", "AUC, mean over findings"),
    "accuracy": ("accuracy", "accuracy"),
    "f1": ("f1", "F1"),
    "precision": ("precision", "precision"),
    "bleu1": ("bleu", "BLEU-1"),
    "rouge1": ("rouge", "ROUGE-1"),
    "meteor": ("meteor", "METEOR"),
    "exact": ("exact_match", "exact answers"),
    "dice": ("dice", "Dice, mean over structures of scans"),
    "absent_left_empty": ("accuracy", "absent structures left empty"),
    "clinical_f1": ("f1", "F1 of CT-RATE's 18 findings in reports"),
}


def make_card(
    folder: Path,
    scores: Path | None = None,
    *,
    name: str | None = None,
    datasets: Sequence[str] = (),
    base_model: str | None = None,
    license: str = "apache-2.0",
    notes: str = "",
) -> str:
    """The text of a model card.

    Args:
        folder: a saved model.
        scores: `scores.json` of `ctinstruct evaluate`; its metrics become the card's table and its model-index.
        name: in the title and in the example; the folder's by default.
        datasets: what it was trained on, as the Hub names them.
        base_model: what it was made from.
        license: of the weights.
        notes: a paragraph on data and limits.

    Raises:
        CTInstructError: where the folder holds no model, or `scores` is no `scores.json`.
    """
    if identify(folder)[0] != "nothing":
        require(folder, "stage two", "stage one", "tower")
    config = _read(folder / "config.json", f"{folder} holds no model")
    title = name or folder.resolve().name
    found = [] if scores is None else _read(scores, f"{scores} is no evaluation").get("tasks")
    if found is None:
        raise CTInstructError(f"{scores} is no scores.json of ctinstruct evaluate.")
    meta: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "license": license,
        "tags": ["medical", "ct", "radiology", "segmentation", "vision-language", "ctinstruct"],
    }
    if base_model:
        meta["base_model"] = base_model
    if datasets:
        meta["datasets"] = list(datasets)
    results = [entry for task in found if (entry := _result(task))]
    if results:
        meta["model-index"] = [{"name": title, "results": results}]
    head = yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)
    parts = [f"---\n{head}---\n", f"# {title.rpartition('/')[2]}\n", _what(config), _use(title), _limits(config)]
    if notes:
        parts.append(f"## Notes\n\n{notes.strip()}\n")
    if found:
        parts.append(_table(found))
    return "\n".join(parts)


def write_card(folder: Path, text: str) -> Path:
    """Put the card beside the model, whole."""
    path = folder / "README.md"
    write_whole(path, text)
    return path


def _read(path: Path, wrong: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CTInstructError(f"{wrong}: {path.name} cannot be read.") from error
    if not isinstance(values, dict):
        raise CTInstructError(f"{wrong}: {path.name} is no object.")
    return values


def _result(task: dict[str, Any]) -> dict[str, Any] | None:
    metrics = [
        {"type": _METRICS[name][0], "value": round(value["mean"], 4), "name": _METRICS[name][1]}
        for name, value in task["metrics"].items()
        if name in _METRICS and value["mean"] is not None
    ]
    if not metrics:
        return None
    dataset = task["dataset"] or "unnamed"
    return {
        "task": {"type": "image-text-to-text", "name": task["task"].replace("_", " ")},
        "dataset": {"type": dataset, "name": dataset},
        "metrics": metrics,
    }


def _what(config: dict[str, Any]) -> str:
    vision, text = config.get("vision_config", {}), config.get("text_config", {})
    lists = ", ".join(f"{name} ({len(names)})" for name, names in (config.get("disease_lists") or {}).items())
    state = "" if config.get("trained", True) else "\n**The weights are random: its answers mean nothing.**\n"
    if config.get("note"):
        state += f"\n**{config['note']}**\n"
    return f"""A CTInstruct model (AAAI 2026): it reads 3D CT of any size and answers with text, masks and probabilities.
{state}
- Vision: {vision.get("architecture", "hybrid")} tower of width {_width(vision)}; language model: {text.get("model_type", "unknown")}, width {text.get("hidden_size", "unknown")}.
- Diagnosis lists: {lists or "none"}.
"""


def _width(vision: dict[str, Any]) -> Any:
    planes = vision.get("bottleneck_planes")
    return vision.get("hidden_size") or (planes[-1] * vision.get("bottleneck_expansion", 4) if planes else "unknown")


def _use(title: str) -> str:
    return f"""## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{title}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{title}", trust_remote_code=True)
content = [{{"type": "image", "image": "scan.nii.gz"}}, {{"type": "text", "text": "Is there a pleural effusion?"}}]
messages = [{{"role": "user", "content": content}}]
batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
print(processor.decode(model.generate(**batch, max_new_tokens=64)[0]))
```

With `pip install ctinstruct-hf`, `Study.open("scan.nii.gz", model="{title}")` gives reports, masks on the scan's grid and
probabilities in a line each.
"""


def _limits(config: dict[str, Any]) -> str:
    return """## Intended use and limits

Research on CT and language. **Not a medical device, never a diagnosis**: it may miss what is there and name what is not, and it
has not been tested on the scanners, protocols and patients of your hospital. Evaluate it on your own data before you compare or
build on it (`ctinstruct evaluate`).
"""


def _table(tasks: Sequence[dict[str, Any]]) -> str:
    lines = [
        "## Evaluation\n",
        "| task | data | samples | metric | value | 95 % interval |",
        "|---|---|---|---|---|---|",
    ]
    for task in tasks:
        for name, value in task["metrics"].items():
            if value["mean"] is None:
                continue
            bounds = f"{value['low']:.3f}–{value['high']:.3f}" if value["low"] is not None else ""
            label = _METRICS.get(name, ("", name))[1]
            line = (
                f"| {task['task']} | {task['dataset']} | {task['count']} | {label} | {value['mean']:.3f} | {bounds} |"
            )
            lines.append(line)
        lines += [f"| | | | {note} | | |" for note in task.get("notes", [])]
    return "\n".join([*lines, ""])


__all__ = ["make_card", "write_card"]
