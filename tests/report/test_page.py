"""Metrics, report.json, report.html and pictures."""

from __future__ import annotations

import io
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from raydfkd.report.charts import Curves
from raydfkd.report.metrics import MetricsLog, read_metrics
from raydfkd.report.page import (
    NEWER_KEYS,
    Gallery,
    Origin,
    count,
    duration,
    pictures_page,
    read_report,
    report_json,
    report_page,
    summary_table,
)

METRICS = [
    {"event": "unit", "time": 1.0, "unit": "u0", "images": 20, "seconds": 2.5, "objective": 0.7, "attempt": 1},
    *(
        {"event": "objective", "unit": unit, "step": step, "total": 3 - step / 10, "bn_moments": offset + 2.0}
        for step in (0, 10, 20)
        for unit, offset in (("u0", -1), ("u1", 0), ("u2", 5))
    ),
    *(
        {
            "event": "student",
            "step": step,
            "loss": 1 / step,
            "agreement": 0.9,
            "images_seen": step,
            "snapshot_images": 9,
        }
        for step in (1, 2, 3)
    ),
    {"event": "failure", "unit": "u1", "attempt": 1, "error": "objective became NaN"},
]


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "recipe": {"name": "toy", "teacher": {"network": "big_net"}, "student": {"network": "small_net"}},
        "seed": 17,
        "teacher": {"top1": 0.991, "top5": 0.999, "ece": 0.012, "per_class": [1.0, 0.98, None], "parameters": 62346},
        "student": {"top1": 0.967, "top5": 0.995, "ece": 0.031, "per_class": [0.9, 0.7, None], "parameters": 9842}
        | {"estimate": None},
        "class_names": ["crow", "jay", "owl"],
        "images_per_class": [1000, 797, 0],
        "confusion": {
            "teacher": {"matrix": [[1000, 0, 0], [16, 781, 0], [0, 0, 0]]},
            "student": {"matrix": [[900, 60, 40], [239, 558, 0], [0, 0, 0]]},
        },
        "skipped_pictures": {"count": 0, "first": []},
        "agreement": 0.9725,
        "judged_on": "real digits test images",
        "judged_images": 1797,
        "intended_class": 0.935,
        "answered_classes": 10,
        "warnings": [],
        "not_data_free": None,
        "verifier": None,
        "moment_distance": {"noise": 2.5, "synthetic": 0.125, "real": 0.0625},
        "images": 6000,
        "student_images": 6000,
        "held_out_images": 0,
        "images_per_second": 41.27,
        "units": {"planned": 24, "committed": 24, "attempted": 25, "quarantined": 0},
        "failures": [{"unit": "r000-c0000-0004", "attempt": 1, "error": "RuntimeError: lost"}],
        "seconds": {"total": 192.0, "synthesis": 146.0, "distillation": 171.0},
        "content_digest": "c0ffee",
        "recipe_digest": "decade",
        "versions": {"raydfkd": "0.1.0", "torch": "2.14.1"},
        "device": "cpu",
        "command": "raydfkd run toy",
    }


def make_gallery(classes: int = 3, images: int = 2, channels: int = 3, side: int = 8) -> Gallery:
    shape = (classes, images, channels, side, side)
    return Gallery(
        images=torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        class_names=tuple(f"class-{index}" for index in range(classes)),
        teacher_confidence=torch.full((classes, images), 0.875),
        origins=tuple(
            tuple(Origin(unit=f"u{label}", seed=40 + label, index=index) for index in range(images))
            for label in range(classes)
        ),
    )


def curves_of(metrics) -> Curves:
    curves = Curves()
    for event in metrics:
        curves.add(event)
    return curves


def page_of(report, metrics=METRICS, gallery=None) -> str:
    return report_page(report, curves=curves_of(metrics), gallery=gallery)


def text_of(page: str) -> str:
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)
    return " ".join(text.replace("\N{NO-BREAK SPACE}", " ").split())


