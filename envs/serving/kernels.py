"""Seconds that the kernels of a model take on one GPU of a tensor- and expert-parallel group, in closed form.

    gemm(m, n, k)  = t0 + (((n k w + m k a + 2 m n) / (e_bw BW))^p + (2 m n k / (e_f F))^p)^(1/p)
    experts(T)     = t0 + ((E' (1 - (1 - k/E)^(cov T)) W / (e_bw BW))^p + (2 R W' / (e_f F))^p)^(1/p)
                     + passes 2 R (h + w) / BW
    all_reduce(b)  = t0 + b / rate
    elementwise(T) = 14 x 2 T h bytes / (.7 BW) per pair of blocks

with T tokens, R = T k / ep of their rows, and E' = E / ep experts of W bytes, W' parameters and width w on this GPU.
The forms are fits to measured tables; their constants, sources and errors are in gpus.json. Weights of 4 bits are those
of the experts alone, as published checkpoints have it; the output layer is bf16 and computed for the last tokens only.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hbmgym.envs.serving.gpus import HEAD_DIMS, Experts, Gemm, Gpu, Kernels
from hbmgym.memory_backend.geometry import HybridModel, dtype_bytes, weight_number_bytes

ELEMENTWISE_PASSES, ELEMENTWISE_E_BW = 14, 0.7
MOST_OUTPUT_ROWS = 256
"""No more tokens are sampled in one iteration."""
REFERENCE_HEAD = 128 * 128
"""Numbers in the state of one head of the models whose scan was measured; others count by the size of their state."""
_KERNEL_DTYPES = {"bf16": "bf16", "fp16": "bf16", "fp8": "fp8", "nvfp4": "fp4", "mxfp4": "fp4"}


@dataclass(frozen=True)
class Shard:
    """What one GPU of a group computes of a model. Raises ValueError for dtypes that no kernel was measured for."""

    model: HybridModel
    gpu: Gpu
    engine: str
    weight_dtype: str
    kv_dtype: str
    state_dtype: str
    tensor_parallel: int = 1
    expert_parallel: int = 1

    def __post_init__(self) -> None:
        if self.weight_dtype not in _KERNEL_DTYPES:
            raise ValueError(f"weight_dtype is {self.weight_dtype!r}, expected one of: {', '.join(_KERNEL_DTYPES)}")

    @property
    def kernels(self) -> Kernels:
        return self.gpu.kernels[self.engine]

    def token_wise_s(self, tokens: int) -> float:
        """All kernels that see one token at a time, in one iteration of `tokens` tokens, and what each layer's decode
        kernels take at least."""
        model = self.model
        attention = self._mixer_s(tokens, model.attention_in, model.attention_out) + self.kernels.attention_t0_s
        window = self._mixer_s(tokens, *model.window_projections) + self.kernels.attention_t0_s
        recurrence = self._mixer_s(tokens, model.recurrent_in, model.recurrent_out) + self.gpu.state_t0_s
        seconds = model.attention_layers * attention + model.window_layers * window
        seconds += model.recurrent_layers * recurrence
        seconds += model.dense_layers * self._mlp_s(tokens, model.dense_width)
        if model.moe_layers:
            seconds += model.moe_layers * self._moe_s(tokens)
        bytes_per_pass = 2 * tokens * model.hidden_size
        elementwise = 0.5 * ELEMENTWISE_PASSES * bytes_per_pass / (ELEMENTWISE_E_BW * self.gpu.bandwidth)
        seconds += model.blocks * (elementwise + all_reduce_s(self.gpu, self.tensor_parallel, bytes_per_pass))
        rows = min(tokens, MOST_OUTPUT_ROWS)
        return seconds + self._gemm_s(rows, model.vocabulary / self.tensor_parallel, model.hidden_size, "bf16")

    def _mixer_s(self, tokens: int, columns: int, rows: int) -> float:
        hidden, parallel = self.model.hidden_size, self.tensor_parallel
        return self._dense_s(tokens, columns / parallel, hidden) + self._dense_s(tokens, hidden, rows / parallel)

    def _mlp_s(self, tokens: int, width: int) -> float:
        hidden, own = self.model.hidden_size, width / self.tensor_parallel
        columns = (self.model.mlp_matrices - 1) * own
        return self._dense_s(tokens, columns, hidden) + self._dense_s(tokens, hidden, own)

    def _moe_s(self, tokens: int) -> float:
        model = self.model
        seconds = self._gemm_s(tokens, model.experts, model.hidden_size, "bf16")
        if model.shared_width:
            seconds += self._mlp_s(tokens, model.shared_width)
        if model.expert_input != model.hidden_size:
            seconds += 2 * self._dense_s(tokens, model.expert_input, model.hidden_size)
        return seconds + self._experts_s(tokens)

    def _experts_s(self, tokens: int) -> float:
        model = self.model
        width = model.expert_width * self.expert_parallel / self.tensor_parallel
        return experts_s(
            self.kernels.experts[_KERNEL_DTYPES[self.weight_dtype]],
            self.gpu,
            tokens,
            model.experts,
            model.experts_per_token,
            self.expert_parallel,
            model.expert_input,
            width,
            model.mlp_matrices,
            weight_number_bytes(self.weight_dtype),
        )

    def _dense_s(self, m: float, n: float, k: float) -> float:
        kernel = _KERNEL_DTYPES[self.weight_dtype]
        return self._gemm_s(m, n, k, "bf16" if kernel == "fp4" else kernel)

    def _gemm_s(self, m: float, n: float, k: float, dtype: str) -> float:
        return gemm_s(self.gpu.gemm[dtype], self.gpu, m, n, k, dtype_bytes(dtype))

    @property
    def kv_s_per_token(self) -> float:
        """Reading one token's KV in all layers that attend to the whole context."""
        kv_bytes = self.model.kv_read_bytes(self.kv_dtype, self.tensor_parallel)
        share = self._attention_share(self.kernels.attention_e_bw, self.kv_dtype, self.model.head_dim)
        return kv_bytes / (share * self.gpu.bandwidth)

    @property
    def state_s(self) -> float:
        """Reading and writing one sequence's recurrent states, and reading its windows, in all layers."""
        model, parallel = self.model, self.tensor_parallel
        state = 2 * model.state_bytes(self.state_dtype) / parallel / (self.gpu.state_e_bw * self.gpu.bandwidth)
        share = self._attention_share(self.kernels.attention_e_bw, self.kv_dtype, model.window_heads[2])
        return state + model.window_read_bytes(parallel, self.kv_dtype) / (share * self.gpu.bandwidth)

    @property
    def attention_s_per_pair(self) -> float:
        """One token of a prompt attending to one before it, in all layers that attend to the whole context."""
        model = self.model
        flops = model.attention_layers * 4 * model.q_heads * model.head_dim / self.tensor_parallel
        return flops / self._attention_flops(model.head_dim)

    @property
    def scan_s_per_token(self) -> float:
        """Prefill recurrence, convolution and attention within windows, per token of a prompt."""
        model, parallel, kernels = self.model, self.tensor_parallel, self.kernels
        heads = model.state_elements / REFERENCE_HEAD / parallel
        channels = (model.conv_shape or (0, 0))[0] / parallel
        scan = kernels.scan_token_s + kernels.scan_token_head_s * heads if heads else 0.0
        scan += self.gpu.convolution_s * channels
        _, q_heads, head_dim = model.window_heads
        window_flops = model.window_layers * model.window_tokens * 4 * q_heads * head_dim / parallel
        return model.recurrent_layers * scan + window_flops / self._attention_flops(head_dim)

    @property
    def scan_floor_s(self) -> float:
        """What the prefill recurrence takes at least, all layers; a convolution alone is no recurrence."""
        return self.model.recurrent_layers * self.kernels.scan_t0_s if self.model.state_elements else 0.0

    def _attention_flops(self, head_dim: int) -> float:
        return self._attention_share(self.kernels.attention_e_f, self.kv_dtype, head_dim) * self.gpu.flops

    def _attention_share(self, shares: Mapping[str, tuple[float, ...]], kv_dtype: str, head_dim: int) -> float:
        near = min(range(len(HEAD_DIMS)), key=lambda i: abs(HEAD_DIMS[i] - head_dim))
        return shares["fp8" if kv_dtype == "fp8" else "bf16"][near]


