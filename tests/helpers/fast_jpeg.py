"""Measure what `--fast_jpeg` saves and changes, on mosaics of photographs in views of 224 px.

    python tests/helpers/fast_jpeg.py

For each size of the files: CPU time to decode one as it is and as both crops of it need it, and by how many of 255
levels the crops differ, on average and in the worst hundredth of the pixels.
"""

import io
import time
from functools import partial

import numpy as np
import torch
from pictures import encoded, photo
from PIL import Image

from byol_timm.data import decode
from byol_timm.views import AUGMENTATIONS, TwoViews

VIEWS = TwoViews(AUGMENTATIONS["paper"], 224, mean=(0.5,), std=(0.5,))
FILES, CROPS = 4, 4


def mosaic(width, height, number):
    image = Image.new("RGB", (width, height))
    for place in range((width // 500) * (height // 375)):
        column, row = place % (width // 500), place // (width // 500)
        image.paste(photo(500, 375, 31 * number + place), (500 * column, 375 * row))
    return image


def timed(content, reduction=None):
    start = time.process_time()
    image = torch.from_numpy(decode(io.BytesIO(content), 3, reduction))
    return image, 1000 * (time.process_time() - start)


def main():
    torch.set_num_threads(1)
    for width, height in ((500, 375), (2000, 1500), (4000, 3000)):
        whole_ms, reduced_ms, differences = [], [], []
        for number in range(FILES):
            content = encoded(mosaic(width, height, number), "JPEG", quality=90)
            for ordinal in range(CROPS * number, CROPS * (number + 1)):
                (whole, first), (small, second) = timed(content), timed(content, partial(VIEWS.reduction, ordinal))
                whole_ms.append(first)
                reduced_ms.append(second)
                differences.append((VIEWS.cut(whole, ordinal).int() - VIEWS.cut(small, ordinal).int()).abs().numpy())
        times = f"{np.mean(whole_ms):.1f} ms whole, {np.mean(reduced_ms):.1f} ms reduced"
        print(f"{width}x{height}: {times}, {np.mean(differences):.2f} levels, {np.percentile(differences, 99):.0f}")


if __name__ == "__main__":
    main()
