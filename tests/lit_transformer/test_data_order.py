from itertools import islice

import numpy as np
import pytest

from lit_transformer.data.batching.order import SampleStream, order
from lit_transformer.errors import UsageError


def drawn(stream, size, batches):
    """Consume batches, as a loader does."""
    ids = []
    for batch, indices in islice(stream.batches(size), batches):
        ids += batch.tolist()
        stream.position = int(indices[-1]) + 1
    return ids


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 65537])
def test_every_epoch_is_a_permutation(n):
    for epoch in range(3):
        assert sorted(order(seed=5, epoch=epoch, n=n, indices=np.arange(n))) == list(range(n))


def test_order_of_some_places_agrees_with_the_whole_order():
    whole = order(seed=1, epoch=2, n=1000, indices=np.arange(1000))
    places = np.array([999, 0, 17, 17])
    assert order(seed=1, epoch=2, n=1000, indices=places).tolist() == whole[places].tolist()


def test_epochs_may_differ_from_place_to_place():
    places = np.arange(10)
    mixed = order(seed=1, epoch=places % 2, n=10, indices=places)
    even, odd = (order(seed=1, epoch=epoch, n=10, indices=places) for epoch in (0, 1))
    assert mixed.tolist() == np.where(places % 2, odd, even).tolist()


def test_order_differs_by_seed_and_by_epoch_and_is_the_same_on_every_machine():
    orders = [order(seed, epoch, 1000, np.arange(1000)) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.01
    assert order(0, 0, 10, np.arange(10)).tolist() == [7, 2, 1, 9, 0, 4, 6, 5, 3, 8]


@pytest.mark.parametrize("n", [2, 3, 5, 10, 17, 101])
def test_every_sample_is_equally_likely_at_every_place(n):
    epochs = np.arange(20_000)
    for place in (0, 1, n - 1):
        counts = np.bincount(order(7, epochs, n, np.full(len(epochs), place)), minlength=n)
        expected = len(epochs) / n
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < (n - 1) + 5 * np.sqrt(2 * (n - 1))


def test_neighbours_in_the_order_are_unrelated():
    ids = order(seed=0, epoch=0, n=100_000, indices=np.arange(100_000))
    for lag in (1, 2, 317):  # 317 is the side of the grid
        assert abs(np.corrcoef(ids[:-lag], ids[lag:])[0, 1]) < 0.015


def test_stream_goes_through_the_epochs_and_across_their_borders():
    stream = SampleStream(seed=0, n=10)
    expected = [i for epoch in range(3) for i in order(0, epoch, 10, np.arange(10))]
    assert drawn(stream, size=4, batches=7) == expected[:28]
    assert stream.position == 28


def test_stream_longer_than_what_is_drawn_at_once():
    stream = SampleStream(seed=0, n=10)
    assert drawn(stream, size=3000, batches=4) == [i for e in range(1200) for i in order(0, e, 10, np.arange(10))]


def test_a_batch_may_be_larger_than_the_data():
    assert len(drawn(SampleStream(seed=0, n=2), size=10_000, batches=1)) == 10_000


def test_drawing_moves_nothing():
    stream = SampleStream(seed=0, n=10)
    next(stream.batches(4))
    assert stream.position == 0


def test_excluded_samples_are_left_out_and_positions_count_them():
    whole = drawn(SampleStream(seed=0, n=10), size=1, batches=30)
    stream = SampleStream(seed=0, n=10)
    stream.exclude(whole[2:4])
    kept = [i for i in whole if i not in whole[2:4]]
    assert drawn(stream, size=4, batches=6) == kept
    assert stream.position == whole[:30].index(kept[-1], 20) + 1
    first, indices = next(SampleStream.batches(stream, 1))
    assert first[0] not in whole[2:4]
    assert indices[0] >= stream.position


def test_skip_passes_over_samples():
    whole = drawn(SampleStream(seed=3, n=10), size=1, batches=20)
    stream = SampleStream(seed=3, n=10)
    stream.skip(13)
    assert drawn(stream, size=1, batches=7) == whole[13:]


def test_state_goes_on_where_it_was_saved():
    stream = SampleStream(seed=0, n=100)
    stream.exclude([1, 2, 3])
    drawn(stream, size=7, batches=20)
    state = stream.state_dict()
    other = SampleStream(seed=0, n=100)
    other.load_state_dict(state)
    assert drawn(other, size=5, batches=50) == drawn(stream, size=5, batches=50)
    assert state == {"position": state["position"], "excluded": [1, 2, 3]}


def test_what_cannot_be_excluded_or_skipped():
    stream = SampleStream(seed=0, n=4)
    with pytest.raises(UsageError, match=r"sample ids are in 0\.\.3, got 2\.\.4"):
        stream.exclude([2, 4])
    with pytest.raises(UsageError, match="all 4 training samples would be excluded"):
        stream.exclude(range(4))
    with pytest.raises(UsageError, match="expected n >= 0, got -1"):
        stream.skip(-1)
    assert stream.state_dict() == {"position": 0, "excluded": []}
