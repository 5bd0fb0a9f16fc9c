import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from pictures import PHOTO, VIEWS, decode, encoded, npy, photo
from PIL import Image

from byol_timm.data import EXTENSIONS, BadImage, decoding, open_dataset


def ramp(dtype, top):
    """A grey image whose mean is half of the largest value."""
    return np.tile(np.linspace(0, top, 64).astype(dtype), (48, 1))


HALF_TRANSPARENT = Image.new("RGBA", (8, 6), (255, 0, 0, 128))
MEANS_ON_WHITE = {
    "RGBA": (HALF_TRANSPARENT, (255, 127, 127)),
    "LA": (Image.new("LA", (8, 6), (0, 128)), (127, 127, 127)),
    "LA, transparent": (Image.new("LA", (8, 6), (0, 0)), (255, 255, 255)),
    "RGB": (Image.new("RGB", (8, 6), (9, 8, 7)), (9, 8, 7)),
    "L": (Image.new("L", (8, 6), 77), (77, 77, 77)),
    "1": (Image.new("1", (8, 6), 1), (255, 255, 255)),
    "P": (Image.new("RGB", (8, 6), (200, 10, 10)).quantize(2), (200, 10, 10)),
}


@pytest.mark.parametrize("name", MEANS_ON_WHITE)
def test_every_mode_becomes_rgb_on_white(name):
    image, color = MEANS_ON_WHITE[name]
    pixels = decode(encoded(image))
    assert pixels.shape == (3, 6, 8) and pixels.dtype == np.uint8
    assert np.abs(pixels.mean((1, 2)) - color).max() <= 1


def test_cmyk_becomes_rgb():
    pixels = decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(pixels.mean((1, 2)) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("transparency", [0, b"\x00\x80"])
def test_transparent_palette_lies_on_white(transparency):
    image = Image.new("P", (8, 6), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (4, 0, 8, 6))
    pixels = decode(encoded(image, transparency=transparency))
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 0, 7].tolist() == ([0, 0, 255] if transparency == 0 else [127, 127, 255])


def test_a_reduction_makes_jpeg_smaller_and_is_asked_about_the_upright_image():
    image, exif = photo(320, 200), Image.Exif()
    exif[0x0112] = 6
    sizes = []

    def quarter(height, width):
        sizes.append((height, width))
        return 4

    upright, sideways = (encoded(image, "JPEG", quality=95, **kwargs) for kwargs in ({}, {"exif": exif}))
    small = decoding.decode(io.BytesIO(upright), 3, quarter)
    assert small.shape == (3, 50, 80)
    assert decoding.decode(io.BytesIO(sideways), 3, quarter).shape == (3, 80, 50)
    assert sizes == [(200, 320), (320, 200)]
    blocks = decode(upright).reshape(3, 50, 4, 80, 4).mean((2, 4))
    assert np.abs(small - blocks).mean() < 2
    assert decoding.decode(io.BytesIO(encoded(image)), 3, quarter).shape == (3, 200, 320)


def test_four_channels_keep_alpha():
    assert decode(encoded(HALF_TRANSPARENT), 4)[:, 0, 0].tolist() == [255, 0, 0, 128]
    assert decode(encoded(photo(8, 6)), 4)[3].min() == 255


def test_one_channel_is_grey():
    pixels = decode(encoded(Image.new("RGB", (8, 6), (0, 255, 0))), 1)
    assert pixels.shape == (1, 6, 8) and abs(int(pixels[0, 0, 0]) - 150) <= 1
    assert decode(encoded(HALF_TRANSPARENT), 1).shape == (1, 6, 8)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_to_8(format, channels):
    pixels = decode(encoded(Image.fromarray(ramp(np.uint16, 65535)), format), channels)
    assert pixels.shape == (channels, 48, 64)
    assert pixels.min() == 0 and pixels.max() == 255 and abs(pixels.mean() - 127.5) <= 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "npy", "stack"])
