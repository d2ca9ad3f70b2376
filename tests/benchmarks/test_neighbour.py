"""The measurement of busy neighbours: what it counts, and that it leaves nothing behind."""

import os
from pathlib import Path

from benchmarks.neighbour import Neighbour, decode
from runtime import LLM


def test_decoding_is_ended_and_its_blocks_are_back(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model), max_running=3, num_blocks=64)
    assert decode(llm, 3, 0.05) > 0
    assert not llm.engine.busy
    llm.engine.scheduler.check_integrity()


def test_neighbours_end_with_the_measurement() -> None:
    with Neighbour("nobody", "", 0) as nobody, nobody.busy():
        pass
    neighbour = Neighbour("one", "while True: pass", 1)
    (process,) = neighbour._processes
    neighbour.__exit__()
    assert process.returncode is not None
    assert not os.path.exists(f"/proc/{process.pid}")
