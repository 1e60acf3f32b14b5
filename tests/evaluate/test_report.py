"""What the report's page promises: it stands alone, shows the numbers it was given, and is safe with any data."""

from __future__ import annotations

import copy
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
import sample_reports as samples

from tunewright import summary
from tunewright.curves import plot_loss
from tunewright.evaluate.report import render_html, render_markdown

ALL = [
    samples.binary,
    samples.not_better,
    samples.no_evidence,
    samples.pretraining,
    samples.many_classes,
    samples.hostile,
    samples.smallest,
]
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page as a list of elements, with its text, and with the tags that were not closed as they should be."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[dict[str, Any]] = []
        self.elements: list[dict[str, Any]] = []
        self.faults: list[str] = []
        self.feed(html)
        self.close()
        self.faults += [f"<{element['tag']}> is never closed" for element in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "inside": [parent["tag"] for parent in self.open]}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        inside = [parent["tag"] for parent in self.open]
        self.elements.append({"tag": tag, "attrs": dict(attrs), "text": "", "inside": inside})
        if "svg" not in inside:
            self.faults.append(f"<{tag}/> closes itself outside SVG")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1]["tag"] != tag:
            self.faults.append(f"</{tag}> at line {self.getpos()[0]} closes {[e['tag'] for e in self.open[-2:]]}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, tag: str, **attrs: str) -> list[dict[str, Any]]:
        wanted = {key.rstrip("_"): value for key, value in attrs.items()}
        return [e for e in self.elements if e["tag"] == tag and wanted.items() <= e["attrs"].items()]

    def text(self, tag: str = "body", **attrs: str) -> str:
        return " ".join(" ".join(element["text"].split()) for element in self.all(tag, **attrs))


def tables(html: str) -> dict[str, list[list[str]]]:
    """Each table's rows of cell texts, by its caption."""
    found = {}
    for table in re.findall(r"<table.*?</table>", html, re.DOTALL):
        cells = [
            [" ".join(cell["text"].split()) for cell in Page(row).elements if cell["tag"] in {"th", "td"}]
            for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)
        ]
        found[Page(table).text("caption")] = cells
    return found


