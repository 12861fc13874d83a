"""The validator against plain numpy over the outputs of ONNX Runtime, and its limits and messages."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgeq.errors import ModelError, SampleError, UsageError
from edgeq.num.intervals import Interval
from edgeq.report.record import Check
from edgeq.run.record import Samples
from edgeq.run.timing import TimedConfig
from edgeq.validator import Judge, accuracy, latency, size, validate
from edgeq.validator.limits import held
from edgeq.validator.score import Scores, jackknife, score_of
from tests.zoo.sentences import retrieval_at_1

CLASSES = 5
COUNT = 60
RNG = np.random.default_rng(0)
WEIGHT = RNG.normal(size=(8, CLASSES)).astype(np.float32)
WORSE = (WEIGHT + 0.3 * RNG.normal(size=WEIGHT.shape)).astype(np.float32)
INPUTS = RNG.normal(size=(COUNT, 8)).astype(np.float32)
LABELS = tuple((INPUTS @ WEIGHT + RNG.normal(size=(COUNT, CLASSES))).argmax(1).tolist())


def save(path: Path, weight: np.ndarray, *, softmax: bool = False, name: str = "y", shape: list | None = None) -> Path:
    """``name = x W`` or its softmax; x f32[…, 8]."""
    shape = shape or ["n", 8]
    nodes = [helper.make_node("MatMul", ["x", "W"], ["p" if softmax else name])]
    nodes += [helper.make_node("Softmax", ["p"], [name])] if softmax else []
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [*shape[:-1], weight.shape[1]])],
        [numpy_helper.from_array(weight, "W")],
    )
    return save_graph(path, graph)


def save_graph(path: Path, graph: onnx.GraphProto) -> Path:
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def samples_of(arrays: np.ndarray, labels: tuple | None = None, name: str = "x") -> Samples:
    return Samples("test", len(arrays), "0", lambda index: {name: arrays[index : index + 1]}, labels)


def by_name(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def run(path: Path, x: np.ndarray) -> np.ndarray:
    return np.asarray(onnxruntime.InferenceSession(path).run(None, {"x": x})[0], np.float64)


def test_every_accuracy_number_is_what_numpy_says(tmp_path):
    reference, artifact = save(tmp_path / "r.onnx", WEIGHT), save(tmp_path / "a.onnx", WORSE)
    checks = by_name(accuracy(reference, artifact, samples_of(INPUTS, LABELS)))
    r, t = run(reference, INPUTS), run(artifact, INPUTS)
    snr = 10 * np.log10((r**2).sum(1) / ((r - t) ** 2).sum(1))
    cosine = (r * t).sum(1) / np.linalg.norm(r, axis=1) / np.linalg.norm(t, axis=1)
    truth = np.array(LABELS)
    expected = {
        "snr_db": snr.mean(),
        "cosine": cosine.mean(),
        "max_abs": np.abs(r - t).max(),
        "agreement_top1": np.mean(r.argmax(1) == t.argmax(1)),
        "top1": np.mean(t.argmax(1) == truth),
        "top1_reference": np.mean(r.argmax(1) == truth),
        "top1_drop": np.mean(r.argmax(1) == truth) - np.mean(t.argmax(1) == truth),
    }
    assert checks.keys() == expected.keys()
    for name, value in expected.items():
        assert checks[name].value == pytest.approx(value, rel=1e-4, abs=1e-9), name
        assert checks[name].samples == COUNT
        if name != "max_abs":
            assert checks[name].low <= checks[name].value <= checks[name].high


def test_a_model_judged_against_itself_passes_every_default(tmp_path):
    reference = save(tmp_path / "r.onnx", WEIGHT)
    checks = by_name(accuracy(reference, reference, samples_of(INPUTS, LABELS)))
    assert all(check.passed for check in checks.values())
    assert checks["agreement_top1"].value == 1 and checks["agreement_top1"].limit == 0.97
    assert checks["top1_drop"].value == 0
    assert checks["top1_drop"].limit == pytest.approx(max(0.005, 1 / COUNT), rel=0.01)
    assert checks["cosine"].limit is None


def test_one_judge_gives_the_same_answer_each_time_and_from_an_ir_model(tmp_path, monkeypatch):
    from edgeq.validator import judge as module

    reference, artifact = save(tmp_path / "r.onnx", WEIGHT), save(tmp_path / "a.onnx", WORSE)
    judge = Judge(onnx_ir.load(reference), samples_of(INPUTS, LABELS))
    first = judge(artifact)
    assert judge(artifact) == first
    monkeypatch.setattr(module, "CACHE_BYTES", 100)  # nearly nothing is kept: the reference runs again
    assert Judge(reference, samples_of(INPUTS, LABELS))(artifact) == first


@pytest.mark.parametrize(
    ("options", "labels", "limited"),
    [
        ({}, None, {"cosine"}),  # may be an embedding
        ({"name": "logits"}, None, {"agreement_top1"}),
        ({"softmax": True}, None, {"agreement_top1"}),
        ({}, LABELS, {"agreement_top1", "top1_drop"}),
        ({}, tuple(label + CLASSES for label in LABELS), {"cosine"}),  # no classes of this output
        ({}, tuple(map(str, LABELS)), {"cosine"}),
    ],
    ids=["floats", "named", "distribution", "labels", "labels-beyond", "labels-text"],
)
def test_default_limits_follow_what_the_output_is(tmp_path, options, labels, limited):
    reference = save(tmp_path / "r.onnx", WEIGHT, **options)
    checks = accuracy(reference, reference, samples_of(INPUTS, labels))
    assert {check.name for check in checks if check.limit is not None} == limited


def test_perplexity_is_judged_by_its_rise(tmp_path):
    """A language model in small: logits [1, 6, 5] and the tokens that follow; more is worse."""
    reference, artifact = (
        save(tmp_path / name, weight, shape=["n", 6, 8]) for name, weight in (("r.onnx", WEIGHT), ("a.onnx", WORSE))
    )
    texts, tokens = INPUTS.reshape(10, 6, 8), np.array(LABELS).reshape(10, 6)
    samples = samples_of(texts, tuple(tokens))
    losses = {}
    for name, path in (("before", reference), ("after", artifact)):
        logits = run(path, texts)
        shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        losses[name] = -np.log(np.take_along_axis(shares, tokens[..., None], -1)).mean()
    found = by_name(accuracy(reference, artifact, samples, metric="perplexity"))
    assert found["perplexity_reference"].value == pytest.approx(np.exp(losses["before"]), rel=1e-5)
    assert found["perplexity"].value == pytest.approx(np.exp(losses["after"]), rel=1e-5)
    rise = np.exp(losses["after"] - losses["before"]) - 1
    assert rise > 0.02, "else this test can't tell"
    assert found["perplexity_drop"].value == pytest.approx(rise, rel=1e-4)
    assert (found["perplexity_drop"].limit, found["perplexity_drop"].passed) == (0.02, False)
    better = by_name(accuracy(artifact, reference, samples, metric="perplexity"))["perplexity_drop"]
    assert better.value < 0 and better.passed
    held_to = {"perplexity": found["perplexity"].value + 0.01}
    loose = by_name(accuracy(reference, artifact, samples, metric="perplexity", limits=held_to))["perplexity"]
    assert loose.passed and loose.limit_kind == "max"
    with pytest.raises(UsageError, match="metric 'perplexity' needs an output of class scores, the model has y"):
        Judge(reference, samples_of(texts, tuple(tokens[:, :5])), metric="perplexity")


def test_limits_of_the_user_replace_the_defaults(tmp_path):
    reference, artifact = save(tmp_path / "r.onnx", WEIGHT), save(tmp_path / "a.onnx", WORSE)
    checks = by_name(accuracy(reference, artifact, samples_of(INPUTS, LABELS), limits={"snr_db": 60, "max_abs": 100}))
    assert not checks["snr_db"].passed and checks["snr_db"].limit_kind == "min"
    assert checks["max_abs"].passed and checks["max_abs"].limit_kind == "max"
    assert checks["agreement_top1"].limit is None and checks["agreement_top1"].passed
    strict = accuracy(reference, artifact, samples_of(INPUTS), metric="cosine", limits={"cosine_drop": 1e-6})
    found = by_name(strict)
    assert not found["cosine_drop"].passed and found["cosine_drop"].value == pytest.approx(1 - found["cosine"].value)
    assert found["cosine_drop"].low <= found["cosine_drop"].value <= found["cosine_drop"].high


def test_outputs_that_are_not_finite_fail(tmp_path):
    broken = WEIGHT.copy()
    broken[0, 0] = np.nan
    reference, artifact = save(tmp_path / "r.onnx", WEIGHT), save(tmp_path / "a.onnx", broken)
    checks = by_name(accuracy(reference, artifact, samples_of(INPUTS)))
    assert not checks["cosine"].passed and checks["snr_db"].value == -np.inf and checks["max_abs"].value == np.inf


def test_sequences_of_distributions_agree_by_position(tmp_path):
    x = RNG.normal(size=(6, 7, 8)).astype(np.float32)
    shape = ["n", "t", 8]
    reference = save(tmp_path / "r.onnx", WEIGHT, softmax=True, shape=shape)
    artifact = save(tmp_path / "a.onnx", WORSE, softmax=True, shape=shape)
    found = by_name(accuracy(reference, artifact, samples_of(x)))["agreement_top1"]
    agree = run(reference, x).argmax(-1) == run(artifact, x).argmax(-1)
    assert found.value == pytest.approx(agree.mean())


def encoder(path: Path, noise_at_padding: float) -> Path:
    """``y[b, s, :] = table[input_ids] + noise where the mask is 0``, and the mask's sum as an integer output."""
    table = np.random.default_rng(1).normal(size=(10, 4)).astype(np.float32)
    ids, mask = (
        helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "s"]) for n in ("input_ids", "attention_mask")
    )
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node("Cast", ["attention_mask"], ["seen"], to=TensorProto.FLOAT),
            helper.make_node("Sub", ["one", "seen"], ["unseen"]),
            helper.make_node("Mul", ["unseen", "noise"], ["scaled"]),
            helper.make_node("Unsqueeze", ["scaled", "last"], ["wide"]),
            helper.make_node("Add", ["rows", "wide"], ["y"]),
            helper.make_node("ReduceSum", ["attention_mask", "axes"], ["length"], keepdims=0),
        ],
        "encoder",
        [ids, mask],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", 4]),
            helper.make_tensor_value_info("length", TensorProto.INT64, ["b"]),
        ],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(np.float32(1), "one"),
            numpy_helper.from_array(np.float32(noise_at_padding), "noise"),
            numpy_helper.from_array(np.array([-1]), "last"),
            numpy_helper.from_array(np.array([1]), "axes"),
        ],
    )
    return save_graph(path, graph)


