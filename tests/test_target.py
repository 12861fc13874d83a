"""Target files: what is shipped is complete and sourced, and each mistake in a file is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgeq
from edgeq.errors import RuntimeUnavailableError, TargetError
from edgeq.num.quant import parse_quant
from edgeq.target.detect import (
    cpu_flags,
    elsewhere,
    family,
    isa_fingerprint,
    local_name,
    machine,
    missing_isa,
    parse_cpuinfo,
)
from edgeq.target.environment import python_for
from edgeq.target.load import KEYS, LIMIT_KEYS, list_targets, load_target, target_names, targets_folder

SHIPPED = target_names()


def write(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


MINIMAL = """
summary = "a test"
device = "local"
provider = "CPUExecutionProvider"
opset = 21
activations = "u8/tensor/asym"
weights = "i8/channel"
verified = "here"
"""


def test_shipped_targets_load() -> None:
    wanted = (
        "android-nnapi android-xnnpack cpu-arm64 cpu-arm64-a72 cpu-arm64-a76 cpu-arm64-i8mm cpu-openvino cpu-x64-avx2 "
        "cpu-x64-vnni gpu-cuda gpu-directml gpu-tensorrt gpu-webgpu npu-coreml npu-openvino npu-qnn-v73 npu-qnn-v75 "
        "npu-qnn-v79 npu-qnn-v81 npu-rknn-rk3588 npu-vitisai web-wasm web-webgpu"
    )
    assert [target.name for target in list_targets()] == wanted.split()
    vnni, avx2, arm = load_target("cpu-x64-vnni"), load_target("cpu-x64-avx2"), load_target("cpu-arm64")
    assert vnni.activations == avx2.activations == parse_quant("u8/tensor/asym")
    assert arm.activations == parse_quant("i8/tensor/asym")
    assert {target.weights for target in (vnni, avx2, arm)} == {parse_quant("i8/channel")}
    assert (avx2.limits.pair_sum_max, vnni.limits.pair_sum_max, arm.limits.pair_sum_max) == (32767, *[2**31 - 1] * 2)
    assert {target.opset for target in (vnni, avx2, arm)} == {21}


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_fact_has_a_source(name: str) -> None:
    keys = tomllib.loads((targets_folder() / f"{name}.toml").read_text(encoding="utf-8"))
    facts = set(keys) - {"summary", "verified", "extends", "sources", "limits"}
    facts |= {f"limits.{key}" for key in keys.get("limits", {})}
    assert facts <= set(keys["sources"])


def test_readme_documents_every_key() -> None:
    text = (targets_folder() / "README.md").read_text(encoding="utf-8")
    documented = [*(key for key in KEYS if key != "limits"), *(f"limits.{key}" for key in LIMIT_KEYS)]
    rows = [key.replace("choices", "choices.OPTION") for key in documented]
    assert [key for key in rows if f"| `{key}` |" not in text] == []


def test_extends_replaces_keys_and_merges_tables(tmp_path: Path) -> None:
    parent = (
        MINIMAL + "isa = ['avx2']\n[session]\na = '1'\nb = '2'\n[sources]\nisa = 'manual'\n[limits]\nbias_bits = 16\n"
    )
    write(tmp_path, "parent", parent)
    child = "extends = 'parent.toml'\nsummary = 'child'\nverified = 'documentation'\nisa = []\nthreads = [4]\n"
    target = load_target(write(tmp_path, "child", child + "[session]\nb = '3'\n[limits]\npair_sum_max = 64\n"))
    assert (target.name, target.summary, target.verified, target.extends) == (
        "child",
        "child",
        "documentation",
        "parent.toml",
    )
    assert (target.isa, target.threads, target.session) == ((), (4,), {"a": "1", "b": "3"})
    assert (target.limits.bias_bits, target.limits.pair_sum_max) == (16, 64)
    assert target.sources == {"isa": "manual"}


def test_extends_a_shipped_target(tmp_path: Path) -> None:
    text = "extends = 'cpu-x64-avx2'\nsummary = 'gateway'\nverified = 'documentation'\n"
    assert load_target(write(tmp_path, "gateway", text)).limits.pair_sum_max == 32767


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (MINIMAL + "weigths = 'i8/channel'\n", "unknown key 'weigths'", "did you mean 'weights'?"),
        (MINIMAL + "[limits]\nbias_bit = 32\n", "unknown key 'limits.bias_bit'", "did you mean 'bias_bits'?"),
        (MINIMAL + "[sources]\nopsets = 'x'\n", "unknown key 'sources.opsets'", "did you mean 'opset'?"),
        (MINIMAL.replace("opset = 21", "opset = '21'"), "key 'opset' is '21', expected a positive integer", "README"),
        (MINIMAL.replace("opset = 21", "opset = true"), "key 'opset' is True, expected a positive integer", "README"),
        (MINIMAL + "isa = 'avx2'\n", "key 'isa' is 'avx2', expected a list of CPU flags", "README"),
        (MINIMAL + "threads = []\n", "key 'threads' is [], expected a list of positive integers", "README"),
        (MINIMAL + "session = {a = 1}\n", "key 'session' is {'a': 1}, expected a table of texts", "README"),
        (MINIMAL + "[limits]\nmin_scale = 0.0\n", "expected a table of pair_sum_max", "README"),
        (MINIMAL.replace('"here"', '"yes"'), "expected 'here' or 'emulator'", "README"),
        (MINIMAL.replace("u8/tensor/asym", "u9/tensor"), "key 'activations': unknown number format 'u9'", "use i2"),
        (MINIMAL.replace("i8/channel", "i8/canal"), "key 'weights': unknown word 'canal'", "channel"),
        (MINIMAL.replace("opset = 21", ""), "key 'opset' is missing", "extends"),
        (MINIMAL.replace('summary = "a test"', ""), "key 'summary' is missing", "isn't inherited"),
        (MINIMAL + "extends = 'cpu-x64-vnnni'\n", "unknown target 'cpu-x64-vnnni'", "did you mean 'cpu-x64-vnni'?"),
        (MINIMAL + "extends = 'gone.toml'\n", "gone.toml not found", "give a .toml file"),
        (MINIMAL + "opset = = 3\n", "not a TOML file", "targets/README.md"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, message: str, hint: str) -> None:
    path = write(tmp_path, "mine", text)
    with pytest.raises(TargetError) as error:
        load_target(path)
    assert message in error.value.message
    assert hint in error.value.hint
    assert "mine" in error.value.message or "target" in error.value.message


def test_circle_of_parents_is_named(tmp_path: Path) -> None:
    for name, parent in (("a", "b"), ("b", "c"), ("c", "a")):
        write(tmp_path, name, MINIMAL + f"extends = '{parent}.toml'\n")
    with pytest.raises(TargetError, match="circle: a -> b -> c -> a"):
        load_target(str(tmp_path / "a.toml"))


def test_unknown_names_and_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"unknown target 'cpu-arm46'\n  try: did you mean 'cpu-arm64'\?"):
        load_target("cpu-arm46")
    with pytest.raises(TargetError, match="did you mean 'local'"):
        load_target("locale")
    with pytest.raises(TargetError, match=r"none\.toml not found"):
        load_target(str(tmp_path / "none.toml"))


@given(st.text("abcdefghijklmnopqrstuvwxyz_. -", min_size=1, max_size=20).filter(lambda key: key not in KEYS))
def test_any_unknown_key_is_refused(key: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), "mine", f'"{key}" = 1\n' + MINIMAL)
        with pytest.raises(TargetError, match="unknown key"):
            load_target(path)


def test_targets_are_found_beside_and_inside_the_package(tmp_path: Path) -> None:
    package = Path(next(iter(edgeq.__path__)))
    assert targets_folder().name == "targets"
    shutil.copytree(package, tmp_path / "edgeq", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(targets_folder(), tmp_path / "edgeq" / "targets", dirs_exist_ok=True)
    words = "from edgeq.target.load import target_names, targets_folder; print(targets_folder(), *target_names())"
    command = [sys.executable, "-c", words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env={"PYTHONPATH": "."})
    assert done.stdout.split() == [str(tmp_path / "edgeq" / "targets"), *SHIPPED]


def test_cpuinfo_is_read_on_both_families() -> None:
    x64 = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor : 1\nflags : fpu\n"
    arm = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"
    assert parse_cpuinfo(x64) == {"fpu", "avx2", "avx512_vnni"}
    assert parse_cpuinfo(arm) == {"fp", "asimd", "asimddp", "i8mm"}
    assert parse_cpuinfo("") == frozenset()


@pytest.mark.parametrize(
    ("machine_name", "flags", "name"),
    [
        ("x64", {"avx2", "avx512_vnni"}, "cpu-x64-vnni"),
        ("x64", {"avx2", "avx_vnni"}, "cpu-x64-vnni"),
        ("x64", {"avx2", "avx512f"}, "cpu-x64-avx2"),
        ("x64", set(), "cpu-x64-avx2"),
        ("arm64", {"asimd"}, "cpu-arm64"),
    ],
)
def test_family_follows_the_flags(machine_name: str, flags: set[str], name: str) -> None:
    assert family(machine_name, frozenset(flags)) == name


def test_unknown_machine_is_named() -> None:
    with pytest.raises(TargetError, match="found 'riscv64', expected x64 or arm64"):
        family("riscv64", frozenset())


def test_local_is_this_machine() -> None:
    assert load_target("local").name == local_name() == family(machine(), cpu_flags())
    assert missing_isa(load_target("local").isa, cpu_flags()) == ()
    assert missing_isa(("avx2", "avx512_vnni|avx_vnni"), frozenset({"avx_vnni"})) == ("avx2",)
    assert isa_fingerprint() == isa_fingerprint()
    assert isa_fingerprint().startswith(machine() + "-")


@pytest.mark.parametrize("name", SHIPPED)
def test_missing_provider_says_what_to_install(name: str) -> None:
    """Every target either opens a session here or names what is missing and how to get it; none falls back."""
    target = load_target(name)
    try:
        python_for(target.execution)
    except RuntimeUnavailableError as error:
        assert target.provider in error.message
        assert error.hint.startswith(target.install)
        assert error.hint != ""


def test_option_that_is_no_choice_is_named_with_those_that_are(tmp_path: Path) -> None:
    text = MINIMAL + "[options]\nsoc = '3'\n[choices]\nsoc = {1 = 'the first', 2 = 'the second'}\n"
    with pytest.raises(TargetError, match=r"options.soc is '3', which isn't known here") as error:
        load_target(write(tmp_path, "mine", text))
    assert error.value.hint == "known: 1 (the first), 2 (the second)"
    assert load_target(write(tmp_path, "mine", text.replace("'3'", "'2'"))).options == {"soc": "2"}


def test_where_latency_means_nothing_is_said() -> None:
    emulated = replace(load_target("cpu-x64-vnni"), emulator=(machine(),))
    assert f"on {machine()} machines" in elsewhere(emulated)
    assert elsewhere(load_target("local")) == ""
    assert elsewhere(replace(load_target("local"), isa=("abacus",))).startswith("this CPU lacks abacus")
