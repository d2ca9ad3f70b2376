"""lm-eval's `local-completions` on a local task, against transformers' log-likelihoods of the same continuations."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tests.adapter_files import make_adapter
from tests.clients.test_clients import PYTHON
from tests.end_to_end.process import ServerProcess

TASK = """
task: pond
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""
NUM_ITEMS, NUM_CHOICES = 50, 4
SUBJECTS = ("newt", "eft", "spider", "robot", "child", "lantern", "pond", "forest", "rain", "road")
QUESTIONS = (
    "What does the {0} do at night?",
    "Question: where does the {0} live?\nAnswer:",
    "How many legs has a {0}? Count: 1, 2, 3,",
    "Once upon a time there was a {0} — “größer” than 10 others.",
    "def {0}(a, b):\n    return",
)
CHOICES = (" It sleeps.", " in water, and on land", " a + b  # numbers", " 3.14159 \N{SNOWMAN}")
TOLERANCE = 1e-3

pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason="clients are not installed: .ci/clients"),
    pytest.mark.slow,
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    make_adapter(tiny_model, folder / "eft")
    return folder


@pytest.fixture(scope="module")
def server(tiny_model: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    state = tmp_path_factory.mktemp("state")
    with ServerProcess(str(tiny_model), state, resolve_folder=adapters, num_blocks=512) as server:
        yield server


def write_task(folder: Path) -> None:
    items = [(question, subject) for question in QUESTIONS for subject in SUBJECTS]
    rows = [
        {"question": question.format(subject), "choices": list(CHOICES), "label": at % NUM_CHOICES}
        for at, (question, subject) in enumerate(items)
    ]
    assert len(rows) == NUM_ITEMS
    data = folder / "pond.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "pond.yaml").write_text(TASK.format(rows=data), encoding="utf-8")


def evaluate(folder: Path, *, batch_size: int = 1, **model_args: object) -> list[dict[str, Any]]:
    """lm-eval's samples of the task in `folder`."""
    given = ",".join(f"{name}={value}" for name, value in model_args.items())
    command = [str(PYTHON), "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", given]
    command += ["--tasks", "pond", "--include_path", str(folder), "--log_samples", "--output_path", str(folder / "out")]
    command += ["--batch_size", str(batch_size)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home"), "NO_PROXY": "*"}
    done = subprocess.run(
        command, env=os.environ | offline, cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-8000:]
    (samples,) = (folder / "out").rglob("samples_pond_*.jsonl")
    return [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]


class Reference:
    """Log-likelihoods by transformers, of continuations that are tokenised together with their context."""

    def __init__(self, folder: Path, adapter: Path | None) -> None:
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if adapter is not None:
            self._model = PeftModel.from_pretrained(self._model, adapter)

    def __call__(self, context: str, continuation: str) -> tuple[float, bool]:
        """The log-likelihood, and true if each of its tokens is the likeliest."""
        start = len(self._tokenizer.encode(context, add_special_tokens=False).ids)
        ids = self._tokenizer.encode(context + continuation, add_special_tokens=False).ids
        with torch.inference_mode():
            scores = self._model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        following = torch.tensor(ids[1:])
        own = scores.gather(1, following[:, None])[start - 1 :, 0]
        greedy = bool((scores.argmax(-1) == following)[start - 1 :].all())
        return float(own.sum()), greedy


@pytest.mark.parametrize(
    ("model", "model_args"),
    [
        ("base", {"tokenizer_backend": "remote", "num_concurrent": 8}),
        ("base", {"tokenizer_backend": "huggingface", "batch_size": 4}),
        ("eft", {"tokenizer_backend": "remote", "num_concurrent": 8}),
    ],
)
def test_loglikelihoods_are_those_of_transformers(
    server: ServerProcess,
    tiny_model: Path,
    adapters: Path,
    tmp_path: Path,
    model: str,
    model_args: dict[str, Any],
) -> None:
    write_task(tmp_path)
    given = {"max_length": 512, **model_args}
    if given["tokenizer_backend"] == "huggingface":
        given["tokenizer"] = tiny_model
    name = tiny_model.name if model == "base" else model
    samples = evaluate(tmp_path, model=name, base_url=f"{server.url}/v1/completions", **given)
    assert len(samples) == NUM_ITEMS
    reference = Reference(tiny_model, None if model == "base" else adapters / model)
    for sample in samples:
        arguments = sample["arguments"].values()
        assert len(arguments) == len(sample["resps"]) == NUM_CHOICES
        for asked, ((found, greedy),) in zip(arguments, sample["resps"], strict=True):
            expected, likeliest = reference(asked["arg_0"], asked["arg_1"])
            assert float(found) == pytest.approx(expected, abs=TOLERANCE)
            assert greedy in (likeliest, str(likeliest))
