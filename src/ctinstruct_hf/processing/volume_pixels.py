"""DICOM pixels in HU, read in threads."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.uid import UID, RLELossless

from .volume import AIR_HU, CTInstructError, last_line
from .volume_headers import integer, text
from .volume_slices import Slice

# 8-bit lossy JPEG cannot hold CT; the extended processes 6/8 and 10/12 have no decoder
UNDECODABLE = {"1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.55"}
EIGHT_BIT_JPEG = {"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"}
LOSSY = {
    "1.2.840.10008.1.2.4.81",  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.93",  # JPEG 2000 part 2
    "1.2.840.10008.1.2.4.112",  # JPEG XL
    "1.2.840.10008.1.2.4.203",  # high-throughput JPEG 2000
}
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# units that a CT class may have instead of HU: electron density, atomic number, mg/ml, percent, optical density
NO_HU = {"ED", "EDW", "Z_EFF", "MGML", "PCT", "OD", "IP", "MATERIAL"}
THREADS = min(8, (os.cpu_count() or 2) * 2)


def read_pixels(
    slices: list[Slice], rows: int, columns: int, warnings: list[str], keep_padding: bool = False
) -> np.ndarray:
    """HU (slices, rows, columns): int16 where every rescale is whole, float32 otherwise."""
    check_encoding(slices, warnings)
    check_rescale(slices, warnings)
    whole = all((image.slope or 1.0).is_integer() and (image.intercept or 0.0).is_integer() for image in slices)
    hu = np.empty((len(slices), rows, columns), dtype=np.int16 if whole else np.float32)
    wrong_sign: list[str] = []

    frames_of: dict[Path, list[int]] = {}
    for index, image in enumerate(slices):
        frames_of.setdefault(image.path, []).append(index)

    def fill(item: tuple[Path, list[int]]) -> None:
        path, indices = item
        if len(indices) == 1 and whole and read_plain(slices[indices[0]], hu[indices[0]], keep_padding):
            return
        stored = decode(path, slices[indices[0]].header)
        if stored.shape[-2:] != (rows, columns):
            raise CTInstructError(f"{path.name} holds {stored.shape[-2:]} pixels, its header says {(rows, columns)}.")
        stored = stored.reshape(-1, rows, columns)
        for index in indices:
            image = slices[index]
            if image.frame >= len(stored):
                raise CTInstructError(f"{path.name} is cut short: frame {image.frame + 1} is missing.")
            hu[index] = rescaled(stored[image.frame], image, hu.dtype, wrong_sign, keep_padding)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fill, frames_of.items()))
    if wrong_sign:
        warnings.append(
            f"{len(wrong_sign)} slices say their pixels are unsigned, but they only make sense as signed: read as signed."
        )
    return hu


def check_encoding(slices: list[Slice], warnings: list[str]) -> None:
    """Refuse encodings that lose HU or cannot be decoded; warn of lossy encodings."""
    for syntax, image in {str(image.header.file_meta.get("TransferSyntaxUID", "")): image for image in slices}.items():
        bits = integer(image.header, "BitsStored", 16)
        if syntax in UNDECODABLE:
            raise CTInstructError(f"{image.path.name} is stored as {UID(syntax).name}, for which there is no decoder.")
        if syntax in EIGHT_BIT_JPEG:
            raise CTInstructError(
                f"{image.path.name} is stored as {UID(syntax).name}, which keeps 8 bits of {bits}: its HU are lost."
            )
        if syntax in LOSSY:
            warnings.append(f"Pixels are stored lossy ({UID(syntax).name}): HU are a few off.")
        elif text(image.header, "LossyImageCompression") == "01":
            warnings.append("Pixels were stored lossy before (LossyImageCompression 01): HU are a few off.")


def check_rescale(slices: list[Slice], warnings: list[str]) -> None:
    """Refuse rescales that give no HU; warn of missing or unusual rescales."""
    name = f"{slices[0].path.name} and its series"
    for unit in dict.fromkeys(image.unit.upper() for image in slices):
        if unit in NO_HU:
            raise CTInstructError(f"{name} hold {unit} (RescaleType) instead of HU: expected CT in HU.")
        if unit not in ("", "HU"):
            warnings.append(f"RescaleType is {unit[:16]} instead of HU: the values are taken as HU.")
    absent = Counter(
        " and ".join(part for part, value in (("slope", image.slope), ("intercept", image.intercept)) if value is None)
        for image in slices
    )
    for part, meaning in (
        ("slope and intercept", "stored values are taken as HU"),
        ("slope", "1 is taken"),
        ("intercept", "0 is taken"),
    ):
        if absent[part]:
            warnings.append(f"{absent[part]} slices have no rescale {part}: {meaning}.")
    rescales = {(1.0 if image.slope is None else image.slope, image.intercept or 0.0) for image in slices}
    if not all(slope != 0 and np.isfinite([slope, intercept]).all() for slope, intercept in rescales):
        raise CTInstructError(
            f"{name} have a rescale slope of 0 or a rescale that is no number: HU cannot be computed."
        )
    if len(rescales) > 1:
        warnings.append("Rescale slope and intercept differ between slices: each slice is rescaled by its header.")


def rescaled(stored: np.ndarray, image: Slice, dtype: Any, wrong_sign: list[str], keep_padding: bool) -> np.ndarray:
    """One slice in HU from its stored words, its padding set to air unless it is to be kept."""
    slope = image.slope if image.slope is not None else 1.0
    intercept = image.intercept or 0.0
    words, stored = stored, significant(stored, image)
    padded = padding_of(words, stored, image)
    if stored.dtype == np.uint16 and integer(image.header, "BitsStored", 16) == 16:
        # values of 32768 and more, far above any HU, are negative numbers stored as unsigned
        highest = int(stored.max() if padded is None else stored.max(initial=0, where=~padded))
        if highest >= 2**15 and highest * slope + intercept > 16000:
            stored = stored.view(np.int16)
            wrong_sign.append(image.path.name)
    values: np.ndarray
    if np.dtype(dtype) == np.int16:
        lowest = np.iinfo(np.int16).min if keep_padding else AIR_HU
        low, high = int(stored.min()) + int(intercept), int(stored.max()) + int(intercept)
        usual = slope == 1 and padded is None and stored.dtype.itemsize == 2 and abs(intercept) < 2**15
        if usual and low >= -(2**15) and high < 2**15:
            values = stored.view(np.int16) + np.int16(intercept)  # wraps where uint16 does, so the sum is right
            return values if low >= lowest else np.maximum(values, np.int16(lowest), out=values)
        wide = stored.astype(np.int64 if stored.dtype.itemsize > 2 else np.int32) * int(slope) + int(intercept)
        values = wide.clip(lowest, np.iinfo(np.int16).max).astype(np.int16)
    else:
        values = stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    if padded is not None and not keep_padding:
        values[padded] = AIR_HU
    return values


def significant(words: np.ndarray, image: Slice) -> np.ndarray:
    """The BitsStored bits below and with HighBit, sign extended; the other bits of a word are undefined."""
    allocated = 8 * words.dtype.itemsize
    bits = integer(image.header, "BitsStored", allocated)
    high = integer(image.header, "HighBit", bits - 1)
    if not 0 < bits <= allocated or not bits - 1 <= high < allocated:
        raise CTInstructError(f"{image.path.name} has {bits} bits stored up to bit {high} of {allocated}: refused.")
    if bits == allocated:
        return words
    return (words << (allocated - 1 - high)) >> (allocated - bits)


def padding_of(words: np.ndarray, stored: np.ndarray, image: Slice) -> np.ndarray | None:
    """bool [rows, columns]: pixels in the range PixelPaddingValue to PixelPaddingRangeLimit; None if there are none."""
    value, limit = (image.header.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"))
    if not isinstance(value, int):
        return None
    bits, signed = integer(image.header, "BitsStored", 16), stored.dtype.kind == "i"
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    if signed and high >= 2 ** (bits - 1) and high < 2**bits:  # written as unsigned
        low, high = sorted((low - 2**bits if low >= 2 ** (bits - 1) else low, high - 2**bits))
    elif not signed and low < 0:  # written as signed
        wrap = 2 ** (8 * stored.dtype.itemsize)
        low, high = sorted((low + wrap, high + wrap if high < 0 else high))
    if high >= 2**bits:  # outside the bits of a pixel: compared with the whole word
        stored = words.view(np.uint16) if words.dtype.itemsize == 2 else words
    padded = (stored == low) if low == high else (stored >= low) & (stored <= high)
    return padded if padded.any() else None


def decode(path: Path, header: Any) -> np.ndarray:
    """Stored words of a file, (rows, columns) or (frames, rows, columns)."""
    syntax = UID(str(header.file_meta.get("TransferSyntaxUID", "1.2.840.10008.1.2")))
    try:
        if syntax in _PLAIN and integer(header, "BitsAllocated", 16) == 16:
            plain = _plain_pixels(path, header, syntax)
            if plain is not None:
                return plain
        data = pydicom.dcmread(path, force=True)
        data.file_meta.TransferSyntaxUID = syntax
        if "PixelData" not in data:
            raise CTInstructError(f"{path.name} has no integer pixels (PixelData): expected CT in HU.")
        if syntax == RLELossless:  # decoded as whole words; `significant` selects the bits
            data.BitsStored, data.HighBit = data.BitsAllocated, data.BitsAllocated - 1
            return data.pixel_array
        if syntax.is_encapsulated:
            return _decompressed(data, path.name, syntax)
        return native(data, path.name)
    except CTInstructError:
        raise
    except Exception as error:
        raise CTInstructError(f"{path.name} cannot be decoded ({syntax.name}): {last_line(error)}") from error


def _decompressed(data: Any, name: str, syntax: UID) -> np.ndarray:
    """Compressed pixels by GDCM, from a file with nothing but the pixels: GDCM itself would rescale and invert them."""
    import SimpleITK

    bare = Dataset()
    bare.file_meta = FileMetaDataset()
    bare.file_meta.TransferSyntaxUID = syntax
    bare.file_meta.MediaStorageSOPClassUID = bare.SOPClassUID = UID(SECONDARY_CAPTURE)
    bare.file_meta.MediaStorageSOPInstanceUID = bare.SOPInstanceUID = pydicom.uid.generate_uid()
    for tag in ("Rows", "Columns", "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        if tag in data:
            setattr(bare, tag, data[tag].value)
    bare.SamplesPerPixel, bare.PhotometricInterpretation = 1, "MONOCHROME2"
    if integer(data, "HighBit", 15) != integer(data, "BitsStored", 16) - 1:
        raise CTInstructError(f"{name} has compressed pixels that do not end at the lowest bit (HighBit).")
    for frame in generate_frames(data.PixelData, number_of_frames=integer(data, "NumberOfFrames", 1)):
        size = coded_size(frame)
        if size not in (None, (data.Rows, data.Columns)):
            raise CTInstructError(
                f"{name} holds an image of {size} pixels, its header says {(data.Rows, data.Columns)}."
            )
    bare["PixelData"] = data["PixelData"]
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    with tempfile.TemporaryDirectory(prefix=f"ctinstruct-pixels-{os.getpid()}-") as folder:
        file = Path(folder, "pixels.dcm")
        bare.save_as(file, enforce_file_format=True)
        reader = SimpleITK.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(file))
        words = SimpleITK.GetArrayFromImage(reader.Execute())
    allocated, signed = int(data.BitsAllocated), int(data.PixelRepresentation) == 1
    return words.astype(f"{'i' if signed else 'u'}{allocated // 8}")


def coded_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) in the header of a JPEG, JPEG-LS or JPEG 2000 stream; None where it is not found."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 4096)  # JPEG 2000: start, then its size
    if start >= 0:
        right, bottom, left, top = (int.from_bytes(frame[start + at : start + at + 4]) for at in range(8, 24, 4))
        return bottom - top, right - left
    at = 2
    while frame.startswith(b"\xff\xd8") and at + 9 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):  # start of a frame
            rows, columns = int.from_bytes(frame[at + 5 : at + 7]), int.from_bytes(frame[at + 7 : at + 9])
            return (rows, columns) if rows and columns else None
        at += 1 if marker == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4])
    return None


def read_plain(image: Slice, hu: np.ndarray, keep_padding: bool) -> bool:
    """Read a slice of 16-bit little endian and slope 1 straight into `hu` [rows, columns]; False for any other."""
    header = image.header
    syntax = str(header.file_meta.get("TransferSyntaxUID", ""))
    bits = integer(header, "BitsStored", 16)
    slope, intercept = 1.0 if image.slope is None else image.slope, image.intercept or 0.0
    if syntax not in _PLAIN or slope != 1 or abs(intercept) >= 2**14 or bits not in (12, 16) or image.frame:
        return False
    if integer(header, "BitsAllocated", 16) != 16 or integer(header, "HighBit", bits - 1) != bits - 1:
        return False
    if "PixelPaddingValue" in header:
        return False
    if integer(header, "NumberOfFrames", 1) != 1:
        return False
    with open(image.path, "rb") as stream:
        if not _at_plain_pixels(stream, header, syntax, hu.size):
            return False
        if stream.readinto(hu.data.cast("B")) != hu.nbytes:
            return False
    low, high = int(hu.min()), int(hu.max())
    signed = integer(header, "PixelRepresentation", 0) == 1
    if (
        (not signed and low < 0)
        or (bits == 12 and (signed or high >= 2**12))
        or not -(2**15) <= low + intercept <= high + intercept < 2**15
    ):
        return False
    if intercept:
        hu += np.int16(intercept)
    if not keep_padding and low + intercept < AIR_HU:
        np.maximum(hu, np.int16(AIR_HU), out=hu)
    return True


def _at_plain_pixels(stream: Any, header: Any, syntax: str, count: int) -> bool:
    """Moves to the first pixel; False where the header does not end at plain pixels of that count."""
    stream.seek(header.pixel_offset)
    start = stream.read(12)
    if len(start) < 12 or start[:4] != b"\xe0\x7f\x10\x00":
        return False
    explicit = syntax == _PLAIN[1]
    length = int.from_bytes(start[8:12] if explicit else start[4:8], "little")
    stream.seek(header.pixel_offset + (12 if explicit else 8))
    return 2 * count <= length != 0xFFFFFFFF


_PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")  # little endian, implicit and explicit


def _plain_pixels(path: Path, header: Any, syntax: str) -> np.ndarray | None:
    """Little-endian 16-bit pixels straight from where the header ends; None where they do not start there."""
    signed = "i" if integer(header, "PixelRepresentation", 0) == 1 else "u"
    shape = (integer(header, "NumberOfFrames", 1), int(header.Rows), int(header.Columns))
    count = shape[0] * shape[1] * shape[2]
    with open(path, "rb") as stream:
        if not _at_plain_pixels(stream, header, syntax, count):
            return None
        array = np.fromfile(stream, dtype=f"<{signed}2", count=count)
    if len(array) < count:
        raise CTInstructError(f"{path.name} is cut short: {2 * len(array)} of {2 * count} bytes of pixels are there.")
    return array.reshape(shape)


def native(data: Any, name: str) -> np.ndarray:
    """Uncompressed words of 8, 16 or 32 bits, without a copy where their byte order is the machine's."""
    size, remainder = divmod(int(data.BitsAllocated), 8)
    if remainder or size not in (1, 2, 4):
        raise CTInstructError(f"{name} has {data.BitsAllocated} bits per pixel: expected 8, 16 or 32.")
    order = ">" if not data.original_encoding[1] else "<"
    signed = "i" if int(data.PixelRepresentation) == 1 else "u"
    count = int(data.get("NumberOfFrames", 1) or 1) * int(data.Rows) * int(data.Columns)
    raw = data.PixelData
    if len(raw) < size * count:
        raise CTInstructError(f"{name} is cut short: {len(raw)} of {size * count} bytes of pixels are there.")
    if order == ">" and size == 1 and data["PixelData"].VR == "OW":
        raw = np.frombuffer(raw[: len(raw) // 2 * 2], np.uint16).byteswap().tobytes()
    array = np.frombuffer(raw, dtype=f"{order}{signed}{size}", count=count)
    return array.astype(array.dtype.newbyteorder("="), copy=False).reshape(-1, int(data.Rows), int(data.Columns))
