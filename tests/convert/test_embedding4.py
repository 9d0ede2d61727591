"""4-bit tables: what is packed is what was chosen, and feedback earns its keep in the metric that it is given."""

import numpy as np
import pytest
import torch
from convert.hf_models import save_model

from billm_convert.embedding4 import HEAD_IDENTITY, metric_of, solve_table
from billm_convert.head_moment import head_moment
from billm_convert.source import open_model
from billm_format.errors import UsageError
from billm_format.layout import table_bytes
from billm_format.packing import Table, unpack_nibbles


def solved(value: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(Table(cols=value.shape[1], **solve_table(value, metric)).take(slice(None)))


def out_error(value: torch.Tensor, found: torch.Tensor, metric: torch.Tensor) -> float:
    error = value - found
    return float(((error @ metric) * error).sum() / ((value @ metric) * value).sum())


def plain(value: torch.Tensor) -> torch.Tensor:
    """Groups of 32 rounded to 16 levels between their extremes: what anyone would do first."""
    groups = value.reshape(value.shape[0], -1, 32)
    step = groups.abs().amax(dim=2, keepdim=True) / 7.5
    return ((torch.round(groups / step - 0.5).clamp(-8, 7) + 0.5) * step).reshape(value.shape)


@pytest.fixture
def moment(seed: int) -> torch.Tensor:
    """Of correlated inputs, a few of which are thirty times the others' size."""
    torch.manual_seed(seed)
    x = torch.randn(4000, 24) @ torch.randn(24, 96) + 0.5 * torch.randn(4000, 96)
    x[:, :3] *= 30
    return x.T @ x / 4000


def test_white_inputs_need_no_more_than_a_good_step(seed: int) -> None:
    torch.manual_seed(seed)
    value = torch.randn(300, 96)
    metric = torch.eye(96)
    assert out_error(value, solved(value, metric), metric) < 0.9 * out_error(value, plain(value), metric)


def test_feedback_helps_where_inputs_are_correlated(moment: torch.Tensor) -> None:
    value = torch.randn(300, 96)
    metric = metric_of(moment, HEAD_IDENTITY)
    fed = out_error(value, solved(value, metric), metric)
    assert fed < 0.3 * out_error(value, solved(value, torch.eye(96)), metric)
    assert fed < 0.3 * out_error(value, plain(value), metric)


def test_rows_do_not_see_each_other_and_short_groups_are_padded(moment: torch.Tensor) -> None:
    value, metric = torch.randn(50, 70), metric_of(moment[:70, :70], 1.0)
    whole = solve_table(value, metric)
    assert whole["weight"].shape == (50, table_bytes(70)) and whole["step"].shape == (3, 50)
    assert not (unpack_nibbles(whole["weight"], 96)[:, 70:]).any()
    part = solve_table(value[20:30], metric)
    np.testing.assert_array_equal(part["weight"], whole["weight"][20:30])
    np.testing.assert_array_equal(part["step"], whole["step"][:, 20:30])


def test_zeros_tiny_and_large_rows(moment: torch.Tensor) -> None:
    value, metric = torch.randn(5, 96), metric_of(moment, 1.0)
    value[0] = 0
    value[1, 32:] = 0
    value[2] *= 1e-6
    value[3] *= 1e4
    found = solved(value, metric)
    assert not found[0].any() and torch.isfinite(found).all()
    assert (found[3] - value[3]).norm() < 0.3 * value[3].norm()
    with pytest.raises(UsageError, match="too large for 4 bits"):
        solve_table(value * 1e10, metric)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_moment_is_that_of_what_the_head_reads(family: str, tmp_path: object, seed: int) -> None:
    """Against transformers: the hidden states just before the head, all positions but the first."""
    from pathlib import Path

    folder = Path(str(tmp_path)) / "model"
    model = save_model(folder, family, seed)
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (3, 20))
    read: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
    with torch.no_grad():
        model(torch.from_numpy(tokens))
    h = torch.cat([x[:, 1:].flatten(0, 1) for x in read]).float()
    found = head_moment(open_model(folder), tokens, torch.device("cpu"))
    wanted = 2 * h.T @ h / h.shape[0]
    assert (found - wanted).norm() < 2e-3 * wanted.norm()  # embeddings are read as float16
