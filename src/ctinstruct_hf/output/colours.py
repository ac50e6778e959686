"""Colours of structures in files for other programs: those of the page, and further ones that differ from all before."""

from __future__ import annotations

import colorsys

from .report import COLOURS


def rgb(number: int) -> tuple[int, int, int]:
    """Red, green and blue (0 to 255) of a structure by its number from 0; no two of 300 are the same."""
    if number < len(COLOURS):
        red, green, blue = bytes.fromhex(COLOURS[number][1:])
    else:  # hues a golden angle apart, on three levels of saturation and brightness
        extra = number - len(COLOURS)
        level = (0.55, 0.75, 0.95)[extra % 3]
        red, green, blue = (
            round(255 * part) for part in colorsys.hsv_to_rgb(extra * 0.618034 % 1, 1.25 - level / 1.5, level)
        )
    return red, green, blue


__all__ = ["rgb"]
