"""Settling: what ships is accurate and proven, repairs find the culprit, and the report says why the rest does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq import steps
from edgeq.context import Context
from edgeq.ir import io, query
from edgeq.lower.emit import emit
from edgeq.quantizer import Quantizer
from edgeq.report.record import Check
from edgeq.report.recorder import Recorder
from edgeq.run.timing import Ratio
from edgeq.search import settle as settling
from edgeq.search.draft import Draft
from edgeq.search.settle import Settled, settle
from edgeq.source import read_model
from edgeq.target import kernels
from edgeq.target.load import load_target
from tests.graphs import graph, normal, number, ops, random_feed
from tests.placed import VNNI, oracle_of, samples_of
from tests.tabled import needs_library

POINT = "Conv<kernel_shape=[1,1]>"
NET = (
    "(float[1,128,20,20] t0) => (float[1,128,20,20] t6) { "
    + " ".join(f"s{i} = {POINT}(t{i - 1}, w{i}, b) t{i} = Relu(s{i})" for i in range(1, 7))
    + " }"
)
WEIGHTS = {"b": normal(128), **{f"w{i}": normal(128, 128, 1, 1) * 0.1 for i in range(1, 7)}}
pytestmark = pytest.mark.slow
EVENED = "evened"
Rule = Callable[[set[str]], bool]


def settled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: Rule, text: str = NET, snr_db: float = 20.0,
    weights: dict[str, NDArray[Any]] = WEIGHTS, drop: Callable[[list[set[str]]], float] = lambda seen: 0.0,
    **options: str,
) -> tuple[Settled, Context, list[set[str]]]:  # fmt: skip
    """A model settled under a judge that passes a file by the names of its float Convs and by whether weights are
    evened; and what the judge saw."""
    monkeypatch.setattr(settling, "DECIDE_SECONDS", 0.5)
    # A profile would let the load of the machine decide what is planned; default costs are the same everywhere.
    monkeypatch.setattr(Quantizer, "learn_costs", lambda *_: None)
    model, _ = read_model(graph(text, weights), opset=21)
    feeds = [random_feed(model) for _ in range(4)]
    target = replace(load_target(VNNI), threads=(1,))
    context = Context(target, oracle_of(VNNI), samples_of(feeds), Recorder(), threads=1)
    seen: list[set[str]] = []

    def judge(artifact: Path) -> Sequence[Check]:
        file = io.read(artifact).graph
        found = {str(n.name) for n in file if n.op_type == "Conv" and query.is_constant(n.inputs[1])}
        found |= {EVENED for name in file.initializers if "_equalized" in name}
        seen.append(found)
        passed = rule(found)
        return [
            Check("cosine", 0.999 if passed else 0.5, limit=0.99, limit_kind="min", passed=passed),
            Check("snr_db", snr_db + 3.0 * len(found)),
            Check("top1_drop", drop(seen)),
        ]

    emit(model.clone(), target, tmp_path / "float.onnx")
    floats = [Draft("float as given", tmp_path / "float.onnx", model)]
    return settle(floats, steps.quantize(model, context, **options), judge, feeds, context, tmp_path), context, seen


def codes_of(context: Context) -> set[str]:
    return {notice.code for notice in context.recorder.notices}


def test_float_ships_when_nothing_else_is_accurate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, context, seen = settled(tmp_path, monkeypatch, lambda convs: False)
    assert found.chosen is found.best_float
    assert found.chosen.name == "float as given"
    assert [row["name"] for row in found.trials if row["ships"]] == ["float as given"]
    refused = [row for row in found.trials if not row["ships"]]
    assert len(refused) == len(seen) >= 2, "drafts and their repairs"
    assert len({row["name"] for row in found.trials}) == len(found.trials)
    assert {row["why"] for row in refused} == {"cosine is 0.5, limit 0.99"}
    assert "float-ships" in codes_of(context)
    assert "no quantized draft kept the accuracy limits" in context.recorder.notices[-1].message


def test_an_accurate_draft_ships_only_if_proven_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, context, _ = settled(tmp_path, monkeypatch, lambda convs: True)
    ships = [row for row in found.trials if row["ships"]]
    assert len(ships) == 1
    assert ships[0]["name"] == found.chosen.name
    if found.chosen.plan is None:
        assert "was proven faster on this machine" in context.recorder.notices[-1].message
    else:
        assert ships[0]["latency_ratio"][0] < 1
        assert found.chosen.path.is_file()
        assert found.chosen.coverage is not None
        assert found.chosen.coverage.unexplained == ()
        assert "float-ships" not in codes_of(context)


@pytest.mark.parametrize(
    ("first", "again"), [((0.9, 1.1), (0.9, 0.95)), ((0.9, 1.1), (0.9, 1.02)), ((0.9, 0.95), None)]
)
def test_simulated_doubt_is_raced_again_longer(
    first: tuple[float, float], again: tuple[float, float] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How busy the machine is can't be chosen, so the clock's answers are."""
    asked: list[tuple[list[str], float]] = []

    def race(floats: list[Draft], drafts: list[Draft], *_: object) -> tuple[dict[str, list[Ratio]], Draft]:
        value, high = first if not asked else again or (2.0, 2.0)
        asked.append(([draft.name for draft in drafts], float(_[-1])))  # type: ignore[arg-type]
        answers = {draft.name: [Ratio(value, value - 0.05, high)] for draft in drafts if draft.name != "slow"}
        return {**answers, "slow": [Ratio(1.2, 1.1, 1.3)], "float": [Ratio(1, 1, 1)]}, floats[0]

    monkeypatch.setattr(settling, "_race", race)
    model, _ = read_model(graph(NET, WEIGHTS), opset=21)
    floats, drafts = ([Draft(name, tmp_path / name, model) for name in names] for names in (["float"], ["a", "slow"]))
    context = Context(load_target(VNNI), oracle_of(VNNI), samples_of([random_feed(model)]), Recorder())
    ratios, best, proven = settling._proven(floats, drafts, [], context)
    races = [(["a", "slow"], settling.DECIDE_SECONDS), (["a"], settling.DOUBT_SECONDS)]
    assert asked == (races if again else races[:1])
    assert best.name == "float"
    assert [draft.name for draft in proven] == (["a"] if (again or first)[1] < 1 else [])
    assert ratios["slow"][0].value == 1.2


