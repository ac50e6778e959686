"""Pictures (PNG, JPEG, BMP, TIFF): a slice in a stated window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .volume import CTInstructError, CTVolume, Limits, check_size, from_array, last_line

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP")
# grey values of a picture have no unit: they are taken as this window (HU) unless the caller names another
PICTURE_WINDOW = (-1250.0, 250.0)
_ORIENTATION = 0x0112  # of EXIF
_PHOTOMETRIC = 0x0106  # of TIFF


def read_picture(
    path: Path, spacing: tuple[float, float, float] | None, window: tuple[float, float] | None, limit: Limits
) -> CTVolume:
    from PIL import Image

    try:
        # from a stream: Pillow garbles a turned TIFF that it maps into memory by its name
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as picture:
            check_size(path.name, picture.size, 4, limit)
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
    """A slice (1, height, width): 8- or 16-bit grey in a window; wider integers and floats are HU.

    Colour, several pages and several frames are refused; grey stored as colour is read.
    """
    from PIL import ImageOps

    frames = getattr(picture, "n_frames", 1)
    if frames != 1:
        raise CTInstructError(f"{name} holds {frames} pages or frames: give one, or the volume as NIfTI or DICOM.")
    if picture.format == "TIFF" and picture.mode.startswith("I;16") and picture.tag_v2.get(_PHOTOMETRIC) == 0:
        raise CTInstructError(f"{name} stores 16 bits with white as 0: write it with black as 0.")  # Pillow ignores it
    if window is not None and not (np.isfinite(window).all() and window[0] != window[1]):
        raise CTInstructError(f"{name}: window is {window}, expected the HU of black and of white.")
    wide = picture.mode == "F" or (picture.mode == "I" and picture.format != "PNG")
    notes = []
    if picture.getexif().get(_ORIENTATION, 1) != 1:
        picture.load()  # turns a TIFF
        picture = ImageOps.exif_transpose(picture)
        notes.append("The picture says how it was turned (EXIF): it is read upright, as viewers show it.")
    if picture.mode in ("P", "RGBA", "LA", "PA", "CMYK", "YCbCr"):
        picture = picture.convert("RGB")
    grey = np.asarray(picture)
    if grey.ndim == 3:
        spread = int((grey.max(axis=2).astype(int) - grey.min(axis=2)).max())
        if spread > 8:
            raise CTInstructError(f"{name} is a colour image: expected a grey CT slice.")
        grey = grey[..., 0]
    if spacing is None:
        notes.append("A picture has no pixel spacing: 1 mm is taken, volumes in ml mean nothing.")
    mm = spacing or (1.0, 1.0, 1.0)
    if wide:
        if window is not None:
            raise CTInstructError(f"{name} has no black and white but {grey.dtype} values: give no window for it.")
        notes.insert(0, f"The picture's {grey.dtype} values are taken as HU, as they are stored.")
        return from_array(grey, mm, name, "picture", notes)
    white = 1 if grey.dtype == bool else 255 if grey.dtype == np.uint8 else 65535
    darkest, brightest = int(grey.min()), int(grey.max())
    if ((grey == darkest) | (grey == brightest)).all():
        notes.append("The picture has no more than two grey levels: it looks like a mask, not like CT.")
    if white == 65535 and 0 < brightest < 4096:
        notes.append(
            f"The brightest of its 65536 grey levels is {brightest}: it looks like 12 bits in 16, nearly black."
        )
    low, high = window or PICTURE_WINDOW
    hu = grey.astype(np.float32) / white * (high - low) + low
    if window is None:
        notes.insert(0, f"A picture has no HU: black to white is taken as {low:g} to {high:g} HU.")
    return from_array(hu, mm, name, "picture", notes)
