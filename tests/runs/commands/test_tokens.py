"""The tokens of training documents: their scores are those of the log, and how they are shown."""

import collections
import contextlib
import csv
import dataclasses
import io
import json
import re
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

from ghostjax.cli import main
from ghostjax.runs.data.load import load_task
from ghostjax.runs.data.task import Example
from ghostjax.runs.errors import StoppedError
from ghostjax.runs.report import heat
from ghostjax.runs.report.heat import LEVELS, About, Section, Shown, Window, make_page, print_texts
from ghostjax.runs.report.html import DARK, LIGHT
from ghostjax.runs.store.files import read_json, write_json
from ghostjax.runs.training.positions import Windows, check_sums, score_windows
from ghostjax.runs.training.trainer import Trainer
from tests.runs.checks import fails, files
from tests.runs.conftest import BATCH_SIZE, LENGTH
from tests.runs.made_up import write_run
from tests.runs.report.parsed import HOSTILE, Page
from tests.runs.report.test_colours import contrast

# optax.adamw raises a Python float to the power of an int32 count.
pytestmark = pytest.mark.usefixtures("standard_promotion")

STEP = 4  # a checkpoint that training went on from


@pytest.fixture(scope="module")
def path(micro_run, tmp_path_factory):
    """A copy, to be written to."""
    return shutil.copytree(micro_run.path, tmp_path_factory.mktemp("tokens") / "run")