VOID = ("meta", "img", "path", "polygon", "polyline", "circle")


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes something else"

    def charts(self) -> list[dict[str, str | None]]:
        return [attributes for attributes in self.of("svg") if attributes.get("class") != "heat"]

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_metrics_are_read_back_as_written_and_carry_the_time(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl", fresh=True)
    log.write("student", step=50, loss=0.25, agreement=None)
    (event,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert event.pop("time") > 1.7e9
    assert event == {"event": "student", "step": 50, "loss": 0.25, "agreement": None}


def test_torn_last_line_of_metrics_is_left_out_and_not_continued_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, fresh=True).write("unit", unit="u0")
    with path.open("a") as file:
        file.write('{"event": "unit", "un')
    assert [event["unit"] for event in read_metrics(path)] == ["u0"]
    MetricsLog(path, fresh=False).write("unit", unit="u1")
    assert [event["unit"] for event in read_metrics(path)] == ["u0", "u1"]


def test_damaged_lines_of_metrics_are_skipped_and_that_is_said_once(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, fresh=True) as log:
        log.write("unit", unit="u0")
    good = path.read_bytes()
    bad = [
        good[:20] + b"\n",
        b"\0" * 50 + b"\n",
        b"\xff\xfe\n",
        b"[1]\n",
        b'{"event": 3, "time": 1.0}\n',
        b'{"event": "unit"}\n',
    ]
    path.write_bytes(good + b"".join(bad) + good)
    assert [event["unit"] for event in read_metrics(path)] == ["u0", "u0"]
    (record,) = caplog.records
    assert record.getMessage() == f"{path}: 6 lines are damaged and left out, the first is line 2"


def test_metrics_that_are_not_there_are_none(tmp_path):
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == []


def test_metrics_of_a_run_are_one_open_file(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl", fresh=True)
    monkeypatch.setattr("pathlib.Path.open", lambda *_: pytest.fail("opened again"))
    for number in range(3):
        log.write("unit", unit=f"u{number}")
        assert (tmp_path / "metrics.jsonl").stat().st_size > 50 * number, "a line is out at once"


def test_fresh_metrics_forget_an_earlier_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, fresh=True).write("unit", unit="u0")
    MetricsLog(path, fresh=True)
    assert list(read_metrics(path)) == []


def test_threads_do_not_tear_each_others_lines(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", fresh=True)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: log.write("unit", unit=f"{index}" * 50), range(100)))
    assert len(list(read_metrics(tmp_path / "metrics.jsonl"))) == 100


def test_numbers_that_json_does_not_know_are_written_as_null(tmp_path, report):
    MetricsLog(tmp_path / "metrics.jsonl", fresh=True).write("unit", objective=math.nan)
    (event,) = read_metrics(tmp_path / "metrics.jsonl")
    assert event["objective"] is None
    assert json.loads(report_json(report | {"agreement": math.inf}))["agreement"] is None


def test_report_json_round_trips(tmp_path, report):
    (tmp_path / "report.json").write_text(report_json(report))
    assert json.loads((tmp_path / "report.json").read_text()) == read_report(tmp_path) == report


def test_page_shows_every_value_of_the_report(report):
    page = page_of(report, gallery=make_gallery())
    assert "<title>big_net → small_net</title>" in page
    text = text_of(page)
    for value in ("99.1 %", "96.7 %", "97.2 %", "2.4 points below", "62,346", "9,842", "6,000", "41.3", "3 min 12 s"):
        assert value in text
    for value in ("of the teacher’s answers, on 1,797 real digits test images", "top-1 on real digits test images"):
        assert value in text
    assert "finds the intended class 93.5 %" in text
    for value in ("committed 24", "attempted 25", "r000-c0000-0004 1 RuntimeError: lost", "torch 2.14.1"):
        assert value in text
    for value in ("c0ffee", "decade", "raydfkd run toy", "seed 17", "device cpu"):
        assert value in text
    recipe = re.search(r"<pre>(name: .*?)</pre>", page, flags=re.DOTALL)
    assert yaml.safe_load(recipe[1]) == report["recipe"]


def test_page_needs_nothing_from_the_network(report):
    page = page_of(report, gallery=make_gallery())
    tags = Tags(page)
    assert tags.open == []
    assert tags.of("script") == tags.of("link") == tags.of("iframe") == []
    sources = [value for _, attributes in tags.found for key, value in attributes.items() if key in ("src", "href")]
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert "@import" not in page
    assert "url(" not in page


def of_classes(report, count):
    """The report of so many classes, of which the student knows the first ones least."""
    pairs = [[label, label + 1, 50 - label] for label in range(20)]
    matrix = [[50 if label == answer else 0 for answer in range(count)] for label in range(count)]
    return report | {
        "teacher": report["teacher"] | {"per_class": [1.0] * count},
        "student": report["student"] | {"per_class": [label / count for label in range(count)]},
        "class_names": [f"class-{label}" for label in range(count)],
        "images_per_class": [50] * count,
        "confusion": dict.fromkeys(("teacher", "student"), {"pairs": pairs} if count > 100 else {"matrix": matrix}),
    }


def section(page, name):
    return page.partition(f'<section aria-labelledby="{name}">')[2].partition('<section aria-labelledby="pro')[0]


def test_page_shows_top5_and_calibration_of_both(report):
    text = text_of(page_of(report))
    assert "top-5 on real digits test images 99.9 % 99.5 %" in text
    assert "calibration error on real digits test images 1.2 % 3.1 %" in text


def test_page_shows_each_of_few_classes_and_what_it_is_taken_for(report):
    shown = section(page_of(report), "classes")
    text = text_of(shown)
    assert "crow 1,000 100.0 % 90.0 % jay 797 98.0 % 70.0 %" in text
    assert "2 of 3 classes have real images" in text
    assert "jay crow 239 30.0 % crow jay 60 6.0 % crow owl 40 4.0 %" in text
    cells = Tags(page_of(report)).of("rect")
    assert len(cells) == 5, "those without an image are empty"
    assert [cell.get("class") for cell in cells] == [None, "wrong", "wrong", "wrong", None]
    assert "jay taken for crow: 239 of 797" in text


@pytest.mark.parametrize("count", [40, 100, 1000])
def test_of_many_classes_the_page_shows_the_ten_worst(report, count):
    shown = section(page_of(of_classes(report, count)), "accuracy")
    rows = re.findall(r'<th scope="row">(class-\d+)</th>', shown.partition("</table>")[0])
    assert rows == [f"class-{label}" for label in range(10)]
    assert f"The 10 classes of {count:,} that the student knows least" in text_of(shown)


def test_of_a_thousand_classes_the_page_shows_the_most_frequent_mistakes_and_stays_small(report):
    large, without = page_of(of_classes(report, 1000)), page_of(report | {"class_names": None})
    shown = section(large, "classes")
    assert "<svg" not in shown
    assert "class-0 class-1 50 100.0 % class-1 class-2 49 98.0 %" in text_of(shown)
    assert len(large) - len(without) < 10_000


def test_heat_map_of_a_hundred_classes_has_no_names_in_its_margin(report):
    few, many = (Tags(page_of(changed, metrics=[])) for changed in (report, of_classes(report, 100)))
    assert (len(few.of("text")), len(many.of("text"))) == (3, 0)
    assert len(many.of("rect")) == 100


def test_report_of_an_earlier_version_has_no_classes(report):
    old = {key: value for key, value in report.items() if key not in NEWER_KEYS}
    old |= {role: {"top1": 0.9, "parameters": 5} for role in ("teacher", "student")}
    page = page_of(old)
    assert 'id="classes"' not in page
    assert "top-5" not in page


def test_without_real_data_the_accuracy_is_not_judged(report):
    report["teacher"]["top1"] = report["student"]["top1"] = None
    report["judged_on"] = "synthetic images that were held out"
    report["class_names"] = report["teacher"]["top5"] = report["student"]["top5"] = None
    report["student"]["ece"] = None
    report["student"]["estimate"] = {
        "agreement": 0.8123,
        "low": 0.65,
        "high": 0.913,
        "words": "from a lot",
        "evidence": {},
    }
    text = text_of(page_of(report))
    assert text.count("not judged (no real data)") == 4
    assert "agreement on real images, estimated 81 % (65 to 91) from a lot." in text.partition("main")[0]
    held_out = "agreement on synthetic images that were held out, of the kind that it learned from – 97.2 %"
    assert text.index("agreement on real images, estimated – 81 % (65 to 91)") < text.index(held_out)
    console = Console(width=90, record=True, file=io.StringIO())
    console.print(summary_table(report))
    table = console.export_text().replace("\N{NO-BREAK SPACE}", " ")
    assert table.index("81 % (65 to 91)") < table.index("97.2 %")
    assert "top-1 on real images" in text


def test_what_nobody_can_estimate_is_unknown_and_says_why(report):
    report["teacher"]["top1"] = report["student"]["top1"] = report["agreement"] = None
    report["class_names"], report["judged_on"] = None, "no image"
    unknown = {"agreement": None, "low": None, "high": None, "words": "the teacher has 300 classes", "evidence": {}}
    report["student"]["estimate"] = unknown
    text = text_of(page_of(report))
    assert "estimated unknown Nobody can say how the student does on real images: the teacher has 300 classes." in text
    console = Console(width=90, record=True, file=io.StringIO())
    console.print(summary_table(report))
    assert console.export_text().split()[-1] == "unknown"


@pytest.mark.parametrize("write", ["report", "pictures"])
def test_what_is_wrong_with_the_images_is_said_before_anything_else(report, write):
    warnings = ["the teacher finds the intended class in only 12 %", "only <2> of 10 classes"]
    page = page_of(report | {"warnings": warnings}) if write == "report" else page_of_pictures(warnings=warnings)
    above = text_of(page.partition("<main>")[0].partition("<dl")[0])
    assert warnings[0] in above
    assert "only &lt;2&gt; of 10 classes" in above


def page_of_pictures(*, metrics=METRICS, warnings=()):
    recipe = {"name": "toy", "teacher": {"network": "big_net"}}
    return pictures_page(make_gallery(3, 2), curves=curves_of(metrics), recipe=recipe, warnings=warnings)


def test_page_of_pictures_has_the_images_the_objective_and_the_recipe_and_no_student():
    page = page_of_pictures()
    tags = Tags(page)
    assert tags.open == []
    assert len(tags.of("img")) == 6
    titles = [chart["aria-label"].partition(" over")[0] for chart in tags.of("svg")]
    assert titles == ["total", "bn_moments"]
    assert "No student was trained on them yet" in text_of(page)
    recipe = re.search(r"<pre>(name: .*?)</pre>", page, flags=re.DOTALL)
    assert yaml.safe_load(recipe[1]) == {"name": "toy", "teacher": {"network": "big_net"}}


def test_page_of_pictures_does_without_metrics():
    assert Tags(page_of_pictures(metrics=[])).of("svg") == []


VERIFIER = {
    "network": "other_net",
    "images": 2000,
    "of": "intended",
    "top1": 0.612,
    "top5": 0.851,
    "per_class": [0.5, 0.724],
    "worst": [{"class": 0, "name": "crow", "top1": 0.5}],
    "diversity": 0.34567,
    "real": {"images": 1797, "top1": 0.781, "top5": 0.941, "diversity": 0.4},
}


def test_page_shows_what_the_verifier_sees_beside_real_images(report):
    text = text_of(page_of(report | {"verifier": VERIFIER}))
    for row in (
        "images shown to other_net, which has not made them – 2,000 1,797",
        "put in the intended class, top-1 – 61.2 % 78.1 %",
        "the same, top-5 – 85.1 % 94.1 %",
        "cosine distance of two images of a class in its features – 0.346 0.4",
        "distance of BatchNorm moments from the teacher’s, nats 2.5 0.125 0.0625",
        "Classes that other_net finds least: crow (50.0 %).",
    ):
        assert row in text


def test_page_leaves_out_what_the_verifier_cannot_say(report):
    few = VERIFIER | {"top5": None, "diversity": None, "worst": [], "real": None, "of": "teacher's answer"}
    text = text_of(page_of(report | {"verifier": few, "moment_distance": None}))
    assert "put in the class that the teacher finds, top-1 – 61.2 % –" in text
    for absent in ("the same, top-5", "cosine distance", "finds least", "BatchNorm moments"):
        assert absent not in text
    without = page_of(report | {"moment_distance": None})
    assert 'id="quality"' not in without


def test_pictures_show_the_verifiers_confidence_where_there_is_one(report):
    gallery = replace(make_gallery(2, 1), verifier_confidence=torch.tensor([[0.25], [0.5]]))
    page = page_of(report, gallery=gallery)
    titles = [image["title"].replace("\N{NO-BREAK SPACE}", " ") for image in Tags(page).of("img")]
    assert titles[0] == "class-0, teacher’s confidence 87.5 %, verifier’s 25.0 %, unit u0, seed 40, image 0"
    assert "class-1 87.5 %, verifier’s 50.0 % unit u1" in text_of(page)


@pytest.mark.parametrize("of", ["intended", "teacher's answer", "intended or teacher's answer"])
def test_table_in_the_terminal_has_a_column_for_the_verifier(report, of):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary_table(report | {"verifier": VERIFIER | {"of": of}}))
    head, *_, made, real = console.export_text().replace("\N{NO-BREAK SPACE}", " ").rstrip().splitlines()
    assert head.split() == ["teacher", "student", "verifier"]
    assert made.split("  ")[0].startswith("2,000 synthetic images put in the ")
    assert re.split(" {2,}", made)[1:] == ["93.5 %", "-", "61.2 %"]
    assert re.split(" {2,}", real) == ["1,797 real images put in theirs", "-", "-", "78.1 %"]


def test_page_of_pictures_shows_the_verifier():
    recipe = {"name": "toy", "teacher": {"network": "big_net"}}
    verified = {"verifier": VERIFIER, "moment_distance": {"noise": 2.5, "synthetic": 0.125, "real": None}}
    page = pictures_page(make_gallery(), curves=curves_of([]), recipe=recipe, warnings=[], verified=verified)
    text = text_of(page)
    assert "put in the intended class, top-1 – 61.2 % 78.1 %" in text
    assert "moments from the teacher’s, nats 2.5 0.125 –" in text
    assert Tags(page).open == []


def test_report_of_an_earlier_version_is_still_read_shown_and_summed_up(tmp_path, report):
    earlier = {key: value for key, value in report.items() if key not in NEWER_KEYS} | {"judged_on": "digits test"}
    (tmp_path / "report.json").write_text(json.dumps(earlier))
    found = read_report(tmp_path)
    assert {key: found[key] for key in earlier} == earlier
    assert found["verifier"] is found["moment_distance"] is None
    text = text_of(page_of(found))
    assert "of the teacher’s answers, on digits test" in text
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(found))
    assert "agreement on digits test" in console.export_text()


