"""Pushing to and pulling from a stand-in of the Hub: whole or not at all, and nothing else."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import _http

from innsteer import cli, get
from innsteer.activations import Activations
from innsteer.errors import FormatError, InnsteerError, InputError
from innsteer.files import sha256_file
from innsteer.hub import LIMITS, pull, push
from innsteer.models.fingerprint import Fingerprint
from innsteer.steering import CARD, HEADER, SEAL, TENSORS, Steering
from standin import TOKEN, StandIn

REPO = "someone/mood-steering"


@pytest.fixture
def hub(monkeypatch):
    """A Hub of our own, a token for it, and no waiting between its retries."""
    server = StandIn()
    # What HF_ENDPOINT sets, which is read once, when the client is first imported.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Xet's own servers have no stand-in; without it the client uploads large files by LFS.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    _http.close_session()
    server.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved steering."""
    acts = Activations.of_sides(torch.zeros(4, 8), torch.ones(4, 8), behaviour="mood")
    method = get("diffmean")
    base = Fingerprint(base="a", weights="b", tokenizer="c", template="d", name="smollm2")
    steering = Steering(method, method.fit(acts), ("mood",), base=base)
    return steering.save(tmp_path_factory.mktemp("hub") / "mine")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def altered(folder, name, content):
    """A steering's files with one of them changed, and a seal that fits."""
    files = files_of(folder) | {name: content}
    seal = json.loads(files[SEAL])
    if name in seal["files"]:
        home = folder.parent / "forged"
        home.mkdir(exist_ok=True)
        (home / name).write_bytes(content)
        seal["files"][name] = sha256_file(home / name)
    return files | {SEAL: json.dumps(seal).encode()}


# --- there and back ------------------------------------------------------------------------------


