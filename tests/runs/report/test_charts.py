"""What the figures of a report tell in words."""

import numpy as np

from ghostjax.runs.report.charts import over_time
from ghostjax.runs.store.run import Run, read_run
from tests.runs.made_up import write_run


def test_steps_whose_scores_add_up_to_nothing_are_told(tmp_path, monkeypatch):
    source = read_run(write_run(tmp_path / "run"))
    assert "add up to 0" not in over_time("v1", source, "prose").caption
    (visits,) = source.visits("score_prose")
    steps, scores = visits["step"], visits["score_prose"]
    means = np.bincount(steps, scores) / np.bincount(steps)
    visits["score_prose"] = scores - np.where(steps < 6, means[steps], 0)
    monkeypatch.setattr(Run, "visits", lambda *_: iter([visits]))
    told = over_time("v1", source, "prose").caption
    assert "it was 0.00 in the first stretch" in told
    assert "In 20% of the steps the scores add up to 0, as they do where an optimizer clips" in told
