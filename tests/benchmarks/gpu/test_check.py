"""The GPU check is known to work: it runs here on a tiny model, finds what is wrong, and reports what it cannot do."""

import inspect
import json
import os
import re
import subprocess
import sys
import weakref
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kernels
from benchmarks.gpu import speed
from benchmarks.gpu.__main__ import NAMES, main, sections
from benchmarks.gpu.kernels import CASES, check
from benchmarks.gpu.report import Clock, Figures, NotHere, Report, Wrong, page, run_sections
from benchmarks.gpu.subject import Row, Subject, generate, largest_gap
from kernels.interface import Ops
from kernels.reference import ReferenceOps
from tests.tiny import make_tiny_llama

CPU = torch.device("cpu")


@pytest.fixture
def subject(tiny_model: Path) -> Subject:
    return Subject(str(tiny_model), CPU, most=4)


def test_the_whole_check_runs_on_a_cpu(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path / "folder" / "model")
    (tmp_path / "folder" / "prompts.txt").write_text('the quick brown fox\n{"prompt": "numbers: 0 1 2"}\n')
    given = ["--folder", str(tmp_path / "folder"), "--device", "cpu", "--most", "4", "--minutes", "1"]
    assert main([*given, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "gpu.json").read_bytes())
    statuses = {section["name"]: section["status"] for section in report["sections"]}
    assert [*statuses] == [*NAMES]
    assert {name for name, status in statuses.items() if status == "skipped"} <= {"vllm", "training"}
    figures = {section["name"]: section["figures"] for section in report["sections"]}
    assert figures["ops"]["checked"] == len(CASES)
    assert figures["tokens"]["tokens"] == 9 * 48
    assert figures["adapters"]["adapted rows that differ from the base"] > 0
    assert figures["graphs"]["recorded"] == []
    assert figures["graphs"]["with rules, adapters, 3 rows, graphs, tok/s"] > 0
    assert figures["serving"]["batch 1, tok/s"] > 0
    assert figures["beside"]["training, share of it beside a stream"] > 0
    text = (tmp_path / "out" / "gpu.txt").read_text()
    assert all(name in text for name in NAMES)
    assert len(text.splitlines()) < 70


def link_packages(names: list[str], folder: Path) -> None:
    """A folder to import these distributions from, and what they need, and nothing else."""
    seen: set[str] = set()
    while names:
        name = canonicalize_name(names.pop())
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue  # such as one for another platform
        if name in seen:
            continue
        seen.add(name)
        wanted = map(Requirement, found.requires or ())
        names += [one.name for one in wanted if not one.marker or one.marker.evaluate({"extra": ""})]
        for top in {Path(file).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))


def test_it_needs_what_the_page_names(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "performance.md").read_text(encoding="utf-8")
    carried = re.search(r"^pip download --dest wheels (.+?) +#", page, re.MULTILINE)
    assert carried is not None
    make_tiny_llama(tmp_path / "model")
    (tmp_path / "packages").mkdir()
    link_packages(["torch", "triton", "transformers", *carried[1].split()], tmp_path / "packages")
    only = ["--only", "tokens", "adapters", "training", "beside", "--minutes", "0.5", "--most", "2"]
    command = [sys.executable, "-S", "-m", "benchmarks.gpu", "--device", "cpu", "--folder", str(tmp_path), *only]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'packages'}:{Path(__file__).parents[3]}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "peft is not installed" in done.stdout


def test_every_op_of_the_interface_has_a_case() -> None:
    layout = {"unavailable", "prepare", "prepare_lora", "fuse_layers"}
    methods = {name for name, _ in inspect.getmembers(Ops, inspect.isfunction) if not name.startswith("_")}
    assert {name.partition(" (")[0].partition(",")[0] for name in CASES} == methods - layout


def test_the_reference_agrees_with_itself_in_bfloat16() -> None:
    results = [*check(kernels.load("reference"), CPU, [torch.float32, torch.bfloat16])]
    assert len(results) == 2 * len(CASES)
    assert not [result for result in results if not result.right]


@pytest.mark.parametrize("op", ["rms_norm", "paged_attention", "lora_apply", "argmax"])
def test_a_wrong_op_is_found(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ReferenceOps):
        pass

    right = getattr(ReferenceOps, op)

    def wrong(self: Ops, *args: Any, **kwargs: Any) -> Any:
        result = right(self, *args, **kwargs)
        return (result[0], result[1] + 1) if isinstance(result, tuple) else result * 1.01

    monkeypatch.setattr(Broken, op, wrong)
    found = {
        result.op.partition(" (")[0].partition(",")[0]
        for result in check(Broken(), CPU, [torch.float32])
        if not result.right
    }
    assert op in found
    assert found <= {op, "lora_apply_table", "norm_linear", "norm_swiglu"}


