"""Rival methods, for comparison alone: they give weights to measure, not files, and are left out of the wheel.

Each is a function of a Linear's weight, its Hessian and the settings, as `solver.solve_linear` is, and counts bits
twice: as its own paper does, and everything that a file would have to hold (scales and means at 16 bits).
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from billm_convert.baselines.arb import arb_rc
from billm_convert.baselines.authors import billm_as_published
from billm_convert.baselines.common import BaselineSettings, QuantizedWeight
from billm_convert.baselines.pbllm import pb_llm
from billm_convert.baselines.uniform import gptq, round_to_nearest

__all__ = ["BASELINES", "Baseline", "BaselineSettings", "QuantizedWeight"]

# weight [rows, cols], Hessian [cols, cols] -> the weight that stands for it
Baseline = Callable[[Tensor, Tensor, BaselineSettings], QuantizedWeight]

BASELINES: dict[str, Baseline] = {
    **{f"rtn-{bits}": partial(round_to_nearest, bits) for bits in (1, 2, 3)},
    **{f"gptq-{bits}": partial(gptq, bits) for bits in (1, 2, 3)},
    "pb-llm": pb_llm,
    "billm-code": billm_as_published,
    "arb-rc": arb_rc,
}
