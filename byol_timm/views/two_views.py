"""Two random views of every image of a batch, drawn and computed per image on the batch's own device."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .augmentation import Augmentation
from .changes import change
from .crops import crop, crop_together, to_device
from .draws import CHANGE_DRAWS, CROP_DRAWS, Array, _uniforms, draw_changes, draw_crops
from .operations import SCRATCH_PLANES, _tile, _tiles
from .plain import _per_channel

if TYPE_CHECKING:
    from .triton import TritonViews

Views = tuple[Tensor, Tensor]
GROUP_VALUES = 1 << 21
# On a CPU, batched matrix products resize images up to this side faster than one call an image does.
MATMUL_RESIZE_LIMIT = 48


class TwoViews:
    """Turn uint8 images into two normalised float32 views, every parameter drawn per image and per view.

    The draws are a pure function of (`seed`, ordinal, view, parameter): batch, order, worker and device do not matter.
    `image_size` is the side of the views or (height, width); `mean` and `std` (of pixels in 0..1) have one entry per
    channel, or one for all.

    On a CPU, images above 48 pixels are resized in uint8 as PIL does, rounded between the two passes; smaller ones, and
    all on other devices, in float32. torch.compile takes the views as they are: their numbers are drawn by numpy.
    """

    def __init__(
        self,
        augmentation: Augmentation,
        image_size: int | tuple[int, int],
        *,
        seed: int = 0,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.augmentation = augmentation
        self.height, self.width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.seed = seed
        self.mean, self.std = tuple(mean), tuple(std)

    def with_triton(self, *, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> "TritonViews":
        """Return the same views computed by Triton kernels, for images of 1 or 3 channels on a CUDA device."""
        # Triton is part of torch's CUDA builds only.
        from .triton import TritonViews

        size, norm = (self.height, self.width), (self.mean, self.std)
        return TritonViews(self.augmentation, size, self.seed, *norm, dtype=dtype, channels_last=channels_last)

    @torch.compiler.disable
    @torch.no_grad()
    def __call__(self, images: Tensor, ordinals: Tensor, *, out: Views | None = None) -> Views:
        """Return view 1 and view 2 (float32 [B, C, height, width]) of uint8 images [B, C, H, W] with int64 ordinals.

        The ordinals [B] stay on the CPU. `out` is the views of an earlier batch, whose memory is used again: new memory
        costs a CPU a tenth of the time and more.
        """
        height, width = images.shape[-2:]
        one_by_one = images.device.type == "cpu" and max(self.height, self.width, height, width) > MATMUL_RESIZE_LIMIT
        if one_by_one:
            # What torch's uint8 kernels resize fastest.
            images = images.contiguous(memory_format=torch.channels_last)
        crops = draw_crops(self.augmentation, _uniforms(self.seed, ordinals, CROP_DRAWS), height, width)

        def cut(rows: Array, planes: Tensor) -> None:
            sources = rows % len(images)
            if one_by_one:
                for place, (source, row) in enumerate(zip(sources.tolist(), rows.tolist(), strict=True)):
                    planes[:, place] = crop(images[source], crops, row, self.augmentation, planes.shape[2:])
                planes.div_(255)
            else:
                for part in _tiles(0, len(rows), _tile(planes)):
                    selected = images.index_select(0, to_device(sources[part], images.device))
                    crop_together(selected, crops.take(rows[part]), self.augmentation, planes[:, part])

        return self._views(cut, images.shape[1], ordinals, images.device, out)

    @torch.compiler.disable
    @torch.no_grad()
    def cut(self, image: Tensor, ordinal: int) -> Tensor:
        """Return both crops of one uint8 image [C, H, W], resized and flipped: uint8 [2, C, height, width].

        `finish` turns a batch of them into the views that calling the object on the images gives, up to rounding.
        """
        channels, height, width = image.shape
        crops = draw_crops(self.augmentation, _uniforms(self.seed, [ordinal], CROP_DRAWS), height, width)
        both = torch.empty(2, channels, self.height, self.width, dtype=torch.uint8)
        for view, pixels in enumerate(both.numpy()):
            # numpy brings channels out of their turns twice as fast as torch does.
            np.copyto(pixels, crop(image, crops, view, self.augmentation, pixels.shape[1:]).numpy())
        return both

    def reduction(self, ordinal: int, height: int, width: int) -> int:
        """Return how many times smaller (1, 2, 4, 8) the image may be while its crops keep twice the views' size.

        `cut` makes nearly the same crops of an image that was decoded so many times smaller.
        """
        box = draw_crops(self.augmentation, _uniforms(self.seed, [ordinal], CROP_DRAWS), height, width).box
        times = int((box[:, 2:] // (2 * self.height, 2 * self.width)).min())
        return next(power for power in (8, 4, 2, 1) if power <= max(1, times))

    @torch.compiler.disable
    @torch.no_grad()
    def finish(self, crops: Tensor, ordinals: Tensor, *, out: Views | None = None) -> Views:
        """Return both views, float32 [B, C, height, width], of crops of `cut`, uint8 [B, 2, C, height, width]."""

        def pick(rows: Array, planes: Tensor) -> None:
            view, image = np.divmod(rows, len(crops))
            selected = crops.flatten(0, 1).index_select(0, to_device(image * 2 + view, crops.device))
            planes.copy_(selected.transpose(0, 1)).div_(255)

        return self._views(pick, crops.shape[2], ordinals, crops.device, out)

    def _views(
        self,
        cut: Callable[[Array, Tensor], None],
        channels: int,
        ordinals: Tensor,
        device: torch.device,
        views: Views | None,
    ) -> Views:
        """Do everything after the crop; `cut` gets rows (0..B-1 of view 1, B..2B-1 of view 2) and where to put them."""
        changes = draw_changes(self.augmentation, _uniforms(self.seed, ordinals, CHANGE_DRAWS))
        means, stds = _per_channel(self.mean, channels), _per_channel(self.std, channels)
        batch, size = len(ordinals), (self.height, self.width)
        group = batch if device.type != "cpu" else min(batch, max(1, GROUP_VALUES // (channels * math.prod(size))))
        pool = torch.empty(channels * group * math.prod(size), device=device)
        scratch = torch.empty(SCRATCH_PLANES, _tile(pool.view(channels, group, *size)), math.prod(size), device=device)
        shape = (batch, channels, *size)
        if views is None or views[0].shape != shape:
            views = torch.empty(shape, device=device), torch.empty(shape, device=device)
        for first in [*range(0, batch, group), *range(batch, 2 * batch, group)]:
            view, start = divmod(first, batch)
            target = views[view][start : start + group]
            members = np.arange(first, first + len(target))
            # Sort by order: an operation then works on stretches of the group, in place.
            members = members[np.argsort(changes.order_key()[members], kind="stable")]
            planes = pool[: target.numel()].view(channels, len(target), *size)
            with torch.autocast(device.type, enabled=False):
                cut(members, planes)
                change(planes, changes.take(members), self.augmentation, scratch)
            for plane, mean, std in zip(planes, means, stds, strict=True):
                torch.add(torch.tensor(-mean / std), plane, alpha=1 / std, out=plane)
            places = np.argsort(members)[:, None] + np.arange(channels) * len(target)
            torch.index_select(planes.flatten(0, 1), 0, to_device(places.ravel(), device), out=target.flatten(0, 1))
        return views