def test_a_token_that_is_not_transformers_own_has_a_gap(subject: Subject) -> None:
    prompt = subject.prompts(1, 12)[0]
    with subject.engine() as assembled, subject.transformers() as peer:
        tokens = generate(assembled, [Row(prompt)], 6).tokens[0]
        assert largest_gap(peer, prompt, tokens)[0] < 1e-3
        gap, best = largest_gap(peer, prompt, [*tokens[:3], (tokens[3] + 1) % 512, *tokens[4:]])
        assert gap > 0.01
        assert 3 <= best < 6


def test_the_cache_has_room_for_the_largest_batch(tiny_model: Path) -> None:
    """No row waits for another's blocks: by default a cache holds four contexts."""
    subject = Subject(str(tiny_model), CPU, most=48)
    with subject.engine() as assembled:
        rows = [Row(prompt) for prompt in subject.prompts(48, 128)]
        generate(assembled, rows, 64)
        assert assembled.engine.scheduler.counts.preemptions == 0
        assert assembled.num_blocks * assembled.block_size >= 48 * (128 + 128)


def test_what_was_measured_is_gone_before_the_next(subject: Subject) -> None:
    """A section keeps its names to its end."""
    with subject.engine() as assembled, subject.transformers() as peer:
        generate(assembled, [Row(subject.prompts(1, 12)[0])], 2)
        worker: Any = assembled.engine._executor._worker  # type: ignore[attr-defined]
        held = [weakref.ref(one) for one in (assembled.decoder.layers[0], *worker._cache.layers[0])]  # type: ignore[union-attr]
        del worker
    assert [one() for one in held] == [None] * len(held)
    assert {parameter.device.type for parameter in peer.parameters()} == {"meta"}


def test_a_section_that_fails_does_not_end_the_others() -> None:
    def wrong(clock: Clock, figures: Figures) -> None:
        figures["before"] = 1.5
        raise Wrong("3 is not 4")

    def broken(clock: Clock, figures: Figures) -> None:
        raise RuntimeError("out of memory")

    def absent(clock: Clock, figures: Figures) -> None:
        raise NotHere("no such card")

    def good(clock: Clock, figures: Figures) -> None:
        figures["left"] = clock.left

    runs = {"wrong": (1.0, wrong), "broken": (1.0, broken), "absent": (1.0, absent), "good": (1.0, good)}
    found = run_sections(runs, 8.0)
    assert [section.status for section in found] == ["failed", "failed", "skipped", "passed"]
    assert found[0].figures == {"before": 1.5}
    assert "RuntimeError: out of memory" in found[1].problem
    assert "raise RuntimeError" in found[1].trace
    assert found[3].figures["left"] > 7  # the last one has what the others left
    report = Report(device="cpu", machine={}, model="m", minutes=1, sections=found)
    assert report.failed == ["wrong", "broken"]
    assert "2 of 4 sections failed: wrong, broken, 1 of 4 were skipped" in page(report)


def test_no_time_is_no_section() -> None:
    ran: list[str] = []
    found = run_sections({"late": (1.0, lambda clock, figures: ran.append("late"))}, 0.0)
    assert (found[0].status, ran) == ("skipped", [])


def test_vllm_is_asked_for_the_same_work(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with vLLM's interface, in the process that the check starts."""
    (tmp_path / "vllm.py").write_text(
        "from types import SimpleNamespace as S\n"
        "class SamplingParams(S): pass\n"
        "class LLM:\n"
        "    def __init__(self, model, max_num_seqs, enable_prefix_caching, seed): assert max_num_seqs == 4\n"
        "    def generate(self, prompts, params, use_tqdm):\n"
        "        assert params.temperature == 0 and params.ignore_eos\n"
        "        return [S(outputs=[S(token_ids=[1] * params.max_tokens)]) for p in prompts if p['prompt_token_ids']]\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    monkeypatch.syspath_prepend(tmp_path)
    figures = Figures()
    speed.against_vllm(subject, Clock(60), figures)
    assert set(figures) == {"batch 1"}
    assert figures["batch 1"]["vLLM"] > 0
    (tmp_path / "vllm.py").write_text("raise SystemExit('no CUDA')")
    with pytest.raises(RuntimeError, match="no CUDA"):
        speed.against_vllm(subject, Clock(60), figures)


def test_names_are_those_of_the_sections(subject: Subject) -> None:
    assert tuple(sections(subject)) == NAMES


def test_a_gpu_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        main(["--device", "cuda"])
    assert "finds no GPU" in capsys.readouterr().err
