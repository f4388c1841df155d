"""Makes some requests deadly. Python imports this at start when its directory is on PYTHONPATH.

A prompt of token ids that begins with MARK does to its rank what the next id says, in each step
that computes it. Nothing of this is reachable in the product: it patches the model runner of a
process that a test has started.
"""

import importlib.abc
import importlib.util
import os
import signal
import sys
import time

MARK = [60, 61, 62, 60]
MEMORY, SEGMENTATION_FAULT, HANG, EXIT_0, KILL, GLUTTON = range(1, 7)


def _act(what: int) -> None:
    if what == MEMORY:
        bytearray(2**50)  # what malloc refuses
    if what == SEGMENTATION_FAULT:
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == EXIT_0:
        os._exit(0)
    if what == KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    eaten = []
    while True:
        if what == GLUTTON:  # what the kernel does not refuse, until it kills
            eaten.append(b"x" * 2**26)
        else:
            time.sleep(1)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "nanogpt.engine.model_runner":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_patch(module) -> None:
            load(module)
            run = module.ModelRunner.run

            def run_or_die(self, batch):
                for chunk in batch.chunks:
                    if chunk.seq.tokens[: len(MARK)] == MARK:
                        _act(chunk.seq.tokens[len(MARK)])
                return run(self, batch)

            module.ModelRunner.run = run_or_die

        spec.loader.exec_module = load_and_patch
        return spec


if any(argument.endswith("rank_worker.py") for argument in sys.orig_argv[:3]):
    sys.meta_path.insert(0, _Finder())
