"""A Linear in training against a plain reference: the same start, the same product, the same gradients."""

from pathlib import Path

import numpy as np
import pytest
import torch
from convert.hf_models import save_model
from torch import Tensor

from billm_convert.source import open_model
from billm_convert.stored_block import StoredBlock
from billm_convert.tune_block import TunedBlock
from billm_convert.tune_linear import ScaledLinear, TunedLinear, Vector, nearest_levels
from billm_format.packing import PackedLinear, pack_bits

CPU = torch.device("cpu")


def random_linear(rng: np.random.Generator, rows: int, cols: int, block: int) -> PackedLinear:
    """Return a Linear whose scales include all that a solver may leave: zeros, equal ones, the groups' order turned."""
    blocks = -(-cols // block)
    salient = rng.random(cols) < 0.2
    scales = rng.integers(0, 256, (rows, blocks, 4))
    scales[..., 2] = rng.integers(0, 200, (rows, blocks))
    scales[..., 3] = np.minimum(rng.integers(0, 200, (rows, blocks)), np.minimum(scales[..., 2], 255 - scales[..., 2]))
    scales[0] = 0
    scales[1, :, 1] = scales[1, :, 0]
    scales[2, :, 3] = 0
    return PackedLinear(
        rows=rows,
        cols=cols,
        block=block,
        sign=pack_bits(rng.random((rows, cols)) < 0.5),
        second=pack_bits(rng.random((rows, cols)) < 0.5),
        salient=pack_bits(salient),
        scales=scales.astype(np.uint8),
        row_scale=rng.uniform(1e-4, 1e-3, rows).astype(np.float16),
        col_scale=rng.uniform(0.5, 2, cols).astype(np.float16),
        bias=rng.normal(size=rows).astype(np.float32),
    )


def tuned(start: PackedLinear) -> TunedLinear:
    assert start.col_scale is not None
    return TunedLinear(start, Vector(start.col_scale, CPU, relative=True, half=True), CPU, torch.float32)


def everything(linear: TunedLinear) -> list[torch.nn.Parameter]:
    assert linear.col_scale is not None
    assert linear.bias is not None
    vectors = [vector.change for vector in (linear.row_scale, linear.col_scale, linear.bias)]
    return [linear.latent, linear.mid, linear.half, *vectors]


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(("rows", "cols", "block"), [(5, 64, 32), (7, 80, 32), (4, 576, 128), (3, 20, 64)])
def test_begins_at_the_start_to_the_byte(rows: int, cols: int, block: int, rng: np.random.Generator) -> None:
    start = random_linear(rng, rows, cols, block)
    packed = tuned(start).pack()
    for name, value in vars(start).items():
        found = getattr(packed, name)
        assert found == value if isinstance(value, int) else found.tobytes() == value.tobytes(), name


def shake(linear: TunedLinear, seed: int) -> None:
    """Move everything far enough that codes flip and scales leave their range."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter, size in zip(everything(linear), (60, 40, 40, 0.1, 0.1, 0.1), strict=True):
            parameter += size * torch.randn(parameter.shape, generator=generator)
    linear.project()


def test_what_is_trained_is_what_is_stored(rng: np.random.Generator, seed: int) -> None:
    """However far training goes, the product in training is that of the file, and the file keeps to the format."""
    start = random_linear(rng, 9, 80, 32)
    linear = tuned(start)
    shake(linear, seed)
    packed = linear.pack()
    assert (packed.sign != start.sign).any()
    assert (packed.second != start.second).any()
    assert packed.salient is start.salient
    wide = packed.scales.astype(int)
    assert (wide[..., 3] <= wide[..., 2]).all()
    assert (wide[..., 2] + wide[..., 3] <= 255).all()
    x = torch.randn(3, 4, 80)
    assert packed.bias is not None
    wanted = x @ torch.from_numpy(packed.dequantize()).T + torch.from_numpy(packed.bias)
    torch.testing.assert_close(linear(x).detach(), wanted, rtol=1e-4, atol=1e-4)


def test_codes_are_the_nearest_levels(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    latent = 100 * torch.randn(8, 50, generator=generator)
    middle = 100 * torch.rand(8, 1, generator=generator).expand(8, 50)
    half = middle * torch.rand(8, 1, generator=generator)
    levels = torch.stack((middle - half, middle + half, half - middle, -middle - half))
    nearest = (levels - latent).abs().argmin(dim=0)
    wanted = levels.gather(0, nearest[None])[0]
    torch.testing.assert_close(nearest_levels(latent, middle, half.clone()), wanted)


def plain_product(linear: TunedLinear, x: Tensor, packed: PackedLinear, levels: Tensor) -> Tensor:
    """Return the Linear's output, column by column: every level made of its block's mid and half, codes held fixed."""
    bits = np.unpackbits(packed.salient, bitorder="little")
    columns = []
    for j in range(packed.cols):
        entry = j // packed.block + (packed.num_blocks if bits[j] else 0)
        mid, half = linear.mid[:, entry], linear.half[:, entry]
        latent = linear.latent.detach()[:, j]
        larger = latent.abs() > mid.detach()
        level = torch.where(torch.signbit(latent), -1.0, 1.0) * torch.where(larger, mid + half, mid - half)
        columns.append(level + levels[:, j])
    assert linear.col_scale is not None
    assert linear.bias is not None
    return (x * linear.col_scale()) @ torch.stack(columns, dim=1).T * linear.row_scale() + linear.bias()


def test_gradients_are_those_of_a_plain_reference(rng: np.random.Generator) -> None:
    """The latents' gradient is the levels'; that of scales, rows, columns and input is exact."""
    start = random_linear(rng, 6, 80, 32)
    linear = tuned(start)
    x = torch.randn(2, 5, 80, requires_grad=True)
    weight = torch.randn(2, 5, 6)
    parameters = everything(linear)
    for share in (0.25, 0.75):  # a step may read its text in parts
        (linear(x) * weight * share).sum().backward()
    linear.collect()
    found = [parameter.grad for parameter in (x, *parameters)]
    levels = torch.zeros(6, 80, requires_grad=True)
    output = plain_product(linear, x, start, levels)
    wanted = torch.autograd.grad((output * weight).sum(), [x, levels, *parameters[1:]])
    for name, one, other in zip(("x", "latent", "mid", "half", "row", "col", "bias"), found, wanted, strict=True):
        assert one is not None
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()), msg=name)
    assert linear.weight.grad is None


def test_latents_begin_at_the_levels(rng: np.random.Generator) -> None:
    """But for those that lie on a border: a tie must not change a code."""
    start = random_linear(rng, 9, 80, 32)
    linear = tuned(start)
    latent, levels = linear.latent.detach(), torch.from_numpy(start.levels()).float()
    near = (latent - levels).abs() <= 0.25
    assert near.all()
    assert 0 < (latent != levels).float().mean() < 0.5
    middle = linear.stored_codes()[0].detach() @ linear._places
    clear = (levels.abs() > 0.5) & ((levels.abs() - middle).abs() > 0.5)
    torch.testing.assert_close(latent[clear], levels[clear])


def test_products_in_16_bits_are_near_those_of_the_file(rng: np.random.Generator, seed: int) -> None:
    start = random_linear(rng, 9, 80, 32)
    assert start.col_scale is not None
    linear = TunedLinear(start, Vector(start.col_scale, CPU, relative=True, half=True), CPU, torch.bfloat16)
    shake(linear, seed)
    packed = linear.pack()
    x = torch.randn(12, 80).bfloat16()
    assert packed.bias is not None
    wanted = x.float() @ torch.from_numpy(packed.dequantize()).T + torch.from_numpy(packed.bias)
    y = linear(x)
    assert y.dtype == torch.bfloat16
    assert float((y.detach().float() - wanted).norm() / wanted.norm()) < 0.01


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_vectors_alone_are_trained_in_the_product_of_the_file(
    products: torch.dtype, rng: np.random.Generator, seed: int
) -> None:
    start = random_linear(rng, 9, 80, 32)
    assert start.col_scale is not None
    linear = ScaledLinear(start, Vector(start.col_scale, CPU, relative=True, half=True), CPU, products)
    packed = linear.pack()
    for name, value in vars(start).items():
        found = getattr(packed, name)
        assert found == value if isinstance(value, int) else found.tobytes() == value.tobytes(), name
    generator = torch.Generator().manual_seed(seed)
    assert linear.col_scale is not None
    assert linear.bias is not None
    vectors = (linear.row_scale, linear.col_scale, linear.bias)
    with torch.no_grad():
        for vector in vectors:
            vector.change += 0.1 * torch.randn(vector.change.shape, generator=generator)
    packed = linear.pack()
    assert packed.bias is not None
    assert (packed.sign.tobytes(), packed.scales.tobytes()) == (start.sign.tobytes(), start.scales.tobytes())
    x = torch.randn(2, 6, 80, generator=generator).to(products)
    wanted = x.float() @ torch.from_numpy(packed.dequantize()).T + torch.from_numpy(packed.bias)
    y = linear(x)
    assert y.dtype == products
    assert float((y.detach().float() - wanted).norm() / wanted.norm()) < (1e-5 if products == torch.float32 else 0.02)
    if products == torch.float32:
        slope = torch.randn(y.shape, generator=generator)
        found = torch.autograd.grad((linear(x) * slope).sum(), [vector.change for vector in vectors])
        levels = torch.from_numpy(start.levels()).float()
        plain = (x * linear.col_scale()) @ levels.T * linear.row_scale() + linear.bias()
        for one, other in zip(
            found, torch.autograd.grad((plain * slope).sum(), [v.change for v in vectors]), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_a_column_scale_is_shared_or_refused(rng: np.random.Generator, tmp_path: Path, seed: int) -> None:
    save_model(tmp_path, "llama", seed)
    config = open_model(tmp_path).config
    linears = {name: random_linear(rng, rows, cols, 32) for name, (rows, cols, _) in config.linears().items()}
    with pytest.raises(ValueError, match="one column scale for all"):
        TunedBlock(config, StoredBlock(linears, {}), None, CPU, torch.float32)
