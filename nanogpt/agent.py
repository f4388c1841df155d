"""torchrun, with its end said in one line instead of a traceback. Options are torchrun's own."""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> int:
    """Exit code 0 after a signal, 1 when the ranks could not be kept alive."""
    # A restart is said by the rank that died (an error) and by the front end.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    try:
        run.main()
    except SignalException:
        return 0
    except ChildFailedError as error:
        name, failure = error.name, error.get_first_failure()[1]
        print(
            f"torchrun gave up: {name}, local rank {failure.local_rank}, exit {failure.exitcode}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
