"""Provenance identifies the measured code."""

from benchmarks.provenance import provenance, source_digest


def test_the_digest_changes_with_the_code_alone(tmp_path):
    def digest(**files):
        for old in tmp_path.rglob("*"):
            if old.is_file():
                old.unlink()
        for name, content in files.items():
            path = tmp_path / name.replace("__", "/").replace("_py", ".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(content)
        return source_digest(tmp_path)

    first = digest(a_py="1", deep__b_py="2")
    assert len(first) == 12
    assert digest(a_py="1", deep__b_py="2", notes="3") == first
    others = [
        digest(a_py="1", deep__b_py="3"),
        digest(a_py="1", deep__c_py="2"),
        digest(a_py="12", deep__b_py=""),
        digest(a_py="1"),
    ]
    assert len({first, *others}) == 5


def test_a_row_says_where_it_comes_from():
    row = provenance()
    assert row["source"] == source_digest()
    assert row["versions"]["torch"]
    assert {"commit", "python", "cuda", "cpu", "cpu_threads", "gpu", "system"} <= set(row)
