"""`rank_pattern` and `alpha_pattern`: the same values as in PEFT, in bounded time whatever the keys are."""

import re
import time
from functools import partial

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from runtime.checkpoints.peft import AdapterInvalid
from runtime.checkpoints.peft.config import parse_config
from runtime.model.lora import LoraShape
from runtime.support.module_patterns import (
    MAX_EXPRESSIONS,
    MAX_KEYS,
    TOTAL_SECONDS,
    ModulePattern,
    PatternInvalid,
    ends,
)

MODULES = [f"model.layers.{layer}.{name}" for layer in range(12) for name in ("self_attn.q_proj", "mlp.up_proj")]
KEYS = st.one_of(
    st.sampled_from([
        "q_proj", "self_attn.q_proj", "model.layers.1.self_attn.q_proj", "layers.11.mlp.up_proj", "proj", "up_proj",
        r"model\.layers\.(0|1)\.self_attn\.q_proj", r".*\.layers\.[0-3]\..*_proj", "(?i:Q_PROJ)", "^model.*up_proj",
        "q_proj|up_proj", r"layers\.\d+\.mlp\.up_proj", "", "mlp", "x", r"[^.]*_proj",
    ]),
    st.text(alphabet="qp_roj.|()*+?[]^$\\dlayers01", max_size=12),
)  # fmt: skip


def compiles(key: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({key})$")
    except re.error:
        return False
    return True


@given(keys=st.lists(KEYS, max_size=5, unique=True), module=st.sampled_from(MODULES))
@example(keys=["(?i)q_proj"], module=MODULES[0])
@example(keys=[")(", "q_proj"], module=MODULES[0])
def test_the_value_is_that_of_peft(keys: list[str], module: str) -> None:
    """Or the key is refused, with its name."""
    values = {key: index for index, key in enumerate(keys)}
    found, refusal = -1, None
    try:
        found = ModulePattern("rank_pattern", values).get(module, -1)
    except PatternInvalid as error:
        refusal = str(error)
    if refusal is not None:
        assert any(repr(key[:100]) in refusal for key in keys)
    else:
        assert all(map(compiles, keys))
        assert found == values.get(get_pattern_key(keys, module), -1)


def test_settled_patterns_mean_the_same_in_any_order() -> None:
    """PEFT sorts the keys when it saves, and takes the first that matches when it loads."""
    plain = LoraShape(8, 16.0, rank_pattern={"q_proj": 2, "up_proj": 4}, alpha_pattern={"(2|3).*": 3.0})
    assert plain.settled(MODULES) == plain
    mixed = LoraShape(8, 16.0, rank_pattern={"q_proj": 2, r"layers\.1\..*": 6}, alpha_pattern={"q_proj": 3.0})
    settled = mixed.settled(MODULES)
    assert settled.alpha_pattern == mixed.alpha_pattern
    assert len(settled.rank_pattern) == 13
    again = LoraShape(8, 16.0, rank_pattern=dict(sorted(settled.rank_pattern.items())), alpha_pattern={"q_proj": 3.0})
    assert [again.at(module) for module in MODULES] == [mixed.at(module) for module in MODULES]
    assert mixed.at("model.layers.1.self_attn.q_proj") == (2, 1.5)


def test_dots_in_names_are_dots() -> None:
    """In PEFT a dot is any character; no model has modules that differ in nothing else."""
    assert ModulePattern("rank_pattern", {"self.attn": 1}).get("layers.0.self_attn", 2) == 2
    assert list(ends("a.b.c")) == ["c", "b.c", "a.b.c"]


@pytest.mark.parametrize(
    "key", ["(?i)q_proj", "(?x) q", "[", "(", ")", "a{2,1}", "(?P<a>", "\\", "(?P=b)", "*", "q(?i)"]
)
def test_what_is_no_expression_there_is_refused_by_name(key: str) -> None:
    with pytest.raises(PatternInvalid, match=r"no regular expression") as caught:
        ModulePattern("alpha_pattern", {"q_proj": 1, key: 2})
    assert repr(key) in str(caught.value)
    assert "alpha_pattern" in str(caught.value)


@pytest.mark.parametrize("key", ["(a+)+$", "(.*a){20}", "a*a*a*a*a", "x|" * 101])
def test_what_could_take_for_ever_is_refused_by_name(key: str) -> None:
    with pytest.raises(PatternInvalid, match="too complex"):
        ModulePattern("rank_pattern", {key: 4})


def test_a_key_for_every_module_takes_no_time() -> None:
    """As tools that choose ranks write it: 126 layers of 7 linears."""
    modules = [f"model.layers.{layer}.block.linear_{n}" for layer in range(126) for n in range(7)]
    began = time.monotonic()
    pattern = ModulePattern("rank_pattern", {module: 4 + at for at, module in enumerate(modules)})
    assert [pattern.get(module, 0) for module in modules] == list(range(4, 4 + len(modules)))
    assert time.monotonic() - began < 1.0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({f"n{n}": 4 for n in range(MAX_KEYS + 1)}, f"at most {MAX_KEYS} keys, got {MAX_KEYS + 1}"),
        ({f"n{n}|m": 4 for n in range(MAX_EXPRESSIONS + 1)}, f"at most {MAX_EXPRESSIONS} keys that are regular"),
    ],
    ids=["names", "expressions"],
)
def test_counts_are_bounded(values: dict[str, int], says: str) -> None:
    with pytest.raises(PatternInvalid, match=says):
        ModulePattern("rank_pattern", values)


