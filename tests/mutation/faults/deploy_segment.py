"""Faults: segment, its results, and how they are drawn."""

from __future__ import annotations

from .guards import Fault, Guard

MAX_PIXELS = Guard("test_segment.py max_pixels")

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/_io/images.py": [
        Fault(
            "damaged EXIF data",
            "    except Exception:  # malformed data",
            "    except KeyError:  # malformed data",
        ),
        Fault("previews of raw files segmented", "return extension in _RAW or", "return"),
        Fault("HEIC known by its name only", "start[8:] in _HEIC_BRANDS", "False"),
        Fault("plugins of Pillow ignored", "for end in _FOREIGN if end in known", "for end in ()"),
    ],
    "deeplab_fast/_io/legend.py": [
        Fault("legend over the picture", "top = picture.height + gap", "top = gap"),
        Fault(
            "long names cut by the border", "max(picture.width, columns * column)", "picture.width"
        ),
        Fault("names as long as they like", "if len(name) > _LONGEST_NAME", "if False"),
        Fault("boxes for letters", "if all(bytes(font", "if any(bytes(font"),
    ],
    "deeplab_fast/_io/overlay.py": [
        Fault("class 0 is always background", "if name in _BACKGROUND)", "if label == 0)"),
        Fault("21 unnamed classes without background", "(2, 21)", "(2,)"),
        Fault(
            "overlay of all classes",
            "self.background if self.only is None else self.only:",
            "self.background:",
        ),
        Fault("others become 0 in any network", "if 0 in self.background and", "if"),
        Fault("others may be a class", "if len(self.names) <= 255", "if len(self.names) <= 256"),
        Fault("outlines within what is not painted", " & (drawn[1:] | drawn[:-1])", ""),
        Fault("--alpha ignored", "colours, painting.alpha)", "colours, 0.6)"),
        Fault(
            "cut-outs keep what they hide",
            'Image.composite(photo.convert("RGBA"), Image.new("RGBA", photo.size), kept)',
            'Image.merge("RGBA", [*photo.split(), kept.convert("L")])',
        ),
    ],
    "deeplab_fast/_io/palette_file.py": [
        Fault(
            "colours from 0 to 1 are cut to integers",
            "not any(isinstance(value, float) for value in values)",
            "True",
        ),
        Fault("colours in the order of the file", "if categories is None or", "if True or"),
        Fault("the header is a colour", 'not re.search(r"\\d", line)', "False"),
        Fault("colours beyond 255", "0 <= value <= 255 for value", "0 <= value for value"),
    ],
    "deeplab_fast/cli/images.py": [
        Fault("an empty argument is the current folder", "not match or ", ""),
        Fault("links to folders not followed", "for start in starts:", "for start in [folder]:"),
        Fault("links to parent folders followed", "seen = above | {", "seen = {"),
        Fault(
            "results of earlier runs found through links",
            "above | {os.path.realpath(output)}",
            'above | {""}',
        ),
        Fault("--max-pixels is half of it", "= limit / 2", "= limit", MAX_PIXELS),
        Fault("--max-pixels for ever", "Image.MAX_IMAGE_PIXELS = before", "pass", MAX_PIXELS),
    ],
    "deeplab_fast/cli/results.py": [
        Fault(
            "labels of all classes",
            "self.painting.keep_only(self.model.segment(photo, **self.views))",
            "self.model.segment(photo, **self.views)",
        ),
        Fault(
            "--flip without effect on labels",
            "segment(photo, **self.views)",
            "segment(photo)",
        ),
        Fault(
            "labels of all classes with their probabilities",
            "labels = painting.keep_only(labels)",
            "pass",
        ),
        Fault("all strips at the top", "top = rows.stop", "top = 0"),
        Fault("confidence rounded down", "np.round(255 * strip.max(0))", "255 * strip.max(0)"),
    ],
    "deeplab_fast/cli/segment.py": [
        Fault(
            "shares on standard output",
            "file=sys.stdout if paths else sys.stderr",
            "file=sys.stdout",
        ),
        Fault("images to a terminal", "if sys.stdout.isatty():", "if False:"),
        Fault(
            "--json may overwrite an input", "os.path.realpath(arguments.json) in taken", "False"
        ),
        Fault("--alpha 0 taken for none", "arguments.alpha is not None", "arguments.alpha"),
    ],
}
