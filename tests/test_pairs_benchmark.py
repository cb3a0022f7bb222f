"""The table of pairs (benchmarks/pairs.py): one training shows what runs with every classifier do; its report too."""

import sys
from pathlib import Path

import pytest

from inflora.config import override
from inflora.continual import run
from tests.conftest import pair_of

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from frozen_features import FrozenFeatures
from one_training import shown_by
from pairs import CLASSIFIERS, DRIFTS, VIEWS, settings_of, settings_tried, variants
from pairs_report import ADAPTERS, Pair, Tuned, paired, ranked, read_figures, report, write_figures, write_section

METRICS = ("acc/final", "acc/avg_incremental", "forgetting", "bwt", "acc/task_aware", "acc/task_identity")
FITTED = {
    "linear": {"name": "linear"},
    "aligned": {"name": "aligned", "steps": 20, "temperature": 0.1, "drift": 0.1},
    "ncm": {"name": "ncm", "drift": 0.1},
    "lda": {"name": "lda", "drift": None},
    "lda drift": {"name": "lda", "drift": 0.1},
    "lda views": {"name": "lda", "drift": 0.1, "views": 2},
    "qda": {"name": "qda", "drift": 0.1},
    "ranpac": {"name": "ranpac", "features": 40, "drift": 0.1},
}


@pytest.mark.parametrize("changes", [{}, {"adapter.features": "both"}, {"adapter.adapt_tasks": 2}, {"adapter": "none"}])
def test_one_training_shows_what_a_run_with_each_classifier_does(changes, tiny, digits):
    config = override(tiny, pair_of("inflora") | changes | {"optim.lr": 0.02})
    shown = shown_by(config, "validation", FITTED)
    for label, settings in FITTED.items():
        *_, last = run(override(config, {"classifier": settings}))
        assert {m: shown[label][m] for m in METRICS} == {m: last.metrics[m] for m in METRICS}, label
    assert shown[""]["seconds"] > 0 and shown["lda views"]["seconds"] > shown["lda"]["seconds"] > 0


@pytest.mark.parametrize(
    ("adapter", "features", "parts"),
    [
        ("lora", "both", {"beside"}),
        ("none", None, {"alone"}),
        ("codaprompt", "adapted", {"prompted"}),
        ("l2p", "both", {"beside", "prompted"}),
    ],
)
def test_what_frozen_features_are_remembered_changes_no_number(adapter, features, parts, tiny, digits, tmp_path):
    config = override(tiny, pair_of(adapter) | ({"adapter.features": features} if features else {}))
    wanted = {label: FITTED[label] for label in ("linear", "lda drift", "lda views")}

    def accuracies(memory: FrozenFeatures | None) -> dict[str, list[float]]:
        shown = shown_by(config, "validation", wanted, memory)
        return {label: [shown[label][m] for m in METRICS] for label in wanted}

    plain, first, again = (FrozenFeatures(tmp_path / "features") if file else None for file in (False, True, True))
    assert accuracies(plain) == accuracies(first) == accuracies(again)
    assert {file.name for file in tmp_path.iterdir()} == {f"features-{part}.npz" for part in parts}
    assert first and again and again.spared > 1.5 * first.spared  # the first has spared the second look


def test_every_adapter_is_tried_as_often_and_alike_in_what_adapters_have_in_common():
    tried = {adapter: settings_tried(adapter) for adapter in ADAPTERS}
    assert len({len(several) for several in tried.values()}) == 1
    assert len({tuple(changes["optim.lr"] for changes in several) for several in tried.values()}) == 1
    for adapter in ("olora", "sdlora", "inflora"):
        for changes, lora in zip(tried[adapter], tried["lora"], strict=True):
            whole = {"adapter.merge": 1.0} if "adapter.balance" in changes else {}  # the balance takes its place
            assert {name: value for name, value in changes.items() if name in lora} == lora | whole
    assert {len(variants(name, DRIFTS, VIEWS)) for name in CLASSIFIERS if name != "linear"} == {4}


def test_a_label_says_all_settings():
    assert settings_of("lda shrinkage=None drift=0.1 views=8") == {
        "name": "lda",
        "shrinkage": None,
        "drift": 0.1,
        "views": 8,
    }
    assert all(settings_of(label)["name"] == name for name in CLASSIFIERS for label in variants(name, DRIFTS, VIEWS))


def tuned(*finals: float) -> Tuned:
    metrics = ("acc/avg_incremental", "forgetting", "acc/new_mean", "acc/task_aware", "share")
    return Tuned(
        {"optim.lr": 1e-3}, "lda drift=None", 0.9, [dict.fromkeys(metrics, 0.5) | {"acc/final": f} for f in finals]
    )


PAIRS = {
    Pair("none", "lda"): tuned(0.50, 0.52, 0.51),
    Pair("lora", "lda"): tuned(0.40, 0.53, 0.60),
    Pair("inflora", "lda"): tuned(0.60, 0.62, 0.62),
}


def test_a_difference_is_taken_test_by_test_with_an_interval_of_students_t():
    gap, half = paired(PAIRS[Pair("inflora", "lda")], PAIRS[Pair("none", "lda")])
    assert gap == pytest.approx(10.333, abs=1e-3)  # of 10, 10 and 11 points
    assert half == pytest.approx(4.303 * 0.57735 / 3**0.5, abs=1e-3)


def test_a_pair_is_marked_only_beyond_the_interval_and_the_best_comes_first():
    page = report({"digits": PAIRS})
    assert "| inflora | 61.3 ± 1.2 ▲ |" in page and "| lora | 51.0 ± 10.1 |" in page
    assert ranked(PAIRS)[0] == Pair("inflora", "lda")
    assert "| none | lda | 51.0 ± 1.0 | +10.3 ± 1.4 |" in page


def test_figures_come_back_as_they_were_kept(tmp_path):
    write_figures({"digits": PAIRS}, tmp_path / "figures.json")
    known = read_figures(tmp_path / "figures.json")
    assert known == {"digits": PAIRS} and report(known) == report({"digits": PAIRS})


def test_a_section_takes_the_place_of_the_old_one_and_leaves_the_others(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\nfirst\n\n## A\n\nold\n\n## B\n\nlast\n")
    write_section(page, "## A", "## A\n\nnew\n")
    assert page.read_text() == "# Page\n\nfirst\n\n## A\n\nnew\n\n## B\n\nlast\n"
    write_section(page, "## C", "## C\n\nthird\n")
    assert page.read_text().endswith("\n\nlast\n\n## C\n\nthird\n")


def test_the_page_of_results_says_what_the_figures_say():
    root = Path(__file__).parents[1]
    known = read_figures(root / "benchmarks" / "pairs.json")
    if known:
        assert report(known).strip() in (root / "docs" / "results.md").read_text()
