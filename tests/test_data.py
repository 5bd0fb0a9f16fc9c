import io
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from byol_timm import data
from byol_timm.augment import AUGMENTATIONS, EvaluationTransform, TwoViews
from byol_timm.data import (
    BadImage,
    TrainingBatches,
    epoch_order,
    evaluation_batches,
    fingerprint,
    load_pixels,
    open_dataset,
    subset_indices,
)
from byol_timm.errors import ByolTimmError

DIGITS = load_digits()
PHOTO = Image.fromarray(load_sample_images().images[1])
VIEWS = TwoViews(AUGMENTATIONS["paper"], 16, mean=(0.5,), std=(0.5,))


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def photo(width, height, place=0):
    """A cut of a photograph."""
    left, top = 7 * place % (PHOTO.width - width), 5 * place % (PHOTO.height - height)
    return PHOTO.crop((left, top, left + width, top + height))


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def write_folder(folder, names, image=lambda place: photo(20, 16, place)):
    for place, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(place).save(path)
    return str(folder)


def decode(content, channels=3):
    return data.decode(io.BytesIO(content), channels)


def digits_table(count=200, labels=None, **features):
    """Digits as a table like those on the Hub."""
    images = [{"bytes": encoded(Image.fromarray((scan * 15).astype(np.uint8)))} for scan in DIGITS.images[:count]]
    labels = DIGITS.target[:count].tolist() if labels is None else labels
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))} | features
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=datasets.Features(features))


def pixels_of(images):
    return [images.decode(index) for index in range(len(images))]


def take(batches, count):
    with batches:
        return list(itertools.islice(batches, count))


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


# Order


def test_order_of_an_epoch_is_a_permutation_that_seed_and_epoch_decide():
    orders = [epoch_order(seed, epoch, 100) for seed in (0, 1, -1) for epoch in (0, 1, 2)]
    for order in orders:
        assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(100))
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    assert torch.equal(epoch_order(1, 2, 100), orders[5])


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 3)])
def test_images_of_a_step_do_not_depend_on_how_it_is_cut(world, accumulation):
    images, global_batch = open_dataset().train, 240
    batch_size = global_batch // (world * accumulation)
    ranks = [
        take(
            TrainingBatches(
                images, batch_size=batch_size, global_batch=global_batch, rank=rank, world=world, cut=VIEWS.cut
            ),
            12 * accumulation,
        )
        for rank in range(world)
    ]
    steps_per_epoch = len(images) // global_batch
    for step in range(12):
        micro = slice(step * accumulation, (step + 1) * accumulation)
        # Micro-batch after micro-batch, and in each rank after rank.
        batches = [batch for batches in zip(*(batches[micro] for batches in ranks), strict=True) for batch in batches]
        assert all(len(batch.ordinals) == batch_size for batch in batches)
        ordinals = torch.cat([batch.ordinals for batch in batches])
        epoch, place = divmod(step, steps_per_epoch)
        order = epoch_order(0, epoch, len(images))[place * global_batch :][:global_batch]
        assert torch.equal(ordinals, order + epoch * len(images))


@pytest.mark.parametrize("memory_limit", [0, 2**30])
def test_resuming_gives_the_rest_of_the_same_batches(memory_limit):
    images = open_dataset().train.subset(range(50))
    settings = dict(batch_size=5, global_batch=20, cut=VIEWS.cut, seed=3, workers=0, memory_limit=memory_limit)
    whole = take(TrainingBatches(images, **settings), 28)
    rest = take(TrainingBatches(images, start_step=5, **settings), 8)
    for batch, again in zip(whole[20:], rest, strict=True):
        assert torch.equal(batch.ordinals, again.ordinals)
        for first, second in ((batch.images, again.images), (batch.crops, again.crops)):
            assert first is second is None or torch.equal(first, second)


def test_iterating_again_starts_again():
    batches = TrainingBatches(open_dataset().train, batch_size=8, global_batch=8, cut=VIEWS.cut)
    first, again = next(iter(batches)), next(iter(batches))
    assert torch.equal(first.ordinals, again.ordinals)