def test_padded_positions_do_not_count_and_integers_match_exactly(tmp_path):
    ids = RNG.integers(0, 10, (4, 2, 6))
    mask = np.arange(6) < RNG.integers(1, 6, (4, 2, 1))
    feeds = [{"input_ids": i, "attention_mask": m.astype(np.int64)} for i, m in zip(ids, mask, strict=True)]
    samples = Samples("test", 4, "0", lambda index: feeds[index])
    reference, artifact = encoder(tmp_path / "r.onnx", 0), encoder(tmp_path / "a.onnx", 9)
    checks = by_name(accuracy(reference, artifact, samples))
    assert checks["max_abs"].value == 0 and checks["cosine"].value == pytest.approx(1)
    assert checks["exact_match"].value == 1 and checks["exact_match"].samples == 8  # rows of the batch
    unmasked = Samples("test", 4, "0", lambda index: {**feeds[index], "attention_mask": feeds[index]["attention_mask"]})
    blind = replace(unmasked, read=lambda index: {**feeds[index], "attention_mask": np.zeros((2, 6), np.int64)})
    assert by_name(accuracy(reference, artifact, blind))["max_abs"].value == 0  # nothing left to compare


def test_of_several_outputs_the_worst_speaks(tmp_path):
    def two(path: Path, second: float) -> Path:
        graph = helper.make_graph(
            [helper.make_node("Identity", ["x"], ["same"]), helper.make_node("Add", ["x", "c"], ["shifted"])],
            "two",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 8]) for n in ("same", "shifted")],
            [numpy_helper.from_array(np.float32(second), "c")],
        )
        return save_graph(path, graph)

    checks = by_name(accuracy(two(tmp_path / "r.onnx", 0), two(tmp_path / "a.onnx", 0.5), samples_of(INPUTS)))
    assert checks["max_abs"].value == pytest.approx(0.5) and "'shifted', the worst of 2" in checks["max_abs"].note


