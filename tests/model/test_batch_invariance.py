"""A token's hidden state is the same bits whatever its batch, the chunks of its prompt and the number of threads."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.batch import PagedRows
from kernels.cpu import CpuOps
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.model_loading import load_decoder
from runtime.engine.assembly import assemble
from runtime.model.attention import KVCache, PagedAttention
from runtime.model.config import ModelLoadError
from runtime.model.decoder import Decoder
from settings.schema import CacheSettings, ModelSettings, Settings
from tests.parity.families import CASES, make_model
from tests.tiny import VOCAB_SIZE, make_tiny_llama, make_tiny_tokenizer

pytestmark = pytest.mark.skipif(CpuOps.unavailable() is not None, reason="promised by the C++ kernels")

BLOCK, LENGTH = 16, 530
"""More tokens than attention sums up at once (512)."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With heads as SmolLM2's, for which decoding has a kernel of its own."""
    path = tmp_path_factory.mktemp("deterministic") / "model"
    return make_tiny_llama(
        path, head_dim=64, num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=1024
    )


@pytest.fixture(scope="module", params=["none", "int8", "int4"])
def decoder(model: Path, request: pytest.FixtureRequest) -> Decoder:
    settings = ModelSettings(model=str(model), quantization=request.param, kernels="cpu")
    return load_decoder(open_checkpoint(str(model)), settings)


def hidden_states(
    decoder: Decoder, ids: torch.Tensor, chunks: list[int], beside: int, dtype: torch.dtype
) -> torch.Tensor:
    """Of one sequence that is computed in `chunks`, with so many others of one token before it in every batch."""
    spec, blocks = decoder.spec, -(-LENGTH // BLOCK)
    cache = KVCache(
        spec.kv_shapes,
        num_blocks=blocks + beside,
        block_size=BLOCK,
        dtype=dtype,
        device=decoder.device,
    )
    tables = torch.zeros(beside + 1, blocks, dtype=torch.int64)
    tables[:beside, 0] = torch.arange(blocks, blocks + beside)
    tables[beside] = torch.randperm(blocks, generator=torch.Generator().manual_seed(1))
    found, context = [], 0
    for count in chunks:
        places = torch.arange(context, context + count)
        own = tables[beside, places // BLOCK] * BLOCK + places % BLOCK
        slots = torch.cat((tables[:beside, 0] * BLOCK, own))
        rows = PagedRows(slots, [1] * beside + [count], [0] * beside + [context], tables, BLOCK)
        tokens = torch.cat((torch.arange(3, 3 + beside), ids[context : context + count]))
        positions = torch.cat((torch.zeros(beside, dtype=torch.int64), places))
        hidden = decoder.forward(tokens, positions, PagedAttention(decoder.ops, cache, rows, spec))
        found.append(decoder.logits(hidden[beside:]))
        context += count
    return torch.cat(found)


@settings(max_examples=6, deadline=None)
@given(
    cuts=st.lists(st.integers(1, LENGTH - 1), max_size=4, unique=True),
    ones=st.integers(0, 12),
    beside=st.integers(0, 40),
    threads=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
)
def test_logits_do_not_know_their_batch(
    decoder: Decoder, cuts: list[int], ones: int, beside: int, threads: int, dtype: torch.dtype
) -> None:
    ids = torch.randint(3, 500, (LENGTH,), generator=torch.Generator().manual_seed(2))
    marks = sorted({0, *cuts, *range(LENGTH - ones, LENGTH + 1)})
    chunks = [b - a for a, b in pairwise(marks)]
    before = torch.get_num_threads()
    with torch.inference_mode():
        whole = hidden_states(decoder, ids, [LENGTH], 0, dtype)
        try:
            torch.set_num_threads(threads)
            assert torch.equal(hidden_states(decoder, ids, chunks, beside, dtype), whole)
        finally:
            torch.set_num_threads(before)


def start(model: Path, **changes: object) -> None:
    fields = {"model": str(model), "deterministic": True, **changes}
    assemble(Settings(model=ModelSettings(**fields), cache=CacheSettings(num_blocks=8)))  # type: ignore[arg-type]


def test_the_promise_is_made_or_the_model_refused(model: Path, tmp_path: Path) -> None:
    start(model)
    with pytest.raises(ModelLoadError, match=r"deterministic cannot be promised .* reference kernels"):
        start(model, kernels="reference")


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "stablelm, options", "phi3 with a window", "qwen3", "falcon 40b"])
def test_other_families_keep_the_promise(family: str, tmp_path: Path) -> None:
    """Soft caps and windows in attention, other norms and activations, rotation of some dimensions."""
    kind, options = CASES[family]
    make_model(tmp_path, kind, {**options, "vocab_size": VOCAB_SIZE})
    make_tiny_tokenizer(tmp_path)
    settings = ModelSettings(model=str(tmp_path), kernels="cpu", deterministic=True)
    decoder = load_decoder(open_checkpoint(str(tmp_path)), settings)
    assert decoder.batch_variance is None
    ids = torch.randint(3, 120, (150,), generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    with torch.inference_mode():
        whole = hidden_states(decoder, ids, [150], 0, torch.float32)
        try:
            torch.set_num_threads(2)
            assert torch.equal(hidden_states(decoder, ids, [70, 1, 1, 9, 64, 1, 1, 3], 5, torch.float32), whole)
        finally:
            torch.set_num_threads(before)


def test_models_whose_logits_may_vary_say_why(tmp_path: Path) -> None:
    """Whatever the kernels promise: experts see the batch, and other types are computed with by torch."""
    kind, options = CASES["mixtral"]
    make_model(tmp_path, kind, {**options, "vocab_size": VOCAB_SIZE})
    make_tiny_tokenizer(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    reasons = [
        load_decoder(checkpoint, ModelSettings(model=str(tmp_path), kernels=kernels, dtype=dtype)).batch_variance
        for kernels, dtype in (("cpu", "float32"), ("cpu", "bfloat16"), ("reference", "float32"))
    ]
    for reason, expected in zip(reasons, ("mixtures of experts", "on the CPU only", "reference kernels"), strict=True):
        assert reason is not None
        assert expected in reason
