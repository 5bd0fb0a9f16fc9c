import copy
import functools
import json
import math
import tempfile
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from byol_timm.byol import BYOL
from byol_timm.encoders import (
    closest_backbones,
    create_encoder,
    encoder_width,
    fit_backbone,
    freeze_parts,
    is_patch_transformer,
    parse_kwargs,
    save_encoder,
    small_image_kwargs,
)
from byol_timm.errors import ByolTimmError
from byol_timm.training import enable_grad_checkpointing

# So many tests share all backbones, so that they can run in parallel.
PARTS = 16
TABLE = Path(__file__).parents[2] / "recipes" / "backbones.md"


def digits(batch=4, size=32, channels=3):
    """Scans of handwritten digits, as many channels as asked for, each a little shifted."""
    images = torch.tensor(load_digits().images[: batch * channels] / 16, dtype=torch.float32)
    return nn.functional.interpolate(images.reshape(batch, channels, 8, 8), size=size, mode="bilinear")


def save(encoder, folder, size=32):
    channels = encoder.in_chans if hasattr(encoder, "in_chans") else 3
    return save_encoder(encoder, folder, image_size=size, mean=[0.5] * channels, std=[0.25] * channels)


def plain_timm(folder, **kwargs):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **kwargs).eval()


# By name


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("resnet_18", "resnet18"),
        ("resnt18", "resnet18"),
        ("resent50", "resnet50"),
        ("efficentnet_b0", "efficientnet_b0"),
        ("efficientnet_v2_s", "efficientnetv2_s"),
        ("vit-tiny", "vit_tiny_patch16_224"),
        ("ViT-B/16", "vit_base_patch16_224"),
        ("vit_b_16", "vit_base_patch16_224"),
        ("dinov2", "vit_base_patch14_dinov2"),
        ("resnet18d.a1_in1k_", "resnet18d"),
    ],
)
def test_a_mistyped_name_finds_what_was_meant(typed, meant):
    assert closest_backbones(typed)[0] == meant


def test_an_unknown_name_is_reported_with_the_nearest_ones():
    with pytest.raises(ByolTimmError, match=r"no backbone 'resnt18'. Nearest names: resnet18, resnet18d"):
        create_encoder("resnt18")
    with pytest.raises(ByolTimmError, match=r"see timm.list_models"):
        create_encoder("&")


def test_an_unknown_tag_is_reported_with_those_that_exist():
    with pytest.raises(
        ByolTimmError, match=r"test_resnet has no pretrained tag 'in1k'. It has: test_resnet.r160_in1k$"
    ):
        create_encoder("test_resnet.in1k")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("user/name", "Use 'hf-hub:user/name'"),
        ("https://huggingface.co/user/name", "Unknown model source 'https'"),
        ("local-dir:nowhere", "cannot be read"),
    ],
)
def test_a_name_that_is_no_timm_name_is_reported_in_one_line(name, reason):
    with pytest.raises(ByolTimmError, match=reason) as refused:
        create_encoder(name)
    assert "\n" not in str(refused.value)


def test_a_model_of_another_library_is_reported_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 768}))
    with pytest.raises(ByolTimmError, match="does not name an architecture: not a timm model"):
        create_encoder(f"local-dir:{tmp_path}")


def test_a_saved_encoder_brings_its_weights_and_arguments_along(tmp_path):
    encoder = create_encoder("test_vit", image_size=32, patch_size=8).eval()
    again = create_encoder(f"local-dir:{save(encoder, tmp_path / 'e')}").eval()
    assert torch.equal(again(digits()), encoder(digits()))


def test_a_saved_encoder_takes_images_of_another_size_and_other_channels(tmp_path):
    folder = save(create_encoder("test_vit", image_size=32, patch_size=8), tmp_path / "e")
    encoder = create_encoder(f"local-dir:{folder}", image_size=64, in_chans=1)
    assert encoder(digits(size=64, channels=1)).shape == (4, 64)
    assert encoder.pretrained_cfg["input_size"] == (1, 64, 64)


# By arguments


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"output_strid": 8}, r"test_resnet takes no argument 'output_strid'. Did you mean output_stride\?"),
        ({"patch_size": 8}, "test_resnet takes no argument 'patch_size'. Did you mean"),
        ({"output_stride": 5}, r"test_resnet cannot be built \(AssertionError\). It runs without output_stride=5"),
        ({"global_pool": ""}, r"returns \(96, 5, 5\) for an image, not one vector. It runs without global_pool=''"),
        ({"num_classes": 10}, "num_classes is not an argument of an encoder"),
        ({"features_only": True}, "features_only is not an argument of an encoder"),
        ({"image_size": 0}, r"image_size must be positive \(0\)"),
        ({"in_chans": 0}, r"in_chans must be positive \(0\)"),
    ],
)
def test_an_argument_that_cannot_be_honoured_is_reported_in_one_line(kwargs, reason):
    with pytest.raises(ByolTimmError, match=reason) as refused:
        create_encoder("test_resnet", **kwargs)
    assert "\n" not in str(refused.value)


