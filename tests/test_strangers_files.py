"""Strangers' files that leak, wait, or are no files: links, FIFOs, names, claims, and disks that are full."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from loratrf_deploy import AdapterSession, UserError, read_adapter
from loratrf_deploy.cli.export import main
from loratrf_deploy.cli.inspect import main as inspect
from loratrf_deploy.formats.inspection import inspect_path
from loratrf_deploy.pytorch.base import load_base, tokenizer_of
from shared import edit_json, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECRET = "the secret of another folder"


@pytest.fixture
def pair(make_tiny, tmp_path: Path) -> tuple[Path, Path]:
    """An adapter with a tokenizer of its own, and its base: copies, for a test to spoil."""
    base, adapter = make_tiny("bert", "text-classification", "lora")
    base, adapter = Path(shutil.copytree(base, tmp_path / "base")), Path(shutil.copytree(adapter, tmp_path / "adapter"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter)
    (tmp_path / "secret.txt").write_text(SECRET)
    return adapter, base


def export(adapter: Path, base: Path, out: Path) -> tuple[object, ...]:
    return out / "model.onnx", "--adapter", adapter, "--base-model", base, "--no-check"


LINKS: dict[str, Callable[[Path, Path], Path]] = {
    "template": lambda adapter, base: adapter / "chat_template.jinja",
    "further template": lambda adapter, base: adapter / "additional_chat_templates" / "tool.jinja",
    "vocabulary": lambda adapter, base: adapter / "vocab.txt",
    "tokenizer's settings": lambda adapter, base: adapter / "tokenizer_config.json",
    "config": lambda adapter, base: adapter / CONFIG,
    "weights": lambda adapter, base: adapter / WEIGHTS,
    "base's template": lambda adapter, base: base / "chat_template.jinja",
    "base's config": lambda adapter, base: base / "config.json",
}


@pytest.mark.parametrize("what", LINKS)
def test_a_link_out_of_the_folder_is_not_followed(what, pair, refused, tmp_path) -> None:
    link = LINKS[what](*pair)
    link.parent.mkdir(exist_ok=True)
    target = tmp_path / "secret.txt"
    if link.exists():
        target = Path(shutil.move(link, tmp_path / "elsewhere"))
    link.symlink_to(os.path.relpath(target, link.parent))
    message = refused(*export(*pair, tmp_path / "out"))
    assert f"{link} leads to {target}, outside of its folder" in message


def test_a_linked_folder_of_templates(pair, refused, tmp_path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "tool.jinja").write_text(SECRET)
    (pair[0] / "additional_chat_templates").symlink_to(tmp_path / "templates")
    assert "outside of its folder" in refused(*export(*pair, tmp_path / "out"))


def test_a_base_s_index_names_its_own_shards(pair, make_tiny, refused, tmp_path) -> None:
    """transformers opens whatever is named there: the weights of another model of this machine."""
    other, _ = make_tiny("bert", "text-classification", "lora")
    (pair[1] / "model.safetensors").unlink()
    names = dict.fromkeys(load_file(other / "model.safetensors"), os.path.relpath(other / "model.safetensors", pair[1]))
    (pair[1] / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert "expected files in its own folder" in refused(*export(*pair, tmp_path / "out"))


def test_links_inside_the_folder_are_followed(pair) -> None:
    adapter, _ = pair
    (adapter / "real").mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.move(adapter / name, adapter / "real" / name)
        (adapter / name).symlink_to(Path("real") / name)
    assert read_adapter(adapter).layers


def test_links_that_nobody_reads_and_shared_weights_are_no_matter(pair, tmp_path) -> None:
    adapter, base = pair
    (tmp_path / "logs").mkdir()
    (adapter / "runs").symlink_to(tmp_path / "logs")
    (base / "dangling.txt").symlink_to("nowhere")
    shutil.move(base / "model.safetensors", tmp_path / "shared.safetensors")
    (base / "model.safetensors").symlink_to(tmp_path / "shared.safetensors")
    assert load_base(read_adapter(adapter), base).task == "text-classification"


@pytest.mark.parametrize("shared", [False, True], ids=["blobs of the model", "blobs of the cache"])
def test_a_hub_s_cache_is_links_and_works(shared, pair, tmp_path) -> None:
    """snapshots/REVISION/FILE -> ../../blobs/HASH, of the adapter and of the base; HASH may be a link once more."""
    folders = []
    for folder, name in zip(pair, ("adapter", "base"), strict=True):
        model = tmp_path / "hub" / f"models--someone--{name}"
        snapshot, blobs = model / "snapshots" / "0a1b2c", model / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        (tmp_path / "hub" / "blobs" / "ab").mkdir(parents=True, exist_ok=True)
        for number, file in enumerate(sorted(folder.iterdir())):
            blob = blobs / f"{number}"
            if shared:
                common = tmp_path / "hub" / "blobs" / "ab" / f"{name}{number}"
                shutil.copy(file, common)
                blob.symlink_to(os.path.relpath(common, blobs))
            else:
                shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
        folders.append(snapshot)
    adapter, base = folders
    loaded = load_base(read_adapter(adapter), base)
    tokenizer, source = tokenizer_of(read_adapter(adapter), loaded)
    assert (len(tokenizer), source) == (loaded.model.config.vocab_size, adapter)
    # Links of the cache are followed within it, and no further.
    (adapter / "chat_template.jinja").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match="outside of its folder"):
        tokenizer_of(read_adapter(adapter), loaded)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "tokenizer.json", "chat_template.jinja"])
def test_a_fifo_in_an_adapter_makes_nobody_wait(name, pair, refused, tmp_path) -> None:
    (pair[0] / name).unlink(missing_ok=True)
    os.mkfifo(pair[0] / name)
    refused(*export(*pair, tmp_path / "out"))


@pytest.mark.timeout(60)
def test_devices_are_no_files(pair, refused, tmp_path) -> None:
    (pair[1] / "generation_config.json").symlink_to("/dev/zero")
    assert "generation_config.json is a device" in refused(*export(*pair, tmp_path / "out"))


@pytest.mark.timeout(60)
def test_a_fifo_beside_a_model_makes_nobody_wait(make_export, tmp_path, capsys) -> None:
    exported = make_export("bert", "text-classification", "loratrf", swappable="base")
    folder = Path(shutil.copytree(exported.model.parent, tmp_path / "copy"))
    fifo = folder / "fifo.onnx_adapter"
    os.mkfifo(fifo)
    with pytest.raises(UserError, match="is a FIFO"):
        AdapterSession(folder / "model.onnx").load("fr", fifo)
    assert inspect_path(folder)["swappable"]["other_files"] == [fifo.name]
    capsys.readouterr()
    for name in ("model.onnx", "loratrf.json"):
        shutil.rmtree(folder)
        shutil.copytree(exported.model.parent, folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert inspect([str(folder)]) == 2
        assert capsys.readouterr().err.startswith("error: ")


LONG = "n" * 300
NAMES: dict[str, Callable[[Path], Path]] = {
    "too long": lambda folder: folder / LONG,
    "too long a folder": lambda folder: folder / LONG / "x",
    "not text": lambda folder: folder / os.fsdecode(b"\xff\xfe"),
    "a circle": lambda folder: folder / "circle",
    "beyond a circle": lambda folder: folder / "circle" / "x",
    "beyond a file": lambda folder: folder / "file" / "x",
    "nothing": lambda folder: Path(),
}


@pytest.fixture
def names(tmp_path: Path) -> Path:
    folder = tmp_path / "names"
    folder.mkdir()
    (folder / "circle").symlink_to("circle")
    (folder / "file").write_text("")
    return folder


def paragraph(shown: Any) -> None:
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert len(shown.err) < 1010


@pytest.mark.parametrize("what", NAMES)
@pytest.mark.parametrize("option", ["--adapter", "--base-model", "--onto"])
def test_paths_that_cannot_be(what, option, pair, names, capsys) -> None:
    path = str(NAMES[what](names))
    out = names / ("a.onnx_adapter" if option == "--onto" else "model.onnx")
    given = {"--adapter": str(pair[0]), "--base-model": str(pair[1]), "--out": str(out)} | {option: path}
    capsys.readouterr()
    assert main([word for pair in given.items() for word in pair]) == 2
    paragraph(capsys.readouterr())
    if option == "--adapter":
        assert inspect([path]) == 2
        paragraph(capsys.readouterr())


@pytest.mark.parametrize(
    "out", [f"{LONG}.onnx", f"{LONG}/model.onnx", "circle.onnx", "circle/model.onnx", "file/model.onnx", "a\0b.onnx"]
)
def test_outputs_that_cannot_be(out, pair, names, capsys) -> None:
    (names / "circle.onnx").symlink_to("circle.onnx")
    capsys.readouterr()
    assert main(["--adapter", str(pair[0]), "--base-model", str(pair[1]), "--out", str(names / out)]) == 2
    paragraph(capsys.readouterr())
    assert {path.name for path in names.iterdir()} == {"circle", "circle.onnx", "file"}


@pytest.mark.parametrize("name", [LONG, "a\0b", "\ud800", "circle", "x/" * 3000, ""])
def test_bases_that_an_adapter_names(name, pair, names, monkeypatch, capsys) -> None:
    monkeypatch.chdir(names)
    edit_json(pair[0] / CONFIG, base_model_name_or_path=name)
    capsys.readouterr()
    assert main(["--adapter", str(pair[0]), "--out", str(names / "out" / "model.onnx")]) == 2
    paragraph(capsys.readouterr())


def test_a_name_with_a_nul_is_one_paragraph_of_the_library_too() -> None:
    for read in (read_adapter, inspect_path):
        with pytest.raises(UserError):
            read("a\0b")


def test_an_unreadable_folder(pair, tmp_path) -> None:
    """As a user who may not: root may read everything."""
    locked = pair[0]
    (locked / "inner").mkdir()
    locked.chmod(0o000)
    code = (
        "import os, sys; from loratrf_deploy import UserError, read_adapter\n"
        "from loratrf_deploy.formats.inspection import inspect_path\n"
        "os.geteuid() or os.setuid(65534)\n"
        "for read in (read_adapter, inspect_path):\n"
        "    try:\n        read(sys.argv[1])\n"
        "    except UserError as error:\n        print(error)\n"
    )
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code, locked], capture_output=True, text=True)
    locked.chmod(0o755)
    assert done.stdout.count(f"Can't read {locked}: Permission denied.") == 2, done


def limited(size: int) -> Callable[[], None]:
    """Files of this process may not grow beyond `size`: writing fails as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