def test_polynomial_expressions_end_in_time() -> None:
    """Within the limits of each key they still take cubic time, times keys, times modules."""
    values = {f".*.*.*{n}x|zzzzz": 4 for n in range(MAX_EXPRESSIONS)}
    pattern = ModulePattern("rank_pattern", values)
    modules = ["model." * 60 + f"layers.{layer}.self_attn.q_proj" for layer in range(1000)]
    began = time.monotonic()
    with pytest.raises(PatternInvalid, match=r"rank_pattern has the key .*takes too long"):
        list(map(partial(pattern.get, default=0), modules))
    assert time.monotonic() - began < 5 * TOTAL_SECONDS


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (b'{"rank_pattern": {"(?i)q_proj": 8}}', r"rank_pattern has the key '\(\?i\)q_proj'"),
        (b'{"rank_pattern": {"q_proj": 0}}', r"rank_pattern\[q_proj\] must be at least 1, got 0"),
        (b'{"alpha_pattern": {"q_proj": -1}}', r"alpha_pattern\[q_proj\] must be above 0 .*, got -1"),
        (b'{"alpha_pattern": {"q_proj": 1e300}}', r"alpha_pattern\[q_proj\] must be above 0 and at most 1e\+06"),
        (b'{"lora_alpha": NaN}', "cannot be read"),
        (b'{"lora_alpha": "16"}', r"got `str` - at `\$\.lora_alpha`"),
        (b'{"rank_pattern": {"q_proj": "8"}}', r"got `str` - at `\$\.rank_pattern\[\.\.\.\]`"),
        (b'{"rank_pattern": [1]}', r"got `array` - at `\$\.rank_pattern`"),
        (b'{"r": true}', r"got `bool` - at `\$\.r`"),
        (b'{"r": null}', r"got `null` - at `\$\.r`"),
        (b'{"use_rslora": "yes"}', r"\$\.use_rslora"),
        (b'{"target_modules": [1]}', r"\$\.target_modules\[0\]"),
        (b'{"bias": "' + b"x" * 10**5 + b'"}', "bias is 'xxx"),
        (b'{"peft_type": "' + b"x" * 10**5 + b'"}', "peft_type is 'xxx"),
        (b'{"' + b"x" * 10**5 + b'": 1}', "is set, and is not supported"),
        (b'{"target_modules": [' + b'"q",' * 9000 + b'"q"]}', "target_modules must have at most"),
    ],
    ids=range(16),
)
def test_messages_name_the_key_and_stay_short(config: bytes, says: str) -> None:
    with pytest.raises(AdapterInvalid, match=says) as caught:
        parse_config(config)
    assert len(caught.value.message) < 600


def test_null_is_as_good_as_absent_for_patterns() -> None:
    config = parse_config(b'{"rank_pattern": null, "alpha_pattern": null, "target_modules": null}')
    assert (config.rank_pattern, config.alpha_pattern, config.target_modules) == ({}, {}, None)
