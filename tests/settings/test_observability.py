"""The scrape configuration and the alerts: valid for promtool, and about metrics that we have."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from runtime.metrics import CacheShape, Metrics
from settings import fields

FOLDER = Path(__file__).parents[2] / "settings" / "observability"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (Debian: sudo apt-get install prometheus; `make test` fetches it)",
)


def promtool(*arguments: str | Path, cwd: Path) -> str:
    command = ["promtool", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_promtool
def test_configuration_is_valid() -> None:
    said = promtool("check", "config", "prometheus.yml", cwd=FOLDER)
    assert "2 rule files found" in said


@needs_promtool
@pytest.mark.parametrize("name", ["alerts", "rules"])
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path, name: str) -> None:
    shutil.copy(FOLDER / f"{name}.yml", tmp_path)
    shutil.copy(Path(__file__).with_name(f"{name}_test.yml"), tmp_path)
    assert "SUCCESS" in promtool("test", "rules", f"{name}_test.yml", cwd=tmp_path)


def test_alerts_are_about_metrics_that_are_exported() -> None:
    metrics = Metrics("m", vllm_names=True, shape=CacheShape(max_model_len=512, block_size=16, num_blocks=32))
    body, _ = metrics.render("text/plain")
    exported = set(re.findall(r"^([a-z_]+:[a-z_]+)", body.decode(), re.MULTILINE))
    rules = "".join((FOLDER / name).read_text(encoding="utf-8") for name in ("alerts.yml", "rules.yml"))
    wanted = set(re.findall(r"\beft:\w+", rules))
    # A histogram without observations may show no samples of its own, but its family is there.
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in wanted}
    assert len(families) >= 6
    assert families <= exported | set(re.findall(r"^# TYPE (\S+)", body.decode(), re.MULTILINE))


def test_the_compose_file_mounts_what_is_there() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))["services"]
    mounts = [mount for one in services.values() for mount in one["volumes"] if mount.startswith("./")]
    assert len(mounts) == 5
    for mount in mounts:
        assert (FOLDER / mount.split(":")[0]).exists(), mount
    settings = services["eft"]["environment"]
    assert set(settings) <= {field.env for field in fields.fields()}
    assert services["eft"]["read_only"] is True
    source = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8"))
    assert source["datasources"][0]["url"] == "http://eft:9090"  # Prometheus is in the network of that service
    assert services["prometheus"]["network_mode"] == "service:eft"
    provider = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/eft.yml").read_text(encoding="utf-8"))
    target = provider["providers"][0]["options"]["path"]
    assert any(mount.split(":")[1] == target for mount in mounts)