@pytest.fixture(params=ALL, ids=lambda sample: sample.__name__)
def report(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param()


# Any report


def test_tags_are_balanced(report: dict[str, Any]) -> None:
    assert Page(render_html(report)).faults == []


def test_nothing_is_fetched_and_nothing_runs(report: dict[str, Any]) -> None:
    html = render_html(report)
    page = Page(html)
    assert not page.all("script")
    assert not page.all("img")
    for element in page.elements:
        for name, value in element["attrs"].items():
            assert not name.startswith("on")
            assert name not in {"src", "srcset", "xlink:href", "action", "background", "style"}
            assert name != "href" or value == "data:," or str(value).startswith("#")
    style = page.text("style")
    assert "url(" not in style
    assert "@import" not in style


def test_page_is_small_whatever_the_data(report: dict[str, Any]) -> None:
    assert len(render_html(report).encode()) < 2_000_000


def test_pictures_are_named_or_hidden(report: dict[str, Any]) -> None:
    html = render_html(report)
    assert "<svg" in html
    ids = {element["attrs"].get("id"): element for element in Page(html).elements}
    for svg in Page(html).all("svg"):
        if svg["attrs"].get("aria-hidden") != "true":
            names = svg["attrs"]["aria-labelledby"].split()
            assert [ids[name]["tag"] for name in names] == ["title", "desc"]
            assert all(ids[name]["text"].strip() for name in names)


def test_ids_are_unique_and_links_lead_somewhere(report: dict[str, Any]) -> None:
    page = Page(render_html(report))
    ids = [element["attrs"]["id"] for element in page.elements if "id" in element["attrs"]]
    assert len(ids) == len(set(ids))
    assert {link["attrs"]["href"][1:] for link in page.all("a")} <= set(ids)
    assert {part["attrs"]["aria-labelledby"] for part in page.all("section")} <= set(ids)


def test_headings_step_down_one_at_a_time(report: dict[str, Any]) -> None:
    levels = [int(e["tag"][1]) for e in Page(render_html(report)).elements if re.fullmatch(r"h[1-6]", e["tag"])]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_tables_have_captions_and_scopes(report: dict[str, Any]) -> None:
    page = Page(render_html(report))
    assert len(page.all("table")) == len(page.all("caption"))
    assert all(caption["text"].strip() for caption in page.all("caption"))
    assert {cell["attrs"].get("scope") for cell in page.all("th")} == {"col", "row"}


def test_the_first_heading_after_the_name_is_the_verdict(report: dict[str, Any]) -> None:
    words = {"better": "Better than", "not better": "Not better than", "no evidence": "No evidence that it is better"}
    heading = Page(render_html(report)).all("h2")[0]["text"].strip()
    assert heading.startswith(words[report["comparison"]["verdict"]])
    assert f"{report['rows']:,} test rows" in heading
    assert words[report["comparison"]["verdict"]] in render_markdown(report)


def test_rendering_changes_nothing_and_repeats_itself(report: dict[str, Any]) -> None:
    before = copy.deepcopy(report)
    assert render_html(report) == render_html(report)
    assert repr(report) == repr(before)


def test_unknown_keys_are_ignored(report: dict[str, Any]) -> None:
    more = {**report, "later": {"a": 1}, "model": {**report["model"], "later": [1]}}
    more["comparison"] = {**report["comparison"], "later": "x"}
    assert render_html(more) == render_html(report)


def test_markdown_tables_keep_their_columns(report: dict[str, Any]) -> None:
    text = re.sub(r"```.*?```", "", render_markdown(report), flags=re.DOTALL)
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert blocks
    for block in blocks:
        lines = block.strip().split("\n")
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
        assert re.fullmatch(r"\|( -+:? \|)+", lines[1])


# What it says


def test_headline_of_a_better_model() -> None:
    heading = Page(render_html(samples.binary())).text("h2", id="verdict")
    figures = "accuracy 0.91 vs 0.52, +0.39 (95% interval +0.34 to +0.44), 500 test rows"
    assert heading == f"Better than the base: {figures}"
    assert f"**Better than the base:** {figures}." in render_markdown(samples.binary())


def test_a_better_model_is_put_in_plain_words() -> None:
    text = Page(render_html(samples.binary())).text("section", class_="verdict better")
    assert "about 39 more right answers in every 100" in text
    assert "The recipe asks it to beat the base: met." in text


def test_a_worse_model_says_so_and_what_to_do() -> None:
    text = Page(render_html(samples.not_better())).text("section", class_="verdict not-better")
    assert "\u22120.06 (95% interval \u22120.12 to \u22120.01)" in text
    assert "does worse than the base" in text
    assert "more test rows would not change it" in text
    assert "Keep the base for now" in text
    assert "The recipe asks it to beat the base: not met." in text


def test_no_evidence_says_how_many_rows_would_do() -> None:
    text = Page(render_html(samples.no_evidence())).text("section", class_="verdict no-evidence")
    assert "The interval includes zero: with 120 test rows" in text
    assert "does not show that the tuned model and the base are equal" in text
    assert "A true difference of 0.044 would be seen on so many rows four times in five" in text
    assert "about 670 would probably show" in text  # 120 * (2.8 / 1.96 * 0.0307 / 0.0186) ** 2 = 667, in two digits
    assert "recipe asks" not in text


@pytest.mark.parametrize("lost", [math.nan, None])
def test_a_model_that_diverged_is_not_compared(lost: float | None) -> None:
    report = samples.pretraining()
    report["models"]["tuned"] |= {"loss": lost, "perplexity": lost}
    report["intervals"]["tuned"]["loss"] = [lost, lost]
    report["comparison"] |= {"tuned": lost, "difference": lost, "interval": [lost, lost], "verdict": "no evidence"}
    report["training"] |= {"final_loss": lost, "curve": [[1, 2.1], [2, lost], [3, lost]]}
    page = Page(render_html(report))
    assert page.faults == []
    assert "not a number vs 2.105" in page.text("h2", id="verdict")
    assert "Training has probably diverged" in page.text()
    assert "train again with a lower learning rate" in render_markdown(report) + page.text()


def test_a_macro_f1_is_put_in_words() -> None:
    report = samples.binary()
    report["metric"] = report["comparison"]["metric"] = "f1_macro"
    text = Page(render_html(report)).text()
    assert "F1 (macro) 0.91 vs 0.52" in text
    assert "tells the classes apart better than the base, each class counting the same" in text


def test_lower_loss_is_an_improvement() -> None:
    heading = Page(render_html(samples.pretraining())).text("h2", id="verdict")
    assert "loss 1.62 vs 2.10 (lower is better), improvement +0.48 (95% interval +0.45 to +0.51)" in heading


def test_a_cheaper_model_that_is_as_good_is_named_beside_the_verdict() -> None:
    text = Page(render_html(samples.many_classes())).text("section", class_="verdict better")
    assert "No evidence that it is better than the tfidf baseline, which costs far less to run" in text


def test_a_gate_that_was_not_measured_is_not_met() -> None:
    report = {**samples.no_evidence(), "must_beat": "tfidf"}
    assert "beat the tfidf baseline: not met, for it was not measured." in render_html(report)


def test_rising_validation_loss_and_lost_numbers_are_pointed_out() -> None:
    assert "lowest at step 200 and rose after it" in render_html(samples.no_evidence())
    page = Page(render_html(samples.hostile())).text()
    assert "The training loss was not a finite number at 2 logged steps (first: 2)" in page
    assert "A metric of the tuned model is not a finite number" in page


@pytest.mark.parametrize(
    ("tuned", "base", "interval", "shown"),
    [
        (0.914, 0.526, [0.34, 0.43], "0.914 vs 0.526, +0.388 "),  # 0.91 - 0.53 would not be 0.39
        (0.5, 0.5, [-0.05, 0.05], "0.50 vs 0.50, 0.00 (95% interval \u22120.05 to +0.05)"),
        (0.9010, 0.9004, [-0.001, 0.0022], "0.9010 vs 0.9004, +0.0006 "),
    ],
)
def test_decimals_suit_the_difference(tuned: float, base: float, interval: list[float], shown: str) -> None:
    report = samples.binary()
    found = {"tuned": tuned, "baseline_value": base, "difference": tuned - base, "interval": interval}
    report["comparison"] |= found
    assert shown in Page(render_html(report)).text("h2", id="verdict")


def test_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="schema 2"):
        render_html({**samples.binary(), "schema": 2})


