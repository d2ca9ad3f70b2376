"""Verification of a checkpoint (`eft models verify`): its files, its tensors, its logits against transformers'."""

import gc
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from msgspec import Struct
from torch import Tensor

import kernels
from kernels import QuantisedWeight
from runtime.checkpoints import Checkpoint, open_checkpoint
from runtime.checkpoints.model_loading import load_model, untied
from runtime.model.attention import PackedAttention
from runtime.model.config import ModelLoadError
from runtime.model.decoder import Decoder
from runtime.model.families import find_model, is_native
from runtime.model.families.family import Family
from runtime.model.model import Model
from runtime.support.memory import return_freed_memory
from settings.schema import ModelSettings

# -- report ----------------------------------------------------------------------------------------
#
# The findings.


class Check(Struct, frozen=True):
    """One finding."""

    name: str
    found: str
    ok: bool = True


class VerificationReport(Struct, frozen=True):
    """All findings, in the order of the checks."""

    model: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


# -- files -----------------------------------------------------------------------------------------
#
# Comparison of a checkpoint's files with their known checksums.
#
# A checksum is in a file `SHA256SUMS` (as sha256sum writes it), in the name of the blob that a file of the hub's cache
# links to, or in the note that `hf download --local-dir` writes beside a file.

SUMS = "SHA256SUMS"
NOTES = ".cache/huggingface/download"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 22


def check_files(source: Path) -> list[Check]:
    """Compare the checksums of the files in a model's directory, or of a single file."""
    directory = source if source.is_dir() else source.parent
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    listed = _listed(directory / SUMS)
    checks = []
    for file in files:
        expected = listed.get(file.name) or _blob(file) or _noted(directory, file)
        size = f"{file.stat().st_size} bytes"
        if expected is None:
            checks.append(Check(file.name, f"{size}, no sum to compare with"))
        elif _sum(file) == expected:
            checks.append(Check(file.name, f"{size}, sha256 as it should be"))
        else:
            checks.append(Check(file.name, f"{size}, but its sha256 is not {expected}", ok=False))
    absent = [name for name in listed if not (directory / name).is_file()] if source.is_dir() else []
    return checks + [Check(name, f"named in {SUMS}, and not there", ok=False) for name in absent]


def _listed(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    lines = (line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines())
    return {parts[1].lstrip("*"): parts[0].lower() for parts in lines if len(parts) == 2}


def _blob(file: Path) -> str | None:
    name = file.resolve().name
    return name if file.is_symlink() and _SHA256.fullmatch(name) else None


def _noted(directory: Path, file: Path) -> str | None:
    """The file's SHA-256 in its note, else None. The second line of a note is the file's ETag: its SHA-256, for files
    as large as weights."""
    note = directory / NOTES / f"{file.name}.metadata"
    if not note.is_file():
        return None
    lines = note.read_text(encoding="utf-8").splitlines()
    return lines[1] if len(lines) > 1 and _SHA256.fullmatch(lines[1]) else None


def _sum(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# -- tensors ---------------------------------------------------------------------------------------
#
# Comparison of a checkpoint's tensors with the places of its architecture.

SHOWN = 5
"""Largest number of names in a line."""


def check_tensors(checkpoint: Checkpoint, family: type[Family]) -> list[Check]:
    """Missing, unknown, misshapen and unused tensors."""
    spec = untied(checkpoint.files, family, family.spec(checkpoint.config))
    cpu = torch.device("cpu")
    places = Decoder(spec, kernels.load("reference"), max_len=1, dtype=torch.float32, device=cpu).parameters()
    wanted = {(name, part) for name, parameter in places.items() for part in parameter.missing}
    count, unused, unknown, misshapen = 0, [], [], []
    for name, tensor in checkpoint.tensors():
        count += 1
        found = list(family.weights([(name, tensor)], spec))
        if not found:
            unused.append(name)
        for place, part, value in found:
            if place not in places or part not in places[place].parts:
                unknown.append(name)
            elif value.shape != (expected := places[place].shape_of(part)):
                misshapen.append(f"{name} is {list(value.shape)} and not {list(expected)}")
            else:
                wanted.discard((place, part))
    missing = sorted(family.tensor_name(place, part) for place, part in wanted)
    return [
        Check("tensors", f"{count} in {len(places)} weights"),
        _check("missing", missing),
        _check("unknown", unknown),
        _check("of another shape", misshapen),
        Check("unused", _some(unused)),
    ]


def _check(name: str, found: list[str]) -> Check:
    return Check(name, _some(found), ok=not found)


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)}: {', '.join(sorted(names)[:SHOWN])}{more}"


# -- logits ----------------------------------------------------------------------------------------
#
# Comparison of a model's logits here with transformers' logits from the same checkpoint, in float32.

PROMPTS = (
    "The capital of France is",
    "def add(a, b):\n    return",
    "1, 2, 3, 4, 5,",
    "A young newt is called an eft. When the rain comes in spring, thousands of them cross the road at night;",
)
TOKENS = 16
"""Number of greedy tokens after each prompt."""
EXACT, ROUNDED = 1e-3, 0.1
"""Largest difference of logits, as a share of their spread: the maximum, for weights in floats; the root mean square,
for weights in integers, whose activations are rounded to a byte too. Wrong logits differ by a whole spread and more."""

Logits = Callable[[list[int]], Tensor]
"""Token ids [T] → logits [T, vocab]."""


