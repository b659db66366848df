"""A server's replicas on Ray Serve: started, and taken down."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lorry.core.errors import OptionError
from lorry.serving.cluster.front import Front
from lorry.serving.cluster.options import ClusterOptions
from lorry.serving.cluster.replica import Replica
from lorry.serving.http.guard import MOST_BYTES
from lorry.serving.http.state import Serving

#: The application's name in Ray Serve.
NAME = "lorry"
#: The address that starts Ray on this machine, for as long as this program runs.
LOCAL = "local"


def connect(address: str, **options: Any) -> None:
    """Connect to Ray, or start it here.

    Parameters
    ----------
    address
        Of a cluster, ``auto`` for the one that runs on this machine, or ``local`` to start one.
    options
        Further ones of ``ray.init``.

    Raises
    ------
    OptionError
        Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise OptionError("Replicas run on Ray Serve, which is not installed: pip install 'lorry[cluster]'.") from error
    if ray.is_initialized():
        return
    if address == LOCAL:  # Ray gives its workers little priority as a rule; here they are what users wait for
        os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(address=address, include_dashboard=False if address == LOCAL else None, **options)
    except (ConnectionError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise OptionError(f"--ray {address}: no cluster of Ray was found there ({said}). Give --ray local.") from error


def deploy(
    make: Callable[[], Serving],
    base: str,
    adapters: Mapping[str, Path],
    options: ClusterOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    patience: float = 60.0,
    most_bytes: int = MOST_BYTES,
    hosts: Collection[str] | None = None,
) -> str:
    """Start the replicas on the cluster that this process is connected to, and return the server's address.

    Parameters
    ----------
    make
        Returns an engine with what belongs to it, without adapters; called in each replica.
    base, adapters
        The base's name, and the adapters that are known from the start. They must lie where every replica reads them.
    options
        How many replicas, and what each takes.
    host, port
        Where Ray Serve's HTTP proxy listens.
    patience
        Seconds for what still runs in a replica that is taken down.
    most_bytes, hosts
        As for `create_app`.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions

    o = options
    scaling = {"min_replicas": o.replicas, "max_replicas": o.most_replicas, "target_ongoing_requests": o.target}
    replicas = serve.deployment(
        num_replicas="auto" if o.most_replicas else o.replicas,
        autoscaling_config=scaling if o.most_replicas else None,
        max_ongoing_requests=o.ongoing,
        max_queued_requests=o.queue,
        health_check_period_s=o.health_seconds,
        health_check_timeout_s=o.health_patience,
        graceful_shutdown_timeout_s=patience,
        ray_actor_options={"num_cpus": o.replica_cpus, "num_gpus": o.replica_gpus},
    )(Replica)
    front = serve.deployment(
        max_ongoing_requests=o.ongoing * (o.most_replicas or o.replicas) + o.queue,
        graceful_shutdown_timeout_s=patience,
        ray_actor_options={"num_cpus": 0},
    )(Front)
    app_options = {"most_bytes": most_bytes, "hosts": hosts}
    bound = replicas.bind(make, o.held, o.health_patience, app_options)
    serve.start(http_options=HTTPOptions(host=host, port=port))
    serve.run(front.bind(bound, base, dict(adapters), most_bytes), name=NAME, route_prefix="/")
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def take_down() -> None:
    """End the replicas, and Ray if it was started here."""
    import ray
    from ray import serve

    if not ray.is_initialized():
        return
    serve.shutdown()  # type: ignore[no-untyped-call]
    ray.shutdown()