# Paths


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """300 photographs of one size, more than are read without workers."""
    return write_folder(tmp_path_factory.mktemp("photos"), [f"{place}.png" for place in range(300)])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_in_memory_hold_the_decoded_images(photos, workers):
    images = open_dataset(photos).train
    batches = TrainingBatches(images, batch_size=10, global_batch=20, cut=VIEWS.cut, workers=workers)
    assert batches.in_memory
    for batch in take(batches, 20):
        assert batch.crops is None and batch.images.dtype == torch.uint8
        for pixels, ordinal in zip(batch.images, batch.ordinals.tolist(), strict=True):
            assert torch.equal(pixels, images.decode(ordinal % len(images)))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_give_the_crops_of_the_same_images(photos, workers):
    images = open_dataset(photos).train
    settings = dict(batch_size=10, global_batch=20, cut=VIEWS.cut)
    batches = TrainingBatches(images, workers=workers, memory_limit=0, **settings)
    assert not batches.in_memory
    for batch, held in zip(take(batches, 20), take(TrainingBatches(images, **settings), 20), strict=True):
        assert batch.images is None and torch.equal(batch.ordinals, held.ordinals)
        assert batch.crops.shape == (10, 2, 3, 16, 16) and batch.crops.dtype == torch.uint8
        for crops, pixels, ordinal in zip(batch.crops, held.images, batch.ordinals.tolist(), strict=True):
            # Only the memory layout of the pixels differs, and with it the last bit of the resize.
            assert (crops.int() - VIEWS.cut(pixels, ordinal).int()).abs().max() <= 1


def test_one_image_of_another_shape_sends_all_to_the_workers(photos, tmp_path):
    write_folder(tmp_path, [f"{place}.png" for place in range(40)])
    photo(16, 20).save(tmp_path / "13.png")
    images = open_dataset(str(tmp_path)).train
    assert images.decode(13).shape == (3, 20, 16)
    batches = TrainingBatches(images, batch_size=40, global_batch=40, cut=VIEWS.cut, workers=0)
    assert not batches.in_memory
    assert take(batches, 1)[0].crops.shape == (40, 2, 3, 16, 16)


def test_images_travel_to_spawned_workers(photos, tmp_path):
    digits_table(20).to_parquet(tmp_path / "digits.parquet")
    sources = [open_dataset().test, open_dataset(photos).train, open_dataset(str(tmp_path / "digits.parquet")).train]
    expected = [images.decode(5) for images in sources]
    again = pickle.loads(pickle.dumps(sources))
    assert [len(images) for images in again] == [len(images) for images in sources]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        answers = [pool.apply(images.decode, (5,)) for images in sources]
    for results in (answers, [images.decode(5) for images in again]):
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_evaluation_gives_every_image_in_order(photos):
    images = open_dataset(photos).train
    transform = EvaluationTransform(16)
    indices = np.arange(len(images))[::-1][:290]
    batches = list(evaluation_batches(images, transform, batch_size=64, indices=indices, workers=2))
    assert [len(found) for _, found in batches] == [64, 64, 64, 64, 34]
    pixels, found = load_pixels(images, transform, indices=indices, workers=0)
    assert found.tolist() == indices.tolist() and pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.cat([part for part, _ in batches]))
    assert torch.equal(pixels[3], transform(images.decode(int(indices[3]))))


def test_side_is_that_of_a_typical_image(tmp_path):
    write_folder(tmp_path, [f"{place}.png" for place in range(9)], lambda place: photo(20, 30 if place else 300))
    assert open_dataset(str(tmp_path)).train.side() == 30
    assert open_dataset().train.side() == 8