# The numbers


def test_metrics_shown_are_those_given_tuned_first() -> None:
    report = samples.binary()
    rows = tables(render_html(report))["Metrics, with the 95% interval where it was computed"]
    assert [row[0] for row in rows[1:]] == ["tuned", "base", "tfidf", "majority", "few-shot"]
    keys = ["accuracy"] + [f"{k}_{a}" for a in ("macro", "weighted") for k in ("precision", "recall", "f1")] + ["loss"]
    for row in rows[1:]:
        metrics = report["models"][row[0]]
        low, high = report["intervals"][row[0]]["accuracy"]
        assert row[1] == f"{metrics['accuracy']:.3f} {low:.3f} to {high:.3f}"
        assert row[2:9] == [f"{metrics[k]:.3f}" if k in metrics else "\u2013not measured" for k in keys[1:]]


def test_comparisons_shown_are_those_given() -> None:
    report = samples.many_classes()
    html = render_html(report)
    rows = next(rows for caption, rows in tables(html).items() if caption.startswith("Paired comparisons"))
    for row, given in zip(rows[1:], report["comparisons"], strict=True):
        assert row[0] == given["baseline"]
        assert float(row[1].replace("\u2212", "-")) == pytest.approx(given["difference"], abs=0.0005)
        low, high = (float(end) for end in row[2].replace("\u2212", "-").split(" to "))
        assert [low, high] == pytest.approx(given["interval"], abs=0.0005)
        assert row[4:] == [given["test"], given["verdict"]]
    assert [row[3] for row in rows[1:]] == ["< 0.001", "0.370"]


def test_classes_and_confusions_shown_are_those_given() -> None:
    report = samples.binary()
    found = tables(render_html(report))
    assert found["Tuned model by class"][1][:7] == ["negative", "250", "0.912", "0.908", "0.910", "0.205", "+0.705"]
    matrix = next(rows for caption, rows in found.items() if caption.startswith("Confusions of the tuned"))
    assert matrix[1:] == [["negative", "227 91%", "23 9%"], ["positive", "22 9%", "228 91%"]]


def test_many_classes_list_the_worst_and_fold_the_matrix() -> None:
    report = samples.many_classes()
    html = render_html(report)
    found = tables(html)
    classes = next(rows for caption, rows in found.items() if caption.startswith("Tuned model by class"))
    scores = [float(row[4]) for row in classes[1:]]
    assert len(scores) == 77
    assert scores == sorted(scores)
    top = next(rows for caption, rows in found.items() if caption.startswith("The most frequent confusions"))
    assert len(top) == 16
    given = report["models"]["tuned"]["confusion"]
    labels = report["labels"]
    assert int(top[1][2]) == max(n for i, row in enumerate(given) for j, n in enumerate(row) if i != j)
    assert int(top[1][2]) == given[labels.index(top[1][0])][labels.index(top[1][1])]
    whole = next(rows for caption, rows in found.items() if caption.startswith("Confusions of the tuned"))
    assert [[int(cell or 0) for cell in row[1:]] for row in whole[1:]] == given
    assert "details" in next(e for e in Page(html).all("table", class_="matrix dense"))["inside"]


