"""The calibration decoder against Hugging Face's own implementations, for every family."""

from pathlib import Path
from typing import Any

import pytest
import torch
from convert.hf_models import FAMILIES, VOCAB, save_model
from torch.nn import functional

from billm_convert.block import DecoderBlock, KeyValues, Rotary, embed, finish, input_groups
from billm_convert.source import ModelSource, open_model

TOKENS = 40


def layer_weights(source: ModelSource, layer: int) -> dict[str, torch.Tensor]:
    prefix = f"layers.{layer}."
    names = [name for name in source.names() if name.startswith(prefix)]
    return {name.removeprefix(prefix): source.tensor(name) for name in names}


def blocks_of(source: ModelSource) -> list[DecoderBlock]:
    config = source.config
    rotary = None
    if config.position == "rope":
        rotary = Rotary(source.tensor("rope.inv_freq"), config.rope_scale, config.max_position_embeddings)
    return [DecoderBlock(config, layer_weights(source, i), rotary) for i in range(config.num_hidden_layers)]


def global_tables(source: ModelSource) -> dict[str, torch.Tensor]:
    return {name: source.tensor(name) for name in source.names() if not name.startswith("layers.")}


def logits(source: ModelSource, tokens: torch.Tensor) -> torch.Tensor:
    tables = global_tables(source)
    x = embed(source.config, tables, tables["embed.weight"][tokens])
    for block in blocks_of(source):
        x = block.forward(x)
    head = tables["embed.weight" if source.config.tie_word_embeddings else "head.weight"]
    return finish(source.config, tables, x) @ head.T


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_hugging_face(family: str, tmp_path: Path, seed: int) -> None:
    model = save_model(tmp_path, family, seed)
    tokens = torch.randint(VOCAB, (3, TOKENS), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        wanted = model(tokens).logits
        found = logits(open_model(tmp_path), tokens)
    scale = wanted.abs().max()
    assert (found - wanted).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("family", ["llama3", "mistral", "opt-350m", "qwen3", "llama-tied-gqa"])
def test_token_by_token_equals_whole(family: str, tmp_path: Path, seed: int) -> None:
    save_model(tmp_path, family, seed)
    source = open_model(tmp_path)
    x = torch.randn(2, 20, source.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    block = blocks_of(source)[1]
    whole = block.forward(x)
    past = KeyValues(20)
    for start, stop in [(0, 7), (7, 8), (8, 15), (15, 20)]:
        part = block.forward(x[:, start:stop], past)
        assert torch.allclose(part, whole[:, start:stop], atol=1e-4)


def test_attention_takes_any_memory_layout(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of torch's kernels for GPUs lay the heads beside each other in memory."""
    save_model(tmp_path, "llama-tied-gqa", seed)
    source = open_model(tmp_path)
    x = torch.randn(2, 6, source.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    block = blocks_of(source)[0]
    whole = block.forward(x)
    attention = functional.scaled_dot_product_attention

    def heads_side_by_side(*args: torch.Tensor, **options: Any) -> torch.Tensor:
        return attention(*args, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", heads_side_by_side)
    past = KeyValues(6)
    parts = [block.forward(x[:, start:stop], past) for start, stop in [(0, 4), (4, 5), (5, 6)]]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4)


@pytest.mark.parametrize("family", ["llama-biased", "opt-350m", "qwen3"])
def test_captured_inputs_reproduce_the_linears(family: str, tmp_path: Path, seed: int) -> None:
    """`observe` shows what each nn.Linear of the Hugging Face layer really reads."""
    model = save_model(tmp_path, family, seed)
    source = open_model(tmp_path)
    tokens = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(seed))
    seen: dict[str, torch.Tensor] = {}
    read: dict[str, torch.Tensor] = {}
    hf_names = {f"layers.0.{linears[-1]}": group for group, linears in input_groups(source.config).items()}
    modules = dict(model.named_modules())
    for canonical, group in hf_names.items():
        module = modules[source._stored_name(f"{canonical}.weight").removesuffix(".weight")]
        module.register_forward_pre_hook(lambda _m, args, group=group: read.__setitem__(group, args[0].flatten(0, -2)))
    with torch.no_grad():
        model(tokens)
    tables = global_tables(source)
    blocks_of(source)[0].observe(
        embed(source.config, tables, tables["embed.weight"][tokens]), lambda name, x: seen.__setitem__(name, x)
    )
    assert set(seen) == set(input_groups(source.config))
    for group, value in read.items():
        assert torch.allclose(seen[group], value, atol=1e-4), group
