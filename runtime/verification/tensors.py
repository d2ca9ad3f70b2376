"""The tensors of a checkpoint against the places that its architecture has for them."""

import torch

import kernels
from runtime.verification.report import Check
from runtime.workers.decoder import Decoder
from runtime.workers.loading import Checkpoint
from runtime.workers.models.family import Family

SHOWN = 5
"""Names to a line."""


def check_tensors(checkpoint: Checkpoint, family: type[Family]) -> list[Check]:
    """What lacks, what nobody knows, what has another shape, and what is left unused."""
    spec = family.spec(checkpoint.config)
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
    missing = sorted(f"{place} ({part})" if part else place for place, part in wanted)
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
