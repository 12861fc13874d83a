"""Calibration against the raw tensors of a session and ONNX Runtime's own calibrator: whole, sliced, interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization.calibrate import CalibrationDataReader, MinMaxCalibrater

from edgeq.analyse import slices, store
from edgeq.analyse.observe import Observation, observe
from edgeq.analyse.stats import HISTOGRAM_ELEMENTS, RESERVOIR, Reservoir, Stats, merge
from edgeq.analyse.store import Store
from edgeq.errors import EdgeqError, ModelError, SampleError
from edgeq.run.record import Feed, Samples
from edgeq.run.session import open_session, run_session

CNN = """
<ir_version: 10, opset_import: ["" : 21]>
cnn (float[n, 3, h, w] x) => (float[n, 5] y) <float[8, 3, 3, 3] k, float[8] b, float[8, 5] m> {
    conv = Conv <pads = [1, 1, 1, 1]> (x, k, b)
    relu = Relu (conv)
    double = Add (relu, relu)
    pooled = GlobalAveragePool (double)
    flat = Flatten (pooled)
    y = MatMul (flat, m)
}
"""
CNN_TAPS = ["x", "relu", "double", "flat", "y"]

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
text (float[b, s, 4] x, int64[b, s] attention_mask) => (float[b, s, 6] y) <float[4, 6] w> {
    y = MatMul (x, w)
}
"""


def parsed(text: str, **weights: tuple[int, ...]) -> onnx_ir.Model:
    """A model from ONNX's text form; ``weights`` are drawn in these shapes."""
    proto, rng = onnx.parser.parse_model(text), np.random.default_rng(0)
    for name, shape in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    return onnx_ir.from_proto(proto)


def cnn() -> onnx_ir.Model:
    return parsed(CNN, k=(8, 3, 3, 3), b=(8,), m=(8, 5))


def samples_of(feeds: list[Feed], read: Callable[[int], Feed] | None = None, digest: str = "d") -> Samples:
    return Samples("test", len(feeds), digest, read or feeds.__getitem__)


def images(count: int, *, size: int = 12) -> list[Feed]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(1, 3, size, size)).astype(np.float32) * (1 + i % 5)} for i in range(count)]


def raw(model: onnx_ir.Model, taps: list[str], feeds: list[Feed]) -> dict[str, list[np.ndarray]]:
    """Every tapped tensor of every sample, from a session without optimisation."""
    clone = model.clone()
    values = {value.name: value for node in clone.graph for value in node.outputs}
    clone.graph.outputs[:] = [values[tap] for tap in taps if tap in values]
    session = open_session(clone, level="none")
    runs = [{**feed, **run_session(session, feed)} for feed in feeds]
    return {tap: [run[tap] for run in runs] for tap in taps}


def same(a: Observation | dict[str, Stats], b: Observation | dict[str, Stats]) -> None:
    """Bit for bit the same statistics."""
    assert a.keys() == b.keys()
    for tap in a:
        ours, theirs = a[tap].to_arrays(), b[tap].to_arrays()
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=f"{tap}.{name}")


# --- what is measured ------------------------------------------------------------------------------------------------


def test_ranges_are_those_of_onnxruntimes_minmax_calibrator(tmp_path):
    class Reader(CalibrationDataReader):
        def __init__(self, feeds):
            self.feeds = iter(feeds)

        def get_next(self):
            return next(self.feeds, None)

    feeds, path = images(6), tmp_path / "cnn.onnx"
    onnx.save(onnx_ir.to_proto(cnn()), path)
    calibrator = MinMaxCalibrater(path, augmented_model_path=str(tmp_path / "augmented.onnx"))
    calibrator.augment_graph()
    calibrator.create_inference_session()
    calibrator.collect_data(Reader(feeds))
    theirs = calibrator.compute_data().data
    ours = observe(cnn(), CNN_TAPS, samples_of(feeds), threads=2)
    for tap in CNN_TAPS:  # 1e-5: another kernel may sum in another order
        np.testing.assert_allclose([ours[tap].min, ours[tap].max], np.ravel(theirs[tap].range_value), rtol=1e-5)


