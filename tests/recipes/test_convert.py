import argparse
import json
import os
import pickle
import runpy
import subprocess
import sys
import types
from collections import OrderedDict, namedtuple
from pathlib import Path

import dill
import numpy as np
import pytest
import timm
import torch
import torchvision
from convert_layouts import convert_checkpoint, read_checkpoint
from safetensors.torch import save_file
from timm.layers import Conv2dSame
from torch import nn

from byol_timm.encoders import create_encoder, files_to_push
from byol_timm.errors import ByolTimmError

RECIPE = Path(__file__).parents[2] / "recipes" / "convert.py"


def resnet(make=torchvision.models.resnet18, **kwargs):
    """A network whose weights and running statistics are those of no one else."""
    network = make(**kwargs)
    network(torch.rand(4, 3, 64, 64))
    return network.eval()


def under(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def without_fc(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def head(prefix, width=512):
    return under(prefix, nn.Sequential(nn.Linear(width, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).state_dict())


def children(network):
    """As `nn.Sequential(*children)` without the classifier names them."""
    return nn.Sequential(*list(network.children())[:-1]).state_dict()


def lightning(state):
    return {
        "epoch": 99, "global_step": 1000, "pytorch-lightning_version": "2.1.0", "state_dict": OrderedDict(state),
        "callbacks": {"ModelCheckpoint": {"best_model_path": ""}}, "optimizer_states": [{"state": {}}],
        "hyper_parameters": {"batch_size_per_device": 256},
    }  # fmt: skip


# What each project's checkpoint holds, of an online network and a target network of torchvision's names.


def lightly_benchmark(online, target):
    heads = (
        head("projection_head.layers.") | head("prediction_head.layers.", 4) | head("teacher_projection_head.layers.")
    )
    backbones = under("backbone.", without_fc(online)) | under("teacher_backbone.", without_fc(target))
    return lightning(backbones | heads | head("online_classifier.linear."))


def lightly_example(online, target):
    return (
        under("backbone.", children(online)) | under("backbone_momentum.", children(target)) | head("projection_head.")
    )


def solo_learn(online, target, name="backbone"):
    backbones = under(f"{name}.", without_fc(online)) | under(f"momentum_{name}.", without_fc(target))
    heads = head("projector.") | head("momentum_projector.") | head("predictor.", 4)
    return lightning(backbones | heads | under("classifier.", nn.Linear(512, 10).state_dict()))


def solo_learn_before_1_0_3(online, target):
    return solo_learn(online, target, name="encoder")


def mmpretrain(online, target):
    ema = under("target_net.module.0.", without_fc(target)) | {"target_net.steps": torch.tensor(7)}
    state = under("backbone.", without_fc(online)) | head("neck.") | head("head.predictor.", 4) | ema
    return {"meta": {"epoch": 200, "mmpretrain_version": "1.2.0"}, "state_dict": OrderedDict(state)}


def mmselfsup_before_1_0(online, target):
    online = without_fc(online)
    state = under("backbone.", online) | under("online_net.0.", online) | under("target_net.0.", without_fc(target))
    return {"meta": {"epoch": 200}, "state_dict": state}


def byol_pytorch(online, target):
    networks = under("net.", online) | under("online_encoder.net.", online) | under("target_encoder.net.", target)
    return (
        networks | head("online_encoder.projector.") | head("target_encoder.projector.") | head("online_predictor.", 4)
    )


def byol_pytorch_net(online, target):
    return online


def moco_v3(online, target):
    online = under("module.base_encoder.", without_fc(online)) | head("module.base_encoder.fc.")
    target = under("module.momentum_encoder.", without_fc(target)) | head("module.momentum_encoder.fc.")
    state = online | target | head("module.predictor.", 4)
    return {"epoch": 300, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


LAYOUTS = {
    lightly_benchmark: "lightly",
    lightly_example: "lightly",
    solo_learn: "solo-learn",
    solo_learn_before_1_0_3: "solo-learn",
    mmpretrain: "mmpretrain",
    mmselfsup_before_1_0: "mmpretrain",
    byol_pytorch: "byol-pytorch",
    byol_pytorch_net: "torchvision",
    moco_v3: "moco-v3",
}
OF_NETWORKS = (lightly_example,)


@pytest.fixture(scope="module")
def networks():
    """An online and a target network for all layouts."""
    torch.manual_seed(0)
    return resnet(), resnet()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_the_online_encoder_of_each_project_comes_out_with_its_features(layout, networks, tmp_path):
    online, _ = networks
    states = networks if layout in OF_NETWORKS else [network.state_dict() for network in networks]
    torch.save(layout(*states), tmp_path / "checkpoint.pth")
    folder = convert_checkpoint(tmp_path / "checkpoint.pth", tmp_path / "encoder", image_size=64)
    images = torch.rand(2, 3, 64, 64)
    features = nn.Sequential(*list(online.children())[:-1])(images).flatten(1)
    for encoder in (
        timm.create_model(f"local-dir:{folder}", pretrained=True),
        create_encoder(f"local-dir:{folder}", image_size=64),
    ):
        torch.testing.assert_close(encoder.eval()(images), features)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "resnet18"
    assert config["pretrained_cfg"]["tag"] == f"byol_{LAYOUTS[layout].replace('-', '_')}"
    assert json.loads((folder / "byol.json").read_text())["converted_from"].startswith(LAYOUTS[layout])


def test_a_vit_of_moco_v3_keeps_its_twelve_heads(tmp_path):
    online = timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0).eval()
    state = under("module.base_encoder.", online.state_dict()) | head("module.base_encoder.head.")
    state |= under("module.momentum_encoder.", online.state_dict())
    torch.save({"state_dict": state}, tmp_path / "vit-s.pth.tar")
    folder = convert_checkpoint(tmp_path / "vit-s.pth.tar", tmp_path / "encoder")
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        features = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
        torch.testing.assert_close(features, online(images))
        assert not torch.allclose(
            timm.create_model(f"local-dir:{folder}", pretrained=True, num_heads=6)(images), features
        )


def test_any_timm_network_converts_when_it_is_named(tmp_path):
    online = resnet(lambda: timm.create_model("test_efficientnet", in_chans=3))
    save_file(under("online_encoder.net.", online.state_dict()), tmp_path / "net.safetensors")
    folder = convert_checkpoint(
        tmp_path / "net.safetensors", tmp_path / "e", source="byol-pytorch", backbone="test_efficientnet", image_size=64
    )
    online.reset_classifier(0)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images), online(images))


# What is refused


def nan(state):
    return {**state, "bn1.weight": torch.full((64,), torch.nan)}


def small_stem(state):
    return {**state, "conv1.weight": torch.zeros(64, 3, 3, 3)}


REFUSED = [
    (lambda s: {"encoder.a": torch.ones(1)}, {}, "not have the layout of a known project"),
    (lambda s: under("backbone.", s), {}, "not have the layout of a known project (its names begin with backbone)"),
    (lambda s: under("backbone.", s) | under("target_net.", s) | under("teacher_backbone.", s), {}, "Say which"),
    (lambda s: {"epoch": 3}, {}, "holds no weights by name"),
    (lambda s: [1, 2], {}, "holds a list"),
    (lambda s: s, {"source": "lightly"}, "has no encoder where lightly keeps it"),
    (lambda s: s, {"source": "haiku"}, "not a checkpoint of the JAX release"),
    (lambda s: s, {"backbone": "resnet50"}, "resnet50 has (64, 64, 1, 1)"),
    (lambda s: s, {"backbone": "resnet81"}, "timm has no backbone 'resnet81'"),
    (lambda s: s, {"backbone": "test_resnet"}, "test_resnet"),
    (lambda s: {**s, "layer9.weight": torch.ones(1)}, {"backbone": "resnet18"}, "timm's resnet18 does not have"),
    (lambda s: {**s, "layer9.weight": torch.ones(1)}, {}, "with --backbone"),
    (nan, {}, "not finite (bn1.weight)"),
    (small_stem, {}, "a ResNet for small images"),
]


@pytest.mark.parametrize(("change", "arguments", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_what_cannot_be_converted_is_refused_in_one_line(change, arguments, message, networks, tmp_path):
    torch.save(change(networks[0].state_dict()), tmp_path / "c.pth")
    with pytest.raises(ByolTimmError) as raised:
        convert_checkpoint(tmp_path / "c.pth", tmp_path / "encoder", **arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "encoder").exists()


def test_files_that_hold_no_weights_are_reported_in_one_line(tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save({"weight": torch.rand(1000)}, whole)
    files = {
        "half.pth": (whole.read_bytes()[:2000], "is damaged"),
        "flipped.pkl": (b"\x80\x02}q\x00(garbage", "is not read"),
        "empty.pth": (b"", "is neither a torch file"),
        "text.pth": (b"hello", "is neither a torch file"),
        "half.safetensors": (b"\x10\x00\x00\x00\x00\x00\x00\x00{", "is damaged"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ByolTimmError, match=message) as raised:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(raised.value)
    with pytest.raises(ByolTimmError, match="cannot be read"):
        read_checkpoint(tmp_path / "missing.pth")
    with pytest.raises(ByolTimmError, match="cannot be read"):
        read_checkpoint(tmp_path)


class Planted:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write_torch(value, path):
    torch.save(value, path)


def write_torch_before_1_6(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def write_pickle(value, path):
    path.write_bytes(pickle.dumps(value))


def write_dill(value, path):
    path.write_bytes(dill.dumps(value, protocol=2))


@pytest.mark.parametrize("write", [write_torch, write_torch_before_1_6, write_pickle, write_dill])
@pytest.mark.parametrize("function", ["system", "eval", "popen", "argparse"])
def test_a_planted_pickle_does_not_run(write, function, tmp_path):
    marker = tmp_path / "ran"
    planted = {
        "system": Planted(os.system, f"touch '{marker}'"),
        "eval": Planted(eval, f"open({str(marker)!r}, 'w')"),
        "popen": Planted(subprocess.Popen, ["touch", str(marker)]),
        "argparse": argparse.Namespace(lr=0.1),
    }[function]
    write({"state_dict": {"weight": planted}, "experiment_state": [planted]}, tmp_path / "c.pth")
    with pytest.raises(ByolTimmError, match="holds other Python objects than weights") as raised:
        convert_checkpoint(tmp_path / "c.pth", tmp_path / "encoder")
    assert "\n" not in str(raised.value)
    assert not marker.exists() and not (tmp_path / "encoder").exists()


# The JAX release


LAYERS = {"conv1": "conv_0", "conv2": "conv_1", "conv3": "conv_2"}
LAYERS |= {"bn1": "batchnorm_0", "bn2": "batchnorm_1", "bn3": "batchnorm_2"}
LAYERS |= {"downsample.0": "shortcut_conv", "downsample.1": "shortcut_batchnorm"}


def haiku_trees(state):
    """Parameters and statistics as haiku names and shapes them, of a ResNet with timm's names."""
    parameters, statistics = {}, {}
    for name, tensor in state.items():
        module, _, value = name.rpartition(".")
        if module.startswith("layer"):
            stage, block, layer = module.split(".", 2)
            module = f"block_group_{int(stage[-1]) - 1}/~/block_{block}/~/{LAYERS[layer]}"
        else:
            module = {"conv1": "initial_conv", "bn1": "initial_batchnorm"}[module]
        module, array = f"res_net50/~/{module}", tensor.numpy()
        if tensor.ndim == 4:
            parameters.setdefault(module, {})["w"] = array.transpose(2, 3, 1, 0)
        elif value in ("weight", "bias"):
            parameters.setdefault(module, {})[{"weight": "scale", "bias": "offset"}[value]] = array[None, None, None]
        elif value.startswith("running"):
            kind = "mean_ema" if value == "running_mean" else "var_ema"
            average = array[None, None, None]
            statistics[f"{module}/~/{kind}"] = {"average": average, "hidden": average * 0, "counter": np.int32(3)}
    parameters["projector/linear"] = {"w": np.ones((4, 4), np.float32), "b": np.zeros(4, np.float32)}
    return parameters, statistics


def release(monkeypatch):
    """The classes that pickles of the JAX release name, where its own modules are not installed."""
    State = namedtuple("_ByolExperimentState", "online_params target_params online_state target_state opt_state")
    Lars = namedtuple("ScaleByLarsState", "mu")
    for module, class_ in (("byol.byol_experiment", State), ("byol.utils.optimizers", Lars)):
        class_.__module__ = module
        for name in ("byol", "byol.utils", module):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        setattr(sys.modules[module], class_.__name__, class_)
    return State, Lars


def write_release(path, monkeypatch, online, target, write=write_dill):
    """online, target: (parameters, statistics)."""
    State, Lars = release(monkeypatch)
    state = State(online[0], target[0], online[1], target[1], (Lars(online[0]), (), 0.1))
    write(dict(experiment_state=state, step=300_000, rng=np.zeros(2, np.uint32)), path)
    return path


def with_same_padding(network):
    """A ResNet of timm with the padding of the JAX release in all strided layers but the first two."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2) and name != "conv1":
                padded = Conv2dSame(layer.in_channels, layer.out_channels, layer.kernel_size, stride=2, bias=False)
                padded.weight = layer.weight
                setattr(parent, name, padded)
    return network


def narrow_resnet50():
    """A ResNet-50 of an eighth of the width, in its stem too."""

    def make():
        network = timm.create_model("resnet50", channels=(8, 16, 32, 64), num_classes=0, zero_init_last=False)
        network.conv1, network.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        block = network.layer1[0]
        block.conv1, block.downsample[0] = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 32, 1, bias=False)
        return network

    return resnet(make)


@pytest.mark.parametrize("write", [write_dill, write_pickle])
def test_the_jax_release_converts_exactly_except_for_the_padding_of_the_stem(write, tmp_path, monkeypatch):
    online, target = narrow_resnet50(), narrow_resnet50()
    trees = haiku_trees(online.state_dict()), haiku_trees(target.state_dict())
    checkpoint = write_release(tmp_path / "pretrain.pkl", monkeypatch, *trees, write=write)
    folder = convert_checkpoint(checkpoint, tmp_path / "encoder", image_size=64)
    encoder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(4, 3, 64, 96)
    features = with_same_padding(online)(images)
    torch.testing.assert_close(encoder(images), features, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(encoder(images.flip(2, 3)), features, atol=0.1)
    card = (folder / "README.md").read_text()
    assert "moved by 3 pixels" in card and "converted from | haiku checkpoint pretrain.pkl" in card


def without_a_block(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("layer1.2.")}


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (without_a_block, {}, "with (2, 4, 6, 3) bottleneck blocks"),
        (lambda s: s, {"backbone": "resnet50"}, "whose weights name the backbone"),
        (lambda s: s, {"source": "lightly"}, "of the JAX release"),
        (lambda s: {**s, "bn1.weight": s["bn1.weight"] * torch.nan}, {}, "not finite"),
    ],
)
def test_what_of_the_jax_release_cannot_be_converted_is_reported_in_one_line(
    change, arguments, message, tmp_path, monkeypatch
):
    tree = haiku_trees(change(narrow_resnet50().state_dict()))
    checkpoint = write_release(tmp_path / "c.pkl", monkeypatch, tree, tree)
    with pytest.raises(ByolTimmError) as raised:
        convert_checkpoint(checkpoint, tmp_path / "encoder", **arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_features_are_those_of_haikus_own_forward_pass(tmp_path, monkeypatch):
    hk, jax = pytest.importorskip("haiku"), pytest.importorskip("jax")

    def forward(images, is_training, both_ends=False):
        """The encoder of the release; both_ends: with the first convolution and pooling padded as in timm."""
        network = hk.nets.ResNet(
            blocks_per_group=(3, 4, 6, 3),
            num_classes=10,
            bn_config={"decay_rate": 0.9, "eps": 1e-5},
            channels_per_group=(32, 64, 128, 256),
            initial_conv_config={"output_channels": 8, "padding": ((3, 3), (3, 3)) if both_ends else "SAME"},
            name="res_net50",
        )
        x = jax.nn.relu(network.initial_batchnorm(network.initial_conv(images), is_training, False))
        if both_ends:
            x = jax.numpy.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = hk.max_pool(x, (1, 3, 3, 1), (1, 2, 2, 1), "VALID" if both_ends else "SAME")
        for group in network.block_groups:
            x = group(x, is_training, False)
        return x.mean((1, 2))

    random = np.random.default_rng(0)
    images = random.normal(size=(4, 64, 96, 3)).astype(np.float32)
    network = hk.without_apply_rng(hk.transform_with_state(forward))
    parameters, statistics = network.init(jax.random.PRNGKey(0), images, True)
    parameters = jax.tree.map(lambda x: x + 0.1 * random.normal(size=x.shape).astype(np.float32), parameters)
    _, statistics = network.apply(parameters, statistics, images, True)
    features, _ = network.apply(parameters, statistics, images, False, both_ends=True)

    def frozen(tree):
        return hk.data_structures.to_immutable_dict(jax.device_get(tree))

    online, other = (frozen(parameters), frozen(statistics)), (frozen(jax.tree.map(lambda x: x * 0, parameters)), {})
    checkpoint = write_release(tmp_path / "pretrain.pkl", monkeypatch, online, other)
    folder = convert_checkpoint(checkpoint, tmp_path / "encoder", image_size=64)
    encoder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    features = torch.from_numpy(np.array(features))
    torch.testing.assert_close(encoder(images), features, rtol=1e-4, atol=1e-4)


# The recipe


def recipe(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *map(str, arguments)])
    status = 0
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_the_recipe_writes_a_folder_that_can_be_pushed(networks, tmp_path, capsys, monkeypatch):
    torch.save(lightly_benchmark(*(network.state_dict() for network in networks)), tmp_path / "byol.ckpt")
    arguments = (tmp_path / "byol.ckpt", tmp_path / "encoder", "--image_size", 64, "--license", "mit")
    status, out, err = recipe(capsys, monkeypatch, *arguments)
    assert status == 0 and f"push_encoder.py {tmp_path / 'encoder'}" in out, err
    assert set(files_to_push(tmp_path / "encoder", "user/name")) == {
        "config.json", "model.safetensors", "README.md", "byol.json"
    }  # fmt: skip
    assert "license: mit" in (tmp_path / "encoder" / "README.md").read_text()
    status, out, err = recipe(capsys, monkeypatch, tmp_path / "none.ckpt", tmp_path / "encoder")
    assert status == 2 and err.startswith("byol_timm: error: ") and err.count("\n") == 1
