"""The scrape configuration and the alerts: valid for promtool, and about metrics that we have."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from runtime.metrics import Metrics

FOLDER = Path(__file__).parents[2] / "settings" / "prometheus"

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
    assert "1 rule files found" in said


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "alerts.yml", tmp_path)
    shutil.copy(Path(__file__).with_name("alerts_test.yml"), tmp_path)
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml", cwd=tmp_path)


def test_alerts_are_about_metrics_that_are_exported() -> None:
    metrics = Metrics("m", vllm_names=True, max_model_len=512, block_size=16, num_blocks=32)
    body, _ = metrics.render("text/plain")
    exported = set(re.findall(r"^([a-z_]+:[a-z_]+)", body.decode(), re.MULTILINE))
    wanted = set(re.findall(r"\beft:\w+", (FOLDER / "alerts.yml").read_text(encoding="utf-8")))
    # A histogram without observations may show no samples of its own, but its family is there.
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in wanted}
    assert len(families) >= 6
    assert families <= exported | set(re.findall(r"^# TYPE (\S+)", body.decode(), re.MULTILINE))
