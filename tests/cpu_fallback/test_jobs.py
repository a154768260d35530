"""Threads that work off a table of jobs together: every chunk once, from any caller, in any number, after a fork."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from trichord import cpu_fallback
from trichord.cpu_fallback import jit, jobs
from trichord.weight_format import Weight, WeightFormat


def product(rows):
    blocks = torch.from_numpy(np.random.default_rng(0).integers(0, 100, (2000, 18 * 8), dtype=np.uint8))
    weight = Weight(blocks, WeightFormat.Q4_0, (2000, 256), "blocks")
    x = torch.from_numpy(np.random.default_rng(rows).standard_normal((rows, 256)).astype(np.float32))
    return cpu_fallback.matmul(x, [weight], "default")[0]


def many_threads_at_once():
    """Products from eight threads, in turn with one row and with three."""
    expected = {rows: product(rows) for rows in (1, 3)}
    wrong = []

    def work():
        wrong.extend(i for i in range(30) if not torch.equal(product(1 + 2 * (i % 2)), expected[1 + 2 * (i % 2)]))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return wrong


@pytest.mark.parametrize("count", [1, 2, 5])
def test_products_run_from_many_threads(count):
    before = jit.threads()
    try:
        jit.set_threads(count)
        assert many_threads_at_once() == []
        assert len(jobs._crew.helpers) >= count - 1
    finally:
        jit.set_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_products_after_a_fork():
    expected = product(3)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr
    assert torch.equal(product(3), expected)


if __name__ == "__main__":
    jit.set_threads(2)
    before = product(3)
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(product(3), before) else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
