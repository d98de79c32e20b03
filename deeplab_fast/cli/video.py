"""Videos and cameras for ``deeplab-fast segment``."""

from __future__ import annotations

import contextlib
import glob
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Collection, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from .._io.files import replacing
from .._io.images import image_extensions
from .._io.overlay import overlay
from .._io.palette import label_image
from .._io.video import (
    Frame,
    VideoError,
    VideoReader,
    VideoWriteError,
    VideoWriter,
    import_av,
    is_video,
)
from ..training.signals import stop_requested
from .errors import UserError, reason
from .images import VIDEO_EXTENSIONS, can_read_videos, shown, write_png
from .results import LABELS, OVERLAY, Segmenter


def is_camera(argument: str | Path) -> bool:
    """True for ``camera:0`` and the like, unless there is a file of this name."""
    return bool(re.fullmatch(r"camera:\d+", str(argument))) and not os.path.lexists(argument)


def is_video_or_camera(path: Path) -> bool:
    """True for cameras and, by their extension or else their content, for videos."""
    extension = path.suffix.lower()
    if is_camera(path) or extension in VIDEO_EXTENSIONS:
        return True
    if extension in image_extensions() or not path.is_file() or not can_read_videos():
        return False
    try:
        with Image.open(path):
            return False
    except Exception:  # what is no image raises anything
        return is_video(path)


