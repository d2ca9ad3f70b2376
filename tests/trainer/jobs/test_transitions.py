"""Log lines and spans of what jobs do."""

from collections import Counter
from typing import Any

import pytest
from structlog.testing import capture_logs

from runtime.errors import InvalidRequest
from tests.trainer.jobs.fakes import World

pytestmark = pytest.mark.anyio


async def test_every_change_of_a_job_is_a_line(world: World) -> None:
    with capture_logs() as logs:
        job = await world.submit("name: shop", "steps: 2")
        await world.until(job.id, "succeeded")
        failed = await world.submit("name: none", "steps: 1", "good: no")
        await world.until(failed.id, "succeeded")
        await world.manager.stop(1.0)
    lines = [line for line in logs if line["event"] == "job"]
    assert [line["state"] for line in lines if line["job"] == job.id] == [
        "validating", "queued", "running", "evaluating", "publishing", "succeeded",
    ]  # fmt: skip
    assert [line["state"] for line in lines if line["job"] == failed.id][-2:] == ["evaluating", "succeeded"]


class TestSpans:
    """With the SDK's exporter in memory."""

    @pytest.fixture
    def spans(self) -> Any:
        memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
        return memory.InMemorySpanExporter()

    @pytest.fixture
    def tracing(self, spans: Any) -> Any:
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor

        from runtime.support.tracing import Tracing

        return Tracing(SimpleSpanProcessor(spans))

    async def test_a_job_is_a_tree_linked_to_its_request(self, world: World, spans: Any, tracing: Any) -> None:
        world.manager.trace_with(tracing.jobs)
        request = tracing.request("POST", {})
        job = await world.submit("name: shop", "steps: 3")
        request.end(method="POST", route="/admin/train", status=201, seconds=0.1, details={}, phases=())
        await world.until(job.id, "succeeded")
        await world.manager.stop(1.0)
        found = {span.name: span for span in spans.get_finished_spans()}
        below = Counter(
            (by_id[span.parent.span_id].name, span.name)
            for by_id in [{span.context.span_id: span for span in spans.get_finished_spans()}]
            for span in spans.get_finished_spans()
            if span.parent is not None
        )
        assert below == {
            ("job", "prepare"): 1, ("job", "queue"): 1, ("job", "train"): 1, ("job", "gate"): 1, ("job", "publish"): 1,
            ("train", "step"): 3, ("train", "eval"): 1,
        }  # fmt: skip
        root = found["job"]
        assert root.parent is None
        assert [link.context.span_id for link in root.links] == [found["POST /admin/train"].context.span_id]
        assert root.attributes["eft.job"] == job.id
        assert root.attributes["eft.state"] == "succeeded"
        assert found["step"].attributes["eft.step"] == 3
        assert tracing.jobs._jobs == {}

    async def test_a_refused_recipe_and_a_process_that_ends_leave_no_open_span(
        self, by_hand: World, spans: Any, tracing: Any
    ) -> None:
        by_hand.manager.trace_with(tracing.jobs)
        with pytest.raises(InvalidRequest):
            await by_hand.submit("steps: 3")
        job = await by_hand.submit("name: shop", "steps: 3")
        await by_hand.until(job.id, "running")
        await by_hand.settle()
        await by_hand.manager.stop(0.0)
        tracing.close()
        roots = {span.attributes["eft.job"]: span for span in spans.get_finished_spans() if span.name == "job"}
        assert job.id in roots
        assert tracing.jobs._jobs == {}
        assert tracing.jobs._origins == {}

    async def test_a_long_job_has_so_many_spans_and_no_more(
        self, world: World, spans: Any, tracing: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("runtime.support.tracing.MAX_STEP_SPANS", 2)
        world.manager.trace_with(tracing.jobs)
        job = await world.submit("name: shop", "steps: 5")
        await world.until(job.id, "succeeded")
        await world.manager.stop(1.0)
        found = Counter(span.name for span in spans.get_finished_spans())
        assert found["step"] == 2
        (root,) = [span for span in spans.get_finished_spans() if span.name == "job"]
        assert root.attributes["eft.reports_left_out"] == 4
