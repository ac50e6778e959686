"""Colours of structures, the same on the page, in `report.html`, in label tables and in files for other programs."""

from __future__ import annotations

import colorsys

# told apart in normal sight, by deuteranopes and by protanopes
COLOURS = ("#f6ba06", "#1742ff", "#52ffa5", "#b00887", "#0eb7f9", "#6b8f23", "#b87da4", "#188a69", "#32ba7f", "#4d6523")


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


def css(number: int) -> str:
    """The same as #rrggbb."""
    return "#" + bytes(rgb(number)).hex()


__all__ = ["COLOURS", "css", "rgb"]
