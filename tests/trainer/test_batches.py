"""Packing and the order of epochs."""

from hypothesis import given
from hypothesis import strategies as st

from runtime.trainer.schedule import Bin, epoch_order, pack

LENGTHS = st.lists(st.integers(1, 100), max_size=80)


@given(lengths=LENGTHS, capacity=st.integers(50, 200), window=st.integers(1, 100))
def test_bins_hold_every_example_once_and_no_more_than_they_can(lengths: list[int], capacity: int, window: int) -> None:
    bins = pack(lengths, capacity, window=window)
    assert sorted(index for bin in bins for index in bin) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in bin) <= capacity or len(bin) == 1 for bin in bins)
    assert bins == pack(lengths, capacity, window=window)


@given(lengths=st.lists(st.integers(1, 100), min_size=2, max_size=80))
def test_no_two_bins_would_fit_into_one(lengths: list[int]) -> None:
    loads = sorted(sum(lengths[index] for index in bin) for bin in pack(lengths, 100))
    assert len(loads) == 1 or loads[0] + loads[1] > 100


def test_a_known_packing() -> None:
    assert pack([60, 50, 40, 30, 20], 100) == [(0, 2), (1, 3, 4)]
    assert pack([5, 5, 5], 10, window=1) == [(0,), (1,), (2,)]
    assert pack([], 10) == []


def order(bins: list[Bin], lengths: list[int], **options: object) -> list[list[int]]:
    defaults: dict[str, object] = {"micro_batch_size": 2, "seed": 1, "epoch": 0, "shuffle": True, "by_length": False}
    return epoch_order(bins, lengths, **{**defaults, **options})  # type: ignore[arg-type]


@given(
    lengths=LENGTHS,
    packed=st.booleans(),
    by_length=st.booleans(),
    shuffle=st.booleans(),
    size=st.integers(1, 7),
    seed=st.integers(0, 5),
)
def test_every_epoch_has_every_example_once(
    lengths: list[int], packed: bool, by_length: bool, shuffle: bool, size: int, seed: int
) -> None:
    bins: list[Bin] = pack(lengths, 128) if packed else [(index,) for index in range(len(lengths))]
    options = {"by_length": by_length, "shuffle": shuffle, "micro_batch_size": size, "seed": seed}
    epochs = [order(bins, lengths, epoch=epoch, **options) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(index for batch in epoch for index in batch) == list(range(len(lengths)))
        assert len(epoch) == -(-len(bins) // size)
    assert epochs == [order(bins, lengths, epoch=epoch, **options) for epoch in range(3)]


def test_epochs_and_seeds_differ_in_their_order() -> None:
    bins: list[Bin] = [(index,) for index in range(50)]
    lengths = [1] * 50
    first = order(bins, lengths)
    assert first != order(bins, lengths, epoch=1)
    assert first != order(bins, lengths, seed=2)
    assert order(bins, lengths, shuffle=False) == [[n, n + 1] for n in range(0, 50, 2)]


def test_batches_of_like_length() -> None:
    lengths = list(range(1, 41))
    batches = order([(index,) for index in range(40)], lengths, by_length=True, micro_batch_size=4)
    assert all(max(lengths[n] for n in batch) - min(lengths[n] for n in batch) == 3 for batch in batches)
    assert lengths[batches[0][0]] == 40
