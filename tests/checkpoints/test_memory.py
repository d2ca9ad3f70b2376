"""Loading a checkpoint takes little more memory than its weights, whatever is done to them meanwhile.

In a process of its own: the most memory that a process ever had is known of it as a whole.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints.gguf.families import write_family
from tests.tiny import make_tiny_llama

MEASURE = """
import gc, json, sys
from pathlib import Path
from runtime.checkpoints.model_loading import load_model
from runtime.checkpoints import open_checkpoint
from runtime.checkpoints.gguf import checkpoint as gguf
from runtime.support.memory import give_back_memory, return_freed_memory
from settings.schema import ModelSettings

def now(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024

def measure(path, quantization):
    return_freed_memory()
    checkpoint = open_checkpoint(path)
    before = now("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the most memory starts from here
    model = load_model(checkpoint, ModelSettings(model=path, quantization=quantization))
    parameters = model.parameters().values()
    peak = now("VmHWM:") - before
    print(json.dumps([peak, sum(p.data.nbytes if p.quantised is None else p.quantised.num_bytes for p in parameters)]))

measure(sys.argv[1], "none")  # the first one brings what libraries take once
for path, quantization in zip(sys.argv[2::2], sys.argv[3::2]):
    gc.collect()
    give_back_memory()
    measure(path, quantization)
"""


def write_shards(source: Path, path: Path, count: int) -> Path:
    """The same random weights in `count` files with an index."""
    from safetensors.torch import load_file

    path.mkdir()
    tensors = load_file(source / "model.safetensors")
    names = list(tensors)
    files = {f"model-{part}.safetensors": names[part::count] for part in range(count)}
    for file, some in files.items():
        save_file({name: tensors[name] for name in some}, path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, some in files.items() for name in some}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file in source.glob("*.json"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


def make_large(small: Path, path: Path) -> Path:
    """About 170 MB, and nothing that takes time: numbers that are not random."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path.mkdir()
    size = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 7, "num_attention_heads": 12}
    config = json.loads((small / "config.json").read_text()) | size | {"head_dim": 64}
    with torch.device("meta"):
        shapes = {name: one.shape for name, one in LlamaForCausalLM(LlamaConfig(**config)).state_dict().items()}
    tensors = {name: torch.arange(shape.numel(), dtype=torch.float32).view(shape) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    for file in small.glob("tokenizer*"):
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured as Linux counts it")
def test_the_most_memory_is_little_more_than_the_weights(tmp_path: Path) -> None:
    small = make_tiny_llama(tmp_path / "small")
    large = make_large(small, tmp_path / "large")
    shards = write_shards(large, tmp_path / "shards", 4)
    gguf = write_family(tmp_path / "large.gguf", large)
    asked = [(large, "none"), (shards, "none"), (gguf, "none"), (large, "int8")]
    arguments = [str(small), *(word for path, quantization in asked for word in (str(path), quantization))]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    _, *found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(asked)
    for (path, quantization), (peak, weights) in zip(asked, found, strict=True):
        if quantization == "none":
            assert 150e6 < weights < 250e6
            assert peak < 1.2 * weights, path
        else:  # and the largest matrix in floats, of 4096 times 768, and as the file and the kernels have it
            assert weights < 50e6
            assert peak < 1.2 * weights + 3 * 4 * 4096 * 768, f"{peak / weights:.2f}"
