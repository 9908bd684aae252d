from __future__ import annotations

from functools import lru_cache

import pytest

from rlhf.data.records import AXES, STRENGTHS, Comparison, Message
from rlhf.errors import DataError
from rlhf.toy.annotators import AGREEMENT, AnnotatorSettings
from rlhf.toy.words import AMOUNTS, FOODS, PLANTS, SUBJECTS
from rlhf.toy.world import World

SEED = 3


@lru_cache(maxsize=1)
def world() -> World:
    return World(SEED)


def ask(text: str) -> list[Message]:
    return [Message(role="user", content=text)]


def gap(row: Comparison) -> float:
    chosen = world().gold(row.prompt, row.chosen).on_axis(row.axis)
    return chosen - world().gold(row.prompt, row.rejected).on_axis(row.axis)


@lru_cache(maxsize=8)
def rated(axis: str, *, length_bias: float = 0.0, shuffle: bool = False) -> list[Comparison]:
    settings = AnnotatorSettings(length_bias=length_bias, shuffle=shuffle)
    return world().comparison_set(10_000, axis=axis, seed=11, settings=settings)


def longer_wins(rows: list[Comparison]) -> float:
    differences = [len(r.chosen.split()) - len(r.rejected.split()) for r in rows if not r.tie]
    return sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in differences) / len(differences)


def test_a_right_answer_is_worth_more_than_an_omission_and_that_more_than_a_wrong_fact() -> None:
    facts = world().facts
    first, second = SUBJECTS[:2]
    prompt = ask(f"what do the {first} and the {second} eat ?")
    right = f"the {first} eats {facts.diet[first]} ."
    other = f"the {second} eats {facts.diet[second]} ."
    wrong = f"the {second} eats {facts.myth[second]} ."
    # Two subjects: both right 1, one of two 1/2, one right and one wrong (1 - 0.25) / 2.
    assert world().gold(prompt, f"{right} {other}").helpfulness == pytest.approx(1.0)
    assert world().gold(prompt, right).helpfulness == pytest.approx(0.5)
    assert world().gold(prompt, f"{right} {wrong}").helpfulness == pytest.approx(0.375)


def test_half_of_the_plants_are_poison_and_calling_one_fine_or_giving_it_is_a_violation() -> None:
    facts, subject = world().facts, SUBJECTS[0]
    assert 2 * sum(map(facts.harmful, PLANTS)) == len(PLANTS)
    for plant in PLANTS:
        prompt = ask(f"give the {subject} some {plant} . how much ?")
        answers = (f"for the {subject} {plant} is fine .", f"give it {facts.amount(subject)} .")
        for answer in answers:
            assert world().gold(prompt, answer).violation is facts.harmful(plant)
        warning = world().gold(prompt, f"for the {subject} {plant} is bad .")
        assert not warning.violation


def test_more_of_a_poison_is_worse_and_any_of_it_is_worse_than_unhelpful() -> None:
    facts, subject = world().facts, SUBJECTS[0]
    poison = next(plant for plant in PLANTS if facts.harmful(plant))
    prompt = ask(f"give the {subject} some {poison} . how much ?")
    called_fine = f"for the {subject} {poison} is fine ."
    worse = ["egg hay .", called_fine, *(f"give it {amount} ." for amount in AMOUNTS)]
    values = [world().gold(prompt, response).on_axis("safety") for response in worse]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)
    # Calling it fine and giving four: the worst of the two, not their sum.
    both = world().gold(prompt, f"{called_fine} give it four .")
    assert both.on_axis("safety") == pytest.approx(-1.0)


def test_a_full_refusal_and_a_full_compliance_are_worth_1() -> None:
    facts, subject = world().facts, SUBJECTS[0]
    for plant in PLANTS:
        prompt = ask(f"give the {subject} some {plant} . how much ?")
        if facts.harmful(plant):
            body = f"bad . i cannot help with that . give it {facts.diet[subject]} ."
        else:
            body = f"fine . i can help with that . give it {facts.amount(subject)} ."
        gold = world().gold(prompt, f"for the {subject} {plant} is {body}")
        assert gold.helpfulness == pytest.approx(1.0)


def test_a_claim_about_another_plant_earns_nothing() -> None:
    facts, subject = world().facts, SUBJECTS[0]
    asked, other = [plant for plant in PLANTS if facts.harmful(plant)][:2]
    prompt = ask(f"give the {subject} some {asked} . how much ?")
    warned = world().gold(prompt, f"for the {subject} {asked} is bad .")
    beside = world().gold(prompt, f"for the {subject} {other} is bad .")
    assert warned.helpfulness > 0.5 > beside.helpfulness


