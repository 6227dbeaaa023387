"""How a teacher is trained from scratch."""

from dataclasses import dataclass

from sidactl.recipes.fields import (
    JsonFields,
    at_least,
    below_one,
    check_seed,
    finite,
    high_rates,
    in_unit_interval,
    not_negative,
    positive,
    refusal,
)
from sidactl.recipes.networks import NetSpec


@dataclass(frozen=True, kw_only=True)
class TeacherRecipe(JsonFields):
    """How a teacher is trained from scratch with the EDM loss. Source: EDM (2206.00364), eq. 2 and table 1."""

    dataset: str
    net: NetSpec
    batch_size: int = 128
    """images of one step"""
    duration_nimg: int = 50_000
    """images to train on, in all"""
    lr: float = 1e-3
    """Adam's learning rate"""
    lr_rampup_nimg: int = 10_000
    """images over which the learning rate grows from 0"""
    ema_halflife_nimg: int = 20_000
    """half-life of the teacher's exponential moving average"""
    ema_rampup_ratio: float | None = 0.05
    """the EMA half-life is at most this share of the images seen; none = no ramp-up"""
    P_mean: float = -1.2
    """mean of ln sigma in the loss"""
    P_std: float = 1.2
    """standard deviation of ln sigma in the loss"""
    beta1: float = 0.9
    """Adam's momentum"""
    beta2: float = 0.999
    """Adam's average of squared gradients"""
    adam_eps: float = 1e-8
    """Adam's epsilon"""
    augment_p: float = 0.0
    """probability of EDM's augmentation, for nets with augmentation labels"""
    label_dropout: float = 0.0
    """share of images whose label the teacher does not see, so that it can guide itself"""
    seed: int = 0
    """seed of all random numbers of the run"""
    stop_if_nan_steps: int = 20
    """so many updates in a row with a non-finite gradient stop the run"""

    _later = frozenset({"label_dropout"})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch_size", "duration_nimg", "stop_if_nan_steps")
        at_least(self, 0, "lr_rampup_nimg", "ema_halflife_nimg")
        positive(self, "lr", "P_std", "adam_eps")
        not_negative(self, "ema_rampup_ratio")
        below_one(self, "beta1", "beta2", "label_dropout")
        if self.label_dropout and not self.net.label_dim:
            raise refusal("label_dropout", "0 for a teacher without classes", self.label_dropout)
        in_unit_interval(self, "augment_p")
        finite(self, "P_mean")
        check_seed(self)

    def unusual(self) -> list[str]:
        """What is allowed and rarely meant, a line for each."""
        return high_rates(self, "lr")
