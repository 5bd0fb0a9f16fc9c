import dataclasses
import io
import json
import math

import pytest
import timm
import torch
from sklearn.datasets import load_digits

from byol_timm.byol import BYOL, feature_std
from byol_timm.errors import ByolTimmError
from byol_timm.training import CollapseAlarm, MetricsLog, create_optimizer, effective_rank, read_metrics
from byol_timm.views import AUGMENTATIONS, TwoViews

ROW = dict(epoch=0.5, loss=1.25, lr=0.1, target_decay=0.99, feature_std=0.8, effective_rank=30.0, agreement=0.5)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def isotropic(rows=2000, dims=64, seed=0):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))


def test_isotropic_features_have_std_one_and_full_rank():
    features = isotropic()
    assert feature_std(features).item() == pytest.approx(1, abs=0.01)
    assert effective_rank(features).item() == pytest.approx(64, rel=0.02)


def test_identical_features_have_std_zero():
    features = isotropic(1).expand(100, -1)
    assert feature_std(features).item() == pytest.approx(0, abs=1e-5)
    assert math.isfinite(effective_rank(features).item())
    assert effective_rank(torch.zeros(10, 4)).item() == 1


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_effective_rank_counts_the_dimensions_that_are_filled(rank):
    basis, _ = torch.linalg.qr(isotropic(64, rank, seed=1))
    features = isotropic(2000, rank) @ basis.T + 5
    assert effective_rank(features).item() == pytest.approx(rank, rel=0.02)


def test_neither_figure_depends_on_scale_and_rank_not_on_the_mean():
    features = isotropic() * torch.linspace(0.1, 2, 64)
    assert feature_std(1000 * features).item() == pytest.approx(feature_std(features).item(), rel=1e-5)
    assert effective_rank(1000 * features).item() == pytest.approx(effective_rank(features).item(), rel=1e-5)
    assert effective_rank(features + 3).item() == pytest.approx(effective_rank(features).item(), rel=1e-4)


def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values():
    singular = torch.tensor([4.0, 2.0, 1.0, 1.0])
    # Rows sum to zero in each column, so that centring leaves the singular values alone.
    left, _ = torch.linalg.qr(isotropic(16, 4) - isotropic(16, 4).mean(0))
    features = left @ torch.diag(singular)
    assert effective_rank(features).item() == pytest.approx(2**1.75, rel=1e-4)


@pytest.mark.parametrize("figure", [feature_std, effective_rank])
def test_figures_are_float32_under_autocast_and_finite_for_half_precision(figure):
    features = isotropic()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = figure(features)
    assert inside.dtype == torch.float32
    assert inside == figure(features)
    assert figure(features.half() * 500).item() == pytest.approx(figure(features).item(), rel=1e-2)


@pytest.mark.parametrize("figure", [feature_std, effective_rank])
def test_figures_of_infinite_features_are_nan_and_no_crash(figure):
    features = isotropic()
    features[3, 5] = math.inf
    assert math.isnan(figure(features).item())


def test_every_row_is_one_line_of_strict_json(tmp_path):
    with MetricsLog(tmp_path, total_steps=10, images_per_step=64, stream=io.StringIO()) as log:
        log.log(dict(ROW, step=1))
        log.log(dict(ROW, step=2, loss=math.nan, knn=0.9))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0] == {**rows[0], **ROW}
    assert rows[1]["loss"] is None and math.isnan(read_metrics(tmp_path / "metrics.jsonl")[1]["loss"])
    assert rows[0]["images_per_second"] > 0
    assert 0 <= rows[0]["seconds"] <= rows[1]["seconds"]


