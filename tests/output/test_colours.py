"""Colours of structures are told apart, also by who does not see red or green."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from ctinstruct_hf.output.colours import COLOURS, css, rgb

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(colour: tuple[int, int, int], sight: str) -> np.ndarray:
    """CIELAB (D65) of a colour as it is seen."""
    part = np.array(colour) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(SIGHT[sight]) @ linear, 0, 1)
    ratio = XYZ @ seen / [0.95047, 1, 1.08883]
    x, y, z = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
def test_the_first_ten_colours_are_told_apart(sight: str) -> None:
    seen = [lab(rgb(number), sight) for number in range(10)]
    assert min(float(np.linalg.norm(one - other)) for one, other in combinations(seen, 2)) >= 15


def test_no_colour_comes_twice_and_css_says_the_same() -> None:
    assert len({rgb(number) for number in range(300)}) == 300
    assert [css(number) for number in range(10)] == list(COLOURS)
    assert css(25) == "#{:02x}{:02x}{:02x}".format(*rgb(25))