# Decoding


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


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


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
        (npy(np.zeros(6, np.uint8)), 3, "is no image"),
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


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_either_decode_to_an_image_or_are_bad(seed, tmp_path):
    """50 files each: flipped bits, cut ends, filled holes, mixed halves, EXIF of noise, wrong extensions."""
    random = np.random.default_rng(seed)
    names = list(CONTENTS)
    for place in range(50):
        name = names[random.integers(len(names))]
        content = bytearray(CONTENTS[name])
        damage = place % 5
        if damage == 0:
            for position in random.integers(0, len(content), 1 + place // 5):
                content[position] ^= 1 << random.integers(8)
        elif damage == 1:
            del content[random.integers(0, len(content)) :]
        elif damage == 2:
            start = random.integers(0, len(content))
            content[start : start + 30] = random.bytes(30)
        elif damage == 3:
            other = CONTENTS[names[random.integers(len(names))]]
            content[random.integers(0, len(content)) :] = other[random.integers(0, len(other)) :]
        else:
            exif = b"Exif\0\0" + random.choice([b"II*\0", b"MM\0*"]) + random.bytes(60)
            content = bytearray(encoded(photo(60, 40), "JPEG", exif=exif))
        (tmp_path / f"{place}{random.choice(data.EXTENSIONS)}").write_bytes(content)
    images = open_dataset(str(tmp_path)).train
    assert len(images) == 50
    outcomes = []
    for index in range(len(images)):
        try:
            pixels = images.decode(index)
            assert pixels.dtype == torch.uint8 and pixels.ndim == 3 and len(pixels) == 3 and pixels.numel()
            outcomes.append("image")
        except BadImage as reason:
            assert str(reason) and "\n" not in str(reason)
            outcomes.append("bad")
    assert {"image", "bad"} == set(outcomes)


# Bad images


def spoil(folder, names):
    for name in names:
        path = Path(folder, name)
        path.write_bytes(path.read_bytes()[:-30])


@pytest.fixture
def spoilt(tmp_path):
    """60 photographs of one size, of which number 7, 8 and 59 are truncated."""
    folder = write_folder(tmp_path, [f"{place}.png" for place in range(60)])
    spoil(folder, ["7.png", "8.png", "59.png"])
    return open_dataset(folder).train


@pytest.mark.parametrize(("memory_limit", "workers"), [(2**30, 0), (0, 0), (0, 2)])
def test_bad_images_are_replaced_by_the_next_that_can_be_read(spoilt, memory_limit, workers, caplog):
    batches = TrainingBatches(
        spoilt,
        batch_size=20,
        global_batch=60,
        cut=lambda image, _: image.expand(2, -1, -1, -1),
        memory_limit=memory_limit,
        workers=workers,
    )
    seen = {}
    for batch in take(batches, 6):
        pixels = batch.images if batch.images is not None else batch.crops[:, 0]
        seen |= dict(zip(batch.ordinals.tolist(), pixels, strict=True))
    assert sorted(seen) == list(range(120))
    for ordinal, pixels in seen.items():
        index = ordinal % 60
        assert torch.equal(pixels, spoilt.decode({7: 9, 8: 9, 59: 0}.get(index, index)))
    assert sorted(batches.bad) == [7, 8, 59] and batches.bad[7].startswith("7.png: ")
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(messages) == 1 and ".png: " in messages[0]


@pytest.mark.parametrize("memory_limit", [2**30, 0])
def test_a_bad_image_is_an_error_where_asked_for(spoilt, memory_limit):
    with pytest.raises(ByolTimmError, match=r"(7|8|59)\.png: .*--on_bad_image") as error:
        take(
            TrainingBatches(
                spoilt,
                batch_size=20,
                global_batch=60,
                cut=VIEWS.cut,
                memory_limit=memory_limit,
                workers=0,
                on_bad_image="error",
            ),
            3,
        )
    one_line(error)


@pytest.mark.parametrize(("memory_limit", "workers"), [(2**30, 0), (0, 0), (0, 2)])
@pytest.mark.parametrize("bad", [range(4), range(0, 60, 2), range(30)])
def test_too_many_bad_images_stop_the_run(tmp_path, memory_limit, workers, bad):
    folder = write_folder(tmp_path, [f"{place}.png" for place in range(60)])
    spoil(folder, [f"{place}.png" for place in bad])
    with pytest.raises(ByolTimmError, match=r"of \d+ images of .* cannot be read; the first: \d+\.png: ") as error:
        take(
            TrainingBatches(
                open_dataset(folder).train,
                batch_size=20,
                global_batch=60,
                cut=VIEWS.cut,
                memory_limit=memory_limit,
                workers=workers,
            ),
            3,
        )
    one_line(error)


def test_a_cluster_of_bad_images_counts_once_each(tmp_path):
    folder = write_folder(tmp_path, [f"{place}.png" for place in range(400)])
    spoil(folder, [f"{place}.png" for place in range(100, 118)])
    images = open_dataset(folder).train
    batches = TrainingBatches(images, batch_size=100, global_batch=100, cut=VIEWS.cut, memory_limit=0, workers=0)
    take(batches, 12)
    assert sorted(batches.bad) == list(range(100, 118))


def test_nothing_readable_is_an_error(tmp_path):
    folder = write_folder(tmp_path, [f"{place}.png" for place in range(5)])
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    images = open_dataset(folder).train
    for attempt in (
        images.side,
        lambda: TrainingBatches(images, batch_size=2, global_batch=2, cut=VIEWS.cut),
        lambda: load_pixels(images, EvaluationTransform(16)),
    ):
        with pytest.raises(ByolTimmError, match=r"no image of .* can be read \(4\.png: the file is empty") as error:
            attempt()
        one_line(error)


def test_unreadable_files_are_bad_with_their_name(tmp_path):
    write_folder(tmp_path, ["a.png", "b.png"])
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    images = open_dataset(str(tmp_path)).train
    with pytest.raises(BadImage, match="No such file"):
        images.decode(2)
    assert images.describe(2) == "dangling.png"


def test_evaluation_leaves_bad_images_out_with_one_warning(spoilt, caplog):
    pixels, indices = load_pixels(spoilt, EvaluationTransform(16))
    assert indices.tolist() == [index for index in range(60) if index not in (7, 8, 59)]
    assert torch.equal(pixels[7], EvaluationTransform(16)(spoilt.decode(9)))
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "3 of 60 images cannot be read and are left out"
    ]


