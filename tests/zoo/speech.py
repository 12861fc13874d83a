"""Windows of audio with and without speech for Silero VAD: recorded prompts, or voiced-like signals without them.

Prompts (Debian's ``asterisk-core-sounds-en-wav``) are placed at known times in silence, white noise or music (its
``asterisk-moh-opsound-wav``). A sample is one window with the recurrent state that the float model reaches there: each
window is judged alone, so an error that builds up through the state over a clip doesn't show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.zoo.packages import package_file, wanted
from tests.zoo.score import session
from tests.zoo.voice import RATE, voiced

PROMPTS, MUSIC = (Path("/usr/share/asterisk") / name for name in ("sounds/en_US_f_Allison", "moh"))
NOT_SPEECH = ("beep", "tone", "silence")
CLIP = 12 * RATE
WINDOW, CONTEXT, STRIDE = 512, 64, 9  # samples a window, samples of the one before, windows a kept one
FRAME, CLOSED = 160, 15  # samples a loudness frame; frames over which speech bridges pauses
SNR_DB = (0, 5, 10, 20)

Array = NDArray[np.float32]
Sample = dict[str, Any]


def calibration(count: int | None = None) -> Iterator[Sample]:
    return _windows(wanted(count, 128, "CALIBRATION"), 100_000, 0)


def evaluation(count: int | None = None) -> Iterator[Sample]:
    return _windows(wanted(count, 500, "EVALUATION"), 0, 1)


def auc(windows: Sequence[Mapping[str, Array]], labels: Sequence[int]) -> float:
    """Chance that a window with speech scores above one without (Mann–Whitney), from ``output`` f32[1, 1]."""
    from scipy.stats import rankdata

    ranks = rankdata([values["output"].item() for values in windows])
    speech = np.asarray(labels, bool)
    positives, negatives = int(speech.sum()), int((~speech).sum())
    return float((ranks[speech].sum() - positives * (positives + 1) / 2) / (positives * negatives))


auc.corpus = True  # type: ignore[attr-defined]


def _windows(count: int, seed: int, part: int) -> Iterator[Sample]:
    """``count`` samples, every ``STRIDE``-th window of as many clips as it takes."""
    runner, rate = session(package_file("silero_vad/data/silero_vad.onnx"), threads=1), np.array(RATE, np.int64)
    left = count
    while left > 0:
        sound, speech = _clip(seed, part)
        state, seed = np.zeros((2, 1, 128), np.float32), seed + 1
        padded = np.concatenate([np.zeros(CONTEXT, np.float32), sound])
        for index, start in enumerate(range(0, CLIP - WINDOW + 1, WINDOW)):
            feed = {"input": padded[None, start : start + CONTEXT + WINDOW], "state": state, "sr": rate}
            if index % STRIDE == 0 and left > 0:
                left -= 1
                yield {**feed, "label": int(speech[start : start + WINDOW].mean() > 0.5)}
            _, state = runner.run(["output", "stateN"], feed)


def _clip(seed: int, part: int) -> tuple[Array, NDArray[np.bool_]]:
    """12 seconds with pauses of 0.4 to 2 seconds between the speech, and where the speech is. Noise changes by seed."""
    draw = np.random.default_rng(seed)
    sound: list[Array] = []
    speech: list[NDArray[np.bool_]] = []
    while sum(len(piece) for piece in sound) < CLIP:
        pause = np.zeros(int(RATE * draw.uniform(0.4, 2.0)), np.float32)
        said = _speech(draw, part)
        sound += [pause, said]
        speech += [pause > 0, _loud(said)]
    clean, spoken = np.concatenate(sound)[:CLIP], np.concatenate(speech)[:CLIP]
    noise = (np.zeros, draw.standard_normal, lambda length: _music(draw, length))[seed % 3](CLIP)
    noise_power = np.mean(clean[spoken] ** 2) / 10 ** (draw.choice(SNR_DB) / 10)
    return (clean + noise * np.sqrt(noise_power / max(np.mean(noise**2), 1e-9))).astype(np.float32), spoken


def _speech(draw: np.random.Generator, part: int) -> Array:
    """A prompt of the ``part`` (even ones calibrate, odd ones evaluate), cut to whole frames; else voiced-like."""
    files = _files(PROMPTS)[part::2]
    said = _read(files[draw.integers(len(files))]) if files else voiced(draw.uniform(0.6, 2.0), draw)
    return said[: len(said) // FRAME * FRAME]


def _loud(said: Array) -> NDArray[np.bool_]:
    """Where a clean prompt is within 40 dB of its peak, pauses of up to 75 ms each side bridged."""
    power = (said.reshape(-1, FRAME) ** 2).mean(1)
    loud = power > max(power.max() * 1e-4, 1e-7)
    return np.repeat(np.convolve(loud, np.ones(CLOSED), "same")[: len(loud)] > 0, FRAME)


def _music(draw: np.random.Generator, length: int) -> Array:
    """A random stretch of music; without recordings a chord of slowly beating tones."""
    if files := _files(MUSIC):
        music = _read(files[draw.integers(len(files))])
        start = draw.integers(len(music) - length)
        return music[start : start + length]
    time = np.arange(length) / RATE
    tones = draw.uniform(110, 1760, size=(6, 1))
    beats = 1 + np.sin(2 * np.pi * draw.uniform(0.2, 2, size=(6, 1)) * time)
    return np.asarray((np.sin(2 * np.pi * tones * time) * beats).sum(0), np.float32)


@cache
def _files(folder: Path) -> tuple[Path, ...]:
    found = [*folder.glob("*.wav"), *folder.glob("digits/*.wav")]
    return tuple(sorted(file for file in found if not any(word in file.name for word in NOT_SPEECH)))


@cache
def _read(path: Path) -> Array:
    """An 8 kHz recording -> f32 at 16 kHz in -1..1."""
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    rate, sound = wavfile.read(path)
    return np.asarray(resample_poly(sound.astype(np.float32) / 32768, RATE // rate, 1), np.float32)
