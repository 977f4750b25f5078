import re

import numpy as np
import pytest
from recorded import guard, record, refinement, rollout
from selenium.webdriver.common.keys import Keys

from guardrails import CompetenceMetric, Constraint, Dial, Gate, Guard, Require, Rollout
from guardrails.ledger import read
from guardrails.report import collect, page

NUMBERS = """[...document.querySelectorAll('#constraint-0 details')].map(node => { node.open = true; return node; }) &&
  new Promise(done => setTimeout(() => done([...document.querySelectorAll('#constraint-0 tbody tr')]
    .map(row => [...row.cells].map(cell => cell.textContent))), 50))"""


def decisions(run):
    return [line.decision for line in read(run) if line.kind == "step"]


def test_the_level_told_of_a_gate_is_that_after_the_last_step(screen, tmp_path):
    record(tmp_path, 52)
    view = collect(tmp_path, points=8)
    (gate,) = view.gates
    assert gate.last_level != gate.level.mean[-1]
    screen.open(page([view]))
    assert screen.run("document.querySelector('#gate-0 dd').firstChild.textContent") == f"{gate.last_level:g}"


def test_the_page_draws_without_an_error_and_asks_no_network(screen, run):
    screen.open(page([collect(run)]))
    assert screen.errors() == []
    assert screen.run("performance.getEntriesByType('resource').length") == 0
    # cost and λ of two constraints, the level and two requirements of the gate, the dial
    assert len(screen.all("svg")) == 8
    assert screen.run("[...document.querySelectorAll('svg .line')].every(line => line.getTotalLength() > 100)")
    assert screen.texts("h2")[:4] == ["toxicity", "length", "gate", "beta"]


def test_the_numbers_on_the_page_are_the_ledgers_to_the_bit(screen, run):
    rows = screen.open(page([collect(run)])).run(NUMBERS)
    steps = decisions(run)
    assert len(rows) == len(steps) == 80
    for row, decision in zip(rows, steps, strict=True):
        facts = decision.constraints["toxicity"]
        assert [int(row[0]), float(row[1]), float(row[4]), float(row[5])] == [
            decision.step,
            facts.cost,
            facts.limit,
            facts.multiplier,
        ]
        assert float(row[2]) < facts.cost < float(row[3])
        assert int(row[6]) == (facts.violation > 0)
        assert row[7] == next(reason.text for reason in decision.reasons if reason.subject == "toxicity")


def test_the_line_is_drawn_where_the_numbers_say(screen, run):
    screen.open(page([collect(run)]))
    path, ticks = screen.run(
        """[document.querySelector('#constraint-0 svg .line.cost').getAttribute('d'),
        [...document.querySelectorAll('#constraint-0 svg')[0].querySelectorAll('text')].map(t =>
          [Number(t.textContent), Number(t.getAttribute('y')) - 4])]"""
    )
    heights = [float(pair.split(" ")[1]) for pair in re.findall(r"[ML]([\d.]+ [\d.]+)", path)]
    (low, low_y), (high, high_y) = ticks[0], ticks[-1]
    costs = [low + (y - low_y) / (high_y - low_y) * (high - low) for y in heights]
    recorded = [each.constraints["toxicity"].cost for each in decisions(run)]
    # The path is written to a tenth of a pixel, about 0.0005 of this axis; the ticks likewise.
    assert np.allclose(costs, recorded, atol=0.002)


def test_summary_and_verification_are_on_the_page(screen, run):
    text = screen.open(page([collect(run)])).text
    view = collect(run)
    assert "160 of 160" not in text
    assert "80 of 80 decisions follow from their evidence to the bit" in text
    assert view.verification["head"] in text
    figures = view.constraints[0].figures
    assert f"{float(f'{100 * figures.violated / 80:.3g}'):g}%of 80 steps" in text.replace("\n", "").replace("% ", "%")
    assert screen.texts(".badge") == ["verified"]


def test_a_record_that_was_not_verified_or_not_closed_says_so(screen, run, tmp_path):
    assert screen.open(page([collect(run, verified=False)])).texts(".badge") == ["not verified"]
    made = record(tmp_path, 5, close=False)
    assert screen.open(page([collect(tmp_path)])).texts(".badge") == ["intact so far, not closed"]
    made.ledger.close()


def test_an_altered_record_is_shown_up_to_there_under_a_warning(screen, run, tmp_path):
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(lines[:30] + lines[31:]))
    screen.open(page([collect(tmp_path)]))
    assert screen.errors() == []
    assert screen.texts(".badge") == ["altered"]
    assert "lines were removed, inserted or reordered here" in screen.texts(".banner")[0]
    assert len(screen.run(NUMBERS)) == 28


def test_pointing_at_a_step_tells_its_numbers_and_reason_on_all_charts(screen, run):
    screen.open(page([collect(run)]))
    screen.run(
        """(() => { const svg = document.querySelector('#constraint-0 svg'), box = svg.getBoundingClientRect();
        svg.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 10, clientY: box.top + 50})); })()"""
    )
    last = decisions(run)[-1]
    (tip,) = screen.texts("#tip")
    assert tip.startswith("step 80")
    assert f"{last.constraints['toxicity'].cost:.6g}" in tip
    assert next(reason.text for reason in last.reasons if reason.subject == "toxicity") in tip
    assert screen.run(
        "[...document.querySelectorAll('.cursor')].every(c => c.getAttribute('visibility') === 'visible')"
    )