def test_resuming_drops_the_rows_of_lost_work_and_goes_on(tmp_path):
    with MetricsLog(tmp_path, total_steps=10, images_per_step=64, stream=io.StringIO()) as log:
        for step in range(1, 7):
            last = log.log(dict(ROW, step=step))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    with MetricsLog(
        tmp_path, total_steps=10, images_per_step=64, resume_step=4, seconds=60.0, stream=io.StringIO()
    ) as log:
        log.log(dict(ROW, step=5))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-2]["seconds"] < 60 <= rows[-1]["seconds"]
    assert last["step"] == 6
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_from_the_start_starts_a_new_file(tmp_path):
    for _ in range(2):
        with MetricsLog(tmp_path, total_steps=10, images_per_step=64, stream=io.StringIO()) as log:
            log.log(dict(ROW, step=0))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize("torn", ["", "{", '{"step": 2, "loss": 1.', '{"step": 2}', "\0\0\0"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + torn)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0] == {"step": 1}
    assert len(rows) == (2 if torn == '{"step": 2}' else 1)


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step\n{"step": 3}\n')
    with pytest.raises(ByolTimmError, match=r"metrics\.jsonl line 2 is not a row"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("line", ["5", "[]", '{"loss": 1}', '{"step": "x"}', "\xff"])
def test_json_that_is_no_row_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n', encoding="latin-1")
    with pytest.raises(ByolTimmError, match=r"metrics\.jsonl line 2 is not a row"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_no_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_progress_is_plain_lines_away_from_a_terminal(tmp_path):
    stream = io.StringIO()
    with MetricsLog(tmp_path, total_steps=1000, images_per_step=64, stream=stream) as log:
        log.advance(5)
        log.log(dict(ROW, step=10, knn=0.871))
    [line] = stream.getvalue().splitlines()
    assert line.startswith(
        "step 10/1000  epoch 0.50  loss 1.2500  lr 0.1  tau 0.99000  std 0.800  rank 30.0  kNN 87.1%  images/s "
    )
    assert "  ETA " in line and "\r" not in stream.getvalue()


def test_progress_is_a_bar_on_a_terminal(tmp_path):
    stream = Terminal()
    with MetricsLog(tmp_path, total_steps=1000, images_per_step=64, resume_step=100, stream=stream) as log:
        log.advance(110)
        log.log(dict(ROW, step=120))
        log.log(dict(step=120, epoch=0.5, knn=0.871))
    assert "120/1000" in stream.getvalue() and "loss 1.2500" in stream.getvalue()
    # An evaluation stays on the screen above the bar.
    assert "step 120/1000  epoch 0.50  kNN 87.1%\n" in stream.getvalue()


def test_durations_do_not_follow_the_wall_clock(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path, total_steps=10, images_per_step=64, stream=io.StringIO())
    log.log(dict(ROW, step=1))
    monkeypatch.setattr("time.time", lambda: -1e9)
    row = log.log(dict(ROW, step=2))
    log.close()
    assert row["images_per_second"] > 0 and row["seconds"] >= 0


def test_the_rate_is_that_of_training_alone(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    with MetricsLog(tmp_path, total_steps=100, images_per_step=64, stream=stream) as log:
        with log.aside():
            [next(clock) for _ in range(500)]
        assert "images_per_second" not in log.log(dict(step=0, knn=0.5))
        rate = log.log(dict(ROW, step=10))["images_per_second"]
        with log.aside():
            [next(clock) for _ in range(300)]
        assert "images_per_second" not in log.log(dict(step=15, knn=0.5))
        assert log.log(dict(ROW, step=20))["images_per_second"] > rate / 2
        assert log.seconds > 800
    assert rate > 64 * 10 / 20
    assert "ETA 13:" not in stream.getvalue()


def test_the_tracker_gets_every_figure_with_its_step(tmp_path):
    seen = []
    with MetricsLog(
        tmp_path,
        total_steps=10,
        images_per_step=64,
        tracker=lambda row, step: seen.append((step, row)),
        stream=io.StringIO(),
    ) as log:
        log.log(dict(ROW, step=3))
    [(step, row)] = seen
    assert step == 3
    assert row == {**ROW, "images_per_second": row["images_per_second"], "seconds": row["seconds"]}


def alarm(**settings):
    usual = dict(opt="lars", lr=0.2, batch_size=256, num_rows=256, batch_norm=True, color=True, target_decay=0.99)
    return CollapseAlarm(**{**usual, **settings})


GOOD = dict(step=1, feature_std=0.6, projection_std=0.7, effective_rank=20.0, agreement=0.9)
BAD = dict(GOOD, step=2, projection_std=0.03)
DEAD = dict(GOOD, step=2, feature_std=0.0001)
NAN = dict(GOOD, step=2, feature_std=math.nan)
FLAT = dict(GOOD, step=2, effective_rank=3.9)


@pytest.mark.parametrize("bad", [BAD, DEAD, NAN])
def test_the_alarm_sounds_at_the_third_bad_check_in_a_row_and_once(bad):
    watch = alarm()
    assert [watch.check(row) is not None for row in [bad, bad, GOOD, bad, bad, bad, bad, bad]] == [
        False, False, False, False, False, True, False, False,
    ]  # fmt: skip


def test_the_alarm_sounds_again_after_a_recovery():
    watch = alarm()
    assert [watch.check(row) is not None for row in [BAD, BAD, BAD, GOOD, BAD, BAD, BAD]].count(True) == 2


def test_a_low_rank_is_a_collapse_where_it_stays_low_and_the_batch_could_fill_more():
    watch = alarm()
    rows = [*[FLAT] * 9, GOOD, *[FLAT] * 20, GOOD, *[FLAT] * 10]
    assert [place for place, row in enumerate(rows) if watch.check(row)] == [19, 40]
    small = alarm(num_rows=16)
    assert not any(small.check(FLAT) for _ in range(20))


def test_a_collapse_that_shows_in_two_figures_is_told_once():
    watch = alarm()
    assert [watch.check(dict(BAD, effective_rank=2.0)) is not None for _ in range(20)].count(True) == 1


@pytest.mark.parametrize(
    "settings, cause",
    [
        (dict(lr=400.0), "--lr 400 is far too high for lars; try 1 or less"),
        (dict(opt="adamw", lr=0.2), "--lr 0.2 suits LARS, and --opt is adamw"),
        (dict(target_decay=0.0), "--target_decay 0 "),
        (dict(batch_size=8), "8 images per step are few for BatchNorm"),
        (dict(color=False), "the augmentation does not change colours"),
        (dict(), "--lr 0.2 is too high"),
    ],
)
def test_the_warning_is_one_line_with_the_likely_cause(settings, cause):
    watch = alarm(**settings)
    warning = [watch.check(BAD) for _ in range(3)][-1]
    assert "\n" not in warning
    assert "collapsed by step 2: projection std 0.030" in warning
    assert cause in warning


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone, opt, lr",
    [
        ("test_resnet", "sgd", 0.1),
        ("test_efficientnet", "sgd", 0.1),
        ("test_convnext", "sgd", 0.1),
        ("test_vit", "adamw", 1e-3),
    ],
)
@pytest.mark.parametrize("predictor", [True, False])
def test_the_alarm_hears_a_missing_predictor_and_nothing_else(backbone, opt, lr, predictor):
    digits = torch.tensor(load_digits().images / 16 * 255, dtype=torch.uint8)[:, None].repeat(1, 3, 1, 1)
    # Strong enough views that a collapse fits into few steps.
    strong = dataclasses.replace(AUGMENTATIONS["digits"], crop_scale=(0.5, 1.0), rotate=12.0, jitter=0.8)
    views = TwoViews(strong, 32, seed=0, mean=(0.5,) * 3, std=(0.5,) * 3)
    size = dict(img_size=32) if backbone == "test_vit" else {}
    byol = BYOL(timm.create_model(backbone, num_classes=0, **size), hidden_dim=128, projection_dim=64)
    if not predictor:
        byol.predictor = torch.nn.Identity()
    optimizer = create_optimizer(opt, byol, lr=lr, weight_decay=0.0)
    watch, warnings = alarm(), []
    for step in range(24):
        indices = torch.arange(64 * step, 64 * step + 64)
        out = byol(*views(digits[indices % len(digits)], indices))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        byol.update_target(0.95)
        if step % 4 == 3:
            figures = {name: out[name].item() for name in ("agreement", "feature_std", "projection_std")}
            rank = effective_rank(out["representation"]).item()
            warnings.append(watch.check({"step": step, "effective_rank": rank, **figures}))
    assert any(warnings) != predictor
