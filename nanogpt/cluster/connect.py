"""Opens the front end's connection to its cluster."""

import logging
from collections.abc import Callable
from urllib.parse import urlsplit

from nanogpt.cluster.client import ClusterClient, ClusterStatus
from nanogpt.cluster.hold import Hold
from nanogpt.cluster.residency import Residency
from nanogpt.cluster.transport import FrontEndSockets
from nanogpt.cluster.watch import Watch
from nanogpt.config import ServeConfig
from nanogpt.registry import ModelInfo
from nanogpt.rundir import RunDir

log = logging.getLogger(__name__)


def connect(
    config: ServeConfig,
    run_dir: RunDir,
    *,
    owner_pid: int,
    on_ready: Callable[[ClusterStatus, dict[str, ModelInfo]], None],
    on_orphaned: Callable[[], None],
) -> ClusterClient:
    """A started client. With several nodes the ranks of the others come in over tcp, on the
    address under which they know this node. Call after the last fork of this process."""
    remote_host = ""
    if config.nnodes > 1:
        remote_host = urlsplit(f"//{config.rdzv_endpoint}").hostname or ""
    residency = Residency(
        wait_s=config.residency.wait_s,
        pinned=[*config.residency.pinned, *(run_dir.models("pinned") or ())],
    )

    def save_models(resident: list[str], pinned: list[str]) -> None:
        try:
            run_dir.set_models("resident", resident)
            run_dir.set_models("pinned", pinned)
        except OSError as error:  # a full disk
            log.error("after a restart other models may be in memory: %s", error)

    client = ClusterClient(
        lambda: FrontEndSockets(run_dir.control, run_dir.events, remote_host),
        watch=Watch(watchdog_s=config.cluster.watchdog_s),
        max_outstanding=config.cluster.max_outstanding,
        on_ready=on_ready,
        on_orphaned=on_orphaned,
        owner_pid=owner_pid,
        hold=Hold(run_dir.is_reload_asked, run_dir.set_held, config.http.drain_s),
        residency=residency,
        save_models=save_models,
    )
    client.start()
    return client
