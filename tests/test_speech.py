"""Whisper: from a WAV file to a transcript, without torch."""

from __future__ import annotations

import json
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_stages
import torch

from loratrf_deploy import UserError, read_adapter
from loratrf_deploy.cli.generate import main as generate_main
from loratrf_deploy.formats.manifest import MANIFEST, read_manifest
from loratrf_deploy.ops.schemas import DOMAIN
from loratrf_deploy.parity.inputs import read_inputs
from loratrf_deploy.pytorch.base import load_base
from loratrf_deploy.pytorch.oracle import load_reference
from loratrf_deploy.runtime.sound import Spectrogram, read_wave, resample
from loratrf_deploy.runtime.speech import Speech
from loratrf_deploy.runtime.staged_session import StagedSession
from shared import FRAMEWORKS, edit_json, run_python


def _voice(seconds: float, rate: int, seed: int = 0) -> Any:
    """(samples) of a tone that rises, and noise."""
    times, rng = np.arange(int(seconds * rate)) / rate, np.random.default_rng(seed)
    pitch = 200 + 300 * seed
    tone = np.sin(2 * np.pi * pitch * times * (1 + 0.3 * times)) * np.hanning(times.size)
    return 0.4 * tone + 0.03 * rng.standard_normal(times.size)


def _write(path: Path, *channels: Any, rate: int = 16000, width: int = 2) -> Path:
    values = np.stack(channels, axis=1) * (1 << (8 * width - 1))
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(values.astype(f"<i{width}").tobytes())
    return path


WAYS = [("loratrf", "separate", {}), pytest.param("lora", "merged", {"task_type": None}, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("kind", "mode", "options"), WAYS)
def test_transcripts_are_those_of_peft(kind: str, mode: str, options: dict[str, Any], staged, tmp_path: Path) -> None:
    made = staged("whisper", kind, mode, **options)
    manifest = read_manifest(made.folder / MANIFEST)
    assert manifest.task == "automatic-speech-recognition"
    assert manifest.parity is not None
    assert {check["status"] for check in manifest.parity.checks} == {"passed"}
    outputs = ["logits", "logits, token by token", "64 greedy tokens"]
    for library in ("with library", "without library"):
        checks = [check for check in manifest.parity.checks if check["variant"] == library]
        assert [check["output"] for check in checks] == outputs
        assert all(float(check["relative"] or 0) < 1e-5 for check in checks)
    nodes = [
        node for path in made.folder.glob("*.onnx") for node in onnx.load(path, load_external_data=False).graph.node
    ]
    own = [node.op_type for node in nodes if node.domain == DOMAIN]
    assert own == (["LoraTrf"] * len(read_adapter(made.adapter).layers) if mode == "separate" else [])

    # PEFT's own generate() of what transformers' own extractor makes of the file, and the text ends where its does.
    from transformers import WhisperFeatureExtractor

    reference = load_reference(read_adapter(made.adapter), made.base).model
    extractor, session = WhisperFeatureExtractor.from_pretrained(made.base), StagedSession(made.folder)
    found = []
    asked: list[dict[str, str]] = [
        {},
        {"language": "fr"},
        {"language": "de", "task": "translate"},
        {"task": "transcribe"},
    ]
    for seed, search in enumerate(asked):
        file = _write(tmp_path / "voice.wav", _voice(0.3 + 0.2 * seed, 16000, seed))
        pcm = np.frombuffer(file.read_bytes()[44:], "<i2") / 32768
        features = extractor(pcm, sampling_rate=16000, return_tensors="pt").input_features
        with torch.no_grad():
            right = reference.generate(
                input_features=features, max_new_tokens=64, do_sample=False, return_dict_in_generate=True, **search
            ).sequences[0]
        tokens = list(session.generate_tokens(session.hear(file), max_new_tokens=64, **search))
        assert tokens == right.tolist()[-len(tokens) :]
        front = right.tolist()[: -len(tokens)]
        found.append(front[1])
        wanted = Speech.of(2, tiny_stages.SPOKEN, {}).tokens(**search)
        assert [token if token is not None else front[1] for token in wanted] == front
        assert len(set(tokens)) > min(len(tokens), 64) / 8
    # Several at once, each in its own language, as long as it takes.
    several = [_voice(0.3 + 0.2 * seed, 16000, seed).astype(np.float32) for seed in range(4)]
    alone = [list(session.generate_tokens(one, max_new_tokens=None)) for one in several]
    assert session.generate_rows(several, max_new_tokens=None) == alone
    languages = tiny_stages.SPOKEN["lang_to_id"]
    assert found[1:3] == [languages["<|fr|>"], languages["<|de|>"]]


def test_it_transcribes_without_torch(capsys, staged, tmp_path: Path) -> None:
    made, voice = staged("whisper", "loratrf"), _voice(0.6, 16000, 1)
    # Of two channels the mean is heard.
    file = _write(tmp_path / "voice.wav", voice + 0.1, voice - 0.1)
    code = "import sys; from loratrf_deploy.cli.generate import main; sys.exit(main(sys.argv[1:]))"
    command = ["--model", made.folder, "--audio", file, "--language", "de", "--max-new-tokens", 9]
    result = run_python(code, *command, without=(*FRAMEWORKS, "onnxruntime_genai"))
    assert result.returncode == 0, result.stderr
    session = StagedSession(made.folder)
    assert result.stdout == session.transcribe(file, language="de", max_new_tokens=9) + "\n"
    alone = session.hear(_write(tmp_path / "one.wav", voice))
    np.testing.assert_allclose(session.hear(file), alone, atol=1 / 32768)
    # Times are no text, whatever the tokenizer makes of them.
    assert session._speech is not None
    session._speech = Speech.of(2, tiny_stages.SPOKEN | {"no_timestamps_token_id": 2}, {})
    assert session.transcribe(file, max_new_tokens=9) == ""


def test_transformers_own_runner_loads_the_folder(staged) -> None:
    from transformers import DynamicCache
    from transformers.exporters import ExportedModel

    made = staged("whisper", "loratrf")
    runners = ExportedModel.from_pretrained(made.folder).runners
    features = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 16, 100), dtype=np.float32))
    own, cache = torch.arange(3, 9).reshape(2, 3), DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(2, 4, 0, 8), torch.zeros(2, 4, 0, 8), layer)
    entered = runners["encoder"](input_features=features)
    got = runners["decode"](**entered, decoder_input_ids=own, past_key_values=cache)["logits"]
    with torch.no_grad():
        right = (
            load_reference(read_adapter(made.adapter), made.base)
            .model.get_base_model()(input_features=features, decoder_input_ids=own)
            .logits
        )
    assert (got - right).abs().max() < 1e-5 * right.abs().max()


