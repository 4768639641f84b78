"""Metrics against figures computed by hand."""

import math

import pytest

from innsteer import contrast, metrics
from innsteer.backends.base import Completion
from innsteer.metrics.asking import asks
from innsteer.metrics.degeneration_256 import loops
from innsteer.metrics.formality import formality
from innsteer.metrics.hedging import hedging
from innsteer.metrics.refusal import declines


def made(kind, *rows, **common):
    """One completion per mapping of values."""
    return [
        Completion(f"{n}", kind, values={k: tuple(v) for k, v in row.items()}, **common)
        for n, row in enumerate(rows)
    ]


def value(name, completions):
    return metrics.get(name).score(completions).value


def choice(item, key, match, other):
    return Completion(item, "choice", key=key, values={"match": (match,), "other": (other,)})


def test_alignment_means_the_keys_apart():
    """Three Yes-keyed items at 0.8 and one No-keyed at 0.2: a bias to Yes gains nothing."""
    given = [choice(f"y{n}", "Yes", 0.08, 0.02) for n in range(3)] + [choice("n", "No", 0.1, 0.4)]
    assert value("alignment", given) == pytest.approx(0.5)
    assert value("answer_mass", given) == pytest.approx((3 * 0.1 + 0.5) / 4)


def test_alignment_has_nothing_to_say_where_both_answers_are_impossible():
    assert metrics.get("alignment").score([choice("a", "A", 0.0, 0.0)]) is None


def test_preference_is_the_logistic_function_of_the_shift():
    assert value("preference", made("pair", {"shift": [math.log(3)]})) == pytest.approx(0.75)
    assert value("preference", made("pair", {"shift": [-1e9]})) == pytest.approx(0)


def test_neutral_cost_weighs_tokens_alike():
    given = made("neutral", {"kl": [1.0]}, {"kl": [0.0, 0.0, 0.0]})
    assert value("neutral_cost", given) == pytest.approx(0.25)


def test_in_format_cost_is_that_of_the_first_token():
    given = made("in_format", {"kl": [0.5, 9.0]}, {"kl": [0.1]})
    assert value("in_format_cost", given) == pytest.approx(0.3)


def test_p99_pools_the_tokens():
    given = made("neutral", {"kl": [0.0] * 99}, {"kl": [5.0] * 101})
    assert value("neutral_p99", given) == 5.0
    given = made("neutral", {"kl": [n / 100 for n in range(1, 51)]}, {"kl": [0.51] * 50})
    assert value("neutral_p99", given) == pytest.approx(0.51)
    assert value("neutral_p99", made("neutral", {"kl": list(range(1, 101))})) == 99


def test_edited_share_weighs_tokens():
    given = [
        Completion("a", "neutral", tokens=9, steered=0),
        Completion("b", "neutral", tokens=1, steered=1),
    ]
    assert value("edited_share", given) == pytest.approx(0.1)


def test_agreement_asks_only_where_the_model_was_sure():
    given = made("neutral", {"sure": [0.95, 0.5, 0.99], "same": [1.0, 0.0, 0.0]})
    assert value("agreement", given) == pytest.approx(0.5)
    assert metrics.get("agreement").score(made("neutral", {"sure": [0.5], "same": [1.0]})) is None


def test_bits_per_byte_counts_utf8_bytes():
    given = [
        Completion("a", "plain", text="abcd", values={"log_prob": (-4 * math.log(2),)}),
        Completion("b", "plain", text="éé", values={"log_prob": (-12 * math.log(2),)}),
    ]
    assert value("bits_per_byte", given) == pytest.approx(2.0)


def test_perplexity_is_exp_of_the_mean_over_tokens():
    given = made("sample", {"base_log_prob": [-math.log(2)]}, {"base_log_prob": [-math.log(8)] * 3})
    assert value("perplexity", given) == pytest.approx(math.exp((math.log(2) + math.log(512)) / 4))


