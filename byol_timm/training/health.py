"""Health of the representation without labels."""

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """Return the number of dimensions that centred features [B, d] fill: 1 to min(B - 1, d), nan for infinite ones.

    The exponential of the entropy of the normalised singular values (Roy & Vetterli 2007; RankMe, Garrido et al. 2023,
    which does not centre). float32 also under autocast. It ignores the scale, so identical features have the full rank
    of their rounding noise. On CUDA the decomposition waits for the device.
    """
    with torch.autocast(features.device.type, enabled=False):
        centred = features.float() - features.float().mean(0)
        finite = centred.isfinite().all()
        values = torch.linalg.svdvals(centred.nan_to_num(0, 0, 0))
        shares = values / values.sum().clamp(min=torch.finfo(torch.float32).tiny)
        return torch.where(finite, torch.exp(-torch.xlogy(shares, shares).sum()), torch.nan)


class CollapseAlarm:
    """Warn of a collapsed network, which maps all images to one output, or to a few.

    The advice depends on the settings of the run. lr: base; batch_size: global; num_rows: representations whose
    effective rank is taken; color: True if the augmentation changes colours. A representation that gets worse but stays
    diverse raises no alarm: kNN accuracy shows that.
    """

    # Without a predictor, the projections collapse long before the representation, whose spread depends on the
    # architecture. Lowest `projection_std` of 15 healthy runs of 5 families (SGD, AdamW, LARS; 50 to 1,500 steps on
    # digits): 0.29. Highest of 10 runs without predictor, after 40 steps: 0.16. Lowest `feature_std` of the healthy
    # runs: 0.008 (a ViT with LARS); after a far too high learning rate: below 0.0005.
    MIN_PROJECTION_STD = 0.2
    MIN_FEATURE_STD = 0.002
    CHECKS = 3
    # A far too high learning rate leaves the representation a few dimensions, and may not change the spreads. In
    # healthy runs `effective_rank` dips and recovers: its highest of any ten successive rows was at least 6.1 in 13 of
    # them (lowest for ViTs on Fashion-MNIST), and 4.0 with a learning rate a thousand times too high.
    MIN_RANK = 5.0
    RANK_CHECKS = 10

    def __init__(
        self,
        *,
        opt: str,
        lr: float,
        batch_size: int,
        num_rows: int,
        batch_norm: bool,
        color: bool,
        target_decay: float,
    ) -> None:
        self._likely = _likely_cause(opt, lr, batch_size, batch_norm, color, target_decay)
        # Few rows fill few dimensions.
        self._min_rank = min(self.MIN_RANK, num_rows / 8)
        self._narrow = self._low = 0

    def check(self, row: Mapping[str, float]) -> str | None:
        """Return a one-line warning after three successive rows with a low spread, or ten with a low rank.

        Once per collapse. row: `step`, `feature_std` and `effective_rank` of the representations, `projection_std` of
        the online projections, and `agreement`, which is only reported: it is as high in a healthy run.
        """
        # nan counts as collapsed.
        wide = row["projection_std"] >= self.MIN_PROJECTION_STD and row["feature_std"] >= self.MIN_FEATURE_STD
        high = row["effective_rank"] >= self._min_rank
        before = self._sounds
        self._narrow = 0 if wide else self._narrow + 1
        self._low = 0 if high else self._low + 1
        if before or not self._sounds:
            return None
        return (
            f"the network has collapsed by step {int(row['step'])}: projection std {row['projection_std']:.3f} "
            f"(healthy: above {self.MIN_PROJECTION_STD}), feature std {row['feature_std']:.4f} "
            f"(above {self.MIN_FEATURE_STD}), effective rank {row['effective_rank']:.1f} (above {self._min_rank:g}), "
            f"agreement of online and target {row['agreement']:.2f}. Likely cause: {self._likely}"
        )

    @property
    def _sounds(self) -> bool:
        return self._narrow >= self.CHECKS or self._low >= self.RANK_CHECKS


def _likely_cause(opt: str, lr: float, batch_size: int, batch_norm: bool, color: bool, target_decay: float) -> str:
    if opt in ("lars", "sgd") and lr >= 10:
        return f"--lr {lr:g} is far too high for {opt}; try 1 or less"
    if opt not in ("lars", "sgd") and lr >= 0.01:
        return f"--lr {lr:g} suits LARS, and --opt is {opt}; try 1e-3 or less"
    if target_decay < 0.9:
        return f"--target_decay {target_decay:g} makes the target follow the online network too fast; try 0.99"
    if batch_norm and batch_size < 32:
        return f"{batch_size} images per step are few for BatchNorm; try a --batch_size of 64 or more"
    if not color:
        return "the augmentation does not change colours, so a colour histogram solves the task; try --jitter 0.8"
    return f"--lr {lr:g} is too high for this run; try a tenth"