@pytest.mark.parametrize("content", ["", '{"teacher": {"top1"', "[]", "{}", '{"teacher": 1}'])
def test_report_that_is_damaged_is_an_error_of_value(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"line 1 column|there is no agreement, "):
        read_report(tmp_path)


def test_page_says_how_many_images_the_student_saw(report):
    report |= {"images": 6000, "student_images": 4500, "held_out_images": 600}
    text = text_of(page_of(report))
    assert "a student taught by 4,500 synthetic images" in text
    assert "last steps were drawn from, of 6,000 with 600 held out – 4,500" in text


def test_report_that_is_not_there_is_none(tmp_path):
    assert read_report(tmp_path) is None


def test_script_in_an_error_or_a_name_is_text_on_the_page(report):
    attack = "</pre><script>alert('x')</script>\"'"
    report["failures"][0]["error"] = report["command"] = report["recipe"]["teacher"]["network"] = attack
    gallery = replace(make_gallery(1), class_names=(attack,))
    metrics = [{"event": "objective", "unit": "u0", "step": 0, attack: 1.0}]
    page = page_of(report, metrics, gallery)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert f"Synthetic image of class {attack}" in {image["alt"] for image in Tags(page).of("img")}


def test_every_image_names_its_class_the_teachers_confidence_and_where_it_is_in_the_set(report):
    page = page_of(report, gallery=make_gallery(3, 2))
    images = Tags(page).of("img")
    titles = [image["title"].replace("\N{NO-BREAK SPACE}", " ") for image in images]
    assert titles == [
        f"class-{label}, teacher’s confidence 87.5 %, unit u{label}, seed {40 + label}, image {index}"
        for label in range(3)
        for index in range(2)
    ]
    assert "class-2 87.5 % unit u2, seed 42, image 1" in text_of(page), "the caption of the enlarged picture"
    assert all(image["alt"] for image in images)


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32), (5, 8), (3, 128)])
def test_gallery_takes_grey_colour_and_odd_images_of_any_size(tmp_path, report, channels, side):
    gallery = make_gallery(2, 2, channels, side)
    assert len(Tags(page_of(report, gallery=gallery)).of("img")) == 4


