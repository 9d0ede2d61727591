"""The thread pool: same bits for every number of threads, callers that take turns, forks, a clean end."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from billm_rt import cpu

pytestmark = pytest.mark.usefixtures("keep_threads")


def run_python(code: str, **environment: str) -> str:
    """Run `code` in a fresh interpreter with this one's path, and return what it prints."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.strip()


def test_results_do_not_depend_on_the_number_of_threads(isa: str, random_linear: Any, rng: np.random.Generator) -> None:
    weight = random_linear(700, 300, 64)
    table = rng.integers(-128, 128, (700, 300), dtype=np.int8)
    for tokens in (1, 2, 40):
        x = rng.standard_normal((tokens, 300)).astype(np.float32)
        results = []
        for count in (1, 2, 3, 5):
            cpu.set_threads(count)
            assert cpu.threads() == count
            quantized = cpu.quantize(x, 64)
            results.append((cpu.binary_linear(weight, quantized), cpu.int8_linear(table, weight.row_scale, quantized)))
        for binary, int8 in results[1:]:
            np.testing.assert_array_equal(binary, results[0][0])
            np.testing.assert_array_equal(int8, results[0][1])


def test_several_python_threads_take_turns(random_linear: Any, rng: np.random.Generator) -> None:
    cpu.set_threads(3)
    weights = [random_linear(300, 128 * (1 + i), 128) for i in range(4)]
    inputs = [cpu.quantize(rng.standard_normal((t, w.cols)).astype(np.float32), 128) for w in weights for t in (1, 5)]
    cases = [(weights[i // 2], x) for i, x in enumerate(inputs)]
    wanted = [cpu.binary_linear(w, x) for w, x in cases]
    start = threading.Barrier(4)

    def hammer(worker: int) -> bool:
        start.wait()
        for turn in range(40):
            index = (worker + turn) % len(cases)
            if not np.array_equal(cpu.binary_linear(*cases[index]), wanted[index]):
                return False
            if turn % 10 == worker:
                cpu.set_threads(1 + turn % 4)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(hammer, range(4)))


SETUP = """
import os, sys, numpy as np
from billm_rt import cpu
rng = np.random.default_rng(0)
table, scale = rng.integers(-128, 128, (4000, 256), dtype=np.int8), np.ones(4000, np.float32)
x = cpu.quantize(rng.standard_normal((1, 256)).astype(np.float32), 128)
"""

FORK = """
cpu.set_threads(3)
wanted = cpu.int8_linear(table, scale, x)
stop = False
def busy():  # forks happen while another thread is at work
    while not stop:
        cpu.int8_linear(table, scale, x)
import threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
thread = threading.Thread(target=busy)
thread.start()
for _ in range(10):
    child = os.fork()
    if not child:
        same = all(np.array_equal(cpu.int8_linear(table, scale, x), wanted) for _ in range(5))
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(cpu.int8_linear(table, scale, x), wanted)
stop = True
thread.join()
print("forked")
"""


def test_fork() -> None:
    assert run_python(SETUP + FORK) == "forked"


def test_the_interpreter_ends_cleanly() -> None:
    assert run_python(SETUP + "cpu.set_threads(4); print(cpu.int8_linear(table, scale, x).shape)") == "(1, 4000)"


def test_threads_come_from_the_environment_and_their_number_is_checked() -> None:
    code = "from billm_rt import cpu; print(cpu.threads())"
    assert run_python(code, OMP_NUM_THREADS="3") == "3"
    assert int(run_python(code, OMP_NUM_THREADS="many")) >= 1
    for wrong in (0, -1, 257):
        with pytest.raises(ValueError, match=f"threads: wanted 1 to 256, found {wrong}"):
            cpu.set_threads(wrong)


def test_numpy_when_the_library_is_not_wanted() -> None:
    code = SETUP + "print(cpu.isa(), cpu.supported_isas(), cpu.available(), cpu.unavailable_reason())"
    assert run_python(code, BILLM_NATIVE="0") == "numpy ('numpy',) False BILLM_NATIVE=0 is set"


def test_numpy_when_the_library_is_broken() -> None:
    code = """
import sys
sys.modules["billm_rt.cpu._native"] = None
from billm_rt import cpu
print(cpu.isa(), cpu.unavailable_reason())
"""
    assert run_python(code, BILLM_NATIVE="1").startswith("numpy the native library cannot be loaded (")
