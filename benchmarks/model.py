"""The tower and the mask decoder at the release's width against a plain rendering of the release's own operations.

    python benchmarks/model.py [--quick] [--check] [--runs 3] [--patches 1,2,4]

The same random weights on both sides, in turn, in one process. "One answer with one mask" is: ours, the tower once and
the decoder; theirs, grey repeated to 3 channels, plain NCHW modules, the tower a second time for the mask, U-Net to full
resolution, then the dot product.
"""

from __future__ import annotations

import copy
import gc
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from common import PeakMemory, alternate, arguments, header, ratio, table, write_figures

from ctinstruct_hf import CTInstructConfig, CTInstructSegmentationDecoder, CTInstructVisionModel
from ctinstruct_hf.modeling.inference_ctinstruct import optimize_for_inference
from ctinstruct_hf.modeling.segmentation_ctinstruct import assemble, sinusoid_2d
from ctinstruct_hf.modeling.vision_blocks_ctinstruct import ConvNorm


def plain_conv_norm(block: ConvNorm, images: torch.Tensor) -> torch.Tensor:
    hidden = F.conv2d(images, block.conv.weight.contiguous(), None, block.conv.stride, block.conv.padding)
    hidden = block.norm(hidden)
    return {"relu": F.relu, "leaky_relu": lambda x: F.leaky_relu(x, 0.01), None: lambda x: x}[block.activation](hidden)


def plain_tower(tower: CTInstructVisionModel, pixels: torch.Tensor, grid: tuple[int, int, int, int]) -> tuple:
    """The release's order of operations: 3 grey channels, NCHW, norm after each convolution, all slices at once."""
    encoder = tower.encoder
    grey = pixels[:, None].repeat(1, 3, 1, 1)
    weight = encoder.stem.conv.weight.repeat(1, 3, 1, 1) / 3
    stem = F.conv2d(grey, weight, None, 2, 3)
    maps = [stem]
    hidden = encoder.pool(F.relu(encoder.stem.norm(stem)))
    for stage in encoder.stages:
        for block in stage:
            residual = hidden if block.shortcut is None else plain_conv_norm(block.shortcut, hidden)
            inner = plain_conv_norm(block.spatial, plain_conv_norm(block.reduce, hidden))
            hidden = F.relu(plain_conv_norm(block.expand, inner) + residual)
        maps.append(hidden)
    kept = torch.ones(1, len(pixels), dtype=torch.bool, device=pixels.device)
    return maps, tower.attention(hidden, grid, kept)