METRIC_MODULE = """
import numpy as np

def margin(values, label):
    assert values["x"].shape == (1, 8)
    return float(values["y"][0, label] - np.delete(values["y"][0], label).max())

def right(values, label):
    return float(values["y"].argmax() == label)

def hits(values, labels):
    return float(np.mean([v["y"].argmax() == label for v, label in zip(values, labels)]))

hits.corpus = True

def pairs(values, labels):
    sides = [{pair: v["y"].argmax() for v, (part, pair) in zip(values, labels) if part == side} for side in (0, 1)]
    assert sides[0].keys() == sides[1].keys(), "a pair was taken apart"
    return float(np.mean([sides[0][pair] == sides[1][pair] for pair in sides[0]]))

pairs.corpus = True
pairs.group = lambda label: label[1]

def films(values, label):
    return float(values["y"].argmax() == label[0])

films.group = lambda label: label[1]

def unhashable(values, label):
    return 1.0

unhashable.group = lambda label: [label]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_metric.py").write_text(METRIC_MODULE)
    monkeypatch.chdir(tmp_path)
    yield "own_metric"
    sys.modules.pop("own_metric", None)


def test_custom_metrics_by_sample_and_over_all_samples(tmp_path, module):
    reference, artifact = save(tmp_path / "r.onnx", WEIGHT), save(tmp_path / "a.onnx", WORSE)
    samples = samples_of(INPUTS, LABELS)
    hits = by_name(accuracy(reference, artifact, samples, metric=f"{module}:hits"))
    top1 = by_name(accuracy(reference, artifact, samples, metric="top1"))
    for end in ("", "_reference", "_drop"):
        assert hits[f"hits{end}"].value == pytest.approx(top1[f"top1{end}"].value)
        assert hits[f"hits{end}"].low < hits[f"hits{end}"].value < hits[f"hits{end}"].high
    margin = by_name(accuracy(reference, artifact, samples, metric=f"{module}:margin", limits={"margin": 100}))
    t, truth = run(artifact, INPUTS), np.array(LABELS)
    others = np.where(np.arange(CLASSES) == truth[:, None], -np.inf, t).max(1)
    assert margin["margin"].value == pytest.approx(np.mean(t[np.arange(COUNT), truth] - others), rel=1e-4)
    assert margin["margin"].limit_kind == "min" and not margin["margin"].passed


def test_one_sample_is_the_limit_where_samples_are_right_or_wrong(tmp_path, module):
    path, samples = save(tmp_path / "r.onnx", WEIGHT), samples_of(INPUTS, LABELS)
    assert by_name(accuracy(path, path, samples))["top1_drop"].limit == pytest.approx(1 / COUNT, rel=0.01)
    limits = {
        name: by_name(accuracy(path, path, samples, metric=f"{module}:{name}"))[f"{name}_drop"].limit
        for name in ("right", "margin", "hits")
    }
    assert limits == {"right": pytest.approx(1 / COUNT, rel=0.01), "margin": 0.005, "hits": 0.005}
    fixed = save(tmp_path / "b.onnx", WEIGHT, shape=[3, 8])
    grouped = tuple(tuple(LABELS[i : i + 3]) for i in range(0, COUNT, 3))
    batches = Samples("test", 20, "0", lambda i: {"x": INPUTS[3 * i : 3 * i + 3]}, grouped)
    assert by_name(accuracy(fixed, fixed, batches))["top1_drop"].limit == pytest.approx(1 / COUNT, rel=0.01)


def test_groups_are_left_out_whole(tmp_path, module):
    """60 samples as 30 pairs are too few to bound; each pair twice is 60 again, and no pair may be taken apart."""
    path, labels = save(tmp_path / "r.onnx", WEIGHT), [np.array([i % 2, i // 2]) for i in range(COUNT)]
    thirty = by_name(accuracy(path, path, samples_of(INPUTS, labels), metric=f"{module}:pairs"))
    assert thirty["pairs"].low is None
    twice = [*labels, *(label + np.array([0, COUNT]) for label in labels)]
    sixty = samples_of(np.concatenate([INPUTS, INPUTS]), twice)
    found = by_name(accuracy(path, path, sixty, metric=f"{module}:pairs"))
    assert found["pairs"].value == thirty["pairs"].value
    assert found["pairs"].low < found["pairs"].value < found["pairs"].high


def test_samples_of_a_group_are_no_evidence_apart(tmp_path, module):
    """Each sample four times over, by group: the mean is the same, and known no better than from one of the four."""
    path = save(tmp_path / "r.onnx", WORSE)
    labels = [np.array([label, number]) for number, label in enumerate(LABELS)]
    once, fourfold = (
        by_name(accuracy(path, path, samples_of(np.concatenate([INPUTS] * n), labels * n), metric=f"{module}:films"))
        for n in (1, 4)
    )
    assert (fourfold["films"].value, fourfold["films"].high) == pytest.approx((once["films"].value, once["films"].high))


def test_groups_that_cannot_be_told(tmp_path, module):
    path = save(tmp_path / "r.onnx", WEIGHT)
    with pytest.raises(UsageError, match=r"unhashable\.group gave list for label \d.*\n.*a number, a text"):
        accuracy(path, path, samples_of(INPUTS, LABELS), metric=f"{module}:unhashable")
    with pytest.raises(SampleError, match=r"own_metric:pairs' groups samples by their label, test has none"):
        accuracy(path, path, samples_of(INPUTS), metric=f"{module}:pairs")


def test_retrieval_of_pairs_has_the_interval_of_a_share():
    """200 queries whose answers lie beyond their noise or not, two of five: the share's own standard error."""
    rng = np.random.default_rng(8)
    bodies = rng.normal(size=(200, 1, 384)).astype(np.float32)
    summaries = np.where(rng.random((200, 1, 1)) < 0.6, bodies, rng.normal(size=bodies.shape)).astype(np.float32)
    scores = Scores(score_of("retrieval", retrieval_at_1))
    for index in range(400):
        document, part = divmod(index, 2)
        states = (summaries, bodies)[part][document]
        scores.add({"states": states[None]}, np.array([1, document, part]))
    share, low, high = scores.value()
    assert 0.5 < share < 0.7
    assert (high - low) / 2 == pytest.approx(2.09 * np.sqrt(share * (1 - share) / 200), rel=0.4)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(3).normal(size=400)
    found = jackknife(lambda kept: float(values[kept].mean()), [[index] for index in range(400)])
    standard = values.std(ddof=1) / 20
    # 20 groups of 20: the variance of the mean is known to sqrt(2 / 19) = 32 %, its root to half of that
    assert (found.high - found.low) / 2 == pytest.approx(2.09 * standard, rel=0.4)
    assert jackknife(lambda kept: float(len(kept)), [[0, 1], [2], [3, 4]]) == (5.0, None, None)


