"""benchmarks/tables.py: recorded learning curves, and searches replayed on them, measure what they say."""

import sys
from pathlib import Path

import numpy as np
import pytest

from inflora.config import RunConfig, override
from inflora.continual import run
from inflora.data.stream import make_stream

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import table_file  # noqa: E402
from table_planted import agreement, planted  # noqa: E402
from table_replay import ARMS, Job, Point, drawn, portfolio, recording, replay, replayed  # noqa: E402
from table_report import ratio, regrets, tasks_needed  # noqa: E402
from table_streams import CHOOSING, PAPER, PROVING, SPACE, STREAMS  # noqa: E402

from sweeps.engine.space import domains  # noqa: E402

RECORDED = sorted((BENCHMARKS / "tables").glob("*.parquet"))
SHORT = (4, 8, 12)


@pytest.fixture(scope="module")
def known():
    table, _ = planted(0)
    return recording(table)


def test_a_recorded_training_is_a_run(tmp_path):
    """What is right after each task is what ``run`` counts, on validation and on test images."""
    name = "digits-5-ranpac"
    _, base = table_file.located(name, tmp_path)
    base = override(base, {"optim.epochs": 1})
    told = table_file.trained(base, PAPER, 1)
    config = override(base, {**PAPER, "seed": 1})
    for split, curve in (("validation", told.validation), ("test", told.test)):
        expected = [result.metrics["acc/seen"] for result in run(config, evaluate_on=split)]
        assert [bits.mean() for bits in curve] == pytest.approx(expected)
        sizes = np.cumsum([len(task.eval_rows) for task in make_stream(config.data, split).tasks])
        assert [len(bits) for bits in curve] == sizes.tolist()


def test_a_table_reads_back_what_was_written(tmp_path):
    name = "digits-5-ranpac"
    facts = table_file.facts_of(name, tmp_path)
    random = np.random.default_rng(0)
    told = {
        (setting, seed): {
            split: tuple(random.random(sum(facts["images"][split][: task + 1])) < 0.5 for task in range(5))
            for split in table_file.SPLITS
        }
        for setting in range(3)
        for seed in range(2)
    }
    rows = [
        table_file.as_row(setting, seed, table_file.Answers(*each.values()), 1.0)
        for (setting, seed), each in told.items()
    ]
    rows.append(table_file.as_row(3, 0, None, 1.0))
    table_file.write_table(rows, facts, tmp_path / "t.parquet")
    table = table_file.read_table(tmp_path / "t.parquet")
    assert table.facts == facts
    assert table.right["test"][3, 0] is None
    for key, each in told.items():
        for split, curve in each.items():
            for wanted, found in zip(curve, table.right[split][key], strict=True):
                assert (wanted == found).all()


def test_six_streams_are_for_choosing_and_six_others_for_proving():
    assert len(CHOOSING) == len(PROVING) == 6 and not set(CHOOSING) & set(PROVING)
    for half in (CHOOSING, PROVING):
        assert len({name.split("-")[0] for name in half}) == 4, "families of images"
        assert {each.base.classifier.name for each in half.values()} >= {"linear", "lda"}
    runs = {each.base.model_dump_json() for each in STREAMS.values()}
    assert len(runs) == 12


def test_settings_are_spread_and_the_papers_is_last():
    settings = table_file.settings_of(SPACE)
    assert settings == table_file.settings_of(SPACE) and len(settings) == 97 and settings[-1] == PAPER
    assert all(domains.contains(SPACE, each) for each in settings)
    for path, domain in SPACE.items():
        shares = sorted(domain.share_of(each[path]) for each in settings[:-1])
        assert np.abs(np.array(shares) - (np.arange(96) + 0.5) / 96).max() < 0.09, path


def test_ways_to_search_draw_the_same_chances(known):
    one, same, other = drawn(known, 3), drawn(known, 3), drawn(known, 4)
    assert (one.score_ST == same.score_ST).all() and (one.score_ST != other.score_ST).any()


def test_drawn_scores_are_around_the_truth_and_the_less_scattered_the_more_images(known):
    few, many = ([drawn(known, number, images).score_ST[:, -1] for number in range(40)] for images in (100, 10_000))
    means = known.right_TSKI[-1].mean((1, 2))
    assert np.abs(np.mean(many, 0) - means).max() < 0.02
    assert np.std(few, 0).mean() > 1.5 * np.std(many, 0).mean()


@pytest.mark.parametrize("name", ["random", "gp", "tpe + asha", "gp + forecasts"])
def test_a_replay_is_a_function_of_its_number_and_spends_no_more_than_its_budget(known, name):
    budgets = [trials * known.tasks for trials in SHORT]
    points, again = (replay(known, ARMS[name], drawn(known, 5), budgets) for _ in range(2))
    assert points == again
    assert [point.tasks for point in points] == budgets
    assert all(point.regret >= 0 for point in points)


def test_a_budget_that_cuts_a_trial_off_gets_nothing_for_it(known):
    whole, cut = (
        replay(known, ARMS["random"], drawn(known, 0), [budget])[0] for budget in (4 * known.tasks, 5 * known.tasks - 1)
    )
    assert whole[1:] == cut[1:]


def test_planted_truth_is_found():
    """The order of searches by the smoothed truth of a table is that by the planted one."""
    arms = {name: ARMS[name] for name in ("random", "gp")}
    found = agreement(arms, surfaces=3, replays=6)
    for kind in ("planted", "smoothed"):
        random, gp = found[kind][0]
        assert gp < random, kind
    assert found["smoothed"][1] == 1


def test_a_portfolio_is_what_is_best_elsewhere(known):
    places = portfolio([known, known], 3)
    assert places[0] == known.truth_S.argmax() and len(places) == 3


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_recorded_tables_are_of_their_streams(file):
    table = table_file.read_table(file)
    assert RunConfig.model_validate(table.facts["base"]) == STREAMS[file.stem].base
    assert table.settings == table_file.settings_of(SPACE) and len(table.seeds) == 3
    assert len(table.right["test"]) == 97 * 3
    assert file.stat().st_size < 800_000


def test_on_a_recorded_stream_the_default_leaves_less_regret_than_random_search():
    """A small part of what ``judge`` shows, on a table that was chosen on: the direction of the ratio."""
    file = BENCHMARKS / "tables" / "digits-5-linear.parquet"
    ours, random = (
        regrets((16,), [replayed(Job(file, ARMS[name], number, (16,))) for number in range(12)])
        for name in ("gp", "random")
    )
    each = ratio([ours.at(16)], [random.at(16)])
    assert each.middle < 0.8 and each.high < 1


def test_a_ratio_has_an_interval_that_holds_it_and_pairs_what_was_drawn_together():
    random = np.random.default_rng(0)
    chances = random.random(200)
    ours, theirs = chances + 0.1 * random.random(200), 2 * chances
    paired = ratio([ours], [theirs])
    apart = ratio([ours], [random.permutation(theirs)])
    assert paired.low < paired.middle < paired.high
    assert paired.high - paired.low < apart.high - apart.low


def test_the_tasks_that_random_search_needs_are_read_off_its_curve():
    curve = regrets((4, 8, 12), [[Point(0, value, None, 0.5) for value in (0.03, 0.02, 0.01)]] * 3)
    assert tasks_needed(curve, 1.5, tasks=5) == pytest.approx(50)
    assert tasks_needed(curve, 0.5, tasks=5) == float("inf")
