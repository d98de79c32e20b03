"""Faults of the data sets: label formats, layouts, EXIF orientation."""

from __future__ import annotations

from .guards import EXIF, Fault

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/_io/folders.py": [
        Fault("links to folders above", "tuple(map(str, parents))", "()"),
        Fault("links that loop", "    if real in outer:\n        return\n", ""),
        Fault("hidden files taken", 'entry.name.startswith(".")', "False"),
    ],
    "deeplab_fast/_io/images.py": [
        Fault(
            "Pillow turns TIFF images",
            '_orientation(image) if image.format == "TIFF" else 1',
            "1",
            EXIF,
        ),
        Fault(
            "TIFF images turned back the wrong way",
            "_STORED.get(orientation, _UPRIGHT[orientation])",
            "_UPRIGHT[orientation]",
            EXIF,
        ),
        Fault(
            "the header's size of a TIFF image",
            'if image.format == "TIFF":  #',
            "if False:  #",
            EXIF,
        ),
        Fault(
            "EXIF data behind the pixels",
            "(exif := _last_exif_chunk(image.fp))",
            '(exif := b"")',
            EXIF,
        ),
        Fault("a transposition that keeps the size", "if 5 <= self", "if 6 <= self", EXIF),
    ],
    "deeplab_fast/training/coco.py": [
        Fault("images of any size", "not 1 <= side <= _LONGEST", "False"),
        Fault("the root category of Roboflow is a class", "if name in parents and", "if False and"),
        Fault("a category with objects is dropped", ' and category["id"] not in used', ""),
        Fault(
            "classes in the order of the file",
            'sorted(content["categories"], key=lambda category: category["id"])',
            'content["categories"]',
        ),
        Fault("boxes are background", "boxes += not segmentation", "boxes += 0"),
        Fault("folders of Windows", '.replace("\\\\", "/")', ""),
        Fault("no split valid", '(split, "valid") if split == "val"', '(split,) if split == "val"'),
    ],
    "deeplab_fast/training/coco_labels.py": [
        Fault(
            "corners that are no numbers", "if not (np.abs(points) < _FARTHEST).all():", "if False:"
        ),
        Fault(
            "large objects on small ones", "key=lambda item: -item[0]", "key=lambda item: item[0]"
        ),
        Fault("the last polygon of an object", "mask |= fill_polygon", "mask = fill_polygon"),
        Fault(
            "rows and columns of run lengths",
            ".reshape(width, height).T",
            ".reshape(height, width)",
        ),
        Fault("the sign of a run length", "if code & 16:", "if code & 32:"),
        Fault(
            "differences of run lengths", "if len(counts) > 2 else 0", "if len(counts) > 1 else 0"
        ),
        Fault("corners of pixels instead of centres", "rows + 0.5 - y", "rows - y"),
        Fault("union of overlapping edges", "dtype=np.uint8) & 1", "dtype=np.uint8) > 0"),
    ],
    "deeplab_fast/training/coco_stuff.py": [
        Fault("value n is id n", "{id - 1: label", "{id: label"),
        Fault("a class that does not exist", "(12, 26, 29,", "(26, 29,"),
    ],
    "deeplab_fast/training/colors.py": [
        Fault("the colour first", "_NAME_FIRST.fullmatch(line) or ", ""),
        Fault("ignored names are classes", " if name not in ignore)", ")"),
        Fault("colours above 255", "max(color) > 255 or ", ""),
        Fault("a colour of two classes", " or color in colors", ""),
    ],
    "deeplab_fast/training/data.py": [
        Fault(
            "values above the table", "(values >= 0) & (values < len(self._table))", "values >= 0"
        ),
        Fault("negative values", "(values >= 0) & (values < len(self._table))", "values < 2**24"),
        Fault(
            "photos stay as they are stored",
            "label_size == image.upright_size or label_size != image.size",
            "label_size == image.upright_size != image.size",
        ),
        Fault(
            "photos are always turned",
            "label_size == image.upright_size or label_size != image.size",
            "True",
        ),
        Fault("photos turned twice", "            forget_orientation(image)\n", ""),
        Fault("no photo is unclear", "header.upright_size == header.size\n", "False\n"),
        Fault(
            "the header's size as it is stored",
            "header.upright_size if turns",
            "header.size if turns",
        ),
    ],
    "deeplab_fast/training/label_files.py": [
        Fault(
            "one bit is 0 and 255",
            'values.astype(np.uint8) if image.mode == "1"',
            "values.view(np.uint8) if True",
        ),
        Fault(
            "16 bits cut to 8", "return values.astype(np.int32)", "return values.astype(np.uint8)"
        ),
        Fault("labels in JPEG files", 'image.format in ("JPEG", "MPO")', "False"),
        Fault("a channel of the alpha image", "values = values[..., 0]", "values = values[..., 1]"),
        Fault("colours taken as their red", "if np.array_equal(red, green) and", "if True or"),
        Fault("the rarest colours", "np.argsort(-counts", "np.argsort(counts"),
        Fault(
            "a palette's colours are its numbers",
            "    if by_color:\n        return _colors",
            '    if by_color and image.mode != "P":\n        return _colors',
        ),
    ],
    "deeplab_fast/training/label_ids.py": [
        Fault("255 is no class", "{IGNORE: IGNORE, **ids}", "{**ids, IGNORE: IGNORE}"),
        Fault("blue is ignored", "    if not by_color:\n        ids", "    if True:\n        ids"),
        Fault(
            "red and blue exchanged",
            "red << 16 | green << 8 | blue",
            "blue << 16 | green << 8 | red",
        ),
    ],
    "deeplab_fast/training/layouts.py": [
        Fault("labels to ignore not known", "        ids[value] = IGNORE\n", ""),
        Fault(
            "SBD's labels for VOC's splits",
            'if split not in ("train", "val", "trainval", "test") and (root',
            "if (root",
        ),
        Fault(
            "two classes of Cityscapes exchanged",
            '24: "person", 25: "rider"',
            '24: "rider", 25: "person"',
        ),
        Fault("class_dict.csv before classes.txt", "not names.is_file() and ", ""),
        Fault("class n of ADE20K", "label + 1: label", "label: label"),
        Fault("all synonyms of ADE20K", '.split(",")[0].strip()', ".strip()"),
    ],
    "deeplab_fast/training/patterns.py": [
        Fault(
            "images of VOC are JPEG files", "next(filter(_is_file, paths), paths[0])", "paths[0]"
        ),
        Fault(
            "files in another order",
            "for path in sorted(files)",
            "for path in sorted(files, reverse=True)",
        ),
        Fault("suffixes in upper case left out", "re.IGNORECASE | ", ""),
        Fault("labels are images", " if labels.name_of(path) is None]", "]"),
        Fault("another name at its second place", '"(?P=name)".join', '".+".join'),
        Fault(
            "the image is its own label",
            "            and Path(folder, stem + ending) != image\n",
            "",
        ),
        Fault("labels of other images proposed", 'if ending[:1] in (".", "_", "-")', "if ending"),
    ],
    "deeplab_fast/training/text_files.py": [
        Fault("a byte order mark in the first class", '"utf-8-sig"', '"utf-8"'),
        Fault("UTF-16 is no text", '"utf-16" if is_utf16', '"utf-8-sig" if is_utf16'),
        Fault("zeros in names", 'if "\\0" in text:', "if False:"),
    ],
}
