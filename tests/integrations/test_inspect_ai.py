"""inspect_ai's provider: HF.generate's own answers, steered tokens told, nothing unheard."""

import asyncio
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import tiny
from edits import shift
from innsteer import steerer
from innsteer.backends.base import Prompt, Sampling
from innsteer.backends.hf import HF
from innsteer.errors import InputError, MismatchError, NothingSteeredError
from innsteer.models import load_model
from innsteer.site import Where
from innsteer.steering import Steering

pytest.importorskip("inspect_ai", reason="needs inspect-ai: pip install 'innsteer[inspect]'")

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessageSystem,
    ChatMessageUser,
    ContentImage,
    GenerateConfig,
    get_model,
)
from inspect_ai.scorer import includes
from inspect_ai.tool import ToolInfo

import innsteer.integrations.inspect_ai as provider

TALK = [ChatMessageSystem(content="Be kind."), ChatMessageUser(content="Is it so?")]
PROMPT = Prompt("", [{"role": one.role, "content": one.content} for one in TALK])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A saved model and a steering of it, and the same steering of a scope out of reach."""
    home = tmp_path_factory.mktemp("home")
    tiny.tiny_model().save_pretrained(home / "model")
    tiny.tiny_tokenizer().save_pretrained(home / "model")
    tiny.tiny_model(seed=1).save_pretrained(home / "other")
    tiny.tiny_tokenizer().save_pretrained(home / "other")
    model = load_model(home / "model")
    for name, where in (("mine", "generated"), ("nowhere", "range:400:401")):
        made = Steering(
            steerer.get("diffmean"),
            shift(model),
            ("mine",),
            where=Where.parse(where),
            base=model.fingerprint,
        )
        made.save(home / name)
    return home


def opened(home, name="mine", **how):
    """The provider, as inspect_ai makes it from a name and arguments."""
    how = {"strength": 1.0, "base_model": str(home / "model")} | how
    return get_model(f"innsteer/{home / name}", memoize=False, **how).api


def asked(api, talk=TALK, tools=(), **config):
    config = GenerateConfig(**{"max_tokens": 6} | config)
    return asyncio.run(api.generate(talk, list(tools), "auto", config))


@pytest.mark.parametrize("strength", [1.0, 0.0])
@pytest.mark.parametrize("temperature", [None, 0.8])
def test_an_answer_is_that_of_the_backend(home, strength, temperature):
    steering = Steering.load(home / "mine")
    sampling = Sampling(6, temperature or 0.0, 3)
    backend = HF(load_model(home / "model"))
    (want,) = backend.generate([PROMPT], [steering.edit(strength)], sampling)
    found = asked(opened(home, strength=strength), temperature=temperature, seed=3)
    assert found.completion == want.text
    assert found.metadata["steered_tokens"] == want.steered
    assert (want.steered > 0) == (strength != 0)
    assert found.metadata["strengths"] == {"mine": strength}
    assert found.metadata["identity"] == steering.identity
    assert found.usage.output_tokens == want.tokens
    assert found.usage.input_tokens == len(backend.model.encode(PROMPT.conversation).ids)
    assert found.stop_reason == ("max_tokens" if want.tokens == 6 else "stop")


def test_answers_asked_at_once_are_those_asked_alone(home):
    api = opened(home)
    talks = [[ChatMessageUser(content=text)] for text in ("One?", "Two, then?", "And three?")]
    alone = [asked(api, talk).completion for talk in talks]

    async def together():
        config = GenerateConfig(max_tokens=6)
        return await asyncio.gather(*(api.generate(talk, [], "auto", config) for talk in talks))

    assert [one.completion for one in asyncio.run(together())] == alone
    assert api.max_connections() == 1


def test_what_would_go_unheard_is_refused(home):
    api = opened(home)
    with pytest.raises(InputError, match="settings stop_seqs, top_p"):
        asked(api, top_p=0.5, stop_seqs=["x"])
    with pytest.raises(InputError, match="tools"):
        asked(api, tools=[ToolInfo(name="one", description="does one")])
    picture = ChatMessageUser(content=[ContentImage(image="data:image/png;base64,AAAA")])
    with pytest.raises(InputError, match="not text alone"):
        asked(api, [picture])
    with pytest.raises(NothingSteeredError):
        asked(opened(home, "nowhere"))
    with pytest.raises(MismatchError):
        opened(home, base_model=str(home / "other"))


# inspect_ai leaves a stream of its own open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_task_runs_and_its_log_says_what_was_steered(home, tmp_path):
    task = Task(dataset=[Sample(input="Is it so?", target="x")], scorer=includes())
    (log,) = eval(
        task,
        model=f"innsteer/{home / 'mine'}",
        model_args={"strength": 1.0, "base_model": str(home / "model")},
        max_tokens=5,
        log_dir=str(tmp_path),
        display="none",
    )
    assert log.status == "success", log.error
    assert log.samples[0].output.metadata["steered_tokens"] > 0


def test_inspect_ai_finds_the_provider_by_its_entry_point():
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    points = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["entry-points"]
    assert import_module(points["inspect_ai"]["innsteer"]) is provider