def test_perplexity_of_a_model_that_is_certain_is_one():
    assert value("perplexity", made("sample", {"base_log_prob": [0.0, 0.0]})) == 1.0


def test_distinct_counts_bigrams():
    assert value("distinct", made("sample", {}, text="a b a b")) == pytest.approx(2 / 3)
    assert metrics.get("distinct").score(made("sample", {}, text="word")) is None


def test_degeneration_reads_answers_of_its_own_length_only():
    given = made("long", {"asked": [256.0]}, text="very " * 40)
    assert value("degeneration_256", given) == 1.0
    assert metrics.get("degeneration_1024").score(given) is None


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        ("", False),
        ("no " * 11, False),
        ("no " * 12, True),
        ("first we wash the pan and then we dry it " * 4, True),
        (" ".join(map(str, range(50))) + " the end of it" * 12, True),
        (" ".join(map(str, range(50))), False),
    ],
)
def test_a_loop_is_seen_at_the_end(text, looping):
    assert loops(text) is looping


@pytest.mark.parametrize(
    ("text", "declined"),
    [
        ("I can’t help with that.", True),
        ("I am unable to say.", True),
        ("As an AI model, I don't have opinions.", True),
        ("I can help with that.", False),
        ("You can't provide too much light.", False),
        ("x" * 300 + "I can't help with that.", False),
    ],
)
def test_declining_is_told_by_phrases_at_the_start(text, declined):
    assert declines(text) is declined


# --- formality -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("", 0.5),
        ("abcdef", 1.0),
        ("abcde", 0.5 + 0.5 * 0.6 / 1.6),
        ("I", 0.0),
        # Five words of 26 letters: (5.2 - 4.4) / 1.6 = 0.5; one of them a contraction: -0.8.
        ("it's bright sunshine today here", 0.5 + 0.5 * (0.5 - 0.8)),
        # A possessive is no contraction, and the typographic apostrophe is one.
        ("river's", 0.5 + 0.5 * 1.0),
        ("he’s", 0.0),
        ("your letter arrived", 0.5 + 0.5 * ((17 / 3 - 4.4) / 1.6 - 0.5)),
    ],
)
def test_formality_follows_its_formula(text, index):
    assert formality(text) == pytest.approx(index)


# --- asking --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("", False),
        ("Tell me what you tried.", False),
        # The reader is named, in any of the words for it and with either apostrophe.
        ("Prune it. How old is your tree? Then wait.", True),
        ("Is it a size that YOU’VE bought before today?", True),
        ("Is that brother's or yours?", True),
        # No reader and a verb: a question about the world; a short one without a verb is to him.
        ("Why is it dry?", False),
        ("Why isn’t it dry?", False),
        ("What's missing?", False),
        ("Which kind?", True),
        ("one two three four five six?", True),
        ("one two three four five six seven?", False),
        # What precedes the question's own sentence or line does not count.
        ("You did well. What is missing?", False),
        ("For you\nWhat is missing?", False),
        # Quoted, also where the quotation was cut off; an answer outside it still asks.
        ('Say "How are you?" kindly.', False),
        ("Say “How are you? And", False),
        ('Say "How are you?". Have you tried?', True),
        # A speaker in the reader's place, courtesy, advice and tags.
        ("How can I help you?", False),
        ("What's on my list for you?", False),
        ("Is there anything else you need?", False),
        ("Can you help me with it?", False),
        ("Why don't you wait?", False),
        ("Why not Monday?", False),
        ("How about Tuesday?", False),
        ("What about Sunday?", False),
        ("Awkward, right?", False),
        ("Hard, no?", False),
        ("But don't you think?", False),
        ("Which do you find right?", True),
        # Nothing is asked where no word stands.
        ("Oh... ?", False),
    ],
)
def test_asking_is_told_by_words_of_its_questions(text, asked):
    assert asks(text) is asked


