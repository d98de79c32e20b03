"""Faults in the export to OpenVINO and in the quantisation to int8."""

from __future__ import annotations

from .guards import Fault

FAULTS: dict[str, list[Fault]] = {
    "deeplab_fast/export/openvino.py": [
        Fault(
            "logits in the network are not checked",
            '_logits_of(network) if result == "labels"',
            "None if True",
        ),
        Fault("weights are rounded to fp16", "compress_to_fp16=False", "compress_to_fp16=True"),
        Fault(
            "the exported model is not checked",
            "comparison = job.compare(fp32)",
            "comparison = job.compare("
            "lambda x: job.original(torch.from_numpy(x)).detach().numpy())",
        ),
        Fault("metadata are lost", '["deeplab_fast", name]', '["other", name]'),
        Fault(
            "the int8 model is not written",
            "        network = quantization.quantize(network,",
            "        quantized = quantization.quantize(network.clone(),",
        ),
    ],
    "deeplab_fast/export/optional.py": [
        Fault(
            "a hidden module stays hidden", "        del sys.modules[module]\n", "        pass\n"
        ),
        Fault("an imported module is hidden", "if module in sys.modules:", "if False:"),
    ],
    "deeplab_fast/export/quantization.py": [
        Fault(
            "biases and depthwise weights are not folded",
            "    passes.run_passes(network)\n",
            "",
        ),
        Fault(
            "calibration sees other inputs",
            "            return input_of(item)\n",
            "            return input_of(item) / 10\n",
        ),
        Fault(
            "NNCF prints on standard output",
            "with contextlib.redirect_stdout(io.StringIO()):",
            "with contextlib.nullcontext():",
        ),
        Fault(
            "photos compared are calibrated on, too",
            "if path not in set(self.to_compare)",
            "if path",
        ),
        Fault(
            "rare classes count",
            ">= _RARE * pixels",
            "> 0",
        ),
        Fault(
            "the mean is that of single photos",
            "            row += np.bincount(",
            "            row[:] = np.bincount(",
        ),
        Fault(
            "photos are resized to width x height",
            "photo.resize((width, height)",
            "photo.resize((height, width)",
        ),
        Fault(
            "labels of logits of one channel are 0",
            "output = labels_of(torch.from_numpy(output)).numpy()",
            "output = output.argmax(1)",
        ),
        Fault("the first photos are chosen", "items[index * len(items) // count]", "items[index]"),
    ],
}
