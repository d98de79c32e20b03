"""Videos and cameras in ``deeplab-fast segment``: times, audio, orientation, colours, errors."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import struct
import sys
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplab_fast._io.overlay import overlay, painting_of
from deeplab_fast._io.video import Frame, VideoReader, VideoWriter
from deeplab_fast.cli import video as command
from deeplab_fast.models.photos import photo_of_argument

from ..support.segment import files, photo, segment

av = pytest.importorskip("av", reason='needs PyAV: pip install "deeplab-fast[video]"')

pytestmark = pytest.mark.usefixtures("one_thread", "folder")

CATEGORIES = ("background", "red", "green")
RED, GREEN, BLUE = (220, 30, 30), (30, 200, 60), (40, 90, 160)


def by_colour(frame, **views) -> np.ndarray:
    """Class 1 for red pixels and 2 for green ones."""
    pixels = np.asarray(frame).astype(int)
    red, green = (pixels[..., c] > pixels[..., [0, 1, 2]].mean(-1) + 50 for c in (0, 1))
    return np.where(red, 1, np.where(green, 2, 0)).astype(np.uint8)


@pytest.fixture
def network(stand_in):
    """A network that knows red and green."""
    stand_in.segment, stand_in.label_names = by_colour, CATEGORIES
    return stand_in


def picture(index: int, count: int, width: int, height: int) -> np.ndarray:
    """A red block at the top left, and a green one below that moves to the right."""
    pixels = np.full((height, width, 3), BLUE, np.uint8)
    pixels[: height // 2, : width // 4] = RED
    left = index * width // count // 8 * 8
    pixels[height // 2 :, left : left + width // 8] = GREEN
    return pixels


def clip(
    path: str,
    codec: str = "libx264",
    audio: str | None = "aac",
    times: list[int] | None = None,
    time_base: Fraction = Fraction(1, 25),
    size: tuple[int, int] = (64, 48),
    pixel_format: str = "yuv420p",
    aspect: Fraction | None = None,
    format: str | None = None,
    count: int = 12,
    **options: str,
) -> None:
    """A video of pictures and, with ``audio``, of a tone that lasts as long."""
    times = list(range(count)) if times is None else times
    with av.open(path, "w", format=format, options=options) as container:
        quiet = {"x265-params": "log-level=none"} if codec == "libx265" else {}
        stream = container.add_stream(codec, rate=25, options=quiet)
        (stream.width, stream.height), stream.pix_fmt = size, pixel_format
        stream.codec_context.time_base = time_base
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        sound = audio and container.add_stream(audio, rate=48000)
        for index, when in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(index, len(times), *size), format="rgb24")
            frame.pts, frame.time_base = when, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        start = int(times[0] * time_base * 48000) if times else 0
        samples = sound.codec_context.frame_size or 1024 if sound else 1
        for when in range(0, int(len(times) * 48000 / 25) if sound else 0, samples):
            tone = np.sin((when + np.arange(samples)) * 2 * np.pi * 440 / 48000) * 8000
            frame = av.AudioFrame.from_ndarray(
                np.repeat(tone.astype(np.int16), 2)[None], format="s16", layout="stereo"
            )
            frame.sample_rate, frame.pts, frame.time_base = 48000, start + when, Fraction(1, 48000)
            container.mux(sound.encode(frame))
        if sound:
            container.mux(sound.encode())


def frames(path: str | Path) -> tuple[list[float], list[np.ndarray]]:
    """Times in seconds and upright pixels, as another player would show them."""
    with av.open(str(path)) as container:
        found = [
            (float(frame.pts * frame.time_base), frame.rotation, frame.to_ndarray(format="rgb24"))
            for frame in container.decode(video=0)
        ]
    assert all(rotation == 0 for _, rotation, _ in found)
    return [when for when, _, _ in found], [pixels for _, _, pixels in found]


def times_of(path: str) -> list[float]:
    with av.open(path) as container:
        return [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]


def audio_packets(path: str | Path) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(audio=0) if packet.size]
        return [(float(packet.pts * packet.time_base), bytes(packet)) for packet in packets]


def run(capsys, *arguments: object) -> tuple[int, str, list[str]]:
    return segment(capsys, *arguments, "--weights", "any", "--output", "out")


def painted(pixels: np.ndarray) -> np.ndarray:
    photo = Image.fromarray(pixels)
    labels = by_colour(photo)
    return np.asarray(overlay(photo, labels, painting_of(CATEGORIES, 3)))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return np.abs(a.astype(int) - b).mean()


CONTAINERS = {
    "clip.mp4": ({}, ".mp4"),
    "clip.mkv": ({"audio": "libopus"}, ".mp4"),
    "clip.webm": ({"codec": "libvpx-vp9", "audio": "libopus"}, ".mp4"),
    "clip.avi": ({"codec": "mjpeg", "pixel_format": "yuvj420p", "audio": "libmp3lame"}, ".mp4"),
    "clip.mov": ({"audio": "pcm_s16le"}, ".mov"),
    "pcm.avi": ({"codec": "mpeg4", "audio": "pcm_s16le"}, ".mkv"),
    "hevc.mp4": ({"codec": "libx265", "pixel_format": "yuv420p10le"}, ".mp4"),
    "silent.mkv": ({"codec": "ffv1", "audio": None}, ".mp4"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_overlay_video_has_the_frames_times_and_audio_of_the_input(name, network, folder, capsys):
    options, extension = CONTAINERS[name]
    clip(name, **options)
    status, out, err = run(capsys, name)
    assert (status, err) == (0, [])
    result = Path("out", f"{Path(name).stem}_overlay{extension}")
    assert files(folder / "out") == [result.name]
    assert out.splitlines()[0] == f"{name} (64x48, 12 frames) -> {result}"

    times, pictures = frames(result)
    assert times == pytest.approx(times_of(name), abs=0.001)
    candidates = [painted(picture(index, 12, 64, 48)) for index in range(12)]
    for pixels, expected in zip(pictures, candidates, strict=True):
        assert difference(pixels, expected) == min(difference(pixels, x) for x in candidates) < 20
    with av.open(str(result)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
    if options.get("audio", "aac") is not None:
        before, after = audio_packets(name), audio_packets(result)
        assert [data for _, data in after] == [data for _, data in before]
        assert [t for t, _ in after] == pytest.approx([t for t, _ in before], abs=0.001)


def test_uneven_times_are_kept(network, capsys):
    times = [0, 1, 3, 4, 10, 11, 20, 21, 22, 47]
    clip("clip.mkv", times=times, time_base=Fraction(1, 50), audio=None)
    assert run(capsys, "clip.mkv")[0] == 0
    assert frames("out/clip_overlay.mp4")[0] == pytest.approx([t / 50 for t in times], abs=1e-6)
    with av.open("out/clip_overlay.mp4") as container:
        stream = container.streams.video[0]  # players end with it, even before the last frame
        assert float(stream.duration * stream.time_base) == pytest.approx(
            47 / 50 + 1 / 25, abs=1e-3
        )


def test_clock_of_a_broadcast(network, capsys):
    """Its hours are not waited for, and sound and picture stay together."""
    clip("clip.ts", times=list(range(1_000_000, 1_000_012)), audio="libmp3lame")
    assert run(capsys, "clip.ts")[0] == 0
    before, after = times_of("clip.ts"), times_of("out/clip_overlay.mp4")
    heard, copied = audio_packets("clip.ts"), audio_packets("out/clip_overlay.mp4")
    assert before[0] > 20_000 and after[0] < 0.1
    assert np.diff(after) == pytest.approx(np.diff(before), abs=0.001)
    assert after[0] - copied[0][0] == pytest.approx(before[0] - heard[0][0], abs=0.002)


@pytest.mark.parametrize("size", [(65, 49), (65, 48), (64, 49), (1, 1)])
def test_odd_sides_are_completed_by_repetition(size, network, capsys):
    clip("clip.mkv", codec="ffv1", audio=None, size=size)
    assert run(capsys, "clip.mkv")[0] == 0
    _, pictures = frames("out/clip_overlay.mp4")
    expected = painted(picture(5, 12, *size))
    rows, columns = (side % 2 for side in expected.shape[:2])
    expected = np.pad(expected, ((0, rows), (0, columns), (0, 0)), mode="edge")
    assert pictures[5].shape == expected.shape
    assert difference(pictures[5], expected) < 12


TURNS = {  # the first two columns of the display matrix -> how a player shows the stored picture
    (1, 0, 0, 1): lambda x: x,
    (0, 1, -1, 0): lambda x: np.rot90(x, -1),
    (-1, 0, 0, -1): lambda x: np.rot90(x, 2),
    (0, -1, 1, 0): lambda x: np.rot90(x),
    (-1, 0, 0, 1): lambda x: x[:, ::-1],
    (1, 0, 0, -1): lambda x: x[::-1],
    (0, 1, 1, 0): lambda x: x.swapaxes(0, 1),
    (0, -1, -1, 0): lambda x: np.rot90(x, 2).swapaxes(0, 1),
}


def turn(path: str, matrix: tuple[int, ...]) -> None:
    """Write a display matrix into the track header (ISO 14496-12, 8.3.2) of an MP4 file."""
    data = Path(path).read_bytes()
    start = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    values = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    Path(path).write_bytes(data[:start] + values + data[start + len(values) :])


@pytest.mark.parametrize("matrix", TURNS)
def test_frames_are_upright(matrix, network, capsys):
    clip("clip.mp4", aspect=Fraction(4, 3), count=3)
    turn("clip.mp4", matrix)
    if matrix == (0, 1, -1, 0):  # FFmpeg counts counterclockwise
        with av.open("clip.mp4") as container:
            assert next(container.decode(video=0)).rotation == -90
    assert run(capsys, "clip.mp4")[0] == 0
    _, pictures = frames("out/clip_overlay.mp4")
    turned = {key: by(painted(picture(1, 3, 64, 48))) for key, by in TURNS.items()}
    assert pictures[1].shape == turned[matrix].shape
    errors = {
        key: difference(pictures[1], pixels)
        for key, pixels in turned.items()
        if pixels.shape == pictures[1].shape
    }
    assert min(errors, key=errors.get) == matrix and errors[matrix] < 20
    with av.open("out/clip_overlay.mp4") as container:
        sideways = matrix[0] == 0
        aspect = container.streams.video[0].sample_aspect_ratio
        assert aspect == (Fraction(3, 4) if sideways else Fraction(4, 3))


# Weights of red and blue in the luma (ITU-R BT.709, BT.601, BT.2020) by FFmpeg's AVColorSpace
LUMA = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593), 2: (0.299, 0.114)}


def yuv(colour: tuple[int, int, int], space: int, full: bool) -> list[int]:
    red, blue = LUMA[space]
    r, g, b = (value / 255 for value in colour)
    luma = red * r + (1 - red - blue) * g + blue * b
    chroma = (b - luma) / (2 - 2 * blue), (r - luma) / (2 - 2 * red)
    if full:
        return [round(255 * luma), *(round(128 + 255 * value) for value in chroma)]
    return [round(16 + 219 * luma), *(round(128 + 224 * value) for value in chroma)]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("space", LUMA)
def test_colours_are_those_of_the_stored_matrix_and_range(space, full):
    with av.open("clip.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height = 64, 48
        # 8-bit frames have pixel formats of their own for the full range, such as yuvj420p.
        stream.pix_fmt = "yuv420p10le" if full else "yuv420p"
        stream.codec_context.colorspace = space
        stream.codec_context.color_range = 2 if full else 1
        for colour in (RED, GREEN, BLUE):
            frame = av.VideoFrame(64, 48, "yuv420p")
            for plane, value in zip(frame.planes, yuv(colour, space, full)):
                plane.update(bytes([value]) * plane.buffer_size)
            ranges = {"src_color_range": 1 + full, "dst_color_range": 1 + full}
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt, **ranges)))
        container.mux(stream.encode())
    with VideoReader("clip.mp4") as reader, VideoWriter(Path("copy.mp4"), reader) as writer:
        for item, colour in zip(reader, (RED, GREEN, BLUE)):
            assert np.abs(item.pixels[24, 32].astype(int) - colour).max() <= 5
            writer.write(item)
    with VideoReader("copy.mp4") as reader:
        for item, colour in zip(reader, (RED, GREEN, BLUE)):
            assert np.abs(item.pixels[24, 32].astype(int) - colour).max() <= 8


def test_size_that_changes_within_a_stream(network, capsys):
    clip("large.mkv", codec="mjpeg", pixel_format="yuvj420p", audio=None, count=3)
    clip("small.mkv", codec="mjpeg", pixel_format="yuvj420p", audio=None, count=3, size=(32, 24))
    with av.open("clip.mkv", "w") as container:
        stream = None
        for index, name in enumerate(("large.mkv", "small.mkv")):
            with av.open(name) as source:
                stream = stream or container.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts = packet.dts = packet.pts + 120 * index
                        packet.stream = stream
                        container.mux(packet)
    assert run(capsys, "clip.mkv")[0] == 0
    _, pictures = frames("out/clip_overlay.mp4")
    assert {pixels.shape for pixels in pictures} == {(48, 64, 3)}
    assert difference(pictures[4], painted(picture(1, 3, 64, 48))) < 16


def test_shares_are_means_over_the_frames(network, folder, capsys):
    clip("clip.mkv", codec="ffv1", audio=None)
    photo().save("photo.png")
    status, out, _ = run(capsys, "clip.mkv", "photo.png", "--json", "result.json")
    assert status == 0
    entry = json.loads(Path("result.json").read_text())["images"][0]
    assert entry["frames"] == 12 and (entry["width"], entry["height"]) == (64, 48)
    assert entry["results"] == {"overlay": "out/clip_overlay.mp4"}
    with VideoReader("clip.mkv") as reader:
        labels = np.stack([by_colour(item.pixels) for item in reader])
    expected = np.bincount(labels.ravel(), minlength=3) / labels.size
    assert min(expected) > 0
    shares = {entry["class"]: entry["share"] for entry in entry["shares"]}
    assert [shares[label] for label in range(3)] == pytest.approx(expected)
    order = np.argsort(-expected)
    lines = [f"  {100 * expected[label]:5.1f} %  {CATEGORIES[label]}" for label in order]
    assert out.splitlines()[1:4] == lines


def test_network_sees_the_frames_as_arrays_and_the_views(network, capsys):
    clip("clip.mkv", codec="ffv1", audio=None, count=2)
    seen = []
    network.segment = lambda frame, **views: seen.append((frame, views)) or by_colour(frame)
    assert run(capsys, "clip.mkv", "--scales", 0.5, 1, "--flip")[0] == 0
    assert [views for _, views in seen] == 2 * [
        {"scales": (0.5, 1.0), "flip": True, "window": None}
    ]
    assert difference(np.asarray(photo_of_argument(seen[1][0])), picture(1, 2, 64, 48)) < 8


def test_labels_of_each_frame(network, folder, capsys):
    clip("clip.mkv", codec="ffv1", audio=None)
    assert run(capsys, "clip.mkv", "--labels-only")[0] == 0
    names = [f"{number:06d}.png" for number in range(1, 13)]
    assert files(folder / "out") == [f"clip_labels/{name}" for name in names]
    with VideoReader("clip.mkv") as reader:
        for name, item in zip(names, reader):
            stored = Image.open(folder / "out/clip_labels" / name)
            assert np.array_equal(np.asarray(stored), by_colour(item.pixels))

    clip("clip.mkv", codec="ffv1", audio=None, count=2)
    assert run(capsys, "clip.mkv", "--labels-only")[0] == 0
    assert files(folder / "out/clip_labels") == names[:2]
    Path("out/clip_labels/notes.txt").touch()
    status, _, err = run(capsys, "clip.mkv", "--labels-only")
    assert status == 1
    assert err == [
        "deeplab-fast: clip.mkv: out/clip_labels has other files (expected a folder of frames, or "
        "none)"
    ]
    assert files(folder / "out") == [f"clip_labels/{x}" for x in [*names[:2], "notes.txt"]]


def test_only_the_classes_that_were_asked_for(network, capsys):
    clip("clip.mkv", codec="ffv1", audio=None, count=2)
    assert run(capsys, "clip.mkv", "--labels-only", "--only", "green")[0] == 0
    labels = np.asarray(Image.open("out/clip_labels/000001.png"))
    assert np.unique(labels).tolist() == [0, 2]


@pytest.mark.parametrize("options", [[], ["--labels-only"]])
def test_file_that_was_cut_short(options, network, folder, capsys):
    clip("clip.mkv", count=75)
    data = Path("clip.mkv").read_bytes()
    Path("clip.mkv").write_bytes(data[: len(data) // 2])
    status, out, (error,) = run(capsys, "clip.mkv", *options)
    assert (status, out) == (1, "")
    kept = "out/clip_labels.partial" if options else "out/clip_overlay.partial.mp4"
    start = "deeplab-fast: clip.mkv: cut short: the file ends after 1."
    assert error.startswith(start) and " of 3.0 seconds (expected a complete video); " in error
    count = len(os.listdir(kept)) if options else len(frames(kept)[0])
    assert 20 < count < 60
    assert error.endswith(f"; {kept} has its {count} frames")
    assert os.listdir("out") == [Path(kept).name]


def test_frames_that_cannot_be_decoded_are_counted(network, folder, capsys):
    clip("whole.webm", codec="libvpx-vp9", audio=None)
    with av.open("whole.webm") as source, av.open("clip.webm", "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for index, packet in enumerate(source.demux(video=0)):
            if not packet.size:
                continue
            damaged = av.Packet(b"\xff" * 50) if index in (4, 7) else packet
            damaged.pts, damaged.dts, damaged.time_base = packet.pts, packet.dts, packet.time_base
            damaged.stream = stream
            container.mux(damaged)
    status, out, err = run(capsys, "clip.webm", "--json", "result.json")
    assert status == 1
    message = (
        "damaged: 2 frames could not be decoded and left out, the first is frame 5 at 0.16 s "
        "(expected a complete video)"
    )
    assert err == [f"deeplab-fast: clip.webm: {message}"]
    assert out.splitlines()[0] == "clip.webm (64x48, 10 frames) -> out/clip_overlay.mp4"
    expected = [time for i, time in enumerate(times_of("whole.webm")) if i not in (4, 7)]
    assert frames("out/clip_overlay.mp4")[0] == pytest.approx(expected, abs=0.001)
    assert json.loads(Path("result.json").read_text())["failed"] == [
        {"image": "clip.webm", "error": message}
    ]


def test_audio_that_cannot_be_copied_is_named(network, monkeypatch, capsys):
    clip("clip.mp4")
    monkeypatch.setattr("deeplab_fast._io.video._is_known", lambda stream: False)
    status, out, err = run(capsys, "clip.mp4")
    assert (status, err) == (0, [])
    assert out.splitlines()[0].endswith("out/clip_overlay.mp4, without audio of an unknown codec")
    with av.open("out/clip_overlay.mp4") as container:
        assert [stream.type for stream in container.streams] == ["video"]


def cut_mp4() -> None:
    clip("bad.mp4")
    data = Path("bad.mp4").read_bytes()
    Path("bad.mp4").write_bytes(data[: len(data) // 2])


def only_audio() -> None:
    clip("video.mp4")
    with av.open("video.mp4") as source, av.open("bad.mp4", "w") as container:
        stream = container.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)


def unknown_codec() -> None:
    clip("bad.mp4", codec="mpeg4", format="avi", audio=None)
    data = Path("bad.mp4").read_bytes()
    assert b"FMP4" in data
    Path("bad.mp4").write_bytes(data.replace(b"FMP4", b"XYZW"))


def encrypted() -> None:
    keys = {"encryption_key": "76a6c65c5ea762046bd749a2e632ccbb"}
    keys["encryption_kid"] = "a7e61c373e219033c21091fa607bf3b8"
    clip("bad.mp4", audio=None, encryption_scheme="cenc-aes-ctr", **keys)


BAD = {
    "not a video, or incomplete: .*": lambda: Path("bad.mp4").write_text("hello"),
    "not a video, or incomplete: .* ": lambda: Path("bad.mp4").touch(),
    "not a video, or incomplete: .*  ": cut_mp4,
    r"no video stream \(expected one, got audio\)": only_audio,
    "unknown video codec": unknown_codec,
    "none of its frames can be decoded": encrypted,
    "no such file, or not a regular one": lambda: os.mkfifo("bad.mp4"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_videos_are_named_in_one_line(message, network, folder, capsys):
    BAD[message]()
    status, out, (error,) = run(capsys, "bad.mp4")
    assert (status, out) == (1, "")
    assert re.match(f"deeplab-fast: bad.mp4: {message.strip()}", error)
    assert " (expected " in error
    assert files(folder / "out") == []


def test_missing_pyav_is_named(network, folder, capsys, monkeypatch):
    clip("clip.mp4")
    for name in ("in/a.mp4", "in/b.MOV", "in/a.png", "videos/a.webm"):
        Path(name).parent.mkdir(exist_ok=True)
        photo().save(name, format="PNG")
    monkeypatch.setitem(sys.modules, "av", None)
    extra = '(expected pip install "deeplab-fast[video]")'
    status, out, err = run(capsys, "clip.mp4", "in", "videos", "camera:0")
    assert status == 1
    assert err == [
        f"deeplab-fast: in: skipped 2 videos {extra}",
        f"deeplab-fast: videos: no image there but 1 video {extra}",
        f"deeplab-fast: clip.mp4: PyAV is missing {extra}",
        f"deeplab-fast: camera:0: PyAV is missing {extra}",
    ]
    assert files(folder / "out") == ["in/a_labels.png", "in/a_overlay.png"]


def test_folders_are_searched_for_videos(network, folder, capsys):
    Path("in").mkdir()
    clip("in/a.MP4", format="mp4", audio=None, count=2)
    photo().save("in/a.png")
    photo().save("in/moving.gif", save_all=True, append_images=[photo().rotate(90)])
    Path("in/script.ts").write_text("let x = 1;")
    for _ in range(2):  # the second run finds the results of the first
        status, _, err = segment(capsys, "in", "--weights", "any", "--output", "in/out")
        assert (status, err) == (0, [])
        assert files(folder / "in/out") == [
            "a.MP4_overlay.mp4",
            "a.png_labels.png",
            "a.png_overlay.png",
            "moving_labels.png",
            "moving_overlay.png",
        ]


def test_other_extensions_are_recognised_by_content(network, folder, capsys):
    clip("clip.dat", format="mp4", audio=None, count=2)
    clip("recording", format="matroska", audio=None, count=2)
    photo().save("photo.dat", format="PNG")
    texts = ["script.ts", "notes.txt"]  # FFmpeg shows the second as a terminal would
    for name in texts:
        Path(name).write_text("let x = 1;\n" * 200)
    status, _, err = run(capsys, "clip.dat", "recording", "photo.dat", *texts)
    assert status == 1
    for line, name in zip(err, texts, strict=True):
        assert line.startswith(f"deeplab-fast: {name}: not an image (expected")
    assert files(folder / "out") == [
        "clip_overlay.mp4",
        "photo_labels.png",
        "photo_overlay.png",
        "recording_overlay.mp4",
    ]


@pytest.mark.parametrize(
    "option, message",
    [
        ("--cutout", "--cutout: expected an image, got a video"),
        ("--confidence", "--confidence: expected an image, got a video"),
        ("--probabilities", "--probabilities: expected an image, got a video"),
        ("--legend", "--legend: expected an image, got a video"),
    ],
)
def test_options_for_images_only(option, message, network, capsys):
    clip("clip.mp4", audio=None, count=2)
    status, _, err = run(capsys, "clip.mp4", option)
    assert (status, err) == (1, [f"deeplab-fast: clip.mp4: {message}"])


@pytest.mark.parametrize("options", [[], ["--labels-only"]])
def test_interrupted_run_leaves_the_previous_result(options, network, folder, capsys):
    clip("clip.mp4")
    assert run(capsys, "clip.mp4", *options)[0] == 0
    before = {name: Path("out", name).read_bytes() for name in files(folder / "out")}
    calls = []

    def interrupt(frame, **views):
        calls.append(frame)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return by_colour(frame) * 0

    network.segment = interrupt
    assert run(capsys, "clip.mp4", *options)[::2] == (130, ["deeplab-fast: interrupted"])
    assert {name: Path("out", name).read_bytes() for name in files(folder / "out")} == before


def test_full_disk(network, folder, capsys):
    clip("clip.mp4", count=50)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        status, _, err = run(capsys, "clip.mp4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    assert err == ["deeplab-fast: clip.mp4: cannot write out/clip_overlay.mp4: File too large"]
    assert files(folder / "out") == []


def test_videos_are_never_overwritten(network, folder, capsys):
    clip("clip.mp4", audio=None, count=2)
    clip("clip_overlay.mp4", audio=None, count=2)
    before = Path("clip_overlay.mp4").read_bytes()
    arguments = ["clip.mp4", "clip_overlay.mp4", "--weights", "any", "--output", "."]
    status, _, err = segment(capsys, *arguments)
    assert status == 1
    assert err == [
        "deeplab-fast: clip.mp4: clip_overlay.mp4 would be overwritten, but it is also an input "
        "(expected another --output)"
    ]
    assert Path("clip_overlay.mp4").read_bytes() == before
    assert Path("clip_overlay_overlay.mp4").exists()


@pytest.fixture
def camera(monkeypatch):
    """A test pattern in place of camera 0."""
    device = command.camera_device
    pattern = "testsrc=size=64x48:rate=50,realtime,setpts=PTS+1000/TB", "lavfi"
    monkeypatch.setattr(command, "camera_device", lambda i: device(i) if i else pattern)


def test_camera_is_recorded_until_it_is_interrupted(camera, network, folder, capsys):
    calls = []

    def interrupted(frame, **views):
        calls.append(frame)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return by_colour(frame)

    network.segment = interrupted
    before = signal.getsignal(signal.SIGINT)
    status, out, err = run(capsys, "camera:0")
    assert (status, err) == (0, [])
    assert signal.getsignal(signal.SIGINT) == before
    (name,) = files(folder / "out")
    assert name.startswith("camera0_20") and name.endswith("_overlay.mp4")
    assert out.splitlines()[0] == f"camera:0 (64x48, 4 frames) -> out/{name}"
    times, _ = frames(f"out/{name}")
    assert len(times) == 4
    assert times[0] == 0 and times[3] < 100


def test_frames_that_come_while_the_network_is_busy_are_dropped():
    busy, come, end = threading.Event(), threading.Event(), threading.Event()

    def device():
        yield 1
        busy.wait()
        yield from (2, 3, 4)
        come.set()
        end.wait()

    items = command._newest(device())
    assert next(items) == 1
    busy.set()
    come.wait()
    assert next(items) == 4
    end.set()
    assert list(items) == []


def test_camera_that_is_interrupted_at_once(camera, network, folder, monkeypatch, capsys):
    start = threading.Thread.start

    def interrupt(thread):
        start(thread)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(threading.Thread, "start", interrupt)
    assert run(capsys, "camera:0")[::2] == (130, ["deeplab-fast: interrupted"])
    assert files(folder / "out") == []


def test_camera_that_fails_ends_the_recording(network, folder, monkeypatch, capsys):
    clip("device.mkv", count=75)
    data = Path("device.mkv").read_bytes()
    Path("device.mkv").write_bytes(data[: len(data) // 2])
    monkeypatch.setattr(command, "camera_device", lambda index: ("device.mkv", "matroska"))
    status, out, (error,) = run(capsys, "camera:0")
    assert status == 1
    assert error.startswith("deeplab-fast: camera:0: the file ends after 1.")
    (name,) = files(folder / "out")
    assert name.endswith("_overlay.mp4") and f"-> out/{name}" in out
    assert len(frames(f"out/{name}")[0]) >= 1


def test_frames_of_a_camera_can_be_limited(camera, network, folder, capsys):
    status, out, err = run(capsys, "camera:0", "--frames", 3, "--labels-only")
    assert (status, err) == (0, [])
    assert [Path(name).name for name in files(folder / "out")] == [
        "000001.png",
        "000002.png",
        "000003.png",
    ]


def test_missing_camera(network, monkeypatch, capsys):
    monkeypatch.setattr("glob.glob", lambda *arguments, **options: ["/dev/video7"])
    status, _, err = run(capsys, "camera:9999")
    assert status == 1
    assert err == [
        "deeplab-fast: camera:9999: /dev/video9999: No such file or directory (expected a camera, "
        "found /dev/video7)"
    ]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["camera:0", "--frames", 0], "--frames 0: expected a positive number"),
        (["x.mp4", "--frames", 3], "--frames: expected a camera, such as camera:0"),
    ],
)
def test_wrong_numbers_of_frames(arguments, message, network, capsys):
    assert run(capsys, *arguments)[::2] == (2, [f"deeplab-fast: {message}"])


def test_reader_closes_its_file():
    clip("clip.mp4", audio=None, count=2)
    with VideoReader("clip.mp4") as reader:
        assert sum(isinstance(item, Frame) for item in reader) == 2
    links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    assert not any(
        os.readlink(link).endswith("clip.mp4") for link in links if os.path.lexists(link)
    )
