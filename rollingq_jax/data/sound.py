"""Sound: WAV and FLAC through ``soundfile``, resampling through SciPy (imported on first use)."""

import contextlib
import io
import os
import struct
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from rollingq_jax.data.reading import HEAD, check_impostor, reading
from rollingq_jax.errors import DataError

MIN_RATE, MAX_RATE = 100, 1_000_000  # Hz
MAX_CHANNELS = 1024
# A sample rate may be off by this share of it where the exact ratio would cost much more: a tenth
# of the smallest difference in pitch that is heard, and half a millisecond in ten seconds.
RATE_TOLERANCE = 5e-5

_BLOCK = 1 << 20  # samples of all channels decoded at a time
_UNKNOWN_FRAMES = 1 << 62  # libsndfile gives 2^63 - 1 where a FLAC header is silent


def samples_in(seconds: float, rate: int) -> int:
    """How many samples are used of the first ``seconds``: those, and one for the resampling."""
    return round(seconds * rate) + 1


def read_audio(path: str | os.PathLike, seconds: float | None = None) -> tuple[np.ndarray, int]:
    """A WAV or FLAC file as float32 [samples] in [-1, 1], channels averaged, and its sample rate.

    Args:
      path: the file. Where its header leaves the length open, as encoders do that write to a pipe,
        it is read to its end.
      seconds: only the beginning is decoded, :func:`samples_in` of it; None decodes all.

    Raises:
      DataError: the file is missing, damaged, empty, shorter than its header says, or has a sample
        rate or a number of channels out of range.
    """
    with _open_sound(path, seconds) as sound:
        most = None if seconds is None else samples_in(seconds, sound.samplerate)
        parts = list(_blocks(sound, most))
        count = sum(map(len, parts))
        if count == 0:
            raise DataError(f"audio {path}: holds no samples")
        return check_waveform(np.concatenate(parts), path), int(sound.samplerate)


def sound_seconds(path: str | os.PathLike, at_most: float | None = None) -> float:
    """The length of a WAV or FLAC file from its header; by decoding where the header is silent.

    Args:
      path: the file.
      at_most: decoding ends there, so that a longer file may count as this long.

    Raises:
      DataError: as in :func:`read_audio`.
    """
    with _open_sound(path, at_most) as sound:
        frames, rate = sound.frames, sound.samplerate
        if frames >= _UNKNOWN_FRAMES:
            most = None if at_most is None else samples_in(at_most, rate)
            frames = sum(map(len, _blocks(sound, most)))
        return frames / rate


@contextlib.contextmanager
def _open_sound(path: str | os.PathLike, seconds: float | None) -> Iterator[Any]:
    """An open ``soundfile.SoundFile`` whose header has been checked."""
    with reading(path, "audio"):
        import soundfile

        with open(path, "rb") as file:
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


def _blocks(sound: Any, most: int | None) -> Iterator[np.ndarray]:
    """The sound in float32 [samples] of a bounded size, channels averaged; ``most`` samples."""
    block, left = max(_BLOCK // sound.channels, 1), most
    while left is None or left > 0:
        samples = sound.read(
            block if left is None else min(block, left), dtype="float32", always_2d=True
        )
        if not len(samples):
            break
        yield average_channels(samples)
        left = None if left is None else left - len(samples)


def average_channels(samples: np.ndarray) -> np.ndarray:
    """float32 [samples, channels] -> [samples]; NaN and infinity go through without a warning."""
    with np.errstate(all="ignore"):
        return samples.mean(axis=1, dtype=np.float32)


def check_waveform(waveform: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """float32 [samples], as it came; ``path`` is for the error message.

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
            f"audio {path}: sample rate {rate} Hz; must be in [{MIN_RATE}, {MAX_RATE}] Hz"
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise DataError(f"audio {path}: {channels} channels; must be in [1, {MAX_CHANNELS}]")


class _WavHeader(NamedTuple):
    """What a WAV file says of itself.

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
    """Reads the chunks before the samples; None for another format. Leaves ``file`` at its start.

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
    order = ">" if magic == b"RIFX" else "<"
    size = os.fstat(file.fileno()).st_size
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
                is_open = _is_open(length, bits) or (bits == 32 and _is_open(riff_length, 32))
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


def _is_open(length: int, bits: int) -> bool:
    """Whether a length stands for "not known yet": 0, or near the largest of ``bits`` or 32 bits.

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
    """Whether a sequence of well-formed chunks leads from here to the end of the file."""
    while file.tell() < size:
        chunk = file.read(8)
        name, length = struct.unpack(f"{order}4sI", chunk.ljust(8, b"\0"))
        if not (name.isascii() and name.decode().isprintable()) or file.tell() + length > size:
            return False
        file.seek(length + length % 2, os.SEEK_CUR)
    return True


def _with_length(file: Any, wav: _WavHeader, seconds: float | None) -> Any:
    """The file itself; where libsndfile would not read its header, a copy with a plain one.

    The copy holds the bytes for ``seconds`` at most. libsndfile takes a length of 0 as it is, and
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
    """Band-limited (polyphase) resampling of float32 [samples] from ``rate`` to ``target_rate``.

    The ratio of rates with a small common period is exact; others are taken as the nearby ratio of
    the smallest numbers that is off by at most ``RATE_TOLERANCE`` of it.

    Raises:
      DataError: a rate is not positive.
    """
    if rate <= 0 or target_rate <= 0:
        raise DataError(f"sample rates: {rate} to {target_rate}; both must be positive")
    if rate == target_rate:
        return waveform.astype(np.float32)
    from scipy.signal import resample_poly

    up, down = _ratio(int(rate), int(target_rate))
    if up == down:
        return waveform.astype(np.float32)
    return resample_poly(waveform, up, down).astype(np.float32)


def _ratio(rate: int, target_rate: int) -> tuple[int, int]:
    """(up, down) whose ratio is ``target_rate / rate``, nearly so where that needs large numbers.

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
