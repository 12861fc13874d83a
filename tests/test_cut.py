"""The cut against brute force over all labellings."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.analyse.cut import INFINITE, Network

EDGES = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(1, 20)), max_size=20)


def cut_price(edges: list[tuple[int, int, int]], source_side: set[int]) -> int:
    return sum(price for start, end, price in edges if start in source_side and end not in source_side)


@given(EDGES)
@settings(max_examples=150)
def test_cut_is_the_cheapest_of_all_labellings(edges: list[tuple[int, int, int]]) -> None:
    network = Network()
    for _ in range(5):
        network.vertex()
    for start, end, price in edges:
        network.edge(start, end, float(price))
    found = cut_price(edges, network.source_side())
    best = min(
        cut_price(edges, {0, *chosen}) for size in range(6) for chosen in itertools.combinations(range(2, 7), size)
    )
    assert found == best


def test_infinite_edge_is_never_cut_and_long_chains_do_not_recurse() -> None:
    network = Network()
    chain = [network.vertex() for _ in range(5000)]
    network.edge(Network.SOURCE, chain[0], 5.0)
    for before, after in itertools.pairwise(chain):
        network.edge(before, after, INFINITE)
    network.edge(chain[-1], Network.SINK, 3.0)
    side = network.source_side()
    assert set(chain) <= side and Network.SINK not in side
