"""Whole conversions of tiny models on a GPU, beside the same ones on the CPU."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert.hf_models import VOCAB, save_model, write_text

from billm_convert import ConvertReport, ConvertSettings, convert, resources
from billm_convert.block import DecoderBlock, Rotary, attend, embed
from billm_convert.embedding4 import solve_table
from billm_convert.refined import RefinedSettings, solve_refined
from billm_convert.settings import EFFORTS
from billm_convert.solver import solve_linear
from billm_convert.source import open_model
from billm_convert.streams import FollowedStream
from billm_format.reader import BillmFile

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"nsamples": 6, "seqlen": 24, "block_size": 32, "max_salient": 8, "check": False}


@pytest.fixture
def gpu() -> torch.device:
    """The device that torch calls cuda; CuPy may see one that torch's build cannot use."""
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device")
    return resources.choose_device("cuda")


def _convert(folder: Path, device: str, settings: ConvertSettings) -> ConvertReport:
    out = folder / f"{device}.billm"
    report = convert(folder / "model", out, dataclasses.replace(settings, device=device))
    with BillmFile.open(out) as file:
        file.verify()
        assert file.conversion["device"] == device
    return report


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("family", ["llama-tied-gqa", "opt-350m", "mistral", "qwen3"])
@pytest.mark.parametrize("recipe", ["paper", "refined"])
@pytest.mark.parametrize("on_host", [False, True])
def test_a_conversion_comes_to_what_it_does_on_the_cpu(
    family: str, recipe: str, on_host: bool, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever hidden states are kept. Sums in another order turn some codes around, and few of them matter."""
    if on_host:
        monkeypatch.setattr(resources, "_HIDDEN_SHARE", 0)
    save_model(tmp_path / "model", family, seed)
    text = write_text(tmp_path / "text.txt", seed)
    settings = ConvertSettings(recipe=recipe, calib=str(text), embedding_bits=4, seed=seed % 1000, **SIZES)
    found, wanted = (_convert(tmp_path, device, settings) for device in ("cuda", "cpu"))
    assert [linear.name for linear in found.layers] == [linear.name for linear in wanted.layers]
    for ours, theirs in zip(found.layers, wanted.layers, strict=True):
        assert ours.error == pytest.approx(theirs.error, rel=0.2)
        assert ours.weight_error == pytest.approx(theirs.weight_error, rel=0.2)


@pytest.mark.usefixtures("gpu")
def test_text_that_the_model_writes_and_training(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With heads that share keys: of those a GPU's kernels lay out the results in another way."""
    monkeypatch.setitem(EFFORTS, "fast", dataclasses.replace(EFFORTS["fast"], windows=8, model_steps=6))
    save_model(tmp_path / "model", "llama-tied-gqa", seed)
    settings = ConvertSettings(recipe="tuned", effort="fast", calib="self", seed=seed % 1000, **SIZES)
    report = _convert(tmp_path, "cuda", dataclasses.replace(settings, check=True))
    assert report.calibration["tokens"] == 6 * 24
    assert report.tuning
    assert report.check
    assert np.isfinite(report.check.ratio)


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("window", [None, 3])
def test_heads_that_share_keys(tokens: int, window: int | None, gpu: torch.device, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, heads, 7, 16, generator=generator) for heads in (6, 2, 2))
    query = query[:, :, -tokens:]
    wanted = attend(query, key, value, 7 - tokens, window)
    found = attend(query.to(gpu), key.to(gpu), value.to(gpu), 7 - tokens, window)
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=1e-4)


def test_solved_weights_are_the_files(gpu: torch.device, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(48, 176, generator=generator).to(gpu)
    x = torch.randn(600, 176, generator=generator).to(gpu)
    hessian = 2 * x.T @ x / 600
    for solved in (solve_linear(weight, hessian), *solve_refined([weight], hessian, RefinedSettings())):
        assert solved.weight.device == gpu
        assert solved.weight.cpu().numpy().tobytes() == solved.packed.dequantize().tobytes()


@pytest.mark.parametrize("kind", ["device", "host"])
def test_streams_beside_the_cpus(kind: str, gpu: torch.device, tmp_path: Path, seed: int) -> None:
    save_model(tmp_path, "llama-tied-gqa", seed)
    source = open_model(tmp_path)
    tokens = torch.randint(VOCAB, (5, 16), generator=torch.Generator().manual_seed(seed))
    hidden = embed(source.config, {}, source.tensor("embed.weight")[tokens])
    seen = []
    for device, place in ((CPU, CPU), (gpu, gpu if kind == "device" else CPU)):
        rotary = Rotary(source.tensor("rope.inv_freq").to(device), 1.0, 16)
        stream = FollowedStream(source.config, hidden.clone(), 2, device, place)
        for layer in range(2):
            weights = {name: value.to(device) for name, value in source.layer(layer).items()}
            original = DecoderBlock(source.config, weights, rotary)
            block = DecoderBlock(source.config, {name: 0.9 * value for name, value in weights.items()}, rotary)
            seen.append([inputs.hessian.cpu() for inputs in stream.inputs(block, original, lambda share: None)])
            stream.advance(block, original, lambda share: None)
        assert stream.finite()
    for wanted, found in zip(seen[:2], seen[2:], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_a_table_of_4_bits(gpu: torch.device, seed: int) -> None:
    value = torch.randn(300, 70, generator=torch.Generator().manual_seed(seed))
    metric = torch.eye(70)
    found, wanted = solve_table(value, metric.to(gpu)), solve_table(value, metric)
    assert found.keys() == wanted.keys()
    assert (found["weight"] == wanted["weight"]).mean() > 0.99
