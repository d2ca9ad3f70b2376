"""Rows of embedding and head in PEFT's files: `trainable_token_indices`, `modules_to_save`, and resized embeddings.

PEFT names what it has trained of a module `token_adapter.trainable_tokens_delta` (rows by the indices of the
configuration) or plainly `weight` (a whole copy). For a base whose embedding was resized, it writes the whole matrices
as well, under one of several names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.checkpoints.peft.config import AdapterConfig, AdapterInvalid
from runtime.model.lora_base import LoraBase
from runtime.model.token_rows import TokenRows, VocabularyRows
from runtime.model.vocabulary import VocabularyBase
from runtime.support.module_patterns import MAX_KEYS
from runtime.support.peft_files import CONFIG, WEIGHTS

_DELTA = "token_adapter.trainable_tokens_delta"
_WHOLE = ("weight", "modules_to_save.weight", "token_adapter.base_layer.weight", "base_layer.weight")
"""Names within a module of a whole matrix; the first that is there counts."""
_UNTRAINED = ("original_module.weight", "token_adapter.original_module.weight")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_INDICES = 1 << 20

# -- reading ---------------------------------------------------------------------------------------


def take_rows(tensors: dict[str, Tensor], config: AdapterConfig, base: LoraBase) -> VocabularyRows | None:
    """Take the rows of embedding and head out of a file's tensors; None where there are none.

    Raises `AdapterInvalid` where they do not fit the base or the configuration.
    """
    indices, saved = _indices(config, base), _saved(config, base)
    vocabulary = base.vocabulary
    if vocabulary is None:
        return None
    found: dict[str, TokenRows] = {}
    for kind in ("embedding", "head"):
        own = _rows(kind, tensors, vocabulary, indices.get(kind), required=kind in saved)
        if own is not None:
            found[kind] = own
    if vocabulary.tied and "embedding" in indices:
        if "head" not in indices and "head" not in saved:
            found["head"] = found["embedding"]  # of a resized base, PEFT writes the tied head from before the training
        elif indices.get("head") == indices["embedding"]:
            found.setdefault("head", found["embedding"])
    rows = VocabularyRows(found.get("embedding"), found.get("head"))
    _check_beyond(rows, vocabulary)
    return rows if found else None


def _indices(config: AdapterConfig, base: LoraBase) -> dict[str, list[int]]:
    """Trained ids of the embedding and of the head."""
    given = config.trainable_token_indices
    if not given:
        return {}
    if base.vocabulary is None:
        raise AdapterInvalid(
            f"{CONFIG}: trainable_token_indices is set, and this model, which runs in transformers' own modules, takes "
            "no rows of its embedding from adapters."
        )
    by_name = {base.vocabulary.embedding: given} if isinstance(given, list) else given
    found: dict[str, list[int]] = {}
    for name, ids in by_name.items():
        kind = base.vocabulary.named(name)
        if kind is None:
            raise AdapterInvalid(
                f"{CONFIG}: trainable_token_indices has {name[:200]!r}; there are {base.vocabulary.embedding} and "
                f"{base.vocabulary.head}."
            )
        if not ids or len(set(ids)) < len(ids) or min(ids) < 0 or len(ids) > MAX_INDICES:
            raise AdapterInvalid(
                f"{CONFIG}: trainable_token_indices of {name[:200]} must be different ids from 0 on, at most "
                f"{MAX_INDICES} of them."
            )
        found[kind] = ids
    return found


def _saved(config: AdapterConfig, base: LoraBase) -> set[str]:
    """The matrices that `modules_to_save` names."""
    found = set[str]()
    names = config.modules_to_save or []
    for name in names[:MAX_KEYS]:
        kind = None if base.vocabulary is None else base.vocabulary.named(name)
        if kind is None:
            known = f" of this model, {base.vocabulary.embedding} and {base.vocabulary.head}" if base.vocabulary else ""
            raise AdapterInvalid(
                f"{CONFIG}: modules_to_save has {name[:200]!r}; whole copies are served of embedding and head{known}"
                f"{'' if base.vocabulary else ', and not for a model that runs in transformers’ own modules'}."
            )
        found.add(kind)
    return found


def _rows(
    kind: str, tensors: dict[str, Tensor], base: VocabularyBase, ids: Sequence[int] | None, *, required: bool
) -> TokenRows | None:
    module = base.full_name(kind)
    own: dict[str, Tensor] = {}
    for leaf in (_DELTA, *_WHOLE, *_UNTRAINED):
        for name in (f"{module}.{leaf}", f"base_model.model.{module}.{leaf}"):
            if (tensor := tensors.pop(name, None)) is not None:
                own[leaf] = tensor
    whole = next((own[leaf] for leaf in _WHOLE if leaf in own), None)
    delta = own.get(_DELTA)
    if (required and whole is None) or (ids is not None and delta is None and not (kind == "head" and base.tied)):
        raise AdapterInvalid(f"{WEIGHTS} lacks the weights of {module}, which {CONFIG} names.")
    if delta is not None and ids is None and kind == "head" and base.tied:
        delta = None  # the embedding's own
    if delta is not None and ids is None:
        raise AdapterInvalid(f"{WEIGHTS} has rows of {module}, and {CONFIG} has no trainable_token_indices for it.")
    if whole is not None:
        whole = _checked(f"{module}.weight", whole, base, at_least=base.size)
    if delta is None or ids is None:
        return None if whole is None else TokenRows(torch.arange(len(whole)), whole, len(whole))
    delta = _checked(f"{module}.{_DELTA}", delta, base, exactly=len(ids))
    index = torch.tensor(ids, dtype=torch.int64)
    if whole is None:
        return TokenRows.of(index, delta)
    if int(index.max()) >= len(whole):
        raise AdapterInvalid(f"{CONFIG}: trainable_token_indices has {int(index.max())}, beyond {len(whole)} rows.")
    return TokenRows(torch.arange(len(whole)), whole.index_copy(0, index, delta), len(whole))


def _checked(
    name: str, tensor: Tensor, base: VocabularyBase, *, at_least: int | None = None, exactly: int | None = None
) -> Tensor:
    if tensor.dtype not in _FLOATS:
        raise AdapterInvalid(f"{WEIGHTS}: {name} is {tensor.dtype}; float32, float16 or bfloat16 is needed.")
    rows = exactly if exactly is not None else f"{at_least} or more"
    fits = tensor.ndim == 2 and tensor.shape[1] == base.hidden_size
    if not fits or (exactly is not None and len(tensor) != exactly) or len(tensor) < (at_least or 0):
        raise AdapterInvalid(
            f"{WEIGHTS}: {name}: expected shape [{rows}, {base.hidden_size}], got {list(tensor.shape)}."
        )
    if not bool(tensor.isfinite().all()):
        raise AdapterInvalid(f"{WEIGHTS}: {name} has values that are not finite numbers.")
    return tensor.float().contiguous()


def _check_beyond(rows: VocabularyRows, base: VocabularyBase) -> None:
    """Raise `AdapterInvalid` where an id beyond the base's vocabulary has no embedding."""
    embedding, head = rows.embedding, rows.head
    known = base.size if embedding is None else max(base.size, embedding.size)
    if embedding is not None and int((embedding.ids >= base.size).sum()) != known - base.size:
        raise AdapterInvalid(
            f"{CONFIG}: trainable_token_indices goes up to {embedding.size - 1}, and leaves out some of the ids from "
            f"{base.size} on, which the base has no rows for."
        )
    if head is not None and head.size > known:
        raise AdapterInvalid(
            f"{WEIGHTS}: {base.head} has the id {head.size - 1}, and the embedding of the adapter and its base has "
            f"{known} rows."
        )