# Workers


def kill_worker(image, ordinal):
    if torch.utils.data.get_worker_info() is not None and ordinal % 7 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return VIEWS.cut(image, ordinal)


def hang(image, ordinal):
    if torch.utils.data.get_worker_info() is not None:
        time.sleep(60)
    return VIEWS.cut(image, ordinal)


def test_a_killed_worker_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(data, "WORKER_POLL", 0.5)
    images = open_dataset().train
    with pytest.raises(data.WorkerError, match=r"data loading worker \(pid.*--workers 0") as error:
        take(TrainingBatches(images, batch_size=8, global_batch=8, cut=kill_worker, memory_limit=0, workers=2), 50)
    one_line(error)
    assert error.value.exit_code == 1
    assert not multiprocessing.active_children()


def test_the_death_of_a_worker_does_not_interrupt_the_main_process(monkeypatch):
    monkeypatch.setattr(data, "WORKER_POLL", 0.5)
    batches = TrainingBatches(
        open_dataset().train, batch_size=8, global_batch=8, cut=VIEWS.cut, memory_limit=0, workers=1
    )
    with batches:
        stream = iter(batches)
        next(stream)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(0.5)
        with pytest.raises(data.WorkerError, match="--workers 0"):
            for _ in stream:
                pass


def test_a_hanging_worker_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(data, "WORKER_POLL", 0.5)
    monkeypatch.setattr(data, "WORKER_TIMEOUT", 1.0)
    images = open_dataset().train
    with pytest.raises(data.WorkerError, match=r"nothing for 1 s.*--workers 0") as error:
        take(TrainingBatches(images, batch_size=8, global_batch=8, cut=hang, memory_limit=0, workers=1), 1)
    one_line(error)
    assert not multiprocessing.active_children()


def test_workers_end_with_the_batches(photos):
    batches = TrainingBatches(
        open_dataset(photos).train, batch_size=8, global_batch=8, cut=VIEWS.cut, memory_limit=0, workers=2
    )
    take(batches, 3)
    assert not multiprocessing.active_children()


def test_workers_are_out_of_reach_of_ctrl_c():
    batches = TrainingBatches(
        open_dataset().train, batch_size=8, global_batch=8, cut=VIEWS.cut, memory_limit=0, workers=1
    )
    with batches:
        next(iter(batches))
        assert os.getpgid(multiprocessing.active_children()[0].pid) != os.getpgid(0)


def test_too_little_shared_memory_is_told_before_workers_start(tmp_path, monkeypatch):
    data._check_shared_memory(2**10, str(tmp_path))
    with pytest.raises(ByolTimmError, match=r"need about 1099511627776 MB of shared memory.*--workers 0") as error:
        data._check_shared_memory(2**60, str(tmp_path))
    one_line(error)


# Digits


def test_digits_are_the_scans_with_a_fifth_of_every_class_held_out():
    splits = open_dataset()
    assert len(splits.train) + len(splits.test) == 1797
    assert abs(len(splits.test) - 0.2 * 1797) <= 5
    counts = np.bincount(DIGITS.target)
    assert np.abs(np.bincount(splits.test.labels) - 0.2 * counts).max() <= 0.5
    assert not set(splits.train.rows) & set(splits.test.rows)
    for images in splits.train, splits.test:
        row = images.rows[5]
        assert torch.equal(
            images.decode(5), torch.tensor(np.rint(DIGITS.images[row] * 255 / 16)).byte().expand(3, 8, 8)
        )
        assert images.labels[5] == DIGITS.target[row] and images.class_names == tuple("0123456789")
    assert "held out" in splits.note


