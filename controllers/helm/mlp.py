"""The forward pass of a small tanh network over packed weights: one kernel, no allocation, no torch.

Weights lie in one float32 vector, layer after layer: the matrix as (inputs, outputs), then the bias. In that order the
inner loop runs over outputs, so that sums keep one fixed order and still use vector instructions.
"""

import numpy as np

from hbmgym.memory_backend.jit import kernel, subkernel

# tanh as a ratio of polynomials in float32, 13th over 6th degree (Eigen, generic_fast_tanh_float): within 4e-7 of the
# exact one, equal on every machine, and vectorised where a call of libm is not.
_LIMIT = np.float32(7.90531110763549805)
_A1, _A3, _A5, _A7, _A9, _A11, _A13 = (
    np.float32(a)
    for a in (
        4.89352455891786e-03,
        6.37261928875436e-04,
        1.48572235717979e-05,
        5.12229709037114e-08,
        -8.60467152213735e-11,
        2.00018790482477e-13,
        -2.76076847742355e-16,
    )
)
_B0, _B2, _B4, _B6 = (
    np.float32(b) for b in (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)
)


@subkernel
def _tanh(values):
    for i in range(len(values)):
        x = min(max(values[i], -_LIMIT), _LIMIT)
        q = x * x
        odd = x * (((((((_A13 * q + _A11) * q + _A9) * q + _A7) * q + _A5) * q + _A3) * q) + _A1)
        values[i] = odd / (((_B6 * q + _B4) * q + _B2) * q + _B0)


# Inputs read ahead of the inner loop, unsigned offsets: else the compiler uses no vector instructions here, which is
# four times as slow. Four rows at once read and write y a quarter as often; y + p + q + r + s adds them in order.
@subkernel
def _affine(matrix, bias, x, y):
    """y = x @ matrix + bias, with the matrix row after row in one vector."""
    count = np.uint64(len(y))
    for j in range(count):
        y[j] = bias[j]
    fours = len(x) // 4 * 4
    for i in range(0, fours, 4):
        a = np.uint64(i) * count
        b, c, d = a + count, a + count + count, a + count + count + count
        p, q, r, s = x[i], x[i + 1], x[i + 2], x[i + 3]
        for j in range(count):
            y[j] = y[j] + p * matrix[a + j] + q * matrix[b + j] + r * matrix[c + j] + s * matrix[d + j]
    for i in range(fours, len(x)):
        row, p = np.uint64(i) * count, x[i]
        for j in range(count):
            y[j] += p * matrix[row + j]


@kernel
def forward(weights, sizes, x, scratch):
    """The first output, before any tanh, for `x`: float32[sizes[0]]; hidden layers are tanh.

    `scratch` is float32[2, max(sizes)].
    """
    source, start = x, 0
    last = len(sizes) - 2
    for layer in range(last + 1):
        inputs, outputs = sizes[layer], sizes[layer + 1]
        bias = start + inputs * outputs
        target = scratch[layer % 2, :outputs]
        _affine(weights[start:bias], weights[bias : bias + outputs], source, target)
        if layer < last:
            _tanh(target)
        source, start = target, bias + outputs
    return float(source[0])
