"""Reports: every format parses, says the same, and survives hostile names and numbers that aren't finite."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console

from loratrf_deploy import UserError
from loratrf_deploy.parity import Check, LayerError, ParityReport
from loratrf_deploy.parity.figures import Figures
from loratrf_deploy.reports.formats import FORMATS, print_report, to_html, to_json, to_junit, to_markdown, write_report

TOLERANCE = 1e-5


def figures(relative: float, ties: int = 0) -> Figures:
    return Figures(relative / 2, relative, 0.99999, 0.75, ties, 8, 16)


def layer(number: int, relative: float, name: str = "query") -> LayerError:
    return LayerError(f"encoder.layer.{number}.{name}", "LoraTrf", relative, relative, relative > TOLERANCE)


def report(checks: tuple[Check, ...] | None = None, layers: tuple[LayerError, ...] = ()) -> ParityReport:
    if checks is None:
        checks = (
            Check("with library", "logits", "passed", "", figures(1e-6, ties=2)),
            Check("without library", "logits", "failed", "relative error 2.00e-02, tolerance 1e-05", figures(2e-2)),
            Check("base-off", "logits", "no effect", "the adapter itself changes nothing", figures(0.0)),
            Check("with library", "pooler_output", "skipped", "The custom-op library is not built"),
        )
    layers = layers or (layer(0, 0.0), layer(0, 3e-7, "key"), layer(1, 4e-2), layer(1, 2e-2, "key"))
    return ParityReport(
        "out/model.onnx",
        "adapter",
        "float32",
        TOLERANCE,
        checks,
        layers,
        "without library",
        3,
        ({"input_ids": (2, 5)},),
    )


HOSTILE = "layer.0.<script>alert(1)</script>&\"'\x1b[31m|\x00[bold]\ud800"


def test_every_format_gives_verdict_and_layer():
    for make in FORMATS.values():
        assert "encoder.layer.1.query" in make(report())


def test_json_round_trip():
    values = json.loads(to_json(report()))
    assert values["passed"] is False
    assert values["first_drift"] == "encoder.layer.1.query"
    assert values["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "no effect": 1}
    assert values["checks"][1]["relative"] == 2e-2
    assert len(values["layers"]) == 4


def test_junit_counts_each_check_once():
    suite = ElementTree.fromstring(to_junit(report()))
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4",
        "failures": "1",
        "errors": "0",
        "skipped": "2",
    }
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == [
        "with library: logits",
        "without library: logits",
        "base-off: logits",
        "with library: pooler_output",
    ]
    failure = cases[1].find("failure")
    assert failure is not None
    assert failure.text is not None
    assert "relative error 2.00e-02" in failure.text
    assert [case.find("skipped") is not None for case in cases] == [False, False, True, True]
    assert "not built" in cases[3].find("skipped").get("message")


def test_html_is_well_formed_with_a_point_per_layer():
    page = ElementTree.fromstring(to_html(report()))
    picture = page.find("body/svg")
    assert picture is not None
    circles = picture.findall("circle")
    assert [circle.find("title").text for circle in circles] == [
        "encoder.layer.0.query (LoraTrf): 0",
        "encoder.layer.0.key (LoraTrf): 3.00e-07",
        "encoder.layer.1.query (LoraTrf): 4.00e-02",
        "encoder.layer.1.key (LoraTrf): 2.00e-02",
    ]
    # Larger errors lie higher; the tolerance line separates those that drift.
    heights = [float(circle.get("cy")) for circle in circles]
    assert heights[0] > heights[1] > heights[3] > heights[2]
    (limit,) = [float(line.get("y1")) for line in picture.findall("line") if line.get("stroke-dasharray")]
    assert heights[3] < limit < heights[1]
    texts = [text.text for text in picture.findall("text")]
    # Right of the middle, the name runs to the left, so that it stays inside.
    named = next(text for text in picture.findall("text") if text.get("class") == "name")
    assert (named.text, named.get("text-anchor")) == ("drifts first: encoder.layer.1.query", "end")
    assert {"layer 0", "layer 1", "tolerance 1e-05"} <= set(texts)


def test_html_needs_nothing_from_outside():
    page = to_html(report())
    for word in ("http:", "https:", "<script", "url(", "@import", "src="):
        assert word not in page


def test_passing_report_points_at_no_layer():
    """A layer over the tolerance is no fault where every output is within it."""
    passed = report((Check("with library", "logits", "passed", "", figures(1e-6)),))
    assert passed.passed
    assert passed.first_drift is None
    assert "drifts first" not in to_html(passed)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, 1e-300, 1e300])
def test_extreme_errors(value):
    check = Check("with library", "logits", "failed", "broken", Figures(value, value, math.nan, None, 0, 0, 4))
    odd = report((check,), (layer(0, value), layer(0, 1e-7, "key")))
    assert json.loads(to_json(odd))["checks"][0]["relative"] == (value if math.isfinite(value) else str(value))
    ElementTree.fromstring(to_junit(odd))
    for circle in ElementTree.fromstring(to_html(odd)).findall("body/svg/circle"):
        assert 0 < float(circle.get("cy")) < 340
    assert "broken" in to_markdown(odd)


@pytest.mark.parametrize("count", [0, 1, 500])
def test_any_number_of_layers(count):
    many = tuple(layer(number // 10, 1e-7 * (number + 1), f"part{number}") for number in range(count))
    odd = ParityReport("m", "a", "float32", TOLERANCE, report().checks, many, "with library", 0, ({"x": (1,)},))
    page = ElementTree.fromstring(to_html(odd))
    assert len(page.findall("body/svg/circle")) == count
    for text in page.findall("body/svg/text"):
        assert 0 <= float(text.get("x")) <= 960
    ElementTree.fromstring(to_junit(odd))


def test_hostile_names_stay_text():
    check = Check("with library", HOSTILE, "failed", HOSTILE, figures(1.0))
    odd = report((check,), (LayerError(HOSTILE, HOSTILE, 1.0, 1.0, True),))
    assert "<script" not in to_html(odd)
    page = ElementTree.fromstring(to_html(odd))
    assert page.find("body/svg/circle/title").text.startswith("layer.0.<script>alert(1)</script>&\"'?[31m|")
    assert "<script" not in to_junit(odd)
    ElementTree.fromstring(to_junit(odd))
    assert json.loads(to_json(odd))["checks"][0]["output"] == HOSTILE
    rows = [line for line in to_markdown(odd).splitlines() if line.startswith("| with library")]
    assert rows[0].count("|") - rows[0].count("\\|") == 8
    assert "\x1b" not in printed(odd)
    for suffix in FORMATS:
        FORMATS[suffix](odd).encode()


def printed(value: ParityReport) -> str:
    out = io.StringIO()
    print_report(value, Console(file=out, width=160))
    return out.getvalue()


def test_table_for_a_pipe_has_no_colour_and_whole_words():
    text = printed(report())
    assert "\x1b" not in text
    assert "…" not in text
    for word in (
        "pooler_output",
        "no effect",
        "skipped",
        "75 % (2 ties)",
        "2.00e-02",
        "custom-op library is not built",
    ):
        assert word in text


@pytest.mark.parametrize("suffix", FORMATS)
def test_written_whole_with_nothing_left_over(tmp_path, suffix):
    path = tmp_path / f"parity{suffix}"
    path.write_text("old")
    write_report(report(), path)
    assert path.read_text("utf-8") == FORMATS[suffix](report())
    assert list(tmp_path.iterdir()) == [path]
    fresh = tmp_path / "fresh"
    fresh.touch()
    assert path.stat().st_mode == fresh.stat().st_mode


def test_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "parity.md"
    path.write_text("old")
    monkeypatch.setattr("loratrf_deploy.reports.formats.os.replace", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_report(report(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("parity.pdf", "unknown format"),
        ("parity", "unknown format"),
        ("none/parity.md", "does not exist"),
        ("d.md", "is a folder"),
    ],
)
def test_bad_path_is_refused(tmp_path, name, problem):
    (tmp_path / "d.md").mkdir()
    with pytest.raises(UserError, match=problem):
        write_report(report(), tmp_path / Path(name))
