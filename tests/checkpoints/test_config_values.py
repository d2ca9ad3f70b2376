"""Every key of a config.json that a family reads, with every kind of wrong value: refused with its name, or served.

Which keys those are is noted while a family reads; so a key that is added is tested without a word here.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from runtime import LLM, SamplingParams
from runtime.model.config import ConfigError, ModelLoadError, integer, number, shown
from runtime.model.families import find_model
from runtime.model.families.registry import checked_spec
from tests.checkpoints.quantised_files import write_quantised
from tests.parity.fallbacks import make_fallback
from tests.parity.families import CASES, make_model
from tests.tiny import VOCAB_SIZE, make_tiny_llama, make_tiny_tokenizer

WRONG: list[Any] = [
    None, True, False, 0, 1, 3, -1, 7, 10**9, 2**31, 10**40, 0.5, -0.5, 1e300, 1e12, 1e-9, 1e-40,
    float("nan"), float("inf"), "", "2", "x", [], [1], [None], ["x"], {}, {"a": 1}, {"factor": "x"},
]  # fmt: skip
NAMES = [
    "llama", "ministral", "mixtral", "qwen2 moe, options", "phi3 longrope, short", "gemma2",
    "gemma3 with scaled rope", "gpt2, options", "gpt-neox", "granite", "stablelm, options", "falcon in sequence",
    "smollm3 with windows",
]  # fmt: skip
MORE = [
    "mistral with a window", "qwen2 with windows", "qwen3 with biases and windows", "qwen3 moe", "phi4 mini", "olmo2",
    "falcon 7b", "falcon 40b",
]  # fmt: skip
"""Those that read no key that none of the others reads."""
ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "linear": ROPE,
    "dynamic": ROPE,
    "yarn": {**ROPE, "attention_factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.5}
    | {"truncate": True},
    "llama3": {**ROPE, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {**ROPE, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
}


class Noting(dict[str, Any]):
    """A config that notes which of its keys are read, also after it was merged with defaults."""

    def __init__(self, values: dict[str, Any], read: set[str]) -> None:
        super().__init__(values)
        self.read = read

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __or__(self, other: Any) -> Any:
        return Noting({**self, **other}, self.read)

    def __ror__(self, other: Any) -> Any:
        return Noting({**other, **self}, self.read)


def keys_read(config: dict[str, Any]) -> set[str]:
    read: set[str] = set()
    find_model(config).spec(Noting(config, read))
    return read - {"architectures"}


def write_config(path: Path, config: dict[str, Any]) -> None:
    (path / "config.json").write_text(json.dumps(config))


def read_config(path: Path) -> dict[str, Any]:
    """As transformers wrote it."""
    config: dict[str, Any] = json.loads((path / "whole.json").read_text())
    return config


def outcome(path: Path, config: dict[str, Any]) -> str:
    """ "" where the model answers one request, or what refuses it. Whatever else is raised fails the test."""
    write_config(path, config)
    try:
        llm = LLM(str(path), num_blocks=8, max_prefill_chunk=3)
        prompt = [5, 6, 7, 8][: max(1, llm.engine.max_len - 1)]
        llm.generate([prompt], SamplingParams(max_tokens=1, temperature=0))
    except ModelLoadError as error:
        return str(error)
    return ""


def changes(config: dict[str, Any], keys: set[str]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    for key in sorted(keys):
        yield from ((key, value, config | {key: value}) for value in WRONG)


def check_all(path: Path, config: dict[str, Any], changed: Iterator[tuple[str, Any, dict[str, Any]]]) -> int:
    """Check every change; how many were refused. The model is loaded for each spec that differs from all before."""
    family, refused, seen = find_model(config), 0, {checked_spec(find_model(config), config)}
    for key, value, other in changed:
        try:
            spec = checked_spec(family, other)
        except ValueError as error:
            message = str(error)
        else:
            if spec in seen:
                continue
            seen.add(spec)
            message = outcome(path, other)
        if message:
            refused += 1
            said = key in message or "expected shape" in message or "the checkpoint" in message
            assert said, f"{key} = {value!r}: {message}"
            assert "\n" not in message
    return refused


@pytest.fixture(scope="module", params=[*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("model")
    kind, options = CASES[request.param]
    make_model(path, kind, {**options, "vocab_size": VOCAB_SIZE, "num_hidden_layers": 2} | two_layers(options))
    make_tiny_tokenizer(path)
    shutil.copy(path / "config.json", path / "whole.json")
    return path


def two_layers(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key][:2] for key in ("layer_types", "no_rope_layers") if key in options}


def test_every_key_with_every_wrong_value(model: Path) -> None:
    config = read_config(model)
    assert outcome(model, config) == ""
    keys = keys_read(config)
    assert {"vocab_size"} < keys
    assert check_all(model, config, changes(config, keys)) > 20


def test_a_missing_key_has_a_default_or_is_named(model: Path) -> None:
    config = read_config(model)
    keys = sorted(keys_read(config) & config.keys())
    changed = ((key, "absent", {name: value for name, value in config.items() if name != key}) for key in keys)
    assert check_all(model, config, changed) > 2


@pytest.mark.parametrize(
    ("kind", "spelling"), [*((kind, "rope_parameters") for kind in ROPES), ("yarn", "rope_scaling")]
)
def test_every_key_of_every_rope_scaling(tmp_path: Path, kind: str, spelling: str) -> None:
    make_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    rope = {"rope_type": kind, **ROPES[kind]}
    config[spelling] = rope
    assert outcome(tmp_path, config) == ""
    changed = [(key, value, config | {spelling: rope | {key: value}}) for key in rope for value in WRONG]
    for key in rope:
        less = {name: value for name, value in rope.items() if name != key}
        changed.append((key, "absent", config | {spelling: less}))
    assert check_all(tmp_path, config, iter(changed)) > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": None}, "vocab_size must be an integer above 0, got null"),
        ({"rms_norm_eps": "1e-6"}, r'rms_norm_eps must be a number from 0 to 1, got "1e-6"'),
        ({"architectures": 1}, "architectures must be a list, got 1"),
        ({"hidden_act": []}, r"hidden_act must be one of gelu, .*, got \[\]"),
        (
            {"num_key_value_heads": 3},
            r"num_attention_heads must be a multiple of num_key_value_heads .*, 3\), got 4",
        ),
        ({"head_dim": 15}, r"an even number above 0, got 15 \(head_dim 15,"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 4096, got 1000000000"),
        (
            {"max_position_embeddings": 2**31 - 1},
            r"max_position_embeddings \(n_positions\) is .* set model.max_model_len",
        ),
        ({"rope_parameters": [1]}, r"rope_parameters must be an object or null, got \[1\]"),
        ({"intermediate_size": 130}, r"mlp\.\w+_proj\.weight: expected shape .*intermediate_size 130"),
        ({"num_hidden_layers": 3}, r"lacks 9 weights, the first: model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"the checkpoint has 'model\.layers\.1\."),
    ],
    ids=str,
)
def test_messages_name_key_value_and_what_is_expected(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    make_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write_config(tmp_path, config | change)
    with pytest.raises(ModelLoadError, match=message):
        LLM(str(tmp_path), num_blocks=8)


@pytest.mark.parametrize("key", ["quantization_config", "eos_token_id", "bos_token_id", "pad_token_id", "dtype"])
def test_keys_that_others_read(tmp_path: Path, key: str) -> None:
    make_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for value in WRONG:
        message = outcome(tmp_path, config | {key: value})
        assert not message or key in message or "quantised with" in message, f"{value!r}: {message}"


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_values_of_quantization_config(tmp_path: Path, method: str) -> None:
    path = write_quantised(make_tiny_llama(tmp_path / "plain"), tmp_path / "m", method)
    config = json.loads((path / "config.json").read_text())
    own = config["quantization_config"]
    for key in (*own, "checkpoint_format", "version"):
        for value in WRONG:
            message = outcome(path, config | {"quantization_config": own | {key: value}})
            assert not message or key in message or "quantised with" in message, f"{key} = {value!r}: {message}"


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("end", ["qweight", "qzeros", "scales"])
def test_quantised_tensors_that_do_not_go_together(tmp_path: Path, method: str, end: str) -> None:
    path = write_quantised(make_tiny_llama(tmp_path / "plain"), tmp_path / "m", method)
    config = json.loads((path / "config.json").read_text())
    whole = load_file(path / "model.safetensors")
    name = f"model.layers.1.mlp.down_proj.{end}"
    for wrong in (whole[name][:1], whole[name][:, :1], whole[name].reshape(-1), whole[name].float(), None):
        tensors = {key: value for key, value in whole.items() if key != name}
        save_file(tensors if wrong is None else tensors | {name: wrong.contiguous()}, path / "model.safetensors")
        assert "model.layers.1.mlp.down_proj" in outcome(path, config) or end == "scales"


@pytest.mark.parametrize(
    "key",
    [
        "bos_token", "eos_token", "pad_token", "additional_special_tokens", "extra_special_tokens", "chat_template",
        "added_tokens_decoder", "add_bos_token", "image_token",
    ],
)  # fmt: skip
def test_values_of_tokenizer_config(tmp_path: Path, key: str) -> None:
    make_tiny_llama(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    path = tmp_path / "tokenizer_config.json"
    good = json.loads(path.read_text())
    for value in WRONG:
        path.write_text(json.dumps(good | {key: value}))
        message = outcome(tmp_path, config)
        assert not message or key in message, f"{value!r}: {message}"


@pytest.mark.parametrize("model_type", ["phi", "opt"])
def test_models_through_transformers(tmp_path: Path, model_type: str) -> None:
    """Whatever transformers makes of a value: refused, or served."""
    make_fallback(tmp_path / "whole", model_type)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    path = shutil.copytree(tmp_path / "whole", tmp_path / "m")
    keys = {
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "hidden_act",
        "max_position_embeddings",
        "architectures",
    }
    assert outcome(path, config) == ""
    outcomes = [outcome(path, other) for _, _, other in changes(config, keys & config.keys())]
    refused = [message for message in outcomes if message]
    assert len(refused) > len(outcomes) // 2, "most of these values are of a wrong type, or no size of a model"


def test_readers() -> None:
    assert integer({}, "a", 3) == integer({"a": 3}, "a") == 3
    assert number({"a": 3}, "a") == 3.0
    with pytest.raises(ValueError, match=r"^b\.a must be an integer above 0, and is missing$"):
        integer({}, "a", where="b.")
    with pytest.raises(ConfigError, match=r"^a must be a number from 0 to 1e\+12, got true$"):
        number({"a": True}, "a", at_least=0.0)
    assert shown(["x" * 100]) == '["' + "x" * 58 + "…"
