"""Sound as Whisper reads it: a WAV file's samples at the model's rate, and their log-mel spectrogram. numpy alone."""

from __future__ import annotations

import io
import math
import os
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.json_text import parse_json
from ..errors import UserError
from ..files import read_regular

__all__ = ["Samples", "Spectrogram", "read_wave", "resample"]

Samples = NDArray[np.float32]
"""(samples) in -1..1, one channel."""

_FILES = {"processor_config.json": "feature_extractor", "preprocessor_config.json": None}
"""Where a feature extractor's settings are: a part of a processor's now, a file of their own before."""
_SAVE = (
    "Save it beside the base model, WhisperFeatureExtractor.from_pretrained(...).save_pretrained(folder), and export "
    "the model again."
)
_MOST_BYTES = 1 << 30
_RATES = range(1000, 400_001)
_TOP, _FLOOR, _DECADES = 8000.0, 1e-10, 8.0
"""The highest frequency that is listened to, the least power that is told from none, and the range that is kept."""


@dataclass(frozen=True)
class Spectrogram:
    """max(log10 |STFT(samples)|² mel, peak - 8) / 4 + 1 of samples that are padded, or must be, to `seconds`.

    By the settings of transformers' WhisperFeatureExtractor. Raises ValueError for values that are none.
    """

    feature_size: int = 80
    sampling_rate: int = 16000
    hop_length: int = 160
    chunk_length: int = 30
    n_fft: int = 400
    padding_value: float = 0.0

    def __post_init__(self) -> None:
        limits = {
            "feature_size": range(1, 1025),
            "sampling_rate": _RATES,
            "hop_length": range(1, self.n_fft + 1),
            "chunk_length": range(1, 601),
            "n_fft": range(16, 1 << 15),
        }
        for name, limit in limits.items():
            if (value := getattr(self, name)) not in limit:
                raise ValueError(f"{name} is {value!r}, expected {limit[0]} to {limit[-1]}")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Spectrogram:
        """Those of a preprocessor_config.json. Raises ValueError or TypeError for values that are none."""
        if (kind := settings.get("feature_extractor_type")) != "WhisperFeatureExtractor":
            raise ValueError(f"feature_extractor_type is {kind!r}, expected WhisperFeatureExtractor")
        names = ("feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft")
        whole = {name: int(settings[name]) for name in names if name in settings}
        return cls(**whole, padding_value=float(settings.get("padding_value", 0.0)))

    @classmethod
    def read(cls, folder: Path) -> Spectrogram:
        """That of the feature extractor in `folder`. Raises UserError where there is none."""
        return cls.find({name: read_regular(path) for name in _FILES if os.path.isfile(path := folder / name)}, folder)

    @classmethod
    def find(cls, files: Mapping[str, bytes], where: Path | str) -> Spectrogram:
        """That of a processor's `files`, by their names, which are from `where`. Raises UserError."""
        for name, part in _FILES.items():
            try:
                settings = parse_json(files[name]) if name in files else {}
                if settings := settings.get(part) if part else settings:
                    return cls.of(settings)
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(
                    f"{name} in {where} doesn't say how sound becomes what the model reads ({error}). {_SAVE}"
                ) from error
        raise UserError(
            f"There is no preprocessor_config.json in {where}, which says how sound becomes what the model reads. "
            + _SAVE
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(mels, frames) of what it makes."""
        return self.feature_size, self.chunk_length * self.sampling_rate // self.hop_length

    def check_length(self, seconds: float, what: str, advice: str) -> None:
        """UserError, which ends in `advice`, where `what` has more `seconds` than go in at once."""
        if seconds > self.chunk_length:
            raise UserError(
                f"{what} has {seconds:.1f} s of sound, the model takes {self.chunk_length} s at a time. Cut it, best "
                f"where nobody speaks, and give the parts one after the other{advice}."
            )

    def __call__(self, samples: Samples) -> NDArray[np.float32]:
        """(mels, frames) of `samples` at `sampling_rate`. Raises UserError where they are too long, or none."""
        samples = np.asarray(samples)
        if samples.ndim != 1 or not samples.size or samples.dtype.kind != "f":
            raise UserError(
                f"The sound has shape {samples.shape} of {samples.dtype}, expected numbers from -1 to 1, one channel "
                f"of at least one sample at {self.sampling_rate} Hz."
            )
        self.check_length(len(samples) / self.sampling_rate, "The prompt", "")
        padded = np.full(self.chunk_length * self.sampling_rate, self.padding_value, np.float64)
        padded[: len(samples)] = samples
        padded = np.pad(padded, self.n_fft // 2, "reflect")
        window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.n_fft) / self.n_fft)
        frames = np.lib.stride_tricks.sliding_window_view(padded, self.n_fft)[:: self.hop_length][: self.shape[1]]
        power = np.abs(np.fft.rfft(frames * window)) ** 2
        decades = np.log10(np.maximum(self._mels() @ power.T, _FLOOR))
        return ((np.maximum(decades, decades.max() - _DECADES) + 4) / 4).astype(np.float32)

    def _mels(self) -> NDArray[np.float64]:
        """(mels, bins): triangles of area 1, as wide as mels are: equal steps to 1 kHz, equal ratios above."""
        bins = np.linspace(0, self.sampling_rate // 2, 1 + self.n_fft // 2)
        # 15 mels of 200/3 Hz make 1 kHz; from there on 27 mels are a factor of 6.4.
        mels = np.linspace(0, 15 + 27 * math.log(_TOP / 1000, 6.4), self.feature_size + 2)
        edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
        low, middle, high = (edges[at : at + self.feature_size, None] for at in range(3))
        rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
        return np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)


def read_wave(path: str | Path, spectrogram: Spectrogram) -> Samples:
    """The sound in the WAV file `path` (16-bit PCM), its channels mixed, at the rate that `spectrogram` takes.

    Raises UserError for other files, and where it is too long for `spectrogram`.
    """
    raw = read_regular(path, None, _MOST_BYTES)
    try:
        with wave.open(io.BytesIO(raw)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            if width != 2 or rate not in _RATES:
                raise wave.Error(f"{8 * width} bits a sample at {rate} Hz")
            pcm = file.readframes(file.getnframes())
    except (wave.Error, EOFError, ValueError) as error:
        raise UserError(
            f"{path} is no WAV file of 16-bit PCM ({str(error) or 'it ends early'}). Convert it first: `ffmpeg -i FILE "
            f"-ac 1 -ar {spectrogram.sampling_rate} -c:a pcm_s16le sound.wav`."
        ) from error
    # Of a file that is cut short, the last frame may be too.
    frames = np.frombuffer(pcm[: len(pcm) // (2 * channels) * 2 * channels], "<i2").reshape(-1, channels)
    if not len(frames):
        raise UserError(f"{path} has no sound in it: its header is all there is.")
    cut = f"`ffmpeg -i LONG.wav -f segment -segment_time {max(spectrogram.chunk_length - 1, 1)} part%03d.wav`"
    spectrogram.check_length(len(frames) / rate, str(path), f": {cut}")
    samples = frames.astype(np.float32).mean(axis=1) / np.float32(32768)
    return resample(samples, rate, spectrogram.sampling_rate)


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """`samples` of `rate` as ones of `wanted` Hz: the same frequencies, but for those that `wanted` has no room for."""
    if rate == wanted:
        return samples
    step = math.gcd(rate, wanted)
    up, down = wanted // step, rate // step
    # The transform takes the end for what is before the beginning: a tenth of a second of silence keeps them apart.
    blocks = math.ceil((len(samples) + rate // 10) / down)
    # Of the frequencies the inverse takes as many as there is room for.
    longer = np.fft.irfft(np.fft.rfft(samples, blocks * down), blocks * up) * (up / down)
    return longer[: math.ceil(len(samples) * up / down)].astype(np.float32)
