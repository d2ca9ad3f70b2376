"""An engine whose steps are recorded, and launched before the last tokens are read, gives what one without gives."""

from pathlib import Path

import pytest

from runtime import LLM
from runtime.engine.engine import Engine
from runtime.model.attention import KVCache
from runtime.model.decoder import Decoder
from runtime.workers.executor import InProcessExecutor
from tests.adapter_files import make_adapter
from tests.engine.test_asynchronous import KEY, play, traffic, whole
from tests.tiny import make_tiny_llama
from tests.workers.pair import CountingTransfers, TensorOps
from tests.workers.tape import TapeRecorder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of two heads."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    folder = tmp_path_factory.mktemp("model")
    return make_tiny_llama(folder, max_position_embeddings=128, num_key_value_heads=1, **sizes)


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(model, tmp_path_factory.mktemp("adapter") / "one", seed=1, target_modules=["v_proj"])


def make(model: Path, mode: str, **overrides: object) -> LLM:
    """Both engines compute with the same kernels."""
    llm = LLM(str(model), asynchronous=mode, kernels="reference", **overrides)
    executor = llm.engine._executor
    assert isinstance(executor, InProcessExecutor)
    decoder = executor._worker._decoder
    assert isinstance(decoder, Decoder)
    decoder.ops = executor._worker._sampler._ops = TensorOps()
    return llm


def record(engine: Engine) -> TapeRecorder:
    executor, recorder = engine._executor, TapeRecorder()
    assert isinstance(executor, InProcessExecutor)
    executor._worker._cache = _with_spare(executor)
    executor._worker.record_steps(CountingTransfers(), recorder)
    return recorder


def load(llm: LLM, adapter: Path) -> None:
    llm.engine.prepare_adapter(KEY, str(adapter))
    llm.engine.load_adapter(KEY)


def _with_spare(executor: InProcessExecutor) -> KVCache:
    old, decoder = executor._worker._cache, executor._worker._decoder
    return KVCache(
        decoder.kv_shapes,
        num_blocks=old.num_blocks,
        block_size=old.block_size,
        dtype=old.layers[0][0].dtype,
        device=decoder.device,
        spare=True,
    )


@pytest.mark.parametrize("overrides", [{}, {"num_blocks": 9, "max_running": 4, "max_preemptions": 2}])
def test_every_client_gets_what_it_would_get(model: Path, adapter: Path, overrides: dict[str, object]) -> None:
    arrivals, leaving = traffic(3, {}, count=10)
    plain = make(model, "off", **overrides)
    load(plain, adapter)
    expected = play(plain, arrivals, leaving)
    llm = make(model, "on", **overrides)
    recorder = record(llm.engine)
    load(llm, adapter)
    got = play(llm, arrivals, leaving)
    for name, outputs in expected.items():
        theirs, mine = whole(outputs), whole(got[name])
        if theirs[2] is not None and mine[2] is not None:
            assert mine == theirs
        else:  # it left in the middle, a step earlier or later
            length = min(len(mine[0]), len(theirs[0]))
            assert mine[0][:length] == theirs[0][:length]
    assert recorder.replays > 20
    assert llm.engine.recorded is not None
    assert any("adapters" in name for name in llm.engine.recorded.graphs.recorded)
