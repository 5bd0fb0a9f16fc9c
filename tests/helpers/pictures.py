"""Real images in every form that a test needs: cuts of a photograph, files, folders, tables."""

import io
import itertools
import tarfile

import datasets
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from byol_timm.data import decoding
from byol_timm.views import AUGMENTATIONS, TwoViews

DIGITS = load_digits()
PHOTO = Image.fromarray(load_sample_images().images[1])
VIEWS = TwoViews(AUGMENTATIONS["paper"], 16, mean=(0.5,), std=(0.5,))


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


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def decode(content, channels=3, **settings):
    return decoding.decode(io.BytesIO(content), channels, **settings)


def npy(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def deep(place=0):
    """A cut of a photograph in grey, uint16, of 12 bits, all of which it uses."""
    grey = np.asarray(photo(20, 16, place).convert("L")).astype(np.uint16)
    return np.rint((grey - grey.min()) * (4095 / np.ptp(grey))).astype(np.uint16)


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
