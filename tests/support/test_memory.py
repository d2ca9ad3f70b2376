"""Where threads allocate: in a process of its own, since it is settled before the first of them."""

import platform
import subprocess
import sys

import pytest

THREADS = """
import ctypes, threading
from pathlib import Path
from runtime.support.memory import share_one_arena

assert share_one_arena()
malloc = ctypes.CDLL(None).malloc
malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
together = threading.Barrier(4)
found = []

def allocate():
    together.wait()  # one that has ended would leave its arena to the next
    found.append(malloc(1000))
    together.wait()

threads = [threading.Thread(target=allocate) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
heap = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]"))
low, high = (int(one, 16) for one in heap.split()[0].split("-"))
print([low <= address < high for address in found])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="arenas are glibc's")
def test_threads_share_the_first_ones_arena() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([True] * 4)
