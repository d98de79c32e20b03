"""Faults of the export of models."""

from __future__ import annotations

from .guards import EXPORT_TORCH, Fault

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/ops/_decomposition.py": [
        Fault(
            "Inductor not prepared",
            "if inductor and op not in inductor.lowerings:",
            "if False:",
        ),
    ],
    "deeplab_fast/ops/nan_of_images.py": [
        Fault("NaN of an image left out", "zero * x.sum((1, 2, 3)", "zero * x.nansum((1, 2, 3)"),
        Fault(
            "all images are broken by one", "zero * x.sum((1, 2, 3)", "zero * x.sum((0, 1, 2, 3)"
        ),
        Fault("broken weights look healthy", "0.0 if finite_weights else torch.nan", "0.0"),
        Fault(
            "no repair of NaN in exported programs",
            "return _op(output, images, finite_weights)",
            "return output",
            EXPORT_TORCH,
        ),
    ],
    "deeplab_fast/_io/files.py": [
        Fault("all files get one name", "path.with_name(written.name)", "path"),
    ],
    "deeplab_fast/cli/export.py": [
        Fault("size is ignored", "arguments.size and tuple(arguments.size)", "None"),
        Fault("options of other formats are ignored", "and format not in formats", "and False"),
        Fault("int8 without photos", "if arguments.int8 != (", "if False and arguments.int8 != ("),
        Fault(
            "a failed check is a crash", "except CheckFailed as error", "except KeyError as error"
        ),
    ],
    "deeplab_fast/export/check.py": [
        Fault("one size only is a crash", "shape == shapes[0] or isinstance", "True or isinstance"),
        Fault("NaN agrees with everything", "(~(gap <= 2 * allowed))", "(gap > 2 * allowed)"),
        Fault("NaN logits agree", "if not difference <= LARGEST", "if difference > LARGEST"),
        Fault("half of the rounding is allowed", "gap <= 2 * allowed", "gap <= 1 * allowed"),
        Fault(
            "any difference is rounding", "LARGEST_DIFFERENCE = 1e-4", "LARGEST_DIFFERENCE = 1.0"
        ),
        Fault("the threshold moves, too", "logits], 1), allowed / 2", "logits], 1), allowed"),
        Fault(
            "other classes are not seen", "if not bool(((got >= 0)", "if False and bool(((got >= 0)"
        ),
    ],
    "deeplab_fast/export/metadata.py": [
        Fault("sides of 16 k", "1 if align_corners else 0", "0"),
        Fault("no names of the classes", 'metadata["categories"] =', 'metadata["classes"] ='),
    ],
    "deeplab_fast/export/onnx.py": [
        Fault("paths of this machine in the file", "node.metadata_props.clear()", "pass"),
        Fault("sizes without names", "        images.shape[i] = name\n", ""),
        Fault("the batch of labels is their height", "i - 1 if i and", "i - 1 if"),
        Fault(
            "nothing is checked", "comparison = _check(exported, partial, job)", "comparison = None"
        ),
        Fault(
            "logits in the file are not checked",
            'if job.prepared.result != "labels" or len(logits) != 1',
            "if True",
        ),
        Fault("all weights in one file", "> _MAX_FILE)", "> 2**40)"),
    ],
    "deeplab_fast/export/program.py": [
        Fault("a model in training mode", "if module.training:", "if False:"),
        Fault("a model without weights", "if tensor.is_meta:", "if False:"),
        Fault(
            "logits of one channel have no threshold",
            "return with_background(self.original.logits(images))",
            "return self.original.logits(images)",
        ),
        Fault("half weights", "tensor.dtype != torch.float32", "False"),
        Fault("labels are always int64", "predict(images, dtype=self.dtype)", "predict(images)"),
        Fault("the size is fixed", "if not fixed}", "if not fixed and i == 0}"),
        Fault("the mode of the model changes", "self.training = False", "self.train()"),
        Fault(
            "our ops in portable programs",
            "return program.run_decompositions(ours)",
            "return program",
            EXPORT_TORCH,
        ),
    ],
    "deeplab_fast/export/torch_export.py": [
        Fault("never portable", "    if portable:", "    if False:"),
        Fault("no metadata", "extra_files={METADATA: metadata}", "extra_files={}"),
        Fault(
            "logits in the program are not checked",
            'if job.prepared.result != "labels"',
            "if True",
        ),
        Fault("a missing compiler is a crash", "        get_cpp_compiler()\n", "        pass\n"),
        Fault("any suffix", 'if path.suffix != ".pt2":', "if False:"),
    ],
}
