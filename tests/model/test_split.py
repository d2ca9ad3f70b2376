"""Splits of a dimension, and that a rank reads no more of a checkpoint than its own."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import kernels
from runtime.checkpoints.safetensors_files import find_weights
from runtime.model.layers import Parameter
from runtime.model.split import Split

CPU = torch.device("cpu")


def test_what_is_picked_is_put_back_and_found() -> None:
    split = Split.joined([Split.even(6, 1, 3), Split.whole(2), Split(3, ()), Split.even(4, 0, 2)])
    whole = torch.arange(split.full * 3).view(split.full, 3)
    picked = split.pick(whole)
    assert picked[:, 0].tolist() == [6, 9, 18, 21, 33, 36]
    assert split.size == len(picked) == 6
    back = torch.full_like(whole, -1)
    split.put(back, picked)
    assert torch.equal(back[back >= 0].view(-1, 3), picked)
    index = torch.arange(split.full)
    found = split.find(index)
    assert torch.equal(split.pick(index), index[found >= 0])
    assert found[found >= 0].tolist() == list(range(6))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_cuts_cover_everything_once(size: int) -> None:
    cuts = [Split.cut(20, rank, size) for rank in range(size)]
    assert [index for cut in cuts for part in cut.ranges for index in part] == list(range(20))


def test_a_rank_reads_its_own_rows_of_the_mapped_file(tmp_path: Path) -> None:
    """As the kernel counts pages of the mapping: a fourth of 64 MiB, and what it maps around a page."""
    save_file({"w": torch.ones(4096, 4096)}, tmp_path / "model.safetensors")
    for name, tensor in find_weights(tmp_path).tensors():
        assert name == "w"
        parameter = Parameter({"": Split.even(4096, 2, 4)}, (4096,), torch.float32, CPU)
        before = mapped(tmp_path / "model.safetensors")
        parameter.fill("", tensor, kernels.load("reference"))
        read = mapped(tmp_path / "model.safetensors") - before
    assert bool((parameter.data == 1).all())
    assert 15 << 20 < read < 20 << 20


def mapped(path: Path) -> int:
    """Bytes of a file that are in this process's memory."""
    maps = Path("/proc/self/smaps").read_text(encoding="utf-8").split(f"{path}\n")[1:]
    return sum(1024 * int(found[1]) for text in maps if (found := re.search(r"^Rss:\s+(\d+) kB", text, re.MULTILINE)))
