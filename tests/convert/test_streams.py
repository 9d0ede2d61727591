"""What Linears are calibrated on: the paper's one stream, and the followed one, against whole passes of the block."""

from pathlib import Path

import pytest
import torch
from convert.hf_models import VOCAB, save_model
from torch import Tensor

from billm_convert import streams
from billm_convert.block import DecoderBlock, Rotary, embed, input_groups
from billm_convert.source import ModelSource, open_model
from billm_convert.streams import FollowedStream, Stream

FAMILIES = ["llama-biased", "opt-350m", "qwen3"]  # pre-norm, post-norm with LayerNorm, norms on queries and keys
CPU = torch.device("cpu")


def _begin(tmp_path: Path, family: str, seed: int) -> tuple[ModelSource, Tensor, Rotary | None]:
    save_model(tmp_path, family, seed)
    source = open_model(tmp_path)
    tokens = torch.randint(VOCAB, (5, 16), generator=torch.Generator().manual_seed(seed))
    tables = {name: source.tensor(name) for name in source.names() if not name.startswith("layers.")}
    rotary = Rotary(tables["rope.inv_freq"], 1.0, 16) if source.config.position == "rope" else None
    return source, embed(source.config, tables, tables["embed.weight"][tokens]).contiguous(), rotary


def _read(block: DecoderBlock, x: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    block.observe(x, lambda group, value: seen.__setitem__(group, value))
    return seen


def _moment(left: Tensor, right: Tensor) -> Tensor:
    """2 LᵀR as a mean over tokens."""
    left, right = left.flatten(0, -2).double(), right.flatten(0, -2).double()
    return (2 * left.T @ right / len(left)).float()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_papers_stream_reads_the_original_block(family: str, tmp_path: Path, seed: int) -> None:
    source, hidden, rotary = _begin(tmp_path, family, seed)
    block = DecoderBlock(source.config, dict(source.layer(0)), rotary)
    wanted = _read(block, hidden)
    stream = Stream(source.config, hidden.clone(), 2, CPU, CPU)
    told: list[float] = []
    found = list(stream.inputs(block, block, told.append))
    assert [inputs.linears for inputs in found] == list(input_groups(source.config).values())
    for inputs, x in zip(found, wanted.values(), strict=True):
        assert inputs.drift is None
        torch.testing.assert_close(inputs.hessian, _moment(x, x), atol=1e-5, rtol=1e-4)
    assert told == sorted(told)
    assert told[-1] == 1


@pytest.mark.parametrize("room", [0.25, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_followed_stream_reads_what_is_replaced_so_far(
    family: str, room: float, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over two blocks: the second one's drift is what the first one's replaced Linears made."""
    monkeypatch.setattr(streams, "_KEPT_SHARE", room)
    source, hidden, rotary = _begin(tmp_path, family, seed)
    generator = torch.Generator().manual_seed(seed)
    stream = FollowedStream(source.config, hidden.clone(), 2, CPU, CPU)
    wanted_hidden, groups = hidden.clone(), input_groups(source.config)
    for layer in range(2):
        weights = dict(source.layer(layer))
        block = DecoderBlock(source.config, weights, rotary)
        original = DecoderBlock(source.config, dict(weights), rotary)
        told: list[float] = []
        inputs = stream.inputs(block, original, told.append)
        for group, linears in groups.items():
            found = next(inputs)
            assert found.linears == linears
            x, read = _read(block, hidden)[group], _read(original, wanted_hidden)[group]
            torch.testing.assert_close(found.hessian, _moment(x, x), atol=1e-5, rtol=1e-4)
            assert found.drift is not None
            torch.testing.assert_close(found.drift, _moment(read - x, x), atol=1e-5, rtol=1e-3)
            assert (found.hidden_drift is not None) == (group in ("o", "down"))
            if found.hidden_drift is not None:
                halves = [(wanted_hidden, original, hidden, block)]
                if group == "down":
                    halves = [(original.attention_half(wanted_hidden), original, block.attention_half(hidden), block)]
                missing = (halves[0][0] - halves[0][2])[:, 1:]
                tokens = x.view(*hidden.shape[:2], -1)[:, 1:]
                torch.testing.assert_close(found.hidden_drift, _moment(missing, tokens), atol=1e-5, rtol=1e-3)
            for linear in linears:
                weight = weights[f"{linear}.weight"]
                weights[f"{linear}.weight"] = weight * (1 + 0.3 * torch.randn(weight.shape, generator=generator))
        assert next(inputs, None) is None
        stream.advance(block, original, told.append)
        hidden, wanted_hidden = block.forward(hidden), original.forward(wanted_hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_followed_stream_goes_on_the_same(family: str, tmp_path: Path, seed: int) -> None:
    """A block that is finished already is advanced through whole; one that is worked on, half by half."""
    source, hidden, rotary = _begin(tmp_path, family, seed)
    original = DecoderBlock(source.config, dict(source.layer(0)), rotary)
    block = DecoderBlock(source.config, {n: w * 0.9 for n, w in source.layer(0).items()}, rotary)
    worked, resumed = (FollowedStream(source.config, hidden.clone(), 2, CPU, CPU) for _ in range(2))
    for _ in worked.inputs(block, original, lambda share: None):
        pass
    following = DecoderBlock(source.config, source.layer(1), rotary)
    read = []
    for stream in (worked, resumed):
        stream.advance(block, original, lambda share: None)
        read.append(next(stream.inputs(following, following, lambda share: None)))
    assert torch.equal(read[0].hessian, read[1].hessian)
    assert read[0].drift is not None
    assert read[1].drift is not None
    assert torch.equal(read[0].drift, read[1].drift)


@pytest.mark.parametrize("family", FAMILIES)
def test_quick_products_change_little_and_leave_no_trace(family: str, tmp_path: Path, seed: int) -> None:
    source, hidden, rotary = _begin(tmp_path, family, seed)
    original = DecoderBlock(source.config, source.layer(0), rotary)
    block = DecoderBlock(source.config, {n: w * 0.9 for n, w in source.layer(0).items()}, rotary)
    before = torch.get_float32_matmul_precision()
    for group in zip(
        *(
            FollowedStream(source.config, hidden.clone(), 2, CPU, CPU, quick=quick).inputs(
                block, original, lambda share: None
            )
            for quick in (False, True)
        ),
        strict=True,
    ):
        assert torch.get_float32_matmul_precision() == before
        exact, quick = (inputs.hessian for inputs in group)
        assert float((exact - quick).norm() / exact.norm()) < 0.02