def segment_video(
    segmenter: Segmenter,
    source: Path,
    base: Path,
    inputs: Collection[str],
    max_frames: int | None,
) -> tuple[dict[str, Any], str | None]:
    """Segment all frames, write the overlay video or the labels, and print the shares of classes.

    A result is complete or absent. If the file was cut short, the result of what is left of it has
    the extension ``.partial.mp4``.

    Args:
        segmenter: the network. If its kinds of results do not include the overlay, the labels of
            each frame are written to a folder instead of the overlay video.
        source: path of a video, or ``camera:0``.
        base: path of the result without ``_overlay.mp4``.
        inputs: real paths of files that must not be overwritten.
        max_frames: how many frames of a camera to record; None until Ctrl-C.

    Returns:
        The video's entry in the JSON, and a message about damaged frames or None.

    Raises:
        UserError: there is no such result of a video, the video cannot be read or was cut short, or
            the result cannot be written.
    """
    unknown = [f"--{kind.name}" for kind in segmenter.kinds if kind not in (LABELS, OVERLAY)]
    unknown += ["--legend"] if segmenter.legend else []
    if unknown:
        raise UserError(f"{unknown[0]}: expected an image, got a video")
    labels_only = OVERLAY not in segmenter.kinds
    camera = is_camera(source)
    if camera:  # a recording cannot be made again, so each has a name of its own
        base = base.with_name(f"{base.name}_{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    try:
        with _open(source) as reader:
            kind, ending = ("labels", "") if labels_only else ("overlay", reader.suffix)
            result = base.with_name(f"{base.name}_{kind}{ending}")
            if os.path.realpath(result) in inputs:
                raise UserError(
                    f"{os.path.relpath(result)} would be overwritten, but it is also an input "
                    "(expected another --output)"
                )
            recording = _Recording(segmenter, source, reader, max_frames)
            try:
                result.parent.mkdir(parents=True, exist_ok=True)
                (_write_labels if labels_only else _write_overlay)(recording, result)
            except (VideoWriteError, OSError) as error:
                problem = f"cannot write {os.path.relpath(result)}: {reason(error)}"
                raise UserError(problem) from error
    except VideoError as error:
        raise UserError(str(error)) from None
    notes = "".join(f", without {what}" for what in reader.left_out)
    shares = recording.shares()
    lines = [
        f"{shown(source)} ({reader.size[0]}x{reader.size[1]}, {recording.frames} frames) -> "
        f"{os.path.relpath(result)}{notes}",
        *(f"  {100 * share:5.1f} %  {segmenter.painting.name(label)}" for label, share in shares),
    ]
    tqdm.write("\n".join(lines))
    record = {
        "image": shown(source),
        "width": reader.size[0],
        "height": reader.size[1],
        "frames": recording.frames,
        "results": {kind: os.path.relpath(result)},
        "shares": [
            {"class": label, "name": segmenter.painting.name(label), "share": share}
            for label, share in shares
        ],
    }
    # The first pictures of a camera often have errors; a camera that fails ends the recording.
    return record, reader.cut_short if camera else _damage(reader)


class _Recording:
    """The frames of a reader with their labels, and the sums of the shares of classes."""

    def __init__(
        self, segmenter: Segmenter, source: Path, reader: VideoReader, max_frames: int | None
    ) -> None:
        self.segmenter, self.source, self.reader = segmenter, source, reader
        self.painting = segmenter.painting
        self.is_camera = is_camera(source)
        self.max_frames = max_frames if self.is_camera else None
        self.frames = 0
        self._shares = np.zeros(1)

    def __iter__(self) -> Iterator[tuple[Any, np.ndarray | None]]:
        """Frames and their labels, and packets of audio and None."""
        total = self.max_frames if self.is_camera else self.reader.num_frames
        name = shown(self.source) + (", until Ctrl-C" if self.is_camera else "")
        bar = tqdm(total=total, desc=name, unit="frame", leave=False, disable=None)
        with bar, contextlib.closing(self._items()) as items:
            for item in items:
                labels = None
                if isinstance(item, Frame):
                    labels = self.segmenter.labels(Image.fromarray(item.pixels))
                    self._count(labels)
                    bar.update()
                yield item, labels
                if self.frames == self.max_frames:
                    return

    def _items(self) -> Generator[Any, None, None]:
        yield from _newest(self.reader) if self.is_camera else self.reader

    def _count(self, labels: np.ndarray) -> None:
        self.frames += 1
        shares = np.bincount(labels.ravel()) / labels.size
        self._shares = np.pad(self._shares, (0, max(0, len(shares) - len(self._shares))))
        self._shares[: len(shares)] += shares

    def shares(self) -> list[tuple[int, float]]:
        """The classes and their shares of the pixels, the largest first, as for one image."""
        order = np.argsort(-self._shares, kind="stable")
        return [(int(x), float(self._shares[x] / self.frames)) for x in order if self._shares[x]]


def _write_overlay(recording: _Recording, result: Path) -> None:
    """Write the frames with their classes painted over, and copy the audio."""
    with replacing(result) as partial:
        with VideoWriter(partial, recording.reader) as writer:
            for item, labels in recording:
                if labels is not None:
                    picture = overlay(Image.fromarray(item.pixels), labels, recording.painting)
                    item = item._replace(pixels=np.asarray(picture))
                writer.write(item)
        _check_end(recording, partial, result)


def _write_labels(recording: _Recording, result: Path) -> None:
    """Write the labels of each frame to a folder, which replaces that of an earlier run."""
    if result.exists() and not _has_only_frames(result):
        raise UserError(
            f"{os.path.relpath(result)} has other files (expected a folder of frames, or none)"
        )
    partial = result.with_name(f".{result.name[:50]}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        for _, labels in recording:
            if labels is not None:
                picture = label_image(labels, recording.painting.palette)
                write_png(picture, partial / f"{recording.frames:06d}.png")
        _check_end(recording, partial, result)
        _move(partial, result)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _has_only_frames(folder: Path) -> bool:
    return folder.is_dir() and all(
        re.fullmatch(r"\d{6,}\.png", name) for name in os.listdir(folder)
    )


def _move(partial: Path, result: Path) -> None:
    if result.is_dir():
        shutil.rmtree(result)
    os.replace(partial, result)


def _check_end(recording: _Recording, partial: Path, result: Path) -> None:
    """Raise UserError if the file was cut short, after its result has got a name that says so.

    Raise KeyboardInterrupt if a camera was interrupted before its first frame.
    """
    if recording.frames == 0:
        raise KeyboardInterrupt
    if recording.reader.cut_short is None or recording.is_camera:
        return
    kept = result.with_name(f"{result.stem}.partial{result.suffix}")
    _move(partial, kept)
    raise UserError(
        f"cut short: {recording.reader.cut_short} (expected a complete video); "
        f"{os.path.relpath(kept)} has its {recording.frames} frames"
    )


def _damage(reader: VideoReader) -> str | None:
    """A message about frames that are missing or have errors."""
    counts = [
        f"{count} frame{'' if count == 1 else 's'} {problem}"
        for count, problem in (
            (reader.undecodable, "could not be decoded and left out"),
            (reader.corrupt, "decoded with errors"),
        )
        if count
    ]
    if reader.first_damage is None:
        return None
    first = "the first is frame {} at {:.2f} s".format(*reader.first_damage)
    return f"damaged: {', '.join(counts)}, {first} (expected a complete video)"


def _open(source: Path) -> VideoReader:
    if not is_camera(source):
        if not source.is_file():  # opening a named pipe would block
            raise UserError("no such file, or not a regular one (expected a video)")
        return VideoReader(source)
    name, format = camera_device(int(source.name.partition(":")[2]))
    try:
        return VideoReader(name, format)
    except VideoError as error:
        import_av()  # its own error, if it is missing
        found = sorted(glob.glob("/dev/video*"))
        problem = str(error).partition(" (expected")[0]
        raise UserError(
            f"{name}: {problem} (expected a camera, found {', '.join(found) or 'no /dev/video*'})"
        ) from None


def camera_device(index: int) -> tuple[str, str]:
    """Name of a camera, and FFmpeg's name of the interface: Video4Linux."""
    return f"/dev/video{index}", "v4l2"


def _newest(reader: VideoReader) -> Iterator[Any]:
    """The items of a camera until Ctrl-C; those that come while the last is in use are dropped."""
    slot: queue.Queue[Any] = queue.Queue(1)

    def read() -> None:
        try:
            for item in reader:
                put(item)
                if ended.is_set():
                    return
            put(None)
        except BaseException as error:  # to be raised where the item is taken
            put(error)

    def put(item: Any) -> None:
        with contextlib.suppress(queue.Empty):
            slot.get_nowait()
        slot.put(item)

    ended = threading.Event()
    thread = threading.Thread(target=read, daemon=True)
    with stop_requested() as stopped:
        thread.start()
        try:
            while not stopped.is_set():
                with contextlib.suppress(queue.Empty):
                    item = slot.get(timeout=0.1)
                    if item is None:
                        return
                    if isinstance(item, BaseException):
                        raise item
                    yield item
        finally:
            ended.set()
            thread.join()
