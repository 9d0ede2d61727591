"""--target-bits: which kinds of Linears get smaller blocks, so that the whole stays within a number of true bits."""

from dataclasses import replace

from billm_format.config import BLOCK_SIZES, ModelConfig, Quantization
from billm_format.errors import UsageError
from billm_format.layout import LINEAR_KINDS, layer_tensors, linear_names

# The most harmful per weight first, in SmolLM2-135M. Kinds: by the logarithm of the perplexity with one kind alone
# binarized by the paper's recipe over that of full precision; v_proj is far ahead. The first block's MLP, a tenth of
# all harm: by the KL that each of its Linears alone does by the recipe "refined" (README.md, "Also tried").
_SENSITIVE = (
    "layers.0.down_proj",
    "v_proj",
    "layers.0.up_proj",
    "layers.0.gate_proj",
    "k_proj",
    "down_proj",
    "up_proj",
    "o_proj",
    "gate_proj",
    "q_proj",
)


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
    names = list(linear_names(config))
    for kind in _SENSITIVE:
        meant = [name for name in names if name == kind or name.endswith(f".{kind}")]
        for block in (block for block in sorted(BLOCK_SIZES) if block < quantization.block_size):
            smaller = {name: block for name in meant if block < quantization.block_of(name)}
            trial = replace(quantization, overrides=quantization.overrides | smaller)
            if true_bits(config, quantization) < true_bits(config, trial) <= target:  # else it has as many blocks
                quantization = trial
                break
    return quantization
