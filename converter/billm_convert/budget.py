"""--target-bits: which kinds of Linears get smaller blocks, so that the whole stays within a number of true bits."""

from dataclasses import replace

from billm_format.config import BLOCK_SIZES, ModelConfig, Quantization
from billm_format.errors import UsageError
from billm_format.layout import LINEAR_KINDS, layer_tensors

# The most harmful per weight first: logarithm of the perplexity that SmolLM2-135M has with one kind alone binarized by
# the paper's recipe over that of full precision, by the kind's share of the weights. v_proj is far ahead of the rest.
_SENSITIVE = ("v_proj", "k_proj", "down_proj", "up_proj", "o_proj", "gate_proj", "q_proj")


def true_bits(config: ModelConfig, quantization: Quantization) -> float:
    """Return the bits per weight that the Linears' planes, scales and indices take in the file."""
    weights = sum(rows * cols for rows, cols, _ in config.linears().values()) * config.num_hidden_layers
    stored = sum(
        spec.nbytes
        for layer in range(config.num_hidden_layers)
        for spec in layer_tensors(config, quantization, layer)
        if spec.kind in LINEAR_KINDS
    )
    return 8 * stored / weights


def spend(config: ModelConfig, quantization: Quantization, target: float) -> Quantization:
    """Return `quantization` with smaller blocks, the most sensitive kinds first, as long as `target` bits hold them.

    Raises UsageError, with the number, where not even the given block size fits.
    """
    if (least := true_bits(config, quantization)) > target:
        raise UsageError(
            f"--target-bits {target:g}: blocks of {quantization.block_size} columns take {least:.3f} bits; give that, "
            "or a larger --block-size"
        )
    for kind in (kind for kind in _SENSITIVE if kind in config.linears()):
        for block in (block for block in sorted(BLOCK_SIZES) if block < quantization.block_size):
            names = dict.fromkeys((f"layers.{layer}.{kind}" for layer in range(config.num_hidden_layers)), block)
            trial = replace(quantization, overrides=quantization.overrides | names)
            if true_bits(config, quantization) < true_bits(config, trial) <= target:  # else it has as many blocks
                quantization = trial
                break
    return quantization