def test_a_repair_that_changes_nothing_is_not_judged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settling, "_counts", lambda noise: [1, 1, 2])
    found, _, seen = settled(tmp_path, monkeypatch, lambda convs: False)
    names = [str(row["name"]) for row in found.trials]
    assert any("1 most sensitive" in name for name in names)
    assert any("2 most sensitive" in name for name in names)
    assert len(names) == len(set(names)) == len(seen) + 1, "the float file is not judged here"


def test_repair_gives_back_the_culprit_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that accepts files only with the last convolution in float, whose noise nothing dampens."""
    found, _, seen = settled(tmp_path, monkeypatch, lambda convs: "Conv_node_6" in convs)
    accurate = [row for row in found.trials if "cosine is" not in str(row["why"])]
    assert any("most sensitive kept float" in str(row["name"]) for row in accurate)
    plain, evened = ([convs for convs in seen if (EVENED in convs) is marked] for marked in (False, True))
    assert plain
    for files in filter(None, (plain, evened)):
        assert "Conv_node_6" in files[-1], "each repair ends with its first accurate file"
        assert len(files[-1] - {EVENED}) < 6, "the rest stays integer"
        assert all("Conv_node_6" not in convs for convs in files[:-1])


def test_channels_are_evened_out_before_anything_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "(float[1,64,20,20] x) => (float[1,64,20,20] y) { a = Conv<kernel_shape=[1,1]>(x, w1) r = Relu(a) "
        "d = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=64>(r, w2) y = Conv<kernel_shape=[1,1]>(d, w3) }"
    )
    uneven = np.geomspace(1, 100, 64, dtype=np.float32)[:, None, None, None]
    weights = {"w1": normal(64, 64, 1, 1) * uneven, "w2": normal(64, 1, 3, 3) / uneven, "w3": normal(64, 64, 1, 1)}
    found, context, _ = settled(tmp_path, monkeypatch, lambda convs: EVENED in convs, text, weights=weights)
    accurate = [row for row in found.trials if "cosine is" not in str(row["why"]) and row["name"] != "float as given"]
    assert accurate
    assert all(", channels evened" in str(row["name"]) for row in accurate)
    assert not any("kept float" in str(row["name"]) for row in found.trials), "nothing was given up"
    snr = next(facts.facts["snr_db"] for facts in context.recorder.steps if facts.name == "equalize")
    assert snr[1] > snr[0] + 3
    assert found.quantizer is not None
    assert any("_equalized" in name for name in found.quantizer.model.graph.initializers)


def test_relief_gives_up_speed_for_less_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, context, seen = settled(tmp_path, monkeypatch, lambda convs: True, relief="6")
    relieved = [row for row in found.trials if "6 dB relieved" in str(row["name"])]
    assert len(relieved) == 1
    assert 0 < len(seen[-1] - {EVENED}) < 6, "some convolutions are float again, some are not"
    if relieved[0]["latency_ratio"][0] < 1 and found.chosen.plan is not None:
        assert found.chosen.name == relieved[0]["name"]
    assert [facts.name for facts in context.recorder.steps].count("sensitivity") == 1


def test_relief_goes_on_until_half_of_the_drop_is_won_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _, seen = settled(
        tmp_path, monkeypatch, lambda convs: True, relief="3",
        drop=lambda seen: 0.004 if sum(map(bool, seen)) < 2 else 0.002,
    )  # fmt: skip
    assert [bool(convs) for convs in seen[-3:]] == [False, True, True]
    relieved = {row["name"]: row for row in found.trials if "relieved" in str(row["name"])}
    assert [row["checks"]["top1_drop"] for row in relieved.values()] == [0.004, 0.002]
    if all(row["latency_ratio"][0] < 0.9 for row in relieved.values()):
        assert found.chosen.name == list(relieved)[1], "the one that drops as much as before is worth less"


def test_nothing_is_relieved_where_noise_is_small_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, context, _ = settled(tmp_path, monkeypatch, lambda convs: True, snr_db=45.0, relief="6")
    assert not any("relieved" in str(row["name"]) for row in found.trials)
    assert "sensitivity" not in [facts.name for facts in context.recorder.steps]


def test_nothing_to_quantize_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "(float[1,32,16,16] x) => (float[1,32,16,16] y) { t = Tanh(x) y = Erf(t) }"
    found, context, seen = settled(tmp_path, monkeypatch, lambda convs: True, text)
    assert (found.chosen.name, seen) == ("float as given", [])
    assert codes_of(context) == {"no-gain", "nothing-to-quantize", "float-ships"}
    assert "nothing could be quantized" in context.recorder.notices[-1].message


ATTENTION = """(float[1,64,64] x) => (float[1,64,64] y) {
    q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) qr = Reshape(q, split) kr = Reshape(k, split)
    vr = Reshape(v, split) qt = Transpose<perm=[0,2,1,3]>(qr) kt = Transpose<perm=[0,2,3,1]>(kr)
    vt = Transpose<perm=[0,2,1,3]>(vr) s = MatMul(qt, kt) c = Mul(s, scale) p = Softmax<axis=-1>(c) o = MatMul(p, vt)
    t = Transpose<perm=[0,2,1,3]>(o) j = Reshape(t, joined) y = MatMul(j, wo) }"""


def test_attention_is_tried_whole_in_float(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside its products in integers, as no profile of its parts tells what one kernel for all of them costs."""
    weights: dict[str, NDArray[Any]] = {name: normal(64, 64) * 0.1 for name in ("wq", "wk", "wv", "wo")}
    weights |= {"split": np.array([0, 0, 4, 16]), "joined": np.array([0, 0, 64]), "scale": number(0.25)}
    found, _, _ = settled(tmp_path, monkeypatch, lambda convs: True, ATTENTION, weights=weights)
    shares = {str(row["name"]): row["integer_macs_share"] for row in found.trials}
    assert shares["int8 everywhere it fuses"] == 1.0 and shares["int8 around fused kernels"] == pytest.approx(2 / 3)
    files = {
        name: ops(io.read(tmp_path / f"int8-{name}.onnx")) for name in ("everywhere-it-fuses", "around-fused-kernels")
    }
    assert ["Attention" in file for file in files.values()] == [False, True]
    assert files["around-fused-kernels"].count("MatMul") == 4


def test_files_with_and_without_own_kernels_are_raced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_library()
    text = f"""(float[1,128,20,20] x) => (float[1,128,20,20] y) {{
        a = {POINT}(x, w1, b) s = Sigmoid(a) h = Mul(a, s) y = {POINT}(h, w2, b) }}"""
    found, context, seen = settled(tmp_path, monkeypatch, lambda convs: True, text)
    rows = {str(row["name"]): row for row in found.trials}
    tabled = {name: row for name, row in rows.items() if name.endswith(", own kernels")}
    assert tabled and all(row["latency_ratio"] for row in tabled.values())
    assert len(seen) == len(rows) - 1, "each is judged, but for the float file"
    assert kernels.uses(found.chosen.path) == (found.chosen.name in tabled)
    shipped = found.chosen.coverage
    assert shipped is None or ("Table" in shipped.kernels) == (found.chosen.name in tabled)
    monkeypatch.setattr(kernels, "here", lambda: "no compiler")
    (tmp_path / "alone").mkdir()
    found, context, _ = settled(tmp_path / "alone", monkeypatch, lambda convs: True, text)
    assert not any("own kernels" in str(row["name"]) for row in found.trials)
    assert "no-kernels" in codes_of(context)
