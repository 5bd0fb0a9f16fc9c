from huggingface_hub import constants

from byol_timm.encoders import fetch


def test_a_hub_out_of_reach_is_asked_for_again_after_a_minute_however_often_it_is_wanted(monkeypatch):
    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetch, "_unreached", {})
    monkeypatch.setattr(fetch, "why_unreachable", lambda: asked.append(now) or "gone")
    for now in (100.0, 140.0, 180.0, 200.0):
        monkeypatch.setattr("time.monotonic", lambda: now)  # noqa: B023
        with fetch.cache_alone_without_network() as reason:
            assert reason == "gone" and constants.HF_HUB_OFFLINE
        assert not constants.HF_HUB_OFFLINE
    assert asked == [100.0, 180.0]
