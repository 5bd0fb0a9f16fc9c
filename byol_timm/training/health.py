"""Health of the representation without labels."""

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """Number of dimensions that centred features [B, d] fill, scalar from 1 to min(B - 1, d); nan for infinite ones.

    The exponential of the entropy of the normalised singular values (Roy & Vetterli 2007; RankMe, Garrido et al. 2023,
    which does not centre). float32 also under autocast. Scale-free, so it tells nothing of features that are all the
    same: rounding noise has full rank. On CUDA the decomposition waits for the device.
    """
    with torch.autocast(features.device.type, enabled=False):
        centred = features.float() - features.float().mean(0)
        finite = centred.isfinite().all()
        values = torch.linalg.svdvals(centred.nan_to_num(0, 0, 0))
        shares = values / values.sum().clamp(min=torch.finfo(torch.float32).tiny)
        return torch.where(finite, torch.exp(-torch.xlogy(shares, shares).sum()), torch.nan)


class CollapseAlarm:
    """Watches for a network that gives every image the same output, or all of them a few, and says so in one line.

    Built with the settings of the run, which its advice names; opt, lr (base) and batch_size (global) as in the config,
    num_rows: of representations whose effective rank is taken, color: whether the augmentation changes colours. A
    representation that gets worse but stays diverse raises no alarm: kNN accuracy tells that.
    """

    # A missing predictor shows in the projections long before it reaches the representation, whose spread differs from
    # one family to the next. Lowest `projection_std` of 15 healthy runs of 5 families (SGD, AdamW, LARS; 50 to 1,500
    # steps on digits): 0.29. Highest of 10 runs without predictor, after 40 steps: 0.16. Lowest `feature_std` of the
    # healthy runs: 0.008, a ViT under LARS; a network that a huge learning rate has killed: below 0.0005.
    MIN_PROJECTION_STD = 0.2
    MIN_FEATURE_STD = 0.002
    CHECKS = 3
    # A huge learning rate leaves the representation a few dimensions, and may leave both spreads alone. In healthy runs
    # `effective_rank` dips too, and comes back: its highest of any ten lines on end was 6.1 or more in 13 of them (the
    # lowest are ViTs on Fashion-MNIST), and fell to 4.0 where the learning rate was a thousand times too high.
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
        """A one-line warning when rows have looked collapsed for long enough; once per collapse.

        That is three rows on end for the spreads, ten for the rank. row: `step`, `feature_std`, `projection_std`, which
        is `feature_std` of the online projections, `effective_rank` of the representations, and `agreement`, which is
        only told: it is as high in a healthy run as in a collapsed one.
        """
        # Written so that nan counts as collapsed.
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
        return f"--lr {lr:g} is of a size for LARS, and --opt is {opt}; try 1e-3 or less"
    if target_decay < 0.9:
        return f"--target_decay {target_decay:g} lets the target follow at once; try 0.99"
    if batch_norm and batch_size < 32:
        return f"{batch_size} images a step are few for BatchNorm; try a --batch_size of 64 or more"
    if not color:
        return "the augmentation leaves colours alone, so that a colour histogram solves the task; try --jitter 0.8"
    return f"--lr {lr:g} is too high for this run; try a tenth"
