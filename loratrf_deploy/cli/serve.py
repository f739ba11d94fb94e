"""loratrf-serve: an exported model behind HTTP, in which each request names its own adapter."""

from __future__ import annotations

import argparse
import logging
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, some
from ..formats.manifest import MANIFEST, read_manifest
from ..genai.folder import CONFIG_FILE
from .shared import Parser, command, count, named_paths, positive, print_json, require_extra

if TYPE_CHECKING:
    from ..serving.app import Service

__all__ = ["main"]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """loratrf-serve --model DIR --adapters-dir DIR: answers until it is told to stop. Exit 0 stopped by SIGTERM or
    Ctrl-C, when what ran was done; 2 the input is at fault.

    Where it listens goes to stdout when it does; --json has it for programs.
    """
    args = _parser().parse_args(argv)
    require_extra("serve")
    if args.allow_loading and args.adapters_dir is None:
        raise UserError(
            "--allow-loading takes files of --adapters-dir alone, and there is none. Name the folder that clients may "
            "load from: --adapters-dir DIR."
        )
    from ..serving.app import build

    service = _service(args)
    listening = _listen(args.host, args.port)
    _announce(args, service, listening)
    _serve(build(service), listening)
    return 0


def _service(args: argparse.Namespace) -> Service:
    from ..serving.app import Service
    from ..serving.batcher import Limits
    from ..serving.catalogue import Catalogue
    from ..serving.encoder import Encoder
    from ..serving.generator import Generator
    from ..serving.metrics import Metrics

    folder = args.model.parent if args.model.suffix == ".onnx" else args.model
    manifest = read_manifest(folder / MANIFEST)
    if manifest.swappable is None:
        raise UserError(
            f"{folder} takes no adapters at run time ({manifest.summary}), and this server is for those that do. "
            "Export it with --adapters NAME=PATH ..., or --swappable base."
        )
    limits, metrics = Limits(args.max_batch, args.window, args.queue, args.timeout), Metrics()
    memory: dict[str, Any] = {"max_bytes": args.max_bytes, "threads": args.threads}
    model: Encoder | Generator
    if (folder / CONFIG_FILE).is_file():
        require_extra("genai")
        model = Generator(folder, limits, metrics, parallel=args.parallel, **memory)
    else:
        require_extra("cpu")
        model = Encoder(folder, **memory)
    base = args.name or folder.resolve().name
    catalogue = Catalogue(model.session, base, named_paths(args.adapter, "--adapter"), args.adapters_dir)
    return Service(model, catalogue, limits, metrics, args.allow_loading)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[:2], family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"Can't listen at {host}, port {port}: {reason}. Choose another --port (0: any that is free) or --host."
        ) from error
    # An answer is two writes, and without this the second waits until the client acknowledges the first: 40 ms. asyncio
    # sees to it for sockets that name TCP as their protocol, which create_server's don't.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _announce(args: argparse.Namespace, service: Service, listening: socket.socket) -> None:
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    base, adapters = service.catalogue.base, service.catalogue.names()
    if args.json:
        print_json({"url": url, "base": base, "adapters": adapters})
    else:
        print(f"{base} at {url}, adapters: {some(adapters) or 'none'}. Try it there, or see {url}/docs.", flush=True)


def _serve(app: Any, listening: socket.socket) -> None:
    import uvicorn

    from ..serving.guard import Impatient

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config = uvicorn.Config(
        app,
        http=Impatient,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=1 << 20,  # longer ones are refused by the guard, in words
        timeout_keep_alive=30,
    )
    server = uvicorn.Server(config)
    # When all is done uvicorn raises again what told it to stop, for whoever handled it before: that is us.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    server.run([listening])


def _parser() -> Parser:
    parser = Parser("loratrf-serve", "Serve an exported model over HTTP, each request under the adapter it names.")
    parser.add_argument(
        "--model", required=True, type=Path, help="the folder of an export with --adapters or --swappable"
    )
    parser.add_argument("--name", help="what requests call the base (default: the folder's name)")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="an .onnx_adapter that requests may name; repeatable",
    )
    parser.add_argument(
        "--adapters-dir", type=Path, metavar="DIR", help="every NAME.onnx_adapter in it, read when a request names it"
    )
    parser.add_argument(
        "--allow-loading", action="store_true", help="clients may load files of --adapters-dir, and unload adapters"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=_port, default=8000, help="0: any that is free (default: 8000)")
    parser.add_argument(
        "--max-bytes", type=count, help="memory of adapters; those that were used last stay (default: all)"
    )
    parser.add_argument("--max-batch", type=count, default=32, help="texts in a batch (default: 32)")
    parser.add_argument(
        "--window", type=_window, default=2.0, metavar="MS", help="that a batch waits for more texts (default: 2)"
    )
    parser.add_argument("--queue", type=count, default=1024, help="texts that may wait; then 429 (default: 1024)")
    parser.add_argument(
        "--timeout", type=positive, default=60.0, metavar="S", help="that a text may wait (default: 60)"
    )
    parser.add_argument("--threads", type=count, default=0, help="of ONNX Runtime (default: one a core)")
    parser.add_argument(
        "--parallel", type=count, default=2, help="prompts that a language model is at, at once (default: 2)"
    )
    return parser


def _port(text: str) -> int:
    if text.isdecimal() and int(text) < 1 << 16:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no port, expected 0 to 65535")


def _window(text: str) -> float:
    return 0.0 if text == "0" else positive(text)


if __name__ == "__main__":
    raise SystemExit(main())
