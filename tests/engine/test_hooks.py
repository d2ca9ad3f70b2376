"""The example of docs/hooks.md, installed for a moment, and hooks that raise."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import LLM, SamplingParams
from runtime.engine.hooks import Hook, Hooks
from runtime.errors import EngineFailure, InvalidRequest, RequestError
from runtime.messages import RequestTiming, Submission

DOCS = Path(__file__).parents[2] / "docs" / "hooks.md"
SHORT = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package of docs/hooks.md, as an installer would leave it."""
    code = re.search(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    (tmp_path / "house_rules.py").write_text(code[1], encoding="utf-8")
    info = tmp_path / "house_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: house-rules\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[eft.hooks]\nhouse-rules = house_rules:HouseRules\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("house_rules", None)


def test_the_example_rewrites_rejects_and_counts(plugin: None, tiny_model: Path) -> None:
    llm = LLM(str(tiny_model))
    done = llm.generate([[5, 6, 7]], SamplingParams(temperature=0.0, ignore_eos=True))[0]
    assert len(done.token_ids) == 100  # its limit where the client gives none
    with pytest.raises(InvalidRequest, match="house rules"):
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=200))
    [(_, hook)] = llm.engine._hooks._hooks
    assert hook.tokens == {"": 100}  # type: ignore[attr-defined]


class Faulty(Hook):
    """Raises where it is told to, for prompts that begin with 13."""

    def __init__(self, where: str) -> None:
        self.where = where

    def _act(self, where: str, submission: Submission) -> None:
        if where == self.where and submission.prompt_ids[0] == 13:
            raise ZeroDivisionError("13")

    def on_submit(self, submission: Submission) -> Submission:
        self._act("on_submit", submission)
        return submission

    def on_first_token(self, submission: Submission, timing: RequestTiming) -> None:
        self._act("on_first_token", submission)

    def on_finish(self, submission: Submission, timing: RequestTiming) -> None:
        assert timing.finish_reason is not None
        self._act("on_finish", submission)


@pytest.mark.parametrize(("where", "tokens"), [("on_submit", 0), ("on_first_token", 1), ("on_finish", 3)])
def test_what_a_hook_raises_is_that_requests_error_alone(tiny_model: Path, where: str, tokens: int) -> None:
    llm = LLM(str(tiny_model))
    expected = llm.generate([[7, 8]], SHORT)[0].token_ids
    llm.engine._hooks._hooks.append(("faulty", Faulty(where)))
    got: dict[str, list[int]] = {"good": [], "bad": []}
    errors = {}
    for name, prompt in (("bad", [13, 14]), ("good", [7, 8])):
        try:
            llm.engine.submit(llm.engine.prepare(Submission(request_id=name, prompt_ids=prompt, params=SHORT)))
        except EngineFailure as error:
            errors[name] = error.message
    while llm.engine.busy:
        for output in llm.engine.step():
            got[output.request_id] += output.token_ids
            if output.finish_reason == "error":
                errors[output.request_id] = output.error or ""
    assert errors == {"bad": "The server's hook 'faulty' failed on this request."}
    assert got == {"good": expected, "bad": got["bad"]}
    assert len(got["bad"]) == tokens
    llm.engine.scheduler.check_integrity()
    assert len(llm.engine.delivery) == 0


def test_a_hook_may_reject_with_any_status_and_may_not_change_the_id() -> None:
    class Teapot(RequestError):
        status = 418

    class Rejects(Hook):
        def on_submit(self, submission: Submission) -> Submission:
            raise Teapot("No coffee.")

    class Renames(Hook):
        def on_submit(self, submission: Submission) -> Submission:
            return Submission(request_id="other", prompt_ids=[1], params=SHORT)

    submission = Submission(request_id="a", prompt_ids=[1], params=SHORT)
    with pytest.raises(Teapot):
        Hooks([("rejects", Rejects())]).submit(submission)
    with pytest.raises(EngineFailure):
        Hooks([("renames", Renames())]).submit(submission)


def test_a_hook_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[eft.hooks]\nbroken = no_such_module:Hook\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"'broken' \(no_such_module:Hook\)"):
        Hooks.installed()
