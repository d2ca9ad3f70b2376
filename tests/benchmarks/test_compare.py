"""The comparison measures what it says: the same tokens from every peer, and ratios the right way up."""

import json
from pathlib import Path

import pytest

from benchmarks.compare import main
from benchmarks.inprocess import Eft, HuggingFace, OneByOne
from benchmarks.scenarios import equal_tokens
from benchmarks.work import Job, Measurement, Outcome, Prompts


def test_peers_do_the_same_work(tiny_model: Path) -> None:
    eft = Eft(str(tiny_model), at_once=4, overrides={"num_blocks": "64"})
    hf = HuggingFace(str(tiny_model))
    prompts = Prompts(eft.encode, seed=1)
    job = Job([prompts.ids(length) for length in (3, 17, 40, 9, 9)], 12)
    expected = hf.run(job).tokens
    assert [len(row) for row in expected] == [12] * 5
    assert hf.batches_of(3).run(job).tokens == expected  # three, padded on the left, and two
    assert eft.run(job).tokens == expected
    assert OneByOne(eft).run(job).tokens == expected


def test_prompts_are_never_the_same_twice_but_for_the_same_seed() -> None:
    def encode(text: str) -> list[int]:
        return [sum(text.encode())]

    first, again = Prompts(encode, seed=1), Prompts(encode, seed=1)
    jobs = [first.job(2, 30, 5), first.job(2, 30, 5)]
    assert jobs[0].prompts[0] != jobs[0].prompts[1]
    assert jobs[0] != jobs[1]
    assert again.job(2, 30, 5) == jobs[0]


def test_ratios() -> None:
    rate = Measurement(peer="a", unit="output tok/s", values=[10.0, 30.0, 20.0])
    assert rate.median == 20.0
    assert rate.times_better(Measurement(peer="b", unit="output tok/s", values=[5.0])) == 4.0
    wait = Measurement(peer="a", unit="s to first token", values=[0.25])
    assert wait.times_better(Measurement(peer="b", unit="s to first token", values=[2.0])) == 8.0
    assert Outcome(2.0, [[1, 2, 3], [4]]).output_rate == 2.0
    assert equal_tokens(Outcome(1.0, [[1, 2, 3]]), Outcome(1.0, [[1, 9, 3], [7, 7, 7]])) == 2


def test_command_prints_json(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["single", "--model", str(tiny_model), "--repeats", "2", "--peer-sample", "1", "--json"]
    assert main([*arguments, "--set", "num_blocks=64"]) == 0
    report = json.loads(capsys.readouterr().out)
    base, eft = report["scenarios"]["single"]
    assert (base["peer"], eft["peer"], base["times_better"]) == ("generate", "Eft", 1.0)
    assert len(eft["values"]) == 2
    assert eft["times_better"] == pytest.approx(eft["median"] / base["median"])
    assert report["arguments"]["set"] == ["num_blocks=64"]


@pytest.mark.parametrize("arguments", [["sinlge"], ["--repeats", "0"], ["--set", "max_runing=3"]])
def test_wrong_usage_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert arguments[-1] in capsys.readouterr().err
