from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits

from byol_timm.data import open_dataset
from byol_timm.encoders import create_encoder
from byol_timm.evaluation import Examples, LinearProbe, Preparation

FEATURES = torch.tensor(load_digits().data, dtype=torch.float32) / 16
PREPARATION = Preparation.square(32, (0.5,), (0.5,), workers=0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def splits():
    return open_dataset("digits", in_chans=1)


def batches(count, images, start=0):
    """Ordinals of batches of 64, of many epochs."""
    for step in range(start, start + count):
        yield torch.arange(64 * step, 64 * (step + 1)) * 7 % (9 * len(images))


def features_of(ordinals, images):
    return FEATURES[images.rows[ordinals % len(images)]]


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_the_probe_learns_the_labels_of_the_images_it_is_given_within_an_epoch_or_five(splits, scale):
    probe = LinearProbe(64, splits.train, CPU)
    for ordinals in batches(110, splits.train):
        probe.learn(scale * features_of(ordinals, splits.train), ordinals)
    assert probe.accuracy(scale * FEATURES[splits.test.rows], torch.tensor(splits.test.labels)) > 0.85


def test_the_probe_does_not_learn_from_images_that_stand_in_for_bad_ones(splits):
    probe, (ordinals,) = LinearProbe(64, splits.train, CPU), batches(1, splits.train)
    probe.learn(features_of(ordinals, splits.train), ordinals, bad=dict.fromkeys(ordinals.tolist(), "broken"))
    assert not any(parameter.any() for parameter in probe.classifier.parameters())
    probe.learn(features_of(ordinals, splits.train), ordinals)
    assert all(parameter.any() for parameter in probe.classifier.parameters())


def test_the_probe_gives_no_gradient_and_overlooks_unlabelled_images(splits):
    probe, (ordinals,) = LinearProbe(64, splits.train, CPU), batches(1, splits.train)
    features = features_of(ordinals, splits.train).requires_grad_()
    probe.learn(features, ordinals)
    assert features.grad is None
    labels = torch.tensor(splits.train.labels[ordinals % len(splits.train)])
    partly = torch.cat([labels[:32], torch.full((32,), -1)])
    assert probe.accuracy(features, partly) == probe.accuracy(features[:32], labels[:32]) > 0
    assert probe.accuracy(features, torch.full((64,), -1)) == 0


def test_a_restored_probe_goes_on_to_the_same_bits(splits):
    whole, before, after = (LinearProbe(64, splits.train, CPU) for _ in range(3))
    for probe, count in ((whole, 20), (before, 12)):
        for ordinals in batches(count, splits.train):
            probe.learn(features_of(ordinals, splits.train), ordinals)
    after.restore(before.tensors())
    for ordinals in batches(8, splits.train, start=12):
        after.learn(features_of(ordinals, splits.train), ordinals)
    for first, second in zip(whole.classifier.parameters(), after.classifier.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("count", [2, 3, 40])
def test_pictures_of_images_without_labels(splits, count, tmp_path):
    images = replace(splits.train.subset(range(count)), labels=None, class_names=())
    examples = Examples.load(images, None, PREPARATION, seed=0)
    assert len(examples.bank) + len(examples.queries) == count
    assert len(examples.queries) >= 1
    assert (examples.bank_labels == -1).all() and (examples.query_labels == -1).all()
    encoder = create_encoder("test_resnet", image_size=32, in_chans=1, output_stride=8)
    examples.save_pictures(encoder, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"embedding.png", "neighbours.png"}