def test_moments_histogram_and_channels_are_those_of_the_raw_tensors():
    feeds = images(9)
    ours, tensors = observe(cnn(), CNN_TAPS, samples_of(feeds), threads=2), raw(cnn(), CNN_TAPS, feeds)
    for tap in CNN_TAPS:
        stats, values = ours[tap], np.concatenate([tensor.ravel() for tensor in tensors[tap]]).astype(np.float64)
        assert (stats.count, stats.samples, stats.shape) == (values.size, 9, tensors[tap][0].shape)
        np.testing.assert_allclose([stats.min, stats.max], [values.min(), values.max()], rtol=1e-5)
        np.testing.assert_allclose([stats.sum, stats.sum2], [values.sum(), (values**2).sum()], rtol=1e-4, atol=1e-3)
        counts, _ = np.histogram(values, stats.histogram.edges())
        # A value may stand one bin aside, since kernels differ in the last bits: cumulated counts then differ by it.
        assert np.abs(np.cumsum(counts - stats.histogram.counts)).max() <= counts.max()
        assert stats.histogram.counts.sum() == values.size
        stacked = np.concatenate([np.moveaxis(tensor, 1, -1).reshape(-1, tensor.shape[1]) for tensor in tensors[tap]])
        np.testing.assert_allclose(stats.channels.mean, stacked.mean(0, dtype=np.float64), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(stats.channels.absmax, np.abs(stacked).max(0), rtol=1e-5)


def test_a_large_tensor_keeps_exact_extremes_and_every_channel_in_its_histogram():
    x = np.zeros((1, 4, 200, 300), np.float32)  # 4 channels, a number of values that steps of 4 and 8 divide
    x += np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1)
    x[0, 1, 100, 100], x[0, 2, 3, 4] = 50.0, -70.0
    assert x.size > HISTOGRAM_ELEMENTS
    stats = Stats()
    stats.add(x, 0, axis=-3)
    assert (stats.min, stats.max, stats.count) == (-70.0, 50.0, x.size)
    assert (stats.histogram.low, stats.histogram.high) == (-70.0, 50.0)
    shares = stats.histogram.counts[stats.histogram.counts > 1000] / x.size
    np.testing.assert_allclose(shares, 0.25, atol=0.01)
    y = np.tile(np.arange(64, dtype=np.float32), (4096, 1))  # channels last
    last = Stats()
    last.add(y, 0)
    np.testing.assert_allclose(last.histogram.counts[last.histogram.counts > 0].size, 64)


def test_the_number_of_threads_changes_nothing():
    feeds = images(7)
    single = observe(cnn(), CNN_TAPS, samples_of(feeds), threads=1)
    for threads in (2, 4):
        same(single, observe(cnn(), CNN_TAPS, samples_of(feeds), threads=threads))


def test_taps_beyond_the_byte_budget_are_split_and_seen_whole(monkeypatch):
    opened = []
    monkeypatch.setattr(slices, "open_session", lambda *a, **k: opened.append(1) or open_session(*a, **k))
    feeds = images(3) + images(2, size=40)  # grows on the way
    whole = observe(cnn(), CNN_TAPS, samples_of(feeds), threads=2)
    assert len(opened) == 1
    split = observe(cnn(), CNN_TAPS, samples_of(feeds), threads=2, byte_budget=20_000)
    assert len(opened) > 3
    for tap in CNN_TAPS:
        assert split[tap].count == whole[tap].count
        np.testing.assert_allclose([split[tap].min, split[tap].max], [whole[tap].min, whole[tap].max], rtol=1e-5)