COMMAND = [sys.executable, "-c", "import sys; from loratrf_deploy.cli.export import main; sys.exit(main())"]


@pytest.mark.parametrize("size", [0, 4096, -300])
def test_a_full_disk_while_an_adapter_is_converted(size, make_export, tmp_path) -> None:
    """Nothing fits; ONNX Runtime's part doesn't; what we write behind it doesn't."""
    exported = make_export("bert", "text-classification", "loratrf", swappable="base")
    if size < 0:
        size += (exported.model.parent / f"{exported.adapter.name}.onnx_adapter").stat().st_size
    out = tmp_path / "out" / "x.onnx_adapter"
    command = [*COMMAND, "--adapter", exported.adapter, "--onto", exported.model, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited(size))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: --out {out} can't be written: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_a_language_model_is_staged(make_llm, tmp_path) -> None:
    """safetensors says so in words, not as an OSError."""
    base, adapter = make_llm("llama", "lora")
    command = [*COMMAND, "--adapter", adapter, "--base-model", base, "--out", tmp_path / "model.onnx", "--no-check"]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited(20_000))
    assert done.returncode == 2, done.stderr
    assert "model.onnx can't be written: File too large. Nothing was left behind." in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_genai_is_given_an_adapter(exported, monkeypatch) -> None:
    from loratrf_deploy import GenerationSession
    from loratrf_deploy.runtime import genai_adapters

    model = exported("loratrf", swappable="base")
    session = GenerationSession(model.parent)

    def full(file: Path, values: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(genai_adapters, "write_values", full)
    with pytest.raises(UserError, match=r"No space left on device.*TMPDIR"):
        session.load("ours", next(model.parent.glob("*.onnx_adapter")))


CLAIMS: dict[str, dict[str, Any]] = {
    "of slots": {"shape": [2**40, 2**20]},
    "of a layer": {"shape": ["x.R", 2**25]},
    "of three sizes": {"shape": [4, 4, 4]},
    "a name that is a list": {"name": ["a"]},
}


@pytest.mark.parametrize("what", CLAIMS)
def test_a_manifest_that_claims_what_nobody_has(what, make_export, tmp_path) -> None:
    exported = make_export("bert", "text-classification", "loratrf", swappable="base")
    folder = Path(shutil.copytree(exported.model.parent, tmp_path / "copy"))
    swappable = read_json(folder / "loratrf.json")["swappable"]
    swappable["weights"][0] |= CLAIMS[what]
    edit_json(folder / "loratrf.json", swappable=swappable)
    with pytest.raises(UserError, match=r"loratrf\.json is damaged: swappable\.weights\[0\]"):
        AdapterSession(folder / "model.onnx")


@pytest.mark.parametrize("change", [{"name": "nothing.lora_A.weight"}, {"shape": ["x.R", 2**20]}])
def test_a_manifest_of_another_graph(change, make_export, tmp_path) -> None:
    exported = make_export("bert", "text-classification", "loratrf", swappable="base")
    folder = Path(shutil.copytree(exported.model.parent, tmp_path / "copy"))
    swappable = read_json(folder / "loratrf.json")["swappable"]
    swappable["weights"][0] |= change
    edit_json(folder / "loratrf.json", swappable=swappable)
    with pytest.raises(UserError, match=r"doesn't take what the loratrf\.json beside it says"):
        AdapterSession(folder / "model.onnx")


def test_slots_that_no_memory_holds() -> None:
    from loratrf_deploy.formats.swappable import RuntimeWeight
    from loratrf_deploy.runtime.slots import Slots

    weight = RuntimeWeight("head.slots.weight", "head", "weight", (2**16, 2**16), "float32")
    with pytest.raises(UserError, match="more than there is memory for"):
        Slots([weight], 2**20)


def test_checks_of_a_manifest_are_flat(make_export, tmp_path) -> None:
    exported = make_export("bert", "text-classification", "loratrf", swappable="base")
    folder = Path(shutil.copytree(exported.model.parent, tmp_path / "copy"))
    deep: Any = []
    for _ in range(50):
        deep = [deep]
    parity = {"passed": True, "tolerance": 1.0, "inputs": 1, "checks": [{"variant": deep}]}
    edit_json(folder / "loratrf.json", parity=parity)
    with pytest.raises(UserError, match=r"is damaged: parity\.checks"):
        inspect_path(folder)


def test_as_many_dimensions_as_numpy_lacks(pair) -> None:
    adapter, _ = pair
    tensors = load_file(adapter / WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors, adapter / WEIGHTS)
    raw = (adapter / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[name]["shape"] = [1] * 63 + header[name]["shape"]
    text = json.dumps(header).encode()
    (adapter / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(UserError, match="has 65 dimensions, expected at most 8"):
        read_adapter(adapter)


@pytest.mark.parametrize("fields", [{"filter_gamma": "much"}, {"filter_gamma": []}, {"filter_input": ["base"]}])
def test_a_plain_lora_s_filter_is_nobody_s(fields, pair) -> None:
    """What its config says of filters is not read, whatever it is."""
    edit_json(pair[0] / CONFIG, **fields)
    adapter = read_adapter(pair[0])
    assert adapter.filter_input == "adapted"
    assert {layer.gamma for layer in adapter.layers.values()} == {1.0}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "x/y"), "The system refuses: x/y: No space left on device."),
        (OSError("odd"), "The system refuses: odd."),
        (MemoryError(), "This needs more memory than there is here."),
        (RecursionError(), "nested too deeply"),
    ],
)
def test_the_net_under_every_command(error, words, capsys) -> None:
    from loratrf_deploy.cli.shared import command

    @command
    def falls(argv: object) -> int:
        raise error

    assert falls([]) == 2
    shown = capsys.readouterr()
    paragraph(shown)
    assert words in shown.err