def test_a_value_range_spreads_what_12_bits_hold(kind):
    values, channels = ramp(np.uint16, 4095), 2 if kind == "stack" else 1
    image, options = Image.fromarray(values), {}
    if kind == "stack":
        options = dict(save_all=True, append_images=[image])
    content = npy(values) if kind == "npy" else encoded(image, "PNG" if kind == "PNG" else "TIFF", **options)
    assert len(np.unique(decode(content, channels))) == 17
    spread = decode(content, channels, value_range=(0, 4095))
    assert len(np.unique(spread)) == 64 and np.array_equal(spread[0], np.rint(values * (255 / 4095)))
    assert np.array_equal(decode(content, channels, value_range=(0, 65535)), decode(content, channels))
    clamped = decode(content, channels, value_range=(1000, 2000))[0]
    assert (clamped[values < 1000] == 0).all() and (clamped[values > 2000] == 255).all()
    assert decoding.highest_value(io.BytesIO(content)) == 4095


def test_a_value_range_leaves_8_bits_alone():
    for content in (encoded(photo(8, 6)), encoded(photo(8, 6), "JPEG"), npy(np.asarray(photo(8, 6)))):
        assert np.array_equal(decode(content, value_range=(0, 4095)), decode(content))
        assert decoding.highest_value(io.BytesIO(content)) is None


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_a_value_range_gives_other_numbers_their_meaning(dtype):
    values = np.array([[-2000, -1000, 0, 3000]], dtype)
    for content in (npy(values), *([encoded(Image.fromarray(values), "TIFF")] if dtype != np.int16 else [])):
        assert decode(content, 1, value_range=(-1000, 1000)).tolist() == [[[0, 0, 128, 255]]]


def test_without_data_is_the_lowest_value():
    assert decode(npy(np.array([[np.nan, 2, 1]], np.float32)), 1, value_range=(0, 2)).tolist() == [[[0, 255, 128]]]


def test_16_bit_colours_are_bad_with_a_value_range():
    """PIL has 8 of their bits, to which no range applies."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 4, 1, 16, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0" + np.full(12, 4000, ">u2").tobytes()), b"IEND"]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )
    assert decode(content).max() == 4000 >> 8
    with pytest.raises(BadImage, match="16-bit colours"):
        decode(content, value_range=(0, 4095))


def test_big_endian_16_bits_are_scaled_too():
    values = ramp(np.uint16, 65535)
    header = struct.pack(">2sHIH", b"MM", 42, 8, 8)
    tags = [(256, 64), (257, 48), (258, 16), (259, 1), (262, 1), (273, 110), (278, 48), (279, values.size * 2)]
    body = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags)
    content = (header + body + bytes(4)).ljust(110, b"\0") + values.astype(">u2").tobytes()
    assert np.array_equal(decode(content, 1)[0], decode(encoded(Image.fromarray(values)), 1)[0])


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_of_unknown_range_are_bad(dtype):
    with pytest.raises(BadImage, match="32-bit values"):
        decode(encoded(Image.fromarray(ramp(dtype, 1000)), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_is_applied(orientation, format):
    exif = Image.Exif()
    exif[274] = orientation
    # Red lies left in the file; turned by 90 degrees it lies above or below.
    image = Image.new("RGB", (64, 48), "blue")
    image.paste((255, 0, 0), (0, 0, 32, 48))
    pixels = decode(encoded(image, format, exif=exif))
    assert pixels.shape == ((3, 48, 64) if orientation < 5 else (3, 64, 48))
    red = pixels[0].astype(int)
    halves = [red[:, :20].mean(), red[:, -20:].mean()] if orientation < 5 else [red[:20].mean(), red[-20:].mean()]
    assert (halves[0] > halves[1]) == (orientation in (1, 4, 5, 6))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation_counts(format):
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "blue", "lime")]
    options = {} if format == "TIFF" else {"duration": 40}
    if format == "WEBP":
        options["lossless"] = True
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert decode(content)[:, 5, 5].tolist() == [255, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_tiny_images_are_accepted(size):
    assert decode(encoded(PHOTO.resize(size))).shape == (3, size[1], size[0])
    pixels = torch.from_numpy(decode(encoded(PHOTO.resize(size))))
    assert VIEWS.cut(pixels, 0).shape == (2, 3, 16, 16)


def png(width, height):
    """A PNG that says so, with hardly any pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(bytes(100))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
    )


