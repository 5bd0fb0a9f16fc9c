import pickle
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as tvf
from sklearn.datasets import load_digits, load_sample_images

from byol_timm.errors import ByolTimmError
from byol_timm.views import (
    AUGMENTATIONS,
    Augmentation,
    EvaluationTransform,
    TwoViews,
    draws,
    normalize,
    omitted_operations,
    operations,
)
from byol_timm.views.crops import _rotate

MANY = range(20_000)
RAW = {"mean": (0.0,), "std": (1.0,)}


def photos(count, size, channels=3):
    """Cuts of two photographs, uint8 [count, channels, size, size]; more channels repeat the colours."""
    images = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    cuts = [images[i % 2, :, 20 + 9 * i :, 30 + 13 * i :][:, :size, :size] for i in range(count)]
    return torch.stack(cuts).repeat(1, 3, 1, 1)[:, :channels].contiguous()


def planes(images):
    """[B, C, H, W] as the operations read it, [C, B, pixels]."""
    return torch.as_tensor(images).transpose(0, 1).flatten(2).clone()


def scratch(pixels):
    return torch.empty(operations.SCRATCH_PLANES, *pixels.shape[1:])


def amount_of(pixels, value):
    return torch.full((pixels.shape[1], 1), value)


def draw_crops(augmentation, height, width, ordinals=MANY, seed=0):
    uniforms = draws._uniforms(seed, ordinals, draws.CROP_DRAWS)
    return draws.draw_crops(augmentation, uniforms, height, width)


def draw_changes(augmentation, ordinals=MANY, seed=0):
    return draws.draw_changes(augmentation, draws._uniforms(seed, ordinals, draws.CHANGE_DRAWS))


def test_a_compiled_function_makes_the_same_views():
    views = TwoViews(AUGMENTATIONS["paper"], 32, **RAW)
    images, ordinals = photos(4, 40), torch.arange(4)

    def both(images, ordinals):
        crops = torch.stack([views.cut(image, n) for n, image in enumerate(images)])
        return *(view * 2 for view in views(images, ordinals)), *views.finish(crops, ordinals)

    compiled = torch.compile(both, backend="eager")(images, ordinals)
    assert all(torch.equal(*pair) for pair in zip(compiled, both(images, ordinals), strict=True))


