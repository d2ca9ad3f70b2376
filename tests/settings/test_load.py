"""Precedence, origins and errors of `settings.load`."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from settings import fields
from settings.load import SettingsError, load
from settings.schema import Settings


def toml(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "eft.toml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(**sources: object) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        load(**{"env": {}, **sources})  # type: ignore[arg-type]
    return caught.value.problems


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_nothing_given_is_the_schema_and_every_origin_is_default() -> None:
    loaded = load(env={})
    assert loaded.settings == Settings()
    assert set(loaded.origins.values()) == {"default"}
    assert len(loaded.origins) == len(fields.fields())
    assert loaded.file is None


PORTS = st.one_of(st.none(), st.integers(min_value=0, max_value=65535))


@given(flag=PORTS, env=PORTS, file=PORTS)
def test_flag_beats_environment_beats_file_beats_default(
    tmp_path_factory: pytest.TempPathFactory, flag: int | None, env: int | None, file: int | None
) -> None:
    path = toml(tmp_path_factory.mktemp("file"), "" if file is None else f"[server]\nport = {file}\n")
    loaded = load(
        flags={"port": None if flag is None else str(flag)},
        env={} if env is None else {"EFT_SERVER_PORT": str(env)},
        file=path,
    )
    layers = [
        (flag, "flag --port"),
        (env, "environment EFT_SERVER_PORT"),
        (file, f"file {path}"),
        (8000, "default"),
    ]
    value, origin = next(layer for layer in layers if layer[0] is not None)
    assert loaded.settings.server.port == value
    assert loaded.origins["server.port"] == origin


def test_each_source_may_give_other_fields_of_one_section(tmp_path: Path) -> None:
    loaded = load(
        flags={"max_running": 3},
        env={"EFT_SCHEDULER_MAX_WAITING": "5"},
        file=toml(tmp_path, "[scheduler]\nmax_batched_tokens = '2K'\n"),
    )
    scheduler = loaded.settings.scheduler
    assert (scheduler.max_running, scheduler.max_waiting, scheduler.max_batched_tokens) == (3, 5, 2048)


def test_the_file_is_found_by_flag_then_variable_then_working_directory(tmp_path: Path) -> None:
    toml(tmp_path, "[server]\nport = 1\n")
    other = tmp_path / "other.toml"
    other.write_text("[server]\nport = 2\n")
    third = tmp_path / "third.toml"
    third.write_text("[server]\nport = 3\n")
    assert load(env={}).settings.server.port == 1
    assert load(env={"EFT_CONFIG": str(other)}).settings.server.port == 2
    assert load(env={"EFT_CONFIG": str(other)}, file=third).settings.server.port == 3
    assert load(env={}).origins["server.port"] == "file eft.toml"


def test_text_is_read_by_the_type_of_the_field() -> None:
    loaded = load(
        flags={"kv_memory": "4GiB", "prefix_caching": False, "api_key": ["a,b", "c"]},
        env={
            "EFT_SERVER_API_KEY": "x, y",
            "EFT_SERVER_PUBLIC_METRICS": "off",
            "EFT_SERVER_HEADER_TIMEOUT": "500ms",
            "EFT_MODEL_MAX_MODEL_LEN": "32K",
            "EFT_MODEL_REVISION": "",
        },
    )
    settings = loaded.settings
    assert settings.cache.kv_memory == 4 * 1024**3
    assert settings.cache.prefix_caching is False
    assert settings.server.api_key == ("a,b", "c")
    assert settings.server.public_metrics is False
    assert settings.server.header_timeout == 0.5
    assert settings.model.max_model_len == 32 * 1024
    assert settings.model.revision is None
    assert loaded.origins["model.revision"] == "default"
    assert load(env={"EFT_SERVER_API_KEY": "x, y"}).settings.server.api_key == ("x", "y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprt = 1", "unknown key 'prt' in [server]; did you mean port?"),
        (
            "[server]\nmax_running = 1",
            "unknown key 'max_running' in [server]; did you mean max_running in [scheduler]?",
        ),
        ("[sever]\nport = 1", "unknown section [sever]; did you mean server?"),
        ("port = 1", "unknown key 'port' outside of a section; did you mean port in [server]?"),
        ("server = 1", "server is a section: write [server] on a line of its own"),
        ("[zzz]\nx = 1", "unknown section [zzz]"),
    ],
)
def test_what_the_file_names_and_we_do_not_know(tmp_path: Path, text: str, message: str) -> None:
    path = toml(tmp_path, text)
    assert problems(file=path) == (f"file {path}: {message}",)


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("EFT_SERVER_PROT", "unknown setting of section server; did you mean EFT_SERVER_PORT?"),
        ("EFT_SERVER_ZZZZZZZZZZZZZZZZZZ", "unknown setting of section server"),
        ("EFT_SERVR_PORT", "unknown variable; did you mean EFT_SERVER_PORT?"),
        ("EFT_CONFIGS", "unknown variable; did you mean EFT_CONFIG?"),
    ],
)
def test_variables_that_are_no_settings(variable: str, message: str) -> None:
    assert problems(env={variable: "1"}) == (f"environment {variable}: {message}",)


def test_reserved_foreign_and_kubernetes_variables_are_left_alone() -> None:
    env = {
        "EFT_CACHE_DIR": "/x",
        "EFT_FAILPOINTS": "a",
        "EFT_BANANAS": "1",
        "EFT_SERVER_PORT": "tcp://10.0.0.1:8000",
        "EFT_SERVER_SERVICE_HOST": "10.0.0.1",
        "EFT_SERVER_PORT_8000_TCP_ADDR": "10.0.0.1",
        "EFT_SERVICE_PORT_HTTP": "8000",
        "OTHER": "1",
    }
    assert load(env=env).settings == Settings()


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("[server]\nport = 70000", "server.port", "expected a whole number from 0 to 65535, got 70000"),
        ("[server]\nport = '80'", "server.port", "expected a whole number from 0 to 65535, got '80'"),
        ("[server]\nport = true", "server.port", "expected a whole number from 0 to 65535, got True"),
        (
            "[scheduler]\nmax_running = 0",
            "scheduler.max_running",
            "expected a whole number of at least 1 (units: K, M), got 0",
        ),
        (
            "[scheduler]\nmax_running = 1.5",
            "scheduler.max_running",
            "expected a whole number of at least 1 (units: K, M), got 1.5",
        ),
        (
            "[server]\nbody_timeout = inf",
            "server.body_timeout",
            "expected a time above 0 (units: ms, s, m, h, d), got inf",
        ),
        ("[server]\nhost = ''", "server.host", "expected a non-empty string, got ''"),
        ("[model]\ndevice = 'tpu'", "model.device", "expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (
            "[model]\ndtype = 'float16'",
            "model.dtype",
            "expected one of auto, float32, bfloat16, got 'float16'",
        ),
        ("[cache]\nprefix_caching = 'yes'", "cache.prefix_caching", "expected true or false, got 'yes'"),
        (
            "[limits]\nmax_n = 99999999999999999999",
            "limits.max_n",
            "expected a whole number of at least 1 (units: K, M), got 99999999999999999999",
        ),
    ],
)
def test_an_error_names_field_origin_limit_and_value(tmp_path: Path, text: str, key: str, message: str) -> None:
    path = toml(tmp_path, text)
    assert problems(file=path) == (f"{key} (file {path}): {message}",)


def test_every_problem_is_reported_also_of_values_that_are_overridden(tmp_path: Path) -> None:
    found = problems(
        flags={"port": "80", "max_runing": 1},
        env={"EFT_SERVER_PORT": "x", "EFT_LIMITS_MAX_N": "-1"},
        file=toml(tmp_path, "[server]\nprt = 1\nport = 'y'\n"),
    )
    assert [line.split(":")[0].split(" ")[0] for line in found] == [
        "file",
        "flag",
        "server.port",
        "limits.max_n",
        "server.port",
    ]
    assert "did you mean max_running?" in found[1]


def test_a_secret_is_in_no_error_and_an_empty_one_opens_no_server(tmp_path: Path) -> None:
    path = tmp_path / "secret.toml"
    path.write_text("[server]\napi_key = [918273, 'hunter2']\n")
    (wrong,) = problems(file=path)
    assert "918273" not in wrong
    assert "hunter2" not in wrong
    assert problems(env={"EFT_SERVER_API_KEY": ""}) == (
        "environment EFT_SERVER_API_KEY: is empty; give it a value or unset it",
    )
    (empty,) = problems(flags={"api_key": [""]})
    assert empty.endswith("expected a list of non-empty strings, got an empty string")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "no.toml"
    assert problems(file=missing) == (f"file {missing}: there is no such file",)
    assert "cannot be read" in problems(file=tmp_path)[0]
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"[server]\nhost = '\xe9'\n")
    assert "is not UTF-8" in problems(file=latin)[0]
    assert "is not valid TOML" in problems(file=toml(tmp_path, "[server\n"))[0]
