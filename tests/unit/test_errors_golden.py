"""The whole texts of errors. `tests/golden/errors/NAME.yml` is a bad recipe, `NAME.txt` what a person reads about it.

After changing a message on purpose: `KITTYBUILD_GOLDEN=write pytest tests/unit/test_errors_golden.py`, and read the
diff.
Paths in the texts count from the recipe's folder, which holds the checkpoints of `zoo`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from kittybuild import api
from kittybuild.planner.machine import Machine
from tests.helpers import pico_adapter, pico_llama, write_json
from tests.planning import errors_of, header_bytes, llama, write_header
from tests.torchfiles import machine, named, number, one, rebuilt, text, zip_of

GOLDEN = Path(__file__).parents[1] / "golden" / "errors"
HERE = Machine("2.13.0", "2.4.6", "AVX2")
NAMES = sorted(path.stem for path in GOLDEN.glob("*.yml"))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound and unsound checkpoints by name."""
    folder = tmp_path_factory.mktemp("zoo")
    pico_llama(folder / "base", 1)
    pico_llama(folder / "words", 1, tokenizer=True)
    for name in ("a", "b"):
        write_header(folder / name, llama())
    write_header(folder / "deep", llama(layers=3))
    write_header(folder / "wide", llama(vocab=80))
    write_header(folder / "tied", llama(tie=True))
    write_header(folder / "short", llama(layers=1))
    late = {name: spec for name, spec in llama(layers=3).items() if ".layers.0." not in name}
    write_header(folder / "late", late)
    for name, size in (("small", 2), ("large", 3)):
        write_header(folder / name, {"x": ("F32", (size,))})
    write_header(folder / "other", {f"h.{name}": spec for name, spec in llama().items()})
    pico_adapter(folder / "joy", folder / "base", 2)
    pico_adapter(folder / "turned", folder / "base", 3, fan_in_fan_out=True)
    pico_adapter(folder / "dora", folder / "base", 4, use_dora=True)
    pico_adapter(folder / "mixed", folder / "base", 4, use_qalora=True, target_parameters=["experts"])
    pico_adapter(folder / "rank", folder / "base", 5)
    config = folder / "rank" / "adapter_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"r": 4', '"r": 8'), encoding="utf-8")
    _unsound(folder)
    _pickles(folder)
    return folder


def _unsound(folder: Path) -> None:
    weights = write_header(folder / "truncated", llama()) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for name, file in (("lost", "model-00002-of-00002.safetensors"), ("escaping", "../../weights.safetensors")):
        (write_header(folder / name, llama()) / "model.safetensors").unlink()
        write_json(folder / name / "model.safetensors.index.json", {"weight_map": {"x": file}})
    (folder / "nothing").mkdir()
    write_header(folder / "numbers", {"x": ("F32", (2,))})
    weights = folder / "numbers" / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"F32"', b'"F31"'))


def _pickles(folder: Path) -> None:
    """Files of torch.save that lie or attack, and quantized weights whose scales are not theirs."""
    zip_of(folder / "evil.bin", one(named("posix.system") + b"(" + text("touch owned") + b"tR"))
    zip_of(folder / "outside.pt", one(rebuilt(at=number(3))))
    zip_of(folder / "expanded.pt", one(rebuilt(size=number(1 << 40) + b"\x85", stride=number(0) + b"\x85")))
    zip_of(folder / "script.pt", one(rebuilt()), **{"constants.pkl": machine(b")")})
    zip_of(folder / "big.pth", one(rebuilt()), byteorder=b"big")
    inner = b"}" + text("b") + rebuilt() + b"s"
    zip_of(folder / "twice.pt", machine(b"}(", text("a.b"), rebuilt(), text("a"), inner, b"u"))
    with zipfile.ZipFile(folder / "packed.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x/data.pkl", one(rebuilt()))
    (folder / "cut.bin").write_bytes(one(rebuilt())[:40])
    (folder / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    weight = {"x.weight": ("F8_E4M3", (300, 4)), "x.weight_scale": ("F32", (2, 1))}
    (folder / "scales.safetensors").write_bytes(header_bytes(weight))


def errors(file: Path) -> str:
    """What reading and planning a recipe says."""
    found = errors_of(planned, str(file))
    return "".join(f"{error}\n" for error in found).replace(f"{file.parent}/", "")


def planned(file: str) -> None:
    prepared = api.prepare(api.read_recipe(file, offline=True), offline=True)
    api.plan(replace(prepared, machine=HERE), None)


@pytest.mark.parametrize("name", NAMES)
def test_an_error_says_what_where_and_the_way_out(name: str, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo)
    text = errors(Path(shutil.copy(GOLDEN / f"{name}.yml", zoo / "recipe.yml")))
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("KITTYBUILD_GOLDEN") == "write":
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def test_mistakes_of_text_sources_shapes_layers_and_tokenizers_come_in_one_run(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(zoo)
    found = errors_of(planned, shutil.copy(GOLDEN / "twelve.yml", zoo / "recipe.yml"))
    assert len(found) == 12
    assert {error.code[:3] for error in found} == {"KB1", "KB2", "KB3"}


def test_they_come_in_less_than_a_second_and_no_weights_are_read(zoo: Path, tmp_path: Path) -> None:
    """Seconds of the processor, so that a busy machine does not count; each model has 64 GB more, which are a hole."""
    folder = shutil.copytree(zoo, tmp_path / "zoo")
    for name in ("base", "wide", "a", "other"):
        enlarge(folder / name / "model.safetensors")
    shutil.copy(GOLDEN / "twelve.yml", folder / "recipe.yml")
    absent = "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'numpy'))"
    command = [
        sys.executable,
        "-c",
        f"{absent}\nfrom kittybuild.cli import main\nmain()",
        "plan",
        "recipe.yml",
        "--json",
    ]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    seconds = []
    for _ in range(2):  # the first may have to compile the modules
        before = os.times()
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert len(json.loads(done.stdout)["errors"]) == 12
    assert min(seconds) < 1


def enlarge(file: Path) -> None:
    """A tensor more, at the end of a safetensors file: zeros that take no room on the disk."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header, size = json.loads(data[8:end]), len(data) - end
    header["vast"] = {"dtype": "BF16", "shape": [1 << 35], "data_offsets": [size, size + (1 << 36)]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    os.truncate(file, 8 + len(text) + size + (1 << 36))


def test_offline_a_text_of_mistakes_asks_no_server(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(zoo)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub = "{merge_method: passthrough, models: [{model: org/name}]}"
    text = f"kittybuild: 1\nstages:\n  a: {hub}\n  b: {hub.replace('passthrough', 'pasthrough')}\n"
    (zoo / "recipe.yml").write_text(text, encoding="utf-8")
    found = errors_of(partial(api.read_recipe, offline=True), "recipe.yml")
    assert [error.code for error in found] == ["KB104", "KB250"]


def test_there_is_no_text_without_its_recipe() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.txt")) == NAMES