def test_class_with_fewer_images_than_others_has_gaps(report):
    full = make_gallery(2, 3)
    confidence = full.teacher_confidence.clone()
    confidence[0, 1:] = math.nan
    gallery = replace(full, teacher_confidence=confidence, of_classes=3)
    page = page_of(report, gallery=gallery)
    names = [image["title"].partition(",")[0] for image in Tags(page).of("img")]
    assert names == ["class-0", "class-1", "class-1", "class-1"]
    assert "2 of 3 classes; of the others there is no image." in text_of(page)


def test_more_than_twenty_classes_are_sampled_and_the_page_says_so(report):
    page = page_of(report, gallery=make_gallery(1000, 3, side=32))
    assert "20 of 1,000 classes, evenly spaced." in text_of(page)
    names = [image["title"].partition(",")[0] for image in Tags(page).of("img")]
    assert len(set(names)) == 20
    assert {names[0], names[-1]} == {"class-0", "class-999"}
    assert len(page) < 5_000_000


def test_large_images_are_left_out_before_the_page_gets_heavy(report):
    page = page_of(report, gallery=make_gallery(10, 12, side=224))
    assert re.search(r"The first \d of 12 images of each class", text_of(page))
    assert len(page) < 5_000_000


def test_curves_name_their_first_and_last_value(report):
    labels = [chart["aria-label"] for chart in Tags(page_of(report)).charts()]
    assert labels == [
        "loss over steps, from 1 to 0.333",
        "agreement with teacher over steps, from 90 % to 90 %",
        "images that it draws from over steps, from 9 to 9",
        "total over steps, from 3 to 1",
        "bn_moments over steps, from 2 to 2",  # the median of 1, 2 and 7
    ]