def test_steps_are_read_with_the_keyboard(screen, run):
    screen.open(page([collect(run)]))
    chart = screen.all("#constraint-0 svg")[0]
    chart.send_keys(Keys.HOME)
    chart.send_keys(Keys.ARROW_RIGHT)
    second = decisions(run)[1]
    assert screen.texts("#tip")[0].startswith("step 2\n")
    assert f"{second.constraints['toxicity'].multiplier:.6g}" in screen.texts("#tip")[0]
    chart.send_keys(Keys.ESCAPE)
    assert screen.run("document.getElementById('tip').hidden")


def test_each_climb_and_fall_is_a_mark_that_tells_why_when_focused(screen, run):
    view = collect(run)
    screen.open(page([view]))
    moves = [each for each in view.events if each.kind in ("climb", "fall")]
    marks = screen.all("#gate-0 .mark")
    assert [mark.get_attribute("aria-label") for mark in marks] == [
        f"{each.kind} at step {each.step}: {each.text}" for each in moves
    ]
    fall = next(i for i, each in enumerate(moves) if each.kind == "fall")
    screen.run("arguments[0].focus()", marks[fall])
    assert moves[fall].text in screen.texts("#tip")[0]
    assert screen.texts("#events tbody td:last-child") == [each.text for each in view.events]


def test_refinements_are_shown_as_differences(screen, run):
    screen.open(page([collect(run)]))
    (shown,) = screen.all("#refinements .diff")
    assert shown.text == "the the cat sat sat down"
    removed = [each.text for each in shown.find_elements("css selector", "del")]
    assert " ".join("".join(removed).split()) == "the sat"
    assert screen.all("#refinements ins") == []


def test_what_was_changed_at_the_end_of_a_long_text_is_marked(screen, tmp_path):
    guarded, long = Guard(Constraint("cost", limit=1.0)), " ".join(f"word{i}" for i in range(300))
    with guarded.record(tmp_path / "ledger.jsonl") as ledger:
        guarded.step(Rollout(costs={"cost": [2.0]}))
        ledger.note("refinement", refinement(1, before=f"{long} and so on and so", after=f"{long} and so on."))
    screen.open(page([collect(tmp_path)]))
    assert screen.texts("#refinements del") == ["on and so"]
    assert screen.texts("#refinements ins") == ["on."]
    assert screen.texts("#refinements .diff") == [f"{long} and so on and soon."]


def test_the_colours_follow_the_system_and_the_button(screen, run):
    ground = "getComputedStyle(document.body).backgroundColor"
    screen.open(page([collect(run)]))
    light = screen.run(ground)
    screen.scheme("dark")
    dark = screen.run(ground)
    assert sum(map(int, re.findall(r"\d+", light)[:3])) > 700
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 100
    screen.all("#theme")[0].click()
    assert screen.run(ground) == light
    screen.all("#theme")[0].click()
    assert screen.run(ground) == dark
    screen.scheme("light")
    assert screen.run(ground) == dark


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_shows_the_page_without_scrolling_sideways(screen, run, tmp_path, width):
    (tmp_path / "long").mkdir()
    record(tmp_path / "long", 5, name="a_name_that_goes_on_and_on_without_a_single_place_to_break_it_anywhere")
    screen.open(page([collect(run), collect(tmp_path / "long")]), width=width, height=800)
    assert screen.errors() == []
    assert screen.run("document.documentElement.scrollWidth") == width
    assert screen.run(
        "[...document.querySelectorAll('.card')].every(c => c.getBoundingClientRect().right <= innerWidth)"
    )
    assert screen.run("Math.min(...[...document.querySelectorAll('.chart svg')].map(c => c.clientWidth))") > 200


