"""A random checkpoint of the release's names, shapes and dtypes: converted, quantised, asked about a scan; a table of what it took.

    python scripts/full_size.py --scan FOLDER --tensors released_full_tensors.json --work /tmp/full-size [--layers 2] [--tokens 64]

Writes 17 GB, then as much converted and 8 or 11 GB quantised, a step after the other; a step's peak memory is of its own process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

HIDDEN, INNER, WORDS, HEADS, KEYS = 3584, 18944, 152064, 28, 4
LIMITS = {"convert": 4.0, "quantise int4": 4.0, "quantise int8": 4.0, "predict int4": 10.0, "predict int8": 14.0}
SHARD_BYTES = 10**9


def language_model(layers: int) -> dict[str, list[int]]:
    """Name -> shape of Qwen2-VL-7B's language model."""
    shapes = {
        "model.embed_tokens.weight": [WORDS, HIDDEN],
        "model.norm.weight": [HIDDEN],
        "lm_head.weight": [WORDS, HIDDEN],
    }
    keys = HIDDEN // HEADS * KEYS
    for number in range(layers):
        layer = f"model.layers.{number}."
        for name, rows in (("q_proj", HIDDEN), ("k_proj", keys), ("v_proj", keys)):
            shapes[f"{layer}self_attn.{name}.weight"] = [rows, HIDDEN]
            shapes[f"{layer}self_attn.{name}.bias"] = [rows]
        shapes[f"{layer}self_attn.o_proj.weight"] = [HIDDEN, HIDDEN]
        shapes[f"{layer}mlp.gate_proj.weight"] = [INNER, HIDDEN]
        shapes[f"{layer}mlp.up_proj.weight"] = [INNER, HIDDEN]
        shapes[f"{layer}mlp.down_proj.weight"] = [HIDDEN, INNER]
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = [HIDDEN]
    return shapes


def random_tensor(name: str, shape: list[int], noise: torch.Tensor) -> torch.Tensor:
    """Weights whose products keep their size; norms and statistics of a network at its beginning."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.long)
    if name.endswith(("beta", "running_mean", "bias")):
        return torch.zeros(shape, dtype=torch.bfloat16)
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.bfloat16)
    count = int(torch.tensor(shape).prod())
    fan_in = max(count // shape[0], 1)
    scaled = (noise * fan_in**-0.5).to(torch.bfloat16)
    tensor = torch.empty(count, dtype=torch.bfloat16)
    for part in tensor.split(len(noise)):
        part.copy_(scaled[: len(part)])
    return tensor.view(shape)


def write_release(folder: Path, tensors: Path, layers: int) -> None:
    """The random checkpoint, shard by shard, with a tokenizer of single characters under Qwen2-VL's ids."""
    from safetensors.torch import save_file

    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tests.hub.released_folders import QWEN2_VL, write_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    noise = torch.randn(9_999_991)  # a prime, so that rows differ
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    count = 0

    def flush() -> None:
        nonlocal count
        count += 1
        name = f"model-{count:05d}.safetensors"
        save_file(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in {**json.loads(tensors.read_text()), **language_model(layers)}.items():
        shard[name] = random_tensor(name, shape, noise)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    write_tokenizer(folder, QWEN2_VL, 151657)


def size_of(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9 if folder.exists() else 0.0


def run_step(name: str, command: list[str], folder: Path) -> tuple[str, float, float, float]:
    """Name, seconds, peak memory in GB, and GB on the disk of a step in a process of its own."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, "MALLOC_ARENA_MAX": "2"})
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{name} failed")
    row = (name, time.perf_counter() - start, usage.ru_maxrss / 1e6, size_of(folder))
    print(f"| {row[0]} | {row[1]:.0f} | {row[2]:.1f} | {row[3]:.1f} |", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scan", type=Path, required=True)
    parser.add_argument("--tensors", type=Path, required=True, help="JSON {name: shape} of all but the language model")
    parser.add_argument("--work", type=Path, required=True, help="folder for the files, removed at the end")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--quantize", nargs="*", default=["int4", "int8"])
    parser.add_argument("--bfloat16", action="store_true", help="also predict in bfloat16, where 20 GB are free")
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    release, model = given.work / "release", given.work / "model"
    if given.write:
        write_release(release, given.tensors, given.layers)
        return
    needed = 2.1e9 * 2 + (given.layers * 0.4663e9 + 1.1e9 * 2 + 1.7e9) * 2 + 12e9 * given.layers / 28
    free = shutil.disk_usage(given.work.parent).free
    if free < needed:
        raise SystemExit(f"{given.work} needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free.")
    ctinstruct = [sys.executable, "-m", "ctinstruct_hf.cli"]
    ask = ["--report", "--ask", "Is there a pleural effusion?", "--segment", "liver,spleen", "--diagnose", "ct_rate"]
    print("| step | seconds | peak memory, GB | disk, GB |\n|---|---|---|---|", flush=True)
    rows = []
    try:
        rows.append(run_step("write", [sys.executable, __file__, *sys.argv[1:], "--write"], release))
        rows.append(
            run_step("convert", [*ctinstruct, "convert", "released", "-i", str(release), "-o", str(model)], model)
        )
        shutil.rmtree(release)
        variants = {"bfloat16": model} if given.bfloat16 else {}
        for bits in given.quantize:
            variants[bits] = given.work / bits
            command = [*ctinstruct, "convert", "model", "-i", str(model), "-o", str(variants[bits]), "--quantize", bits]
            rows.append(run_step(f"quantise {bits}", command, variants[bits]))
        for bits, folder in variants.items():
            results = given.work / f"results-{bits}"
            command = [*ctinstruct, "predict", "-i", str(given.scan), "-o", str(results), "--model", str(folder)]
            command += [*ask, "--max-new-tokens", str(given.tokens), "--device", "cpu"]
            rows.append(run_step(f"predict {bits}", command, results))
    finally:
        shutil.rmtree(given.work, ignore_errors=True)
    print(f"swap used by this process and its steps: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_nswap}")
    over = [
        f"{name}: {memory:.1f} GB of {LIMITS[name]:.0f}"
        for name, _, memory, _ in rows
        if memory > LIMITS.get(name, 1e9)
    ]
    if over:
        raise SystemExit("more memory than stated: " + "; ".join(over))


if __name__ == "__main__":
    main()
