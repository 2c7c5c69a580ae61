"""A Ray cluster of one machine that lives as long as `shoal serve`.

The environment must be prepared before Ray is imported: Ray Serve reads its switches then.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import logging
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NoReturn

from router.haproxy import CLIENT_TIMEOUT_S, most_connections, write_launcher
from router.keeper import children, is_running
from router.ports import free_port

_OBJECT_STORE_BYTES = 80 * 2**20  # answers travel inline; Ray's minimum is 75 MB
_SHARED_MEMORY = Path("/dev/shm")
_START_ATTEMPTS = 3  # Ray gives up after 30 s, which a busy machine may need
_STOP_S = 20.0
_WATCH_S = 0.5
_REFUSED_S = 20.0  # Ray starts another HAProxy in a few, or in more where the machine is busy
_CORE: Final = ("gcs_server", "raylet")


class ClusterFailed(RuntimeError):
    """Ray did not come up."""


class AddressInUse(ValueError):
    """Somebody listens there already."""


def check_free(host: str, port: int) -> None:
    """Raise `AddressInUse` if `port` of `host` cannot be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise AddressInUse(
                f"{host}:{port} cannot be listened on ({error.strerror}); "
                "choose another with --host and --port"
            ) from None


@contextlib.contextmanager
def prepared_environment(folder: Path, haproxy: str | None) -> Iterator[None]:
    """Set Ray's switches for as long as the cluster lives; what the user has set stays.

    Each cluster keeps its own files in `folder` and has its own ports, so that two can run on one
    machine.
    """
    wanted = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # The parts of one machine talk over loopback only, as Ray does by itself on other systems.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Ray yields to all other programs of a busy machine, a server must not.
        "RAY_worker_niceness": "0",
        # A busy machine takes longer than the default 5 s to start the HTTP proxy.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        # HAProxy, or its manager, that fails three checks is replaced.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "1",
        # A replica that does not answer will finish nothing: it is not waited for.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        # What stands still does not heed SIGTERM either; replicas have been drained before it.
        "RAY_kill_worker_timeout_milliseconds": "1000",
        # Nobody else sends requests here once the command ends.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.5",
    }
    if haproxy is not None:
        wanted |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(write_launcher(folder, haproxy)),
            "RAY_SERVE_HAPROXY_MAXCONN": str(most_connections()),
            "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(CLIENT_TIMEOUT_S),
            # Replicas that stand still get no new requests after three checks of a second.
            "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
            "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "3",
            "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        }
    added = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextlib.contextmanager
def local_cluster() -> Iterator[None]:
    """Start Ray on this machine; stop Ray Serve and every process of Ray's at the end.

    Raises `ClusterFailed` if Ray does not come up. Where the block raises it, a part of Ray is
    gone: asking the others to stop may never end, and `keeper` ends them.
    """
    import ray  # noqa: PLC0415

    _start_ray()
    try:
        yield
    except ClusterFailed:
        atexit.unregister(ray.shutdown)  # waits for what is gone
        raise
    except BaseException:
        _stop_in_time()
        raise
    _stop_in_time()


def watch(host: str, port: int) -> NoReturn:
    """Wait for as long as the cluster serves; raises `ClusterFailed` when a part of it is gone.

    Ray replaces replicas by itself; its own core processes, and a front that does not come back,
    it does not.
    """
    core = {pid: name for pid, name in children().items() if name in _CORE}
    refused_since_s: float | None = None
    while True:
        time.sleep(_WATCH_S)
        for pid, name in core.items():
            if not is_running(pid):
                raise ClusterFailed(f"Ray's {name} has ended")
        # A busy or restarting server accepts and is slow; only nobody at all counts.
        if _is_listening(host, port):
            refused_since_s = None
            continue
        refused_since_s = refused_since_s or time.monotonic()
        if time.monotonic() - refused_since_s > _REFUSED_S:
            raise ClusterFailed(f"nobody listens at {host}:{port} any more")


def _is_listening(host: str, port: int) -> bool:
    try:
        with socket.create_connection((_reachable(host), port), timeout=_WATCH_S):
            return True
    except ConnectionRefusedError:
        return False
    except OSError:
        return True


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _stop_in_time() -> None:
    """Stop Ray, or leave it to `keeper` where that takes too long."""
    stopping = threading.Thread(target=_stop_ray, daemon=True)
    stopping.start()
    stopping.join(_STOP_S)


def _stop_ray() -> None:
    import ray  # noqa: PLC0415
    from ray import serve  # noqa: PLC0415

    # Ray prints how its own controller ends; nobody can act on that.
    nowhere = io.StringIO()
    with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        with contextlib.suppress(Exception):
            serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def _start_ray() -> None:
    import ray  # noqa: PLC0415

    shared = shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else 0
    for attempt in range(_START_ATTEMPTS):
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                object_store_memory=_OBJECT_STORE_BYTES,
                # A container's /dev/shm may be smaller than any object store.
                _plasma_directory=(
                    None if shared > 2 * _OBJECT_STORE_BYTES else tempfile.gettempdir()
                ),
            )
        except Exception as error:  # Ray raises bare exceptions here
            ray.shutdown()
            if attempt + 1 == _START_ATTEMPTS:
                raise ClusterFailed(f"Ray did not start: {error}") from error
        else:
            return
