"""The two trainings: one block against the full-precision block, and the whole model against the full-precision logits.

Everything random is drawn from seeds, so a run that is resumed at a step goes the
way it would have gone.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from billm_convert.block import normalize
from billm_convert.source import ModelSource
from billm_convert.tune_block import Rates, TunedBlock, parameter_groups
from billm_format.config import ModelConfig
from billm_format.errors import UsageError

_WARM_UP = 0.1  # share of the steps in which the learning rates rise
_BETAS = (0.9, 0.95)
_EPSILON = 1e-12  # a latent's gradient is some 1e-8: with torch's own 1e-8 most of them would hardly move

# Positions whose logits are made at once: all of them would be hundreds of megabytes.
_CHUNK = 256


def product_dtype(device: torch.device) -> torch.dtype:
    """Return what factors of matrix products are rounded to in training: bfloat16 where there are instructions for it.

    Measured with AMX: products take a sixth of the time that float32 takes. Sums stay float32.
    """
    if device.type == "cuda":
        quick = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        quick = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "sve_bf16", "bf16"))
    return torch.bfloat16 if quick else torch.float32


def rate_factor(step: int, steps: int) -> float:
    """Return what the learning rates are multiplied by: a linear warm-up, then half a cosine to almost 0."""
    warm = max(1, round(_WARM_UP * steps))
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Trainer:
    """AdamW over blocks and vectors, with the schedule's rates."""

    def __init__(self, blocks: list[TunedBlock], vectors: list[nn.Parameter], rates: Rates, steps: int) -> None:
        """Begin before the first of `steps` steps."""
        self._blocks = blocks
        groups = list(parameter_groups(blocks, vectors, rates))
        self._rates = (rates.latents, rates.codes, rates.vectors)
        self._steps = steps
        self._optimizer = torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, eps=_EPSILON, weight_decay=0.0, fused=True)
        self.step = 0

    def update(self) -> None:
        """Take a step from the gradients that are there, and drop them."""
        factor = rate_factor(self.step, self._steps)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        for block in self._blocks:
            block.collect()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for block in self._blocks:
            block.project()
        self.step += 1

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def state(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on, by name."""
        out = {}
        for index, parameter in enumerate(self._parameters()):
            out[f"{index}.value"] = parameter.detach()
            moments = self._optimizer.state[parameter]
            out |= {f"{index}.{name}": moments[name] for name in ("exp_avg", "exp_avg_sq")}
        return out

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Go on from `state` as it was after `step` steps."""
        self.step = step
        for index, parameter in enumerate(self._parameters()):
            with torch.no_grad():
                parameter.copy_(state[f"{index}.value"])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                **{name: state[f"{index}.{name}"].to(parameter) for name in ("exp_avg", "exp_avg_sq")},
            }
        for block in self._blocks:
            block.project()


class BlockLoss:
    """How far a block's output is from the full-precision one, as the norm that reads both sees it.

    Some channels of some tokens are a hundred times larger than all others. The norm of the block that follows divides
    every token by its own size and gives such channels little weight: without it they would be all that is learned.
    """

    def __init__(self, config: ModelConfig, norms: Mapping[str, Tensor], name: str) -> None:
        """`norms` holds the weights `name`.weight (and .bias) of the norm that reads the output."""
        self._config = config
        self._norms = norms
        self._name = name

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the relative squared error over all tokens, one number."""
        wanted = self._seen(target)
        return (self._seen(output) - wanted).square().sum() / wanted.square().sum()

    def _seen(self, x: Tensor) -> Tensor:
        # After a "post" norm the output has its size already.
        read = self._config.norm_position == "pre" and f"{self._name}.weight" in self._norms
        return normalize(self._config, self._norms, self._name, x) if read else x


def block_loss(source: ModelSource, layer: int, device: torch.device) -> BlockLoss:
    """Return the loss that sees block `layer`'s output as the norm behind it does."""
    config = source.config
    if layer + 1 < config.num_hidden_layers:
        name, names = "attn_norm", {f"layers.{layer + 1}.attn_norm.{part}": part for part in ("weight", "bias")}
    else:
        name, names = "final_norm", {f"final_norm.{part}": part for part in ("weight", "bias")}
    known = set(source.names())
    norms = {f"{name}.{part}": source.tensor(full).to(device) for full, part in names.items() if full in known}
    return BlockLoss(config, norms, name)


def tune_block(
    block: TunedBlock,
    loss: BlockLoss,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    rates: Rates,
    order: Sequence[Sequence[int]],
    device: torch.device,
    told: Callable[[float], None],
) -> None:
    """Train `block` on the device to turn inputs, each [1, tokens, hidden], into targets; `order`: what a step reads.

    `told` hears the share that is done.
    """
    trainer = Trainer([block], [], rates, len(order))
    with torch.enable_grad():
        for windows in order:
            read, wanted = (torch.cat([kept[i] for i in windows]).to(device) for kept in (inputs, targets))
            torch.autograd.backward(loss(block.forward(read), wanted))
            trainer.update()
            told(trainer.step / len(order))


def check_finite(loss: float, where: str) -> None:
    """Raise UsageError when a loss is not finite."""
    if not math.isfinite(loss):
        raise UsageError(f"training failed at {where}: the loss is not finite; take another text or another recipe")


def reading_order(windows: Sequence[int], each: int, steps: int, seed: int) -> list[list[int]]:
    """Return which `each` of the windows every step reads: all in a random order, then all in another."""
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < steps * each:
        order += rng.sample(windows, len(windows))
    return [order[step * each : (step + 1) * each] for step in range(steps)]


def logit_distance(hidden: Tensor, wanted: Tensor, head: Tensor, wanted_head: Tensor) -> tuple[float, Tensor]:
    """Return the mean over positions of KL(full precision || tuned) in nats, and its gradient for `hidden`.

    hidden and wanted [positions, embedding_size] are what either head [vocab, embedding_size] multiplies, in the heads'
    dtype; the gradient is float32. Logits exist for a few positions at a time only.
    """
    total = 0.0
    gradient = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        for start in range(0, hidden.shape[0], _CHUNK):
            rows = slice(start, start + _CHUNK)
            goal = (wanted[rows].to(wanted_head.dtype) @ wanted_head.T).float()
            found = (hidden[rows].to(head.dtype) @ head.T).float()
            share, own = goal.softmax(dim=-1), found.softmax(dim=-1)
            # The sum of log_softmax differences, weighted by share: a row's normalizer follows from its largest logit.
            total += float(_normalizer(found, own).sub_(_normalizer(goal, share)).sum())
            total += float(goal.sub_(found).mul_(share).sum())
            gradient[rows] = (own.sub_(share).to(head.dtype) @ head).float()
    return total / hidden.shape[0], gradient.div_(hidden.shape[0])


def _normalizer(logits: Tensor, share: Tensor) -> Tensor:
    """Return log sum exp of each row of logits [n, vocab], `share` being its softmax."""
    return logits.amax(dim=-1).sub_(share.amax(dim=-1).log_())
