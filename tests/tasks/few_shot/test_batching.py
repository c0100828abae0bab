"""Checks that batches keep their budget, and that ranks get equally many."""

from __future__ import annotations

import pytest

from builders import SHARED, prompt_requests
from hpcft.tasks.few_shot.batching import make_batches, split_batches
from hpcft.tasks.few_shot.requests import count_row_tokens


def test_make_batches_keeps_budget_and_holds_every_request_once() -> None:
    requests = prompt_requests(count=23)
    batches = make_batches(requests, SHARED, 100)
    assert sorted(i for batch in batches for i in batch) == list(range(23))
    lengths = [[count_row_tokens(requests[i], SHARED) for i in batch] for batch in batches]
    assert all(len(batch) * max(batch) <= 100 for batch in lengths)
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)
    assert make_batches(requests, SHARED, 1) == [[i] for batch in batches for i in batch]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_split_batches_gives_ranks_equally_many(ranks: int) -> None:
    batches = make_batches(prompt_requests(count=23), SHARED, 100)
    by_rank = split_batches(batches, ranks)
    assert len({len(own) for own in by_rank}) == 1
    assert {tuple(batch) for own in by_rank for batch in own} == set(map(tuple, batches))
    assert split_batches([], ranks) == [[]] * ranks