def test_images_beyond_the_limit_of_pixels_are_bad_by_their_header():
    with pytest.raises(BadImage, match="exceeds limit of 178956970 pixels"):
        decode(png(20_000, 10_000))


def test_warnings_of_decoders_do_not_leak():
    with warnings.catch_warnings(record=True) as leaked:
        with pytest.raises(BadImage):
            decode(png(10_000, 10_000))
        decode(encoded(Image.new("P", (4, 4)), transparency=b"\x00"))
    assert not leaked


@pytest.mark.parametrize("channels", [2, 5, 13])
def test_arrays_and_stacks_give_as_many_channels_as_asked(channels):
    array = np.random.default_rng(0).integers(0, 256, (channels, 12, 10), dtype=np.uint8)
    frames = [Image.fromarray(plane) for plane in array]
    stack = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    wide = [Image.fromarray(plane.astype(np.uint16) * 257) for plane in array]
    deep = encoded(wide[0], "TIFF", save_all=True, append_images=wide[1:])
    for content in (npy(array), npy(array.transpose(1, 2, 0)), npy(array.astype(np.uint16) * 257), stack, deep):
        assert np.array_equal(decode(content, channels), array)


@pytest.mark.parametrize(
    ("content", "channels", "reason"),
    [
        (npy(np.zeros((4, 6, 5), np.uint8)), 7, "channels, not 7"),
        (npy(np.zeros((6, 5), np.uint8)), 5, "1 channels, not 5"),
        (npy(np.zeros((6, 5, 3), np.float32)), 3, "float32 values"),
        (npy(np.zeros(6, np.uint8)), 3, "is not an image"),
        (npy(np.zeros((0, 5, 3), np.uint8)), 3, "no pixels"),
        (npy(np.array([{}], dtype=object), allow_pickle=True), 3, "allow_pickle=False"),
        (npy(np.zeros((6, 5, 3), np.uint8))[:-1], 3, "."),
        (encoded(photo(8, 6)), 5, "frames of mode RGB"),
        (encoded(photo(8, 6).convert("L")), 5, "not a stack of 5 frames"),
        (encoded(photo(8, 6), "TIFF", save_all=True, append_images=[photo(8, 6)] * 4), 5, "frames of mode RGB"),
    ],
)
def test_other_numbers_of_channels_are_bad(content, channels, reason):
    with pytest.raises(BadImage, match=reason):
        decode(content, channels)


def test_grey_arrays_become_rgb():
    array = np.arange(30, dtype=np.uint8).reshape(5, 6)
    for content in (npy(array), npy(array[None]), npy(array[..., None])):
        assert np.array_equal(decode(content), np.stack([array] * 3))


CONTENTS = {
    "PNG": encoded(photo(60, 40)),
    "PNG, palette": encoded(photo(60, 40).quantize(16), transparency=3),
    "PNG, 16 bit": encoded(Image.fromarray(np.asarray(photo(60, 40).convert("L")).astype(np.uint16) * 257)),
    "JPEG": encoded(photo(60, 40), "JPEG"),
    "JPEG, progressive": encoded(photo(60, 40), "JPEG", progressive=True),
    "WEBP": encoded(photo(60, 40), "WEBP"),
    "GIF": encoded(photo(60, 40), "GIF"),
    "BMP": encoded(photo(60, 40), "BMP"),
    "TIFF": encoded(photo(60, 40), "TIFF"),
    "TIFF, LZW": encoded(photo(60, 40), "TIFF", compression="tiff_lzw"),
    "PPM": encoded(photo(60, 40), "PPM"),
    "JPEG2000": encoded(photo(60, 40), "JPEG2000"),
    "npy": npy(np.asarray(photo(60, 40))),
}


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_truncated_files_are_bad(name, share):
    content = CONTENTS[name]
    with pytest.raises(BadImage):
        decode(content[: int(share * len(content))])


