"""Pictures (PNG, JPEG, BMP, TIFF): one slice in a stated window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .volume import CTInstructError, CTVolume, Limits, check_size, from_array, last_line

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
# grey values of a picture have no unit: they are taken as this window (HU) unless the caller names another
PICTURE_WINDOW = (-1250.0, 250.0)


def read_picture(
    path: Path, spacing: tuple[float, float, float] | None, window: tuple[float, float] | None, limit: Limits
) -> CTVolume:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            check_size(path.name, picture.size, 4, limit)
            picture.load()
            volume = from_picture(picture, path.name, spacing, window)
    except CTInstructError:
        raise
    except Exception as error:
        raise CTInstructError(f"{path.name} is no readable picture: {last_line(error)}") from error
    volume.source.path = path
    return volume


def from_picture(
    picture: Any, name: str, spacing: tuple[float, float, float] | None, window: tuple[float, float] | None
) -> CTVolume:
    """One slice (1, height, width) from 8- or 16-bit grey; colour is refused, grey stored as colour is not."""
    if picture.mode in ("P", "RGBA", "LA", "PA", "CMYK", "YCbCr"):
        picture = picture.convert("RGB")
    grey = np.asarray(picture)
    if grey.ndim == 3:
        spread = int((grey.max(axis=2).astype(int) - grey.min(axis=2)).max())
        if spread > 8:
            raise CTInstructError(f"{name} is a colour image: expected a grey CT slice.")
        grey = grey[..., 0]
    white = 1 if grey.dtype == bool else 255 if grey.dtype == np.uint8 else 65535
    low, high = window or PICTURE_WINDOW
    hu = grey.astype(np.float32) / white * (high - low) + low
    note = f"A picture has no HU: black to white is taken as {low:g} to {high:g} HU."
    notes = [note] if window is None else []
    if spacing is None:
        notes.append("A picture has no pixel spacing: 1 mm is taken, volumes in ml mean nothing.")
    return from_array(hu, spacing or (1.0, 1.0, 1.0), name, "picture", notes)
