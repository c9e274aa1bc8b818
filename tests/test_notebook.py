"""Runs in Python: the views as relations with the rows of the command line, charts that a notebook displays."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_store import SPEC, create_run, write

import clipctl
from clipctl.analysis import Options
from clipctl.analyze import analyze
from clipctl.errors import SpecError
from clipctl.notebook import OpenRuns


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[OpenRuns]:
    for name in ("a", "b"):
        writer = create_run(tmp_path / "runs", name, SPEC, "tiny")
        for rollout in range(3):
            write(writer, rollout)
        writer.close("finished", "")
    with clipctl.open_runs(tmp_path / "runs") as runs:
        yield runs


@pytest.mark.parametrize("view", ["overview", "entropy", "clip", "ledger", "what-if", "samples"])
def test_a_view_has_the_rows_of_the_command_line(runs: OpenRuns, view: str) -> None:
    printed = json.loads(analyze(list(runs.folders), None, "json", False, view=view).text)["rows"]
    relation = runs.view(view)
    assert relation.columns == list(printed[0])
    assert len(relation.df()) == len(printed) == relation.to_arrow_table().num_rows


def test_a_query_gives_pandas_and_arrow(runs: OpenRuns) -> None:
    query = "select run_id, sum(rollout)::int as s from rollouts group by 1 order by 1"
    assert runs.sql(query).df().to_dict("list") == {"run_id": ["a", "b"], "s": [3, 3]}
    assert runs.sql(query).to_arrow_table().to_pydict() == {"run_id": ["a", "b"], "s": [3, 3]}


@pytest.mark.parametrize("view", ["overview", "samples"])
def test_a_chart_displays_inline_without_a_network(runs: OpenRuns, view: str, tmp_path: Path) -> None:
    chart = runs.chart(view)
    page = chart._repr_mimebundle_(None, None)["text/html"]
    assert "vega-embed" in page
    assert not re.search(r"<script[^>]*src=|<link |cdn\.jsdelivr", page)
    chart.save(tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_unknown_views_and_options_of_others_are_refused(runs: OpenRuns) -> None:
    with pytest.raises(SpecError, match="'entropi' is not one of overview, entropy"):
        runs.view("entropi")
    with pytest.raises(SpecError, match="--grid: belongs to --view what-if"):
        runs.chart("entropy", Options(grid=("clip.low=0.1",)))


def test_a_finished_run_keeps_its_histograms_in_one_file(runs: OpenRuns) -> None:
    for folder in runs.folders:
        assert not list((folder / "journal").glob("histograms-*"))
    assert runs.sql("select run_id, count(*) from histograms group by 1 order by 1").fetchall() == [("a", 6), ("b", 6)]