def test_shapes_may_vary_and_be_empty():
    model = parsed(TEXT, w=(4, 6))
    rng = np.random.default_rng(2)
    lengths = [5, 0, 2, 9]
    feeds = [
        {"x": rng.normal(size=(1, n, 4)).astype(np.float32), "attention_mask": np.ones((1, n), np.int64)}
        for n in lengths
    ]
    found = observe(model, ["x", "y"], samples_of(feeds), threads=2)
    tensors = raw(model, ["x", "y"], feeds)
    for tap, channels in (("x", 4), ("y", 6)):
        stats, values = found[tap], np.concatenate([tensor.ravel() for tensor in tensors[tap]])
        assert (stats.count, stats.samples, stats.shape) == (16 * channels, 3, (1, 9, channels))
        np.testing.assert_allclose([stats.min, stats.max], [values.min(), values.max()], rtol=1e-5)
        assert stats.channels.count.tolist() == [16] * channels
    nothing = observe(model, ["y"], samples_of(feeds[1:2]), threads=1)
    assert nothing["y"].count == 0
    assert [(notice.code, notice.node) for notice in nothing.notices] == [("empty", "y")]


def test_padding_is_left_out_of_all_statistics():
    model, rng = parsed(TEXT, w=(4, 6)), np.random.default_rng(3)
    x = rng.normal(size=(2, 5, 4)).astype(np.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], np.int64)
    x[mask == 0] = 1000.0
    padded = observe(model, ["x", "y"], samples_of([{"x": x, "attention_mask": mask}]), threads=1)
    bare = [{"x": x[mask == 1][None], "attention_mask": np.ones((1, 7), np.int64)}]
    exact = observe(model, ["x", "y"], samples_of(bare), threads=1)
    for tap in ("x", "y"):
        assert padded[tap].count == exact[tap].count == 7 * x.shape[2] * (1 if tap == "x" else 1.5)
        np.testing.assert_allclose([padded[tap].min, padded[tap].max], [exact[tap].min, exact[tap].max], rtol=1e-5)
        np.testing.assert_allclose(padded[tap].channels.mean, exact[tap].channels.mean, rtol=1e-5)
        assert np.abs(padded[tap].sample).max() < 100
    named = observe(model, ["x"], samples_of([{"x": x, "attention_mask": mask}]), threads=1, masks={})
    assert named["x"].max == 1000.0


def test_an_axis_as_long_as_the_sentence_by_accident_is_no_padding():
    model = parsed(
        """<ir_version: 10, opset_import: ["" : 21]>
        heads (float[b, 4, s, 2] x, int64[b, s] attention_mask) => (float[b, 4, s, 2] y) { y = Relu (x) }"""
    )
    x = np.zeros((1, 4, 4, 2), np.float32)
    x[0, 3] = 7.0  # a head, not the padded token
    feed = {"x": x, "attention_mask": np.array([[1, 1, 1, 0]], np.int64)}
    assert observe(model, ["y"], samples_of([feed]), threads=1)["y"].max == 7.0


def test_a_mask_to_be_added_is_not_taken_for_padding():
    model = parsed(TEXT.replace("int64[b, s] attention_mask", "float[b, s] attention_mask"), w=(4, 6))
    feed = {"x": np.ones((1, 3, 4), np.float32), "attention_mask": np.array([[0, 0, -1e9]], np.float32)}
    assert observe(model, ["x"], samples_of([feed]), threads=1)["x"].count == 12


# --- what isn't a number ---------------------------------------------------------------------------------------------


def one_tensor(*arrays: np.ndarray) -> Stats:
    stats = Stats()
    for index, array in enumerate(arrays):
        stats.add(array, index)
    return stats


