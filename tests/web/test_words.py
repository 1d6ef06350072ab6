"""What the page says: seconds, plans, and who won."""

import json
from dataclasses import replace

import pytest
from test_session import enlarger, pyramid

from pyrdiff.web import markup, words
from pyrdiff.web.events import Progress, Result, Waiting
from pyrdiff.web.model import _measured
from pyrdiff.web.pace import Pace
from pyrdiff.web.session import Outlook


def test_the_pace_is_learned_and_read_between_the_areas():
    pace = Pace()
    assert pace.of_call(10) is None and pace.of_calls([(1, 10)]) is None
    pace.observe(100, 1.0)
    pace.observe(300, 2.0)
    assert [pace.of_call(area) for area in (50, 100, 200, 300, 600)] == [1.0, 1.0, 1.5, 2.0, 4.0]
    assert pace.of_calls([(3, 100), (2, 300)]) == 7.0 and pace.of_calls([]) is None
    pace.observe(100, 2.0)
    assert pace.of_call(100) == pytest.approx(1.3)


def test_plans_say_their_seconds_and_quality():
    session = pyramid()
    assert words.plan_choices(session) == [("fast 2 + 2 calls", "fast"), ("long 4 + 3 calls", "long")]
    session.pace.observe(36, 1.0)
    session.pace.observe(64, 2.0)
    session.quality = {"fast": (30.0, 20.0), "long": (10.0, 5.0)}
    assert words.plan_choices(session) == [("fast ~6 s, rough", "fast"), ("long ~10 s, best measured", "long")]
    session.quality = {"fast": (12.0, 11.0), "long": (10.0, 5.0)}
    assert words.plan_choices(session)[0][0] == "fast ~6 s, rougher"
    session.quality = {"fast": (12.0, 9.0), "long": (10.0, 5.0)}
    assert words.plan_choices(session)[0][0] == "fast ~6 s, about as good as the best"
    assert words.plan_choices(enlarger()) == [("default", "default"), ("short", "short")]


def test_quality_is_read_from_figures_of_others_with_care(tmp_path):
    plans = {"a": {"num_inference_steps": 2}, "b": {"num_inference_steps": 3}}
    row = {"higher_is_better": False}
    arms = {
        name: {"arguments": {"plan": name}, "metrics": {"FD-x": {**row, "value": value, "interval": [value / 2, 99]}}}
        for name, value in (("a", 4.0), ("b", 8.0))
    }
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps({"kind": "pyrdiff bench", "arms": arms}))
    assert _measured(tmp_path, plans) == {"a": (4.0, 2.0), "b": (8.0, 4.0)}
    tuned = {
        name: {"plan": plans[name], "distance": 1.0 + index, "interval": [0.5, 2]} for index, name in enumerate("ab")
    }
    (tmp_path / "tuning.json").write_text(json.dumps({"plans": tuned}))
    assert _measured(tmp_path, plans) == {"a": (1.0, 0.5), "b": (2.0, 0.5)}  # of a search for these very plans
    assert _measured(tmp_path, {**plans, "b": {"num_inference_steps": 9}}) == {"a": (4.0, 2.0), "b": (8.0, 4.0)}
    (tmp_path / "tuning.json").unlink()
    for wrong in ("[]", "{", '{"kind": "pyrdiff bench", "arms": {"a": 1}}', bench.read_text().replace("4.0", '"x"')):
        bench.write_text(wrong)
        assert _measured(tmp_path, plans) == {}
    assert _measured(None, plans) == {}


def test_progress_says_steps_tiles_and_what_is_left():
    event = Progress("", 3, 1, 4, 2, 5, 3.0)
    assert words.progress(event) == "step 2 of 4, tile 2 of 5, 3 s so far, about 7 s left"
    assert words.progress(replace(event, step=0, window=1, windows=0)) == "step 1 of 4, 3 s so far"
    assert words.progress(replace(event, steps=None, windows=0, window=1)) == "3 network calls, 3 s so far"
    uneven = replace(event, window=1, windows=1, costs=[1.0, 1.0, 1.0, 7.0])
    assert uneven.fraction == 0.1 and "27 s left" in words.progress(uneven)  # the last step takes seven times as long
    assert words.waiting(Waiting(1)) == "Waiting in line: 1 run before yours."
    assert words.outlook(Outlook((3, 2), (12, 8), 4, 100.0, ["made gray"])) == (
        "3×2 → 12×8 pixels in 4 tiles, about 2 min; made gray"
    )


def result(name: str, seconds: float, consistency: float | None = None) -> Result:
    return Result(name, [], 3, 2.0, seconds, consistency=consistency)


def test_a_comparison_says_who_won_and_by_how_much():
    session = pyramid()
    session.quality = {"fast": (30.0, 20.0), "long": (10.0, 5.0)}
    time, quality = words.verdict([result("long", 3.0), result("fast", 1.0)], session)
    assert time.startswith("Time: fast is the fastest (3.0 times the 1.00 s for long).")
    assert (
        "long has the least distance to real ones, 10; fast has 3.00 times that." in quality
        and "measure nothing" in quality
    )
    session.quality = {"fast": (12.0, 9.0), "long": (10.0, 5.0)}
    assert (
        "fast has 1.20 times that, no clear difference"
        in words.verdict([result("long", 1), result("fast", 1)], session)[1]
    )
    session.quality = {}
    time, quality = words.verdict([result("long", 1.05), result("fast", 1.0)], session)
    assert time.startswith("Time: fast and long are about equally fast")
    assert quality == "Quality: not measured here; your eyes decide."
    _, quality = words.verdict([result("default", 1.0, 0.002), result("short", 1.0, 0.001)], enlarger())
    assert quality.startswith("Fidelity: short is closest") and "0.0010; 0.0020 for default" in quality


@pytest.mark.parametrize("consistency, cells", [(None, 4), (0.002, 5)])
def test_a_comparison_is_a_table(consistency, cells):
    shown = markup.verdict(["a < b"], [result("fast", 1.0, consistency), result("long", 2.0, consistency)])
    assert shown.count("<tr>") == 3 and shown.count("<td>") == 2 * cells and shown.count("<th>") == cells
    assert "<p>a &lt; b</p>" in shown and "<td>2.00</td>" in shown and ("0.0020" in shown) == (cells == 5)
