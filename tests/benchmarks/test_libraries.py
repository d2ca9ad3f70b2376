"""Peers that are libraries: a child process that does as OpenVINO's, directories for Hugging Face's libraries."""

import asyncio
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.loads import Load, measure
from benchmarks.peers import PeerFailed, Size
from benchmarks.peers.over_pipes import child
from benchmarks.peers.weights import hugging_face_directory
from benchmarks.work import Measurement, Prompts
from runtime.checkpoints import open_checkpoint
from tests.checkpoints.gguf.files import write_gguf

SIZE = Size(at_once=2, context=64, threads=1)
FAKE = (sys.executable, Path(__file__).parent / "fake_child.py")


def measured(command: tuple[str | Path, ...], output: int) -> Measurement:
    load = Load(about="a test", unit="output tok/s", requests=5, at_once=2, own=4, output=output)

    async def run() -> Measurement:
        async with child(command, SIZE) as driver:
            return await measure(driver, load, Prompts(lambda text: [len(text)], seed=0), peer="fake", repeats=2)

    return asyncio.run(run())


def test_a_child_is_measured_as_a_server_is() -> None:
    result = measured(FAKE, 6)
    assert len(result.values) == len(result.ttft) == len(result.tpot) == 2
    assert min(*result.values, *result.ttft, *result.tpot) > 0


def test_a_child_that_ends_fails_its_requests() -> None:
    """The fake one ends when it is asked for 13 tokens, which the warm-up does not do."""
    with pytest.raises(PeerFailed, match="the child process ended"):
        measured(FAKE, 13)


def test_a_child_that_does_not_start_says_why() -> None:
    with pytest.raises(PeerFailed, match=r"exit code 1(.|\n)*no such library"):
        measured((sys.executable, "-c", "import sys; print('{}'); sys.exit('no such library')"), 6)


def test_hugging_face_libraries_read_the_directory(tiny_model: Path, tmp_path: Path) -> None:
    """The weights after a round trip through GGUF, its other order of rows included."""
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model)
    directory = hugging_face_directory(str(source), tmp_path / "files")
    wanted = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    got = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    assert wanted.keys() == got.keys()
    assert all((got[name] == tensor).all() for name, tensor in wanted.items())
    text = "The quick brown fox"
    assert AutoTokenizer.from_pretrained(directory).encode(text) == open_checkpoint(str(source)).tokenizer.encode(text)
    assert hugging_face_directory(str(tiny_model), tmp_path) == tiny_model