def shown(path, capsys, *options):
    assert main(["tokens", str(path), *map(str, options)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def printed(path, *options):
    """What the command prints, for fixtures."""
    with contextlib.redirect_stdout(io.StringIO()) as out, jax.numpy_dtype_promotion("standard"):
        assert main(["tokens", str(path), *map(str, options)]) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def table(path):
    return list(csv.DictReader(io.StringIO(printed(path, "--csv", "--step", STEP))))


@pytest.mark.slow
def test_tokens_add_up_to_the_scores_of_the_log(micro_run):
    visits = [visit for visit in micro_run.scores.to_pylist() if visit["step"] == STEP]
    assert len(visits) == BATCH_SIZE
    ids = [visit["id"] for visit in visits]
    text = printed(micro_run.path, "--csv", "--step", STEP, "--id", *ids)
    sums, counts = collections.Counter(), collections.Counter()
    for row in csv.DictReader(io.StringIO(text)):
        window = row["set"], row["id"], int(row["start"])
        sums[window] += float(row["score"])
        counts[window] += 1
    for visit in visits:
        for name in micro_run.sets:
            window = name, visit["id"], visit["start"]
            assert counts[window] == LENGTH
            assert sums[window] == pytest.approx(visit[f"score_{name}"], rel=1e-4)


@pytest.mark.slow
def test_tokens_of_order_2_in_parts_add_up_to_the_scores_of_a_step(micro_config):
    config = dataclasses.replace(micro_config, order=2, microbatches=2, optimizer="sgd")
    task = load_task(config)
    trainer = Trainer(config, task)
    params = task.init_params(config.seed)
    kept = trainer.init_state(jax.tree.map(np.asarray, params))
    _, step = next(trainer.steps(trainer.init_state(params), 0))
    indices, starts = step.batch.indices, step.batch.starts
    found = score_windows(config, task, trainer.optimizer, kept, 0, indices[:3], starts[:3])
    scores, errors = step.record.scores["score"][:, :3], step.record.scores["error"][:, :3]
    largest = np.abs(scores).max()
    np.testing.assert_allclose(found.scores.sum(-1), scores, atol=1e-4 * largest)
    np.testing.assert_allclose(found.totals, scores, atol=1e-4 * largest)
    np.testing.assert_allclose(found.total_errors, errors, atol=1e-4 * largest)
    np.testing.assert_allclose(found.losses, step.record.scores["loss"][:3], rtol=1e-5)
    assert found.scores.shape == found.errors.shape == (2, 3, LENGTH)
    assert (found.errors >= 0).all()


def test_the_ends_of_the_ranking_are_shown_with_the_text_of_their_windows(micro_run, path, table):
    assert {row["set"] for row in table} == set(micro_run.sets)
    texts = collections.defaultdict(str)
    for row in table:
        texts[row["set"], row["id"], int(row["start"])] += row["text"]
        assert int(row["token"]) == int(row["start"]) + int(row["position"])
        assert float(row["error"]) >= 0
    seen = {(row["id"], row["start"]) for row in micro_run.scores.to_pylist()}
    for (_, name, start), text in texts.items():
        assert (name, start) in seen
        kind, number = name.split(":")
        whole = f"line {number} of the forum, " * (int(number) + 1)
        if kind == "wiki":
            whole = f"block {number} of the wiki"  # a line end is a blank in CSV
        assert text == whole[start : start + LENGTH]


def test_the_page_is_the_only_file_that_is_written(path, capsys):
    before = files(path)
    assert shown(path, capsys, "--set", "held", "--count", 1, "--step", STEP) == (
        f"{path / 'tokens.html'}\n"
    )
    after = files(path)
    assert after.pop("tokens.html")
    assert after == before
    page = Page((path / "tokens.html").read_text(encoding="utf-8"))
    assert [attrs["id"] for attrs in page.named("section") if "id" in attrs] == ["v1"]
    windows = [attrs for attrs in page.named("article") if attrs["class"] == "window"]
    assert 2 <= len(windows) <= 4
    assert page.text().count("the sum of 16 tokens") == len(windows)
    assert "scored as a row of step 4, with the model and optimizer of checkpoint 4" in page.text()


def test_json_is_that_of_the_last_checkpoint(path, capsys):
    rows = json.loads(shown(path, capsys, "--json", "--id", "wiki:1", "--windows", 1))
    assert len(rows) == 2 * LENGTH
    assert {row["id"] for row in rows} == {"wiki:1"}


def test_what_the_terminal_shows_without_colours(path, capsys):
    out = shown(path, capsys, "--print", "--id", "wiki:1", "--set", "other", "--windows", 1)
    assert "Validation set other" in out
    assert "\x1b" not in out
    assert re.search(r"wiki:1  [+-]\d\.\d\de-\d\d ± ", out)
    assert "ck 1↵\nof the wi" in out
    assert "largest: " in out
    assert "the step that would come next" in " ".join(out.split())


BAD = {
    "id": (["--id", "wiki:9"], "--id: no training document 'wiki:9' in"),
    "set": (["--set", "prose"], "no validation set 'prose' in the run: expected one of held, oth"),
    "step": (["--step", "5"], "--step: no checkpoint of step 5, expected one of 4, 6"),
    "count": (["--count", "0"], "--count must be at least 1, got 0"),
    "both": (["--count", "1", "--id", "wiki:0"], "--id and --count exclude each other"),
    "windows": (["--windows", "0"], "--windows must be at least 1, got 0"),
    "formats": (["--csv", "--json"], "--csv and --json exclude each other"),
    "print": (["--print", "--json"], "--print and --json exclude each other"),
    "odd": (["--val-batch-size", "3"], "--val-batch-size must be even, got 3"),
    "many": (["--val-batch-size", "4"], "--val-batch-size 4 is more than the 3 examples of the"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_options_that_cannot_be_used(path, capsys, options, message):
    assert message in fails(["tokens", path, *options], capsys)


def test_runs_that_cannot_be_used(micro_run, path, tmp_path, capsys):
    images = write_run(tmp_path / "images", task="arrays")
    assert "is no run on texts: its examples have no tokens" in fails(["tokens", images], capsys)
    bare = shutil.copytree(path, tmp_path / "bare")
    shutil.rmtree(bare / "checkpoints")
    message = fails(["tokens", bare], capsys)
    assert f"{bare} has no checkpoint: wait for its first one, or go on with it" in message

    def started_with(**options):
        metadata = read_json(path / "run.json")
        metadata["options"] |= options
        write_json(bare / "run.json", metadata)
        return fails(["tokens", bare], capsys)

    shutil.copytree(path / "checkpoints", bare / "checkpoints")
    moved = started_with(val=["held=none.txt", "other=none.txt"])
    assert "cannot be read again, needed where the run was started: none.txt: No such" in moved
    held, other = (text.split("=")[1] for text in micro_run.metadata["options"]["val"])
    changed = started_with(val=[f"held={other}", f"other={held}"])
    assert "the data changed since the run began" in changed


def windows(scores, totals):
    scores, totals = np.array(scores, np.float32), np.array(totals, np.float32)
    rows = np.arange(scores.shape[1])
    return Windows(rows, rows + 7, rows, rows, totals, totals, scores, scores)


def test_sums_that_are_not_right_stop_the_command():
    good = windows([[[1.0, 2.0], [1.0, -1.0]]], [[3.0, 1e-5]])
    check_sums("ab", good, 0, 1e-3)
    with pytest.raises(
        StoppedError, match=r"of b from token 8 on add up to 0\.0+e\+00, .*1\.0+e-02"
    ):
        check_sums("ab", good._replace(totals=np.array([[3.0, 0.01]])), 0, 1e-3)
    with pytest.raises(StoppedError, match="a score of a is not finite"):
        check_sums("ab", good._replace(totals=np.array([[np.nan, 0.0]])), 0, 1e-3)
    with pytest.raises(StoppedError, match="at 3 places gradient belongs to several positions"):
        check_sums("ab", good, 3, 1e-3)


def window(text="ab", scores=(2.0, -1.0), rest="c"):
    example = Example("file:0", "file", 9, text)
    parts = [Shown(c, n, 1, score, 0.5) for n, (c, score) in enumerate(zip(text, scores))]
    return Window(example, 3, 6, 1.5, sum(scores), 0.5, parts, rest)


def page_of(*windows):
    return make_page([Section("val", [("Chosen", list(windows))])], About("run", False, ["note"]))


def test_texts_of_the_data_stay_texts():
    hostile = dataclasses.replace(window(), rest=HOSTILE, example=Example(HOSTILE, HOSTILE, 9, ""))
    hostile.parts.append(Shown(HOSTILE, 2, 1, 0.1, 0.2))
    text = page_of(hostile)
    page = Page(text)
    assert not {"script", "svg", "b"} & {name for name, _ in page.tags}
    assert HOSTILE.replace("\x1b", "\ufffd").replace("\u202e", "") in page.text()
    assert not {"\x1b", "\u202e"} & set(text)


def test_colours_are_those_of_the_themes_and_letters_stay_readable():
    text = page_of(window())
    style = text.split("<style>")[1].split("</style>")[0]
    assert set(re.findall(r"#[0-9a-f]{3,8}\b", style)) == set(LIGHT) | set(DARK)
    for level in range(1, LEVELS + 1):
        assert f".heat .p{level} {{" in style
        assert f".heat .m{level} {{" in style
        for theme in (LIGHT, DARK):
            for colour in (theme.helps, theme.hurts):
                ground = heat.blend(colour, theme.page, heat.mixed(level))
                assert contrast(theme.ink, ground) >= 4.5
        for colour in (LIGHT.helps, LIGHT.hurts):
            ground = heat.blend(colour, "#ffffff", heat.mixed(level))
            assert contrast("#000000", ground) >= 4.5


def test_a_token_has_its_colour_and_its_number():
    page = Page(page_of(window()))
    spans = {attrs["title"]: attrs.get("class") for attrs in page.named("span") if "title" in attrs}
    assert spans == {
        "'a' +2.00 ± 0.50": "p6",
        "'b' \u22121.00 ± 0.50": "m3",
        "only predicted": "soft",
    }
    assert "the sum of 2 tokens; file, tokens 3 to 5 of 9, loss 1.500" in page.text()


def test_scores_of_zero_have_no_colour():
    page = Page(page_of(window(scores=(0.0, 0.0))))
    assert "p6" not in {attrs.get("class") for attrs in page.named("span") if "title" in attrs}


def test_a_terminal_with_colours_has_them(tmp_path):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="truecolor", width=80)
    print_texts(console, [Section("val", [("Chosen", [window()])])], About("run", False, []))
    blue = ";".join(map(str, bytes.fromhex(heat.blend(LIGHT.helps, "#ffffff", heat.MIXED)[1:])))
    assert f"48;2;{blue}ma" in stream.getvalue()


def test_a_window_that_ends_within_a_character_shows_it():
    found = windows([[[1.0, 2.0, 3.0]]], [[6.0]])._replace(
        counts=np.array([3]), starts=np.array([0])
    )
    own = Window.of(Example("a:0", "a", 5, ""), ["a", "b", "", "ä", "c"], found, 0, 0)
    assert [part.text for part in own.parts] == ["a", "b", "ä"]
    assert own.rest == ""
    assert (own.start, own.end) == (0, 4)


def test_the_pieces_of_a_tokenizer_are_the_whole_text(micro_config, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "line": 3, "of": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    task = load_task(dataclasses.replace(micro_config, tokenizer=tmp_path / "tokenizer.json"))
    expected = ["", "line ", "0 ", "of ", "the ", "forum", "", ", "]
    assert task.pieces(0) == expected
    assert [len(task.pieces(n)) for n in range(10)] == [one.size for one in task.examples]