@pytest.mark.parametrize("name", CONTENTS)
def test_files_without_their_last_bytes_are_bad_unless_no_pixel_is_missing(name):
    whole = decode(CONTENTS[name])
    for missing in range(1, 60):
        try:
            assert np.array_equal(decode(CONTENTS[name][:-missing]), whole)
        except BadImage:
            pass


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html><body>404 Not Found</body></html>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "."),
        (bytes(1000), "not an image"),
    ],
)
def test_what_is_no_image_is_bad(content, reason):
    with pytest.raises(BadImage, match=reason):
        decode(content)


def test_a_flipped_byte_in_compressed_png_data_is_bad():
    content = bytearray(encoded(photo(60, 40)))
    place = content.index(b"IDAT") + 2000
    content[place] ^= 0xFF
    with pytest.raises(BadImage):
        decode(bytes(content))


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F", "LAB")


def damaged(kind, random):
    """A damaged file, and what it may still decode to: an image of any looks (None), or this one and no other."""
    name = random.choice(list(CONTENTS))
    content = bytearray(CONTENTS[name])
    # Checksums or lengths tell; in other formats and places a wrong pixel looks like a right one.
    still = decode(CONTENTS[name]) if kind == "cut" or name == "PNG" else None
    if kind == "flipped":
        for position in random.integers(0, len(content), random.integers(1, 9)):
            content[position] ^= 1 << random.integers(8)
    elif kind == "cut":
        del content[random.integers(0, len(content)) :]
    elif kind == "hole":
        start = random.integers(0, len(content))
        content[start : start + 30] = random.bytes(30)
    elif kind == "mixed":
        other = CONTENTS[random.choice(list(CONTENTS))]
        content[random.integers(0, len(content)) :] = other[random.integers(0, len(other)) :]
        still = None
    elif kind == "odd mode":
        gray = np.asarray(photo(60, 40).convert("L")).astype(np.uint16) * 257
        mode = random.choice(MODES)
        image = Image.fromarray(gray) if mode == "I;16" else photo(60, 40).convert(str(mode))
        content = encoded(image, "TIFF")
        still = np.stack([gray // 257] * 3) if mode == "I;16" else np.empty(0) if mode in ("I", "F") else None
    elif kind == "exif":
        exif = b"Exif\0\0" + random.choice([b"II*\0", b"MM\0*"]) + random.bytes(60)
        content = encoded(photo(60, 40), "JPEG", exif=exif)
        still = decode(encoded(photo(60, 40), "JPEG"))
    return content, still


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_either_decode_to_an_image_or_are_bad(seed, tmp_path):
    """54 files each, with whatever extension; nothing passes as another image where the file can tell."""
    random = np.random.default_rng(seed)
    kinds = ("flipped", "cut", "hole", "mixed", "odd mode", "exif")
    files = [damaged(kinds[place % 6], random) for place in range(54)]
    for place, (content, _) in enumerate(files):
        (tmp_path / f"{place}{random.choice(EXTENSIONS)}").write_bytes(content)
    images = open_dataset(str(tmp_path)).train
    assert len(images) == len(files)
    outcomes = []
    for index, (_, still) in enumerate(files):
        try:
            pixels = images.decode(index)
        except BadImage as reason:
            assert str(reason) and "\n" not in str(reason)
            outcomes.append("bad")
        else:
            assert pixels.dtype == torch.uint8 and pixels.ndim == 3 and len(pixels) == 3 and pixels.numel()
            # Turned, perhaps, as noise in the EXIF data may ask for.
            assert still is None or np.array_equal(np.sort(pixels, axis=None), np.sort(still, axis=None)), index
            outcomes.append("image")
    assert {"image", "bad"} == set(outcomes)