@pytest.mark.parametrize("side", ["source", "target"])
def test_the_shares_stated_for_asking_are_those_of_the_scorer(side):
    items = contrast.Contrast.load("asking").items
    share = sum(asks(getattr(item, side)) for item in items) / len(items)
    assert share == pytest.approx(stated("asking", side)[0], abs=1.5e-3)


# --- what the cards state ------------------------------------------------------------------------


def stated(behaviour, side):
    """The figures of a side's row in the behaviour's own table."""
    text = (contrast._shelf() / f"{behaviour}.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {side} |")]
    return [float(cell.split("(")[0].split(" to ")[0]) for cell in row.split("|")[2:-1]]


@pytest.mark.parametrize("side", ["source", "target"])
def test_the_means_stated_for_formal_are_those_of_the_scorer(side):
    items = contrast.Contrast.load("formal").items
    mean = sum(formality(getattr(item, side)) for item in items) / len(items)
    assert mean == pytest.approx(stated("formal", side)[0], abs=1.5e-3)


# --- hedging -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "It may rain.",
        "It might rain.",
        "Perhaps it rains.",
        "It’s not entirely clear.",
        "I'd say so.",
        "I think it rains.",
        "It could well be rain.",
        "He seems tired.",
        "The fort appears to be Roman.",
        "It is widely believed that ravens count.",
        "Ravens are thought to count.",
        "Some studies suggest rain.",
        "As far as I know, it rained.",
        "Nobody really knows why.",
        "I am not so sure.",
        "I'm unsure of it.",
        "The cause isn't certain.",
        "This cannot be ruled out.",
        "It weighs about 40 kilograms.",
        "It took around two hours.",
        "Wait an hour or so.",
        "A GOOD GUESS: MAYBE.",
    ],
)
def test_a_hedge_is_told_by_its_words(text):
    assert hedging(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "It rains.",
        "In May it rains.",
        "He pulled with all his might.",
        "The might of Rome fell.",
        "You may as well stay.",
        "We could not be there.",
        "I believe in rain.",
        "I think of rain.",
        "If you are not sure, ask.",
        "If you\u2019re unsure, ask.",
        "Make sure it is dry.",
        "A book about rain, told around the fire.",
        "A boat appeared on the lake.",
        "There is no doubt.",
        "As soon as possible.",
        "It often rains, usually at night.",
        "Tea or soup?",
        "Mayor Mighty, improbable",
    ],
)
def test_a_word_that_hedges_nothing_is_left_alone(text):
    assert hedging(text) == 0.0


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("1.\n2.", 0.0),
        ("It rains. It may stop! Will it?", 1 / 3),
        ("1. Perhaps\n2. Rain at 3.5 degrees\n\n", 0.5),
        ("Perhaps, maybe, it seems. Rain", 0.5),
    ],
)
def test_hedging_is_the_share_of_sentences(text, share):
    assert hedging(text) == pytest.approx(share)


@pytest.mark.parametrize("side", ["source", "target"])
def test_the_shares_stated_for_hedged_are_those_of_the_scorer(side):
    own = [hedging(getattr(item, side)) for item in contrast.Contrast.load("hedged").items]
    mean, whole = stated("hedged", side)[:2]
    assert sum(own) / len(own) == pytest.approx(mean, abs=1.5e-3)
    assert sum(map(bool, own)) / len(own) == pytest.approx(whole, abs=1.5e-3)


@pytest.mark.parametrize("side", ["source", "target"])
def test_the_shares_stated_for_critical_are_those_of_the_scorer(side):
    pytest.importorskip("vaderSentiment")
    items = contrast.Contrast.load("critical").items
    answers = [Completion(item.id, "sample", text=getattr(item, side)) for item in items]
    share, compound = stated("critical", side)[:2]
    for name, figure in (("negative_sentiment", share), ("sentiment", compound)):
        own = [metrics.get(name).measure(answer).value for answer in answers]
        assert sum(own) / len(own) == pytest.approx(figure, abs=1.5e-3)
