"""What a process asks of the system."""

import os
import subprocess
import sys

import pytest

FREED_AND_TAKEN = """
import resource, sys
from nodes.own_process import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
import torch
torch.set_num_threads(1)
for size in (48 << 20, 40 << 20):  # first touch, then buffers of another size in what is there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(size // 4, dtype=torch.float32).add_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_kept_memory_is_not_fetched_from_the_system_again():
    # Another test's command may have set it in this process.
    plain = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    faults = {}
    for how in ("kept", "given-back"):
        command = [sys.executable, "-c", FREED_AND_TAKEN, how]
        faults[how] = int(subprocess.check_output(command, env=plain, text=True, timeout=120))
    assert faults["given-back"] > 10 * (40 << 20) // 4096 // 2, "buffers of this size are not given back any more"
    assert faults["kept"] < faults["given-back"] / 100
