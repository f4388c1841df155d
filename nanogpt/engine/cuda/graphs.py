"""A decode step as CUDA graphs: one for each number of rows, replayed without Python in between.

A small network is hundreds of kernels of a few microseconds each; launching them one by one from
Python takes longer than running them. A graph is launched at once.
"""

import logging
from collections.abc import Callable, Sequence

import torch

log = logging.getLogger(__name__)

WARM_UPS = 2  # what is compiled, chosen or allocated at first use must not be while recording


class GraphedStep:
    """A function of a number of rows, which must use static tensors only, recorded for `buckets`.

    Largest first: the others then find their memory in the pool that all share. That is safe
    because one graph runs at a time, and leaves nothing in the pool that another one needs.
    """

    @torch.inference_mode()
    def __init__(self, step: Callable[[int], None], buckets: Sequence[int]) -> None:
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        for rows in sorted(buckets, reverse=True):
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    step(rows)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                step(rows)
            self._graphs[rows] = graph
        torch.cuda.current_stream().wait_stream(stream)
        log.debug("recorded %d graphs", len(self._graphs))

    def __call__(self, rows: int) -> None:
        self._graphs[rows].replay()
