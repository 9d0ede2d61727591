"""Whole models by a rival method: transformers runs them, and an interrupted run ends in the same model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from convert.hf_models import FAMILIES, save_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from billm_convert.baselines import BASELINES, BaselineSettings, QuantizedWeight
from billm_convert.baselines.model import fake_quantize, is_finished
from billm_convert.source import open_model
from billm_format.errors import UsageError

CPU = torch.device("cpu")
SETTINGS = BaselineSettings(block_size=32)


def unchanged(weight: Tensor, hessian: Tensor, settings: BaselineSettings) -> QuantizedWeight:
    return QuantizedWeight(weight, 1.0, 3.0 if weight.shape[0] == 80 else 2.0)


def save_rounded(folder: Path, family: str, seed: int, **changes: Any) -> PreTrainedModel:
    """Save a model whose parameters float16 holds exactly, and return it."""
    model = save_model(folder, family, seed, **changes).float().eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    model.save_pretrained(folder)
    return model


def drawn(seed: int) -> Tensor:
    return torch.randint(320, (3, 24), generator=torch.Generator().manual_seed(seed))


def ignore(done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_that_changes_nothing_leaves_the_model_as_it_was(family: str, tmp_path: Path, seed: int) -> None:
    """Every tensor is in its place, whatever the family calls it."""
    original = save_rounded(tmp_path / "model", family, seed)
    tokens = drawn(seed)
    source = open_model(tmp_path / "model")
    bits = fake_quantize(source, tokens.numpy(), unchanged, SETTINGS, tmp_path / "out", CPU, ignore)
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted, found = original(tokens).logits, copy(tokens).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    sizes = [(rows * cols, rows) for rows, cols, _ in source.config.linears().values()]
    mean = sum(size * (3 if rows == 80 else 2) for size, rows in sizes) / sum(size for size, _ in sizes)
    assert bits == pytest.approx((1.0, mean))


def test_blocks_see_the_quantized_blocks_before(tmp_path: Path, seed: int) -> None:
    """The second block's Hessian is that of inputs from the quantized first one, as transformers computes them."""
    save_rounded(tmp_path / "model", "llama", seed)
    tokens, seen = drawn(seed), []

    def spy(weight: Tensor, hessian: Tensor, settings: BaselineSettings) -> QuantizedWeight:
        seen.append(hessian)
        return BASELINES["rtn-2"](weight, hessian, settings)

    source = open_model(tmp_path / "model")
    fake_quantize(source, tokens.numpy(), spy, SETTINGS, tmp_path / "out", CPU, ignore)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    inputs: list[Tensor] = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    with torch.inference_mode():
        model(tokens)
    hook.remove()
    x = inputs[0].flatten(0, 1)
    torch.testing.assert_close(seen[len(seen) // 2], 2 * x.T @ x / len(x), atol=1e-4, rtol=1e-3)


def test_an_interrupted_run_goes_on_and_ends_in_the_same_model(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path / "model", "qwen2", seed, num_hidden_layers=3)
    source, tokens = open_model(tmp_path / "model"), drawn(seed).numpy()
    calls = []

    def counted(weight: Tensor, hessian: Tensor, settings: BaselineSettings) -> QuantizedWeight:
        calls.append(weight.shape)
        return BASELINES["gptq-2"](weight, hessian, settings)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    whole = fake_quantize(source, tokens, counted, SETTINGS, tmp_path / "whole", CPU, ignore)
    needed = len(calls)
    with pytest.raises(KeyboardInterrupt):
        fake_quantize(source, tokens, counted, SETTINGS, tmp_path / "out", CPU, stop)
    assert not is_finished(tmp_path / "out")
    assert fake_quantize(source, tokens, counted, SETTINGS, tmp_path / "out", CPU, ignore) == whole
    assert is_finished(tmp_path / "out")
    assert len(calls) == 2 * needed  # no block twice
    files = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "out").iterdir())
    for name in files:
        first, second = tmp_path / "whole" / name, tmp_path / "out" / name
        if name.endswith(".safetensors"):  # whose metadata come in any order
            wanted, found = load_file(first), load_file(second)
            assert wanted.keys() == found.keys()
            assert all(torch.equal(wanted[key], found[key]) for key in wanted)
        else:
            assert first.read_bytes() == second.read_bytes(), name


def test_the_source_must_be_a_folder(tmp_path: Path, seed: int) -> None:
    save_model(tmp_path / "model", "llama", seed)
    source = open_model(tmp_path / "model")
    source.path = tmp_path / "model.gguf"
    with pytest.raises(UsageError, match="wanted a Hugging Face model folder"):
        fake_quantize(source, drawn(seed).numpy(), unchanged, SETTINGS, tmp_path / "out", CPU, ignore)
