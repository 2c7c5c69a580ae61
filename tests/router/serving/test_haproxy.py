"""Ray's HAProxy configuration, completed."""

import subprocess
from pathlib import Path

import pytest

from router.haproxy import HEADER_TIMEOUT_S, complete, find_haproxy, most_connections

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using extra keyword arguments:DeprecationWarning"  # Ray Serve's, at its first import
)


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What Ray Serve itself writes, without any application."""
    from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig

    folder = tmp_path_factory.mktemp("haproxy")
    config = HAProxyConfig(
        socket_path=f"{folder}/admin.sock",
        server_state_base=str(folder),
        server_state_file=f"{folder}/server-state",
    )
    file = folder / "haproxy.cfg"
    HAProxyApi(config, config_file_path=str(file))._generate_config_file_internal()
    return file.read_text()


def test_bounds_what_clients_can_hold(configuration: str) -> None:
    """Heads have a time, addresses a share, and statistics listen on loopback only."""
    text = complete(configuration)
    assert f"timeout http-request {HEADER_TIMEOUT_S}s" in text
    assert f"sc0_conn_cur gt {most_connections() // 4}" in text
    binds = [line.split()[1] for line in text.splitlines() if line.strip().startswith("bind ")]
    public = [bind for bind in binds if not bind.startswith("127.0.0.1:")]
    assert public == [bind for bind in public if "8000" in bind]
    assert len(binds) == 3
    assert "mode 666" not in text


def test_completing_twice_adds_nothing(configuration: str) -> None:
    """A reload starts with what is complete already."""
    assert complete(complete(configuration)) == complete(configuration)


def test_haproxy_takes_it(configuration: str, tmp_path: Path) -> None:
    """The real HAProxy finds no fault with the result."""
    binary = find_haproxy()
    if binary is None:
        pytest.skip("no HAProxy is installed")
    file = tmp_path / "haproxy.cfg"
    file.write_text(complete(configuration))
    checked = subprocess.run(
        [binary, "-c", "-f", str(file)], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
