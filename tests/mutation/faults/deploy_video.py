"""Faults: videos and cameras."""

from __future__ import annotations

from .guards import Fault

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/_io/video.py": [
        Fault(
            "the hours of a broadcast are waited for",
            "max(0, self._container.start_time",
            "(0 and 0",
        ),
        Fault(
            "frames turned the other way",
            "right, down = turn[3], turn[1]",
            "right, down = turn[1], turn[3]",
        ),
        Fault("mirrored frames stay so", "    if right < 0:\n", "    if False:\n"),
        Fault("aspect of turned pixels", "if aspect and _is_sideways(turn)", "if False"),
        Fault("every colour matrix is BT.601", "_MATRICES.get(frame.colorspace)", "_BT601"),
        Fault("full range read as limited", "frame.color_range or _LIMITED", "_LIMITED"),
        Fault("matrix of the copy is not stored", "6 if matrix == _BT601 else matrix  #", "2  #"),
        Fault("reordered frames", '"crf": "20", "bf": "0"', '"crf": "20"'),
        Fault("odd sides padded with black", 'mode="edge"', 'mode="constant"'),
        Fault("truncated files are complete", "if end >= duration - _ROUNDING:", "if True:"),
        Fault("delayed frames lost", "        yield from self._decode(None)\n", ""),
        Fault("damage forgotten", "self.undecodable += 1", "pass"),
        Fault("all audio goes to MP4", "if codecs <= _AUDIO_OF_MP4:", "if True:"),
        Fault("text is a video", '"image2", "gif", "tty"', '"image2", "gif"'),
    ],
    "deeplab_fast/cli/video.py": [
        Fault(
            "shares of the last frame",
            "self._shares[: len(shares)] += shares",
            "self._shares[: len(shares)] = shares",
        ),
        Fault(
            "--only and the background ignored",
            "self.segmenter.labels(Image.fromarray(item.pixels))",
            "self.segmenter.model.segment(Image.fromarray(item.pixels))",
        ),
        Fault("labels of longer runs remain", "        shutil.rmtree(result)\n", "        pass\n"),
        Fault("folders of others deleted", "and not _has_only_frames(result)", "and False"),
        Fault(
            "unfinished labels remain",
            "        shutil.rmtree(partial, ignore_errors=True)",
            "        pass",
        ),
        Fault("inputs overwritten", "if os.path.realpath(result) in inputs:", "if False:"),
        Fault("recordings without frames kept", "if recording.frames == 0:", "if False:"),
        Fault(
            "half a video at its name",
            "    _move(partial, kept)\n    raise UserError(\n",
            "    return\n    raise UserError(\n",
        ),
    ],
}
