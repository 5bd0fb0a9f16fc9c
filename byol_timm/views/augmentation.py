"""Augmentations by name: the distribution that views are drawn from."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from ..errors import ByolTimmError

Colors = Literal["paper", "torchvision"]
Interpolation = Literal["bicubic", "bilinear"]
JITTERS = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True)
class Augmentation:
    """Describe the distribution of views: probabilities, ranges, family of colour operations (paper, appendix B).

    `crop_scale` is a share of the image's area, `rotate` half the range in degrees; `brightness`, `contrast` and
    `saturation` are half-ranges around no change, `hue` one in turns (at most 1/6). `blur` and `solarize` are the
    probabilities of view 1 and view 2, `blur_sigma` is in pixels.
    `colors="paper"` computes as the authors' code does: additive brightness, contrast about each channel's mean,
    saturation in HSV, zero-padded blur; `"torchvision"` as most PyTorch code does: multiplicative brightness, contrast
    about the mean of grey, saturation as a blend with grey, reflect-padded blur. Hue is the same in both.
    """

    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    rotate: float = 0.0
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    colors: Colors = "paper"
    grayscale: float = 0.2
    blur: tuple[float, float] = (1.0, 0.1)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: tuple[float, float] = (0.0, 0.2)

    def __post_init__(self) -> None:
        for name, p in (("flip", self.flip), ("jitter", self.jitter), ("grayscale", self.grayscale)):
            _check(0 <= p <= 1, name, p, "give a probability, 0 to 1")
        for name, pair in (("blur", self.blur), ("solarize", self.solarize)):
            _check(all(0 <= p <= 1 for p in pair), name, pair, "give two probabilities, of view 1 and view 2")
        for name, strength in zip(JITTERS[:3], self.strengths, strict=False):
            _check(0 <= strength <= 1, name, strength, "give a half-range, 0 to 1")
        _check(0 <= self.hue <= 1 / 6, "hue", self.hue, "give at most 1/6 of a turn")
        _check(0 <= self.rotate <= 180, "rotate", self.rotate, "give degrees, 0 to 180")
        low, high = self.crop_scale
        _check(0 < low <= high <= 1, "crop_scale", self.crop_scale, "give two shares of the area, the smaller first")
        for name, (low, high) in (("crop_ratio", self.crop_ratio), ("blur_sigma", self.blur_sigma)):
            _check(0 < low <= high, name, (low, high), "give two positive numbers, the smaller first")
        _check(
            self.interpolation in get_args(Interpolation),
            "interpolation",
            self.interpolation,
            "give bicubic or bilinear",
        )
        _check(self.colors in get_args(Colors), "colors", self.colors, "give paper or torchvision")

    @property
    def strengths(self) -> tuple[float, ...]:
        """Return the half-ranges of the jitters, in the order of `JITTERS`."""
        return self.brightness, self.contrast, self.saturation, self.hue


def _check(valid: bool, name: str, value: object, advice: str) -> None:
    if not valid:
        raise ByolTimmError(f"augmentation {name} cannot be {value!r}. {advice}")


_PAPER = Augmentation()
AUGMENTATIONS: dict[str, Augmentation] = {
    # Grill et al. 2020, table 6, with the colour operations of their released code.
    "paper": _PAPER,
    # The same table with torchvision's colour operations, as PyTorch reproductions run it.
    "torchvision": replace(_PAPER, colors="torchvision"),
    # Up to 64 px: without blur, as the CIFAR recipes of solo-learn and lightly.
    "small": replace(_PAPER, blur=(0.0, 0.0)),
    # Written characters: nothing that turns one into another, so no flips and no small crops; they have no colour.
    "digits": replace(
        _PAPER,
        crop_scale=(0.75, 1.0),
        rotate=6.0,
        flip=0.0,
        jitter=0.0,
        saturation=0.0,
        hue=0.0,
        grayscale=0.0,
        blur=(0.0, 0.0),
        solarize=(0.0, 0.0),
    ),
}


def omitted_operations(augmentation: Augmentation, channels: int) -> tuple[str, ...]:
    """Return the names of operations that images with that many channels cannot have, for a notice."""
    if channels == 3:
        return ()
    asked = {"saturation": augmentation.saturation, "hue": augmentation.hue, "grayscale": augmentation.grayscale}
    return tuple(name for name, value in asked.items() if value > 0)