def gemm_s(kernel: Gemm, gpu: Gpu, m: float, n: float, k: float, number_bytes: float) -> float:
    """A product of m x k activations and k x n weights, both of `number_bytes` per number, with bf16 results."""
    read = (number_bytes * (n * k + m * k) + 2 * m * n) / (kernel.e_bw * gpu.bandwidth)
    computed = 2 * m * n * k / (kernel.e_f * gpu.flops)
    return kernel.t0_s + (read**kernel.p + computed**kernel.p) ** (1 / kernel.p)


def experts_s(
    kernel: Experts,
    gpu: Gpu,
    tokens: float,
    experts: int,
    experts_per_token: int,
    expert_parallel: int,
    hidden: float,
    width: float,
    matrices: int,
    number_bytes: float,
) -> float:
    """The routed experts of one layer on one of `expert_parallel` GPUs, each `matrices` of `hidden` x `width` there."""
    parameters = matrices * hidden * width
    rows = tokens * experts_per_token / expert_parallel
    touched = experts / expert_parallel * (1.0 - (1.0 - experts_per_token / experts) ** (kernel.coverage * tokens))
    read = touched * parameters * number_bytes / (kernel.e_bw * gpu.bandwidth)
    computed = 2 * rows * parameters / (kernel.e_f * gpu.flops)
    passed = kernel.passes * 2 * rows * (hidden + width) / gpu.bandwidth
    return kernel.t0_s + (read**kernel.p + computed**kernel.p) ** (1 / kernel.p) + passed


def all_reduce_s(gpu: Gpu, gpus: int, message_bytes: float) -> float:
    """Summing a message over `gpus` GPUs; measured for 2, 4 and 8: others take the next larger of these, or 8."""
    if gpus == 1:
        return 0.0
    measured = min((n for n in gpu.all_reduce if n >= gpus), default=max(gpu.all_reduce))
    t0_s, bandwidth = gpu.all_reduce[measured]
    return t0_s + message_bytes / bandwidth