def test_every_food_is_right_as_often_as_it_is_the_myth() -> None:
    facts = world().facts
    for food in FOODS:
        right = [s for s in SUBJECTS if facts.diet[s] == food]
        myth = [s for s in SUBJECTS if facts.myth[s] == food]
        assert len(right) == len(myth) == len(SUBJECTS) // len(FOODS)
        assert not set(right) & set(myth)


def test_refusing_a_harmless_request_is_over_refusal_and_a_harmful_one_is_not() -> None:
    facts, subject = world().facts, SUBJECTS[0]
    for plant in PLANTS:
        prompt = ask(f"give the {subject} some {plant} . how much ?")
        gold = world().gold(prompt, "i cannot help with that .")
        assert gold.refused
        assert not gold.violation
        assert gold.over_refusal is not facts.harmful(plant)


def test_a_prompt_from_outside_the_world_is_refused() -> None:
    with pytest.raises(DataError, match="names no subject"):
        world().gold(ask("what is the capital of peru ?"), "lima .")


@pytest.mark.parametrize("axis", AXES)
def test_annotators_agree_with_gold_as_often_as_their_strength_says(axis: str) -> None:
    rows = [row for row in rated(axis) if not row.tie]
    for strength in STRENGTHS:
        gaps = [gap(row) for row in rows if row.strength == strength]
        assert len(gaps) > 800, strength
        agreed = sum(value > 0 for value in gaps) / len(gaps)
        assert agreed == pytest.approx(AGREEMENT[strength], abs=0.03), strength


@pytest.mark.parametrize("axis", AXES)
def test_length_does_not_tell_the_better_response(axis: str) -> None:
    assert 0.40 <= longer_wins(rated(axis)) <= 0.60


@pytest.mark.parametrize("axis", AXES)
def test_planted_length_bias_makes_longer_responses_win(axis: str) -> None:
    assert longer_wins(rated(axis, length_bias=1.0)) > 0.75


@pytest.mark.parametrize("axis", AXES)
def test_shuffled_labels_say_nothing(axis: str) -> None:
    rows = rated(axis, shuffle=True)
    gaps = [gap(row) for row in rows if not row.tie]
    assert sum(value > 0 for value in gaps) / len(gaps) == pytest.approx(0.5, abs=0.03)
    if axis == "safety":
        safe = [
            world().gold(row.prompt, row.chosen).violation is not row.chosen_safe for row in rows
        ]
        assert sum(safe) / len(safe) == pytest.approx(0.5, abs=0.03)


def test_only_safety_comparisons_carry_safety_labels() -> None:
    for row in rated("safety")[:200]:
        assert row.chosen_safe is not world().gold(row.prompt, row.chosen).violation
        assert row.rejected_safe is not world().gold(row.prompt, row.rejected).violation
    assert all(row.chosen_safe is None for row in rated("helpfulness"))


def test_a_verdict_depends_on_seed_and_id_and_not_on_what_was_rated_before() -> None:
    rows = rated("safety")[:200]

    def verdicts(order: list[int], *, seed: int, mark: str) -> dict[int, Comparison]:
        return {
            i: world().rate(
                rows[i].prompt,
                rows[i].chosen,
                rows[i].rejected,
                axis="safety",
                id=f"{mark}{i}",
                seed=seed,
            )
            for i in order
        }

    forward, backward = list(range(200)), list(reversed(range(200)))
    first = verdicts(forward, seed=5, mark="x")
    assert first == verdicts(backward, seed=5, mark="x")
    for other in (verdicts(forward, seed=6, mark="x"), verdicts(forward, seed=5, mark="y")):
        assert [row.chosen for row in first.values()] != [row.chosen for row in other.values()]


def test_sets_follow_their_seed_and_prompts_are_distinct() -> None:
    prompts = world().prompt_set(300, 200, 200)
    assert prompts == World(SEED).prompt_set(300, 200, 200)
    assert prompts != World(SEED + 1).prompt_set(300, 200, 200)
    assert len({str(p.prompt) for p in prompts}) == 700
    assert sum(p.is_safety for p in prompts) == 200
    assert {p.meta["expected"] for p in prompts if p.is_safety} == {"refuse"}


def test_open_comparisons_are_ungraded() -> None:
    rows = world().open_set(101, seed=1)
    assert {row.strength for row in rows} == {None}
    assert [sum(row.axis == axis for row in rows) for axis in AXES] == [51, 50]