def plain_decoder(
    decoder: CTInstructSegmentationDecoder, queries: torch.Tensor, maps: list, tokens: torch.Tensor, grid: tuple
) -> torch.Tensor:
    """U-Net to full resolution, then the dot product with the mask embeddings."""
    hidden = tokens[:, :, None, None]
    for block, skip in zip([decoder.token_block, *decoder.blocks], maps[::-1], strict=True):
        hidden = torch.cat([block.up(hidden), skip], dim=1)
        hidden = plain_conv_norm(block.second, plain_conv_norm(block.first, hidden))
    full = decoder.last_up(hidden)
    size = maps[-1].shape[-2:]
    pooled = torch.cat([F.avg_pool2d(part, part.shape[-1] // size[-1]) for part in maps], dim=1)
    values = decoder.fuse(pooled.flatten(2).transpose(1, 2))
    keys = values + sinusoid_2d(size, values.shape[-1], values.device, values.dtype)
    embeddings = decoder.mask_embeddings(queries, keys, values)
    return assemble(torch.einsum("ncd,ndhw->nchw", embeddings, full), grid)


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32: with AMX; without it bfloat16 is the slower of the two."""
    return "amx_bf16" in Path("/proc/cpuinfo").read_text()


def main() -> int:
    options = arguments(__doc__, runs=3, patches="1")
    options.patches = [int(part) for part in options.patches.split(",")]
    torch.manual_seed(0)
    config = CTInstructConfig.preset("tiny" if options.quick else "paper")
    vision, segmentation = config.vision_config, config.segmentation_config
    vision.attention_layout = "released"
    side, depth = (128, 2) if options.quick else (256, 32)
    tower = CTInstructVisionModel(vision).eval()
    decoder = CTInstructSegmentationDecoder(segmentation).eval()
    for module in (*tower.modules(), *decoder.modules()):
        if isinstance(module, torch.nn.BatchNorm2d):  # norms that do something
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.8, 1.2)
    quick = tuple(optimize_for_inference(copy.deepcopy(part)) for part in (tower, decoder))
    queries = torch.randn(1, segmentation.hidden_size)
    count = sum(parameter.numel() for part in (tower, decoder) for parameter in part.parameters())
    print(
        header("torch", "transformers"),
        f"\ntower and decoder: {count / 1e6:.0f} M parameters, {side} x {side} x {depth}",
        flush=True,
    )

    def ours(pixels: torch.Tensor, grid: tuple, parts: tuple) -> torch.Tensor:
        features = parts[0](pixels, [grid])
        return parts[1](queries.to(pixels.dtype), features.feature_maps, features.last_hidden_state, grid)

    def theirs(pixels: torch.Tensor, grid: tuple) -> torch.Tensor:
        plain_tower(tower, pixels, grid)  # for the answer
        maps, tokens = plain_tower(tower, pixels, grid)  # again, for the mask
        return plain_decoder(decoder, queries, maps, tokens, grid)

    pairs, memory, difference = [], {}, 0.0
    runs = 1 if options.quick else options.runs
    with torch.inference_mode():
        inputs = {
            patches: torch.randn(patches * depth, side, side)
            for patches in ((1,) if options.quick else options.patches)
        }
        for patches, pixels in inputs.items():
            grid = (patches, 1, 1, depth)
            outputs = []
            for name, run in (("ours", lambda: ours(pixels, grid, quick)), ("theirs", lambda: theirs(pixels, grid))):
                gc.collect()
                with PeakMemory() as peak:
                    outputs.append(run())
                memory[name, patches] = peak.most / 1e9
            exact, plain = outputs
            difference = max(difference, float((exact - plain).abs().max() / plain.abs().max()))
            print(f"{patches} patches: outputs differ by {difference:.1e} of the largest", flush=True)
            assert difference < 1e-4
            pairs.append(
                alternate(
                    f"float32, {patches} patches, one answer, one mask",
                    lambda: ours(pixels, grid, quick),
                    lambda: theirs(pixels, grid),
                    runs,
                    None if options.quick else 1.4,
                    warm=True,
                )
            )
            print(table(pairs[-1:]), flush=True)
        half = (CTInstructVisionModel(vision).eval(), CTInstructSegmentationDecoder(segmentation).eval())
        half[0].load_state_dict(tower.state_dict())
        half[1].load_state_dict(decoder.state_dict())
        half = tuple(optimize_for_inference(part.to(torch.bfloat16)) for part in half)
        pixels = next(iter(inputs.values()))[:depth]
        grid = (1, 1, 1, depth)
        exact = ours(pixels, grid, quick) > 0
        rounded = ours(pixels.to(torch.bfloat16), grid, half) > 0
        dice = float(2 * (exact & rounded).sum() / (exact.sum() + rounded.sum()).clamp(min=1))
        print(f"bfloat16 mask against float32: Dice {dice:.4f}")
        pairs.append(
            alternate(
                "bfloat16 (theirs float32), 1 patch",
                lambda: ours(pixels.to(torch.bfloat16), grid, half),
                lambda: theirs(pixels, grid),
                runs,
                3.0 if fast_bfloat16() and not options.quick else None,
                warm=True,
            )
        )
    print(table(pairs))
    print("Peak memory above the weights, GB (ours / theirs):")
    for patches in inputs:
        print(f"  {patches} patches: {memory['ours', patches]:.2f} / {memory['theirs', patches]:.2f}")
    first = next(iter(inputs))
    write_figures(
        options,
        answer=f"{ratio(pairs[0])}, outputs within {difference:.0e}",
        memory=f"{memory['ours', first]:.2f} GB, theirs {memory['theirs', first]:.2f} GB",
        bfloat16=f"{ratio(pairs[-1])}, mask Dice {dice:.3f}",
    )
    return 1 if options.check and any(pair.missed for pair in pairs) else 0


if __name__ == "__main__":
    sys.exit(main())