GOLDEN_JITTERS = {
    "brightness_add": (operations.shift_brightness, (-0.4, 0.15, 0.4)),
    "contrast": (operations.contrast_by_channel, (0.6, 1.0, 1.4)),
    "saturation": (operations.saturate_hsv, (0.8, 1.2)),
    "hue": (operations.rotate_hue, (-0.1, 0.07)),
}


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize(("name", "value"), [(name, v) for name, (_, values) in GOLDEN_JITTERS.items() for v in values])
def test_paper_jitters_equal_the_authors_code(golden, size, name, value):
    pixels = planes(golden[f"aug{size}/image"])
    GOLDEN_JITTERS[name][0](pixels, amount_of(pixels, value), scratch(pixels))
    torch.testing.assert_close(pixels, planes(golden[f"aug{size}/{name}/{value}"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [32, 96])
def test_grayscale_and_solarize_equal_the_authors_code(golden, size):
    pixels = planes(golden[f"aug{size}/image"])
    gray = operations.grayscale(pixels).expand_as(pixels)
    torch.testing.assert_close(gray, planes(golden[f"aug{size}/grayscale"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(operations.solarize(pixels), planes(golden[f"aug{size}/solarize"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "taps"), [(32, 3), (96, 9)])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_paper_blur_equals_the_authors_code(golden, size, taps, sigma):
    assert operations.blur_taps(size) == taps
    pixels = torch.from_numpy(golden[f"aug{size}/image"]).transpose(0, 1).clone()
    operations.blur(pixels, torch.full((pixels.shape[1],), sigma), taps, "zeros")
    expected = torch.from_numpy(golden[f"aug{size}/blur/{sigma}"]).transpose(0, 1)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("operation", "reference", "value"),
    [
        (operations.scale_brightness, tvf.adjust_brightness, 0.6),
        (operations.scale_brightness, tvf.adjust_brightness, 1.4),
        (operations.contrast_about_gray, tvf.adjust_contrast, 0.6),
        (operations.contrast_about_gray, tvf.adjust_contrast, 1.4),
        (operations.saturate_from_gray, tvf.adjust_saturation, 0.8),
        (operations.saturate_from_gray, tvf.adjust_saturation, 1.2),
        (operations.rotate_hue, tvf.adjust_hue, -0.1),
        (operations.rotate_hue, tvf.adjust_hue, 0.1),
        (operations.rotate_hue, tvf.adjust_hue, 1 / 6),
        (operations.rotate_hue, tvf.adjust_hue, 0.0),
    ],
)
def test_torchvision_jitters_equal_torchvision(operation, reference, value):
    images = torch.cat([photos(4, 48) / 255, torch.rand(2, 3, 48, 48)])
    pixels = planes(images)
    operation(pixels, amount_of(pixels, value), scratch(pixels))
    torch.testing.assert_close(pixels, planes(reference(images, value)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [-0.1, 0.05])
def test_hue_leaves_grey_black_and_white_alone(value):
    pixels = torch.tensor([0.0, 0.3, 1.0]).expand(3, 1, 3).clone()
    operations.rotate_hue(pixels, amount_of(pixels, value), scratch(pixels))
    operations.saturate_hsv(pixels, amount_of(pixels, 1.2), scratch(pixels))
    torch.testing.assert_close(pixels, torch.tensor([0.0, 0.3, 1.0]).expand(3, 1, 3))


@pytest.mark.parametrize(("size", "taps"), [(32, 3), (96, 9), (224, 23), (50, 5)])
def test_torchvision_blur_equals_torchvision(size, taps):
    assert operations.blur_taps(size) == taps
    images = torch.rand(3, 3, size, size)
    sigmas = torch.tensor([0.1, 0.9, 2.0])
    expected = torch.cat([tvf.gaussian_blur(x[None], taps, [s]) for x, s in zip(images, sigmas.tolist(), strict=True)])
    blurred = operations.blur(images.transpose(0, 1).clone(), sigmas, taps, "reflect").transpose(0, 1)
    torch.testing.assert_close(blurred, expected, rtol=0, atol=1e-5)


def test_blur_takes_rectangles():
    images = torch.rand(2, 3, 40, 72)
    expected = tvf.gaussian_blur(images, 5, [1.3])
    blurred = operations.blur(images.transpose(0, 1).clone(), torch.tensor([1.3, 1.3]), 5, "reflect").transpose(0, 1)
    torch.testing.assert_close(blurred, expected, rtol=0, atol=1e-5)


PLAIN = Augmentation(jitter=0.0, grayscale=0.0, blur=(0.0, 0.0), solarize=(0.0, 0.0))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("source", "size"), [((32, 32), 32), ((28, 28), 32), ((40, 48), (24, 36)), ((8, 8), 32)])
def test_crops_by_matrix_product_equal_interpolation_of_the_crop(interpolation, source, size):
    augmentation = replace(PLAIN, interpolation=interpolation)
    images = photos(6, 48)[:, :, : source[0], : source[1]].contiguous()
    two_views = TwoViews(augmentation, size, seed=5, **RAW)
    views = torch.cat(two_views(images, torch.arange(6)))
    crops = draw_crops(augmentation, *source, ordinals=range(6), seed=5)
    assert 0 < crops.flip.sum() < 12
    for row, view in enumerate(views):
        top, left, height, width = crops.box[row]
        cut = images[row % 6, None, :, top : top + height, left : left + width].float()
        expected = F.interpolate(cut, view.shape[1:], mode=interpolation, antialias=True)[0].clamp(0, 255) / 255
        torch.testing.assert_close(view, expected.flip(-1) if crops.flip[row] else expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_crops_one_by_one_equal_interpolation_of_the_crop(interpolation):
    augmentation = replace(PLAIN, interpolation=interpolation)
    images, ordinals = photos(5, 120), torch.arange(5)
    two_views = TwoViews(augmentation, 96, **RAW)
    views = torch.cat(two_views(images, ordinals))
    crops = draw_crops(augmentation, 120, 120, ordinals=range(5))
    for row, view in enumerate(views):
        top, left, height, width = crops.box[row]
        cut = images[row % 5, None, :, top : top + height, left : left + width].float()
        expected = F.interpolate(cut, (96, 96), mode=interpolation, antialias=True)[0].clamp(0, 255) / 255
        difference = (view - (expected.flip(-1) if crops.flip[row] else expected)).abs()
        # The uint8 kernel clips bicubic's overshoot between its two passes, too: a few pixels at hard edges.
        assert (difference > 2 / 255).float().mean() <= (1e-3 if interpolation == "bicubic" else 0)


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [32, 96])
def test_cut_and_finish_draw_what_the_memory_path_draws(name, size):
    images, ordinals = photos(8, size), torch.arange(100, 108)
    two_views = TwoViews(AUGMENTATIONS[name], size, seed=3, **RAW)
    crops = torch.stack([two_views.cut(image, int(ordinal)) for image, ordinal in zip(images, ordinals, strict=True)])
    assert crops.dtype == torch.uint8 and crops.shape == (8, 2, 3, size, size)
    for view, finished in zip(two_views(images, ordinals), two_views.finish(crops, ordinals), strict=True):
        if size == 96:
            assert torch.equal(view, finished)
        else:
            # Solarize turns a rounding at one half into no jump, hue and saturation may stretch one by a little.
            assert (view - finished).abs().mean() < 1 / 255


def test_digits_are_turned_the_same_in_both_paths():
    images = torch.from_numpy(load_digits().images[:16].astype(np.uint8) * 15)[:, None]
    two_views = TwoViews(replace(PLAIN, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, rotate=12.0), 8, **RAW)
    views = two_views(images, torch.arange(16))
    crops = torch.stack([two_views.cut(image, i) for i, image in enumerate(images)])
    for view, finished in zip(views, two_views.finish(crops, torch.arange(16)), strict=True):
        torch.testing.assert_close(view, finished, rtol=0, atol=1 / 255)
        assert ((view - images / 255).abs().amax((1, 2, 3)) > 1e-3).all()


def test_rotation_turns_by_the_angle():
    images = torch.rand(2, 3, 33, 33)
    turned = _rotate(images, torch.tensor([90.0, 0.0]))
    torch.testing.assert_close(turned[0], images[0].rot90(1, (1, 2)), rtol=0, atol=1e-4)
    torch.testing.assert_close(turned[1], images[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("colors", ["paper", "torchvision"])
def test_draws_depend_on_seed_and_ordinal_only(colors):
    images = photos(24, 32)
    ordinals = torch.arange(24) * 7
    two_views = TwoViews(Augmentation(colors=colors), 32, seed=11, **RAW)
    whole = torch.stack(two_views(images, ordinals))
    again = torch.stack(TwoViews(Augmentation(colors=colors), 32, seed=11, **RAW)(images, ordinals))
    assert torch.equal(whole, again)
    shuffled = torch.randperm(24)[:13]
    part = torch.stack(two_views(images[shuffled], ordinals[shuffled]))
    # The matrix products of another batch size may sum in another order.
    torch.testing.assert_close(part, whole[:, shuffled], rtol=0, atol=1e-5)
    other = torch.stack(TwoViews(Augmentation(colors=colors), 32, seed=12, **RAW)(images, ordinals))
    assert ((other - whole).abs().amax((2, 3, 4)) > 0.01).all()


def test_an_earlier_batch_can_be_written_over():
    images = photos(6, 32)
    two_views = TwoViews(AUGMENTATIONS["paper"], 32, **RAW)
    first = two_views(images, torch.arange(6))
    expected = two_views(images, torch.arange(6, 12))
    views = two_views(images, torch.arange(6, 12), out=first)
    assert views[0] is first[0] and all(map(torch.equal, views, expected))
    assert len(two_views(images[:4], torch.arange(4), out=first)[0]) == 4


def test_all_images_of_a_batch_and_both_views_differ():
    image = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8).expand(32, -1, -1, -1)
    views = torch.cat(TwoViews(AUGMENTATIONS["paper"], 32, **RAW)(image, torch.arange(32))).flatten(1)
    distances = torch.cdist(views, views).fill_diagonal_(torch.inf)
    assert distances.min() > 0.1


def within_four_sigma(mask, probability):
    sigma = (probability * (1 - probability) / len(mask)) ** 0.5
    return abs(mask.mean() - probability) <= 4 * sigma


def test_operations_apply_at_their_rates():
    changes, crops = draw_changes(Augmentation()), draw_crops(Augmentation(), 32, 32)
    first, second = slice(0, len(MANY)), slice(len(MANY), None)
    for view in (first, second):
        assert within_four_sigma(crops.flip[view], 0.5)
        assert within_four_sigma(changes.jitter[view], 0.8)
        assert within_four_sigma(changes.grayscale[view], 0.2)
    assert changes.blur[first].all() and within_four_sigma(changes.blur[second], 0.1)
    assert not changes.solarize[first].any() and within_four_sigma(changes.solarize[second], 0.2)


def test_every_order_of_the_jitters_is_as_likely():
    order = draw_changes(Augmentation()).order
    for expected in permutations(range(4)):
        assert within_four_sigma((order == expected).all(axis=1), 1 / 24)


def test_strengths_are_uniform_over_their_ranges():
    paper, torchvision = draw_changes(Augmentation()), draw_changes(AUGMENTATIONS["torchvision"])
    ranges = [(-0.4, 0.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    columns = [*zip(paper.amount.T, ranges, strict=True), (torchvision.amount[:, 0], (0.6, 1.4))]
    for values, (low, high) in [*columns, (paper.sigma, (0.1, 2.0))]:
        counts = np.histogram(values, bins=10, range=(low, high))[0]
        assert counts.sum() == len(values)
        assert all(within_four_sigma(np.arange(len(values)) < count, 0.1) for count in counts)


def test_draws_are_independent_of_each_other_and_of_the_view():
    uniforms = draws._uniforms(0, MANY, range(0, draws.CHANGE_DRAWS.stop))
    both = np.concatenate([uniforms[: len(MANY)], uniforms[len(MANY) :]], axis=1)
    correlations = np.corrcoef(np.concatenate([both[:-1], both[1:]], axis=1).T)
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 5 / len(MANY) ** 0.5


@pytest.mark.parametrize(("height", "width"), [(400, 400), (375, 500), (32, 32), (10, 200)])
def test_crops_lie_inside_the_image_with_the_areas_and_ratios_asked_for(height, width):
    crops = draw_crops(Augmentation(), height, width)
    top, left, rows, columns = crops.box.T
    assert (crops.box >= (0, 0, 1, 1)).all() and (top + rows <= height).all() and (left + columns <= width).all()
    if height == 400:
        share, ratio = rows * columns / (height * width), columns / rows
        assert 0.075 < share.min() < 0.09 and 0.95 < share.max() <= 1
        assert 0.74 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.35
        assert abs(np.log(ratio).mean()) < 0.02
        # A large share fits with fewer ratios, so the mean is below that of U(0.08, 1).
        assert 0.45 < share.mean() < 0.54
        assert len(np.unique(top)) > 250 and len(np.unique(left)) > 250


def test_images_too_long_for_any_crop_get_their_centre():
    box = draw_crops(replace(PLAIN, crop_scale=(0.9, 1.0)), 10, 200, ordinals=range(20)).box
    assert (box == (0, 93, 10, 13)).all()


@pytest.mark.parametrize("colors", ["paper", "torchvision"])
@pytest.mark.parametrize(("channels", "left_out"), [(1, 3), (3, 0), (4, 3), (6, 3)])
def test_any_number_of_channels_works_and_the_omissions_are_named(colors, channels, left_out):
    augmentation = Augmentation(colors=colors)
    assert len(omitted_operations(augmentation, channels)) == left_out
    images = photos(16, 32, channels)
    views = TwoViews(augmentation, 32, **RAW)(images, torch.arange(16))
    for view in views:
        assert view.shape == (16, channels, 32, 32) and view.dtype == torch.float32 and view.is_contiguous()
        assert view.min() >= 0 and view.max() <= 1 and view.isfinite().all()
    if channels == 6:
        # Channels 3..5 of the images repeat 0..2, and nothing mixes channels.
        torch.testing.assert_close(views[0][:, :3], views[0][:, 3:])


def test_switched_off_operations_are_not_named_as_omitted():
    assert omitted_operations(AUGMENTATIONS["digits"], 1) == ()
    assert omitted_operations(AUGMENTATIONS["paper"], 1) == ("saturation", "hue", "grayscale")


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_views_stay_in_the_range_of_pixels_and_are_normalised_by_channel(name):
    images, ordinals = photos(40, 48), torch.arange(40)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    raw = TwoViews(AUGMENTATIONS[name], 32, **RAW)(images, ordinals)
    views = TwoViews(AUGMENTATIONS[name], 32, mean=mean, std=std)(images, ordinals)
    for pixels, view in zip(raw, views, strict=True):
        assert pixels.min() >= 0 and pixels.max() <= 1
        expected = tvf.normalize(pixels, list(mean), list(std))
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)


def test_operations_follow_each_other_in_the_order_of_the_paper():
    augmentation = replace(PLAIN, jitter=1.0, grayscale=1.0, blur=(1.0, 1.0), solarize=(1.0, 1.0))
    images = photos(6, 64)
    two_views = TwoViews(augmentation, 64, seed=2, **RAW)
    changes = draw_changes(augmentation, range(6), seed=2)
    crops = torch.stack([two_views.cut(image, i) for i, image in enumerate(images)])
    jitters = operations.jitter_operations(augmentation, 3)
    views = torch.cat(two_views.finish(crops, torch.arange(6)))
    for row, view in enumerate(views):
        pixels = planes(crops[row % 6, row // 6, None] / 255)
        for kind in changes.order[row]:
            jitters[kind](pixels, amount_of(pixels, changes.amount[row, kind]), scratch(pixels))
        gray = operations.grayscale(pixels).expand(3, -1, -1).reshape(3, 1, 64, 64).clone()
        sigma = torch.tensor([changes.sigma[row]], dtype=torch.float32)
        expected = operations.solarize(operations.blur(gray, sigma, operations.blur_taps(64), "zeros"))
        torch.testing.assert_close(view, expected[:, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_autocast_does_not_touch_the_views(name):
    images, ordinals = photos(8, 32), torch.arange(8)
    two_views = TwoViews(AUGMENTATIONS[name], 32, **RAW)
    expected = two_views(images, ordinals)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        views = two_views(images, ordinals)
    for view, same in zip(views, expected, strict=True):
        assert view.dtype == torch.float32 and torch.equal(view, same) and not view.requires_grad


def test_two_views_travel_to_spawned_workers():
    two_views = TwoViews(AUGMENTATIONS["torchvision"], 32, seed=4, **RAW)
    image = photos(1, 80)[0]
    assert torch.equal(pickle.loads(pickle.dumps(two_views)).cut(image, 9), two_views.cut(image, 9))


@pytest.mark.parametrize(("height", "width"), [(30, 40), (150, 200), (900, 700)])
def test_a_reduction_is_the_most_that_leaves_both_crops_twice_the_views_size(height, width):
    two_views = TwoViews(AUGMENTATIONS["paper"], 32, seed=4, **RAW)
    seen = set()
    for ordinal in range(200):
        boxes = draws.draw_crops(
            two_views.augmentation, draws._uniforms(4, [ordinal], draws.CROP_DRAWS), height, width
        ).box
        times = two_views.reduction(ordinal, height, width)
        smallest = boxes[:, 2:].min()
        assert times == 1 or smallest >= 64 * times
        assert times == 8 or smallest < 128 * times
        seen.add(times)
    assert seen == {30: {1}, 150: {1, 2}, 900: {2, 4, 8}}[height]


def test_layout_of_the_decoded_image_does_not_matter():
    image = photos(1, 120)[0]
    interleaved = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    two_views = TwoViews(AUGMENTATIONS["paper"], 64, **RAW)
    difference = two_views.cut(image, 1).int() - two_views.cut(interleaved, 1).int()
    assert difference.abs().max() <= 1


@pytest.mark.parametrize(
    ("setting", "value"),
    [("flip", 1.5), ("hue", 0.3), ("crop_scale", (0.5, 0.1)), ("colors", "sepia"), ("blur", (1.0, 2.0))],
)
def test_impossible_settings_are_named(setting, value):
    with pytest.raises(ByolTimmError, match=setting):
        Augmentation(**{setting: value})


def test_statistics_for_another_number_of_channels_are_refused():
    with pytest.raises(ByolTimmError, match="4 channels"):
        TwoViews(PLAIN, 32, mean=(0.5,) * 3, std=(0.5,) * 3)(photos(1, 32, 4), torch.arange(1))
    with pytest.raises(ByolTimmError, match="4 channels"):
        normalize(photos(1, 32, 4), (0.5,) * 3, (0.5,) * 3)


def test_evaluation_transform_resizes_the_short_side_and_takes_the_centre():
    image = torch.from_numpy(np.array(load_sample_images().images[0])).permute(2, 0, 1)
    transform = pickle.loads(pickle.dumps(EvaluationTransform(224, crop_pct=0.875)))
    expected = tvf.center_crop(tvf.resize(image, 256, tvf.InterpolationMode.BICUBIC, antialias=True), [224, 224])
    difference = (transform(image).int() - expected.int()).abs()
    # torchvision resizes in floating point, the uint8 kernel rounds between its two passes.
    assert difference.max() <= 4 and difference.float().mean() < 0.25
    assert transform(image).dtype == torch.uint8 and transform(image).is_contiguous()


def test_evaluation_transform_leaves_images_of_the_right_size_alone():
    image = photos(1, 32)[0]
    assert EvaluationTransform(32)(image) is image
    assert EvaluationTransform((32, 48))(image).shape == (3, 32, 48)


def test_normalize_equals_torchvision():
    images = photos(2, 32)
    expected = tvf.normalize(images / 255, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    torch.testing.assert_close(normalize(images, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), expected)