def test_held_out_images_depend_on_the_seed_alone():
    assert np.array_equal(open_dataset(seed=1).test.rows, open_dataset(seed=1).test.rows)
    assert not np.array_equal(open_dataset(seed=1).test.rows, open_dataset(seed=2).test.rows)


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
def test_digits_have_as_many_channels_as_asked(channels):
    images = open_dataset(in_chans=channels).train
    assert images.channels == channels and images.decode(0).shape == (channels, 8, 8)


# Folders


def test_names_are_in_natural_order_whatever_the_machine(tmp_path):
    names = ["1.png", "2.png", "10.png", "a1.png", "a2/x.png", "a10.png", "a.png", "b/9.png", "b/11.png", "b/é.png"]
    write_folder(tmp_path, names[::-1])
    images = open_dataset(str(tmp_path)).train
    assert [images.describe(index) for index in range(len(names))] == names
    assert images.labels is None and images.class_names == ()


def test_every_extension_is_found_at_any_depth_and_hidden_files_are_not(tmp_path):
    names = [
        "a.JPG",
        "x/b.jpeg",
        "x/y/z/c.png",
        "d.webp",
        "e.bmp",
        "f.tif",
        "g.tiff",
        "h.gif",
        "i.ppm",
        "j.pgm",
        "k.jp2",
    ]
    write_folder(tmp_path, names, lambda place: photo(20, 16).convert("L" if names[place] == "j.pgm" else "RGB"))
    np.save(tmp_path / "l.npy", np.zeros((4, 5, 3), np.uint8))
    write_folder(tmp_path, [".hidden.png", ".cache/m.png", "x/._b.png"])
    (tmp_path / "notes.txt").write_text("no image")
    images = open_dataset(str(tmp_path)).train
    assert {images.describe(index) for index in range(len(images))} == {*names, "l.npy"}
    assert {image.shape[0] for image in pixels_of(images)} == {3}


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "data", ["a/1.png", "b/2.png"])
    write_folder(tmp_path / "elsewhere", ["3.png"])
    (tmp_path / "data" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "a" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "self").symlink_to(tmp_path / "data" / "self")
    images = open_dataset(str(tmp_path / "data")).train
    assert [images.describe(index) for index in range(len(images))] == ["a/1.png", "b/2.png", "c/3.png"]


def test_first_level_folders_are_classes(tmp_path):
    names = [
        f"{name}/{sub}{place}.png" for name in ("cat", "dog 2", "dog 10") for sub in ("", "s/") for place in range(10)
    ]
    splits = open_dataset(write_folder(tmp_path, names))
    assert splits.train.class_names == ("cat", "dog 2", "dog 10")
    assert np.bincount(splits.test.labels).tolist() == [2, 2, 2] and len(splits.train) == 54
    for images in (splits.train, splits.test):
        for index in range(len(images)):
            assert images.describe(index).startswith(images.class_names[images.labels[index]] + "/")
    assert "6 of them, 10% of every class, held out" in splits.note


@pytest.mark.parametrize("names", [["1.png", "2.png"], ["all/1.png", "all/2.png"], ["a/1.png", "b/2.png", "3.png"]])
def test_folders_without_classes_are_unlabelled(tmp_path, names):
    splits = open_dataset(write_folder(tmp_path, names))
    assert splits.train.labels is None and splits.test is None and len(splits.train) == len(names)
    assert "unlabelled" in splits.note


@pytest.mark.parametrize("test_name", ["test", "val", "validation", "valid"])
def test_folders_named_as_splits_are_splits(tmp_path, test_name):
    names = [f"{split}/{label}/{place}.png" for split in ("train", test_name) for label in "ab" for place in range(3)]
    folder = write_folder(tmp_path, [*names, f"{test_name}/new/1.png"])
    splits = open_dataset(folder)
    assert len(splits.train) == 6 and splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert splits.test.labels.tolist() == [0, 0, 0, 1, 1, 1, -1] and splits.test.class_names == ("a", "b")
    assert f"split {test_name}" in splits.note
    other = open_dataset(folder, split=test_name)
    assert len(other.train) + len(other.test) == 7 and other.train.describe(0).startswith(test_name)


def test_train_among_other_folders_is_a_class(tmp_path):
    names = [f"{label}/{place}.png" for label in ("bus", "train") for place in range(4)]
    splits = open_dataset(write_folder(tmp_path, names))
    assert splits.train.class_names == ("bus", "train")


