"""Settings found on one dataset are put into another's config, and judged there beside its own."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inflora.config import ConfigError, LoRASettings, dump_config, override
from inflora.data import prepare_store
from inflora.data.generated import cloth, generated, weaves
from inflora.data.source import Options
from inflora.metrics import spread
from inflora.presets import PRESETS
from inflora.runs import train_into
from sweeps.cli import app
from sweeps.engine.after.export import export_config, find_best, read_trials
from sweeps.engine.after.final import plan
from sweeps.engine.after.judge import compare
from sweeps.engine.after.transfer import (
    FOUND_THERE,
    THERE,
    Found,
    Transfer,
    config_on,
    found_by_sweep,
    found_in_config,
    transfer,
)
from sweeps.engine.after.transferred import Judged, judge_transfer, lines_of, values_of, write_transfer
from sweeps.engine.ledger.ledger import Ledger
from sweeps.engine.ledger.reading import read_kept
from sweeps.engine.space.spec import SPEC_FILE

from .conftest import learn_all


@pytest.fixture
def swept(tiny_sweep, tmp_path) -> Path:
    """The folder of a sweep on digits with three finished trials."""
    sweep = tiny_sweep.model_copy(update={"early_stopping": "none"})
    folder = tmp_path / "results" / "tiny"
    folder.mkdir(parents=True)
    (folder / SPEC_FILE).write_text(sweep.model_dump_json())
    ledger = Ledger(sweep, folder)
    for accuracy in (0.7, 0.9, 0.8):
        learn_all(ledger, ledger.propose().number, [accuracy] * 5)
    return folder


@pytest.fixture
def there(tiny_sweep, data_root):
    """A run on a small stream of generated cloth: three tasks of two classes."""
    if not (data_root / "cloth").exists():
        prepare_store("cloth", generated(6, 12, 8, weaves, cloth), Path(), Options(), str(data_root))
    changes = {"data.dataset": "cloth", "data.tasks": 3, "data.train_on": "train+validation", "adapter.rank": 2}
    return override(tiny_sweep.base, changes)


def differing(a, b) -> dict[str, object]:
    """Dotted settings of ``b`` that differ from ``a``'s, where they come from left out."""

    def flat(settings, prefix=""):
        for name, value in settings.items():
            yield from flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]

    left, right = (dict(flat(each.model_dump(exclude={"provenance"}))) for each in (a, b))
    return {name: value for name, value in right.items() if left.get(name) != value}


def test_what_the_search_has_found_is_all_that_differs_from_the_other_dataset_s_own_config(swept, there):
    found = found_by_sweep(str(swept))
    planned = transfer(found, "cloth", there)
    assert list(planned.configs) == [THERE, "from-tiny"]
    assert planned.configs[THERE] == there
    assert differing(there, planned.configs["from-tiny"]) == dict(found.settings)
    assert planned.configs["from-tiny"].provenance["sweep"] == "tiny"


def exported(folder: Path, file: Path) -> Path:
    """The best trial of a sweep, as ``sweeps export`` writes it."""
    sweep, study, _ = read_kept(str(folder))
    records, known = read_trials(sweep, study)
    file.write_text(dump_config(export_config(sweep, find_best(sweep, records, known), records, known, None)))
    return file


def test_an_exported_config_is_as_good_as_the_sweep(swept, tmp_path):
    found, in_file = found_by_sweep(str(swept)), found_in_config(exported(swept, tmp_path / "best.yaml"))
    assert (in_file.name, in_file.settings) == (found.name, found.settings)


def test_a_config_that_no_sweep_has_written_names_no_searched_settings(there, tmp_path):
    (tmp_path / "own.yaml").write_text(dump_config(there))
    with pytest.raises(ConfigError, match=r"own\.yaml does not say which settings were searched"):
        found_in_config(tmp_path / "own.yaml")


def test_searched_settings_that_do_not_apply_there_are_refused_in_one_line(swept, there):
    lora = there.model_copy(update={"adapter": LoRASettings()})
    with pytest.raises(ConfigError, match=r"settings of tiny do not apply to cloth: .*adapter\.energy") as refused:
        transfer(found_by_sweep(str(swept)), "cloth", lora)
    assert "\n" not in str(refused.value)


def test_a_search_beside_must_be_one_on_that_dataset(swept, there):
    found = found_by_sweep(str(swept))
    with pytest.raises(ConfigError, match=r"--beside must be a search on cloth, .* got tiny on digits"):
        transfer(found, "cloth", there, beside=found)


RECIPE = """
from sweeps.recipe import Integer, Sweep
from sweeps.digits import base

one = Sweep(name="one", base=base, space={"adapter.rank": Integer(low=1, high=9)}, first=({"adapter.rank": 7},))
two = Sweep(name="two", base=base, space={"adapter.rank": Integer(low=1, high=9)})
"""


