"""Language: parallel questions, and the share of answers in the language that was asked for."""

import json
from dataclasses import replace

import pytest

import tiny
from innsteer import evaluation, fitting, metrics, suites
from innsteer.backends.base import Completion
from innsteer.backends.hf import HF
from innsteer.comparing import Comparison, Contender, Protocol
from innsteer.comparing.standings import standings
from innsteer.errors import DataError, InputError, MissingPackage, UnknownName
from innsteer.evaluation import Arm, Sizes
from innsteer.metrics import language
from innsteer.site import Site
from innsteer.suites import behaviour
from words import WORDS

NONE = Sizes(neutral_prompts=2, asides=0, aside_tokens=2, long=(), trails=0, cloud=1)
WORDINGS = {"en": "Where is {}?", "fr": "Où est {} ?"}


@pytest.fixture
def files(tmp_path):
    """The same questions in two languages, as both sets have them."""
    for code, text in WORDINGS.items():
        rows = [{"question_id": n, "text": text.format(w)} for n, w in enumerate(WORDS)]
        (tmp_path / f"questions_{code}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        qas = [{"id": f"q{n}", "question": text.format(w)} for n, w in enumerate(WORDS)]
        paragraphs = [{"context": "?", "qas": qas[n : n + 3]} for n in range(0, 15, 3)]
        data = {"data": [{"paragraphs": paragraphs[:2]}, {"paragraphs": paragraphs[2:]}]}
        (tmp_path / f"xquad.{code}.json").write_text(json.dumps(data))
    return tmp_path


def read(files, name="questions_en.jsonl", to="questions_fr.jsonl", **how):
    return suites.read("language", files / name, to=to, language="fr", **how)


@pytest.mark.parametrize("name", ["questions_{}.jsonl", "xquad.{}.json"])
def test_questions_are_paired_by_their_ids(files, name):
    found = read(files, name.format("en"), name.format("fr"))
    assert len(found) == 15 and found.behaviour == "in-fr" and found.kind == "open"
    pairs = {(item.source, item.target) for item in found.items}
    assert pairs == {(f"Where is {word}?", f"Où est {word} ?") for word in WORDS}
    suite = behaviour.load(found.whole("test"))
    assert suite.control == "language:fr"
    assert {p.conversation for p in suite.prompts} == {f"Where is {word}?" for word in WORDS}


def test_questions_about_one_paragraph_stand_in_one_part(files):
    found = read(files, "xquad.en.json", "xquad.fr.json")
    parts = {}
    for item in found.items:
        parts.setdefault(int(item.id[1:]) // 3, set()).add(item.split)
    assert len(parts) == 5 and all(len(part) == 1 for part in parts.values())


def test_only_what_both_files_have_is_paired(files):
    lines = (files / "questions_fr.jsonl").read_text().splitlines()
    (files / "few.jsonl").write_text("\n".join([*lines[3:], '{"question_id": 99, "text": "?"}']))
    assert [item.id for item in read(files, to="few.jsonl").items] == list(map(str, range(3, 15)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question_id": 70, "text": "Quoi ?"}', "share no question"),
        ('{"question_id": 1, "text": " "}', "line 1: 'text' is empty"),
        ('{"text": "Quoi ?"}', "line 1: no id"),
        ('{"id": 1, "text": "a"}\n{"id": 1, "text": "b"}', "line 2: the id '1' stands there twice"),
        ('{"paragraphs": [{"text": "a"}]}', "its paragraphs lack 'qas'"),
        ('{"paragraphs": [{"qas": [{"id": 1, "question": 2}]}]}', "the question '1' is 2"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(files, text, said):
    (files / "other.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        read(files, to="other.jsonl")


# --- the metric ----------------------------------------------------------------------------------


def test_a_metric_takes_an_argument_behind_a_colon_or_says_that_it_takes_none():
    found = metrics.get("language:fr")
    assert found.name == "language:fr" and metrics.get("language").name == "language"
    with pytest.raises(InputError, match="'x' for the metric 'mc1'; expected its name alone"):
        metrics.get("mc1:x")
    with pytest.raises(UnknownName, match="did you mean 'language'"):
        metrics.get("langauge:fr")


def test_answers_are_counted_by_their_language():
    pytest.importorskip("py3langid")
    texts = ["Bonjour, je ne sais pas où il est.", "I do not know where it is.", "42", ""]
    said = [Completion(str(n), "sample", text=text) for n, text in enumerate(texts)]
    assert metrics.get("language:fr").score(said).value == 0.25
    assert metrics.get("language").score(said).value == 0.25
    assert metrics.get("language:de").score(said).value == 0


def test_the_missing_package_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "py3langid", None)
    language._identifier.cache_clear()
    with pytest.raises(MissingPackage, match=r"innsteer\[eval\]"):
        evaluation.require_scorer("language:fr")
    language._identifier.cache_clear()


def test_a_report_has_the_share_of_that_language_and_of_no_other(files, monkeypatch):
    monkeypatch.setattr(language, "language", lambda text: "fr" if "tea" in text else "en")

    def generate(self, prompts, edits=(), sampling=None, **how):
        return [Completion(p.item, "sample", p.conversation, p.conversation) for p in prompts]

    monkeypatch.setattr(HF, "generate", generate)
    suite = replace(behaviour.load(read(files, part="test")), plain=(), others=())
    suite = replace(suite, neutral_tokens=2)
    report = evaluation.evaluate(tiny.tiny_language_model(), [Arm("plain")], suite, sizes=NONE)
    assert report.control == "language:fr"
    assert report.figure("plain", "language:fr").value == pytest.approx(1 / 15)
    assert "language" not in {figure.metric for figure in report.figures}
    assert "language:fr" in report.text()


def test_it_is_a_task_of_a_comparison(files, tmp_path, monkeypatch):
    monkeypatch.setattr(language, "language", lambda text: "fr")
    neutral = behaviour.neutral
    monkeypatch.setattr(behaviour, "neutral", lambda part: neutral(part)[:4])
    model = tiny.tiny_language_model()
    protocol = Protocol.of(
        model, layers=(1,), evaluations=3, items=2, search_tokens=20, answers=2, budget=0.5
    )
    rows = [Contender.of("unsteered"), Contender.of("diffmean")]
    task = read(files)
    whole = Comparison(model, [task], tmp_path / "c", contenders=rows, protocol=protocol)
    whole.run()
    assert [t.metric for t in standings(whole.found())] == ["preference", "language:fr"]
    assert fitting.fit(model, task, "diffmean", sites=[Site(1)]).behaviours == ("in-fr",)


def test_the_public_files_are_read(shared):
    pytest.importorskip("py3langid")
    home = shared / "data"
    found = read(home / "vicuna-multilingual", "questions_English.jsonl", "questions_French.jsonl")
    assert len(found) == 80
    assert all(language.language(item.target) == "fr" for item in found.items)
    found = read(home / "xquad", "xquad.en.json.gz", "xquad.es.json.gz")
    assert len(found) > 500 and len(found.test) > 50
