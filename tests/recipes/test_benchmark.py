"""The benchmark measures what it says."""

import json
import sys

import pytest
import torch
from benchmark import BenchmarkConfig, main
from benchmark_parts import Part, interleaved, photographs
from benchmark_peers import MODULES, STEPS, check_peers

from byol_timm.encoders import create_encoder, encoder_width
from byol_timm.errors import ByolTimmError


def test_candidates_take_turns_and_all_get_a_call_that_is_not_measured():
    calls = []

    def candidate(name):
        return lambda: calls.append(name) or 2

    costs = interleaved({name: candidate(name) for name in "ab"}, BenchmarkConfig(rounds=3, seconds=0))
    assert calls == list("ab") * 4
    assert {name: len(cost) for name, cost in costs.items()} == {"a": 3, "b": 3}


def test_no_rounds_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--rounds", "0"])
    with pytest.raises(ByolTimmError, match=r"--rounds must be positive \(0\)"):
        main()


@pytest.mark.parametrize("peer", STEPS)
def test_a_peer_takes_its_step_on_the_device_of_the_encoder(peer):
    pytest.importorskip(MODULES[peer])
    encoder = create_encoder("test_resnet", image_size=32).to("meta")
    views = torch.empty(2, 4, 3, 32, 32, device="meta")
    try:
        STEPS[peer](encoder, encoder_width(encoder), 16, 32)(*views)
    except RuntimeError as error:
        # lightly's optimizer, after both passes, asks for numbers.
        assert "cannot be called on meta tensors" in str(error)


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    part = Part("x", "images/s", "a", {"a": [1.0, 10.0, 1.0], "b": [2.0, 20.0, 3.0]})
    assert part.relative("b") == 2.0
    assert part.value("b") == 1 / 3.0


def test_photographs_are_the_same_every_time_and_all_different():
    images = photographs(4, 12, 16)
    assert images.shape == (4, 3, 12, 16)
    assert torch.equal(images, photographs(4, 12, 16))
    assert len({image.numpy().tobytes() for image in images}) == 4


@pytest.mark.slow
def test_the_recipe_measures_views_steps_and_memory(tmp_path, monkeypatch):
    work = "--backbone test_resnet --image_size 32 --batch_size 8 --hidden_dim 64".split()
    call = "--parts augmentation step memory --rounds 1 --seconds 0.01 --output results.json".split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *work, *call])
    main()
    views, step, memory = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert views["costs"].keys() == {"byol_timm, whole images", "byol_timm, cut and finish"}
    assert step["costs"].keys() == {"bare backbone", "bare backbone and heads", "byol_timm"}
    assert memory["costs"].keys() == {"byol_timm", "bare backbone"}
    assert all(cost > 0 for part in (views, step, memory) for costs in part["costs"].values() for cost in costs)


@pytest.mark.parametrize("peer", ["lightning", "byol-pytorch"])
def test_a_peer_that_cannot_be_imported_is_refused_in_one_line(peer, tmp_path, monkeypatch):
    # Found first, even where the real one is installed.
    (tmp_path / "byol_pytorch.py").write_text("raise ImportError('too old')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "byol_pytorch", raising=False)
    with pytest.raises(ByolTimmError, match=peer) as caught:
        check_peers([peer])
    assert "\n" not in str(caught.value)
