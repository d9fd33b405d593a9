"""Plots of the report: what they are made of, and drawings that a page can hold."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from report_results import HOSTILE, control, every_row, fault, html, plain, results, row

from benchmarks import report_svg
from benchmarks.report_panels import method_marks, namer
from benchmarks.report_plots_cost import cost, points
from benchmarks.report_plots_curves import apart, growth
from benchmarks.report_plots_latency import forest_lines, pairs, ratios, role
from benchmarks.report_render import PARTS


def test_pairs_are_those_of_batch_1_in_float32_full_models_first() -> None:
    own = {"details": {"samples": [0.1, 0.2]}}
    small = [row(variant=v, model="small", settings={"batch": 8}, **own) for v in ("base", "fused")]
    kinds = [(v, b, p) for v in ("base", "fused", "unmerged") for b in (8, 1) for p in ("int8", "float32")]
    full = [row(variant=v, settings={"batch": b, "precision": p}, **own) for v, b, p in kinds]
    found = pairs([*small, row(model="lonely", **own), *full])
    assert [(base.model, base.variant, fused.variant) for base, fused in found] == [
        ("resnet18", "base", "fused"),
        ("small", "base", "fused"),
    ]
    assert found[0][0].settings == found[0][1].settings == {"batch": 1, "precision": "float32"}


def test_ratios_stand_under_a_heading_for_each_setting() -> None:
    rows = [row(settings={"batch": b, "size": 32}, variant=v) for b in (1, 8) for v in ("fused", "unmerged")]
    assert [text for text, _ in forest_lines(rows)] == ["batch 1", "fused", "unmerged", "batch 8", "fused", "unmerged"]
    assert [text for text, _ in forest_lines([row(), row(model="b")])] == ["resnet18", "b"]
    assert [role(r) for r in (row(), control(), fault(), row(variant="unmerged"))] == [
        *("fused", "control", "fault"),
        "other",
    ]


def test_an_accuracy_belongs_to_the_time_of_the_same_method_and_settings() -> None:
    target = plain("finetune", "head", "ort", "time to target", 3.0, "s", settings={"batch": 8, "target": 88})
    epoch = plain("finetune", "full", "ort", "epoch", 1.0, "s")
    right = plain("finetune", "head", "ort", "accuracy", 90.0, "%", settings={"batch": 8})
    wrong = [dataclasses.replace(right, settings={"batch": 1}), dataclasses.replace(right, runtime="other")]
    assert points([target, epoch, right, *wrong]) == [(target, right)]
    assert points([epoch, dataclasses.replace(right, variant="full")])[0][0] == epoch
    never = dataclasses.replace(target, variant="full", figure=None, note="not reached")
    assert "without a marker: full (ort)." in cost([target, right, never]).text


def test_growth_has_a_panel_for_each_swept_setting_and_a_line_for_each_variant() -> None:
    found = growth(every_row())
    assert [panel.caption.partition(":")[0] for panel in found.panels] == [
        *("By rank", "By batch size", "By layers of the network"),
        "By image size",
    ]
    assert [mark.label for mark in found.legend] == ["lora-c", "full"]
    assert found.panels[2].caption == "By layers of the network: batch 8, rank 4, image size 32, 1 thread"


def test_methods_have_colours_and_engines_shapes() -> None:
    rows = [plain("finetune", v, r, "epoch", 1.0, "s") for v in ("head", "full") for r in ("ort", "torch")]
    marks = method_marks(rows, namer(rows))
    assert list(marks) == ["head, ort", "head, torch", "full, ort", "full, torch"]
    one, two, three, four = marks.values()
    assert one.colour == two.colour != three.colour == four.colour
    assert one.marker == three.marker != two.marker == four.marker
    named = [plain("finetune", f"{e}, {m}", "env", "epoch", 1.0, "s") for e in ("ours", "torch") for m in ("a", "b")]
    assert [m.marker for m in method_marks(named, namer(named)).values()] == ["o", "o", "s", "s"]
    assert list(method_marks(named, namer(named))) == [r.variant for r in named]
    alone = method_marks(rows[:2], namer(rows[:2]))
    assert len({(m.colour, m.marker) for m in alone.values()}) == 2
    assert len({m.colour for m in alone.values()}) == 2


def test_ticks_keep_their_distance() -> None:
    assert apart([1, 2, 8, 32, 8], 31) == [1, 8, 32]
    assert apart([5], 0) == [5]


def test_a_plot_without_data_is_left_out_in_words(tmp_path: Path) -> None:
    lone = [plain("finetune", "head", "ort", "step", 0.1, "s"), row(ratio=None, verdict="", reference="", details={})]
    text = html(results(lone), tmp_path)
    assert text.count("This plot is left out: ") == 4
    assert 'class="plot"' not in text


@pytest.mark.parametrize("samples", [[0.01] * 5, [0.0, 0.0], [0.01]])
def test_samples_without_any_spread_are_drawn(samples: list[float], tmp_path: Path) -> None:
    own = {"details": {"samples": samples, "low": float("nan"), "high": -1.0}}
    assert html(results([row(variant="base", **own), row(**own)]), tmp_path).count('class="plot"') == 2


def test_ratios_far_away_fit_on_the_axis() -> None:
    assert len(ratios([row(ratio=r, model=f"m{r}") for r in (1e-4, 0.3, 1.0, 40.0, 1e5)]).panels) == 1


def test_a_drawing_has_its_own_ids_named_colours_and_escaped_text() -> None:
    def paint(axes: Any) -> None:
        axes.plot([1, 2], [3, 4], "o-", **report_svg.styled(color="series-1"))
        axes.set_xlabel(f"{HOSTILE}\x01")

    svg = report_svg.draw("plot-7", HOSTILE, 200, paint)
    assert svg == report_svg.draw("plot-7", HOSTILE, 200, paint)
    assert all(name.startswith("plot-7") for name in re.findall(r' id="([^"]*)"', svg))
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) <= {"none", *map("var(--{})".format, report_svg.COLOURS)}
    assert "<script>" not in svg
    assert "&lt;script&gt;" in svg.partition("<text")[2]
    assert not {"<style", "<metadata", "http", "\x01"} & set(re.findall(r"<style|<metadata|http|\x01", svg))


def test_every_colour_of_a_plot_is_defined_in_light_and_in_dark() -> None:
    light, dark = (PARTS / "style.css").read_text(encoding="utf-8").split("prefers-color-scheme: dark", 1)
    for name in report_svg.COLOURS:
        assert f"--{name}: #" in light
        assert f"--{name}: #" in dark
