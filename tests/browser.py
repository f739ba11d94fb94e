"""Chromium without a screen, and what a page that it opens answers."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

JS = Path(__file__).parents[1] / "js"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".html": "text/html", ".wasm": "application/wasm"}


def browse(handler: type[BaseHTTPRequestHandler], answers: queue.Queue[Any], root: Path, page: str = "") -> Any:
    """What `handler` puts into `answers` when Chromium opens `page` of it; WebGPU is computed on the CPU."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = ["--headless", "--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"]
        assert CHROMIUM is not None
        url = f"http://127.0.0.1:{server.server_port}/{page}"
        command = [CHROMIUM, *flags, f"--user-data-dir={root / 'profile'}", url]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return answers.get(timeout=90)
        finally:
            browser.terminate()
            browser.wait(30)
            server.shutdown()


def ask_browser(
    job: dict[str, Any], model: Path, root: Path, page: Path = JS / "test" / "page.html", **more: Path
) -> dict[str, Any]:
    """What `page` makes of `job`, served from `root` with the folders js, model and `more`."""
    answers: queue.Queue[dict[str, Any]] = queue.Queue()
    folders = {"js": JS, "model": model} | more
    (root / "job.json").write_text(json.dumps(job))
    shutil.copy(page, root / "page.html")

    class Files(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            first, _, rest = path.lstrip("/").partition("/")
            return str(folders[first] / rest if first in folders else root / first)

        def guess_type(self, path: Any) -> str:
            return TYPES.get(Path(path).suffix, "application/octet-stream")

        def do_POST(self) -> None:
            answers.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    return browse(Files, answers, root, "page.html")