def ours(model: Model) -> Logits:
    """Logits of our decoder for one sequence, on the model's device."""

    def logits(ids: list[int]) -> Tensor:
        positions = torch.arange(len(ids), device=model.device)
        attention = PackedAttention(model.ops, [len(ids)], model.spec)
        with torch.inference_mode():
            token_ids = torch.tensor(ids, device=model.device)
            return model.logits(model.forward(token_ids, positions, attention)).cpu()

    return logits


def transformers_logits(checkpoint: Checkpoint) -> Logits:
    """transformers' logits of a checkpoint. transformers loads a directory of floats itself; for other formats it gets
    the tensors as we read them."""
    model = _load(checkpoint)

    def logits(ids: list[int]) -> Tensor:
        with torch.inference_mode():
            found: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0].float()
        return found

    return logits


def _load(checkpoint: Checkpoint) -> Any:
    import transformers

    plain = checkpoint.source.is_dir() and not checkpoint.config.get("quantization_config")
    if plain:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint.source,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="eager",
        )
        return model.eval()
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    kind = getattr(transformers, config["architectures"][0])
    model = kind._from_config(kind.config_class(**config), attn_implementation="eager").float().eval()
    tensors = {
        name: value.dequantise() if isinstance(value, QuantisedWeight) else value.float()
        for name, value in checkpoint.tensors()
    }
    told = model.load_state_dict(tensors, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if lacking := [name for name in told.missing_keys if name not in tied]:
        raise ValueError(f"transformers has {len(lacking)} weights under other names, such as {lacking[0]}")
    model.tie_weights()
    return model


def compare(prompts: list[list[int]], mine: list[Tensor], theirs: Logits, *, integers: bool) -> list[Check]:
    """Compare logits. `prompts` include our greedy tokens after them; `mine` are our logits of these ids; `theirs`
    gives transformers'."""
    apart, typical, spread, wrong, checked = 0.0, 0.0, 0.0, [], 0
    for number, (ids, own) in enumerate(zip(prompts, mine, strict=True), 1):
        expected = theirs(ids)
        difference = float((own - expected).abs().max())
        apart, spread = max(apart, difference), max(spread, float(expected.std()))
        typical = max(typical, float((own - expected).square().mean().sqrt()))
        for place in range(len(ids) - TOKENS - 1, len(ids) - 1):
            best = expected[place].topk(2)
            checked += 1
            if ids[place + 1] != int(best.indices[0]):
                margin = float(best.values[0] - best.values[1])
                wrong.append((number, place + 1, margin, margin > 2 * difference))
                break
    limit = (ROUNDED if integers else EXACT) * max(spread, 1e-6)
    found = f"{typical:.2g} apart in the root mean square" if integers else f"at most {apart:.2g} apart"
    said = f"{found}, of a spread of {spread:.3g} (limit {limit:.2g})"
    return [Check("logits", said, (typical if integers else apart) <= limit), _tokens(checked, wrong)]


def _tokens(checked: int, wrong: list[tuple[int, int, float, bool]]) -> Check:
    if not wrong:
        return Check("greedy tokens", f"all {checked} equal")
    number, place, margin, clear = next((one for one in wrong if one[3]), wrong[0])
    why = "" if clear else f": two tokens were {margin:.2g} apart, less than rounding"
    return Check("greedy tokens", f"prompt {number} differs at token {place}{why}", ok=not clear)


def greedy(logits: Logits, ids: list[int]) -> list[int]:
    """`ids` and the greedy tokens after them."""
    ids = list(ids)
    for _ in range(TOKENS):
        ids.append(int(logits(ids)[-1].argmax()))
    return ids


# -- verify ----------------------------------------------------------------------------------------
#
# All checks of one checkpoint, one after the other. A model is released before the next is loaded.


@dataclass(frozen=True, eq=False)
class _Computed:
    """The model's results here."""

    prompts: list[list[int]]
    logits: list[torch.Tensor]
    integers: bool


def verify(settings: ModelSettings) -> VerificationReport:
    """Verify the model that the settings name. Raises `ModelLoadError` where its files cannot be opened at all."""
    return_freed_memory()
    checkpoint = open_checkpoint(settings.model, revision=settings.revision, chat_template=settings.chat_template)
    checks = check_files(checkpoint.source)
    try:
        native = is_native(checkpoint.config)
        served = "our decoder" if native else "transformers' modules"
        checks.append(Check("architecture", f"{', '.join(checkpoint.config.get('architectures') or [])}: {served}"))
        if native:
            checks += check_tensors(checkpoint, find_model(checkpoint.config))
        if all(check.ok for check in checks):
            checks += _computed(checkpoint, settings)
    except (ModelLoadError, ValueError, KeyError) as error:
        checks.append(Check("loading", str(error), ok=False))
    return VerificationReport(checkpoint.name, checks)


def _computed(checkpoint: Checkpoint, settings: ModelSettings) -> list[Check]:
    found = _here(checkpoint, settings)
    gc.collect()
    try:
        theirs = transformers_logits(checkpoint)
    except Exception as error:  # transformers may raise anything for a checkpoint that it cannot load
        return [Check("transformers", f"cannot load this checkpoint, so nothing was compared: {error}", ok=False)]
    return compare(found.prompts, found.logits, theirs, integers=found.integers)


def _here(checkpoint: Checkpoint, settings: ModelSettings) -> _Computed:
    model = load_model(checkpoint, msgspec.structs.replace(settings, dtype="float32"))
    logits = ours(model)
    room = model.max_len // 2
    prompts = [greedy(logits, checkpoint.tokenizer.encode(text)[:room]) for text in PROMPTS]
    integers = any(parameter.quantised is not None for parameter in model.parameters().values())
    return _Computed(prompts, [logits(ids) for ids in prompts], integers)
