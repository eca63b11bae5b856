"""Which scan goes where."""

from pathlib import Path

from semiseg.preparation.scan_folders import divide
from semiseg.preparation.splits import LabelledScan, split


def test_the_split_depends_on_names_only_and_has_the_usual_numbers():
    def scans(names: range) -> list[LabelledScan]:
        return [LabelledScan(f"p{k}_{frame}", f"p{k}", (Path(),), Path()) for k in names for frame in "ab"]

    sizes = {"train.list": 70, "val.list": 10, "test.list": 20}
    one = split(scans(range(100)), sizes)
    other = split(scans(range(99, -1, -1)), sizes)
    assert [len(chosen) for chosen in one.values()] == [140, 20, 40]
    assert {k: sorted(s.name for s in v) for k, v in one.items()} == \
           {k: sorted(s.name for s in v) for k, v in other.items()}  # fmt: skip
    patients = [{scan.patient for scan in chosen} for chosen in one.values()]
    assert len(set.union(*patients)) == 100 == sum(map(len, patients))
    # Patients that are neighbours by name, of one diagnosis in ACDC, are spread over the splits.
    assert all(
        0 < len(patients[0] & {f"p{k}" for k in range(first, first + 20)}) < 20 for first in range(0, 100, 20)
    )
    assert [scan.name for scan in one["val.list"]][:4] == ["p29_a", "p29_b", "p34_a", "p34_b"]


def test_other_scans_of_a_patient_whose_label_is_used_are_trained_on(tmp_path):
    """One in five of all patients is for the test, and none of them is trained on."""
    scans = [LabelledScan(f"p{k}_{frame}", f"p{k}", (Path(),), Path()) for k in range(8) for frame in "ab"]
    for listed in (f"p{k}_b" for k in range(8)):
        (tmp_path / "labelled.txt").write_text(listed)
        splits, labelled = divide(scans, labelled=tmp_path / "labelled.txt")
        names = {name: [scan.name for scan in members] for name, members in splits.items()}
        assert labelled == 1 and len(names["test.list"]) == 4 and len(names["train.list"]) == 12
        assert names["train.list"][0] == listed and names["train.list"][1][:2] == listed[:2]
        assert not {name[:2] for name in names["test.list"]} & {name[:2] for name in names["train.list"]}
