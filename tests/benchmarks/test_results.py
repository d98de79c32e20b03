"""Result files are read, and table.py makes tables of them."""

from __future__ import annotations

import importlib

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
    assert "| 2.00x | 10.0 / 20.0 | in uint8 1.50; PyTorch NCHW 240; OpenVINO 3.00 |" in first
    assert first.count("\n| aspp") == 1 and "dilation 6" not in first and "half" not in first
    assert "Ceilings of that machine: product in bf16 800 TFLOP/s; copy in fp32 4000 GB/s." in first
    assert "raised:\n\n* ours, batch 1, bf16, PyTorch: WRONG: error 1\n\n" in first
    assert "| aspp: ours" not in first and "raised" not in second
    assert "model: x" in second and "2026-01-01" in second


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