def test_key_value_pairs_become_python_values():
    assert parse_kwargs(("output_stride=8", "global_pool=max", "act_layer='silu'")) == {
        "output_stride": 8,
        "global_pool": "max",
        "act_layer": "silu",
    }
    with pytest.raises(ByolTimmError, match="takes key=value pairs"):
        parse_kwargs(("output_stride",))
    with pytest.raises(ByolTimmError, match=r"'in_chans'\. It is a flag of its own"):
        parse_kwargs(("in_chans=1",))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_mambaout"])
@pytest.mark.parametrize("channels", [1, 2, 16])
def test_any_number_of_channels_reaches_the_saved_encoder(name, channels, tmp_path):
    encoder = create_encoder(name, image_size=32, in_chans=channels).eval()
    images = digits(channels=channels)
    assert torch.equal(plain_timm(save(encoder, tmp_path / "e"))(images), encoder(images))


def test_a_backbone_for_three_channels_says_so():
    # And it alone: timm's own warning of the same would be an error here.
    with pytest.raises(
        ByolTimmError, match=r"csatv2 does not run on .* with 4 channels .* takes images with 3 channels"
    ):
        create_encoder("csatv2", image_size=64, in_chans=4)


def test_the_residual_init_is_timms_or_the_papers():
    def last_norms(encoder):
        return torch.cat([block.bn2.weight for block in encoder.layer1])

    assert not last_norms(create_encoder("resnet18")).any()
    encoder = create_encoder("resnet18", zero_init_last=False)
    assert (last_norms(encoder) == 1).all()
    assert encoder._model_args["zero_init_last"] is False


def test_a_residual_init_that_the_backbone_does_not_have_is_reported(caplog):
    create_encoder("test_vit", zero_init_last=False)
    assert "no choice of the residual init" in caplog.text


# By image size


@pytest.mark.parametrize(
    ("name", "size", "advice"),
    [
        ("inception_v3", 64, "Use --image_size 299, or another backbone"),
        ("test_vit", 8, "Use --image_size 160, or --backbone_kwargs patch_size="),
        ("deepseek_vit_412m", 64, "Use --image_size 546, or --backbone_kwargs patch_size=4"),
    ],
)
def test_images_that_are_too_small_are_reported_with_what_works(name, size, advice):
    with pytest.raises(ByolTimmError, match=f"{name} does not run on {size}x{size} images .*{advice}") as refused:
        create_encoder(name, image_size=size)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "setting", "places"),
    [
        ("test_resnet", "output_stride=8", 16),
        ("test_vit", "patch_size=4", 64),
        ("test_convnext", "output_stride=8", 16),
    ],
)
def test_small_images_are_reported_the_setting_that_keeps_their_layout(name, setting, places, caplog, tmp_path):
    create_encoder(name, image_size=32)
    assert f"Use --backbone_kwargs {setting} (or auto), or larger images" in caplog.text
    caplog.clear()
    encoder = create_encoder(name, image_size=32, **parse_kwargs((setting,))).eval()
    assert not caplog.records
    features = encoder.forward_features(digits())
    tokens = features.shape[1] - encoder.num_prefix_tokens if features.ndim == 3 else math.prod(features.shape[2:])
    assert tokens == places
    assert torch.equal(plain_timm(save(encoder, tmp_path / "e"))(digits()), encoder(digits()))


def test_auto_applies_that_setting_where_it_is_needed():
    small = create_encoder("test_resnet", image_size=32, auto_kwargs=True)
    large = create_encoder("test_resnet", image_size=128, auto_kwargs=True)
    assert small._model_args["output_stride"] == 8
    assert "output_stride" not in large._model_args
    assert small_image_kwargs("test_mambaout", image_size=32) == {}


def test_a_network_that_rescales_its_images_takes_any_size(caplog):
    fit = fit_backbone("crossvit_9_240", image_size=32)
    assert "img_size" not in fit.arguments
    assert math.prod(fit.map_size) > 4


