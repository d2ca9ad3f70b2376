"""Rows of embedding and head in training: single rows of tokens, old and new, or whole copies.

As PEFT's `trainable_token_indices` and `modules_to_save`: rows replace the base's, and begin as they are there. Rows of
new tokens begin near the mean of all rows. The rows are alike on all ranks, and so are their gradients.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from runtime.model.decoder import Decoder
from runtime.model.layers import Parameter
from runtime.model.lora import Adaptation
from runtime.model.model import Model
from runtime.model.token_rows import Embed, TokenRows, VocabularyRows, embed_with
from runtime.model.vocabulary import RowTargets

NOISE = 0.02
"""Spread of the rows of new tokens, in the spread of all rows: without it they would begin alike."""
ROWS_AT_ONCE = 4096
"""Rows of a matrix in floating point that are in memory together."""


class TrainableVocabulary:
    """The parameters of an adapter's rows: `embedding.rows` and `head.rows`."""

    def __init__(self, decoder: Model, targets: RowTargets, *, seed: int) -> None:
        """Fresh parameters on the decoder's device. All ranks at once. Raises `ValueError` for a model of
        transformers' modules."""
        if not isinstance(decoder, Decoder):
            raise ValueError("rows of the embedding cannot be trained for a model in transformers' own modules")
        self.targets = targets
        self.known = decoder.spec.vocab_size
        """Rows of the base's embedding."""
        self.initial = _initial(decoder, targets, seed)
        """The rows of new tokens as they began: the base model, for a loss that compares with it."""
        self._ids = {kind: torch.tensor(targets.ids(kind), device=decoder.device) for kind in targets.kinds}
        self.values = {kind: self._begin(decoder, kind) for kind in targets.kinds}
        """[rows, hidden] each, float32."""
        self._scale = decoder.embedding_scale
        self._share = 1.0 / decoder.group.size
        """Share of a gradient that each rank adds to the sum over all of them."""

    def _begin(self, decoder: Decoder, kind: str) -> Tensor:
        ids = self._ids[kind]
        rows = _rows_of(decoder, kind, ids.clamp(max=self.known - 1))
        fresh = self.initial.embedding if kind == "embedding" else self.initial.head
        return (rows if fresh is None else fresh.replace(ids, rows)).contiguous().requires_grad_()

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained tensor by a stable name."""
        for kind, values in self.values.items():
            yield f"{kind}.rows", values

    def rows(self, kind: str) -> TokenRows | None:
        """The current rows of the embedding or the head, as they are trained; None where none are."""
        held = "embedding" if self.targets.tied else kind
        if held not in self.values:
            return None
        ids = self._ids[held]
        return TokenRows(ids, self.values[held], self.targets.ids(held)[-1] + 1)

    # -- gradients -----------------------------------------------------------------------------

    def add_embedding_grad(self, token_ids: Tensor, grad: Tensor) -> None:
        """Add the gradient [T, hidden] of the first layer's input, made of the tokens [T]."""
        rows = self.rows("embedding")
        if rows is None:
            return
        place, found = rows.find(token_ids)
        scaled = grad[found].to(rows.rows.dtype) * (self._scale * self._share)
        _grad_of(rows.rows).index_add_(0, place[found], scaled)

    def add_head_grad(self, places: slice, grad: Tensor) -> None:
        """Add the gradient [n, hidden] of some of the head's rows."""
        rows = self.rows("head")
        assert rows is not None, "there is a gradient of them"
        _grad_of(rows.rows)[places] += grad.to(rows.rows.dtype) * self._share


def rows_of(captured: Mapping[str, Tensor], targets: RowTargets) -> VocabularyRows | None:
    """The rows among the tensors of `TrainableLora.capture`, to serve or to write; None where none are trained."""
    found = {
        kind: TokenRows(torch.tensor(ids), captured[f"{kind}.rows"], ids[-1] + 1)
        for kind in targets.kinds
        for ids in [targets.ids(kind)]
    }
    if not found:
        return None
    return VocabularyRows(found.get("embedding"), found.get("embedding" if targets.tied else "head"))


class InitialRows(Adaptation):
    """The base model with rows for new tokens."""

    def __init__(self, rows: VocabularyRows, known: int) -> None:
        self._rows = rows
        self._known = known

    def __call__(self, layer: int, linear: str, x: Tensor, y: Tensor, base: Tensor | None = None) -> Tensor:
        return y

    def embed(self, token_ids: Tensor, embed: Embed) -> Tensor:
        rows = self._rows.embedding
        return embed(token_ids) if rows is None else embed_with(rows, token_ids, embed, known=self._known)


# -- beginning -------------------------------------------------------------------------------------


def _initial(decoder: Decoder, targets: RowTargets, seed: int) -> VocabularyRows:
    if not targets.fresh:
        return VocabularyRows()
    ids = torch.tensor(targets.fresh, device=decoder.device)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(ids), decoder.spec.hidden_size, generator=generator).to(decoder.device)
    found: dict[str, TokenRows] = {}
    for kind in ("embedding", "head"):
        if targets.ids(kind):
            mean, spread = _mean_and_spread(decoder, kind)
            found[kind] = TokenRows(ids, mean + NOISE * spread * noise, int(ids[-1]) + 1)
    embedding = found.get("embedding")
    return VocabularyRows(embedding, embedding if targets.tied else found.get("head"))


def _mean_and_spread(decoder: Decoder, kind: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [hidden] of the rows of the base's embedding or head. All ranks at once."""
    weight, own = _weight(decoder, kind), decoder.vocabulary.split.size
    sums = torch.zeros(2, decoder.spec.hidden_size, dtype=torch.float64, device=decoder.device)
    for start in range(0, own, ROWS_AT_ONCE):
        index = torch.arange(start, min(start + ROWS_AT_ONCE, own), device=decoder.device)
        rows = _own_rows(weight, index).double()
        sums += torch.stack([rows.sum(0), rows.square().sum(0)])
    mean, square = decoder.group.all_reduce(sums) / decoder.spec.vocab_size
    return mean.float(), (square - mean.square()).clamp(min=0).sqrt().float()


def _rows_of(decoder: Decoder, kind: str, ids: Tensor) -> Tensor:
    """Rows [n, hidden] float32 of the base's embedding or head. All ranks at once."""
    weight, split = _weight(decoder, kind), decoder.vocabulary.split
    place = split.find(ids)
    here = (place >= 0).unsqueeze(1)
    parts = torch.split(place.clamp(min=0), ROWS_AT_ONCE)
    rows = torch.cat([_own_rows(weight, part) for part in parts])
    return rows if split.is_whole else decoder.group.all_reduce(rows.where(here, 0.0))


def _weight(decoder: Decoder, kind: str) -> Parameter:
    named = decoder.parameters()
    return named.get(f"{kind}.weight", named["embedding.weight"])


def _own_rows(weight: Parameter, index: Tensor) -> Tensor:
    rows = weight.data[index] if weight.quantised is None else weight.quantised.rows(index)
    return rows.float()


def _grad_of(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
