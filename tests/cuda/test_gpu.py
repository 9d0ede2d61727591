"""What only a GPU can show: shapes of real models, CUDA graphs, another stream."""

from typing import Any

import numpy as np
import pytest
from cuda import references
from cuda.conftest import PoisonedGpu
from cuda.test_kernels import FLOAT32
from random_linear import RandomLinear

from billm_format.packing import Table
from billm_rt.cuda import launch
from billm_rt.cuda.linear import LinearGroup
from billm_rt.cuda_backend import CudaBackend

pytestmark = pytest.mark.gpu

SHAPES = [(192, 576), (1536, 576), (576, 1536), (896, 4864), (4096, 4096), (11008, 4096), (1024, 28672)]


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_products_of_real_shapes(rows: int, cols: int, random_linear: RandomLinear, rng: np.random.Generator) -> None:
    device = PoisonedGpu()
    linear = random_linear(rows, cols, 128, col_scale=True, bias=True)
    group = LinearGroup(device, [linear])
    for tokens in (1, 2, 3, 8, 11, 64, 600):
        x = rng.standard_normal((tokens, cols)).astype(np.float32)
        few = x if tokens < launch.DENSE_TOKENS else x[:20]
        found = device.download(group.multiply(device.upload(x)))[: len(few)]
        assert references.error(found, references.products(few, [linear])) < (1e-3 if len(few) < tokens else FLOAT32)
        halves = few.astype(np.float16)
        found = device.download(group.multiply(device.upload(halves), launch.Dtype.FLOAT16))
        assert references.error(found, references.products(halves, [linear])) < 1e-3


def test_a_head_of_a_real_size(rng: np.random.Generator) -> None:
    device = PoisonedGpu()
    weight = rng.integers(-127, 128, (151936, 896), np.int8)
    scale = rng.uniform(0.01, 0.02, len(weight)).astype(np.float16)
    backend = CudaBackend(device)
    table = backend.load_table(Table(weight, weight.shape[1], scale))
    wide = weight.astype(np.float64) * scale.astype(np.float64)[:, None]
    for tokens in (1, 5):
        x = rng.standard_normal((tokens, 896)).astype(np.float32)
        assert (
            references.error(backend.logits(backend.head(device.upload(x), table)), x.astype(np.float64) @ wide.T)
            < 1e-5
        )


def test_a_graph_replays_on_new_activations(random_linear: RandomLinear, rng: np.random.Generator) -> None:
    """What is captured once computes with what its input holds at each replay, on the stream it is launched on."""
    import cupy

    device = PoisonedGpu()
    linear = random_linear(1000, 576, 128)
    group = LinearGroup(device, [linear])
    x, out = device.zeros((1, 576), np.float32), device.empty((1, 1000), np.float32)
    group.multiply(x, out=out)  # compiled before the capture
    stream: Any = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        group.multiply(x, out=out)
        graph = stream.end_capture()
        for _ in range(3):
            values = rng.standard_normal((1, 576)).astype(np.float32)
            x.set(values)
            out.fill(np.nan)
            graph.launch()
            stream.synchronize()
            assert references.error(device.download(out), references.products(values, [linear])) < FLOAT32
