"""docs/families.md has a row for each family that the tests' factories make; tests/families.py writes it."""

from __future__ import annotations

import families
import pytest


def test_the_page_has_every_family() -> None:
    """`python tests/families.py --missing` adds what is not there yet, with its errors."""
    assert set(families.read_page()) == set(families.families())


def test_every_row_says_something_and_no_parity_failed() -> None:
    rows = families.read_page()
    assert all(len(cells) == len(families.MODES) and all(cells) for cells in rows.values())
    assert not [key for key, cells in rows.items() if "parity fails" in str(cells)]


def test_a_row_is_replaced_and_the_others_stay(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = families.read_page()
    monkeypatch.setattr(families, "PAGE", tmp_path / "families.md")
    families.write_page(rows)
    monkeypatch.setattr(families, "families", lambda: dict.fromkeys(rows, lambda folder: (folder, folder)))
    monkeypatch.setattr(families, "tried", lambda *arguments: "1.0e-09")
    monkeypatch.setattr("sys.argv", ["families.py", "--only", "deberta"])
    assert families.main() == 0
    after = families.read_page()
    assert after.keys() == rows.keys()
    changed = {key for key in rows if after[key] != rows[key]}
    assert changed == {key for key in rows if "deberta" in key[0]}
