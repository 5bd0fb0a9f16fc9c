"""The Triton kernels compute the views of the CPU; Triton's interpreter runs them without a GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is part of torch's CUDA builds only")

# The interpreter must be asked for before Triton is imported.
COMPARE = """
import torch
import torch.nn.functional as F
from byol_timm.views import AUGMENTATIONS, TwoViews

HEIGHT, WIDTH = 23, 29


def compare(name, channels, dtype, channels_last):
    # Images that vary smoothly, as photos do.
    random = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(8, channels, 4, 4, generator=random), (HEIGHT, WIDTH), mode="bicubic")
    crops = (smooth.clamp(0, 1) * 255).to(torch.uint8).view(4, 2, channels, HEIGHT, WIDTH)
    mean, std = [0.1 * c + 0.4 for c in range(channels)], [0.2 + 0.02 * c for c in range(channels)]
    views = TwoViews(AUGMENTATIONS[name], (HEIGHT, WIDTH), seed=3, mean=mean, std=std)
    kernels = views.with_triton(dtype=dtype, channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    ordinals, images = torch.arange(4) + 7, crops[:2, 0, :, :19]
    finished, whole = (crops, ordinals), (images, ordinals[:2])
    for take, reference, given in ((kernels.finish, views.finish, finished), (kernels, views, whole)):
        for found, expected in zip(take(*given), reference(*given), strict=True):
            assert found.shape == expected.shape
            assert found.dtype == dtype and found.is_contiguous(memory_format=layout)
            levels = (found.float() - expected).abs() * torch.tensor(std).view(-1, 1, 1) * 255
            assert levels.max() < (0.1 if dtype == torch.float32 else 2.0), (name, channels, levels.max())


for name in ("paper", "torchvision", "small", "digits"):
    compare(name, 3, torch.float32, channels_last=False)
for name in ("paper", "digits"):
    compare(name, 1, torch.float32, channels_last=False)
compare("small", 3, torch.bfloat16, channels_last=True)
"""

FALL_BACK = """
import logging
import torch
from byol_timm.data import Batch
from byol_timm.training import DeviceViews
from byol_timm.views import AUGMENTATIONS, TwoViews

logging.basicConfig(format="%(message)s")
random = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=random)
settings = dict(mean=[0.5] * 3, std=[0.2] * 3)
views = TwoViews(AUGMENTATIONS["small"], 16, **settings)
other = TwoViews(AUGMENTATIONS["small"], 16, seed=1, **settings)
batch = Batch(images, None, torch.arange(4))
for kernels in (views.with_triton(), other.with_triton()):
    made = DeviceViews(views, torch.device("cpu"), False, kernels=kernels)
    for _ in range(2):
        for found, expected in zip(made(batch), views(batch.images, batch.ordinals), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    print("kernels" if made.kernels is not None else "reference")
"""


def interpreted(script):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    outcome = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    return outcome


def test_triton_views_are_the_views_of_the_cpu_within_a_tenth_of_a_level():
    interpreted(COMPARE)


def test_kernels_that_differ_from_the_reference_are_not_used_and_one_warning_says_so():
    outcome = interpreted(FALL_BACK)
    assert outcome.stdout.split() == ["kernels", "reference"]
    assert outcome.stderr.count("the Triton views differ from the reference") == 1
