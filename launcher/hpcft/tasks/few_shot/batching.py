"""Which requests run together: those of like length, within a budget of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from hpcft.tasks.few_shot.requests import PromptRequest, row_tokens


def make_batches(
    requests: Sequence[PromptRequest], prefix: int, max_tokens: int
) -> list[list[int]]:
    """Indices of the requests of each batch, longest first, padding counted in the budget.

    A request that is longer than the budget runs alone. The longest come first, so that memory
    that does not suffice shows at once.
    """
    lengths = [row_tokens(request, prefix) for request in requests]
    found: list[list[int]] = []
    for index in sorted(range(len(requests)), key=lambda i: -lengths[i]):
        if found and (len(found[-1]) + 1) * lengths[found[-1][0]] <= max_tokens:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def split_batches(all_batches: Sequence[list[int]], ranks: int) -> list[list[list[int]]]:
    """The batches of each rank: as many on each, because a sharded model needs all at each step.

    Where they do not divide evenly, the shortest batch is run again; its indices tell that its
    results are known already.
    """
    missing = -len(all_batches) % ranks
    filled = [*all_batches, *([all_batches[-1]] * missing if all_batches else [])]
    return [filled[rank::ranks] for rank in range(ranks)]
