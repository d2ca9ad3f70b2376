"""From a step's new tokens to what each client gets: text, ends, and what is counted about them."""

import time
from collections.abc import Callable

from runtime.detokenizer import Detokenizer
from runtime.hooks import Hooks
from runtime.messages import FinishReason, Output
from runtime.metrics import Metrics
from runtime.scheduler import Committed, Request, Scheduler
from runtime.tokenizer import Tokenizer

Ending = tuple[FinishReason, str | int | None]
"""How a sequence ends, and the stop string or id that did it."""


class Delivery:
    """Keeps the text of every request from its submission to its end."""

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        metrics: Metrics,
        hooks: Hooks,
        *,
        on_end: Callable[[Request], None],
    ) -> None:
        """`on_end` is called once for every request that has begun."""
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._hooks = hooks
        self._on_end = on_end
        self._texts: dict[str, Detokenizer] = {}

    def __len__(self) -> int:
        """Requests that have begun and not ended."""
        return len(self._texts)

    def begin(self, request: Request) -> None:
        self._texts[request.id] = self._detokenizer(request)

    def text_of(self, request: Request, tokens: list[int]) -> str:
        """What a whole output says. It is not this request's only one."""
        text = self._detokenizer(request)
        return "".join(map(text.add, tokens)) + text.flush()

    def deliver(self, item: Committed) -> Output:
        """New tokens as text; ends the request if one of them ends it."""
        request = item.request
        if not item.tokens:
            return self._output(request, error=self.forget(request) or item.error)
        tokens, text, ending = self._read(request, item.tokens)
        error = self.note_tokens(request, len(tokens))
        if error is not None:
            self.finish(request, "error")
        elif ending is not None:
            error = self.finish(request, *ending)
        return self._output(request, tokens, text, error)

    def finish(self, request: Request, reason: FinishReason, stop_reason: str | int | None = None) -> str | None:
        """End a request wherever it is. Returns what a hook has to complain of."""
        self._scheduler.finish(request, reason, stop_reason=stop_reason)
        return self.forget(request)

    def note_tokens(self, request: Request, count: int) -> str | None:
        """New tokens are there. Returns what a hook has to complain of."""
        timing = request.timing
        first = timing.first_token is None
        self._metrics.on_tokens(timing, count, now := time.monotonic())
        timing.first_token = timing.first_token or now
        timing.last_token = now
        return self._hooks.first_token(request.submission, timing) if first else None

    def forget(self, request: Request) -> str | None:
        """A request has ended. Returns what a hook has to complain of."""
        self._texts.pop(request.id, None)
        error = self._hooks.finish(request.submission, request.timing)
        if error is not None:
            request.fail()
        self._metrics.on_finish(request.timing)
        self._on_end(request)
        return error

    def _detokenizer(self, request: Request) -> Detokenizer:
        params = request.params
        return Detokenizer(
            self._tokenizer,
            request.submission.prompt_ids,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
        )

    def _read(self, request: Request, tokens: list[int]) -> tuple[list[int], str, Ending | None]:
        """The tokens up to the one that ends the sequence, what they show, and that end. What was sampled
        beyond it is taken back."""
        text, params, shown = self._texts[request.id], request.params, ""
        for count, token in enumerate(tokens, 1):
            beyond = len(tokens) - count
            may_stop = request.num_generated - beyond >= params.min_tokens
            ending: Ending | None = None
            if may_stop and token in request.stop_ids:
                ending = "stop", token if token in params.stop_token_ids else None
                shown += text.flush()
            else:
                shown += text.add(token, may_stop=may_stop)
                if text.stopped_by is not None:
                    ending = "stop", text.stopped_by
                elif len(request.tokens) - beyond >= request.max_len:
                    ending = "length", None
                    shown += text.flush()
            if ending is not None:
                request.cut(beyond)
                return tokens[:count], shown, ending
        return tokens, shown, None

    def _output(
        self, request: Request, token_ids: list[int] | None = None, text: str = "", error: str | None = None
    ) -> Output:
        return Output(
            request_id=request.id,
            text=text,
            token_ids=token_ids or [],
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            prompt_tokens=request.prompt_len,
            cached_tokens=request.timing.cached_tokens,
            generated_tokens=request.num_generated,
            cumulative_logprob=request.cumulative_logprob,
            error=error,
        )
