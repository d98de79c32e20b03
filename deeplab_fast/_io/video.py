"""Videos and cameras, read and written with PyAV (FFmpeg)."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

# Audio codecs that players expect in an MP4 file. Others, such as PCM, need another kind of file.
_AUDIO_OF_MP4 = {"aac", "ac3", "alac", "eac3", "flac", "mp3", "opus"}
_FORMATS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov"}

# swscale's numbers of the matrices between RGB and YUV, by FFmpeg's AVColorSpace
_BT709, _BT601 = 1, 5
_MATRICES = {1: _BT709, 4: 4, 5: _BT601, 6: _BT601, 7: 7, 9: 9, 10: 9}
_LIMITED, _FULL = 1, 2  # AVColorRange
_RESERVED, _UNSPECIFIED = (0, 3), 2  # AVColorPrimaries, AVColorTransferCharacteristic
_ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC: the cover of a song

# Containers whose header has the duration, which shows whether a file was cut short. For others
# FFmpeg estimates the duration from what is left of the file.
_WITH_DURATION = {"mov", "matroska", "avi", "flv", "asf"}
_ROUNDING = 0.5  # seconds that a duration in a header may be too long


class VideoError(ValueError):
    """A video cannot be read. The message gives the reason in one line, without the path."""


class VideoWriteError(ValueError):
    """A video cannot be written. The message gives the reason in one line, without the path."""


class Frame(NamedTuple):
    """A picture of a video.

    Attributes:
        pixels: uint8 [H, W, 3], RGB, upright.
        time: when it is shown, in units of the reader's ``time_base``; later than the frame before.
        duration: for how long, in the same units.
    """

    pixels: np.ndarray
    time: int
    duration: int


AudioPacket: TypeAlias = Any  # av.Packet, a piece of an audio stream; PyAV may not be installed


def import_av() -> Any:
    """The module ``av``.

    Raises:
        VideoError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        problem = "PyAV is missing" if error.name == "av" else f"PyAV does not work: {error}"
        raise VideoError(f'{problem} (expected pip install "deeplab-fast[video]")') from None
    return av


def is_video(path: str | os.PathLike[str]) -> bool:
    """True if the content of a file is a video, rather than an image, a song or text.

    Raises:
        VideoError: PyAV is not installed.
    """
    av = import_av()
    try:
        with av.open(os.fspath(path)) as container:
            # FFmpeg also reads images, and text as pictures of a terminal.
            name = container.format.name
            no_video = name in ("image2", "gif", "tty") or name.endswith("_pipe")
            return not no_video and bool(_video_streams(container))
    except (av.FFmpegError, OSError):
        return False