def test_a_matrix_too_large_for_a_page_is_left_to_the_file() -> None:
    html = render_html(samples.many_classes(150))
    assert "The whole confusion matrix, 150 by 150, is in report.json" in html
    assert not Page(html).all("table", class_="matrix dense")
    assert len(html) < 2_000_000


def test_calibration_skips_empty_bins_and_names_the_error() -> None:
    report = samples.binary()
    html = render_html(report)
    rows = tables(html)["Tuned model by confidence"]
    given = [found for found in report["models"]["tuned"]["calibration"] if found["count"]]
    assert [int(row[1].replace(",", "")) for row in rows[1:]] == [found["count"] for found in given]
    assert f"(ECE): tuned {report['models']['tuned']['ece']:.3f}" in Page(html).text()


def test_text_tasks_show_their_own_metrics() -> None:
    chat = tables(render_html(samples.no_evidence()))["Metrics, with the 95% interval where it was computed"]
    assert chat[1] == ["tuned", "0.158", "0.421 0.389 to 0.455", "1.884", "6.58", "9,874"]
    stories = tables(render_html(samples.pretraining()))["Metrics, with the 95% interval where it was computed"]
    assert stories[1] == ["tuned", "1.622 1.594 to 1.650", "5.06", "0.602", "198,402"]


def test_training_and_data_facts() -> None:
    text = Page(render_html(samples.binary())).text()
    for fact in ("811,008 of 125,250,816 (0.65%)", "27 min 14 s", "742,118 (454 a second)", "imdb/train.jsonl:512"):
        assert fact in text
    rows = tables(render_html(samples.binary()))
    assert rows["Rows"][1] == ["train", "1,009", "1,000", "9", "31", "imdb/train.jsonl"]
    assert rows["Tokens in a row"][1] == ["train", "whole example", "28", "219", "271.4", "702", "1,024"]
    assert [row[1] for row in rows["Findings, the gravest first"][1:]] == ["error", "warning", "info"]


def test_a_long_curve_is_thinned_but_keeps_its_spike() -> None:
    report = samples.pretraining()
    curve = [[step, 1.0] for step in range(1, 50_001)]
    curve[31_234][1] = 9.0
    curve[100][1] = math.nan
    report["training"]["curve"] = curve
    html = render_html(report)
    assert len(html) < 100_000
    raw = Page(html).all("path", class_="raw")[0]["attrs"]["d"]
    heights = [float(point.split()[1].removesuffix("h0")) for point in re.split("[ML]", raw)[1:]]
    assert raw.count("M") == 2  # the line has a gap where the loss was not a number
    assert min(heights) < 15 < max(heights)


# Examples


def test_examples_show_gains_and_losses() -> None:
    page = Page(render_html(samples.binary()))
    titles = [heading["text"].split(" ")[0].strip() for heading in page.all("h3")]
    assert titles[-5:] == ["Gained", "Lost", "Wrong", "Right", "Errors,"]
    assert len(page.all("p", class_="source")) == 12 + 4  # and an error with the three rows nearest to it
    words = page.text("dt")
    assert "Base wrong" in words
    assert "Tuned right" in words
    assert "Tuned wrong" in words


def test_examples_that_were_not_judged_are_not_marked() -> None:
    page = Page(render_html(samples.no_evidence()))
    assert "Answers side by side" in page.text("h3")
    assert not [mark for mark in page.all("span") if mark["attrs"].get("class") in {"mark right", "mark wrong"}]


# Hostile data


def test_users_texts_are_text() -> None:
    report = samples.hostile()
    page = Page(render_html(report))
    text = page.text()
    assert samples.SCRIPT in text
    assert "</style></title>" in text
    assert "{{ 7 * 7 }}{% raw %}" in text
    assert samples.LONG_LABEL in text
    assert samples.RIGHT_TO_LEFT in text
    assert "(empty)" in text
    assert page.all("p", class_="text", dir="auto")


