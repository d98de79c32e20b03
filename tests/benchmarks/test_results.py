"""Result files are read, and table.py makes tables of them."""

from __future__ import annotations

import importlib
import json

from .conftest import BENCHMARKS


def test_results_in_readme_and_docs_match_the_files(harness):
    importlib.import_module("table").main(["--check"])


def test_table_of_a_results_folder(harness, tmp_path):
    table = importlib.import_module("table")

    def write(file: str, benchmark: str, *rows: str) -> None:
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        keys = {"benchmark": f"bench_{benchmark} --full", "device": "A GPU", "threads": "2"}
        header = "".join(
            f"# {key}: {value}\n"
            for key, value in {**keys, "versions": "torch 3", "commit": file[-9:-4]}.items()
        )
        columns = "case,batch,dtype,kind,variant,median_ms,gflop,mbyte,peak_mib\n"
        path.write_text(header + columns + "\n".join(rows))

    write("gpu-2026-02-01/aspp-20260201-110000.csv", "aspp", "old,1,bf16,ours,deeplab_fast,1,,,")
    write(
        "gpu-2026-02-01/aspp-20260201-120000.csv",
        "aspp",
        *("old,1,bf16,ours,deeplab_fast,2.345,1,,10", "old,1,bf16,ours,in uint8,1.5,1,,"),
        *("old,1,bf16,baseline,PyTorch NCHW,240,1,,", "old,1,bf16,baseline,torchvision,4.69,1,,20"),
        *("old,1,bf16,baseline,OpenVINO,3,1,,", "old,1,fp16,ours,half,1,1,,"),
        "old,1,bf16,ours,exported,0.5,1,,",
        *("old,16,bf16,ours,batch,1,1,,", '"VOC, 3x3 dilation 6, dgrad",1,bf16,ours,one,1,1,,'),
    )
    write(
        "gpu-2026-02-01/ceilings-20260201-100000.csv",
        "ceilings",
        *("product,1,bf16,baseline,PyTorch,2,1600,,", "copy,1,fp32,baseline,PyTorch,0.5,,2000,"),
    )
    write("cpu-2026-01-01/model-20260101-100000.csv", "model", "x,1,fp32,ours,a,1,,,",
          "x,1,fp32,baseline,PyTorch,9,,,")  # fmt: skip
    write("local/model-20260301-100000.csv", "model", "x,1,fp32,ours,a,1,,,")
    write("gpu-2026-02-01/aspp-20260201-130000.csv", "aspp", "ours,1,bf16,ours,alone,1,,,")
    failed = tmp_path / "gpu-2026-02-01" / "aspp-20260201-130000.csv"
    failed.write_text(
        "# failed ours, batch 1, bf16, PyTorch: WRONG: error 1\n" + failed.read_text()
    )
    first, second = table.tables(tmp_path).split("A GPU, 2 threads; torch 3; ")[1:]
    assert (
        "| aspp: old, batch 1, bf16 | 2.35 ms (deeplab_fast) | 4.69 ms (torchvision) | 2.00x "
        in first
    )
    assert (
        "| 2.00x | 10.0 / 20.0 | in uint8 1.50; PyTorch NCHW 240; OpenVINO 3.00; exported 0.500 |"
        in first
    )
    assert first.count("\n| aspp") == 1 and "dilation 6" not in first and "half" not in first
    assert "Ceilings of that machine: product in bf16 800 TFLOP/s; copy in fp32 4000 GB/s." in first
    assert "raised:\n\n* ours, batch 1, bf16, PyTorch: WRONG: error 1\n\n" in first
    assert "| aspp: ours" not in first and "raised" not in second
    assert "model: x" in second and "2026-01-01" in second


