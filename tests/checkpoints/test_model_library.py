"""The library of whole models that jobs have trained."""

from pathlib import Path

from runtime.checkpoints.model_library import ModelLibrary, ModelRecord


def test_versions_of_whole_models(tmp_path: Path) -> None:
    library, source = ModelLibrary(tmp_path), tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")

    def record(job: str) -> ModelRecord:
        return ModelRecord(job=job, step=3, metrics={}, base="tiny", created=1.0)

    assert library.publish("words", source, record("a")) == "words@1"
    assert library.publish("words", source, record("b")) == "words@2"
    assert library.publish("words", source, record("a")) == "words@1"  # again, after a crash
    found = library.find("words@2")
    assert found is not None
    assert (found / "config.json").read_text() == "{}"
    for label in ("words", "words@3", "../words@1", "words@01", "words@1/..", "words@0"):
        assert library.find(label) is None
    assert library.versions("words")[2].job == "b"