def test_labels_of_another_model_are_suspected(tmp_path):
    wrong = tuple((label + 1) % CLASSES for label in run(save(tmp_path / "r.onnx", WEIGHT), INPUTS).argmax(1).tolist())
    found = by_name(accuracy(tmp_path / "r.onnx", tmp_path / "r.onnx", samples_of(INPUTS, wrong)))
    assert "are these labels this model's?" in found["top1_reference"].note


def test_a_fixed_batch_scores_its_rows(tmp_path):
    reference = save(tmp_path / "r.onnx", WEIGHT, shape=[3, 8])
    grouped = [tuple(LABELS[i : i + 3]) for i in range(0, COUNT, 3)]
    samples = Samples("test", 20, "0", lambda i: {"x": INPUTS[3 * i : 3 * i + 3]}, tuple(grouped))
    checks = by_name(accuracy(reference, reference, samples))
    assert checks["top1"].value == pytest.approx(np.mean(run_all_rows(reference) == np.array(LABELS)))
    assert checks["cosine"].samples == COUNT


def run_all_rows(path: Path) -> np.ndarray:
    return np.concatenate([run(path, INPUTS[i : i + 3]).argmax(1) for i in range(0, COUNT, 3)])


def test_what_cannot_be_judged_says_why(tmp_path):
    reference = save(tmp_path / "r.onnx", WEIGHT)
    with pytest.raises(SampleError, match=r"metric 'top1' needs labels, test has none\n.*agreement_top1"):
        Judge(reference, samples_of(INPUTS), metric="top1")
    with pytest.raises(UsageError, match=r"unknown metric 'top2'\n.*'top1'"):
        Judge(reference, samples_of(INPUTS, LABELS), metric="top2")
    with pytest.raises(UsageError, match="needs an output of class scores, the model has y"):
        Judge(reference, samples_of(INPUTS, tuple(map(str, LABELS))), metric="top1")
    with pytest.raises(ModelError, match=r"other.onnx has no output 'y', the reference has\n.*yy"):
        accuracy(reference, save(tmp_path / "other.onnx", WEIGHT, name="yy"), samples_of(INPUTS))


