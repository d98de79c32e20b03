"""Faults: checkpoints of other projects."""

from __future__ import annotations

from .guards import Fault

FOLDER = "deeplab_fast/models/checkpoints"

FAULTS: dict[str, list[Fault]] = {
    f"{FOLDER}/torch_file.py": [
        Fault(
            "names in a file are looked up",
            'type(name, (Inert,), {"__module__": module, "__qualname__": name, '
            '"container": container})',
            "getattr(__import__(module, fromlist=[name]), name)",
        ),
        Fault(
            "names that the program allows are forbidden afterwards",
            'if f"{module}.{name}" not in allowed',
            "if allowed is not None",
        ),
        Fault(
            "older files are not searched for names", "_LEGACY_PICKLES = 4", "_LEGACY_PICKLES = 3"
        ),
        Fault("single items are not seen", '"SETITEM": OrderedDict', '"NONE": OrderedDict'),
        Fault("added lists are not seen", '"APPENDS": list', '"ADDITEMS": list'),
        Fault("no memo of classes", "name = memo.get(argument)", "name = None"),
        Fault("advice to read unsafely", "isinstance(original, pickle.UnpicklingError)", "False"),
        Fault(
            "buffers of pickled models left out",
            '("_parameters", "_buffers", "_modules")',
            '("_parameters", "_modules")',
        ),
    ],
    f"{FOLDER}/safetensors_file.py": [
        Fault(
            "files of version 0.2.0 lose their padding",
            '"tensorflow" if same else "torchvision"',
            '"torchvision"',
        ),
        Fault(
            "files of version 0.2.0 are refused",
            'if "tf_padding" in config:',
            "if False:",
        ),
    ],
    f"{FOLDER}/huggingface.py": [
        Fault(
            "padding of the configuration is ignored",
            '"tensorflow" if config.get("tf_padding", True) else "torchvision"',
            '"tensorflow"',
        ),
    ],
    f"{FOLDER}/state_dict.py": [
        Fault("few keys make a prefix", "2 * len(inner) > len(state)", "inner"),
        Fault(
            "tensors beside the state dict",
            "if wrapped is None:",
            "if wrapped is None or _tensors(content):",
        ),
        Fault("channels moved the wrong way", "roll(-count, dim)", "roll(count, dim)"),
        Fault(
            "only one prefix is removed",
            "                state = inner\n                break",
            "                return inner",
        ),
    ],
    f"{FOLDER}/checkpoint.py": [
        Fault(
            "shapes are not compared",
            "if key in result and result[key].shape != expected[key].shape",
            "if False",
        ),
        Fault(
            "counters of batch norm are required", 'key.endswith(".num_batches_tracked")', "False"
        ),
        Fault(
            "an auxiliary classifier cannot be left out",
            'if not any(key.startswith("aux_classifier.") for key in expected):',
            "if False:",
        ),
    ],
    f"{FOLDER}/resnets.py": [
        Fault(
            "ResNeXt is a resnet",
            "return name if is_plain else None",
            "return name",
        ),
    ],
    f"{FOLDER}/segmentation_models_pytorch.py": [
        Fault("corners are not aligned", '"align_corners": True', '"align_corners": False'),
        Fault(
            "rates of the output stride", '"atrous_rates": (12, 24, 36),', '"atrous_rates": None,'
        ),
        Fault("config.json is ignored", "output_stride=stride,", ""),
    ],
    f"{FOLDER}/vainf.py": [
        Fault(
            "torchvision's padding",
            '"backbone_variant": "VainF"',
            '"backbone_variant": "torchvision"',
        ),
        Fault(
            "low-level features stay first",
            'rotate_channels(state, "classifier.0.convs.0.0.0.weight", _LOW_CHANNELS, dim=0)',
            "pass",
        ),
    ],
    f"{FOLDER}/jfzhang95.py": [
        Fault("VainF's variant", '"backbone_variant": "jfzhang95"', '"backbone_variant": "VainF"'),
    ],
    f"{FOLDER}/mmsegmentation.py": [
        Fault(
            "no norm between the two convolutions",
            '"depthwise_norm": True',
            '"depthwise_norm": False',
        ),
        Fault(
            "pooled features stay first",
            'rotate_channels(state, f"{aspp}project.0.weight", channels)',
            "pass",
        ),
    ],
    f"{FOLDER}/backbone_weights.py": [
        Fault(
            "unknown encoders of a DeepLab are an error",
            "except (ValueError, KeyError, IndexError):",
            "except KeyError:",
        ),
        Fault("the classifier of a backbone is unexpected", "if not is_timm:", "if False:"),
        Fault(
            "the last convolution is unexpected",
            'if "features.18.0.weight" not in expected:',
            "if False:",
        ),
        Fault(
            "norms of timm's blocks swapped",
            '"conv_dw.": "1.0.", "bn2.": "1.1.",',
            '"conv_dw.": "1.0.", "bn2.": "3.",',
        ),
    ],
    f"{FOLDER}/torchvision.py": [
        Fault(
            "any configuration is torchvision's",
            "if option not in _FREE and value != usual[option]",
            "if False",
        ),
    ],
    "deeplab_fast/cli/convert.py": [
        Fault("the input is overwritten", "path.samefile(other)", "path == other"),
    ],
}
