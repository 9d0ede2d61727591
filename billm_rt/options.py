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


def describe(args: argparse.Namespace) -> dict[str, str]:
    """Return the number formats under the keys `activations` and `kv_cache_type`, for a command's JSON."""
    if getattr(args, "exact", False):
        return {"activations": "float32", "kv_cache_type": "float32"}
    return {"activations": f"int{args.activation_bits}", "kv_cache_type": f"int{args.kv_bits}"}


def positive(text: str) -> int:
    """Return the number that an option gives; argparse says what is wrong with any that is below 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted at least 1, found {value}")
    return value