class VideoReader:
    """The frames of a video or camera, and the packets of its audio, in the order of the file.

    Frames are turned upright as the metadata of the video say (those of phones do), and converted
    to 8 bits. Frames that cannot be decoded are left out and counted.

    Args:
        source: path of a file, or name of a device.
        format: FFmpeg's name for the kind of device; None for files.

    Attributes:
        size: (width, height) of the upright frames.
        time_base: unit of all times, in seconds.
        frame_rate: average number of frames per second.
        num_frames: their number according to the header, or None if it is unknown.
        pixel_aspect: width of an upright pixel divided by its height, or None.
        colours: swscale's number of the YUV matrix for a copy, and FFmpeg's numbers of the
            primaries and of the transfer function.
        audio: audio streams, whose packets are among the items.
        suffix: extension of a file that can hold a copy: .mp4, or for rare audio .mkv or .mov.
        left_out: what a copy will lack, in words.
        decoded, undecodable, corrupt: how many frames so far were decoded, how many could not be,
            and how many of the decoded ones have errors.
        first_damage: number, from 1, and time in seconds of the first of these.
        cut_short: why the file ends too early, or None; known after the last frame.

    Raises:
        VideoError: it cannot be opened, or has no frame that can be decoded.

    >>> with VideoReader("clip.mp4") as reader:
    ...     frames = [item for item in reader if isinstance(item, Frame)]
    """

    def __init__(self, source: str | os.PathLike[str], format: str | None = None) -> None:
        self._av = import_av()
        self._is_device = format is not None
        try:
            self._container = self._av.open(os.fspath(source), format=format)
        except OSError as error:
            raise VideoError(f"{_reason(error)} (expected a readable video)") from None
        except self._av.FFmpegError as error:
            raise VideoError(
                f"not a video, or incomplete: {_reason(error)} (expected MP4, MOV, MKV, WebM, ...)"
            ) from None
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file or device."""
        self._container.close()

    def __iter__(self) -> Iterator[Frame | AudioPacket]:
        return self._items

    def _start(self) -> None:
        streams = _video_streams(self._container)
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in self._container.streams}))
            raise VideoError(f"no video stream (expected one, got {kinds or 'an empty file'})")
        self._stream = streams[0]
        if self._stream.codec_context is None:
            raise VideoError("unknown video codec (expected one that PyAV's FFmpeg can decode)")
        self._stream.thread_type = "AUTO"
        self.audio = [stream for stream in self._container.streams.audio if _is_known(stream)]
        self.suffix = self._suffix()
        self.left_out = []
        if len(self.audio) < len(self._container.streams.audio):
            self.left_out.append("audio of an unknown codec")
        if self._container.streams.subtitles:
            self.left_out.append("subtitles")

        self.time_base: Fraction = self._stream.time_base
        self.frame_rate = Fraction(self._stream.average_rate or self._stream.guessed_rate or 25)
        self.num_frames: int | None = self._stream.frames or None
        if self.num_frames is None and self._container.duration:
            self.num_frames = round(self._container.duration * self.frame_rate / 10**6)
        # A copy begins at 0, as FFmpeg's own do: the clock of a broadcast may begin at hours.
        self._start_time = Fraction(max(0, self._container.start_time or 0), 10**6)
        self._last_time: int | None = None
        self._next_time = 0  # when the last frame ends
        self._end = 0.0  # seconds, when the last of all packets ends
        self.decoded = self.undecodable = self.corrupt = 0
        self.first_damage: tuple[int, float] | None = None
        self.cut_short: str | None = None

        frames = self._read()
        head = []
        for item in frames:
            head.append(item)
            if isinstance(item, Frame):
                self.size = item.pixels.shape[1], item.pixels.shape[0]
                break
        else:
            raise VideoError(
                "none of its frames can be decoded (expected a complete video without encryption)"
            )
        self._items = itertools.chain(head, frames)

    def _suffix(self) -> str:
        codecs = {stream.codec_context.codec.canonical_name for stream in self.audio}
        if codecs <= _AUDIO_OF_MP4:
            return ".mp4"
        # A phone's or camera's audio fits into MOV, as its own file is of this family.
        suffixes = [".mov", ".mkv"] if "mov" in self._container.format.name else [".mkv", ".mov"]
        return next(filter(self._can_hold_audio, suffixes), ".mkv")

    def _can_hold_audio(self, suffix: str) -> bool:
        with self._av.open(io.BytesIO(), "w", format=_FORMATS[suffix]) as container:
            try:
                for stream in self.audio:
                    container.add_stream_from_template(stream)
            except ValueError:
                return False
        return True

    def _read(self) -> Iterator[Frame | AudioPacket]:
        audio = {stream.index for stream in self.audio}
        packets = self._container.demux()
        while True:
            try:
                packet = next(packets, None)
            except (self._av.FFmpegError, OSError) as error:
                self.cut_short = _reason(error)
                break
            if packet is None:
                break
            if packet.size == 0:  # demux ends with these; the decoder is flushed below instead
                continue
            if packet.pts is not None and packet.stream.type in ("video", "audio"):
                end = packet.pts + (packet.duration or 0)
                self._end = max(self._end, float(end * packet.time_base))
            if packet.stream.index == self._stream.index:
                yield from self._decode(packet)
            elif packet.stream.index in audio and packet.dts is not None:
                start = round(self._start_time / packet.time_base)
                packet.dts -= start
                packet.pts = packet.dts if packet.pts is None else packet.pts - start
                yield packet
        yield from self._decode(None)
        if self.cut_short is None:
            self.cut_short = self._missing_end()

    def _decode(self, packet: Any) -> Iterator[Frame]:
        try:
            frames = self._stream.decode(packet)
        except self._av.error.EOFError:
            return
        except self._av.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            self._note_damage()  # a decoder with threads raises it when the frame's turn comes
            self.undecodable += 1
            return
        for frame in frames:
            if frame.is_corrupt:
                self._note_damage()
                self.corrupt += 1
            self.decoded += 1
            yield self._converted(frame)

    def _note_damage(self) -> None:
        if self.first_damage is None:
            number = self.decoded + self.undecodable + 1
            self.first_damage = number, float(self._next_time * self.time_base)

    def _converted(self, frame: Any) -> Frame:
        turn = np.frombuffer(frame.side_data.get("DISPLAYMATRIX") or _NO_TURN, np.int32)
        matrix = _MATRICES.get(frame.colorspace)
        if matrix is None:  # not stored; players guess by the size
            matrix = _BT709 if frame.height > 576 else _BT601
        if self._last_time is None:
            if self._is_device and frame.pts is not None:  # its clock began long ago
                self._start_time = frame.pts * self.time_base
            self._stored_size = frame.width, frame.height
            aspect = self._stream.sample_aspect_ratio
            self.pixel_aspect = 1 / aspect if aspect and _is_sideways(turn) else aspect or None
            tags = frame.color_primaries, frame.color_trc
            self.colours = (
                _BT601 if matrix == _BT601 else _BT709,
                *(_UNSPECIFIED if x in _RESERVED else x for x in tags),
            )
        pixels = frame.reformat(
            *self._stored_size,  # the resolution may change within a stream
            format="rgb24",
            src_colorspace=matrix,
            dst_colorspace=_BT601,  # RGB has none, but an equal one would let both be ignored
            src_color_range=frame.color_range or _LIMITED,
            dst_color_range=_FULL,
        ).to_ndarray()
        time = self._next_time  # raw streams have no times of their own
        if frame.pts is not None:
            time = frame.pts - round(self._start_time / self.time_base)
        if self._last_time is not None:
            time = max(time, self._last_time + 1)
        duration = frame.duration or max(1, round(1 / (self.frame_rate * self.time_base)))
        self._last_time, self._next_time = time, time + duration
        return Frame(_upright(pixels, turn), time, duration)

    def _missing_end(self) -> str | None:
        names = set(self._container.format.name.split(","))
        if not names & _WITH_DURATION or not self._container.duration:
            return None
        duration = self._container.duration / 10**6
        if "avi" in names:  # its duration was reduced to what is left of the file
            duration = float(self._stream.frames / self.frame_rate)
        end = self._end - (self._container.start_time or 0) / 10**6
        if end >= duration - _ROUNDING:
            return None
        return f"the file ends after {end:.1f} of {duration:.1f} seconds"


def _video_streams(container: Any) -> list[Any]:
    return [s for s in container.streams.video if not int(s.disposition) & _ATTACHED_PICTURE]


def _is_known(audio: Any) -> bool:
    return audio.codec_context is not None and bool(audio.codec_context.sample_rate)


# A display matrix [a b u; c d v; x y w] moves the pixel (p, q) to (a p + c q, b p + d q), up to a
# factor and an offset (FFmpeg's libavutil/display.h). Other angles are rounded to right ones.
_NO_TURN = np.array([1, 0, 0, 0, 1, 0, 0, 0, 1], np.int32).tobytes()


def _is_sideways(turn: np.ndarray) -> bool:
    return abs(int(turn[1])) > abs(int(turn[0]))


def _upright(pixels: np.ndarray, turn: np.ndarray) -> np.ndarray:
    right, down = turn[0], turn[4]
    if _is_sideways(turn):
        pixels = pixels.swapaxes(0, 1)
        right, down = turn[3], turn[1]
    if down < 0:
        pixels = pixels[::-1]
    if right < 0:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


class VideoWriter:
    """Writes frames as H.264 (8-bit 4:2:0), and copies the audio of a reader.

    Times, pixel aspect and colour space are those of the reader. H.264 needs even sides in this
    format: the last row or column of an odd one is repeated.

    Args:
        path: file to write, of any extension; the kind of file is ``reader.suffix``.
        reader: where the frames and packets come from.

    Raises:
        VideoWriteError: the file cannot be written.

    >>> with VideoReader("clip.mp4") as reader, VideoWriter(Path("copy.mp4"), reader) as writer:
    ...     for item in reader:
    ...         writer.write(item)
    """

    def __init__(self, path: Path, reader: VideoReader) -> None:
        self._av = import_av()
        self._reader = reader
        self._durations: dict[int, int] = {}
        self._audio: dict[int, Any] = {}
        self._audio_times: dict[int, int] = {}
        with self._errors():
            self._container = self._av.open(
                os.fspath(path),
                "w",
                format=_FORMATS[reader.suffix],
                options={} if reader.suffix == ".mkv" else {"movflags": "+faststart"},
            )
        try:
            self._add_streams()
        except BaseException:
            self.abandon()
            raise

    def _add_streams(self) -> None:
        reader = self._reader
        width, height = (side + side % 2 for side in reader.size)
        with self._errors():
            # Without B-frames the order of storage is that of display, so that MP4 files keep
            # uneven times exactly.
            options = {"preset": "veryfast", "crf": "20", "bf": "0"}
            self._video = self._container.add_stream(
                "libx264", rate=reader.frame_rate, options=options
            )
            self._video.width, self._video.height = width, height
            context = self._video.codec_context
            context.pix_fmt, context.thread_type = "yuv420p", "AUTO"
            context.time_base = reader.time_base
            if reader.pixel_aspect is not None:
                context.sample_aspect_ratio = reader.pixel_aspect
            matrix, context.color_primaries, context.color_trc = reader.colours
            context.colorspace = 6 if matrix == _BT601 else matrix  # AVColorSpace
            context.color_range = _LIMITED
            for stream in reader.audio:
                try:
                    copy = self._container.add_stream_from_template(stream)
                except ValueError:  # no kind of file holds this codec
                    reader.left_out.append(f"audio ({stream.codec_context.name})")
                    continue
                if "language" in stream.metadata:
                    copy.metadata["language"] = stream.metadata["language"]
                self._audio[stream.index] = copy

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def close(self) -> None:
        """Complete the file."""
        with self._errors():
            self._mux(self._video.encode(None))
            self._container.close()

    def abandon(self) -> None:
        """Close the file without completing it."""
        with contextlib.suppress(Exception):  # the first error is the one to report
            self._container.close()

    def write(self, item: Frame | AudioPacket) -> None:
        """Write a frame, or copy a packet of audio."""
        with self._errors():
            if isinstance(item, Frame):
                self._durations[item.time] = item.duration
                self._mux(self._video.encode(self._yuv(item)))
            elif item.stream.index in self._audio:
                self._copy(item)

    def _yuv(self, item: Frame) -> Any:
        height, width = item.pixels.shape[:2]
        pixels = item.pixels
        if height % 2 or width % 2:
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame = frame.reformat(
            format="yuv420p",
            src_colorspace=_BT601,
            dst_colorspace=self._reader.colours[0],
            src_color_range=_FULL,
            dst_color_range=_LIMITED,
        )
        frame.pts, frame.time_base = item.time, self._reader.time_base
        return frame

    def _mux(self, packets: list[Any]) -> None:
        for packet in packets:
            packet.duration = self._durations.pop(packet.pts, packet.duration)
            self._container.mux(packet)

    def _copy(self, packet: Any) -> None:
        index = packet.stream.index
        last = self._audio_times.get(index)
        if last is not None and packet.dts <= last:  # where recordings were joined
            packet.pts += last + 1 - packet.dts
            packet.dts = last + 1
        self._audio_times[index] = packet.dts
        packet.stream = self._audio[index]
        self._container.mux(packet)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (self._av.FFmpegError, OSError, ValueError) as error:
            if isinstance(error, MemoryError):
                raise
            raise VideoWriteError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__
