"""The network at full width with random weights on a GPU: parity, milliseconds, memory, and a step of each training.

    python scripts/gpu/check.py -o figures.json [--tiny] [--device cuda]

Needs torch, Transformers, peft and this tree; ends within eight minutes: a part that would begin later is left out, and said to be. Writes
one JSON with the card's name. `--tiny` is the same at a small width, for a test on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from model import plain_decoder, plain_tower  # noqa: E402  # the release's order of operations

from ctinstruct_hf import CTInstructConfig, CTInstructForConditionalGeneration  # noqa: E402

SECONDS = 420  # after which no further part begins
Part = Callable[["Bench"], dict[str, Any]]


class Bench:
    """A model on a device, and how a call on it is measured."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device, self.tiny = device, tiny
        self.config = CTInstructConfig.preset("tiny" if tiny else "paper")
        self.config.vision_config.attention_layout = "released"
        self.config.vision_config.stem_windows = []
        self.side, self.slices = (128, 4) if tiny else (256, 32)
        self.grid = (1, 1, 1, self.slices) if tiny else (6, 1, 1, self.slices)
        torch.manual_seed(0)

    def model(self, dtype: torch.dtype, layers: int | None = None) -> Any:
        """Random weights, made where they stay."""
        config = CTInstructConfig.from_dict(self.config.to_dict())
        if layers is not None:
            config.text_config.num_hidden_layers = layers
            if getattr(config.text_config, "layer_types", None):
                config.text_config.layer_types = config.text_config.layer_types[:layers]
        torch.set_default_dtype(dtype)
        try:
            with self.device:
                return CTInstructForConditionalGeneration(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)

    def pixels(self, dtype: torch.dtype, studies: int = 1) -> torch.Tensor:
        rows = studies * self.grid[0] * self.slices
        return torch.randn(rows, self.side, self.side, device=self.device, dtype=dtype)

    def ids(self) -> torch.Tensor:
        """A prompt [1, L] with the image's tokens in it."""
        config, count = self.config, self.grid[0] * self.slices
        words = torch.arange(20, 50).tolist()
        row = [config.vision_start_token_id, *[config.image_token_id] * count, config.vision_end_token_id, *words]
        return torch.tensor([row], device=self.device)

    def measure(self, call: Callable[[], Any], runs: int = 3) -> dict[str, float]:
        """Milliseconds of the quickest run, and the most memory in GB."""
        call()
        self.synchronise()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(1 if self.tiny else runs):
            start = time.perf_counter()
            call()
            self.synchronise()
            times.append(time.perf_counter() - start)
        found = {"ms": round(min(times) * 1e3, 2)}
        if self.device.type == "cuda":
            found["gigabytes"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        return found

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.float() - right.float()).abs().max() / right.float().abs().max())


@torch.inference_mode()
def parity(bench: Bench) -> dict[str, Any]:
    """Ours against the release's order of operations, in float32 and in bfloat16."""
    found = {}
    reference = None
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = bench.model(torch.float32, layers=1).to(dtype)
        pixels, grid = bench.pixels(torch.float32)[: bench.slices].to(dtype), (1, 1, 1, bench.slices)
        _, tokens = plain_tower(model.model.vision_tower, pixels, grid)
        model.optimize_for_inference()
        ours = model.model.vision_tower(pixels, [grid], return_dict=True).last_hidden_state
        name = str(dtype).removeprefix("torch.")
        found[f"tokens_{name}"] = difference(ours, tokens.reshape(ours.shape))
        if reference is not None:
            found["tokens_bfloat16_against_float32"] = difference(ours, reference)
        reference = ours
        del model
    return found


@torch.inference_mode()
def tower_and_decoder(bench: Bench) -> dict[str, Any]:
    """One study; channels-last and folded norms against the release's operations; eight studies at once."""
    model = bench.model(torch.bfloat16, layers=1)
    pixels, grid = bench.pixels(torch.bfloat16), bench.grid
    queries = torch.randn(10, model.config.segmentation_config.hidden_size, device=bench.device, dtype=torch.bfloat16)
    maps, tokens = plain_tower(model.model.vision_tower, pixels, grid)
    flat = tokens.reshape(len(pixels), -1)
    found = {
        "release_tower": bench.measure(lambda: plain_tower(model.model.vision_tower, pixels, grid)),
        "release_decoder": bench.measure(lambda: plain_decoder(model.segmentation_decoder, queries, maps, flat, grid)),
    }
    model.optimize_for_inference()
    tower = model.model.vision_tower
    features = tower(pixels, [grid], return_dict=True)
    found["tower"] = bench.measure(lambda: tower(pixels, [grid]))
    found["decoder"] = bench.measure(
        lambda: model.segmentation_decoder(queries, features.feature_maps, features.last_hidden_state, grid)
    )
    many = bench.pixels(torch.bfloat16, studies=1 if bench.tiny else 8)
    grids = [grid] * (1 if bench.tiny else 8)
    found["tower_of_a_batch"] = bench.measure(lambda: tower(many, grids))
    found["studies_per_second"] = round(len(grids) / found["tower_of_a_batch"]["ms"] * 1e3, 2)
    return found