def test_very_long_texts_are_cut_and_say_so() -> None:
    page = Page(render_html(samples.hostile()))
    assert "[cut here: 100,000 characters in all]" in page.text("details", class_="long")
    assert "Show all 100,000 characters" in page.text("summary")


def test_page_can_be_written_as_utf_8() -> None:
    for text in (render_html(samples.hostile()), render_markdown(samples.hostile())):
        text.encode()
        assert "\x00" not in text
        assert "\x1b" not in text


def test_markdown_escapes_markup() -> None:
    text = render_markdown(samples.hostile())
    assert "<script" not in text.split("```")[0]
    assert "a\\|b\\`c\\*d" in text
    assert "````sh\necho" in text  # the fence is longer than the one in the user's command


# Absent parts


def test_parts_that_are_not_given_leave_no_trace() -> None:
    page = Page(render_html(samples.smallest()))
    assert [link["attrs"]["href"] for link in page.all("a")] == ["#models", "#recipe"]
    assert page.text("h2").endswith("Models Repeat it")
    for word in ("Training", "Examples", "Confidence", "Findings", "Commands", "The recipe"):
        assert word not in page.text()


@pytest.mark.parametrize(
    ("key", "anchor"), [("examples", "#examples"), ("training", "#training"), ("data", "#data"), ("labels", None)]
)
def test_any_optional_part_can_be_missing(key: str, anchor: str | None) -> None:
    report = samples.binary()
    assert anchor is None or f'href="{anchor}"' in render_html(report)
    del report[key]
    html = render_html(report)
    assert Page(html).faults == []
    assert anchor is None or f'href="{anchor}"' not in html


def test_empty_parts_are_left_out_too() -> None:
    empty = {
        "examples": [],
        "data": {"findings": []},
        "repeat": [],
        "versions": {},
        "recipe": "",
        "rows_that_matter": None,
    }
    page = Page(render_html({**samples.binary(), **empty}))
    assert page.faults == []
    assert "Examples" not in page.text("h2")
    assert not page.all("pre")


def test_findings_that_the_report_does_not_hold_are_counted() -> None:
    report = samples.binary()
    kinds = [("over_length", "warning", 1000), ("unknown_label", "error", 30)]
    first = {"code": "unknown_label", "severity": "error", "where": "test.jsonl:3", "message": "odd", "split": "test"}
    counts = [{"split": "test", "code": code, "severity": severity, "count": n} for code, severity, n in kinds]
    report["data"] = {**report["data"], "findings": [first], "counts": counts}
    page = render_html(report)
    assert "1 of 1030; data/findings.jsonl and data/inspection.json have all" in page
    assert "30 errors, 1,000 warnings" in page
    assert "The data checks report 30 errors" in page


# Evidence


def test_where_it_got_worse_is_said_first_and_shown_worst_first() -> None:
    html = render_html(samples.binary())
    page = Page(html)
    assert "It got worse where: label positive (\u22120.10)." in page.text("section", class_="verdict better")
    rows = tables(html)["Accuracy against the base"]
    assert [row[1] for row in rows[1:]] == ["positive", "(empty)", "negative"]
    assert rows[1][-1] == "not better"
    assert "1 better, 1 not better, 1 no evidence" in page.text()
    assert "| label | positive | 250 |" in render_markdown(samples.binary())


def test_the_difference_without_leaked_rows_is_said() -> None:
    said = Page(render_html(samples.binary())).text("section", class_="verdict better")
    assert "12 test rows say, exactly or nearly, what a training row says." in said
    assert "Without them the difference is +0.370 (+0.320 to +0.420): better." in said


def test_the_command_line_names_leaks_and_what_got_worse() -> None:
    leaks, worse = summary.noted(samples.binary())
    assert leaks.startswith("without 12 test rows that training has seen: better: accuracy 0.900 against base's 0.530")
    assert worse == "worse where: label positive (-0.104)"
    assert summary.noted(samples.no_evidence()) == []


def test_rows_that_matter_are_shown_with_the_command_that_drops_them() -> None:
    page = Page(render_html(samples.binary()))
    assert "among the 800 of 1,000 training rows" in page.text()
    assert "agrees with 82% of the labels, and looked at 900 of 1,000 rows" in page.text()
    assert "tunewright retrain imdb-sentiment-20261124-3f2a --drop 20" in page.text("pre")