def test_what_is_pushed_in_one_commit_is_pulled_byte_for_byte(hub, folder, tmp_path):
    commit = push(folder, REPO)
    assert hub.repos[REPO].at("main") == commit
    assert sum("/commit/" in one for one in hub.asked) == 1
    assert sum(one.startswith("PUT /large/") for one in hub.asked) == 1
    found = pull(REPO, tmp_path / "theirs")
    assert found == (commit, ())
    assert files_of(tmp_path / "theirs") == files_of(folder)
    assert not any(path.is_symlink() for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


def test_a_commit_can_be_asked_for_after_another_has_followed(hub, folder, tmp_path):
    first = push(folder, REPO)
    steering = Steering.load(folder)
    other = steering.with_card({"mood": {"figures": []}}).save(tmp_path / "other")
    second = push(other, REPO)
    assert first != second
    assert pull(REPO, tmp_path / "new").commit == second
    assert pull(REPO, tmp_path / "old", revision=first).commit == first
    assert files_of(tmp_path / "old") == files_of(folder)
    assert files_of(tmp_path / "new") == files_of(other)


def test_a_branch_is_made_and_pulled_from(hub, folder, tmp_path):
    hub.hold(REPO, {".gitattributes": b""})
    commit = push(folder, REPO, revision="trial")
    assert hub.repos[REPO].at("trial") == commit != hub.repos[REPO].at("main")
    assert pull(REPO, tmp_path / "trial", revision="trial").commit == commit
    with pytest.raises(FormatError, match="has no README.md, steering.json"):
        pull(REPO, tmp_path / "main")


def test_the_card_names_a_base_model_only_by_an_id_of_the_hub(hub, folder, tmp_path):
    card = (folder / CARD).read_text()
    assert card.startswith("---\nlibrary_name: innsteer\nbase_model: HuggingFaceTB/SmolLM2-135M-In")
    assert "\ntags: [activation-steering, diffmean]\n---\n" in card
    steering = Steering.load(folder)
    base = Fingerprint(base="a", weights="b", tokenizer="c", template="d", name="my: model")
    local = Steering(steering.steerer, steering.interventions, ("mood",), base=base)
    assert "base_model" not in local.model_card().split("---")[1]
    push(local.save(tmp_path / "local"), REPO)  # the stand-in refuses another base model


# --- pushing -------------------------------------------------------------------------------------


def test_a_folder_whose_seal_does_not_hold_is_not_pushed(hub, folder, tmp_path):
    broken = Steering.load(folder).save(tmp_path / "broken")
    (broken / CARD).write_text("buy now")
    with pytest.raises(FormatError, match="not the file that was saved"):
        push(broken, REPO)
    assert hub.asked == []


def test_a_repository_of_something_else_is_kept_unless_told(hub, folder, tmp_path):
    hub.hold(REPO, {"model.pkl": b"theirs", CARD: b"theirs"})
    with pytest.raises(InputError, match=r"holds something else: 'README.md', 'model.pkl'.*replac"):
        push(folder, REPO)
    assert len(hub.repos[REPO].commits) == 1
    commit = push(folder, REPO, replace=True)
    assert hub.repos[REPO].commits[commit]["model.pkl"] == b"theirs"
    assert pull(REPO, tmp_path / "mine") == (commit, ("model.pkl",))
    assert not (tmp_path / "mine" / "model.pkl").exists()
    assert not any("model.pkl" in one for one in hub.asked)


def test_private_is_private_and_a_public_repository_does_not_become_it(hub, folder, monkeypatch):
    push(folder, REPO, private=True)
    assert hub.repos[REPO].private
    push(folder, REPO)
    hub.repos[REPO].private = False
    with pytest.raises(InputError, match="is public; expected a private repository"):
        push(folder, REPO, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match=r"not allowed \(401\); log in with: hf auth login"):
        push(folder, "someone/new")


def test_a_commit_that_came_in_between_is_not_written_over(hub, folder):
    push(folder, REPO)

    hub.faults[f"POST /api/models/{REPO}/preupload"] = lambda handler: (
        hub.hold(REPO, {CARD: b"theirs"}),
        handler.answer(200, {"files": [
            {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in LIMITS
        ]}),
    )  # fmt: skip
    with pytest.raises(InnsteerError, match="answers with 412 A commit has happened since"):
        push(folder, REPO)
    assert hub.repos[REPO].commits[hub.repos[REPO].at("main")][CARD] == b"theirs"


@pytest.mark.parametrize("step", ["PUT /large/", f"POST /api/models/{REPO}/commit"])
def test_half_an_upload_changes_nothing_and_can_be_repeated(hub, folder, tmp_path, step):
    hub.hold(REPO, {".gitattributes": b""})
    hub.faults[step] = lambda handler: handler.answer(500)
    with pytest.raises(InnsteerError, match="try again.*nothing half done is left") as caught:
        push(folder, REPO)
    assert caught.value.exit_code == 1
    assert len(hub.repos[REPO].commits) == 1
    hub.faults.clear()
    push(folder, REPO)
    pull(REPO, tmp_path / "mine")
    assert files_of(tmp_path / "mine") == files_of(folder)


# --- pulling what cannot be trusted --------------------------------------------------------------


def refused(tmp_path, match, kind=FormatError, **how):
    with pytest.raises(kind, match=match) as caught:
        pull(REPO, tmp_path / "theirs", **how)
    assert list(tmp_path.iterdir()) == [], "nothing is left, hidden or not"
    return caught.value


@pytest.mark.parametrize("name", [HEADER, TENSORS, CARD])
def test_an_altered_file_is_refused(hub, folder, tmp_path, name):
    files = files_of(folder)
    hub.hold(REPO, files | {name: files[name][:-1] + b"!"})
    refused(tmp_path, f"{name} is missing or not the file that was saved")


def test_a_forged_seal_does_not_help(hub, folder, tmp_path):
    header = json.loads((folder / HEADER).read_text())
    hub.hold(REPO, altered(folder, HEADER, json.dumps(header | {"where": "all"}).encode()))
    refused(tmp_path, "its identity is")
    hub.hold(REPO, altered(folder, HEADER, json.dumps(header | {"method": "os.system"}).encode()))
    refused(tmp_path, "method")


@pytest.mark.parametrize("name", ["../steering.json", "a/../../x", "/etc/x", "evil.pkl", "run.py"])
def test_no_other_file_is_asked_for_wherever_it_points(hub, folder, tmp_path, name):
    hub.hold(REPO, files_of(folder) | {name: b"evil"})
    (tmp_path / "home").mkdir()
    assert pull(REPO, tmp_path / "home" / "theirs").left == (name,)
    assert {one.rpartition("/")[2] for one in hub.asked if "/resolve/" in one} == set(LIMITS)
    assert files_of(tmp_path / "home" / "theirs") == files_of(folder)
    assert [path.name for path in tmp_path.rglob("*") if path.is_dir()] == ["home", "theirs"]


@pytest.mark.parametrize("name", [HEADER, SEAL, TENSORS, CARD])
def test_a_repository_without_all_of_the_files_is_no_steering(hub, folder, tmp_path, name):
    files = files_of(folder)
    files.pop(name)
    hub.hold(REPO, files)
    refused(tmp_path, f"has no {name}; expected a steering")


def test_a_file_over_its_bound_is_not_downloaded(hub, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(LIMITS, CARD, 100)
    hub.hold(REPO, files_of(folder))
    refused(tmp_path, "README.md has .* bytes or more; expected <= 100")
    assert not any("/resolve/" in one for one in hub.asked)


def test_an_answer_that_does_not_end_is_cut_off(hub, folder, tmp_path):
    sent = []

    def endless(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        piece = b"x" * 2**16
        try:
            while len(sent) < 1000:
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                sent.append(len(piece))
        except OSError:
            pass
        handler.close_connection = True

    sha = hub.hold(REPO, files_of(folder))
    hub.faults[f"GET /{REPO}/resolve/{sha}/{CARD}"] = endless
    refused(tmp_path, "README.md has .* bytes or more; expected <= 1048576")
    assert len(sent) < 1000


@pytest.mark.parametrize("name", [HEADER, TENSORS])
def test_a_body_that_breaks_off_is_refused(hub, folder, tmp_path, name):
    def half(handler):
        data = files_of(folder)[name]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2])
        handler.close_connection = True

    sha = hub.hold(REPO, files_of(folder))
    hub.faults[f"GET /{REPO}/resolve/{sha}/{name}"] = half
    error = refused(tmp_path, "broke off: .*check the network and try again", InnsteerError)
    assert error.exit_code == 1


@pytest.mark.parametrize("sha", ["main", "0" * 40, "../../x"])
def test_another_commit_than_the_one_asked_for_is_refused(hub, folder, tmp_path, sha):
    commit = hub.hold(REPO, files_of(folder))
    told = {"id": REPO, "sha": sha, "siblings": []}
    hub.faults["GET /api"] = lambda handler: handler.answer(200, told)
    refused(tmp_path, "answers with the commit", revision=commit)


# --- who may, and what is there ------------------------------------------------------------------


def test_a_private_repository_without_a_token_says_how_to_log_in(
    hub, folder, tmp_path, monkeypatch
):
    push(folder, REPO, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(tmp_path, "it is private; check its name; log in with: hf auth login", InputError)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pull(REPO, tmp_path / "mine")


def test_an_unknown_repository_or_revision_is_named(hub, folder, tmp_path):
    refused(tmp_path, f"pulling '{REPO}': no such repository", InputError)
    hub.hold(REPO, files_of(folder))
    refused(tmp_path, "no such revision; expected a branch", InputError, revision="nowhere")


@pytest.mark.parametrize("repo", ["mine", "a/b/c", "../x", "a/..", "http://x/y", "", "a /b"])
def test_what_is_no_name_is_refused_before_anything_is_asked(hub, folder, tmp_path, repo):
    for act in (lambda: pull(repo, tmp_path / "x"), lambda: push(folder, repo)):
        with pytest.raises(InputError, match='expected "owner/name"'):
            act()
    assert hub.asked == []


@pytest.mark.parametrize(
    ("status", "kind", "match"),
    [
        (429, InnsteerError, "the Hub answers with 429"),
        (500, InnsteerError, "the Hub answers with 500"),
        (403, InputError, r"not allowed \(403\)"),
    ],
)
def test_a_hub_that_refuses_is_told_with_what_to_do(hub, folder, tmp_path, status, kind, match):
    sha = hub.hold(REPO, files_of(folder))
    for place in (f"GET /api/models/{REPO}", f"GET /{REPO}/resolve/{sha}/{TENSORS}"):
        hub.faults = {place: lambda handler: handler.answer(status)}
        refused(tmp_path, match, kind)


def test_one_refusal_for_its_rate_is_tried_again(hub, folder, tmp_path):
    sha = hub.hold(REPO, files_of(folder))

    def once(handler):
        hub.faults.clear()
        handler.answer(429)

    hub.faults[f"GET /{REPO}/resolve/{sha}/{CARD}"] = once
    assert pull(REPO, tmp_path / "mine").commit == sha


def test_a_gated_repository_says_where_to_ask(hub, tmp_path):
    hub.faults["GET"] = lambda handler: handler.answer(403, X_Error_Code="GatedRepo")
    refused(tmp_path, "it is gated; ask for access on its page", InputError)


def test_offline_and_without_a_network(hub, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _http.close_session()  # the client asks once, when it is made
    error = refused(tmp_path, "while HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE", InputError)
    assert error.exit_code == 2
    with pytest.raises(InputError, match="while HF_HUB_OFFLINE is set"):
        push(folder, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    _http.close_session()
    error = refused(tmp_path, "broke off: .*check the network and try again", InnsteerError)
    assert error.exit_code == 1


def test_a_folder_that_exists_is_refused_before_anything_is_asked(hub, tmp_path):
    with pytest.raises(InputError, match="exists already"):
        pull(REPO, tmp_path)
    assert hub.asked == []


# --- the command line ----------------------------------------------------------------------------


def test_push_and_pull_follow_each_other_on_the_command_line(
    hub, folder, tmp_path, monkeypatch, capsys
):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["innsteer", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    code, out, err = run("push", folder, REPO, "--private")
    commit = hub.repos[REPO].at("main")
    assert code == 0 and f"-> {REPO} at {commit}" in out, err
    assert out.splitlines()[-1] == (
        f"next: innsteer pull {REPO} --revision {commit} --out mood-steering"
    )
    code, out, err = run(*out.splitlines()[-1].split()[2:])
    assert code == 0 and commit in out and err == "", err
    assert files_of(tmp_path / "mood-steering") == files_of(folder)
    hub.hold(REPO, {"[red]run.py": b""})
    code, out, err = run("pull", REPO, "-o", "again", "--json")
    facts = json.loads(out)
    assert facts["left"] == ["[red]run.py"] and facts["commit"] == hub.repos[REPO].at("main")
    code, out, err = run("pull", REPO, "-o", "third")
    assert code == 0 and "no part of a steering: '[red]run.py'" in err
    code, out, err = run("pull", "someone/none", "-o", "none")
    assert code == 2 and err.startswith("error: pulling 'someone/none': no such repository")