def test_names_beyond_ascii_are_read_and_told(tmp_path):
    name = os.fsdecode(b"na\xc3\xafve \xe2\x98\x83/\xff 1\n2.png")
    photo(20, 16).save(tmp_path / "1.png")
    (tmp_path / name).parent.mkdir()
    os.rename(tmp_path / "1.png", tmp_path / name)
    images = open_dataset(str(tmp_path)).train
    assert images.decode(0).shape == (3, 16, 20)
    assert images.describe(0) == "naïve ☃/\\udcff 1 2.png"
    images.describe(0).encode()
    fingerprint(images)


@pytest.mark.parametrize(
    ("names", "found"), [([], "no file"), (["a.txt", "b/c.txt", "d.csv"], r"2 \.txt, 1 \.csv"), ([".a.png"], "no file")]
)
def test_folders_without_images_say_what_they_hold(tmp_path, names, found):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    with pytest.raises(ByolTimmError, match=rf"no images found in .* \(looked for \.jpg .*; found {found}\)") as error:
        open_dataset(str(tmp_path))
    one_line(error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset": "./nowhere"}, "data folder ./nowhere does not exist"),
        ({"dataset": "/no/such/folder"}, "data folder /no/such/folder does not exist"),
        ({"dataset": "a/b/c"}, "data folder a/b/c does not exist"),
        ({"dataset": "images.parquet"}, "data folder images.parquet does not exist"),
        ({"dataset": __file__}, "is a file. give a folder"),
        ({"split": "test"}, "no split test. choose one with --split: train"),
        ({"image_column": "image"}, r"--image_column \(image\) is for tables and digits is none"),
        ({"dataset": "nobody/nothing"}, "is no folder here and cannot be loaded from the Hub"),
        ({"dataset": "cifar10", "split": "test"}, "is no folder here and cannot be loaded from the Hub"),
    ],
)
def test_what_cannot_be_opened_is_told_in_one_line(settings, message):
    with pytest.raises(ByolTimmError, match=message) as error:
        open_dataset(**settings)
    one_line(error)


