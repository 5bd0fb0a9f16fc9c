import copy
import dataclasses
import re

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from byol_timm.byol import BYOL
from byol_timm.cli import parse, presets
from byol_timm.config import PretrainConfig, check
from byol_timm.encoders import fit_backbone, parse_kwargs, small_image_kwargs
from byol_timm.errors import ByolTimmError
from byol_timm.pretraining import pretrain, resolve_images, resolve_training
from byol_timm.pretraining.dry_run import compared
from byol_timm.training import Schedule, create_optimizer

IMAGENET = 1_281_167
GIVEN_SIZE = 32


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def settings(name, *flags):
    return parse(PretrainConfig, ["--config", name, *flags])


def encoder_on_meta(config):
    kwargs = parse_kwargs(tuple(pair for pair in config.backbone_kwargs if pair != "auto"))
    fitted = dict(image_size=config.image_size, in_chans=config.in_chans, **kwargs)
    if "auto" in config.backbone_kwargs:
        fitted |= small_image_kwargs(config.backbone, **fitted)
    return fit_backbone(config.backbone, **fitted).encoder


def resolved(config, num_images, forwards):
    config = resolve_images(config, GIVEN_SIZE)
    config = resolve_training(config, encoder_on_meta(config), num_images, forwards)
    return config, Schedule.of(config, num_images, forwards)


@pytest.mark.parametrize("name", presets())
def test_a_preset_is_settings_with_their_source_their_result_and_their_launch(name):
    text = presets()[name].read_text(encoding="utf-8")
    assert yaml.safe_load(text).keys() <= {field.name for field in dataclasses.fields(PretrainConfig)}
    for label in ("source", "published", "here", "launch"):
        assert re.search(rf"^# {label} ", text, re.MULTILINE), label
    assert "dataset" in yaml.safe_load(text)
    # Accelerate passes that flag on to DeepSpeed alone and drops it otherwise.
    assert "--gradient_accumulation_steps" not in text


@pytest.mark.parametrize("name", presets())
def test_a_preset_fits_its_backbone_and_leaves_nothing_to_guess(name):
    config = settings(name)
    check(config)
    after, schedule = resolved(config, num_images=10_000, forwards=1)
    given = yaml.safe_load(presets()[name].read_text(encoding="utf-8"))
    assert {key: getattr(after, key) for key in given} == {key: getattr(config, key) for key in given}
    assert {
        "backbone",
        "image_size",
        "augmentation",
        "epochs",
        "batch_size",
        "opt",
        "lr",
        "weight_decay",
    } <= given.keys()
    assert {"target_decay", "warmup_epochs"} <= given.keys()
    assert schedule.warmup_steps == round(config.warmup_epochs * schedule.steps_per_epoch) < schedule.total_steps