# -- writing ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class VocabularyFile:
    """Rows of embedding and head as they go into PEFT's files."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]

    @classmethod
    def of(cls, rows: VocabularyRows, base: LoraBase) -> "VocabularyFile":
        """Whole copies become `modules_to_save`, other rows `trainable_token_indices`. Rows that a tied head shares
        with the embedding are written once."""
        vocabulary = base.vocabulary
        assert vocabulary is not None, "there are rows of it"
        tensors: dict[str, Tensor] = {}
        indices: dict[str, list[int]] = {}
        saved: list[str] = []
        for kind, found in (("embedding", rows.embedding), ("head", rows.head)):
            if found is None:
                continue
            module, values = vocabulary.full_name(kind), found.rows.detach().cpu().contiguous()
            short = module.rpartition(".")[2]
            if found.covers(vocabulary.size):
                saved.append(short)
                tensors[f"base_model.model.{module}.weight"] = values.clone() if kind == "head" else values
            elif not (kind == "head" and found is rows.embedding):
                indices[short] = found.ids.tolist()
                tensors[f"base_model.model.{module}.{_DELTA}"] = values
        tying = len(saved) == 2 and rows.head is rows.embedding
        config = {
            "modules_to_save": saved or None,
            "trainable_token_indices": indices or None,
            "ensure_weight_tying": tying,
        }
        return cls(tensors, config)
