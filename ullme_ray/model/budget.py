"""How many tokens go into one forward pass: timed on the device before the work, halved when its memory runs out.

Timing costs up to 20 seconds once per process, with a large model on a CPU; a small one takes a moment. Too small a batch
leaves the device idle between kernels, too large a one runs out of cache (CPU) or memory; in between the rate is flat, so the
smallest budget near the best is taken.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ullme_ray.errors import EmbedError

_NEAR_BEST = 0.97
_CANDIDATES = {"cpu": [2**n for n in range(8, 14)], "cuda": [2**n for n in range(11, 19)]}  # 256 to 8k, 2k to 256k tokens
# Of timing, about; a budget that would take longer is not tried. Too short a time ends at small budgets on a CPU, where a
# model of 135M parameters runs a thousand tokens a second: 3 s once ended at 512 tokens, far from the best.
TIMING_S = 20.0
_ENOUGH_S = 0.7  # one budget timed for so long is not run once more
_REPEATS = 3  # at most
_OUT_OF_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # RuntimeErrors of torch's CPU allocator, of cuBLAS


@dataclass
class TokenBudget:
    """Tokens of one forward pass; it shrinks when memory runs out, and stays so for the work that follows."""

    tokens: int
    positions: int = 0  # run so far, padding included

    def work(self, lengths: Sequence[int], forward: Callable[[list[int]], None], *, padded: bool) -> None:
        """Calls `forward` with the numbers of the rows of each batch, so that every row is done once. Longest rows first.

        Args:
            padded: rows cost as much as the longest of their batch, else as many tokens as they have.

        Raises:
            EmbedError: memory does not hold a single row.
        """
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        done = 0
        while done < len(order):
            count = count_rows([lengths[row] for row in order[done : done + self.tokens]], self.tokens, padded=padded)
            rows = order[done : done + count]
            size = count * lengths[rows[0]] if padded else sum(lengths[row] for row in rows)
            if _has_memory_for(forward, rows):
                done += count
                self.positions += size
            elif count == 1:
                raise EmbedError(
                    f"a single text of {lengths[rows[0]]} tokens does not fit into memory beside the model; lower "
                    f"model.max_tokens, let fewer processes share the machine or GPU, or take one with more memory"
                )
            else:
                self.tokens = size // 2


def count_rows(lengths: Sequence[int], tokens: int, *, padded: bool) -> int:
    """How many of the first rows, longest first, make one batch of at most `tokens`; a longer row goes alone."""
    if padded:
        return max(1, min(len(lengths), tokens // max(1, lengths[0])))
    total = 0
    for count, length in enumerate(lengths):
        total += length
        if total > tokens:
            return max(1, count)
    return len(lengths)


def token_budget_batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Row numbers grouped so that rows x longest row stays within the budget; a longer row goes alone. Longest first."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        rows = order[start : start + tokens_per_batch]
        count = count_rows([lengths[row] for row in rows], tokens_per_batch, padded=True)
        yield rows[:count]
        start += count


def _has_memory_for(forward: Callable[[list[int]], None], rows: list[int]) -> bool:
    try:
        forward(rows)
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if not any(words in str(error) for words in _OUT_OF_MEMORY):
            raise
    else:
        return True
    # Here, outside of `except`, the error no longer holds the frames whose tensors fill the memory.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def find_budget(
    forward: Callable[[int], None],
    device: str,
    *,
    limit_s: float = TIMING_S,
    clock: Callable[[], float] = time.perf_counter,
) -> TokenBudget:
    """Times batches of growing size and takes the smallest that is within 3 % of the best.

    Args:
        forward: runs the model once over about as many tokens as it is told, and waits for the result.
        device: cpu or cuda.
        limit_s: of timing, about; with less, large batches of a slow model stay untried.
        clock: in seconds.
    """
    candidates = _CANDIDATES[device]
    rates: dict[int, float] = {}
    seconds: list[float] = []

    def timed(tokens: int) -> bool:
        def run(_: list[int]) -> None:
            start = clock()
            forward(tokens)
            seconds.append(clock() - start)

        return _has_memory_for(run, [])

    fits = timed(candidates[0])  # warms up, and is not counted
    left = limit_s - sum(seconds)
    for tokens in candidates:
        seconds_before = min(seconds, default=0.0)
        if not fits or 2 * seconds_before > left:
            break
        seconds.clear()
        while fits and len(seconds) < _REPEATS and sum(seconds) < _ENOUGH_S:
            fits = timed(tokens)
        if not fits:
            break
        rates[tokens] = tokens / min(seconds)
        left -= sum(seconds)
        if len(rates) > 2 and max(list(rates.values())[-2:]) < _NEAR_BEST * max(rates.values()):
            break
    best = max(rates.values(), default=0.0)
    return TokenBudget(next((tokens for tokens, rate in rates.items() if rate >= _NEAR_BEST * best), candidates[0]))
