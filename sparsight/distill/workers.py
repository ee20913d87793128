"""What data-parallel workers need of each other: how many there are, which one this is, and sums over all.

Without an initialised torch.distributed group there is one worker, and sums are what went in.
"""

import torch
import torch.distributed as dist


def worker_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def worker_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_workers(values: torch.Tensor) -> torch.Tensor:
    """The detached sum of every worker's tensor of this shape. All workers must call it, in the same order."""
    total = values.detach().clone()
    if worker_count() > 1:
        dist.all_reduce(total)
    return total
