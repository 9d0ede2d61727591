"""The recipes by name: how the Linears that read one input are binarized."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from billm_convert.refined import RefinedSettings, solve_refined
from billm_convert.settings import FEWEST_SALIENT, ConvertSettings
from billm_convert.solved import SolvedLinear
from billm_convert.solver import PaperSettings, solve_linear
from billm_convert.streams import Inputs

# From the weights [rows, cols] of all Linears that read an input, and what calibration knows of it.
Recipe = Callable[[Sequence[Tensor], Inputs], list[SolvedLinear]]


def choose_recipe(settings: ConvertSettings, block_of: Callable[[str], int]) -> Recipe:
    """Return the recipe that `settings` name, with their numbers; `block_of` gives a Linear's block size."""
    fewest = min(FEWEST_SALIENT, settings.max_salient)
    if settings.recipe != "paper":  # "tuned" begins with it
        refined = RefinedSettings(settings.block_size, fewest, settings.max_salient, settings.dampening)
        return lambda weights, inputs: solve_refined(
            weights,
            inputs.hessian,
            refined,
            inputs.drift,
            inputs.hidden_drift,
            [block_of(linear) for linear in inputs.linears],
        )
    paper = _paper(settings, fewest)
    return lambda weights, inputs: [
        solve_linear(weight, inputs.hessian, replace(paper, block_size=block_of(linear)))
        for weight, linear in zip(weights, inputs.linears, strict=True)
    ]


def _paper(settings: ConvertSettings, fewest: int) -> PaperSettings:
    without_salient = settings.ablation == "splitting-only"
    return PaperSettings(
        block_size=settings.block_size,
        min_salient=0 if without_salient else fewest,
        max_salient=0 if without_salient else settings.max_salient,
        damp=settings.dampening,
        compensation="none" if settings.ablation == "no-compensation" else "quotient",
        splitting=settings.ablation != "salient-only",
        keep_searches=settings.report is not None,
    )
