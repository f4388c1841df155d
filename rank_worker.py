"""One process for each GPU (or share of the CPU), started by torchrun.

    launch.sh, or:  torchrun --nproc-per-node 4 rank_worker.py --config configs/serve/X.toml

It imports torch, and then keeps a child alive which is the rank: that one loads the models, joins
the process group, and turns its loop: take commands from the broadcast, run a step of each engine,
send events. Rank 0's parent also sees to it that a front end is there.
"""

import contextlib
import logging
import os
import signal
import sys
from types import FrameType

from nanogpt import log as logging_setup
from nanogpt import options, process
from nanogpt.cluster import respawn
from nanogpt.cluster.departure import Departure
from nanogpt.cluster.keeper import LOCK, OWNER_VARIABLE, FrontEndKeeper
from nanogpt.cluster.suspicion import PEER_LOST
from nanogpt.config import ServeConfig
from nanogpt.errors import EngineError, StartupError
from nanogpt.ranks import Ranks
from nanogpt.rundir import RunDir

log = logging.getLogger("rank_worker")


def serve(config: ServeConfig, ranks: Ranks, run_dir: RunDir, life: respawn.Life) -> int:
    """The rank: load what there is to begin with, then turn the loop until this process ends."""
    from nanogpt.cluster.broadcast import PeerLost
    from nanogpt.cluster.lead import Lead
    from nanogpt.cluster.process_group import open_group
    from nanogpt.cluster.rank_loop import RankLoop
    from nanogpt.cluster.transport import ControlLink
    from nanogpt.engine.models import Models
    from nanogpt.engine.plan import Plan, Planner
    from nanogpt.engine.setup import arithmetic, choose_device, models_budget

    try:
        group = open_group(ranks, config.cluster.node_wait_s)
        ranks, broadcast = group.ranks, group.broadcast
        device = choose_device(config, ranks)
        models = Models(config, ranks, device)
        planner, word = None, b""
        if ranks.rank == 0:
            budget = models_budget(config, ranks, device)
            planner = Planner(config, device, run_dir.descriptions, models.load, budget)
            plan = planner.plan(run_dir.models("resident"), run_dir.models("pinned") or ())
            word = plan.encode()
        engines, loaded = models.open(Plan.decode(broadcast.tell(word)))
        fingerprints = {name: engine.info.fingerprint for name, engine in engines.items()}
        group.agree(fingerprints, arithmetic(device))
        lead = None
        if planner:
            planner.note(loaded, models.blocks)
            infos, needs = tuple(planner.infos.values()), planner.ordered_needs()
            hello = Lead.hello(ranks.world_size, infos, needs, planner.budget)
            control = ControlLink(run_dir.control)
            lead = Lead(control, broadcast, hello, config.cluster.heartbeat_s)
        loop = RankLoop(
            ranks,
            engines,
            broadcast,
            lead,
            config.cluster.heartbeat_s,
            life,
            models,
        )
        while True:
            loop.turn()
    except StartupError as error:
        return refuse(error, run_dir)
    except PeerLost as error:
        log.error("%s", error)
        return PEER_LOST
    except EngineError as error:
        log.error("%s", error)
        return 1


def refuse(error: StartupError, run_dir: RunDir | None) -> int:
    """Say why starting is of no use, and have nobody try again unless it has been of use before."""
    if run_dir is not None and not run_dir.set_fatal(str(error)):
        log.error("can't start at present: %s", error)
        return 1
    print(f"error: {error}", file=sys.stderr, flush=True)
    return respawn.NO_USE


def preload() -> None:
    """Import what the rank needs, so that the next one has it at once."""
    import nanogpt.cluster.lead
    import nanogpt.cluster.process_group
    import nanogpt.cluster.rank_loop
    import nanogpt.engine.models
    import nanogpt.engine.plan  # noqa: F401


class Parent:
    """A rank's parent: keeps the rank alive, and on rank 0 the front end."""

    def __init__(self, config: ServeConfig, argv: list[str], ranks: Ranks, run_dir: RunDir) -> None:
        self._config, self._ranks, self._run_dir = config, ranks, run_dir
        self._torchrun = process.open_pidfd(os.getppid())
        owner = int(os.environ.get(OWNER_VARIABLE, os.getppid()))
        self._owner = process.open_pidfd(owner)
        self._keeper = FrontEndKeeper(run_dir, argv, owner) if ranks.rank == 0 else None
        self._life = respawn.Life()
        self._patience = respawn.Patience(config.cluster.stuck_s, config.cluster.watchdog_s)
        self._departure = Departure(
            lambda: self._life.has_group, self._front_end, config.http.drain_s
        )
        if OWNER_VARIABLE in os.environ:
            signal.signal(signal.SIGTERM, self._leave)
        else:  # a bare torchrun: nobody else drains
            signal.signal(signal.SIGTERM, self._departure.ask)
            if self._keeper:
                run_dir.clear_marks()

    def _front_end(self) -> int | None:
        return self._run_dir.holder(LOCK) if self._keeper else None

    def tick(self) -> bool:
        """Whether it is time to go."""
        if self._take_along():
            log.error("the launcher is gone: leaving too")
            return True
        if self._departure.is_asked:
            return self._departure.is_due()
        if self._keeper:
            self._keeper.ensure()
        return False

    def _leave(self, number: int, frame: FrameType | None) -> None:
        """torchrun says so: at once, whatever runs."""
        self._take_along()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    def _take_along(self) -> bool:
        """Whether the launcher is gone. If so, those are ended who may be stopped, and would stay:
        torchrun and the front end."""
        if self._owner is not None and not process.has_ended(self._owner):
            return False
        if (front_end := self._front_end()) is not None:
            with contextlib.suppress(ProcessLookupError):  # it has left by itself
                os.killpg(front_end, signal.SIGKILL)
        if self._torchrun is not None:
            process.kill(self._torchrun)
        return True

    def keep_alive(self) -> int:
        try:
            return respawn.keep_alive(self._life, self._patience, self._work, self.tick)
        finally:
            self._departure.finish()

    def _work(self) -> int:
        """In the child: it ends with its parent, and by no signal that the parent handles."""
        ours = OWNER_VARIABLE in os.environ
        signal.signal(signal.SIGTERM, signal.SIG_DFL if ours else signal.SIG_IGN)
        return serve(self._config, self._ranks, self._run_dir, self._life)


def main(argv: list[str]) -> int:
    config = options.parse_or_exit(argv)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the launcher's
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's: leave at once, whatever runs
    run_dir = None
    try:
        run_dir = RunDir.open(config.host, config.port)
        ranks = Ranks.from_environment(
            os.environ, config.node_rank, config.nnodes, config.rdzv_endpoint
        )
        process.die_with_parent(os.getppid())
        process.keep_freed_memory()
        process.spin_briefly()
        process.no_blas_threads()
        logging_setup.set_up(config.log_level, f"rank {ranks.rank}")
        parent = Parent(config, argv, ranks, run_dir)
        parent.tick()  # the front end starts while this process imports torch
        preload()
        return parent.keep_alive()
    except StartupError as error:
        return refuse(error, run_dir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