def test_fidelity_shows_each_copy_and_what_the_endpoint_answered() -> None:
    html = render_html(samples.binary())
    text = Page(html).text("section")
    assert "packaged \u2192 gguf-q8_0" in text
    assert "98.4%" in text
    assert "limit 0.001" in text
    assert "8 conversations (312 tokens) have the same token ids in: trained, packaged, endpoint." in text
    assert "as offline The endpoint was asked 50 test rows over HTTP: 49 of 50 answers" in text


@pytest.mark.parametrize(
    ("cost", "said"),
    [
        ({"low": 0.0, "high": 0.0, "note": "runs on this machine"}, "nothing billed (runs on this machine)"),
        ({"low": 3.1, "high": 4.6, "note": "n"}, "planned $3.10 to $4.60"),
        ({"low": None, "high": None, "note": "no price is known"}, "no price is known"),
    ],
)
def test_the_cost_is_said_as_far_as_it_is_known(cost: dict[str, Any], said: str) -> None:
    report = samples.binary()
    report["cost"] = {"seconds": 42.0, "device": "cpu", "tokens": 1, **cost}
    assert said in Page(render_html(report)).text()


def test_many_findings_of_one_kind_do_not_hide_another() -> None:
    report = samples.binary()
    many = [{"code": "near_training", "severity": "warning", "where": f"t:{n}", "message": "m"} for n in range(40)]
    report["data"]["findings"] = [*many, {"code": "secret", "severity": "info", "where": "t:99", "message": "key"}]
    rows = next(rows for caption, rows in tables(render_html(report)).items() if caption.startswith("Findings"))
    assert [row[0] for row in rows[1:]] == ["t:0", "t:1", "t:2", "t:3", "t:99"]


# Colours


def test_text_has_contrast_in_light_and_dark() -> None:
    style = Page(render_html(samples.binary())).text("style").split("* { box-sizing")[0]
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in style.split("@media screen")[:2])
    for colours in (light, {**light, **dark}):
        on_page = [(name, "page") for name in ("ink", "soft", "link", "good", "bad", "open")]
        on_fill = [(name, "fill") for name in ("ink", "soft")]
        verdicts = [(tone, f"{tone}-fill") for tone in ("good", "bad", "open")]
        verdicts += [("ink", f"{tone}-fill") for tone in ("good", "bad", "open")]
        cells = [("ink", f"h{shade}") for shade in range(5)] + [("on-dark-cell", f"h{shade}") for shade in (5, 6)]
        for text, ground in on_page + on_fill + verdicts + cells:
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        marks = [("tuned", "page"), ("base", "page"), *[("on-icon", tone) for tone in ("good", "bad", "open")]]
        for mark, ground in marks:
            assert contrast(colours[mark], colours[ground]) >= 3, (mark, ground)


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours."""
    lights = []
    for colour in (one, other):
        parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


# The curve in a terminal


def falling(count: int) -> list[tuple[float, float]]:
    return [(step, 2.0 * math.exp(-step / 40) + 0.3) for step in range(1, count + 1)]


def test_curve_fits_its_size_and_has_no_colour_unless_asked() -> None:
    plain = plot_loss(falling(200), width=60, height=12, title="loss of run 7", colour=False)
    assert "loss of run 7" in plain
    assert "\x1b" not in plain
    assert len(plain.split("\n")) == 12
    assert max(len(line) for line in plain.split("\n")) <= 60
    assert "\x1b[38" in plot_loss(falling(200), colour=True)


def test_curve_obeys_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in plot_loss(falling(50))
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b[38" in plot_loss(falling(50))


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([], "training loss: no points yet"),
        ([(5, 1.25)], "training loss: 1.25 at step 5 (one point; a curve needs two)"),
        ([(1, math.nan)], "training loss: no points yet\nnot a number at 1 point: step 1"),
    ],
)
def test_curve_with_too_few_points_is_a_sentence(points: list[tuple[float, float]], said: str) -> None:
    assert plot_loss(points) == said


def test_curve_names_steps_that_are_not_numbers() -> None:
    points = [*falling(20), *[(float(step), math.nan) for step in range(21, 28)], (28.0, 0.9), (29.0, math.inf)]
    assert plot_loss(points).endswith("not a number at 8 points: step 21, 22, 23, 24, 25, ...")


@pytest.mark.parametrize(
    "points", [[(1, 2.0), (2, 2.0)], [(3, 1.0), (3, 2.0)], [(1, -1e9), (2, 1e9)], [(0, 0), (9, 0)]]
)
def test_curve_of_odd_points_is_drawn(points: list[tuple[float, float]]) -> None:
    assert len(plot_loss(points, height=10).split("\n")) == 10
