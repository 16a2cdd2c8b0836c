"""The benchmarks run, check themselves, and write rows that say where they come from."""

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarks.cif import Setting, check
from benchmarks.cif_peers import IMPLEMENTATIONS
from benchmarks.kd_losses import TOLERANCES as KL_TOLERANCES
from benchmarks.kd_losses import Setting as KLSetting
from benchmarks.kd_losses import check as check_kl
from benchmarks.measure import read, take_turns, write
from benchmarks.memory import HAS_GLIBC, fresh, page_faults, peak_mib
from benchmarks.plora import Case, problem_of, saved_mib
from benchmarks.plora import check as check_plora
from benchmarks.plora_peers import IMPLEMENTATIONS as PEERS
from benchmarks.plora_products import added_ms

ROOT = Path(__file__).parents[2]
FIELDS = {"commit", "device", "torch", "dtype", "shape", "warm_up", "repeats", "over_first"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder in which every benchmark has left its rows, and what they printed."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--device", "cpu", "--repeats", "2"]
    done = subprocess.run(
        [*command, "--out", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def measured(path):
    rows = [row for row in read(path) if "skipped" not in row]
    for row in rows:
        assert row.keys() >= FIELDS
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    return rows


def test_the_kd_losses_benchmark_runs_checks_and_says_what_it_skips(results):
    folder, printed = results
    rows = measured(folder / "kd_losses-cpu.jsonl")
    names = {row["implementation"] for row in rows}
    assert names >= {"F.kl_div", "linear_kl_div", "linear_kl_div, two heads"}
    for row in rows:
        assert row["error_gradient"] <= KL_TOLERANCES[getattr(torch, row["dtype"])]
        assert row["over_products"] == pytest.approx(row["median_ms"] / row["products_ms"])
        assert 0 < row["loop_p20_ms"] <= row["loop_ms"] <= row["loop_p80_ms"]
    skipped = [row for row in read(folder / "kd_losses-cpu.jsonl") if "skipped" in row]
    assert {"Liger, Triton", "linear_kl_div, Triton"} <= {row["implementation"] for row in skipped}
    assert "skipped: its kernels need a GPU" in printed
    assert (folder / "kd_losses-cpu.svg").read_text().startswith("<?xml")


def test_the_numerics_of_the_kl_keep_their_promise(results):
    rows = read(results[0] / "kd_losses_numerics-cpu.jsonl")
    for row in rows:
        assert row["kl"] == pytest.approx(float(row["case"].split()[1]), rel=0.05)
        if row["implementation"] == "delta form":
            assert row["error_gradient"] < 0.02
            assert row["smallest"] >= 0
    naive = [row for row in rows if row["implementation"] == "F.kl_div" and row["kl"] < 0.01]
    assert all(row["error_gradient"] > 0.1 for row in naive)
    assert (results[0] / "kd_losses_numerics-cpu.svg").read_text().startswith("<?xml")


def test_the_plora_benchmark_runs_checks_and_says_what_it_skips(results):
    folder, printed = results
    rows = measured(folder / "plora-cpu.jsonl")
    layer = [row for row in rows if row["pass"] == "forward+backward"]
    names = {"base layer", "plora, one span", "plora, scattered", "PEFT", "dense mask"}
    assert {row["implementation"] for row in layer} >= names
    assert {row["dtype"] for row in layer} == {"float32", "bfloat16"}
    compared = [row for row in layer if not row["dropout"]]
    assert all(row["error_dx"] < 1e-5 for row in compared)
    assert all(row["error_db"] < 1e-5 for row in compared if row["implementation"] != "base layer")
    decoding = {row["implementation"] for row in rows if row["pass"] == "decode"}
    assert decoding == {"base model", "plora, mask off", "PEFT", "PEFT, disabled"}
    skipped = {r["implementation"] for r in read(folder / "plora-cpu.jsonl") if "skipped" in r}
    assert skipped == {"plora, triton", "PEFT, float32 adapter"}
    assert "(goal 1.05)" in printed
    assert (folder / "plora-cpu.svg").read_text().startswith("<?xml")


def test_saved_memory_counts_whole_storages_once():
    """Of a span of a quarter of the positions, a quarter of x is kept, and h."""
    case = Case((1, 64, 32, 16, 4), 25, torch.float32)
    problem, x, _ = problem_of(case, "cpu")
    kept = {
        name: saved_mib(PEERS[name](problem), problem, x) * 2**20
        for name in ("base layer", "plora, one span", "dense mask")
    }
    h = 4 * 4 * 16  # the rows' index belongs to the mask, which all layers share
    assert kept["base layer"] == 0
    assert kept["plora, one span"] == 4 * 16 * 32 + h
    # at least x and h of all positions
    assert kept["dense mask"] >= 4 * 64 * 32 + 4 * 4 * 64


def test_added_time_leaves_the_layer_s_own_products_out_and_nothing_else():
    x, weight = torch.randn(1, 512, 512, requires_grad=True), torch.randn(512, 512)

    def call(sleep_s):
        out = torch.nn.functional.linear(x, weight)
        time.sleep(sleep_s)
        return torch.autograd.grad(out.sum(), x)

    turns = {"alone": lambda: call(0), "slow": lambda: call(0.2)}
    added = added_ms(turns, weight, repeats=3, limit_s=60)
    assert added["alone"]["added_ms"] == 0
    assert 100 < added["slow"]["added_p20_ms"] <= added["slow"]["added_ms"]
    turns["slow"] = lambda: [call(0), call(0)]
    with pytest.raises(AssertionError, match="expected 2 products"):
        added_ms(turns, weight, repeats=3, limit_s=60)


def test_a_wrong_partial_lora_is_not_timed():
    case = Case((1, 8, 6, 5, 2), 50, torch.float32)
    problem, x, upstream = problem_of(case, "cpu")
    right = PEERS["plora, one span"](problem)
    assert check_plora("right", problem, right, x, upstream)["error_out"] < 1e-5
    with pytest.raises(AssertionError, match="wrong"):
        check_plora("wrong", problem, right._replace(mask=problem.scattered), x, upstream)


def test_the_cif_benchmark_runs_checks_and_says_what_it_skips(results):
    folder, printed = results
    rows = measured(folder / "cif-cpu.jsonl")
    names = {row["implementation"] for row in rows}
    assert names >= {"cif (torch)", "torch-cif 0.2.0", "dense + bmm", "index_add"}
    assert {row["pass"] for row in rows} == {"forward", "backward", "forward+backward"}
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    for row in rows:
        assert row["over_floor"] == pytest.approx(row["copy_gb_s"] / row["gb_s"])
        assert row["error_out"] < 0.01
        assert row["peak_mib"] is None or row["peak_mib"] >= 0
    skipped = [row for row in read(folder / "cif-cpu.jsonl") if "skipped" in row]
    assert {("cif (triton)", True), ("loop over frames", True)} <= {
        (row["implementation"], bool(row["skipped"])) for row in skipped
    }
    assert "skipped: a frame fires" in printed
    assert (folder / "cif-cpu.svg").read_text().startswith("<?xml")


def test_slow_calls_take_fewer_turns():
    calls = []
    timed = take_turns(
        {"slow": lambda: calls.append(time.sleep(0.02))},
        device="cpu",
        warm_up=5,
        repeats=50,
        limit_s=0.01,
    )["slow"]
    assert (timed["warm_up"], timed["repeats"]) == (1, 3)
    assert timed["fresh_ms"] is None or timed["fresh_ms"] >= 20
    each = 3 if HAS_GLIBC else 1  # in fresh memory, untimed, in recycled memory
    assert len(calls) == 1 + 3 * each + HAS_GLIBC  # one to warm up, the last for the peak
    assert timed["median_ms"] >= 20


def test_rows_are_replaced_not_repeated(tmp_path):
    path = tmp_path / "rows.jsonl"
    here = {"case": "a", "implementation": "ours", "dtype": "float32", "device": "x", "threads": 1}
    other = {**here, "threads": 2, "median_ms": 9}
    write([{**here, "skipped": "no triton"}, other], path)
    write([{**here, "pass": which, "median_ms": 1} for which in ("forward", "backward")], path)
    assert [row["median_ms"] for row in read(path)] == [9, 1, 1]
    write([{**here, "pass": "forward", "median_ms": 2}], path)
    assert [row["median_ms"] for row in read(path)] == [9, 2]


@pytest.mark.skipif(
    not (HAS_GLIBC and Path("/proc/self/clear_refs").exists()), reason="needs Linux and glibc"
)
def test_a_result_in_fresh_memory_costs_its_pages():
    counts = []
    for _ in range(2):
        fresh()
        start = page_faults()
        torch.ones(64, 2**18)  # 64 MiB
        counts.append(page_faults() - start)
    assert min(counts) > 8000
    timed = take_turns({"ones": lambda: torch.ones(64, 2**18)}, device="cpu", warm_up=1, repeats=5)
    assert timed["ones"]["fresh_ms"] > timed["ones"]["median_ms"]


@pytest.mark.skipif(
    not (HAS_GLIBC and Path("/proc/self/clear_refs").exists()), reason="needs Linux and glibc"
)
def test_peak_memory_counts_what_is_touched():
    def call():
        first = torch.ones(48, 2**18)  # 48 MiB
        second = first + 1
        del first
        return second.sum()

    untouched = peak_mib(lambda: torch.empty(96, 2**18), "cpu")
    assert peak_mib(call, "cpu") == pytest.approx(96, abs=6)
    assert untouched == pytest.approx(0, abs=6)


def test_a_cif_that_is_off_is_not_timed_and_a_foreign_one_says_so():
    errors = {"error_out": 2e-3, "error_dh": 1e-9, "error_dalpha": 1e-9}
    with pytest.raises(AssertionError, match=r"index_add .* error_out 0.002"):
        check("index_add", IMPLEMENTATIONS["index_add"], torch.float32, errors)
    foreign = IMPLEMENTATIONS["torch-cif 0.2.0"]
    assert check("torch-cif", foreign, torch.float32, errors).startswith("WRONG HERE (error_out")
    errors["error_out"] = math.nan
    assert check("torch-cif", foreign, torch.float32, errors).startswith("WRONG HERE (NaN")
    errors["error_out"] = 1e-4
    assert check("torch-cif", foreign, torch.float32, errors) == foreign.note


def test_the_floor_counts_the_bytes_that_must_move():
    setting = Setting(((2, 5, 3), (4, 4), ()), torch.bfloat16, "cpu")
    read_h, written = 2 * 2 * 5 * 3, 2 * 2 * 4 * 3
    floor = setting.floor_bytes()
    assert floor["forward"] == read_h + written + 2 * 5 * 4
    assert floor["backward"] == 2 * read_h + written + 2 * 5 * (4 + 8)
    assert floor["forward+backward"] == floor["forward"] + floor["backward"]


def test_a_wrong_kl_is_not_timed():
    setting = KLSetting((4, 3, 5), torch.float32, "cpu")
    check_kl("right", setting, {"error_gradient": 1e-6})
    for error in (2e-4, math.nan):
        with pytest.raises(AssertionError, match=r"wrong in torch.float32: error of the gradient"):
            check_kl("wrong", setting, {"error_gradient": error})


def test_the_gpu_script_is_valid_and_asks_for_its_folder():
    script = ROOT / "benchmarks" / "gpu.sh"
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run([script], capture_output=True, text=True)
    assert done.returncode == 2
    assert "RESULTS_DIR" in done.stderr