@torch.inference_mode()
def compiled(bench: Bench) -> dict[str, Any]:
    """The attention of the tower and a block of its encoder, compiled."""
    model = bench.model(torch.bfloat16, layers=1)
    images = bench.pixels(torch.bfloat16)[: bench.slices]
    encoder = model.model.vision_tower.encoder
    plain = bench.measure(lambda: encoder(images))
    if bench.tiny:
        return {"plain": plain}
    quick = torch.compile(encoder)
    return {"plain": plain, "compiled": bench.measure(lambda: quick(images))}


@torch.inference_mode()
def language(bench: Bench) -> dict[str, Any]:
    """Prefill, a token, and a whole study: encode, 150 tokens of report, ten masks."""
    model = bench.model(torch.bfloat16).optimize_for_inference()
    pixels, ids, grid = bench.pixels(torch.bfloat16), bench.ids(), bench.grid
    tokens = 4 if bench.tiny else 150
    features = model.get_image_features(pixels, [grid], return_dict=True)

    def report(length: int) -> Any:
        options = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False}
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), vision_features=features, **options)

    found = {"prefill": bench.measure(lambda: model.model(input_ids=ids, vision_features=features))}
    found["report"] = bench.measure(lambda: report(tokens), runs=1)
    found["ms_per_token"] = round((found["report"]["ms"] - found["prefill"]["ms"]) / tokens, 2)
    queries = torch.randn(10, model.config.segmentation_config.hidden_size, device=bench.device, dtype=torch.bfloat16)

    def study() -> None:
        nonlocal features
        features = model.get_image_features(pixels, [grid], return_dict=True)
        report(tokens)
        model.segmentation_decoder(queries, features.feature_maps, features.last_hidden_state, grid)

    return {**found, "study": bench.measure(study, runs=1)}


def _step(bench: Bench, model: Any) -> dict[str, float]:
    """A training step: forward, backward, AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    pixels, ids = bench.pixels(torch.bfloat16)[: bench.slices], bench.ids()
    count = bench.slices
    start = ids[:, : count + 1]
    ids = torch.cat([start, ids[:, -31:]], dim=1)

    def step() -> None:
        loss = model(input_ids=ids, pixel_values=pixels, patch_grid=[(1, 1, 1, count)], labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return bench.measure(step, runs=1)


def full_step(bench: Bench) -> dict[str, Any]:
    return _step(bench, bench.model(torch.bfloat16, layers=2).train())


def lora_step(bench: Bench) -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    model = bench.model(torch.bfloat16, layers=2).train()
    return _step(bench, get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"])))


def fsdp2_step(bench: Bench) -> dict[str, Any]:
    """One process; the blocks of the language model sharded, then the rest."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    if bench.device.type != "cuda":
        return {"left_out": "needs a GPU"}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "RANK": "0", "WORLD_SIZE": "1"})
    dist.init_process_group("nccl")
    try:
        model = bench.model(torch.bfloat16, layers=2).train()
        for layer in model.model.language_model.layers:
            fully_shard(layer)
        fully_shard(model)
        return _step(bench, model)
    finally:
        dist.destroy_process_group()


PARTS: dict[str, Part] = {
    "parity": parity, "tower_and_decoder": tower_and_decoder, "language": language, "lora_step": lora_step,
    "full_step": full_step, "fsdp2_step": fsdp2_step, "compiled": compiled,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    device = torch.device(given.device)
    bench = Bench(device, given.tiny)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found: dict[str, Any] = {"card": card, "torch": torch.__version__, "transformers": transformers.__version__}
    found["width"] = "tiny" if given.tiny else "full"
    start = time.perf_counter()
    failed = 0
    for name, part in PARTS.items():
        if time.perf_counter() - start > SECONDS:
            found[name] = {"left_out": f"{SECONDS} seconds had passed"}
            continue
        try:
            found[name] = part(bench)
        except Exception as error:  # the other parts are measured all the same
            traceback.print_exc()
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:500]}
            failed += 1
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        given.output.write_text(json.dumps(found, indent=1) + "\n")
        print(name, json.dumps(found[name]), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
