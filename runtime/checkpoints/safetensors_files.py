"""The safetensors files of a model directory: one, or several with an index. Pickles are refused.

Files are mapped; a tensor is read from the disk when the model copies it, and its pages go with the next one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from runtime.workers.loading.errors import ModelLoadError
from runtime.workers.loading.json_files import read_json_object
from runtime.workers.loading.mapped import MappedFile

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")


@dataclass(frozen=True)
class WeightFiles:
    """Which tensors to read from which file, in the order of reading."""

    names: dict[Path, list[str]]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors, views of the mapped files."""
        files = self.open()
        for names in self.names.values():
            for name in names:
                yield name, files.read(name)
                files.drop()

    def open(self) -> OpenFiles:
        return OpenFiles({name: path for path, names in self.names.items() for name in names})


class OpenFiles:
    """The tensors of a model by name, whichever file they are in. Files are mapped when they are first needed."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths
        self._files: dict[Path, MappedFile] = {}
        self._read: list[str] = []

    def read(self, name: str) -> torch.Tensor:
        """A view of its file. Raises `ModelLoadError`."""
        path = self._paths[name]
        if path not in self._files:
            self._files[path] = MappedFile(path)
        self._read.append(name)
        return self._files[path].tensor(name)

    def drop(self) -> None:
        """Let the pages of all that was read since the last time go."""
        for name in self._read:
            self._files[self._paths[name]].drop(name)
        self._read.clear()


def find_weights(directory: Path) -> WeightFiles:
    """The weights of a model directory, every file's header checked. Raises `ModelLoadError`."""
    if (directory / INDEX).is_file():
        return _indexed(directory)
    if (directory / SINGLE).is_file():
        return WeightFiles({directory / SINGLE: _names_in(directory / SINGLE)})
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return WeightFiles({files[0]: _names_in(files[0])})
    if files:
        raise ModelLoadError(
            f"{directory} holds {len(files)} safetensors files, and no {INDEX} to say which tensor is where."
        )
    pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
    if pickles:
        raise ModelLoadError(_pickle_message(directory, pickles[0]))
    raise ModelLoadError(f"{directory} holds no weights: neither {SINGLE} nor {INDEX}.")


def _indexed(directory: Path) -> WeightFiles:
    index = directory / INDEX
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadError(f"{index} has no weight_map of tensor names to files.")
    by_file: defaultdict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelLoadError(f"{index}: {name} must be in a safetensors file beside the index, not {file!r}.")
        by_file[file].append(name)
    missing = [file for file in by_file if not (directory / file).is_file()]
    if missing:
        raise ModelLoadError(
            f"{index} names {len(by_file)} files, of which {len(missing)} are missing: "
            f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}. Is the download complete?"
        )
    for file, names in by_file.items():
        absent = set(names).difference(_names_in(directory / file))
        if absent:
            raise ModelLoadError(f"{directory / file} lacks {min(absent)}, which {INDEX} says is in it.")
    return WeightFiles({directory / file: sorted(names) for file, names in sorted(by_file.items())})


def _names_in(path: Path) -> list[str]:
    with _opened(path) as file:
        names: list[str] = sorted(file.keys())
    return names


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path} cannot be read as safetensors: {error}. Is the download complete?") from error


def _pickle_message(directory: Path, name: str) -> str:
    return (
        f"{directory} holds its weights as pickles ({name}), which can run any code when they are loaded, so "
        "they are refused. Where you trust the file, convert it once:\n"
        "  python -c \"import transformers as t; d = '" + str(directory) + "'; "
        "t.AutoModelForCausalLM.from_pretrained(d, dtype='auto').save_pretrained(d + '-safetensors'); "
        "t.AutoTokenizer.from_pretrained(d).save_pretrained(d + '-safetensors')\"\n"
        f"and load {directory}-safetensors."
    )