def test_pixels_that_no_patch_covers_are_reported(caplog):
    encoder = create_encoder("vit_tiny_patch16_224", image_size=40, depth=1).eval()
    assert "ignores the last 8 rows and columns. Use a multiple of 16" in caplog.text
    images = digits(size=40)
    cut = images.clone()
    cut[..., 32:, :] = cut[..., 32:] = 0
    assert torch.equal(encoder(cut), encoder(images))


@pytest.mark.parametrize(("name", "size"), [("qwen3_vit_88m_enc", 32), ("deepseek_vit_412m_enc", 42)])
def test_token_encoders_are_pooled_as_plain_timm_pools_them(name, size, tmp_path):
    encoder = create_encoder(name, image_size=size, depth=1).eval()
    images = digits(size=size)
    assert encoder(images).shape == (4, encoder_width(encoder))
    encoder(images).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert torch.equal(plain_timm(save(encoder, tmp_path / "e", size))(images), encoder(images))


def test_an_encoder_that_timm_cannot_pool_is_refused_with_the_name_to_use():
    with pytest.raises(ByolTimmError, match=r"not one vector. Use mobilenetv5_300m$"):
        create_encoder("mobilenetv5_300m_enc", image_size=64)


PATCH_TRANSFORMERS = "test_vit swin_tiny_patch4_window7_224 crossvit_9_240 convit_tiny samvit_base_patch16_224 "
PATCH_TRANSFORMERS += "naflexvit_base_patch16_gap qwen3_vit_88m deepseek_vit_412m gemma4_vit_167m"
OTHERS = "test_resnet test_convnext test_nfnet mixer_s32_224 vit_tiny_r_s16_p8_224 samvit_base_patch16"


@pytest.mark.parametrize("name", [*PATCH_TRANSFORMERS.split(), *OTHERS.split()])
def test_layers_and_not_names_tell_a_patch_transformer(name):
    assert is_patch_transformer(fit_backbone(name).encoder) == (name in PATCH_TRANSFORMERS.split())


# Parts


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("test_resnet", ("conv1.", "bn1.")),
        ("test_vit", "patch_embed."),
        ("test_convnext", "stem."),
        ("test_efficientnet", ("conv_stem.", "bn1.")),
        ("densenet121", ("features.conv0.", "features.norm0.")),
        ("inception_v3", ("Conv2d_1a_3x3.", "Conv2d_2a_3x3.", "Conv2d_2b_3x3.")),
        ("volo_d1_224", "patch_embed."),
        ("vgg11", "features.0."),
        ("twins_svt_small", "patch_embeds.0."),
        ("naflexvit_base_patch16_gap", "embeds.proj."),
        ("qwen3_vit_88m", "encoder.patch_embed."),
        ("gemma4_vit_167m", "encoder.patch_embed.input_proj."),
    ],
)
def test_the_stem_is_the_layers_around_the_first_convolution(name, stem):
    encoder = fit_backbone(name).encoder
    frozen = freeze_parts(encoder, ("stem",))
    assert frozen
    assert frozen == [parameter for parameter, _ in encoder.named_parameters() if parameter.startswith(stem)]


def test_frozen_parts_stay_as_they_are_in_both_networks():
    encoder = create_encoder("test_vit", image_size=32)
    frozen = freeze_parts(encoder, ("stem", "blocks.0", "pos_embed"))
    before = copy.deepcopy(encoder.state_dict())
    byol = BYOL(encoder, hidden_dim=16, projection_dim=8)
    optimizer = torch.optim.SGD([p for p in byol.parameters() if p.requires_grad], 1.0)
    byol(digits(), digits().flip(3))["loss"].backward()
    optimizer.step()
    byol.update_target(0.5)
    for network in (byol.encoder, byol.target_encoder):
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, before[name]) == (name in frozen), name


def test_a_part_that_does_not_exist_is_reported_with_those_that_do():
    with pytest.raises(
        ByolTimmError, match=r"no part 'layer5' to freeze. It has: conv1, bn1, layer1, layer2, layer3, layer4"
    ):
        freeze_parts(create_encoder("test_resnet"), ("layer5",))


def test_freezing_everything_is_refused():
    encoder = create_encoder("test_resnet")
    with pytest.raises(ByolTimmError, match="nothing is left to train"):
        freeze_parts(encoder, tuple(name for name, _ in encoder.named_parameters()))


def test_recomputed_activations_give_the_same_gradients():
    encoder = create_encoder("test_vit", image_size=32)
    twin = copy.deepcopy(encoder)
    enable_grad_checkpointing(twin)
    for network in (encoder, twin):
        network(digits()).square().sum().backward()
    for parameter, other in zip(encoder.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_a_backbone_that_cannot_recompute_activations_says_so():
    with pytest.raises(ByolTimmError, match=r"VGG cannot recompute activations. Omit --grad_checkpointing"):
        enable_grad_checkpointing(fit_backbone("vgg11").encoder)


# Every one of them


def table():
    """The committed table, a dict a backbone."""
    lines = TABLE.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| backbone"))
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start:])
    return [dict(zip(header, row, strict=True)) for row in rows]


