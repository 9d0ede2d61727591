"""The byte budget: what is spent where, and that the file keeps to it."""

import dataclasses
from pathlib import Path

import pytest
from convert.hf_models import save_model, write_text

from billm_convert import ConvertSettings, convert
from billm_convert.budget import spend, true_bits
from billm_convert.source import open_model
from billm_format.config import ModelConfig, Quantization
from billm_format.errors import UsageError
from billm_format.layout import linear_names
from billm_format.reader import BillmFile


@pytest.fixture
def config(tmp_path: Path, seed: int) -> ModelConfig:
    save_model(tmp_path / "model", "llama", seed)
    return open_model(tmp_path / "model").config


def kinds(quantization: Quantization) -> dict[str, int]:
    return {name.rpartition(".")[2]: block for name, block in quantization.overrides.items()}


def test_the_most_sensitive_come_first_and_nothing_is_overspent(config: ModelConfig) -> None:
    start = Quantization(128, col_scales=tuple(linear_names(config)))
    least = true_bits(config, start)
    all_small = dataclasses.replace(start, overrides=dict.fromkeys(linear_names(config), 32))
    for share in (0, 0.1, 0.2, 0.5, 1):
        target = least + share * (true_bits(config, all_small) - least)
        spent = spend(config, start, target + 1e-9)
        assert true_bits(config, spent) <= target + 1e-9
        assert not spent.overrides or spent.block_of("layers.0.down_proj") < 128
        for kind in config.linears():
            later = {spent.block_of(f"layers.{i}.{kind}") for i in range(1, config.num_hidden_layers)}
            assert len(later) == 1  # all alike but the first
            first = spent.block_of(f"layers.0.{kind}")
            in_mlp = kind in ("gate_proj", "up_proj", "down_proj")
            assert first <= min(later) if in_mlp else {first} == later
    assert kinds(spend(config, start, true_bits(config, all_small))) == dict.fromkeys(config.linears(), 32)
    dearest = ["layers.0.down_proj", *(name for name in linear_names(config) if "v_proj" in name)]
    two = dataclasses.replace(start, overrides=dict.fromkeys(dearest, 32))
    assert spend(config, start, true_bits(config, two)).overrides == two.overrides


def test_a_budget_that_nothing_fits_is_refused(config: ModelConfig) -> None:
    with pytest.raises(UsageError, match=r"--target-bits 2: blocks of 128 columns take 3\.\d+ bits; give that, or"):
        spend(config, Quantization(128), 2.0)
    with pytest.raises(UsageError, match="--target-bits: wanted a number above 0, found -1"):
        ConvertSettings(target_bits=-1.0)


@pytest.mark.parametrize("recipe", ["paper", "refined"])
def test_the_file_keeps_to_the_budget(recipe: str, config: ModelConfig, tmp_path: Path, seed: int) -> None:
    text = write_text(tmp_path / "text.txt", seed)
    settings = ConvertSettings(
        recipe=recipe, calib=str(text), nsamples=3, seqlen=24, block_size=64, max_salient=8, check=False
    )
    convert(tmp_path / "model", tmp_path / "plain.billm", settings)
    with BillmFile.open(tmp_path / "plain.billm") as file:
        least = file.bits()[1]
    report = convert(tmp_path / "model", tmp_path / "out.billm", dataclasses.replace(settings, target_bits=least + 0.3))
    assert report.settings["target_bits"] == least + 0.3
    with BillmFile.open(tmp_path / "out.billm") as file:
        file.verify()
        assert least < file.bits()[1] <= least + 0.3
        assert file.bits()[1] == pytest.approx(true_bits(config, file.quantization))
        assert kinds(file.quantization)["v_proj"] == 32
        smaller = file.linear("layers.0.v_proj")
        assert smaller.block == 32
        assert smaller.scales.shape[1] == -(-smaller.cols // 32)
    errors = {linear.name: linear.error for linear in report.layers}
    assert all(0 <= error < 1 for error in errors.values())
