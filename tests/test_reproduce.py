"""A preset is run again by one command, and its folder shows what was done; many folders make one table."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from inflora.backbone import build_backbone
from inflora.cli import app
from inflora.collection import TABLE, checked_reproduction, collect, overview
from inflora.config import ConfigError, load_config, override
from inflora.continual import run
from inflora.metrics import spread
from inflora.presets import PRESETS, Published, expected_range
from inflora.reproduce import reproduce
from inflora.reproduction import PAGE, SUMMARY, page, plan, read_reproduction

DOCS = Path(__file__).parents[1] / "docs" / "results"
SMALL = {
    "backbone.pretrained": False,
    "backbone.options": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "optim.batch_size": 64,
    "device": "cpu",
}
"""With these the tiny preset takes a second."""


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def done(tmp_path_factory, data_root) -> Path:
    """The folder of a reproduction with two seeds; read it, do not write to it."""
    out = tmp_path_factory.mktemp("reproduced") / "tiny"
    reproduce("digits-5-tiny", {**SMALL, "data.root": str(data_root)}, [0, 1], out, say=quiet)
    return out


def small_files(folder: Path) -> dict[str, str]:
    """What is sent of a reproduction: all but the runs."""
    return {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}


@pytest.mark.e2e
def test_the_command_leaves_one_folder_whose_small_part_says_all(tmp_path):
    command = [sys.executable, "-c", "from inflora.cli import app; app()", "reproduce", "digits-5-tiny", "--seeds", "0"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    folder = tmp_path / "runs" / "reproduce" / "digits-5-tiny"
    assert f"page: {folder.relative_to(tmp_path) / PAGE}" in ended.stdout
    sent = small_files(folder)
    assert sent.keys() == {PAGE, SUMMARY, "config.yaml", "log.txt"}
    assert sum(map(len, sent.values())) < 100_000
    assert load_config(folder / "config.yaml") == PRESETS["digits-5-tiny"].config
    assert sent["log.txt"].count(" task ") == 5
    found = read_reproduction(folder)
    own = json.loads((folder / "runs" / "seed-0" / "result.json").read_text())
    assert found.runs[0].accuracy_matrix == own["accuracy_matrix"]
    assert found.runs[0].identity.items() >= own["identity"].items()
    assert f"| here, seeds 0 | {100 * own['metrics']['acc/final']:.2f} |" in sent[PAGE]


def test_each_seed_is_the_run_that_its_config_describes(done):
    found = read_reproduction(done)
    for each in found.runs:
        config = found.config.model_copy(update={"seed": each.seed})
        assert each.accuracy_matrix == [result.accuracies for result in run(config, evaluate_on="test")]
    assert found.runs[0].accuracy_matrix != found.runs[1].accuracy_matrix


def test_the_page_has_every_hash_and_the_mean_and_spread_over_seeds(done):
    found, text = read_reproduction(done), (done / PAGE).read_text()
    for name in ("dataset_hash", "split_hash", "backbone_hash", "torch", "timm", "config_hash"):
        assert all(each.identity[name] in text for each in found.runs)
    mean, std = spread(found.percent("acc/final"))
    assert f"| here, seeds 0, 1 | {mean:.2f} ± {std:.2f} |" in text
    assert text == page(found)


def test_where_the_data_lie_is_told_nobody(done, data_root):
    assert [name for name, text in small_files(done).items() if str(data_root) in text] == []


def test_of_weights_of_ones_own_it_is_told_that_they_are_and_not_where_they_lie(tmp_path):
    config = override(PRESETS["digits-5-tiny"].config, SMALL)
    weights = tmp_path / "a|b.safetensors"
    save_file(build_backbone(config.backbone).state_dict(), weights)
    out = tmp_path / "out"
    found = reproduce("digits-5-tiny", {**SMALL, "backbone.weights": str(weights)}, [0], out, say=quiet)
    assert found.incomparable == "the backbone's weights are a file of one's own"
    assert [name for name, text in small_files(out).items() if str(tmp_path) in text] == []


def test_a_reproduction_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(done, tmp_path):
    told: list[str] = []

    def stop_after_seven_tasks(line: str) -> None:
        told.append(line)
        if len([each for each in told if " task " in each]) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce("digits-5-tiny", SMALL, [0, 1], tmp_path, say=stop_after_seven_tasks)
    again = reproduce("digits-5-tiny", SMALL, [0, 1], tmp_path, say=told.append)
    tasks = [line.partition(":")[0] for line in told if " task " in line]
    assert tasks == [f"seed {seed} task {task}/5" for seed in (0, 1) for task in range(1, 6)]
    assert [each.accuracy_matrix for each in again.runs] == [
        each.accuracy_matrix for each in read_reproduction(done).runs
    ]


def test_seeds_that_are_asked_for_later_join_those_that_are_done(done, tmp_path):
    first = reproduce("digits-5-tiny", SMALL, [1], tmp_path, say=quiet)
    (tmp_path / "runs" / "seed-1" / "result.json").unlink()  # its model is not needed to go on
    both = reproduce("digits-5-tiny", SMALL, [0, 1], tmp_path, say=quiet)
    assert [each.seed for each in both.runs] == [0, 1]
    assert both.runs[1] == first.runs[0]


def test_a_page_that_a_stop_has_left_out_is_written_by_the_same_command(done, tmp_path):
    for name, text in small_files(done).items():
        (tmp_path / name).write_text(text)
    (tmp_path / PAGE).unlink()
    reproduce("digits-5-tiny", SMALL, [0, 1], tmp_path, say=quiet)
    after = small_files(tmp_path)
    assert {name: after[name] for name in (PAGE, SUMMARY)} == {
        name: small_files(done)[name] for name in (PAGE, SUMMARY)
    }


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.output
    return result.stderr


def test_a_folder_of_other_settings_is_left_as_it_is(done):
    before = small_files(done)
    said = refused("reproduce", "digits-5-tiny", "--out", done)
    assert "holds digits-5-tiny with other settings; choose another folder with --out" in said
    assert small_files(done) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "unknown preset 'nothing'; known: cifar100-10"),
        (["digits-5-tiny", "seed=3"], "seeds are given by --seeds, got seed=3"),
        (["digits-5-tiny", "--seeds", "0,0"], "--seeds must be different whole numbers"),
        (["digits-5-tiny", "adapter.rank=none"], "adapter.rank"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(arguments, said, tmp_path):
    assert said in refused("reproduce", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dataset_that_is_not_there_is_one_line_with_the_command_that_prepares_it(tmp_path):
    said = refused("reproduce", "imagenet-r-10", f"data.root={tmp_path}", "--out", tmp_path / "out")
    assert f"inflora data prepare imagenet_r --source PATH --root {tmp_path}" in said
    assert not (tmp_path / "out").exists()


# Beside what is published.


def test_the_mean_of_more_seeds_is_expected_nearer_to_the_published_one():
    published = Published(80.0, 85.0, "a paper", spread=1.0, seeds=4)
    assert expected_range(published, 4) == pytest.approx((80 - math.sqrt(2), 80 + math.sqrt(2)))
    assert expected_range(published, 1) == pytest.approx((80 - math.sqrt(5), 80 + math.sqrt(5)))
    assert expected_range(published._replace(seeds=None), 4) == expected_range(published._replace(seeds=1), 4)
    assert expected_range(published._replace(spread=None), 4) is None


def held_against(done: Path, *published: Published) -> str:
    found = read_reproduction(done)
    return page(found.model_copy(update={"incomparable": None, "published": published}))


@pytest.mark.parametrize(("away", "said"), [(0.0, "within"), (2.3, "below"), (-2.3, "above")])
def test_a_result_lies_within_below_or_above_what_is_expected(done, away, said):
    """Of two seeds against two the bound is two standard deviations."""
    final = spread(read_reproduction(done).percent("acc/final")).mean
    text = held_against(done, Published(final + away, 90.0, "a paper", spread=1.0, seeds=2))
    (row,) = (line for line in text.splitlines() if line.startswith("| a paper, 2 seeds |"))
    assert row.endswith(f"| {final + away - 2:.2f} to {final + away + 2:.2f} | {said} |")


def test_without_a_published_spread_the_difference_is_told_and_nothing_else(done):
    final = spread(read_reproduction(done).percent("acc/final")).mean
    text = held_against(done, Published(final - 1, 90.0, "a paper"))
    assert f"| a paper | {final - 1:.2f} | 90.00 | no spread is published | +1.00 |" in text
    assert "standard errors" not in text


def test_changed_settings_are_told_and_not_held_against_published_numbers(done):
    found = read_reproduction(done)
    text = page(found.model_copy(update={"published": (Published(90.0, 95.0, "a paper"),)}))
    assert "Not held against published numbers: other settings than the seed differ" in text
    assert "a paper" not in text
    assert "inflora reproduce digits-5-tiny backbone.pretrained=false" in text


def test_where_seeds_do_not_share_what_they_depend_on_both_are_told(done):
    found = read_reproduction(done)
    other = found.runs[1].model_copy(update={"identity": found.runs[1].identity | {"torch": "9.9"}})
    assert f"| torch | {found.runs[0].identity['torch']}; 9.9 |" in page(
        found.model_copy(update={"runs": [found.runs[0], other]})
    )


# Many of them.


def test_what_is_collected_is_numbers_and_its_page_is_written_from_them(done, tmp_path):
    sent = tmp_path / "sent"
    sent.mkdir()
    (sent / SUMMARY).write_bytes((done / SUMMARY).read_bytes())
    (sent / PAGE).write_text("100 %, believe me")
    (tmp_path / "all" / "cifar100-10").mkdir(parents=True)
    (tmp_path / "all" / "cifar100-10" / PAGE).write_text("planned")
    table = collect(tmp_path / "all", [sent])
    kept = tmp_path / "all" / "digits-5-tiny"
    assert {file.name for file in kept.iterdir()} == {SUMMARY, PAGE}
    assert (kept / PAGE).read_text() == (done / PAGE).read_text()
    assert (tmp_path / "all" / "cifar100-10" / PAGE).read_text() == plan("cifar100-10")
    assert (tmp_path / "all" / TABLE).read_text() == table == overview(tmp_path / "all")
    final, average = (spread(read_reproduction(done).percent(name)) for name in ("acc/final", "acc/avg_incremental"))
    shown = f"{final.mean:.2f} ± {final.std:.2f} | {average.mean:.2f} ± {average.std:.2f}"
    assert f"| [digits-5-tiny](digits-5-tiny/{PAGE}) | 2 | {shown} |" in table
    assert (
        f"| [cifar100-10](cifar100-10/{PAGE}) |  | not run yet |  | 86.33 ± 0.81, the authors' released logs |" in table
    )


def test_a_second_senders_runs_take_nobodys_place_and_more_seeds_of_the_first_join_them(done, tmp_path):
    whole = json.loads((done / SUMMARY).read_text())
    first = whole["runs"][0]
    other = first | {"identity": first["identity"] | {"machine": "another"}}
    for name, runs in {"first": [first], "second": [other], "whole": whole["runs"]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / SUMMARY).write_text(json.dumps(whole | {"runs": runs}))
    kept = tmp_path / "all" / "digits-5-tiny" / SUMMARY
    assert refused("collect", tmp_path / "all", tmp_path / "first", tmp_path / "second") and not kept.exists()
    collect(tmp_path / "all", [tmp_path / "first"])
    before = kept.read_bytes()
    said = refused("collect", tmp_path / "all", tmp_path / "second")
    assert "runs of digits-5-tiny that are there already, of seeds [0]" in said and kept.read_bytes() == before
    collect(tmp_path / "all", [tmp_path / "whole"])
    assert [run.seed for run in read_reproduction(kept.parent).runs] == [0, 1]


@pytest.mark.parametrize("preset", ["digits-5-ranpac", "woven-8-lda"])
def test_edited_settings_are_not_collected(preset, tmp_path):
    said = json.loads((DOCS / preset / SUMMARY).read_text())
    said["config"]["optim"]["lr"] *= 2
    (tmp_path / SUMMARY).write_text(json.dumps(said))
    assert f"seed 0 is said to be {preset}, and its settings are others" in refused(
        "collect", tmp_path / "all", tmp_path
    )


@pytest.mark.parametrize("text", ["", "{}", '{"preset": "digits-5-tiny"}', "[" * 10_000])
def test_what_is_no_reproduction_is_not_collected(text, tmp_path):
    (tmp_path / SUMMARY).write_text(text)
    assert "is of another version or damaged" in refused("collect", tmp_path / "all", tmp_path)
    with pytest.raises(ConfigError, match=r"no reproduction in .*: summary.json"):
        collect(tmp_path / "all", [tmp_path / "nowhere"])
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda said: said | {"preset": "../elsewhere"}, "unknown preset"),
        (lambda said: said | {"incomparable": None}, "seed 0 is said to be digits-5-tiny, and its settings are others"),
        (lambda said: said | {"incomparable": "because |\n# of this"}, "damaged: incomparable"),
        (lambda said: said | {"runs": said["runs"] + said["runs"]}, "a seed stands there twice"),
        (lambda said: said | {"runs": [said["runs"][0] | {"metrics": {}}]}, "metrics must have acc/avg_incremental"),
    ],
)
def test_what_is_not_what_it_says_is_not_collected(change, said, done, tmp_path):
    sent = tmp_path / "sent"
    sent.mkdir()
    (sent / SUMMARY).write_text(json.dumps(change(json.loads((done / SUMMARY).read_text()))))
    assert said in refused("collect", tmp_path / "all", sent)
    assert not (tmp_path / "all").exists()


def test_a_plan_has_the_command_the_expected_range_and_no_result(capsys):
    text = plan("cifar100-10")
    assert "inflora data prepare cifar100 --source PATH" in text
    assert "inflora reproduce cifar100-10 --seeds 0,1,2" in text
    assert "| here | **not run yet** |  |  |  |" in text
    # 0.81 over five seeds, three to come: 2 * 0.81 * sqrt(1/3 + 1/5) = 1.183
    assert "| the authors' released logs, 5 seeds | 86.33 ± 0.81 | 91.18 | 85.15 to 87.51 |  |" in text
    assert CliRunner().invoke(app, ["reproduce", "cifar100-10", "--plan"]).stdout == text


@pytest.mark.parametrize("folder", sorted(file.parent.name for file in DOCS.glob(f"*/{PAGE}")))
def test_every_page_in_docs_results_is_that_of_its_numbers_or_says_that_it_was_not_run(folder):
    kept = DOCS / folder
    expected = page(read_reproduction(kept)) if (kept / SUMMARY).exists() else plan(folder)
    assert (kept / PAGE).read_text() == expected, "inflora collect docs/results writes it anew"


def test_the_table_in_docs_results_is_that_of_its_folders():
    assert (DOCS / TABLE).read_text() == overview(DOCS), "inflora collect docs/results writes it anew"
    assert {folder.name for folder in DOCS.iterdir() if folder.is_dir()} <= PRESETS.keys()


@pytest.mark.parametrize("preset", ["digits-5-ranpac", "strokes-10-ranpac", "woven-8-lda"])
def test_what_was_run_here_is_what_the_preset_describes(preset):
    found = read_reproduction(DOCS / preset)
    assert (found.config, found.changes, found.incomparable) == (PRESETS[preset].config, {}, None)
    assert checked_reproduction(DOCS / preset) == found
    assert [each.seed for each in found.runs] == [0, 1, 2]