def test_nan_and_infinity_made_by_the_model_are_counted_left_out_and_named():
    model = parsed(
        """<ir_version: 10, opset_import: ["" : 21]>
        ratio (float[n, 3] a, float[n, 3] b) => (float[n, 3] y) { y = Div (a, b) }"""
    )
    a, b = np.array([[0, 1, 6], [2, -3, 8]], np.float32), np.array([[0, 0, 2], [1, 0, 2]], np.float32)
    found = observe(model, ["y"], samples_of([{"a": a, "b": b}]), threads=1)
    stats = found["y"]
    assert (stats.nan_count, stats.inf_count, stats.mask_count, stats.count) == (1, 1, 1, 3)
    assert (stats.min, stats.max, stats.sum) == (2.0, 4.0, 9.0)
    assert stats.channels.count.tolist() == [1, 0, 2]
    assert [(notice.level, notice.code, notice.node) for notice in found.notices] == [
        ("warning", "nan", "y"),
        ("warning", "inf", "y"),
        ("info", "mask-constant", "y"),
    ]
    assert "1 NaN in 'y'" in found.notices[0].message


@pytest.mark.parametrize("constant", [np.finfo(np.float32).min, -np.inf, -1e9])
def test_mask_constants_do_not_destroy_the_range(constant):
    scores = np.random.default_rng(4).normal(size=(1, 2, 8, 8)).astype(np.float32)
    masked = scores.copy()
    masked[..., 5:] += np.float32(constant)
    stats, kept = one_tensor(masked), scores[..., :5]
    assert (stats.mask_count, stats.count) == (2 * 8 * 3, kept.size)
    assert (stats.min, stats.max) == (kept.min(), kept.max())
    assert stats.histogram.counts.sum() == kept.size


def test_a_tensor_of_large_values_keeps_them():
    x = np.array([-3e6, 1e5, 2e7], np.float32)
    assert (one_tensor(x).min, one_tensor(x).mask_count) == (-3e6, 0)


def test_half_precision_doubles_and_scalars_count():
    for dtype in (np.float16, np.float64, np.dtype("bfloat16")):
        stats = one_tensor(np.array([1.5, -2.0], np.float32).astype(dtype))
        assert (stats.min, stats.max, stats.count) == (-2.0, 1.5, 2)
    assert one_tensor(np.array(3.0, np.float32)).max == 3.0
    assert one_tensor(np.array([1e300, 1.0])).inf_count == 1
    assert one_tensor(np.full((2, 3), 1e20, np.float32)).sum2 == pytest.approx(6e40)


