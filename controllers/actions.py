"""What an action in [-1, 1] asks for: the one rule that the environment and the learned controller share."""

from hbmgym.memory_backend.split import Layout

ACTION_KINDS = ("incremental", "absolute")
DEFAULT_MAX_STEP = 0.1


class ShareAction:
    """Turns actions into requested shares; `reset` first.

    incremental: wanted share += max_step * action. absolute: -1 is the smallest share, 1 the largest.
    The wanted share is kept as a float, so that small actions add up; while it differs from what was last asked for by
    less than a slot and a chunk, the action is a hold. A share that is asked for therefore always changes the split.
    """

    def __init__(self, kind: str = "incremental", max_step: float = DEFAULT_MAX_STEP) -> None:
        if kind not in ACTION_KINDS:
            raise ValueError(f"action kind is {kind!r}, expected one of: {', '.join(ACTION_KINDS)}")
        if not 0.0 < max_step <= 1.0:
            raise ValueError(f"max_step is {max_step}, expected a share above 0 and at most 1")
        self.kind = kind
        self.max_step = max_step

    def reset(self, share: float, layout: Layout, bounds: tuple[float, float] | None = None) -> None:
        """Start at the realised `share`; `bounds` are the shares that may be asked for, by default the layout's."""
        self._low, self._high = bounds or layout.share_bounds
        # Up to this width two shares may round to the same split, because slots end within chunks.
        self._hold = layout.share_step + 1.0 / layout.chunks
        self._wanted = self._asked = share

    @property
    def wanted(self) -> float:
        """The share all actions so far add up to, within the bounds."""
        return self._wanted

    def next_share(self, action: float) -> float | None:
        """The kv_share to ask for after `action` (clipped to [-1, 1]); None holds what was last asked for."""
        action = min(max(action, -1.0), 1.0)
        if self.kind == "incremental":
            wanted = self._wanted + self.max_step * action
        else:
            wanted = self._low + 0.5 * (action + 1.0) * (self._high - self._low)
        self._wanted = min(max(wanted, self._low), self._high)
        if abs(self._wanted - self._asked) < self._hold:
            return None
        self._asked = self._wanted
        return self._asked
