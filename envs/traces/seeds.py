"""Which seed belongs to which part: a policy is never judged on a seed that it was trained or designed on."""

from collections.abc import Mapping
from typing import Literal

Part = Literal["train", "validation", "test", "all", "final"]

SEED_RANGES: Mapping[str, range] = {
    "train": range(0, 10_000),
    "validation": range(10_000, 11_000),
    "test": range(11_000, 12_000),
    "final": range(12_000, 2**31),
}


class SeedError(ValueError):
    """A seed or part outside the ranges; the message is one line."""


def part_of_seed(seed: int) -> Part:
    """The part whose range holds `seed`; raises `SeedError` for a seed outside every range."""
    for part, seeds in SEED_RANGES.items():
        if seed in seeds:
            return part  # type: ignore[return-value]
    raise SeedError(f"seed is {seed!r}, expected an integer in 0..{SEED_RANGES['final'].stop - 1}")


def seeds_for(part: str, n: int) -> list[int]:
    """The first `n` seeds of a part; raises `SeedError` when the part has fewer."""
    seeds = SEED_RANGES.get(part)
    if seeds is None:
        raise SeedError(f"part is {part!r}, expected one of {', '.join(SEED_RANGES)} (only these own seeds)")
    if not 0 <= n <= len(seeds):
        raise SeedError(f"{n} seeds of part {part!r} were asked for, expected 0..{len(seeds)} (take fewer seeds)")
    return list(seeds[:n])


def check_seed(part: str, seed: int) -> None:
    """Raise `SeedError` unless an episode of `part` may use `seed`; 'all' takes every seed but the final ones."""
    owner = part_of_seed(seed)
    if part == "all" and owner != "final":
        return
    if part != "all" and part not in SEED_RANGES:
        raise SeedError(f"part is {part!r}, expected one of {', '.join(SEED_RANGES)}, all")
    if owner != part:
        expected = "below 12000" if part == "all" else _bounds(part)
        raise SeedError(f"seed is {seed} (part {owner!r}), expected {expected} for part {part!r}")


def _bounds(part: str) -> str:
    return f"{SEED_RANGES[part].start}..{SEED_RANGES[part].stop - 1}"