def test_runs_stand_side_by_side_on_the_same_scales(screen, run, tmp_path):
    record(tmp_path, 120, seed=1)
    screen.open(page([collect(run, name="one"), collect(tmp_path, name="two")]), width=1400)
    assert screen.errors() == []
    assert screen.texts("#constraint-0 h3") == ["one", "two"]
    tops = screen.run("[...document.querySelectorAll('#constraint-0 .card')].map(c => c.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
    labels = """[...document.querySelectorAll('#constraint-0 svg')].map(svg =>
      [...svg.querySelectorAll('text')].map(text => text.textContent + text.getAttribute('y')).join())"""
    cost_one, lambda_one, cost_two, lambda_two = screen.run(labels)
    assert (cost_one, lambda_one) == (cost_two, lambda_two)


def test_runs_that_share_nothing_and_a_run_without_steps_are_drawn(screen, run, tmp_path):
    guarded = Guard(Constraint("cost", limit=1.0))
    guarded.record(tmp_path / "ledger.jsonl").close()
    screen.open(page([collect(tmp_path)]))
    assert screen.errors() == []
    assert "Nothing but ordinary steps" in screen.text
    screen.open(page([collect(run), collect(tmp_path)]))
    assert screen.errors() == []
    assert len(screen.all("#constraint-0 .card")) == 1


def test_steps_without_rows_and_a_single_step_are_drawn(screen, tmp_path):
    guarded = Guard(Constraint("cost", limit=1.0))
    with guarded.record(tmp_path / "ledger.jsonl"):
        guarded.step(Rollout(costs={"cost": []}))
        guarded.step(Rollout(costs={"cost": [2.0, 4.0]}))
        screen.open(page([collect(tmp_path)]))
        assert screen.errors() == []
        guarded.step(Rollout(costs={"cost": [1.0, 2.0]}))
        guarded.step(Rollout(costs={"cost": []}))
        guarded.step(Rollout(costs={"cost": [0.5]}))
    screen.open(page([collect(tmp_path)]))
    assert screen.errors() == []
    assert screen.run("document.querySelector('.line.cost').getAttribute('d').match(/M/g).length") == 2
    assert [row[1] for row in screen.run(NUMBERS)] == ["–", "3", "1.5", "–", "0.5"]


MARKUP = "<img src=x onerror=window.hit=1>"
BREAKOUT = "</script><script>window.hit=1</script><!--<script>"


class Hostile(CompetenceMetric):
    """Has markup in its name, and fails with markup."""

    name = f"metric{MARKUP}"
    requires = frozenset({"rewards"})

    def measure(self, rollout):
        raise ValueError(BREAKOUT + MARKUP)


@pytest.mark.parametrize("policy", ["as it is", "without its policy"])
def test_markup_in_names_reasons_and_texts_stays_text(screen, tmp_path, policy):
    gate = Gate(Require(Hostile(), at_least=0.5), name=f"gate{MARKUP}")
    guarded = Guard(
        Constraint(f"cost{MARKUP}", limit=gate.between(1.0, 2.0)), Dial(f"dial{MARKUP}", gate.between(1.0, 2.0))
    )
    guarded.attach(f"host{BREAKOUT}", dials=[f"dial{MARKUP}"])
    with guarded.record(tmp_path / "ledger.jsonl") as ledger:
        for _ in range(4):
            guarded.step(Rollout(rewards=[1.0, 2.0], costs={f"cost{MARKUP}": [0.5, 3.0]}))
        texts = {"before": f"was {BREAKOUT}", "after": f"is {MARKUP}", "prompt": f"asked {BREAKOUT}"}
        ledger.note("refinement", refinement(3, **texts))
    html = page([collect(tmp_path, name=f"run{BREAKOUT}{MARKUP}")])
    if policy == "without its policy":  # the text must be inert by itself
        html, cuts = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
        assert cuts == 1
    screen.open(html)
    for chart in screen.all("svg"):
        chart.send_keys(Keys.END)
    screen.run(NUMBERS)
    assert screen.errors() == []
    assert screen.run("window.hit === undefined")
    assert screen.all("img") == []
    assert len(screen.all("script")) == 2
    text = screen.text
    for part in (
        f"cost{MARKUP}",
        f"gate{MARKUP}",
        f"metric{MARKUP}",
        f"dial{MARKUP}",
        f"run{BREAKOUT}",
        f"host{BREAKOUT}",
    ):
        assert part in text
    assert f"raised ValueError: {BREAKOUT}{MARKUP}" in text
    shown = "".join(screen.texts("#refinements .card"))
    assert BREAKOUT in shown
    assert MARKUP in shown


def test_the_policy_lets_no_other_script_run(screen, run):
    html = page([collect(run)]).replace("</main>", "</main><script>window.hit=1</script>")
    screen.open(html)
    assert any("Content Security Policy" in error for error in screen.errors())
    assert screen.run("window.hit === undefined")


def test_a_long_run_says_how_many_steps_a_point_spans(screen, tmp_path):
    made, rng = guard(), np.random.default_rng(0)
    with made.record(tmp_path / "ledger.jsonl"):
        for step in range(1, 301):
            made.step(rollout(step, rng))
    screen.open(page([collect(tmp_path, verified=False, points=40)]))
    assert screen.errors() == []
    assert "A point spans up to 8 steps" in screen.text
    assert screen.run(NUMBERS)[0][0] == "1–8"


def test_numbers_that_differ_in_their_last_digit_alone_are_drawn(screen, tmp_path):
    gate = Gate(Require("reward_level", at_least=0.5), rungs=1, dwell=0)
    guarded = Guard(Dial("beta", gate.between(0.1, np.nextafter(0.1, 1.0))))
    with guarded.record(tmp_path / "ledger.jsonl"):
        for reward in [1.0] * 9 + [0.0]:
            guarded.step(Rollout(rewards=[reward] * 64))
    view = collect(tmp_path)
    assert len(set(view.dials[0].value.mean)) == 2
    screen.open(page([view]))
    assert screen.errors() == []
    assert screen.run("document.querySelector('#dial-0 .line').getTotalLength() > 100")