SETTINGS: dict[str, dict[str, Any]] = {
    "whisper's": {},
    "large-v3": {"feature_size": 128},
    "small": {"feature_size": 16, "chunk_length": 1},
    "odd": {"feature_size": 33, "chunk_length": 2, "hop_length": 150, "n_fft": 512, "padding_value": 0.01},
    "8 kHz": {"sampling_rate": 8000, "n_fft": 200, "hop_length": 80, "chunk_length": 3},
}


@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
@pytest.mark.parametrize("name", SETTINGS)
def test_features_are_those_of_transformers(name: str) -> None:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(**SETTINGS[name])
    spectrogram = Spectrogram.of(extractor.to_dict())
    rate = extractor.sampling_rate
    for seconds, seed in ((0.01, 0), (0.7, 1), (extractor.chunk_length, 2)):
        samples = _voice(seconds, rate, seed).astype(np.float32)
        right = extractor(samples, sampling_rate=rate, return_tensors="np").input_features[0]
        got = spectrogram(samples)
        assert got.shape == right.shape == spectrogram.shape
        # Of quiet frames torch's transform in float32 knows less than numpy's, which transformers takes without torch.
        np.testing.assert_allclose(got, right, atol=1e-4)
        padded = np.full(spectrogram.chunk_length * rate, spectrogram.padding_value, np.float32)
        padded[: len(samples)] = samples
        np.testing.assert_allclose(got, extractor._np_extract_fbank_features([padded], "cpu")[0], atol=1e-5)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 15999])
