"""`shoal serve`: bring up the endpoint, say so, and take everything down at the end."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from models.errors import EngineError

if TYPE_CHECKING:
    from models.pool import Pool
    from router.config import AppArgs

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Checkpoints to serve without a pool file: folders, .gguf files, "
            "hf:ORG/NAME[@REVISION], package:DISTRIBUTION/FILE.",
            show_default=False,
        ),
    ] = None,
    *,
    pool: Annotated[
        Path | None,
        typer.Option(help="A pool.yaml or its folder.  [default: the pool that comes with Shoal]"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file with the application's arguments.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is everywhere.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    local: Annotated[
        bool, typer.Option("--local", help="One process without Ray, for laptops and debugging.")
    ] = False,
) -> None:
    """Serve a pool of models behind an OpenAI-compatible endpoint, until Ctrl-C."""
    from models.inspection import write_pool
    from models.pool import load_pool
    from router.config import load_args
    from router.keeper import kept

    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        try:
            if sources and pool:
                raise ValueError("give checkpoints or --pool, not both")
            pool = write_pool(sources, Path(folder)) if sources else pool
            args = load_args(config, pool=pool)
            loaded = load_pool(args.pool)
            args = args.listening_on(host).started()
        except ValueError as error:
            _refuse(error)
        _describe(loaded)
        if not args.auth.required and host not in _LOOPBACK:
            _say(
                f"Anybody who reaches {host}:{port} may use it: set auth.required in the "
                "configuration, and make keys with `shoal keys create`."
            )
        _catch_signals(_interrupt)
        os.environ.setdefault("VLLM_RPC_BASE_PATH", folder)  # so that its sockets end with this
        with kept(Path(folder)):
            _serve(args, loaded, host, port, Path(folder), local=local)
    _say("Stopped.")


def _serve(args: AppArgs, pool: Pool, host: str, port: int, folder: Path, *, local: bool) -> None:
    from router.cluster import AddressInUse, check_free

    try:
        check_free(host, port)  # what an earlier server left there has ended
        if local:
            _serve_here(args, pool, host, port)
        else:
            _serve_on_ray(args, pool, host, port, folder)
    except AddressInUse as error:
        _refuse(error)
    except KeyboardInterrupt:
        pass


def _serve_on_ray(args: AppArgs, pool: Pool, host: str, port: int, folder: Path) -> None:
    from router.cluster import ClusterFailed, local_cluster, prepared_environment, watch
    from router.haproxy import drain, find_haproxy

    haproxy = find_haproxy()
    with prepared_environment(folder, haproxy):
        if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
            _say(f"Ray Serve's HAProxy ingress: {haproxy}")
        else:
            _say("Ray Serve's own HTTP proxy: no HAProxy binary, or it is switched off (slower)")
        if os.environ.get("RAY_SERVE_THROUGHPUT_OPTIMIZED") == "1":
            _say("Ray Serve's throughput-optimised request path is on.")
        from ray import serve

        from router.app import build
        from router.compose import check_ledger

        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        try:
            check_ledger(args)
            application = build(args)
        except ValueError as error:
            _refuse(error)
        _say("Starting Ray ...")
        try:
            with local_cluster():
                _catch_signals(_interrupt)  # Ray has put its own handlers there
                serve.start(http_options={"host": host, "port": port})
                logging.getLogger("ray.serve").setLevel(logging.ERROR)
                _say("Loading models ...")
                serve.run(application, name="shoal")
                _announce(host, port, args)
                _warn_of_ports(port)
                _reload_on_hangup(args, pool)
                try:
                    watch(host, port)
                except KeyboardInterrupt:
                    _say("Stopping: running requests are finished, new ones are not taken ...")
                    with contextlib.suppress(KeyboardInterrupt):  # a second signal: at once
                        drain(folder, args.ingress.drain_s)
                finally:
                    _catch_signals(signal.SIG_IGN)
        except ClusterFailed as error:
            _fail(str(error))
        except RuntimeError as error:
            _fail(f"the application could not start: {error}")


def _serve_here(args: AppArgs, pool: Pool, host: str, port: int) -> None:
    import asyncio

    from uvicorn.loops.auto import auto_loop_factory

    from router.compose import open_ledger, settle_in
    from router.editions import catalog_of
    from router.local import http_server, local_service
    from router.logs import set_up_logs

    async def run() -> None:
        set_up_logs(args.logs)
        catalog = catalog_of(args, pool)
        ledger = open_ledger(args)
        _say("Loading models ...")
        async with local_service(args, pool, catalog, ledger) as service:
            server = http_server(service, host=host, port=port, args=args)
            serving = asyncio.create_task(server.serve())
            while not server.started and not serving.done():  # noqa: ASYNC110 - has no event
                await asyncio.sleep(0.01)
            if server.started:
                settle_in()
                _announce(host, port, args)
                _reload_on_hangup(args, pool)
            await serving
            _say("Stopping ...")

    try:
        # uvloop costs less than asyncio's, and mostly sends an answer's head and body at once.
        with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
            runner.run(run())
    except ValueError as error:
        _refuse(error)
    except EngineError as error:
        _fail(f"An engine could not start: {error}")


def _describe(pool: Pool) -> None:
    _say(f"Pool {pool.name} ({pool.folder}):")
    for engine in pool.engines:
        names = ", ".join(model.name for model in pool.models_of(engine.name))
        _say(f"  engine {engine.name} ({engine.kind}): {names}")
    for name, model in pool.absent.items():
        _say(f"  without {name}, for which {model.otherwise} stands in: {model.why}")


def _announce(host: str, port: int, args: AppArgs) -> None:
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    body = {"model": "auto", "messages": [{"role": "user", "content": "What is 37 + 58?"}]}
    _say(
        f"Ready at http://{shown}:{port}/v1\n"
        f"  curl http://{shown}:{port}/v1/chat/completions "
        f"-H 'content-type: application/json' -d '{json.dumps(body)}'"
    )
    if args.dashboard.enabled:
        _say(f"Dashboard: http://{shown}:{port}/dashboard")


def _warn_of_ports(own: int) -> None:
    """Name what Ray opens wider than the host says; it has no switch for these."""
    from router.keeper import wide_ports

    others = sorted(port for port in wide_ports() if port != own)
    if others:
        _say(
            "Ray's replicas also listen on all interfaces, for calls among themselves that nothing "
            f"guards: ports {', '.join(map(str, others))}. Where others reach this machine, close "
            "them by a firewall."
        )


def _catch_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the signal's
    raise KeyboardInterrupt


def _reload_on_hangup(args: AppArgs, pool: Pool) -> None:
    """Read policies, limits and budgets anew on SIGHUP; a terminal that closes ends the server.

    What is checked here becomes an edition of the ledger's, which every replica follows.
    """
    had_terminal = _has_terminal()

    def reload() -> None:
        from router.compose import publish_reload

        try:
            _say(f"Reloaded: edition {publish_reload(args, pool)} is in force.")
        except Exception as error:
            typer.echo(f"shoal serve: nothing was reloaded: {error}", err=True)

    def on_hangup(*_: object) -> None:
        if had_terminal and not _has_terminal():
            signal.raise_signal(signal.SIGTERM)
        threading.Thread(target=reload, daemon=True).start()

    signal.signal(signal.SIGHUP, on_hangup)


def _has_terminal() -> bool:
    try:
        with Path("/dev/tty").open():
            return True
    except OSError:
        return False


def _say(text: str) -> None:
    typer.echo(text)
    sys.stdout.flush()


def _refuse(error: Exception) -> NoReturn:
    """End with what the user got wrong."""
    typer.echo(f"shoal serve: {error}", err=True)
    raise typer.Exit(2)


def _fail(message: str) -> NoReturn:
    typer.echo(f"shoal serve: {message}", err=True)
    raise typer.Exit(1)