@pytest.mark.parametrize(
    "name, epochs, forwards, batch, peak_lr, weight_decay, tau",
    [
        ("imagenet_40", 40, 64, 4096, 7.2, 1e-6, 0.97),
        ("imagenet_100", 100, 64, 4096, 7.2, 1e-6, 0.99),
        ("imagenet_300", 300, 64, 4096, 4.8, 1e-6, 0.99),
        ("imagenet_1000", 1000, 64, 4096, 3.2, 1.5e-6, 0.996),
        ("imagenet_1000_batch512", 1000, 8, 512, 0.8, 1.5e-6, 0.9995),
    ],
)
def test_the_authors_schedules_come_out(name, epochs, forwards, batch, peak_lr, weight_decay, tau):
    config, schedule = resolved(settings(name), IMAGENET, forwards)
    assert (schedule.global_batch, config.opt, config.weight_decay) == (batch, "lars", weight_decay)
    assert schedule.total_steps == epochs * (IMAGENET // batch)
    assert schedule.warmup_steps == 10 * (IMAGENET // batch)
    assert schedule.lr(schedule.warmup_steps) == pytest.approx(peak_lr)
    middle = (schedule.warmup_steps + schedule.total_steps) // 2
    assert schedule.lr(middle) == pytest.approx(peak_lr / 2, rel=1e-3)
    decays = [schedule.target_decay(step) for step in (0, schedule.total_steps // 2, schedule.total_steps)]
    assert decays == pytest.approx([tau, (1 + tau) / 2, 1.0], abs=1e-6)


def test_other_data_keep_a_presets_epochs_and_get_their_own_steps():
    (_, large), (_, small) = (resolved(settings("cifar10"), images, 1) for images in (50_000, 5_120))
    assert (large.steps_per_epoch, large.warmup_steps, large.total_steps) == (97, 970, 800 * 97)
    assert (small.steps_per_epoch, small.warmup_steps, small.total_steps) == (10, 100, 8000)
    assert large.peak_lr == small.peak_lr == pytest.approx(0.06)


# lightly's learning rate at the batch of the preset, and its weight decay.
LIGHTLY = {name: (0.24, 5e-4) for name in ("cifar10", "cifar10_blur", "cifar100", "cifar100_blur")}
LIGHTLY |= {"stl10": (0.06, 5e-4), "satellite": (0.12, 5e-4)}


@pytest.mark.parametrize("name", LIGHTLY)
def test_a_preset_from_lightly_takes_the_steps_that_lightly_takes(name):
    config = settings(name)
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8))
    ours = BYOL(encoder, width=8, hidden_dim=16, projection_dim=4)
    theirs = copy.deepcopy(ours)
    our_lr = config.lr * config.batch_size / 256
    optimizer = create_optimizer(config.opt, ours, lr=our_lr, weight_decay=config.weight_decay)
    lr, weight_decay = LIGHTLY[name]
    groups = [
        dict(params=[p for p in theirs.parameters() if p.requires_grad and p.ndim > 1], weight_decay=weight_decay),
        dict(params=[p for p in theirs.parameters() if p.requires_grad and p.ndim <= 1]),
    ]
    source = torch.optim.SGD(groups, lr=lr, momentum=0.9)

    def negative_cosine(view, target):
        prediction = theirs.predictor(theirs.projector(theirs.encoder(view)))
        return -torch.nn.functional.cosine_similarity(prediction, target).mean()

    for _ in range(3):
        view1, view2 = torch.rand(2, 32, 3, 2, 2)
        optimizer.zero_grad()
        ours(view1, view2)["loss"].backward()
        optimizer.step()
        source.zero_grad()
        target1, target2 = theirs.target_projections(view1, view2)
        (0.5 * (negative_cosine(view1, target2) + negative_cosine(view2, target1))).backward()
        source.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_the_digits_preset_is_the_run_without_flags():
    assert resolved(settings("digits"), 1438, 1) == resolved(PretrainConfig(), 1438, 1)


def test_flags_win_over_a_preset():
    assert settings("cifar10", "--lr", "0.5", "--dataset", "digits").lr == 0.5


@pytest.mark.parametrize("typed, meant", [("cifar1", "cifar10"), ("imagnet_300", "imagenet_300"), ("xyz", "")])
def test_an_unknown_preset_is_one_line_with_the_nearest_names_and_all(typed, meant):
    with pytest.raises(ByolTimmError) as caught:
        settings(typed)
    message = str(caught.value)
    assert message.startswith(f"no preset '{typed}'. {f'Did you mean {meant}' if meant else 'Known:'}")
    assert all(name in message for name in presets()) and "\n" not in message


@pytest.mark.parametrize(
    "name, channels, flags",
    [
        ("satellite", 13, ["--backbone", "test_resnet"]),
        ("medical_grey", 1, ["--backbone", "test_resnet", "--image_size", "64"]),
        ("vit_small", 3, ["--backbone", "test_vit", "--image_size", "64"]),
    ],
)
def test_a_preset_rehearses_on_images_of_its_kind(tmp_path, caplog, name, channels, flags):
    (tmp_path / "images").mkdir()
    for number in range(16):
        np.save(
            tmp_path / "images" / f"{number}.npy",
            np.random.default_rng(number).integers(0, 256, (channels, 64, 64), np.uint8),
        )
    caplog.set_level("INFO")
    tiny = ["--batch_size", "8", "--dataset", str(tmp_path / "images"), "--output_dir", str(tmp_path / "run")]
    pretrain(settings(name, *flags, *tiny, "--workers", "0", "--hidden_dim", "64", "--dry_run"))
    assert f"{channels} x 64 x 64" in caplog.text and "images/s" in caplog.text


# Compared with the paper


def changed(config, images=IMAGENET, forwards=64):
    config = resolve_images(config, 224)
    settings = resolve_training(config, encoder_on_meta(config), images, forwards)
    values = compared(settings, settings.batch_size * forwards)
    return {name for name, (here, paper) in values.items() if here != paper}


def test_the_authors_preset_changes_nothing_of_the_paper():
    assert changed(settings("imagenet_1000")) == set()


@pytest.mark.parametrize(
    "changes, names",
    [
        *((changes, set(changes)) for changes in (
            dict(lr=0.3), dict(opt="sgd"), dict(weight_decay=0.0), dict(target_decay=0.99), dict(warmup_epochs=5.0),
            dict(epochs=300), dict(hidden_dim=512), dict(projection_dim=128), dict(num_head_layers=3),
            dict(zero_init_last=True), dict(freeze=("stem",)), dict(image_size=96), dict(in_chans=1),
            dict(crop_scale=(0.2, 1.0)), dict(fast_jpeg=True), dict(rotate=5.0), dict(flip=0.0),
            dict(colors="torchvision"), dict(blur=(0.5, 0.5)), dict(solarize=(0.2, 0.2)), dict(jitter=0.0),
            dict(pretrained=True), dict(training_state="RUN/checkpoints/step-5"), dict(image_share=0.1),
        )),
        (dict(batch_size=128), {"global_batch"}),
        (dict(augmentation="torchvision"), {"augmentation", "colors"}),
        # What does not change what is learned.
        (dict(dataset="images", seed=3, workers=1, save_every=7, compile=True, output_dir="runs/x"), set()),
    ],
)  # fmt: skip
def test_each_change_of_a_setting_shows_under_its_own_name(changes, names):
    paper = dataclasses.replace(settings("imagenet_1000"), backbone="test_resnet")
    assert changed(dataclasses.replace(paper, **changes)) == {"backbone"} | names