def test_another_rate_is_the_same_sound(rate: int) -> None:
    """Tones that both rates have are those that were made at the other; those that only one has are gone."""

    def tone(pitch: float, own: int) -> Any:
        times = np.arange(own // 2) / own
        return (np.sin(2 * np.pi * pitch * times) * np.sin(2 * np.pi * times) ** 2).astype(np.float32)

    for pitch in (100.0, 1234.5, 3300.0):
        got, right = resample(tone(pitch, rate), rate, 16000), tone(pitch, 16000)
        assert abs(len(got) - len(right)) <= 1
        size = min(len(got), len(right))
        np.testing.assert_allclose(got[:size], right[:size], atol=3e-4)
    if rate > 20000:
        assert np.abs(resample(tone(9500.0, rate), rate, 16000)).max() < 1e-3


FRONTS: dict[str, dict[str, Any]] = {
    "multilingual": {},
    "named": {"language": "<|fr|>", "task": "translate"},
    "a language": {"language": "de"},
    "a task": {"task": "translate"},
    "forced": {"forced_decoder_ids": [[1, 290], [2, 293], [3, 294]]},
    "forced, detected": {"forced_decoder_ids": [[1, None], [2, 292]]},
    "English": {"is_multilingual": False, "lang_to_id": None, "task_to_id": None, "forced_decoder_ids": [[1, 294]]},
    "old": dict.fromkeys(("lang_to_id", "task_to_id", "no_timestamps_token_id", "is_multilingual")),
}


@pytest.mark.parametrize("what", FRONTS)
def test_what_comes_first_is_what_generate_puts_there(what: str, make_staged) -> None:
    from transformers import AutoModelForSpeechSeq2Seq, GenerationConfig

    model = AutoModelForSpeechSeq2Seq.from_pretrained(make_staged("whisper")[0]).eval()
    said = {name: value for name, value in (tiny_stages.SPOKEN | FRONTS[what]).items() if value is not None}
    features = torch.randn(1, 16, 100, generator=torch.Generator().manual_seed(0))
    speech = Speech.of(2, said, {})
    for asked in ({}, {"language": "fr"}, {"language": "<|DE|>", "task": "translate"}, {"task": "transcribe"}):
        config = GenerationConfig(decoder_start_token_id=2, **said)
        if said.get("is_multilingual") is not True and asked:
            with pytest.raises(UserError, match=r"English alone|generation_config\.json names no"):
                speech.tokens(**asked)
            continue
        for name, value in asked.items():
            setattr(config, name, value)
        front = model._retrieve_init_tokens(
            features, batch_size=1, generation_config=config, config=model.config, num_segment_frames=100, kwargs={}
        )[0].tolist()
        got = speech.tokens(**asked)
        assert len(got) == len(front)
        assert all(mine in (None, right) for mine, right in zip(got, front, strict=True))
        if None in got:
            assert got.index(None) == 1
            assert front[1] in said["lang_to_id"].values()


def test_sound_that_cannot_be(capsys, staged, tmp_path: Path) -> None:
    folder = staged("whisper", "loratrf").folder
    good, faults = _voice(0.5, 16000), dict[Path, str]()
    faults[_write(tmp_path / "long.wav", _voice(1.5, 8000), rate=8000)] = "has 1.5 s of sound, the model takes 1 s"
    faults[_write(tmp_path / "wide.wav", good, width=4)] = "32 bits a sample at 16000 Hz"
    faults[_write(tmp_path / "slow.wav", good[:9], rate=7)] = "16 bits a sample at 7 Hz"
    faults[_write(tmp_path / "none.wav", good[:0])] = "its header is all there is"
    faults[tmp_path / "text.wav"] = "file does not start with RIFF id"
    (tmp_path / "text.wav").write_text("no sound at all")
    (tmp_path / "short.wav").write_bytes(_write(tmp_path / "good.wav", good).read_bytes()[:20])
    faults[tmp_path / "short.wav"] = "is no WAV file of 16-bit PCM (it ends early)"
    faults[tmp_path / "nothing.wav"] = "No such file"
    capsys.readouterr()
    for file, expected in faults.items():
        assert generate_main(["--model", str(folder), "--audio", str(file)]) == 2
        assert expected in capsys.readouterr().err
    sound = ["--audio", str(tmp_path / "good.wav")]
    for options, expected in (
        ([*sound, "--language", "xx"], "'xx' is no language of this model. Expected one of: de, en, fr."),
        ([*sound, "--task", "sing"], "Expected one of: transcribe, translate."),
        ([*sound, "--max-new-tokens", "158"], "3 tokens come first and max_new_tokens is 158"),
        (["--prompt", "hello"], "doesn't go on from texts. Give it --audio FILE"),
    ):
        assert generate_main(["--model", str(folder), *options]) == 2
        assert expected in capsys.readouterr().err
    # What is cut short is heard as far as it goes, an odd byte and half a frame apart.
    whole = (tmp_path / "good.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[:-2001])
    session = StagedSession(folder)
    heard = read_wave(tmp_path / "good.wav", Spectrogram.read(folder))
    np.testing.assert_array_equal(session.hear(tmp_path / "cut.wav"), heard[: len(heard) - 1001])
    with pytest.raises(UserError, match="Give a WAV file to transcribe"):
        session.generate(["hello"])
    with pytest.raises(UserError, match=r"The prompt has 2.0 s of sound"):
        session.transcribe(np.zeros(32000, np.float32))
    with pytest.raises(UserError, match=r"shape \(2, 3\)"):
        list(session.generate_tokens(np.zeros((2, 3), np.float32)))


def test_parity_takes_features_and_no_texts(make_staged, tmp_path: Path) -> None:
    base, adapter = make_staged("whisper", "loratrf")
    loaded, file = load_base(read_adapter(adapter), base), tmp_path / "rows.jsonl"
    features = np.random.default_rng(0).standard_normal((16, 100))
    file.write_text(json.dumps({"input_features": features.tolist(), "decoder_input_ids": [[2, 5, 7]]}))
    (batch,) = read_inputs(file, loaded, tmp_path)
    np.testing.assert_allclose(batch["input_features"], features[None], rtol=1e-6)
    assert batch["decoder_input_ids"].tolist() == [[2]]  # the start alone: what is answered is no input of the user's
    for row, expected in (
        ({"text": "hello"}, "is a text, and the model takes none. Give its inputs instead: input_features"),
        ({"input_features": features[:, :99].tolist()}, r"expected numbers of shape \(16, 100\)"),
    ):
        file.write_text(json.dumps(row))
        with pytest.raises(UserError, match=expected):
            read_inputs(file, loaded, tmp_path)


def test_texts_are_no_sound(capsys, staged, tmp_path: Path) -> None:
    folder, file = staged().folder, _write(tmp_path / "voice.wav", _voice(0.5, 16000))
    capsys.readouterr()
    for options, expected in (
        (["--audio", str(file)], "--audio is for models of sound"),
        (["--prompt", "hello", "--language", "de"], "--language is for models of sound"),
    ):
        assert generate_main(["--model", str(folder), *options]) == 2
        assert expected in capsys.readouterr().err
    session = StagedSession(folder)
    for call in (
        lambda: session.transcribe(file),
        lambda: session.generate([np.zeros(9, np.float32)]),
        lambda: list(session.generate_tokens([5], language="de")),
    ):
        with pytest.raises(UserError, match="is a model of texts"):
            call()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "There is no preprocessor_config.json"),
        (
            lambda folder: edit_json(folder / "preprocessor_config.json", feature_size=1 << 40),
            "feature_size is 1099511627776, expected 1 to 1024",
        ),
        (
            lambda folder: edit_json(folder / "preprocessor_config.json", feature_size=80),
            "makes (80, 100) (mels, frames), and the model takes (16, 100)",
        ),
        (
            lambda folder: edit_json(folder / "preprocessor_config.json", feature_extractor_type="ASTFeatureExtractor"),
            "expected WhisperFeatureExtractor",
        ),
    ],
)
def test_another_extractor(damage, expected, refused, capsys, make_staged, staged, tmp_path: Path) -> None:
    """Beside the base and beside the exported model."""
    base, adapter = make_staged("whisper")
    own = shutil.copytree(base, tmp_path / "base")
    damage(own)
    message = refused(tmp_path / "out" / "model.onnx", "--adapter", adapter, "--base-model", own)
    assert expected in message
    folder = shutil.copytree(staged("whisper", "loratrf").folder, tmp_path / "copy")
    damage(folder)
    capsys.readouterr()
    command = ["--model", str(folder), "--audio", str(_write(tmp_path / "voice.wav", _voice(0.5, 16000)))]
    assert generate_main(command) == 2
    assert expected in capsys.readouterr().err


def test_a_processor_in_one_file(staged, tmp_path: Path) -> None:
    """As transformers' WhisperProcessor saves it now."""
    from transformers import AutoTokenizer, WhisperFeatureExtractor, WhisperProcessor

    base = staged("whisper", "loratrf").base
    processor = WhisperProcessor(WhisperFeatureExtractor.from_pretrained(base), AutoTokenizer.from_pretrained(base))
    processor.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert Spectrogram.read(tmp_path) == Spectrogram(feature_size=16, chunk_length=1)


def test_a_language_by_its_name_becomes_its_code(make_staged, tmp_path: Path) -> None:
    from loratrf_deploy.export.stages import check_hears

    base, adapter = make_staged("whisper")
    own = shutil.copytree(base, tmp_path / "base")
    edit_json(own / "generation_config.json", language="German")
    read = read_adapter(adapter)
    loaded = load_base(read, own)
    check_hears(read, loaded)
    said = loaded.model.generation_config.to_dict()
    assert Speech.of(2, said, {}).tokens() == [2, 289, 292, 294]
