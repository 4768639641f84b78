"""Recording to disk holds no rows: the memory of a whole process, as the kernel counts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import ctypes, json, sys, tempfile
from pathlib import Path
sys.path.insert(0, {tests!r})
import tiny
from innsteer.backends import hf
from innsteer.contrast import Contrast, Item
from innsteer.site import STREAMS, Site

few, many, hf.WINDOW = {few}, {many}, 500
model = tiny.tiny_language_model("llama", num_hidden_layers=2, hidden_size=96)
sites = [Site(layer, stream) for layer in (0, 1) for stream in STREAMS][:{sites}]
items = tuple(Item(str(n), f"Is {{n}} odd?", None, "Yes", None, str(n)) for n in range(many))
libc, held = ctypes.CDLL(None), []

def measure(*_):
    # What is free already is no memory held: the allocator keeps more or less of it.
    libc.malloc_trim(0)
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    held.append(int(line.split()[1]) * 1024)

most = []
with tempfile.TemporaryDirectory() as home:
    for count in (few, many):
        contrast = Contrast("odd", "open", items[:count])
        backend = hf.HF(model, batch_tokens=8192)
        backend.record_to(Path(home) / str(count), contrast, sites, progress=measure)
        most.append(max(held))
print(json.dumps(most))
"""


def held(few, many, sites=12):
    """The most bytes held while few, and then many, texts are recorded."""
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), few=few, many=many, sites=sites)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_recording_to_disk_takes_no_more_memory_for_more_rows():
    few, many = held(1_000, 6_000)
    # The rows of 5,000 texts at twelve sites are 23 MiB; the tokenizer keeps words that it has met.
    assert many - few < 8 * 2**20, f"{(many - few) / 2**20:.1f} MiB more"