# --- merging ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data())
def test_two_halves_merged_are_the_whole(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    scales = data.draw(st.lists(st.sampled_from([0.0, 1e-3, 1.0, 300.0]), min_size=1, max_size=6))
    tensors = [(rng.normal(size=(1, 3, 700)) * scale).astype(np.float32) for scale in scales]
    cut = data.draw(st.integers(0, len(tensors)))
    parts = [Stats(elements=512), Stats(elements=512), Stats(elements=512)]
    for index, tensor in enumerate(tensors):
        parts[0 if index < cut else 1].add(tensor, index, axis=-2)
        parts[2].add(tensor, index, axis=-2)
    merged, whole = merge(parts[0], parts[1]).to_arrays(), parts[2].to_arrays()
    assert merged.keys() == whole.keys()
    for name in whole.keys() - {"integers", "sample", "keys"}:
        np.testing.assert_allclose(merged[name], whole[name], rtol=1e-12, err_msg=name)
    np.testing.assert_array_equal(merged["integers"][:-1], whole["integers"][:-1])  # all but ``settled``
    np.testing.assert_array_equal(np.sort(merged["sample"]), np.sort(whole["sample"]))


def test_merging_changes_neither_part_and_drops_channels_that_do_not_fit():
    a, b = one_tensor(np.ones((2, 3), np.float32)), one_tensor(np.ones((2, 4), np.float32))
    before = {name: array.copy() for name, array in a.to_arrays().items()}
    assert merge(a, b).channels is None
    assert merge(a, Stats()).channels is not None
    assert merge(Stats(), b).count == 8
    for name, array in a.to_arrays().items():
        np.testing.assert_array_equal(array, before[name])


def test_the_reservoir_is_a_uniform_sample_of_fixed_size():
    reservoir = Reservoir()
    for index in range(40):  # sample i holds values in [i, i + 1): each must be present in proportion
        size = 3000 if index % 2 else 30_000
        values = (index + np.random.default_rng(index).random(size)).astype(np.float32)
        reservoir.add(values, index)
    values, _ = reservoir.arrays()
    assert values.size == RESERVOIR
    counts = np.bincount(values.astype(int), minlength=40)
    expected = np.where(np.arange(40) % 2, 3000, 30_000) * RESERVOIR / (20 * 33_000)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()  # binomial: five deviations, 40 bins


def test_settled_tells_when_ranges_stopped_growing():
    base = np.array([-1.0, 1.0], np.float32)
    stats = one_tensor(base, base * 2, base * 2.001, base)
    assert stats.settled == 2


# --- the store -------------------------------------------------------------------------------------------------------


class Counted:
    """A sample source that remembers what was read and fails before sample ``stop``."""

    def __init__(self, feeds: list[Feed], stop: int | None = None, error: type[BaseException] = OSError) -> None:
        self.feeds, self.stop, self.error, self.read = feeds, stop, error, []

    def samples(self) -> Samples:
        return samples_of(self.feeds, self._get)

    def _get(self, index: int) -> Feed:
        if index == self.stop:
            raise self.error("the disk went away")
        self.read.append(index)
        return self.feeds[index]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_interrupted_pass_goes_on_where_it_stopped(tmp_path, error, threads):
    feeds, store = images(10), Store(tmp_path)
    with pytest.raises(error, match="went away"):
        observe(cnn(), CNN_TAPS, Counted(feeds, 6, error).samples(), threads=threads, store=store)
    rest = Counted(feeds)
    resumed = observe(cnn(), CNN_TAPS, rest.samples(), threads=threads, store=store)
    assert rest.read == [6, 7, 8, 9]
    assert resumed.ran == 4
    same(resumed, observe(cnn(), CNN_TAPS, samples_of(feeds), threads=threads))
    assert len(list(tmp_path.rglob("*.npz"))) == len(CNN_TAPS)  # the checkpoint is gone


def test_a_pass_cut_off_without_warning_has_its_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CHECKPOINT_S", -1.0)  # after every sample
    feeds, kept = images(5), Store(tmp_path)
    with pytest.raises(ModelError):  # sample 3 fails in the run, not between samples
        observe(cnn(), ["x"], samples_of([*feeds[:3], {"x": np.ones((1, 3, 2, 2), np.int64)}]), threads=2, store=kept)
    monkeypatch.setattr(store, "CHECKPOINT_S", 1e9)
    rest = Counted(feeds[:4])
    assert observe(cnn(), ["x"], rest.samples(), threads=2, store=kept)["x"].samples == 4
    assert rest.read == [3]


def test_what_is_stored_is_not_observed_again(tmp_path):
    feeds, store = images(4), Store(tmp_path)
    first = observe(cnn(), ["relu", "y"], samples_of(feeds), threads=2, store=store)
    again = Counted(feeds)
    second = observe(cnn(), ["y", "relu"], again.samples(), threads=2, store=store)
    assert (again.read, second.ran, second.reused) == ([], 0, 2)
    assert list(second) == ["y", "relu"]
    same({"relu": first["relu"], "y": first["y"]}, {"relu": second["relu"], "y": second["y"]})
    third = observe(cnn(), ["relu", "flat"], again.samples(), threads=2, store=store)
    assert (third.reused, third.ran) == (1, 4)
    same(third, observe(cnn(), ["relu", "flat"], samples_of(feeds), threads=2))


def test_other_data_model_or_options_are_observed_anew(tmp_path):
    feeds, store = images(2), Store(tmp_path)
    observe(cnn(), ["y"], samples_of(feeds), threads=1, store=store)
    other = cnn()
    other.graph.initializers["b"].const_value = onnx_ir.tensor(np.ones(8, np.float32))
    assert observe(cnn(), ["y"], samples_of(feeds, digest="e"), threads=1, store=store).reused == 0
    assert observe(other, ["y"], samples_of(feeds), threads=1, store=store).reused == 0
    assert observe(cnn(), ["y"], samples_of(feeds), threads=1, store=store, histogram_elements=99).reused == 0
    assert observe(cnn(), ["y"], samples_of(feeds), threads=1, store=store).reused == 1


@pytest.mark.parametrize("damage", [b"", b"not an archive", None])
def test_damaged_files_are_ignored_and_written_again(tmp_path, damage):
    feeds, store = images(2), Store(tmp_path)
    first = observe(cnn(), ["y"], samples_of(feeds), threads=1, store=store)
    (file,) = tmp_path.rglob("*.npz")
    if damage is None:
        np.savez(file, other=np.zeros(3))  # an archive, but not of statistics
    else:
        file.write_bytes(damage)
    second = observe(cnn(), ["y"], samples_of(feeds), threads=1, store=store)
    assert (second.reused, second.ran) == (0, 2)
    same(first, second)
    assert observe(cnn(), ["y"], samples_of(feeds), threads=1, store=store).reused == 1


def test_a_store_that_cannot_be_written_is_a_warning(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    found = observe(cnn(), ["y"], samples_of(images(2)), threads=1, store=Store(blocked))
    assert found["y"].samples == 2
    assert [(notice.level, notice.code) for notice in found.notices] == [("warning", "store")]
    assert str(blocked) in found.notices[0].message


# --- what a user can cause -------------------------------------------------------------------------------------------

TYPED = """
<ir_version: 10, opset_import: ["" : 21]>
typed (float[n, 3] x) => (float[n, 3] y) <float zero = {0.0}> {
    positive = Greater (x, zero)
    whole = Cast <to = 7> (x)
    y = Relu (x)
}
"""


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("positive", "can't observe 'positive': it is bool, expected a float type"),
        ("whole", "can't observe 'whole': it is int64, expected a float type"),
        ("wole", "no such value in the main graph\n  try: did you mean 'whole'?"),
        ("zero", "can't observe 'zero': a constant"),
    ],
)
@pytest.mark.parametrize("typed", [True, False])
def test_a_tap_that_cannot_be_observed_is_named(tap, message, typed):
    model = parsed(TYPED)
    for node in model.graph if typed else ():
        node.outputs[0].type = onnx_ir.TensorType(
            {"Greater": onnx_ir.DataType.BOOL, "Cast": onnx_ir.DataType.INT64}.get(node.op_type, onnx_ir.DataType.FLOAT)
        )
    with pytest.raises(ModelError) as error:
        observe(model, ["y", tap], samples_of([{"x": np.ones((1, 3), np.float32)}]), threads=2)
    assert message in str(error.value)


def test_no_samples_is_an_error():
    with pytest.raises(SampleError, match="no samples in test"):
        observe(cnn(), ["y"], samples_of([]), threads=1)


def test_a_sample_that_does_not_fit_is_an_error_of_the_samples():
    with pytest.raises(EdgeqError, match="doesn't fit the model"):
        observe(cnn(), ["y"], samples_of([{"x": np.ones((1, 3), np.float32)}]), threads=2)


def test_the_model_and_its_outputs_stay_as_they_were():
    model = cnn()
    before = onnx_ir.to_proto(model).SerializeToString()
    observe(model, CNN_TAPS, samples_of(images(1)), threads=1)
    assert onnx_ir.to_proto(model).SerializeToString() == before


def test_progress_hears_of_every_sample(tmp_path: Path):
    class Heard:
        total, done = None, 0

        def stage(self, name, total=None):
            from contextlib import nullcontext

            self.total = total
            return nullcontext()

        def advance(self, count=1):
            self.done += count

    heard = Heard()
    observe(cnn(), ["y"], samples_of(images(3)), threads=2, progress=heard)
    assert (heard.total, heard.done) == (3, 3)
