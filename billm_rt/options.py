"""What the commands make of the options that say where a model runs, and how exactly (`add_model_options`)."""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from billm_rt.model import Model


def load_model(path: "Path", args: argparse.Namespace, ctx: int | None = None) -> "Model":
    """Load the file as the options say."""
    import billm_rt

    return billm_rt.load(
        path,
        args.device,
        threads=args.threads,
        exact=getattr(args, "exact", False),
        ctx=ctx,
        activation_bits=args.activation_bits,
        kv_bits=args.kv_bits,
    )


def describe(model: "Model") -> dict[str, str]:
    """Return where the model runs and with which numbers, as the commands' JSON has it."""
    backend = model.backend
    return {
        "device": backend.device,
        "isa": backend.isa,
        "activations": backend.activations,
        "kv_cache_type": backend.kv_type,
    }


def positive(text: str) -> int:
    """Return the number that an option gives; argparse says what is wrong with any that is below 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted at least 1, found {value}")
    return value