def test_curve_of_a_resumed_student_takes_the_last_word_on_a_step(report):
    losses = [(1, 9.0), (2, 8.0), (3, 7.0), (2, 5.0), (3, 4.0)]
    metrics = [{"event": "student", "step": step, "loss": loss} for step, loss in losses]
    (chart,) = Tags(page_of(report, metrics)).charts()
    assert chart["aria-label"] == "loss over steps, from 9 to 4"


@pytest.mark.parametrize(
    "values", [[1.0], [0.0, 0.0], [-5.0, 3.0], [1e-9, 1e6], [1e-300, 1.0], [None, 2.0], [1e16, 1e16]]
)
def test_any_numbers_make_a_curve_inside_its_box(report, values):
    metrics = [{"event": "student", "step": step, "loss": value} for step, value in enumerate(values)]
    (line,) = Tags(page_of(report, metrics)).of("polyline")
    for point in line["points"].split():
        x, y = map(float, point.split(","))
        assert 42 <= x <= 310
        assert 8 <= y <= 138


def test_long_runs_stay_readable(report):
    report["failures"] = [{"unit": f"u{index}", "attempt": 1, "error": "x" * 9000} for index in range(500)]
    metrics = [{"event": "student", "step": step, "loss": 1.0} for step in range(20_000)]
    page = page_of(report, metrics)
    assert "The first 50 of 500" in text_of(page)
    assert len(page) < 300_000


