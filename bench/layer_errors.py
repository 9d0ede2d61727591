"""Relative output error of binarized Linears of a real model, for one or several settings of the solver.

    PYTHONPATH=.:format:converter python bench/layer_errors.py MODEL_DIR --layers 1 14 27 --settings paper none

The inputs are those of the full-precision model, so that settings are compared on equal terms. The error is
tr(D H Dᵀ) / tr(W H Wᵀ), H without dampening; with --held-out, H comes from text that the solver never saw.
"""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from billm_convert.baselines import BASELINES, BaselineSettings
from billm_convert.hessian import HessianAccumulator
from billm_convert.refined import RefinedSettings, solve_refined
from billm_convert.solver import PaperSettings, solve_linear
from billm_format.command import add_common_options, emit_json, run_command
from billm_format.errors import UsageError
from billm_rt import texts

SETTINGS: dict[str, PaperSettings | RefinedSettings] = {
    "paper": PaperSettings(),
    "percentile": PaperSettings(breakpoint="percentile"),
    # The authors' searches and numbers of columns; their means per group have no place in the format.
    "authors": PaperSettings(min_salient=1, max_salient=49, breakpoint="percentile", search_on="salience"),
    "exact": PaperSettings(compensation="exact"),
    "none": PaperSettings(compensation="none"),
    "salient-only": PaperSettings(splitting=False),
    "splitting-only": PaperSettings(min_salient=0, max_salient=0),
    # Alone, each Linear has a column scale of its own; in a conversion it shares one with those that read the same.
    "refined": RefinedSettings(),
    "refined, 1 sweep": RefinedSettings(sweeps=1),
    "refined, no salient": RefinedSettings(min_salient=0, max_salient=0),
}


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], prog="layer_errors")
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("--layers", type=int, nargs="+", help="decoder layers (default: second, middle and third last)")
    parser.add_argument("--calib", default="wikitext2", help="text, by name or file (default: %(default)s)")
    parser.add_argument("--nsamples", type=int, default=16, help="windows of text (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a window (default: %(default)s)")
    parser.add_argument("--held-out", action="store_true", help="judge on as many windows that the solver never saw")
    parser.add_argument("--block-size", type=int, default=128, help="columns in a block (default: %(default)s)")
    parser.add_argument(
        "--settings", nargs="+", choices=(*SETTINGS, *BASELINES), default=["paper"], help="of ours or rivals"
    )
    add_common_options(parser)
    return run_command(parser, _run)


def _run(args: argparse.Namespace) -> None:
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    windows = _windows(args.model, args.calib, args.nsamples * (1 + args.held_out), args.seqlen)
    count = model.config.num_hidden_layers
    linears = _linears(model, args.layers or [1, count // 2 - 1, count - 3])
    seen = _hessians(model, linears, windows[: args.nsamples])
    judges = _hessians(model, linears, windows[args.nsamples :]) if args.held_out else None
    rows: list[dict[str, Any]] = []
    for name, linear in linears.items():
        figures = {}
        for setting in args.settings:
            started = time.perf_counter()
            weight, more = _solve(setting, linear.weight, seen[name], args.block_size)
            seconds = time.perf_counter() - started
            error = _error(linear.weight, weight, (judges or seen)[name])
            figures[setting] = {"error": error, **more, "seconds": seconds}
        rows.append({"linear": name, "shape": list(linear.weight.shape), "settings": figures})
        if not (args.json or args.quiet):
            _print_row(name, figures)
    means = {setting: _means([row["settings"][setting] for row in rows]) for setting in args.settings}
    if args.json:
        emit_json("billm-layer-errors", 1, {"linears": rows, "means": means})
    else:
        _print_row(f"mean of {len(rows)}", means)


def _windows(model: Path, calib: str, number: int, seqlen: int) -> Tensor:
    """Return the first windows of the text, int64 [number, seqlen]."""
    ids = AutoTokenizer.from_pretrained(model)(texts.load(calib, "train").joined, add_special_tokens=False).input_ids
    windows = texts.windows(ids, seqlen, number)
    if len(windows) < number:
        raise UsageError(
            f"{calib}: {len(ids)} tokens are {len(windows)} windows of {seqlen}, not {number}; ask for fewer"
        )
    return torch.tensor(windows)


def _linears(model: nn.Module, layers: list[int]) -> dict[str, nn.Linear]:
    """Return the Linears inside the decoder layers named, by "layer.module"."""
    decoder = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
    if wrong := [layer for layer in layers if not 0 <= layer < len(decoder)]:
        raise UsageError(f"layer {wrong[0]}: the model has layers 0 to {len(decoder) - 1}")
    found = {}
    for layer in layers:
        for name, module in decoder[layer].named_modules():
            if isinstance(module, nn.Linear):
                found[f"{layer}.{name.rpartition('.')[2]}"] = module
    return found


def _hessians(model: nn.Module, linears: dict[str, nn.Linear], windows: Tensor) -> dict[str, Tensor]:
    """Return each Linear's Hessian over its inputs in the full-precision model."""
    sums = {name: HessianAccumulator(linear.in_features, "cpu") for name, linear in linears.items()}

    def collect(accumulator: HessianAccumulator) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _, inputs: accumulator.add(inputs[0].flatten(0, -2))

    hooks = [linear.register_forward_pre_hook(collect(sums[name])) for name, linear in linears.items()]
    for window in windows:
        model(window[None], logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return {name: accumulator.result() for name, accumulator in sums.items()}


def _solve(setting: str, weight: Tensor, hessian: Tensor, block_size: int) -> tuple[Tensor, dict[str, float]]:
    """Return the weight that stands for `weight`, and what else there is to say of it."""
    if setting in BASELINES:
        found = BASELINES[setting](weight, hessian, BaselineSettings(block_size=block_size))
        return found.weight, {"bits_paper": found.bits_paper, "bits_stored": found.bits_stored}
    settings = dataclasses.replace(SETTINGS[setting], block_size=block_size)
    if isinstance(settings, PaperSettings):
        solved = solve_linear(weight, hessian, settings)
    else:
        solved = solve_refined([weight], hessian, settings)[0]
    more = {"salient": solved.salient_fraction, "sparse": solved.sparse_fraction}
    return torch.from_numpy(solved.packed.dequantize()), more


def _error(weight: Tensor, found: Tensor, hessian: Tensor) -> float:
    delta = weight - found
    return float(((delta @ hessian) * delta).sum() / ((weight @ hessian) * weight).sum())


def _means(figures: list[dict[str, float]]) -> dict[str, float]:
    """Return the geometric mean of the errors and the plain mean of everything else."""
    means = {key: sum(figure[key] for figure in figures) / len(figures) for key in figures[0]}
    return means | {"error": math.exp(sum(math.log(figure["error"]) for figure in figures) / len(figures))}


def _print_row(name: str, settings: dict[str, Any]) -> None:
    cells = []
    for setting, figures in settings.items():
        more = ", ".join(f"{key} {value:.3g}" for key, value in figures.items() if key != "error")
        cells.append(f"{setting} {figures['error']:.4f} ({more})")
    print(f"{name:16}", " | ".join(cells), flush=True)


if __name__ == "__main__":
    sys.exit(main())