# --- latency, footprint, size, all of it ------------------------------------------------------------------------------


@pytest.mark.slow
def test_validate_measures_all_of_it(tmp_path):
    reference, artifact = save(tmp_path / "r.onnx", WEIGHT), save(tmp_path / "a.onnx", WEIGHT[:, :CLASSES] * 1.0)
    found = validate(
        reference,
        artifact,
        samples_of(INPUTS, LABELS),
        limits={"size_ratio": 2.0, "latency_ms": 1e6},
        threads=(1, 2),
        floats=[TimedConfig("float basic", reference, "basic")],
        max_seconds=0.05,
    )
    checks = by_name(found.checks)
    footprint = {"peak_memory_bytes", "load_ms", "first_run_ms"}
    speed = {"latency_ratio", "latency_ratio_2t", "latency_ms", "latency_ms_2t"}
    assert checks.keys() >= {"snr_db", "agreement_top1", "top1_drop", "size_bytes", "size_ratio", *footprint, *speed}
    assert set(found.timings) == {"reference", "artifact", "float", "float basic"}
    for name in found.timings:
        assert {threads: timing.threads for threads, timing in found.timings[name].items()} == {1: 1, 2: 2}
    assert checks["latency_ms"].value == found.timings["artifact"][1].median_ms
    assert checks["latency_ms_2t"].limit == 1e6 and checks["size_ratio"].passed
    assert checks["size_bytes"].value == artifact.stat().st_size
    assert checks["latency_ratio"].low <= checks["latency_ratio"].value <= checks["latency_ratio"].high
    assert checks["latency_ratio"].limit == 1 and checks["latency_ratio"].passed == (checks["latency_ratio"].low <= 1)