# Tables


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Digits with a train and a test split, as every kind of table that is read."""
    table = digits_table()
    train, test = table.select(range(150)), table.select(range(150, 200))
    folder = tmp_path_factory.mktemp("tables")
    for kind in ("parquet", "hub", "arrow"):
        (folder / kind / "data").mkdir(parents=True)
    train.to_parquet(folder / "parquet" / "train.parquet")
    test.to_parquet(folder / "parquet" / "test.parquet")
    for shard in range(3):
        train.shard(3, shard, contiguous=True).to_parquet(folder / "hub/data" / f"train-0000{shard}-of-00003.parquet")
    test.to_parquet(folder / "hub/data" / "test-00000-of-00001.parquet")
    for split, part in (("train", train), ("test", test)):
        with datasets.arrow_writer.ArrowWriter(
            path=str(folder / "arrow" / f"{split}.arrow"), features=part.features
        ) as w:
            for row in part.with_format("arrow").iter(50):
                w.write_table(row)
    datasets.DatasetDict(train=train, test=test).save_to_disk(folder / "disk")
    train.save_to_disk(folder / "disk, one split")
    return folder


def assert_digits(images, rows):
    assert len(images) == len(rows) and images.labels.tolist() == DIGITS.target[rows].tolist()
    assert images.class_names == tuple("0123456789")
    for index in (0, len(rows) // 2, len(rows) - 1):
        assert torch.equal(images.decode(index)[1], torch.tensor(DIGITS.images[rows[index]] * 15).byte())


@pytest.mark.parametrize("kind", ["parquet", "hub", "arrow", "disk"])
def test_tables_give_their_own_splits(saved, kind):
    splits = open_dataset(str(saved / kind))
    assert_digits(splits.train, np.arange(150))
    assert_digits(splits.test, np.arange(150, 200))
    assert splits.train.describe(17) == "row 17 of train" and splits.test.describe(3) == "row 3 of test"
    assert "evaluation on split test (50 images)" in splits.note


@pytest.mark.parametrize("name", ["parquet/train.parquet", "arrow/train.arrow", "disk, one split"])
def test_single_tables_hold_a_tenth_out(saved, name):
    splits = open_dataset(str(saved / name))
    assert len(splits.train) + len(splits.test) == 150 and "held out" in splits.note
    assert_digits(splits.test, splits.test.rows)
    assert np.bincount(splits.test.labels, minlength=10).min() >= 1


def test_another_split_can_be_trained_on(saved):
    splits = open_dataset(str(saved / "hub"), split="test")
    assert len(splits.train) + len(splits.test) == 50 and "split test" in splits.note
    with pytest.raises(
        ByolTimmError, match=r"no split val\. choose one with --split: (test, train|train, test)"
    ) as error:
        open_dataset(str(saved / "hub"), split="val")
    one_line(error)


def test_no_progress_bars_where_nobody_watches(saved, capfd):
    open_dataset(str(saved / "hub"))
    assert capfd.readouterr().err == "" and not datasets.are_progress_bars_disabled()


def test_tables_and_images_in_one_folder_are_refused(tmp_path):
    digits_table(10).to_parquet(tmp_path / "train.parquet")
    write_folder(tmp_path, ["a.png"])
    with pytest.raises(ByolTimmError, match="1 tables and 1 images") as error:
        open_dataset(str(tmp_path))
    one_line(error)


def test_broken_tables_are_told_in_one_line(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(ByolTimmError, match="cannot be loaded") as error:
        open_dataset(str(tmp_path))
    one_line(error)


def opened(table, tmp_path, **settings):
    table.to_parquet(tmp_path / "table.parquet")
    return open_dataset(str(tmp_path / "table.parquet"), **settings)


def test_image_columns_are_found_by_type_or_named(tmp_path):
    table = digits_table(30)
    both = table.add_column("second", [None] * 30).cast_column("second", datasets.Image())
    with pytest.raises(
        ByolTimmError, match=r"several image columns in .*columns: image, second.*--image_column"
    ) as error:
        opened(both, tmp_path)
    one_line(error)
    assert len(opened(both, tmp_path, image_column="image").train) == 20
    with pytest.raises(ByolTimmError, match=r"no image column in .*columns: label\..*--image_column"):
        opened(table.select_columns(["label"]), tmp_path)
    with pytest.raises(ByolTimmError, match="holds no images"):
        opened(table, tmp_path, image_column="label")
    with pytest.raises(ByolTimmError, match=r"no column picture in .*columns: image, label"):
        opened(table, tmp_path, image_column="picture")
    with pytest.raises(ByolTimmError, match="no column klass in"):
        opened(table, tmp_path, label_column="klass")


def test_files_as_plain_bytes_are_images(tmp_path):
    contents = [encoded(photo(9, 7, place)) for place in range(12)]
    plain = datasets.Dataset.from_dict({"picture": contents, "text": ["x"] * 12})
    images = opened(plain, tmp_path).train
    assert np.array_equal(images.decode(3), decode(contents[3])) and images.labels is None


def test_images_stored_as_paths_are_read(tmp_path):
    write_folder(tmp_path, ["images/1.png"])
    paths = [str(tmp_path / "images/1.png"), str(tmp_path / "images/2.png")]
    table = datasets.Dataset.from_dict({"image": [{"path": path, "bytes": None} for path in paths]})
    images = data._choose(data._columns({"train": table}, "x", None, None), "x", None, 3, 0, 0.1).train
    assert images.decode(0).shape == (3, 16, 20)
    with pytest.raises(BadImage, match=r"2\.png: No such file"):
        images.decode(1)


@pytest.mark.parametrize("channels", [3, 5])
def test_arrays_in_tables_are_images(tmp_path, channels):
    arrays = np.random.default_rng(0).integers(0, 256, (12, channels, 6, 7), dtype=np.uint8)
    features = datasets.Features({"pixels": datasets.Array3D((channels, 6, 7), "uint8")})
    table = datasets.Dataset.from_dict({"pixels": list(arrays)}, features=features)
    images = opened(table, tmp_path, in_chans=channels).train
    assert np.array_equal(torch.stack(pixels_of(images)), arrays) and images.side() == 7
    fingerprint(images)


def test_empty_cells_are_bad_images(tmp_path):
    table = digits_table(20)
    images = [
        None if row == 4 else cell
        for row, cell in enumerate(table.cast_column("image", datasets.Image(decode=False))["image"])
    ]
    table = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    images = opened(table, tmp_path).train
    with pytest.raises(BadImage, match="the cell is empty"):
        images.decode(4)
    assert images.decode(5).shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("kind", "labels", "names", "expected"),
    [
        (datasets.Value("string"), ["b", "a", None, "c10", "c9"] * 4, ("a", "b", "c9", "c10"), [1, 0, -1, 3, 2]),
        (datasets.Value("int64"), [7, 100, -1, None, 7] * 4, ("7", "100"), [0, 1, -1, -1, 0]),
        (datasets.ClassLabel(names=["x", "y"]), [1, 0, -1, None, 1] * 4, ("x", "y"), [1, 0, -1, -1, 1]),
    ],
)
def test_labels_of_any_kind_become_numbers(tmp_path, kind, labels, names, expected):
    splits = opened(digits_table(20, labels, label=kind), tmp_path, label_column="label")
    assert splits.train.class_names == names
    for images in (splits.train, splits.test):
        assert images.labels.tolist() == [(expected * 4)[row] for row in images.rows]
    assert (splits.test.labels >= 0).all()
    assert len(splits.train) + len(splits.test) == 20


def test_only_class_labels_count_without_being_named(tmp_path):
    assert opened(digits_table(20, label=datasets.Value("int64")), tmp_path).test is None


def test_other_columns_are_no_labels(tmp_path):
    with pytest.raises(ByolTimmError, match="--label_column") as error:
        opened(digits_table(20, [0.5] * 20, label=datasets.Value("float32")), tmp_path, label_column="label")
    one_line(error)


def test_several_label_columns_are_told(tmp_path, caplog):
    table = digits_table(20)
    table = table.add_column("coarse", [0] * 20).cast_column("coarse", datasets.ClassLabel(names=["digit"]))
    assert opened(table, tmp_path).train.labels is None
    assert "choose with --label_column: label, coarse" in caplog.text
    assert opened(table, tmp_path, label_column="label").train.labels is not None


def test_an_unlabelled_test_split_is_passed_over(tmp_path):
    digits_table(100).to_parquet(tmp_path / "train.parquet")
    digits_table(20, [-1] * 20).to_parquet(tmp_path / "test.parquet")
    splits = open_dataset(str(tmp_path))
    assert "held out" in splits.note and len(splits.train) + len(splits.test) == 100


def test_without_a_split_named_train_one_must_be_chosen(tmp_path):
    digits_table(10).save_to_disk(tmp_path / "one")
    tables = {"a": digits_table(10), "b": digits_table(20)}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "two")
    with pytest.raises(ByolTimmError, match=r"no split train, only a, b\. choose one with --split") as error:
        open_dataset(str(tmp_path / "two"))
    one_line(error)
    splits = open_dataset(str(tmp_path / "two"), split="b")
    assert len(splits.train) + len(splits.test) == 20


def test_selected_rows_of_a_table_keep_their_order():
    table = digits_table(50).select([7, 3, 30, 12])
    images = data._choose(data._columns({"train": table}, "x", None, None), "x", None, 3, 0, 0.1).train
    assert images.labels.tolist() == DIGITS.target[[7, 3, 30, 12]].tolist()
    assert torch.equal(images.decode(2)[0], torch.tensor(DIGITS.images[30] * 15).byte())


# The rest


def test_a_data_set_smaller_than_the_global_batch_is_refused():
    images = open_dataset().train.subset(range(50))
    with pytest.raises(ByolTimmError, match=r"50 images but the global batch is 256 \(128 x 2\)") as error:
        TrainingBatches(images, batch_size=128, global_batch=256, cut=VIEWS.cut)
    one_line(error)


def test_fingerprint_tells_images_apart(photos, saved, tmp_path):
    train = open_dataset().train
    assert fingerprint(train) == fingerprint(open_dataset().train)
    folder = write_folder(tmp_path, [f"{place}.png" for place in range(300)])
    assert fingerprint(open_dataset(folder).train) == fingerprint(open_dataset(photos).train)
    sources = [
        train,
        open_dataset(seed=1).train,
        open_dataset(in_chans=1).train,
        train.subset(range(100)),
        open_dataset(photos).train,
        open_dataset(str(saved / "hub")).train,
        open_dataset(str(saved / "hub")).test,
    ]
    prints = [fingerprint(images) for images in sources]
    photo(20, 16).save(tmp_path / "17.png", compress_level=0)
    prints.append(fingerprint(open_dataset(folder).train))
    assert len(set(prints)) == len(prints) == 8


def test_subsets_are_balanced():
    labels = np.repeat([-1, 0, 1, 2], [50, 5, 100, 1000])
    indices = subset_indices(labels, 65, seed=0)
    assert np.bincount(labels[indices]).tolist() == [5, 30, 30]
    assert np.array_equal(indices, np.unique(indices))
    assert np.array_equal(indices, subset_indices(labels, 65, seed=0))
    assert not np.array_equal(indices, subset_indices(labels, 65, seed=1))
    assert subset_indices(labels, 10_000, seed=0).tolist() == list(range(50, 1155))


def test_import_leaves_heavy_libraries_alone():
    code = "import sys, byol_timm.data; print([name for name in ('datasets', 'sklearn') if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
