"""The allocators that are compared, under the names that the paper gives them."""

from dataclasses import dataclass
from typing import Literal

Family = Literal["padded_unified", "fixed_dual", "avmp_static", "avmp_dynamic"]


@dataclass(frozen=True)
class Variant:
    """One allocator with its settings; the defaults are the prototype's."""

    name: str
    family: Family
    mamba_ratio: float = 0.5
    """Share of the budget for SSM state (at first)."""
    batch: int = 1
    """Units of the donor that one rebalance moves."""
    low: float = 0.05
    """Free fraction of the failing pool, below which it counts as pressed."""
    high: float = 0.30
    """Free fraction of the other pool, above which it may give."""
    interval: int = 1000
    """Operations between two rebalances."""
    obeys_low: bool = False
    """The prototype obeys none of the three."""
    obeys_high: bool = False
    obeys_interval: bool = False

    def __post_init__(self) -> None:
        if self.batch < 1 or self.interval < 0 or not 0.0 < self.low < self.high < 1.0:
            raise ValueError(
                f"{self.name}: batch {self.batch}, thresholds {self.low} and {self.high}, interval {self.interval}: "
                "expected batch >= 1, 0 < low < high < 1 and interval >= 0"
            )

    @property
    def unified(self) -> bool:
        """One pool for both kinds, its pages as large as the larger one."""
        return self.family == "padded_unified"

    @property
    def virtual(self) -> bool:
        """With AVMP's handles and stores."""
        return self.family in ("avmp_static", "avmp_dynamic")

    @property
    def dynamic(self) -> bool:
        """With rebalancing."""
        return self.family == "avmp_dynamic"


def fixed_dual(mamba_ratio: float, name: str = "") -> Variant:
    """Two pools; named like fixed_dual_mr_0.10 unless the paper has a name for it."""
    digits = f"{mamba_ratio:.2f}" if round(mamba_ratio, 2) == mamba_ratio else f"{mamba_ratio}"
    return Variant(name or f"fixed_dual_mr_{digits}", "fixed_dual", mamba_ratio)


def avmp_dynamic(batch: int) -> Variant:
    """AVMP with rebalancing; the paper calls a batch of 1 also avmp_dynamic_mr05."""
    return Variant(f"avmp_dynamic_b{batch}", "avmp_dynamic", batch=batch)


PADDED_UNIFIED = Variant("padded_unified", "padded_unified")
FIXED_DUAL_MR05 = fixed_dual(0.5, "fixed_dual_mr05")
FIXED_DUAL_MR09 = fixed_dual(0.9, "fixed_dual_mr09")
AVMP_STATIC_MR05 = Variant("avmp_static_mr05", "avmp_static")
AVMP_DYNAMIC_B128 = avmp_dynamic(128)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
THRESHOLDS = tuple(
    Variant(f"avmp_dynamic_b128_th_{name}", "avmp_dynamic", batch=128, low=low, high=high)
    for name, low, high in (
        ("high_010", 0.05, 0.10),
        ("high_020", 0.05, 0.20),
        ("low_002", 0.02, 0.30),
        ("low_010", 0.10, 0.30),
    )
)
HEADLINE = (PADDED_UNIFIED, FIXED_DUAL_MR05, FIXED_DUAL_MR09, AVMP_STATIC_MR05, AVMP_DYNAMIC_B128)