def test_the_other_dataset_is_a_preset_a_recipe_or_a_config(there, tmp_path):
    assert config_on("woven-8-lda") == ("woven-8-lda", PRESETS["woven-8-lda"].config)
    (tmp_path / "recipe.py").write_text(RECIPE)
    (tmp_path / "own.yaml").write_text(dump_config(override(there, {"data.train_on": "train"})))
    first, second = config_on(f"{tmp_path}/recipe.py"), config_on(f"{tmp_path}/recipe.py:two")
    assert (first[0], first[1].adapter.rank, second[0], second[1].adapter.rank) == ("one", 7, "two", 10)
    assert config_on(f"{tmp_path}/own.yaml") == ("own", there), "final training learns from all training images"
    assert {config.data.train_on for _, config in (first, second)} == {"train+validation"}


@pytest.mark.parametrize(
    ("on", "said"),
    [
        ("imagenet", r"--on must be a recipe .* or a preset, got 'imagenet'; presets: cifar100-10, "),
        ("nowhere.yaml", "cannot read the config nowhere.yaml"),
        ("nowhere.py", "cannot read the recipe nowhere.py: FileNotFoundError"),
        ("sweeps/digits.py:nothing", "no sweep nothing in sweeps/digits.py; it has: digits, digits-published"),
        ("sweeps/cli.py", "no sweep at all in sweeps/cli.py; it has: none"),
    ],
)
def test_what_is_none_of_them_is_refused_in_one_line(on, said, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(ConfigError, match=said):
        config_on(on)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["best.yaml", "--beside", "digits"], "--beside goes with --on"),
        (["a.yaml", "b.yaml", "--on", "woven-8-lda"], "--on takes one sweep or one exported config, got 2"),
        (["nothing", "--on", "woven-8-lda"], "no sweep in "),
    ],
)
def test_the_command_refuses_in_one_line_before_anything_is_started(arguments, said, tmp_path):
    result = CliRunner().invoke(app, ["final", *arguments, "--storage", str(tmp_path)])
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert said in result.stderr


# What became of them.


def test_all_are_trained_over_the_same_seeds_and_compared_seed_by_seed(swept, there, tmp_path):
    """From digits to generated cloth, trained and tested for real."""
    beside = Found("cloth-sweep", {"adapter.rank": 3, "optim.lr": 0.01}, there)
    planned = transfer(found_by_sweep(str(swept)), "cloth", there, beside)
    runs = plan(planned.configs, [0, 1], tmp_path / "runs")
    finals: dict[str, list[float]] = {}
    for run in runs:
        state = train_into(run.folder, run.config, run.evaluate_on)
        assert state.evaluate_on == "test"
        finals.setdefault(run.label, []).append(state.metrics(state.tasks)["acc/final"])
    judged = judge_transfer(planned, values_of(runs))
    assert judged.values == finals
    assert judged.against == {
        (ours, theirs): compare(finals[ours], finals[theirs])
        for ours, theirs in (("from-tiny", THERE), (FOUND_THERE, THERE), ("from-tiny", FOUND_THERE))
    }
    text = write_transfer(planned, judged, tmp_path)
    assert (tmp_path / "transfer.md").read_text() == text
    assert "Found on digits in 5 tasks, judged on cloth in 3: other numbers of tasks" in text
    mean, std = spread([100 * value for value in finals["from-tiny"]])
    assert f"| found on tiny | {mean:.1f} ± {std:.1f} |" in text
    facts = json.loads((tmp_path / "transfer.json").read_text())
    assert facts["final"] == finals and facts["found_there_by"] == "cloth-sweep"


OWN, GOOD = [0.50, 0.52, 0.51], [0.70, 0.72, 0.715]


def judged(transferred: list[float], found_there: list[float] | None) -> tuple[Transfer, Judged]:
    found = Found("a", {}, PRESETS["digits-5-tiny"].config)
    beside = found._replace(name="b") if found_there else None
    planned = transfer(found, "digits", found.config, beside)
    values = {THERE: OWN, "from-a": transferred} | ({FOUND_THERE: found_there} if found_there else {})
    return planned, judge_transfer(planned, values)


def test_the_share_of_the_gain_that_transfers_is_told():
    half = [(own + good) / 2 for own, good in zip(OWN, GOOD, strict=True)]
    planned, found = judged(half, GOOD)
    assert found.share == pytest.approx(0.5)
    assert "Of the gain of the settings found there, +20.2 points, 50% transfers." in lines_of(planned, found)
    little = [0.52, 0.51, 0.53]
    assert lines_of(*judged(little, GOOD))[-1].endswith("5% transfers, within seed noise of nothing.")
    worse = [own - 0.1 for own in OWN]
    assert judged(worse, GOOD)[1].share == pytest.approx(-0.1 / 0.2017, rel=1e-3), "less than nothing"


def test_where_nothing_is_gained_there_or_nobody_searched_there_is_no_share():
    planned, found = judged(GOOD, [0.49, 0.55, 0.50])
    assert found.share is None
    assert "there is no gain to share" in lines_of(planned, found)[-1]
    planned, found = judged(GOOD, None)
    assert found.share is None
    assert "(--beside SWEEP)" in lines_of(planned, found)[-1]
