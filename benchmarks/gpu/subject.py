"""The model under test: our engine on it, transformers' own copy of it, adapters for it, and prompts."""

import gc
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from msgspec.structs import replace
from torch import Tensor

from benchmarks.gpu.report import Wrong
from benchmarks.work import Prompts, greedy, load_transformers
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.peft import write_adapter
from runtime.engine.assembly import Assembled, assemble
from runtime.messages import Submission
from runtime.model.lora import LoraLayers, LoraPart, LoraShape
from settings.load import load as load_settings
from settings.schema import CacheSettings, Settings

LORA = LoraShape(rank=16, alpha=32)
SEED = 0
ROW_TOKENS = 320
"""Room in the cache for each row of the largest batch: prompt and answer."""
MAX_PROMPT = 2048
"""Tokens of the longest prompt that is measured."""
LONG_TOKENS = 10 * MAX_PROMPT
"""Room for the few rows of long prompts."""


class Row(NamedTuple):
    """A prompt, and the adapter that it is for."""

    prompt: list[int]
    adapter: str = ""
    sampling: Mapping[str, Any] = {}
    """Fields of `SamplingParams` in place of greedy ones."""


class Generated(NamedTuple):
    """What the engine made of rows that it was given at once."""

    tokens: list[list[int]]
    seconds: float
    ttft: list[float]
    """Seconds to the first token of each row."""

    @property
    def rate(self) -> float:
        """Generated tokens a second, over all rows."""
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the last row's first one; 0 where there are none."""
        after = sum(len(tokens) - 1 for tokens in self.tokens)
        return after / max(self.seconds - max(self.ttft), 1e-9)


class Subject:
    """One model on one device in one type."""

    def __init__(self, model: str, device: torch.device, *, prompts: Path | None = None, most: int = 256) -> None:
        """`prompts`: a file with a prompt a line, text or JSON with `prompt`; default: random words. `most`: largest
        batch that is measured."""
        self.model = model
        self.device = device
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.most = most
        self._checkpoint = open_checkpoint(model)
        self._random = Prompts(self._checkpoint.tokenizer.encode, SEED)
        self._texts = [] if prompts is None else _read_prompts(prompts)
        self.context = int(self._checkpoint.config.get("max_position_embeddings", 2048))
        """Longest sequence that the model takes."""

    @property
    def settings(self) -> Settings:
        """The server's own settings, but without cached prefixes, which would make repeats free, and with a cache that
        has room for all rows at once."""
        flags = {
            "model": self.model,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_running": self.most,
            "prefix_caching": False,
            "num_blocks": -(-max(self.most * ROW_TOKENS, LONG_TOKENS) // CacheSettings().block_size),
            "max_batched_tokens": 512 if self.device.type == "cpu" else 8192,
        }
        return load_settings(env={}, flags=flags).settings

    def prompts(self, count: int, length: int | None = None) -> list[list[int]]:
        """Prompts as token ids: random ones of exactly `length` tokens, or else those of the folder."""
        if length is not None or not self._texts:
            return [self._random.ids(length or 24) for _ in range(count)]
        encode = self._checkpoint.tokenizer.encode
        texts = [self._texts[index % len(self._texts)] for index in range(count)]
        return [encode(text)[: min(self.context, MAX_PROMPT) // 2] for text in texts]

    @contextmanager
    def engine(self, *, graphs: bool = True) -> Iterator[Assembled]:
        """Our engine, whose memory is free afterwards; without `graphs` no step is recorded."""
        if graphs:
            assembled = assemble(self.settings)
        else:
            with patch("runtime.workers.worker.unsuited", return_value="switched off"):
                assembled = assemble(self.settings)
        try:
            yield assembled
        finally:
            assembled.engine.close()
            # The section still has a name for it.
            assembled.engine.unload()
            vars(assembled.decoder).clear()
            free(self.device)

    @contextmanager
    def transformers(self, dtype: torch.dtype | None = None) -> Iterator[Any]:
        """transformers' model, in our type by default."""
        if Path(self.model).is_dir():
            from transformers import AutoModelForCausalLM

            model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype or self.dtype)
        else:
            model = load_transformers(self.model).to(dtype or self.dtype)
        try:
            yield model.to(self.device).eval()
        finally:
            model.to("meta")  # the section still has a name for it
            free(self.device)

    def make_adapter(self, assembled: Assembled, folder: Path, seed: int, *, spread: float = 0.05) -> LoraLayers:
        """Write a random adapter of all linears, and return its factors."""
        base, generator = assembled.lora_base, torch.Generator().manual_seed(seed)
        layers: LoraLayers = {}
        for layer in range(base.num_layers):
            for target in base.targets.values():
                a = torch.randn(LORA.rank, target.in_features, generator=generator) * spread
                b = torch.randn(target.out_features, LORA.rank, generator=generator) * spread
                part = LoraPart(target.part, a, b, LORA.scale(LORA.rank, LORA.alpha))
                layers.setdefault((layer, target.linear), []).append(part)
        write_adapter(folder, layers, LORA, base)
        return layers


def _read_prompts(path: Path) -> list[str]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [str(json.loads(line)["prompt"]) if line.startswith("{") else line for line in lines]


def free(device: torch.device) -> None:
    """Give memory of what is gone back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def generate(assembled: Assembled, rows: Sequence[Row], count: int) -> Generated:
    """`count` tokens for every row, all submitted at once. Raises `Wrong` where a row ends otherwise."""
    engine = assembled.engine
    submissions = [
        Submission(
            request_id=f"row-{index}",
            prompt_ids=row.prompt,
            params=replace(greedy(count), **row.sampling),
            adapter=row.adapter,
        )
        for index, row in enumerate(rows)
    ]
    tokens: dict[int, list[int]] = {submission.id: [] for submission in submissions}
    first: dict[int, float] = {}
    begin = time.perf_counter()
    engine.submit_all(submissions)
    while engine.busy:
        for output in engine.step():
            if output.finish_reason == "error":
                raise Wrong(f"a row of the batch failed: {output.error}")
            if output.token_ids:
                first.setdefault(output.id, time.perf_counter() - begin)
            tokens[output.id] += output.token_ids
    seconds = time.perf_counter() - begin
    if any(len(found) != count for found in tokens.values()):
        raise Wrong(f"asked for {count} tokens a row, got {sorted({len(found) for found in tokens.values()})}")
    return Generated([*tokens.values()], seconds, [*first.values()])


@torch.inference_mode()
def largest_gap(model: Any, prompt: list[int], tokens: list[int]) -> tuple[float, int]:
    """How far below transformers' best logit the tokens' own logits are, at most, each after the tokens before it; and
    the number of tokens that are the best."""
    ids = torch.tensor([prompt + tokens], device=model.device)
    logits: Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    own = logits.gather(1, ids[0, len(prompt) :].unsqueeze(1)).squeeze(1)
    gaps = logits.max(dim=1).values - own
    return float(gaps.max()), int((gaps == 0).sum())


@torch.no_grad()
def merge(model: Any, assembled: Assembled, layers: LoraLayers, sign: float = 1.0) -> None:
    """Add an adapter to transformers' weights in place; with sign -1, take it away again."""
    for (layer, linear), parts in layers.items():
        for part in parts:
            weight = model.get_submodule(assembled.lora_base.module(layer, linear, part.part)).weight
            weight += (sign * part.scale * (part.b @ part.a)).to(weight.device, weight.dtype)
