"""gptcore serve: answer requests over HTTP."""

from __future__ import annotations

import argparse
from pathlib import Path

from gptcore.cli.options import add_fields, add_machine, check_range, pick
from gptcore.serving.limits import Limits

SUMMARY = "Serve a model over HTTP: OpenAI's API, and a page to look at it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or GGUF file of a model")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=FOLDER",
        help="adapter that requests name as their model; may be repeated",
    )  # fmt: skip
    parser.add_argument("--name", help="name of the model in requests (default: that of the folder or file)")
    parser.add_argument("--chat-template", help="how messages become text (default: the model's own)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at; 0 takes a free one (default: 8000)")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="keys, one a line; then every request but /health needs one"
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="name in the Host header, as of a reverse proxy; may be repeated (default: this machine's if it listens "
        "to no other, else any)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-origin", action="append", default=[], metavar="ORIGIN",
        help="site whose pages may send requests, as https://example.org; may be repeated (default: none)",
    )  # fmt: skip
    add_fields(parser.add_argument_group("limits"), Limits, {})
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    check_range(args, 0, 65535, "port")
    limits = Limits(**pick(args, Limits))
    try:
        from gptcore.serving.guard import LOOPBACK, read_keys
        from gptcore.serving.load import load
        from gptcore.serving.server import listen, make_app, make_server
    except ModuleNotFoundError as error:
        raise ImportError(f"gptcore serve needs {error.name}; install it with: pip install 'gptcore[serve]'") from None
    keys = read_keys(args.api_key_file) if args.api_key_file is not None else []
    local = args.host in ("127.0.0.1", "::1", "localhost")
    hosts = {*args.allow_host, *LOOPBACK} if args.allow_host or local else None
    with listen(args.host, args.port) as sock:  # before the model is loaded, which takes longer
        name = args.name or Path(args.model).resolve().name.removesuffix(".gguf")
        served, routers = load(
            args.model, name, limits, adapters=_adapters(args.adapter), device=args.device,
            chat_template=args.chat_template,
        )  # fmt: skip
        guard = make_app(served, routers, keys=keys, hosts=hosts)
        server = make_server(guard, limits, args.allow_origin)
        host = f"[{args.host}]" if ":" in args.host else args.host
        address = f"http://{host}:{sock.getsockname()[1]}"
        print(f"serving {', '.join([name, *served.adapters])}: {' '.join(served.routes)}", flush=True)
        print(f"page    {address}/")
        print(f"API     {address}/v1    described at {address}/openapi.json", flush=True)
        if not local and not keys:
            print("warning: anyone who reaches this address can use the model; --api-key-file sets keys", flush=True)
        server.run([sock])
        served.close()
    print("stopped", flush=True)
    return 0


def _adapters(given: list[str]) -> dict[str, str]:
    """Return the folders of adapters by name. Raises ValueError for what is not NAME=FOLDER, and a name given twice."""
    adapters: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--adapter {text} should be NAME=FOLDER, as --adapter poems=out/poems")
        if name in adapters:
            raise ValueError(f"--adapter {name} is given twice; choose another name")
        adapters[name] = folder
    return adapters
