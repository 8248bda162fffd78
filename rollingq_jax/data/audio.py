"""Sound: WAV and FLAC files, resampling, and the spectrograms that are made of a waveform.

Files are read through `soundfile` and resampled through SciPy (both imported on first use). The
spectrograms follow published recipes step by step, so that records made here can be used with
models that were trained on others'.
"""

import contextlib
import functools
import io
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from rollingq_jax.errors import DataError
from rollingq_jax.files import HEAD, check_impostor, reading

MIN_RATE, MAX_RATE = 100, 1_000_000  # Hz
MAX_CHANNELS = 1024
# A sample rate may be off by this share of it where the exact ratio would cost much more: a tenth
# of the smallest difference in pitch that is heard, and half a millisecond in ten seconds.
RATE_TOLERANCE = 5e-5
DYNAMIC_RANGE = 80.0  # decibels
# Kaldi floors the filters' energies at the smallest difference from 1 in float32.
FLOOR = float(np.finfo(np.float32).eps)
_BLOCK = 1 << 20  # samples of all channels decoded at a time
_UNKNOWN_FRAMES = 1 << 62  # libsndfile gives 2^63 - 1 where a FLAC header is silent


def samples_in(seconds: float, rate: int) -> int:
    """The number of samples used of the first `seconds`: those, and one for the resampling."""
    return round(seconds * rate) + 1


def read_audio(
    path: str | os.PathLike, seconds: float | None = None, *, data: bytes | None = None
) -> tuple[np.ndarray, int]:
    """A WAV or FLAC file as float32 [samples] in [-1, 1], channels averaged, and its sample rate.

    Args:
      path: the file. Where its header leaves the length open, as encoders do that write to a pipe,
        it is read to its end.
      seconds: only the beginning is decoded, `samples_in` of it; None decodes all.
      data: the file's bytes, where they are at hand; `path` is for the error message then.

    Raises:
      DataError: the file is missing, damaged, empty, shorter than its header says, or has a sample
        rate or a number of channels out of range.
    """
    with _open_sound(path, seconds, data) as sound:
        parts = list(_blocks(sound, seconds))
        if not parts:
            raise DataError(f"audio {path}: holds no samples")
        return check_waveform(np.concatenate(parts), path), int(sound.samplerate)


def sound_seconds(
    path: str | os.PathLike, at_most: float | None = None, *, data: bytes | None = None
) -> float:
    """The length of a WAV or FLAC file from its header; by decoding where the header is silent.

    Args:
      path: the file.
      at_most: decoding ends there, so that a longer file may count as this long.
      data: as in `read_audio`.

    Raises:
      DataError: as in `read_audio`.
    """
    with _open_sound(path, at_most, data) as sound:
        frames, rate = sound.frames, sound.samplerate
        if frames >= _UNKNOWN_FRAMES:
            frames = sum(map(len, _blocks(sound, at_most)))
        return frames / rate


@contextlib.contextmanager
def _open_sound(
    path: str | os.PathLike, seconds: float | None, data: bytes | None = None
) -> Iterator[Any]:
    """An open `soundfile.SoundFile` whose header has been checked."""
    with reading(path, "audio"):
        import soundfile

        with open(path, "rb") if data is None else io.BytesIO(data) as file:
            check_impostor(file.read(HEAD), path, "audio")
            source: Any = file
            if wav := _read_wav_header(file, path):
                source = _with_length(file, wav, seconds)
            with soundfile.SoundFile(source) as sound:
                check_sound_format(sound.samplerate, sound.channels, path)
                if sound.format == "FLAC" and 0 < sound.frames < _UNKNOWN_FRAMES:
                    _check_end(sound, path)
                # soundfile would seek after each block, which fails where the length is unknown.
                sound.seekable = lambda: False
                yield sound


def _check_end(sound: Any, path: str | os.PathLike) -> None:
    """The last sample that the header promises is there."""
    import soundfile

    try:
        sound.seek(sound.frames - 1)
        whole = len(sound.read(1, dtype="float32")) == 1
    except soundfile.LibsndfileError:
        whole = False
    if not whole:
        raise DataError(
            f"audio {path}: damaged or cut off: the last of the {sound.frames} samples that its "
            "header promises cannot be read"
        )
    sound.seek(0)


