"""The GPU check without a GPU: all of its stages are rehearsed, and a kill at any of them leaves whole files."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import gpu_check
from tests.cuda import emulated

pytest.importorskip("triton", reason="Triton is not installed (pip install ipt-fast[triton])")
pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="there is no C++ compiler")
STAGES = [stage.name for stage in gpu_check.rehearsed(gpu_check.first_run(2))]


def command(folder, *options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(folder), "--rehearse", *options],
        env=environment, cwd=gpu_check.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    return process


def check_files(folder):
    """Every line is whole."""
    assert {path.name for path in folder.iterdir()} <= set(gpu_check.RESULTS)
    for path in folder.iterdir():
        assert path.stat().st_size < 16 << 20
        text = path.read_text()
        if path.suffix == ".jsonl":
            assert all(json.loads(line)["case"] for line in text.splitlines())
        elif path.suffix == ".json":
            assert set(json.loads(text)) == {"capability", "kernels", "operators"}
        elif path.suffix == ".csv":
            header, *rows = csv.reader(text.splitlines())
            assert all(len(row) == len(header) for row in rows) and text.endswith("\n")


@pytest.mark.slow
def test_a_whole_rehearsal(tmp_path):
    process = command(tmp_path / "out")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    check_files(tmp_path / "out")
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert sorted(re.findall(r"\] ([^:]+): passed", summary)) == sorted(STAGES)
    for name in ("parity.jsonl", "kernels.csv", "models.csv"):
        assert (tmp_path / "out" / name).read_text().count("\n") > 2
    assert all(json.loads(line)["passed"] for line in (tmp_path / "out" / "parity.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    "wanted",
    [
        "parity.jsonl",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("log", "tuned.json", "kernels.csv", "models.csv")),
    ],
)
def test_a_kill_leaves_whole_files_and_no_process(tmp_path, wanted):
    """As soon as the check has written to a file."""
    out = tmp_path / "out"
    process = command(out, "--stages", "^(facts|cuda parity|tune|kernels|models)$")
    end = time.monotonic() + 300
    while not (out / wanted).exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode
    check_files(out)
    left = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True).stdout
    assert not left


def test_deadlines_and_order(tmp_path):
    """A stage ends at its deadline and stops no other; what runs alone does; nothing begins after the end."""
    (tmp_path / "out").mkdir()
    stages = [
        gpu_check.Stage("slow", "", 0.5, ("sleep 60",)),
        gpu_check.Stage("fails", "", 10, ("exit 3",), after=("slow",)),
        gpu_check.Stage("alone", "", 10, ("date +%s.%N; sleep 0.3",), alone=True),
        gpu_check.Stage("beside", "", 10, ("date +%s.%N",)),
        gpu_check.Stage("missing", "", 10, tool=("/nowhere/tool",)),
        gpu_check.Stage("endless", "", 60, ("sleep 60",), alone=True),
        gpu_check.Stage("late", "", 60, ("true",), alone=True),
    ]
    shell = tmp_path / "shell.py"
    shell.write_text("import subprocess, sys; sys.exit(subprocess.call(sys.argv[1], shell=True))")
    run = gpu_check.Run(tmp_path, tmp_path / "out", tmp_path, (), dict(os.environ), seconds=4)
    run.command = lambda stage: [*stage.tool, sys.executable, str(shell), *stage.options]
    run.all(stages)
    assert run.ended["slow"] == "ended at its deadline" and run.ended["fails"] == "FAILED (3)"
    assert run.ended["alone"] == run.ended["beside"] == "passed"
    assert run.ended["missing"].startswith("could not run") and run.ended["endless"] == "ended at its deadline"
    assert run.ended["late"].startswith("left out")
    assert "late: left out" in (tmp_path / "out" / "summary.txt").read_text()
    began = [float(line) for line in re.findall(r"^\d{9,}\.\d+$", (tmp_path / "out" / "log").read_text(), re.M)]
    assert began[1] - began[0] > 0.3
    run.stop()


def test_what_prepares_is_stopped_while_another_runs_alone(tmp_path):
    (tmp_path / "out").mkdir()
    count = (
        "for i in $(seq 60); do date +%s.%N >> prepared; sleep 0.05; [ -e 'turn of prepares' ] && exit 0; done; exit 1"
    )
    stages = [
        gpu_check.Stage("beside", "", 10, ("sleep 0.5",)),
        gpu_check.Stage("alone", "", 10, ("date +%s.%N; sleep 1; date +%s.%N",), alone=True),
        gpu_check.Stage("prepares", "", 10, (count,), alone=True, prepares=True),
    ]
    run = gpu_check.Run(tmp_path, tmp_path / "out", tmp_path, (), dict(os.environ), seconds=20)
    run.command = lambda stage: ["sh", "-c", *stage.options]
    run.all(stages)
    assert set(run.ended.values()) == {"passed"}
    begin, end = [float(line) for line in re.findall(r"^\d{9,}\.\d+$", (tmp_path / "out" / "log").read_text(), re.M)]
    times = [float(line) for line in (tmp_path / "prepared").read_text().split()]
    assert sum(time < begin for time in times) > 3 and not any(begin + 0.2 < time < end for time in times)


def test_rows_of_a_table_are_whole_and_unknown_columns_are_refused(tmp_path):
    from benchmarks.gpu import stage

    table = stage.Table(tmp_path / "rows.csv", ("gpu", "name", "value"), {"gpu": 'A "B", C'})
    table.add(name="x", value=0.123456)
    with pytest.raises(AssertionError, match="unknown"):
        table.add(other=1)
    assert list(csv.reader((tmp_path / "rows.csv").read_text().splitlines())) == [
        ["gpu", "name", "value"],
        ['A "B", C', "x", "0.1235"],
    ]


def test_results_are_kept(tmp_path):
    """Rows are added to those that are there; a rehearsal's are refused."""
    from benchmarks import results
    from benchmarks.gpu import keep, kernels, models

    out, kept, configs = (tmp_path / name for name in ("out", "kept", "configs"))
    for folder in (out, kept):
        folder.mkdir()

    def write(gpu):
        for name, columns in (("models.csv", models.COLUMNS), ("kernels.csv", kernels.COLUMNS)):
            rows = [dict.fromkeys(columns, "x") | {"gpu": gpu}]
            (out / name).write_text("\n".join([",".join(columns), *(",".join(row.values()) for row in rows), ""]))

    write("rehearsal")
    with pytest.raises(ValueError, match="rehearsal"):
        keep.keep(out, kept, configs)
    write("NVIDIA H200")
    (out / "tuned.json").write_text("{}")
    line = {
        "backend": "cuda",
        "case": "a",
        "passed": True,
        "traceback": None,
        "shape": [1, 2],
        "error": 0.1,
        "seconds": 1,
    }
    (out / "parity.jsonl").write_text(json.dumps(line) + "\n")
    for count in (1, 2):
        keep.keep(out, kept, configs)
        for name in ("gpu_models.csv", "gpu_kernels.csv"):
            assert [row["gpu"] for row in results.read(kept / name)] == ["NVIDIA H200"] * count
    assert (configs / "NVIDIA_H200.json").read_text() == "{}"
    assert [(row["case"], row["shape"], row["error"]) for row in results.read(kept / "gpu_parity.csv")] == [
        ("a", "1x2", "0.1")
    ] * 2