@functools.cache
def smallest_of_each_module(millions=60):
    """The backbone of every module of timm that takes the smallest images, and of those the one with the fewest
    parameters, with the size of its images; without modules that have none of at most so many parameters."""
    modules = {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
    chosen = {}
    for row in table():
        parameters = float(row["parameters"].removesuffix(" M") or "inf")
        own = int(row["own size"].partition("x")[0] or 0)
        size = next((size for size in (32, 64, 96) if row[f"{size} px"]), own)
        module = modules.get(row["backbone"])
        if parameters <= millions and (size, parameters) < chosen.get(module, (math.inf,)):
            chosen[module] = size, parameters, row["backbone"]
    return {module: (name, size) for module, (size, _, name) in sorted(chosen.items())}


@pytest.mark.slow
@pytest.mark.parametrize("module", timm.list_modules())
def test_a_network_of_every_module_takes_a_step_and_loads_into_plain_timm(module, tmp_path):
    if module not in smallest_of_each_module():
        pytest.skip("no backbone of at most 60 M parameters")
    name, size = smallest_of_each_module()[module]
    encoder = create_encoder(name, image_size=size)
    before = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    byol = BYOL(encoder, hidden_dim=64, projection_dim=16)
    trained = [parameter for parameter in byol.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-3)
    images = digits(size=size)
    loss = byol(images, images.flip(3))["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in trained)
    optimizer.step()
    byol.update_target(0.9)
    moved = {name for name, parameter in byol.encoder.named_parameters() if not torch.equal(parameter, before[name])}
    followed = {name for name, p in byol.target_encoder.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert followed <= moved
    encoder.eval()
    loaded = plain_timm(save(encoder, tmp_path / "e", size))
    with torch.no_grad():
        features = encoder(images)
        assert features.isfinite().all()
        assert torch.equal(loaded(images), features)


class ShapesOnly(TorchFunctionMode):
    """Skips what changes values but no shape, which halves the time on the meta device."""

    FUNCTIONS = frozenset(
        [
            *(nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_),
            *(Tensor.uniform_, Tensor.normal_, Tensor.fill_, Tensor.zero_, Tensor.erfinv_, Tensor.clamp_),
            *(F.batch_norm, F.layer_norm, F.group_norm, F.gelu, F.relu, F.silu, F.softmax),
            *(torch.sigmoid, Tensor.sigmoid, Tensor.sigmoid_, Tensor.softmax),
        ]
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.FUNCTIONS:
            return args[0] if args else next(iter(kwargs.values()))
        return function(*args, **kwargs)


def contract(name):
    """Whether the backbone trains on images of 96 pixels, and how it breaks the contract, or None."""
    small = True
    try:
        with ShapesOnly():
            try:
                fit = fit_backbone(name, image_size=96)
            except ByolTimmError:
                small = False
                fit = fit_backbone(name)
        twin = copy.deepcopy(fit.encoder)
        arguments = {key: value for key, value in fit.arguments.items() if key not in ("model_name", "pretrained_cfg")}
        with ShapesOnly(), torch.device("meta"), tempfile.TemporaryDirectory() as folder:
            tag = {"pretrained_cfg": {"tag": "byol"}}
            save_config_for_hf(fit.encoder, f"{folder}/config.json", model_config=tag, model_args=arguments)
            timm.create_model(f"local-dir:{folder}").load_state_dict(twin.state_dict(), strict=True)
        stem = freeze_parts(twin, ("stem",)) if twin.pretrained_cfg["first_conv"] else ["none"]
        fault = None if stem else "no stem"
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    return small, fault


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_timm_backbone_trains_and_loads_into_plain_timm(part):
    """Built on the meta device: two images forward in training mode, width, deepcopy, names and shapes of weights."""
    names = timm.list_models()[part::PARTS]
    results = {name: contract(name) for name in names}
    faults = {name: fault for name, (_, fault) in results.items() if fault}
    assert faults.keys() == {"mobilenetv5_300m_enc"} & set(names), faults
    assert all(fault.endswith("Use mobilenetv5_300m") for fault in faults.values())
    promised = {row["backbone"]: bool(row["96 px"]) for row in table() if row["backbone"] in names}
    assert {name: results[name][0] for name in promised} == promised