def test_tables_of_a_training_experiment(harness, tmp_path):
    table = importlib.import_module("table")
    header = "# device: A CPU\n# threads: 2\n# versions: torch 3\n"
    folder = tmp_path / "cpu-2026-02-01" / "fine-tuning"
    folder.mkdir(parents=True)
    scores = folder / "train_camvid.csv"
    scores.write_text(
        f"{header}variant,seed,test_miou,test_pixel_accuracy,commit,date\n"
        "deeplab_fast,2,0.5,0.8,abc,2026-02-01T10:00:00\n"
        "deeplab_fast,10,0.512,0.9,abc,2026-02-01T11:00:00\n"
        "reference,2,0.51,0.8,abc,2026-02-01T12:00:00\n"
        "reference,10,0.502,0.7,abc,2026-02-01T13:00:00\n"
    )
    for variant, seed, losses in (
        ("deeplab_fast", 2, [2.0] * 10),
        ("deeplab_fast", 10, [2.0] * 10),
        ("reference", 2, [2.0] * 10),
        ("reference", 10, [2.0, 2.002, 2.0, 2.0, 2.04, *[2.0] * 4, 1.0]),
    ):
        (folder / f"{variant}-{seed}.json").write_text(json.dumps({"losses": losses}))
    text = table.training_tables(folder)
    assert (
        "seed: 0e+00 in update 1, 1e-03 in update 2, 2e-02 in update 5, 5e-01 in update 10." in text
    )
    assert (
        "| test mIoU | seed 2 | seed 10 | mean | mean pixel accuracy |\n|---|---|---|---|---|"
        in text
    )
    assert "| deeplab_fast | 50.00 % | 51.20 % | 50.60 % | 85.00 % |" in text
    assert "| reference | 51.00 % | 50.20 % | 50.60 % | 75.00 % |" in text
    link = "(../../benchmarks/results/cpu-2026-02-01/fine-tuning/train_camvid.csv)"
    assert (
        f"A CPU, threads: 2; torch 3; commit abc; 2026-02-01. Raw file: [{scores.name}]{link}"
        in text
    )
    assert "seconds per epoch" not in text
    (folder / "timing.csv").write_text(
        f"{header}# commit: def\n# date: 2026-02-02T10:00:00\n"
        "variant,iqr_percent,seconds_per_epoch,peak_mib\n"
        "deeplab_fast,3.21,20,1234.5\npytorch,2,25,2000\n"
    )
    text = table.training_tables(folder)
    assert "| deeplab_fast | 20.0 | 3.21 % | 1.00 | 1234 MiB |" in text
    assert "| pytorch | 25.0 | 2.00 % | 1.25 | 2000 MiB |" in text
    assert "commit def; 2026-02-02. Raw file: [timing.csv]" in text


def test_tables_of_accelerated_models(harness, tmp_path):
    """The last file with a case counts, of several in the newest folder."""
    table = importlib.import_module("table")
    assert table.accelerate_tables(tmp_path) == "No results yet.\n"

    def write(folder: str, date: str, *rows: str) -> None:
        keys = {"device": "A CPU", "threads": "2", "versions": "torch 3", "commit": "abc"}
        header = "".join(f"# {key}: {value}\n" for key, value in keys.items())
        columns = "case,batch,dtype,variant,median_ms,peak_mib,ratio,ratio_to_compiled,"
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"accelerate-{date}.csv").write_text(
            f"{header}# date: 2026-02-03T10:00:00\n{columns}noise_percent,goal\n" + "\n".join(rows)
        )

    labels, step = '"smp Unet 256, labels",1,fp32', '"smp Unet 256, training step",2,fp32'
    write("cpu-2026-01-01", "1", f"{labels},accelerated,7,,,,,")
    write(
        "cpu-2026-02-01",
        "1",
        *(f"{labels},accelerated,30,,,,,met", f"{step},original NCHW,300,20,1,,1.25,"),
        f"{step},accelerated,320,10,1.0667,,1.25,missed",
    )
    write(
        "cpu-2026-02-01",
        "2",
        *(f"{labels},original NCHW,40,8,1.33,,0.5,", f"{labels},original channels_last,30,,1,,,"),
        f'{labels},"original, compiled",25,,,,,',
        f"{labels},accelerated,20,4,0.667,0.8,0.5,met",
    )
    text = table.accelerate_tables(tmp_path)
    assert (
        "| smp Unet 256 | 30.0 ms (channels_last) | 20.0 ms | 1.50x | 0.5 % | met | 25.0 ms | - | "
        "1.25x | - / 4.00 |" in text
    )
    assert (
        "| smp Unet 256, batch 2, fp32 | 300 ms (NCHW) | 320 ms | 0.94x | 1.2 % | missed | - | - | "
        "- | 20.0 / 10.0 |" in text
    )
    assert text.count("| smp Unet") == 2 and "7.00" not in text
    assert text.index("From images to labels") < text.index("A training step")
    link = "[accelerate-2.csv](../../benchmarks/results/cpu-2026-02-01/accelerate-2.csv)"
    assert f"A CPU, threads: 2; torch 3; commit abc; 2026-02-03. Raw file: {link}." in text


def test_files_of_0_1_0_are_read_under_todays_names(harness):
    result_files = importlib.import_module("common.result_files")
    folder = BENCHMARKS / "results" / "xeon-2core-2026-11-22"
    header, rows = result_files.read(folder / "upsample_argmax-20261122-173135.csv")
    assert header["versions"].startswith("deeplab_fast 0.1.0, ")
    assert set(rows[0]) == set(harness.COLUMNS)
    assert {row["case"].partition(", ")[2] for row in rows} == {"trained logits", "random logits"}


def test_plot_of_a_result_file():
    result_files = importlib.import_module("common.result_files")
    plot = importlib.import_module("common.plot")
    (file,) = (BENCHMARKS / "results" / "xeon-2core-2026-11-22").glob("aspp-*.csv")
    assert plot.png(*result_files.read(file)).startswith(b"\x89PNG")