def test_incomplete_transfer_set_is_said_at_the_top(report):
    report["units"] |= {"quarantined": 1, "committed": 23}
    before_numbers = page_of(report).partition("<dl")[0]
    assert "incomplete: 1 of 24 units" in before_numbers


def test_page_of_a_run_without_metrics_or_gallery_has_its_numbers(report):
    report |= {"images_per_second": None, "failures": [], "seconds": {"total": 1.0, "synthesis": None}}
    page = page_of(report, metrics=[])
    assert Tags(page).charts() == Tags(page).of("img") == []
    assert "synthesis –" in text_of(page)


def test_summary_shows_teacher_and_student_side_by_side(report):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(summary_table(report))
    lines = [line.replace("\N{NO-BREAK SPACE}", " ").split() for line in console.export_text().splitlines()]
    assert lines == [
        ["teacher", "student"],
        ["real", "digits", "test", "images", "99.1", "%", "96.7", "%"],
        ["agreement", "on", "1,797", "real", "digits", "test", "images", "-", "97.2", "%"],
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0.4 s"), (59.7, "1 min 0 s"), (45, "45 s"), (108.2, "1 min 48 s"), (7260, "2 h 1 min"), (None, "–")],
)
def test_durations_read_as_a_person_says_them(seconds, text):
    assert duration(seconds).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(("number", "text"), [(6000, "6,000"), (41.27, "41.3"), (3, "3"), (0, "0"), (None, "–")])
def test_counts_read_as_a_person_writes_them(number, text):
    assert count(number) == text
