"""The release at full width: random shards made on the fly, converted tensor by tensor. Slow, and takes 9 GB of disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import shared
from safetensors.torch import save_file

from tests.hub.released_folders import QWEN2_VL, write_tokenizer

LANGUAGE = {
    "model.embed_tokens.weight": [152064, 3584],
    "model.norm.weight": [3584],
    "lm_head.weight": [152064, 3584],
    "model.layers.0.self_attn.q_proj.weight": [3584, 3584],
    "model.layers.0.self_attn.q_proj.bias": [3584],
    "model.layers.0.self_attn.k_proj.weight": [512, 3584],
    "model.layers.0.self_attn.k_proj.bias": [512],
    "model.layers.0.self_attn.v_proj.weight": [512, 3584],
    "model.layers.0.self_attn.v_proj.bias": [512],
    "model.layers.0.self_attn.o_proj.weight": [3584, 3584],
    "model.layers.0.mlp.gate_proj.weight": [18944, 3584],
    "model.layers.0.mlp.up_proj.weight": [18944, 3584],
    "model.layers.0.mlp.down_proj.weight": [3584, 18944],
    "model.layers.0.input_layernorm.weight": [3584],
    "model.layers.0.post_attention_layernorm.weight": [3584],
}
CONVERT = """
import resource, sys
from pathlib import Path
from ctinstruct_hf.hub.released import convert_released
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_released(Path(sys.argv[1]), Path(sys.argv[2]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_the_full_width_converts_in_the_memory_of_a_tensor(tmp_path: Path) -> None:
    shapes = {**json.loads(shared("reference/released_full_tensors.json").read_text()), **LANGUAGE}
    source = tmp_path / "release"
    source.mkdir()
    shard: dict[str, torch.Tensor] = {}
    sizes: list[int] = []
    weight_map: dict[str, str] = {}
    largest = 0

    def flush() -> None:
        name = f"model-{len(sizes) + 1:05d}.safetensors"
        save_file(shard, source / name)
        sizes.append(sum(tensor.nbytes for tensor in shard.values()))
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            tensor = torch.zeros((), dtype=torch.long)
        elif name.endswith("beta"):
            tensor = torch.zeros(shape, dtype=torch.bfloat16)
        else:
            tensor = torch.rand(shape, dtype=torch.bfloat16)
        largest = max(largest, tensor.nbytes)
        shard[name] = tensor
        if sum(one.nbytes for one in shard.values()) > 1.2e9:
            flush()
    flush()
    write_tokenizer(source, QWEN2_VL, 151657)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, str(source), str(tmp_path / "out")],
        capture_output=True, text=True, check=False, env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.strip().splitlines()[-1])
    print(f"peak {peak / 1e9:.2f} GB; largest shard {max(sizes) / 1e9:.2f} GB, largest tensor {largest / 1e9:.2f} GB")
    assert peak < 2 * largest + 4e8  # whatever the shards' sizes

    from ctinstruct_hf import CTInstructForConditionalGeneration

    model = CTInstructForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.model.vision_tower.config.hidden_size == 2048
    assert model.config.vision_config.stage_depths == [3, 4, 6, 3]
    assert len(model.segmentation_decoder.layers) == 6
    assert not any(parameter.is_meta for parameter in model.parameters())