def _blocks(sound: Any, seconds: float | None) -> Iterator[np.ndarray]:
    """The sound, or its beginning, in float32 [samples] of a bounded size, channels averaged."""
    block = max(_BLOCK // sound.channels, 1)
    left = sys.maxsize if seconds is None else samples_in(seconds, sound.samplerate)
    while left > 0 and len(samples := sound.read(min(block, left), "float32", always_2d=True)):
        yield average_channels(samples)
        left -= len(samples)


def average_channels(samples: np.ndarray) -> np.ndarray:
    """float32 [samples, channels] -> [samples]; NaN and infinity go through without a warning."""
    with np.errstate(all="ignore"):
        return samples.mean(axis=1, dtype=np.float32)


def check_waveform(waveform: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """float32 [samples], as it came; `path` is for the error message.

    Raises:
      DataError: a sample is NaN or infinite.
    """
    if not np.isfinite(waveform).all():
        raise DataError(f"audio {path}: holds samples that are NaN or infinite")
    return waveform


def check_sound_format(rate: int, channels: int, path: str | os.PathLike) -> None:
    """Refuses numbers in a header that no recording has.

    Raises:
      DataError: the sample rate or the number of channels is out of range.
    """
    if not MIN_RATE <= rate <= MAX_RATE:
        raise DataError(
            f"audio {path}: sample rate {rate} Hz; allowed: in [{MIN_RATE}, {MAX_RATE}] Hz"
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise DataError(f"audio {path}: {channels} channels; allowed: in [1, {MAX_CHANNELS}]")


class _WavHeader(NamedTuple):
    """The header of a WAV file.

    Attributes:
      magic: RIFF, RIFX (big-endian), RF64 or BW64 (64-bit lengths).
      format: content of its "fmt " chunk.
      start: where the samples begin.
      length: bytes of samples that are there; None if the header leaves it open.
    """

    magic: bytes
    format: bytes
    start: int
    length: int | None


def _read_wav_header(file: Any, path: str | os.PathLike) -> _WavHeader | None:
    """Reads the chunks before the samples; None for another format. Leaves `file` at its start.

    Raises:
      DataError: fewer bytes of samples follow than are promised (libsndfile shortens the sound
        without a word), or a number is out of range.
    """
    file.seek(0)
    header = file.read(12)
    magic = header[:4]
    if magic not in (b"RIFF", b"RIFX", b"RF64", b"BW64") or header[8:12] != b"WAVE":
        file.seek(0)
        return None
    # Before libsndfile sees the file: it shortens what is cut off without a word, and gives nothing
    # where the length was left open.
    order = ">" if magic == b"RIFX" else "<"
    size = file.seek(0, os.SEEK_END)
    file.seek(len(header))
    (riff_length,) = struct.unpack(f"{order}I", header[4:8])
    format_, long_length, found = b"", None, None
    while len(chunk := file.read(8)) == 8:
        name, length = struct.unpack(f"{order}4sI", chunk)
        if name == b"data":
            start, remaining = file.tell(), size - file.tell()
            bits = 32
            if long_length is not None and length == 0xFFFFFFFF:
                bits, length = 64, long_length
            if length == 0:
                unknown = remaining > 0 and not _chunks_end_the_file(file, size, order)
            else:  # whoever left the outer length open did not know the inner one either
                is_open = left_open(length, bits) or (bits == 32 and left_open(riff_length))
                unknown = remaining < length and is_open
            if remaining < length and not unknown:
                raise DataError(
                    f"audio {path}: truncated WAV, {remaining} of {length} sample bytes are there"
                )
            found = _WavHeader(magic, format_, start, None if unknown else length)
            break
        content = file.read(min(length, 4096)) if name in (b"fmt ", b"ds64") else b""
        if name == b"fmt " and len(content) >= 16:
            format_ = content
            _, channels, rate = struct.unpack(f"{order}HHI", content[:8])
            check_sound_format(rate, channels, path)
        elif name == b"ds64" and len(content) >= 16:
            (long_length,) = struct.unpack("<Q", content[8:16])
        file.seek(length + length % 2 - len(content), os.SEEK_CUR)
    file.seek(0)
    return found


def left_open(length: int, bits: int = 32) -> bool:
    """Tells a length that stands for "not known yet": 0, or near the largest of `bits` or 32 bits.

    Encoders that write to a pipe leave all ones (FFmpeg), 2^31 - 1, 2^31 - 4096 (sox), 2^31 ...,
    some of them rounded or with the header's size added or taken off.
    """
    near = 1 << 16
    return (
        length == 0
        or abs(length - (1 << 31)) <= near
        or abs(length - (1 << (bits - 1))) <= near
        or length >= (1 << bits) - near
    )


def _chunks_end_the_file(file: Any, size: int, order: str) -> bool:
    """Tells if a sequence of well-formed chunks leads from here to the end of the file."""
    while file.tell() < size:
        chunk = file.read(8)
        name, length = struct.unpack(f"{order}4sI", chunk.ljust(8, b"\0"))
        if not (name.isascii() and name.decode().isprintable()) or file.tell() + length > size:
            return False
        file.seek(length + length % 2, os.SEEK_CUR)
    return True


def _with_length(file: Any, wav: _WavHeader, seconds: float | None) -> Any:
    """The file itself; where libsndfile would not read its header, a copy with a plain one.

    The copy holds the bytes for `seconds` at most. libsndfile takes a length of 0 as it is, and
    does not know BW64.
    """
    if wav.length is not None and wav.magic != b"BW64" or len(wav.format) < 16:
        return file
    order = ">" if wav.magic == b"RIFX" else "<"
    _, _, rate, byte_rate, align = struct.unpack(f"{order}HHIIH", wav.format[:14])
    most = -1 if wav.length is None else wav.length
    if seconds is not None:
        needed = samples_in(seconds, rate) * max(align, 1) + max(byte_rate, 0)
        most = needed if most < 0 else min(needed, most)
    file.seek(wav.start)
    samples = file.read(most)
    chunks = struct.pack(f"{order}4sI", b"fmt ", len(wav.format)) + wav.format
    chunks += struct.pack(f"{order}4sI", b"data", min(len(samples), 0xFFFFFFFF)) + samples
    magic = b"RIFX" if order == ">" else b"RIFF"
    return io.BytesIO(
        magic + struct.pack(f"{order}I", min(len(chunks) + 4, 0xFFFFFFFF)) + b"WAVE" + chunks
    )


def resample(waveform: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """Band-limited (polyphase) resampling of float32 [samples] from `rate` to `target_rate`.

    The ratio of rates with a small common period is exact; others are taken as the nearby ratio of
    the smallest numbers that is off by at most `RATE_TOLERANCE` of it.

    Raises:
      DataError: a rate is not positive.
    """
    if rate <= 0 or target_rate <= 0:
        raise DataError(f"sample rates: {rate} to {target_rate}; allowed: both positive")
    if rate == target_rate:
        return waveform.astype(np.float32)
    from scipy.signal import resample_poly

    up, down = _ratio(int(rate), int(target_rate))
    if up == down:
        return waveform.astype(np.float32)
    return resample_poly(waveform, up, down).astype(np.float32)


def _ratio(rate: int, target_rate: int) -> tuple[int, int]:
    """(up, down) whose ratio is `target_rate / rate`, nearly so where that needs large numbers.

    The filter has 20 taps for each unit of the larger number: 44,101 Hz to 16,000 Hz, exactly,
    would take 882,020 taps and nearly a megabyte for any sound.
    """
    exact = Fraction(target_rate, rate)
    if max(exact.numerator, exact.denominator) <= 2000:
        return exact.numerator, exact.denominator
    # The denominator of a ratio above 1 is the smaller number: limiting it limits both.
    above = max(exact, 1 / exact)
    near: Iterable[Fraction] = (above.limit_denominator(2**k) for k in range(32))
    ratio = next(r for r in near if abs(r - above) <= RATE_TOLERANCE * above)
    if exact < 1:
        return ratio.denominator, ratio.numerator
    return ratio.numerator, ratio.denominator


def tile(waveform: np.ndarray, length: int) -> np.ndarray:
    """float32 [samples], at least one -> [length]: repeated from its start, then cut."""
    return np.resize(waveform, length).astype(np.float32)


def trim_silence(waveform: np.ndarray, threshold: float = 0.01) -> np.ndarray:
    """The part between the first and the last sample above `threshold` times the peak."""
    loud = np.flatnonzero(np.abs(waveform) > threshold * np.abs(waveform).max(initial=0.0))
    return waveform[loud[0] : loud[-1] + 1] if len(loud) else waveform


def log_stft(waveform: np.ndarray, n_fft: int, hop: int) -> np.ndarray:
    """log(|X| + 1e-7) of the short-time Fourier transform X, as librosa's `stft` has it.

    Frames are centered at multiples of the hop, the window is the periodic Hann window, and half a
    window of zeros goes before and after the sound (librosa 0.10 and later; earlier versions
    mirrored it, which changes the first and last frame).

    Args:
      waveform: float [samples].
      n_fft: length of window and transform.
      hop: samples from one frame to the next.

    Returns:
      float32 [n_fft // 2 + 1, 1 + samples // hop].
    """
    padded = np.pad(np.asarray(waveform, np.float64), n_fft // 2)
    starts = np.arange(0, len(padded) - n_fft + 1, hop)
    magnitude = _magnitude(_frames(padded, starts, n_fft), _hann(n_fft))
    return np.log(magnitude + 1e-7).T.astype(np.float32)


def decibel_stft(waveform: np.ndarray, bins: int, frames: int) -> np.ndarray:
    """Spectrogram of linear frequency in decibels, with a fixed number of frames.

    Args:
      waveform: float [samples].
      bins: number of frequencies; a window has 2 (bins - 1) samples.
      frames: number of windows, evenly spaced from the first sample to the last.

    Returns:
      float32 [bins, frames], decibels relative to the spectrogram's largest value, in
      [-DYNAMIC_RANGE, 0].
    """
    length = 2 * (bins - 1)
    power = np.square(_magnitude(_spread_frames(waveform, length, frames), _hann(length)))
    return _decibels(power)


def log_mel(
    waveform: np.ndarray,
    rate: int,
    bins: int = 32,
    frames: int = 32,
    *,
    window: float = 0.025,
) -> np.ndarray:
    """Log-mel spectrogram in decibels, with a fixed number of frames.

    The hop is what lets `frames` windows of `window` seconds span the waveform from its first
    sample to its last: short and long utterances are stretched to one length. A waveform shorter
    than one window is padded with zeros behind.

    Args:
      waveform: samples, [n].
      rate: samples per second.
      bins: number of mel bands between 0 and rate / 2.
      frames: number of windows.
      window: length of the (periodic Hann) window in seconds.

    Returns:
      Decibels relative to the spectrogram's largest value, in [-DYNAMIC_RANGE, 0], float32
      [bins, frames]; silence gives -DYNAMIC_RANGE throughout.
    """
    length = round(window * rate)
    n_fft = 2 ** int(np.ceil(np.log2(length)))
    power = np.square(_magnitude(_spread_frames(waveform, length, frames), _hann(length), n_fft))
    # Not a BLAS product, whose order of summation may depend on the number of threads.
    return _decibels(np.einsum("tf,mf->tm", power, mel_filters(rate, n_fft, bins)))


def _decibels(power: np.ndarray) -> np.ndarray:
    """Power [frames, bins] as decibels under its largest value, float32 [bins, frames]."""
    peak = max(power.max(), np.finfo(np.float64).tiny)
    decibels = 10 * np.log10(np.maximum(power / peak, 10 ** (-DYNAMIC_RANGE / 10)))
    return decibels.T.astype(np.float32)


def kaldi_fbank(waveform: np.ndarray, rate: int, num_bins: int = 128) -> np.ndarray:
    """Log energies of mel filters as `torchaudio.compliance.kaldi.fbank` has them.

    Without dither and without an energy term, as in the AST recipe (Gong et al. 2021). A frame is
    taken wherever it fits whole into the sound. A frame has 25 ms, and
    the next begins 10 ms later. From each its own mean is subtracted, then
    x[n] - 0.97 x[n - 1] (the first sample against itself), the symmetric Hanning window, zeros up
    to the next power of two, power spectrum, triangles on the mel scale from 20 Hz to half the
    sample rate, natural logarithm with floor 2^-23.

    Args:
      waveform: float [samples].
      rate: sample rate in Hz.
      num_bins: number of filters.

    Returns:
      float32 [frames, num_bins]; no frames if the sound is shorter than one.
    """
    length, shift = int(rate * 25.0 * 0.001), int(rate * 10.0 * 0.001)
    samples = np.asarray(waveform, np.float64)
    if len(samples) < length:
        return np.zeros((0, num_bins), np.float32)
    frames = _frames(samples, np.arange(0, len(samples) - length + 1, shift), length)
    frames = frames - frames.mean(axis=1, keepdims=True)
    previous = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    n_fft = 1 << (length - 1).bit_length()
    power = np.square(_magnitude(frames - 0.97 * previous, np.hanning(length), n_fft))
    filters = mel_filters(rate, n_fft, num_bins, kaldi=True)
    return np.log(np.maximum(power @ filters.T, FLOOR)).astype(np.float32)


@functools.lru_cache(maxsize=8)
def mel_filters(rate: int, n_fft: int, num_bins: int, *, kaldi: bool = False) -> np.ndarray:
    """Triangular filters, equally spaced and overlapping by half on the mel scale, peak 1.

    The mel scale is that of the HTK book (Young et al., section 5.4), m = 2595 log10(1 + f / 700),
    which Kaldi rounds to 1127 ln(1 + f / 700).

    Args:
      rate: sample rate in Hz; the last filter ends at half of it.
      n_fft: length of the transform.
      num_bins: number of filters.
      kaldi: whether the first filter begins at 20 Hz and the triangles' sides are straight over
        mel, as Kaldi has them, which also leaves the highest frequency out; else at 0 Hz, and
        straight over the frequency.

    Returns:
      float64 [num_bins, n_fft // 2 + 1]; one array for all callers, so not writable. Narrow filters
      at low frequencies may hold no frequency of the transform and be 0 throughout.
    """

    def mel(frequency: np.ndarray | float) -> Any:
        ratio = np.asarray(frequency) / 700
        return 1127 * np.log1p(ratio) if kaldi else 2595 * np.log10(1 + ratio)

    edges = np.linspace(mel(20.0 if kaldi else 0.0), mel(rate / 2), num_bins + 2)
    positions = np.arange(n_fft // 2 + 1) * rate / n_fft
    if kaldi:
        positions = mel(positions)
    else:
        edges = 700 * (10 ** (edges / 2595) - 1)
    left, center, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (positions - left) / (center - left)
    falling = (right - positions) / (right - center)
    filters = np.maximum(0.0, np.minimum(rising, falling))
    if kaldi:
        filters[:, -1] = 0.0
    filters.flags.writeable = False
    return filters


def _hann(length: int) -> np.ndarray:
    """The periodic Hann window, float64 [length]."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)


def _frames(samples: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """[samples] -> [frames, length], a copy of what follows each start."""
    return samples[starts[:, None] + np.arange(length)]


def _spread_frames(waveform: np.ndarray, length: int, count: int) -> np.ndarray:
    """float64 [count, length]: frames from the first sample to the last; zeros behind if short."""
    samples = np.asarray(waveform, np.float64)
    samples = np.pad(samples, (0, max(0, length - len(samples))))
    starts = np.rint(np.linspace(0, len(samples) - length, count)).astype(np.int64)
    return _frames(samples, starts, length)


def _magnitude(frames: np.ndarray, window: np.ndarray, n_fft: int | None = None) -> np.ndarray:
    """|X| of each windowed frame: [frames, length] -> float64 [frames, n_fft // 2 + 1]."""
    return np.abs(np.fft.rfft(frames * window, n_fft, axis=1))
