from benchmarks.study.report import tables
from benchmarks.study.report.runs import read_study


def cells(text):
    """Index the rows of Markdown tables by their first cell."""
    rows = {}
    for line in text.splitlines():
        if line.startswith("|"):
            first, *rest = (cell.strip() for cell in line.strip("|").split(" | "))
            rows[first] = rest
    return rows


def methods(rows, baseline="focal"):
    return tables.methods(rows, baseline, rows)


def test_methods_have_means_deviations_and_paired_differences(frame, make):
    rows = [make("ghm", 0, 0.60, ap50=0.7, step_ms=90.0), make("ghm", 1, 0.64, ap50=0.9)]
    rows += [make("focal", 0, 0.50), make("focal", 1, 0.62, step_ms=81.0)]
    text = methods(frame(*rows))
    assert "**methods: digits, retinanet, 600 steps** (batch 16, 128x128 pixels, 48 channels)" in (
        text
    )
    found = cells(text)
    names = ["seeds", "AP", "AP50", "AP75", "AP against focal", "ms per step"]
    assert found["method"] == names
    # Two values d apart deviate by d / sqrt(2).
    both = "**0.600 ± 0.000**"
    assert found["focal"] == [
        "0, 1", "0.560 ± 0.085", "**0.800 ± 0.000**", both, "baseline", "80.5 ± 0.7",
    ]  # fmt: skip
    assert found["ghm"] == [
        "0, 1", "**0.620 ± 0.028**", "**0.800 ± 0.141**", both, "+0.060 (+0.020 to +0.100)",
        "85.0 ± 7.1",
    ]  # fmt: skip
    assert "†" not in text
    assert "differ" not in text
    assert "shared" not in text


def test_footnotes_tell_of_rows_that_do_not_belong_together(frame, make):
    rows = [make("focal", 0), make("focal", 1, commit="bbb"), make("ghm", 0, cpu="B", parallel=2)]
    text = methods(frame(*rows))
    assert "focal †" in cells(text)
    assert "ghm" in cells(text)
    assert "† focal: seeds differ in commit: aaa (seed 0); bbb (seed 1)." in text
    assert "Rows of this table differ in cpu: A CPU, B." in text
    assert "Rows of this table differ in commit: aaa, bbb." in text
    assert "Runs that shared the machine while steps were timed: 1, 2." in text


def test_the_baseline_of_another_section_is_named_and_a_missing_one_too(frame, make):
    rows = [make("focal", ap=0.5), make("ghm", ap=0.6, section="bins")]
    text = methods(frame(*rows))
    assert cells(text)["ghm"][4] == "+0.100"
    assert "focal is that of section methods." in text
    text = methods(frame(make("ghm")))
    assert cells(text)["ghm"][4] == "-"
    assert "There is no row of focal to compare with." in text


def test_classes_are_columns_of_ap_and_ap50(frame, make):
    rows = [make(seed=0, ap_per_class={"a": [0.2, 0.4], "b": [0.5, 0.9]})]
    rows += [make(seed=1, ap_per_class={"a": [0.4, 0.6], "b": [None, 0.7]})]
    rows += [make("ce", ap_per_class={"a": [0.1, 0.6]})]
    first, second = tables.classes(frame(*rows)).split("\n\n")[1:]
    assert cells(first)["AP of class"] == ["a", "b"]
    assert cells(first)["focal"] == ["**0.300**", "0.500"]
    assert cells(first)["ce"] == ["0.100", "-"]
    assert cells(second)["AP50 of class"] == ["a", "b"]
    assert cells(second)["focal"] == ["0.500", "0.800"]
    assert cells(second)["ce"] == ["**0.600**", "-"]
    assert "No row has AP by class." in tables.classes(frame(make()))


def scores(single, f1, **others):
    found = {"f1": f1, **others, "single": single}
    return {name: {"macro_f1": value} for name, value in found.items()}


def test_policies_are_compared_with_one_threshold_by_seed(frame, make):
    rows = [make(seed=0, policies=scores(0.50, 0.60, prior=0.1))]
    rows += [make(seed=1, policies=scores(0.70, 0.68, prior=0.3))]
    rows += [make(seed=2, policies=scores(None, 0.80))]
    text = tables.policies(frame(*rows, make("ce")))
    found = cells(text)
    assert found["macro-F1 of method"] == ["single", "f1", "prior", "f1 minus single"]
    gain = "+0.040 (-0.020 to +0.100), 2 of 3 seeds"
    assert found["focal"] == ["0.600", "0.693", "0.200", gain]
    assert found["ce"] == ["-", "-", "-", "-"]
    assert "No row has threshold policies." in tables.policies(frame(make()))


def test_initial_losses_are_the_papers():
    found = cells(tables.initial_losses())
    # Chen et al.: N / N_f = 1000, C = 80.
    assert found["0.5"][:2] == ["0.6931", "55,451"]
    assert found["0.01"] == ["4.605", "804", "808.6"]
    assert found["1e-05"][:2] == ["11.51", "0.8"]
    assert found["1e-10"][:2] == ["23.03", "8e-06"]
    # The optimum: 1 / 80000, -log(1 / 80000) = 11.29, and nearly 1 from the negatives.
    assert found["1.25e-05 (optimal)"] == ["11.29", "1", "12.29"]
    sums = [float(row[2].replace(",", "")) for row in list(found.values())[2:]]
    assert min(sums) == 12.29


def test_provenance_is_a_line_for_each_grid_and_machine(write, make):
    rows = [make(seed=0), make(seed=1, commit="bbb"), make(seed=2, gpu="A GPU", grid="gpu")]
    lines = tables.provenance(read_study([write(*rows)])).splitlines()
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    versions = "Python 3.11.7, torch 2.6.0"
    threads = "CPU threads per run: 1"
    assert found == [
        ["cpu", "2", f"A CPU, Linux x86_64, {threads}", versions, "aaa, bbb", "111",
         "yes: trained without a GPU"],
        ["gpu", "1", f"A GPU, A CPU, Linux x86_64, {threads}", versions, "aaa", "111", "no"],
    ]  # fmt: skip
