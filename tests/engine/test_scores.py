"""Cumulative log-probabilities against transformers: what `best_of` ranks by."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from runtime import LLM, SamplingParams
from runtime.messages import Submission


def test_scores_are_those_of_transformers(tiny_model: Path) -> None:
    llm = LLM(str(tiny_model))
    prompt = [5, 77, 131, 9, 42, 200, 17]
    params = SamplingParams(max_tokens=12, temperature=0.7, top_k=20, seed=3, ignore_eos=True)
    llm.engine.submit(Submission(request_id="a", prompt_ids=prompt, params=params, scored=True))
    tokens: list[int] = []
    score = 0.0
    while llm.engine.busy:
        for output in llm.engine.step():
            tokens += output.token_ids
            score = output.cumulative_logprob
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).sum()
    assert score == pytest.approx(float(expected), abs=1e-3)
