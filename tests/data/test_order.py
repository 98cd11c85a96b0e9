import pytest

from data_prep.training.order import EpochOrder


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 255, 1000, 4096, 4097])
def test_every_entry_comes_exactly_once(n):
    for epoch in range(3):
        order = EpochOrder(n, 1234, epoch)
        assert sorted(order[i] for i in range(n)) == list(range(n))


def test_seed_and_epoch_give_other_orders():
    orders = {tuple(EpochOrder(100, seed, epoch)[i] for i in range(100)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_the_order_is_frozen():
    """Runs resume in this order: a change here breaks every checkpoint in use."""
    order = EpochOrder(1000, 1234, 2)
    assert [order[i] for i in range(8)] == [942, 213, 37, 728, 631, 343, 419, 500]


def test_entries_are_uniform_and_unrelated_to_their_neighbours():
    n, trials = 50, 4000
    counts = [0] * n
    neighbours = 0
    for epoch in range(trials):
        order = EpochOrder(n, 7, epoch)
        counts[order[0]] += 1
        neighbours += order[20] + 1 == order[21]
    expected = trials / n
    chi2 = sum((count - expected) ** 2 / expected for count in counts)
    assert chi2 < 95  # 49 degrees of freedom: 0.9999 quantile
    assert 40 < neighbours < 130  # a random order has 80 +- 9


def test_positions_outside_are_refused():
    order = EpochOrder(10, 0, 0)
    for position in (-1, 10):
        with pytest.raises(IndexError, match="10 windows"):
            order[position]
