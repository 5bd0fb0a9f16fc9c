"""Decode an open file to the pixels of an upright image, or say why it cannot be used."""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, ImageSequence, UnidentifiedImageError

from ..errors import one_line

Array = NDArray[Any]
# How many times smaller (1, 2, 4 or 8) an image of so many rows and columns may be decoded.
Reduction = Callable[[int, int], int]
# The values that become black and white in images of more than 8 bits; None: the full 16-bit range.
ValueRange = tuple[float, float] | None
EXIF_ORIENTATION = 0x0112
# Formats that are read, whatever the file is called. None of them runs a program, as PostScript does.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")


class BadImage(Exception):
    """An image cannot be used; the message says why."""


def decode(
    file: BinaryIO | Array, channels: int, reduction: Reduction | None = None, value_range: ValueRange = None
) -> Array:
    """Return the image in an open file or an array, uint8 [channels, H, W], upright; alpha on white unless 4 channels.

    16-bit values are scaled to 8 bits, by `value_range` if given, and then 32-bit values too. An animation gives its
    first frame. JPEG is decoded smaller by the factor that `reduction` returns, which is faster. Raises `BadImage` for
    an incomplete file or another number of channels.
    """
    with _opened(file) as image:
        if isinstance(image, np.ndarray):
            return from_array(image, channels, value_range)
        if value_range and image.mode in ("LA", "RGB", "RGBA") and ";16" in str(image.tile):
            raise BadImage("16-bit colours, of which PIL reads 8 bits; --value_range needs grey images or .npy")
        if reduction is not None and image.format == "JPEG":
            _reduce(image, reduction)
        read = _pixels if channels in (1, 3, 4) else _stack
        return read(image, channels, value_range)


@contextlib.contextmanager
def _opened(file: BinaryIO | Array) -> Iterator[ImageFile.ImageFile | Array]:
    """Open an image or array by its content; turn any error inside the context into `BadImage`."""
    if isinstance(file, np.ndarray):
        yield file
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            magic = file.read(6)
            file.seek(0)
            if magic == b"\x93NUMPY":
                yield np.load(file, allow_pickle=False)
            else:
                if magic.startswith(b"\x89PNG"):
                    # Check the checksums, which PIL skips when it reads pixels: damage would pass as other colours.
                    Image.open(file, formats=["PNG"]).verify()
                    file.seek(0)
                with Image.open(file, formats=_formats()) as image:
                    yield image
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image in a known format" if magic else "the file is empty") from None
    except Exception as error:
        # Decoders raise OSError, SyntaxError, ValueError, struct.error, MemoryError and others.
        raise BadImage(one_line(error)) from error


def from_array(array: Array, channels: int, value_range: ValueRange = None) -> Array:
    """Return uint8 [channels, H, W] of an array [H, W], [H, W, C] or [C, H, W]; any numbers if given their range."""
    if array.ndim == 2:
        array = array[None]
    elif array.ndim != 3:
        raise BadImage(f"array of shape {array.shape} is not an image")
    elif array.shape[2] == channels or array.shape[0] not in (1, channels):
        array = array.transpose(2, 0, 1)
    if array.dtype == np.uint16 or (value_range and array.dtype != np.uint8 and array.dtype.kind in "iuf"):
        array = _to_8_bit(array, value_range)
    if array.dtype != np.uint8:
        raise BadImage(f"{array.dtype} values, not uint8 or uint16, and no --value_range")
    if len(array) == 1 and channels == 3:
        array = array.repeat(3, axis=0)
    if len(array) != channels:
        raise BadImage(f"{len(array)} channels, not {channels}")
    if not array.size:
        raise BadImage("no pixels")
    return np.ascontiguousarray(array)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_8_bit(values: Array, value_range: ValueRange) -> Array:
    if value_range is None:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    low, high = value_range
    # NaN (no data) becomes the lowest value.
    inside = np.fmin(np.fmax(values.astype(np.float32), low), high)
    return np.rint((inside - low) * (255 / (high - low))).astype(np.uint8)


def _gray_16_bit(image: Image.Image) -> bool:
    # Old PIL releases, and PPM in all releases, hold 16 bits in a 32-bit mode.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _pixels(image: Image.Image, channels: int, value_range: ValueRange) -> Array:
    ImageOps.exif_transpose(image, in_place=True)
    if _gray_16_bit(image) or (value_range and image.mode in ("I", "F")):
        image = Image.fromarray(_to_8_bit(np.asarray(image), value_range))
    elif image.mode in ("I", "F"):
        raise BadImage(f"32-bit values (mode {image.mode}) of unknown range, not 8 or 16 bits, and no --value_range")
    if image.has_transparency_data and channels != 4:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    return np.atleast_3d(pixels).transpose(2, 0, 1)


def _reduce(image: Image.Image, reduction: Reduction) -> None:
    width, height = image.size
    sideways = image.getexif().get(EXIF_ORIENTATION, 1) >= 5
    times = reduction(width, height) if sideways else reduction(height, width)
    image.draft(image.mode, (width // times, height // times))


def _stack(image: Image.Image, channels: int, value_range: ValueRange) -> Array:
    """Return the frames of a grey stack as channels."""
    frames = []
    for frame in itertools.islice(ImageSequence.Iterator(image), channels + 1):
        if not (frame.mode == "L" or _gray_16_bit(frame) or (value_range and frame.mode in ("I", "F"))):
            raise BadImage(f"frames of mode {frame.mode}, not grey ones for {channels} channels")
        pixels = np.array(frame)
        frames.append(pixels if frame.mode == "L" else _to_8_bit(pixels, value_range))
    if len(frames) != channels or len({frame.shape for frame in frames}) != 1:
        raise BadImage(f"not a stack of {channels} frames of one size, for {channels} channels")
    return np.stack(frames)


def highest_value(file: BinaryIO | Array) -> int | None:
    """Return the highest value of a 16-bit image or array, None for others; raises `BadImage`."""
    with _opened(file) as image:
        if isinstance(image, np.ndarray):
            return int(image.max()) if image.dtype == np.uint16 and image.size else None
        if not _gray_16_bit(image):
            return None
        return max(int(np.asarray(frame).max()) for frame in ImageSequence.Iterator(image))


def longer_side(file: BinaryIO | Array) -> int:
    """Return the longer side in pixels of an image or array; raises `BadImage`."""
    with _opened(file) as image:
        return int(max(image.shape if isinstance(image, np.ndarray) else image.size))
