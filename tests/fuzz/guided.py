"""Coverage-guided fuzzing (atheris, libFuzzer) of the two parsers of strangers' bytes.

    pip install atheris
    python tests/fuzz/guided.py safetensors|adapter-file SAMPLES [-max_total_time=60] [other libFuzzer options]

SAMPLES is the folder that `run.py adapters --keep SAMPLES` made. A finding ends the process with its traceback and
leaves the input as `crash-...`; so does a call of over 5 seconds or 2 GB.
"""

from __future__ import annotations

import contextlib
import shutil
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["loratrf_deploy"]):
    from loratrf_deploy import UserError
    from loratrf_deploy.adapters.adapter import read_adapter
    from loratrf_deploy.formats.adapter_file import read_adapter_file

_END = struct.Struct("<QI8s")


def main() -> None:
    target, samples, *options = sys.argv[1:]
    folder = Path(tempfile.mkdtemp(prefix="guided-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    corpus = folder / "corpus"
    corpus.mkdir()
    if target == "safetensors":
        adapter = shutil.copytree(Path(samples) / "loratrf", folder / "adapter")
        file = adapter / "adapter_model.safetensors"
        (corpus / "good").write_bytes(file.read_bytes())

        def parse(data: bytes) -> None:
            file.write_bytes(data)
            read_adapter(adapter)

    elif target == "adapter-file":
        raw = (Path(samples) / "model" / "loratrf.onnx_adapter").read_bytes()
        length, _, magic = _END.unpack_from(raw, len(raw) - _END.size)
        # The checksum would stop every change: the input is all before it, with the length of the JSON in front.
        (corpus / "good").write_bytes(struct.pack("<H", length) + raw[: -_END.size])
        file = folder / "fr.onnx_adapter"

        def parse(data: bytes) -> None:
            length = int.from_bytes(data[:2], "little")
            file.write_bytes(data[2:] + _END.pack(length, zlib.crc32(data[2:]), magic))
            read_adapter_file(file)

    else:
        raise SystemExit(f"{target!r} is neither safetensors nor adapter-file")

    def one(data: bytes) -> None:
        with contextlib.suppress(UserError):
            parse(data)

    try:
        atheris.Setup([sys.argv[0], "-timeout=5", "-rss_limit_mb=2048", *options, str(corpus)], one)
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
