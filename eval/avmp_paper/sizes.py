"""How large the pieces are: bytes of a KV page, of a recurrent state, and how many of them a budget holds."""

from dataclasses import dataclass

ALIGNMENT = 128
DTYPE_BYTES = 2  # BF16 everywhere
PAGE_TOKENS = 16
ATTENTION_LAYERS = 4
SSM_LAYERS = 28
KV_HEADS = 8
HEAD_DIM = 128
GIB = 2**30


def align_up(size: int) -> int:
    """The next multiple of 128 bytes, at least one."""
    return max(-(-size // ALIGNMENT), 1) * ALIGNMENT


KV_PAGE_BYTES = align_up(2 * KV_HEADS * HEAD_DIM * DTYPE_BYTES * PAGE_TOKENS)
"""One page holds 16 tokens of one attention layer."""


@dataclass(frozen=True)
class PaperModel:
    """A model as the paper's presets describe it: 4 attention layers, 28 SSM layers."""

    name: str
    d_inner: int
    d_state: int

    @property
    def ssm_block_bytes(self) -> int:
        """State of one SSM layer of one request, without the convolution."""
        return align_up(self.d_inner * self.d_state * DTYPE_BYTES)

    @property
    def padded_page_bytes(self) -> int:
        """What both kinds occupy when they share one pool."""
        return align_up(max(KV_PAGE_BYTES, self.ssm_block_bytes))


MODELS = {
    "jamba_1_5_mini": PaperModel("jamba_1_5_mini", d_inner=8192, d_state=16),
    "mamba2_1b3": PaperModel("mamba2_1b3", d_inner=8192, d_state=128),
}


def split_bytes(pool_bytes: int, mamba_ratio: float) -> tuple[int, int]:
    """Bytes for KV and for SSM state; ValueError unless 0 < mamba_ratio < 1."""
    if not 0.0 < mamba_ratio < 1.0:
        raise ValueError(f"mamba_ratio is {mamba_ratio}, expected a number between 0 and 1, both excluded")
    ssm_bytes = int(pool_bytes * mamba_ratio)
    return pool_bytes - ssm_bytes, ssm_bytes
