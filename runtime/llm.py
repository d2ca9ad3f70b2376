"""Offline batch generation: the engine without a server.

from runtime import LLM, SamplingParams
LLM("demo").generate(["The capital of France is"], SamplingParams(max_tokens=16))
"""

import os
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec
from msgspec import Struct
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from runtime.engine.assembly import assemble
from runtime.engine.engine import Engine
from runtime.errors import TooManyRequests
from runtime.messages import FinishReason, Output, SamplingParams, Submission, TokenLogprob
from settings.load import load as load_settings
from settings.schema import Settings


class Completion(Struct, frozen=True, kw_only=True):
    """One finished generation."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    stop_reason: str | int | None
    logprobs: list[TokenLogprob] = []
    """One for each of `token_ids`, where the parameters ask for `logprobs`."""
    prompt_logprobs: list[TokenLogprob] = []
    """One for each of `prompt_ids` except the first, where the parameters ask for `prompt_logprobs`."""
    cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""
    ttft: float
    """Seconds from submission to the first token."""
    e2e: float
    """Seconds from submission to the last token."""


class LLM:
    """A model in this process. Everything runs in the calling thread, as fast as it can."""

    def __init__(self, model: str | None = None, *, settings: Settings | None = None, **overrides: object) -> None:
        """`model` as in `eft serve MODEL`; `overrides` are settings by field name, such as
        `max_batched_tokens=256` or `kv_memory="2GiB"`. Environment and settings file count as usual.
        Raises `SettingsError` or `ModelLoadError`.
        """
        if settings is None:
            flags = dict(overrides) | ({} if model is None else {"model": model})
            settings = load_settings(flags=flags).settings
        elif overrides or model is not None:
            raise TypeError("give either `settings`, or a model and overrides")
        assembled = assemble(settings)
        self.settings = settings
        self.model_name = assembled.model_name
        self.engine: Engine = assembled.engine
        self.tokenizer = assembled.engine.tokenizer
        self.sampling_defaults = assembled.sampling_defaults

    def get_default_sampling_params(self) -> SamplingParams:
        """Sampling parameters that the model's authors recommend in its generation_config.json, or those of the
        settings instead. Change some with `msgspec.structs.replace`."""
        return self.sampling_defaults.params

    def close(self) -> None:
        """End the processes that compute, where there are any besides this one."""
        self.engine.close()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[Completion]:
        """Complete every prompt (text, or token ids), in order. One `params` for all, or one each; default: those of
        `get_default_sampling_params`.

        `progress` shows a bar; by default on a terminal. Raises `InvalidRequest` before anything runs.
        """
        each_prompt: Sequence[str | Sequence[int]] = [prompts] if isinstance(prompts, str) else prompts
        ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in each_prompt]
        if params is None or isinstance(params, SamplingParams):
            each = [self.get_default_sampling_params() if params is None else params] * len(ids)
        else:
            each = list(params)
        if len(each) != len(ids):
            raise ValueError(f"{len(ids)} prompts but {len(each)} sampling params")
        return self._run(ids, each, progress=progress)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
        **template_kwargs: Any,
    ) -> list[Completion]:
        """Answer one conversation, or several, given as OpenAI messages through the model's chat template."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if single else list(messages)
        prompts = [
            self.tokenizer.encode_chat([dict(m) for m in conversation], template_kwargs=template_kwargs or None)
            for conversation in conversations
        ]
        return self.generate(prompts, params, progress=progress)

    def _run(
        self, prompts: list[list[int]], params: list[SamplingParams], *, progress: bool | None
    ) -> list[Completion]:
        run = uuid.uuid4().hex[:8]
        submissions = [
            Submission(request_id=f"{run}-{index}", prompt_ids=ids, params=one)
            for index, (ids, one) in enumerate(zip(prompts, params, strict=True))
        ]
        for submission in submissions:
            submission.params.verify(
                vocab_size=self.engine.vocab_size, eos_ids=self.engine.eos_ids, limits=self.settings.limits
            )
            self.engine.check(submission)
        submissions = [self.engine.prepare(submission) for submission in submissions]
        if self.engine.lost:
            self.engine.recover()
        start = time.monotonic()
        queue = deque(submissions)
        gathered: dict[int, _Gathered] = {}
        with progress_bar("Generating", total=len(submissions), show=_wants(progress)) as bar:
            try:
                self._feed(queue, start)
                while self.engine.busy:
                    for output in self.engine.step():
                        gathered.setdefault(output.id, _Gathered()).add(output)
                        if output.finish_reason is not None:
                            bar.advance(output.generated_tokens)
                    self._feed(queue, start)
            finally:
                for submission in submissions:  # Ctrl-C: leave nothing behind
                    self.engine.abort(submission.id)
        return [gathered[s.id].completion(s.prompt_ids, start) for s in submissions]

    def _feed(self, queue: deque[Submission], start: float) -> None:
        """Keep the queue of the scheduler filled as far as it takes prompts."""
        while queue:
            try:
                self.engine.scheduler.check_room(len(queue[0].prompt_ids))
            except TooManyRequests:
                return
            self.engine.submit_all([msgspec.structs.replace(queue.popleft(), arrival=start)])


class _Gathered:
    """The outputs of one request so far."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self.first = 0.0
        self.last: Output | None = None
        self.finished = 0.0

    def add(self, output: Output) -> None:
        self.first = self.first or time.monotonic()
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.last = output
        self.finished = time.monotonic()

    def completion(self, prompt_ids: list[int], start: float) -> Completion:
        last = self.last
        if last is None or last.finish_reason is None or last.finish_reason == "error":
            raise RuntimeError((last and last.error) or "The request ended without an output.")
        return Completion(
            prompt_ids=prompt_ids,
            token_ids=self.token_ids,
            text=self.text,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            cached_tokens=last.cached_tokens,
            ttft=self.first - start,
            e2e=self.finished - start,
        )


def _wants(progress: bool | None) -> bool:
    return sys.stderr.isatty() and "EFT_NO_PROGRESS" not in os.environ if progress is None else progress


# -- progress --------------------------------------------------------------------------------------


class ProgressBar:
    """Counts finished requests and shows the tokens that they generated: on a terminal, and nowhere else."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress = progress
        self._task = task
        self._tokens = 0

    def advance(self, tokens: int) -> None:
        """Count one more finished request, with `tokens` generated tokens."""
        self._tokens += tokens
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=1, tokens=self._tokens)


@contextmanager
def progress_bar(label: str, *, total: int, show: bool) -> Iterator[ProgressBar]:
    """Context with a bar on stderr for `total` requests."""
    if not show:
        yield ProgressBar(None, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield ProgressBar(progress, progress.add_task(label, total=total, tokens=0))
