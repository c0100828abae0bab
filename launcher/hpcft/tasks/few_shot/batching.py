"""Groups requests of similar length into batches, within a budget of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from hpcft.tasks.few_shot.requests import PromptRequest, count_row_tokens


def make_batches(
    requests: Sequence[PromptRequest], prefix_length: int, max_tokens: int
) -> list[list[int]]:
    """Returns the indices of the requests of each batch, longest first.

    Padding counts in the budget, and a request that is longer than the budget runs alone. The
    longest come first, so that a lack of memory shows at once.

    Args:
        requests: all requests.
        prefix_length: number of leading tokens that no batch runs again.
        max_tokens: budget of a batch.
    """
    lengths = [count_row_tokens(request, prefix_length) for request in requests]
    batches: list[list[int]] = []
    for index in sorted(range(len(requests)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def split_batches(batches: Sequence[list[int]], ranks: int) -> list[list[list[int]]]:
    """Splits the batches among ranks, equally many to each, as a sharded model needs.

    If they do not divide evenly, the last batch, the shortest, is run again; its indices show that
    its results are there already.
    """
    missing = -len(batches) % ranks
    filled = [*batches, *([batches[-1]] * missing if batches else [])]
    return [filled[rank::ranks] for rank in range(ranks)]