def test_a_limit_on_nothing_is_refused(tmp_path):
    reference = save(tmp_path / "r.onnx", WEIGHT)
    with pytest.raises(UsageError, match=r"limit on 'latency_ration'.*\n.*'latency_ratio'"):
        validate(
            onnx_ir.load(reference), reference, samples_of(INPUTS), limits={"latency_ration": 1},
            threads=(1,), max_seconds=0.01,
        )  # fmt: skip


def test_the_fastest_float_is_the_reference_and_a_limit_of_the_user_holds_for_the_value(tmp_path):
    small = save(tmp_path / "small.onnx", WEIGHT)
    rng = np.random.default_rng(0)
    large = save(tmp_path / "large.onnx", rng.normal(size=(8, 20_000)).astype(np.float32))
    configs = [TimedConfig("large", large), TimedConfig("small", small)]
    found = latency(
        configs, TimedConfig("artifact", small), [{"x": INPUTS[:1]}],
        threads=(1,), limits={"latency_ratio": 1e-6}, max_seconds=0.05, footprints=1,
    )  # fmt: skip
    assert found.timings["reference"][1] is found.timings["small"][1]
    check = by_name(found.checks)["latency_ratio"]
    assert check.limit == 1e-6 and not check.passed and "against small, 1 thread" in check.note


def test_size_counts_external_data(tmp_path):
    reference = save(tmp_path / "r.onnx", np.ones((8, 4096), np.float32))
    proto = onnx.load(reference)
    onnx.save(proto, tmp_path / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0)
    checks = by_name(size(reference, tmp_path / "e.onnx"))
    expected = (tmp_path / "e.onnx").stat().st_size + (tmp_path / "e.data").stat().st_size
    assert checks["size_bytes"].value == expected
    assert checks["size_ratio"].value == pytest.approx(expected / reference.stat().st_size)


@pytest.mark.parametrize(
    ("name", "value", "limit"), [("top1_drop", 0.905 - 0.9, 0.005), ("cosine", 0.99 - 1e-13, 0.99)]
)
def test_a_limit_is_met_to_the_last_digits(name, value, limit):
    """One sample of 200 is .005000000000000004 in floating point."""
    assert held(name, Interval(value, None, None), {name: limit}).passed
    worse = value + (-1e-3 if name == "cosine" else 1e-3)
    assert not held(name, Interval(worse, None, None), {name: limit}).passed
