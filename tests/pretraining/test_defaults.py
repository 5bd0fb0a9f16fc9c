import dataclasses

import pytest
import timm

from byol_timm.config import PretrainConfig, check, output_dir
from byol_timm.encoders import normalization
from byol_timm.errors import ByolTimmError
from byol_timm.pretraining import resolve_augmentation, resolve_images, resolve_intervals, resolve_training


def resolved(backbone, num_images=50_000, forwards=1, **settings):
    config = resolve_images(PretrainConfig(backbone=backbone, dataset="some/folder", **settings), 32)
    return resolve_training(config, timm.create_model(backbone, num_classes=0), num_images, forwards)


@pytest.mark.parametrize(
    "backbone, opt, layers, freeze, channels_last",
    [
        ("test_resnet", "lars", 2, (), True),
        ("test_efficientnet", "lars", 2, (), True),
        ("test_convnext", "adamw", 2, (), True),
        ("test_vit", "adamw", 3, ("stem",), False),
        ("test_nfnet", "adamw", 2, (), True),
    ],
)
def test_the_module_not_its_name_decides(backbone, opt, layers, freeze, channels_last):
    config = resolved(backbone)
    assert (config.opt, config.num_head_layers) == (opt, layers)
    assert (config.freeze, config.channels_last) == (freeze, channels_last)
    assert None not in (config.lr, config.epochs, config.batch_size, config.weight_decay, config.target_decay)


def test_what_the_user_asks_for_stays():
    asked = dict(opt="sgd", lr=0.3, epochs=7, batch_size=10, hidden_dim=99, freeze=(), num_head_layers=2)
    config = resolved("test_vit", **asked)
    assert {name: getattr(config, name) for name in asked} == asked


def test_pretrained_patch_embeddings_are_trained_on():
    assert resolved("test_vit", pretrained=True).freeze == ()


@pytest.mark.parametrize("num_images, forwards", [(20, 1), (50_000, 1), (1000, 8), (64, 2)])
def test_a_batch_leaves_at_least_four_steps_an_epoch(num_images, forwards):
    assert num_images // (resolved("test_resnet", num_images, forwards).batch_size * forwards) >= min(4, num_images / 2)


@pytest.mark.parametrize("side, size", [(8, 32), (28, 32), (32, 32), (33, 64), (64, 64), (65, 224), (3000, 224)])
def test_small_images_stay_small(side, size):
    assert resolve_images(PretrainConfig(), side).image_size == size


def test_augmentation_fits_the_images_and_flags_change_it():
    assert resolve_images(PretrainConfig(dataset="x"), 32).augmentation == "small"
    assert resolve_images(PretrainConfig(dataset="x"), 500).augmentation == "paper"
    config = resolve_images(PretrainConfig(dataset="x", crop_scale=(0.5, 0.9), colors="torchvision"), 500)
    augmentation = resolve_augmentation(config)
    assert (augmentation.crop_scale, augmentation.colors) == ((0.5, 0.9), "torchvision")
    assert augmentation.blur == (1.0, 0.1)


@pytest.mark.parametrize("epochs, evaluations", [(1, 1), (5, 4), (100, 10), (1000, 10)])
def test_evaluation_takes_a_small_part_of_a_run(epochs, evaluations):
    assert epochs / resolve_intervals(epochs, steps_per_epoch=10)["knn_every"] <= max(1, evaluations)


def test_a_long_run_is_heard_of_and_saved_as_often_as_a_short_one():
    long = resolve_intervals(epochs=1000, steps_per_epoch=312)
    assert long["log_every"] <= 100 and long["save_every"] <= 2000
    short = resolve_intervals(epochs=10, steps_per_epoch=10)
    assert (short["log_every"], short["save_every"]) == (2, 10)
    asked = resolved("test_resnet", log_every=5000, save_every=9000)
    assert (asked.log_every, asked.save_every) == (5000, 9000)


@pytest.mark.parametrize("opt", ["momentum", "nesterov", "sgdw", "muon", "lion", "adam"])
def test_an_optimizer_without_known_defaults_needs_a_learning_rate(opt):
    with pytest.raises(
        ByolTimmError, match=rf"no default learning rate for --opt {opt}\. Give --lr, and --weight_decay"
    ):
        resolved("test_resnet", opt=opt)
    assert resolved("test_resnet", opt=opt, lr=0.3).lr == 0.3


def test_channels_that_the_backbone_does_not_know_get_mean_values():
    encoder = timm.create_model("resnet18", num_classes=0)
    assert normalization(encoder, 3) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    mean, std = normalization(encoder, 5)
    assert mean == pytest.approx((0.449,) * 5, abs=1e-3) and std == pytest.approx((0.226,) * 5, abs=1e-3)


@pytest.mark.parametrize(
    "backbone, dataset, folder",
    [
        ("resnet18", "digits", "runs/resnet18-digits"),
        ("hf-hub:user/name", "path/to/images/", "runs/name-images"),
        ("local-dir:runs/x/encoder", "user/data", "runs/encoder-data"),
        ("vit_tiny_patch16_224.augreg_in21k", "digits", "runs/vit_tiny_patch16_224.augreg_in21k-digits"),
    ],
)
def test_the_folder_is_named_after_backbone_and_data(backbone, dataset, folder):
    assert str(output_dir(PretrainConfig(backbone=backbone, dataset=dataset))) == folder


@pytest.mark.parametrize(
    "changes",
    [
        dict(batch_size=0),
        dict(lr=-1.0),
        dict(blur=(0.5, 1.5)),
        dict(crop_scale=(0.9, 0.1)),
        dict(num_head_layers=5),
        dict(max_time=0.0),
        dict(lr=float("nan")),
        dict(workers=-1),
        dict(seed=2**64),
        dict(public=True),
    ],
)
def test_impossible_values_are_named(changes):
    [name] = changes
    with pytest.raises(ByolTimmError, match=f"--{name}"):
        check(dataclasses.replace(PretrainConfig(), **changes))
