"""PB-LLM (Shang et al., ICLR 2024) untrained, as its code has it: a tenth of the weights at 8 bits, the others at 1."""

import torch
from torch import Tensor

from billm_convert.baselines.common import BaselineSettings, QuantizedWeight, feed_back, prepare
from billm_convert.baselines.uniform import asymmetric_grid

_LOW_SHARE = 0.9
_HIGH_BITS = 8


def pb_llm(weight: Tensor, hessian: Tensor, settings: BaselineSettings) -> QuantizedWeight:
    """Keep the weights of the largest w² / diag(H^c)² at 8 bits; binarize the others to mean ± scale, per row.

    The mask and both grids are fixed before the first column; then GPTQ's error feedback. Blocks play no part.
    """
    high_grid = asymmetric_grid(weight, _HIGH_BITS)
    work, upper = prepare(weight, hessian, settings.damp)
    sensitivity = (work / upper.diagonal()) ** 2
    threshold = sensitivity.flatten().sort().values[int(sensitivity.numel() * _LOW_SHARE)]
    low = sensitivity <= threshold
    # As in its code, the means run over all columns, the weights kept at 8 bits counting as zeros.
    binary = work * low
    mean = binary.mean(1, keepdim=True)
    scale = (binary - mean).abs().mean(1, keepdim=True)

    def quantize(j: int, column: Tensor) -> Tensor:
        x = column[:, None]
        return torch.where(low[:, j : j + 1], torch.sign(x - mean) * scale + mean, high_grid.round(x))[:, 0]

    out = feed_back(work, upper, 128, quantize)
    share = float(low.double().mean())
    paper = share + _HIGH_BITS * (1 - share)
    # The mask is a bit for every weight; a row stores a mean, a scale, and the 8-bit grid's scale and zero.
    return QuantizedWeight(out, paper, paper + 1 + (3 * 16 + _HIGH_BITS) / weight.shape[1])
