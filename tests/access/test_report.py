"""What a server says at its start about who can use it."""

from pathlib import Path

import pytest

from runtime.access import Access
from runtime.access.keys import change_keys
from runtime.support.logs import configure
from settings.api import ServerSettings
from settings.schema import ObservabilitySettings, Settings


def warned(capsys: pytest.CaptureFixture[str], **server: object) -> bool:
    configure(ObservabilitySettings(log_level="warning", log_format="json"))
    Access(Settings(server=ServerSettings(**server))).report()  # type: ignore[arg-type]
    return "no_api_key" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "models.example"])
def test_beyond_this_machine_without_a_key(capsys: pytest.CaptureFixture[str], host: str, tmp_path: Path) -> None:
    assert warned(capsys, host=host)
    assert warned(capsys, host=host, admin_key=("boss",))
    assert warned(capsys, host=host, allowed_hosts=("*",))
    assert not warned(capsys, host=host, api_key=("k",))
    change_keys(tmp_path / "keys.json", lambda keys: keys)
    assert not warned(capsys, host=host, keys_file=str(tmp_path / "keys.json"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_on_this_machine(capsys: pytest.CaptureFixture[str], host: str) -> None:
    assert not warned(capsys, host=host)
