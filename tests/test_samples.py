"""Samples: every form reads back what was stored, and every mistake in the data is named."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeq.errors import SampleError, UsageError
from edgeq.run.preprocess import Preprocessing
from edgeq.run.samples import load_samples, split, take
from edgeq.run.session import TensorSpec

F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
IMAGE = TensorSpec("image", F32, ("n", 3, 8, 8))
IDS = (
    TensorSpec("input_ids", I64, ("n", "s")),
    TensorSpec("attention_mask", I64, ("n", "s")),
    TensorSpec("token_type_ids", I64, ("n", "s")),
)


def random_images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 3, 8, 8)).astype(np.float32)


# --- .npz and .npy --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_rows_are_samples_of_batch_one(tmp_path, save, order):
    images = random_images(5)
    save(tmp_path / "s.npz", image=np.asarray(images, order=order), label=np.arange(5))
    samples = load_samples(str(tmp_path / "s.npz"), [IMAGE])
    assert len(samples) == 5 and samples.labels == (0, 1, 2, 3, 4) and not samples.synthetic
    for _ in range(2):  # re-iterable
        np.testing.assert_array_equal(np.concatenate([feed["image"] for feed in samples]), images)


def test_npy_feeds_a_model_of_one_input_only(tmp_path):
    np.save(tmp_path / "s.npy", random_images(3))
    assert len(load_samples(str(tmp_path / "s.npy"), [IMAGE])) == 3
    with pytest.raises(SampleError, match=r"holds one array, the model has the inputs 'input_ids'.*\n.*use \.npz"):
        load_samples(str(tmp_path / "s.npy"), IDS)


def test_npz_inputs_without_batch_axis_and_states_with_the_batch_elsewhere(tmp_path):
    specs = [TensorSpec("rate", I64, ()), TensorSpec("state", F32, (2, "n", 4))]
    state = np.random.default_rng(0).random((3, 2, 1, 4)).astype(np.float32)
    np.savez(tmp_path / "s.npz", rate=np.array([8, 16, 32]), state=state)
    feed = load_samples(str(tmp_path / "s.npz"), specs).read(1)
    assert feed["rate"].shape == () and feed["rate"] == 16
    np.testing.assert_array_equal(feed["state"], state[1])


def test_a_fixed_batch_groups_samples_and_labels(tmp_path):
    images = random_images(7)
    np.savez(tmp_path / "s.npz", image=images, labels=np.arange(7))
    samples = load_samples(str(tmp_path / "s.npz"), [TensorSpec("image", F32, (3, 3, 8, 8))])
    assert len(samples) == 2 and samples.labels == ((0, 1, 2), (3, 4, 5))
    np.testing.assert_array_equal(samples.read(1)["image"], images[3:6])
    with pytest.raises(SampleError, match="7 samples don't fill the model's batch of 9"):
        load_samples(str(tmp_path / "s.npz"), [TensorSpec("image", F32, (9, 3, 8, 8))])


def test_text_labels_survive(tmp_path):
    np.savez(tmp_path / "s.npz", image=random_images(2), label=np.array(["cat", "dog"]))
    assert load_samples(str(tmp_path / "s.npz"), [IMAGE]).labels == ("cat", "dog")


@settings(max_examples=30)
@given(
    st.sampled_from(["f2", "f4", "f8", "u1", "i4", "i8"]),
    st.sampled_from(["float32", "float16", "int64", "int32", "uint8"]),
)
def test_casts_lose_nothing_or_are_refused(tmp_path_factory, stored, wanted):
    values = np.array([[0, 1, 200], [3, 100, 255]]).astype(stored)
    path = tmp_path_factory.mktemp("cast") / "s.npz"
    np.savez(path, x=values)
    feed = load_samples(str(path), [TensorSpec("x", np.dtype(wanted), ("n", 3))]).read(1)
    assert feed["x"].dtype == np.dtype(wanted)
    np.testing.assert_array_equal(feed["x"][0].astype(np.float64), [3, 100, 255])
    np.savez(path, x=np.array([[0.5, 1000.0, -1.0]]))
    if np.dtype(wanted).kind in "iu":
        with pytest.raises(SampleError, match=rf"holds float64, the model takes {wanted}, and 0.5 can't"):
            load_samples(str(path), [TensorSpec("x", np.dtype(wanted), ("n", 3))])


def test_reading_npz_holds_one_sample_in_memory(tmp_path):
    np.savez(tmp_path / "s.npz", image=np.zeros((64, 3, 128, 128), np.float32))  # 12.6 MB, 0.2 MB a sample
    spec = TensorSpec("image", F32, ("n", 3, 128, 128))
    tracemalloc.start()
    for feed in load_samples(str(tmp_path / "s.npz"), [spec]):
        assert feed["image"].shape == (1, 3, 128, 128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # a few copies of one sample and the file's hashing buffer, far from the whole


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"imge": random_images(2)}, r"no key 'image'; it has 'imge'.*\n.*did you mean 'imge'"),
        ({"image": random_images(2), "labl": np.arange(2)}, r"'labl' is no input.*are 'image'\n.*mean 'label'"),
        ({"image": random_images(2)[:, :, :4]}, r"input 'image' has shape \[1, 3, 4, 8\].*float32\[n, 3, 8, 8\]"),
        ({"image": np.zeros((4, 4), np.float32)}, r"input 'image' has shape \[4, 4\], the model takes"),
        ({"image": random_images(0)}, "holds no samples"),
        ({"image": np.array([["a"]] * 2)}, "input 'image' has shape"),
        ({"image": random_images(2).astype("U3")}, "holds <U3, the model takes float32"),
    ],
    ids=["missing", "extra", "shape", "rank", "none", "rank-text", "dtype"],
)
def test_npz_that_does_not_fit_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(SampleError, match=message):
        load_samples(str(tmp_path / "s.npz"), [IMAGE])


def test_unequal_numbers_of_samples(tmp_path):
    np.savez(tmp_path / "s.npz", a=np.zeros((2, 1)), b=np.zeros((3, 1)))
    specs = [TensorSpec("a", F32, ("n", 1)), TensorSpec("b", F32, ("n", 1))]
    with pytest.raises(SampleError, match="'a' holds 2 samples, 'b' holds 3"):
        load_samples(str(tmp_path / "s.npz"), specs)
    np.savez(tmp_path / "s.npz", a=np.zeros((2, 1)), b=np.zeros((2, 1)), label=np.arange(3))
    with pytest.raises(SampleError, match="'a' holds 2 samples, 'label' holds 3"):
        load_samples(str(tmp_path / "s.npz"), specs)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_are_found_with_sample_and_place(tmp_path, value):
    images = random_images(4)
    images[2, 1, 3, 5] = value
    np.savez(tmp_path / "s.npz", image=images)
    samples = load_samples(str(tmp_path / "s.npz"), [IMAGE])
    samples.read(1)
    with pytest.raises(SampleError, match=rf"sample 2, input 'image' holds {value} at \[0, 1, 3, 5\]"):
        samples.read(2)


def test_damaged_and_object_files_are_refused(tmp_path):
    np.savez(tmp_path / "s.npz", image=random_images(4))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:1000])
    with pytest.raises(SampleError, match=r"can't read samples '.*cut.npz'"):
        load_samples(str(tmp_path / "cut.npz"), [IMAGE])
    np.savez(tmp_path / "o.npz", image=np.array([{}, {}], dtype=object))
    with pytest.raises(SampleError, match="it holds object, expected numbers"):
        load_samples(str(tmp_path / "o.npz"), [IMAGE])


# --- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_of_npz_with_and_without_batch_axis(tmp_path):
    images = random_images(2)
    np.savez(tmp_path / "a.npz", image=images[0], label=4)
    np.savez(tmp_path / "b.npz", image=images[1:], label=5)
    samples = load_samples(str(tmp_path), [IMAGE])
    assert samples.labels == (4, 5)
    np.testing.assert_array_equal(np.concatenate([feed["image"] for feed in samples]), images)
    np.savez(tmp_path / "c.npz", image=images[0])
    with pytest.raises(SampleError, match=r"c.npz has no 'label', a.npz has"):
        load_samples(str(tmp_path), [IMAGE])


def save_images(folder: Path, names: list[str]) -> list[np.ndarray]:
    arrays = []
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
        arrays.append(pixels)
    return arrays


def test_images_with_preprocessing_beside_them_and_labels_from_sub_folders(tmp_path):
    pixels = save_images(tmp_path, ["cat/1.png", "dog/1.png", "dog/2.png"])
    (tmp_path / "preprocessing.json").write_text(json.dumps({"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}))
    samples = load_samples(str(tmp_path), [IMAGE])
    assert samples.labels == (0, 1, 1)
    expected = (pixels[2] / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    np.testing.assert_allclose(samples.read(2)["image"][0], expected.transpose(2, 0, 1), atol=1e-6)
    assert Preprocessing.from_dict(samples.preprocessing) == Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def test_sub_folders_that_are_numbers_are_the_class_itself(tmp_path):
    save_images(tmp_path, ["10/a.png", "9/a.png"])
    assert load_samples(str(tmp_path), [IMAGE], preprocessing=Preprocessing()).labels == (10, 9)


def test_layout_follows_the_input_and_preprocessing_lies_beside_the_model(tmp_path):
    pixels = save_images(tmp_path / "data", ["1.png"])
    (tmp_path / "preprocessing.json").write_text('{"scale": 1.0, "channels": "BGR"}')
    spec = TensorSpec("image", np.dtype(np.uint8), (1, 8, 8, 3))
    samples = load_samples(str(tmp_path / "data"), [spec], model_folder=tmp_path)
    assert samples.labels is None and samples.read(0)["image"].dtype == np.uint8
    np.testing.assert_array_equal(samples.read(0)["image"][0], pixels[0][:, :, ::-1])


def test_labels_csv_orders_and_selects(tmp_path):
    save_images(tmp_path, ["a.png", "b.png", "c.png"])
    (tmp_path / "labels.csv").write_text("file,label\nc.png,7,seven\nelsewhere/a.png,3,three\n")
    assert load_samples(str(tmp_path), [IMAGE], preprocessing=Preprocessing()).labels == (7, 3)
    (tmp_path / "labels.csv").write_text("a.png,hello world\n")
    assert load_samples(str(tmp_path), [IMAGE], preprocessing=Preprocessing()).labels == ("hello world",)
    for text, message in [("a.png,1\nd.png,2\n", "row 2: file 'd.png' isn't there"), ("file,label\n", "no samples")]:
        (tmp_path / "labels.csv").write_text(text)
        with pytest.raises(SampleError, match=message):
            load_samples(str(tmp_path), [IMAGE], preprocessing=Preprocessing())


def test_limit_is_spread_over_the_classes(tmp_path):
    save_images(tmp_path, [f"{name}/{index}.png" for name in "abcd" for index in range(3)])
    samples = load_samples(str(tmp_path), [IMAGE], preprocessing=Preprocessing(), limit=4)
    assert samples.labels == (0, 1, 2, 3)


def test_folders_that_hold_nothing_usable(tmp_path):
    with pytest.raises(SampleError, match="holds no samples"):
        load_samples(str(tmp_path), [IMAGE])
    save_images(tmp_path, ["a.png"])
    with pytest.raises(SampleError, match=r"no preprocessing given or found\n.*preprocessing.json"):
        load_samples(str(tmp_path), [IMAGE])
    with pytest.raises(SampleError, match="images feed a model of one input, this one has 'input_ids'"):
        load_samples(str(tmp_path), IDS, preprocessing=Preprocessing())
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(SampleError, match=r"can't read image '.*b.png'"):
        load_samples(str(tmp_path), [IMAGE], preprocessing=Preprocessing()).read(1)
    np.save(tmp_path / "c.npy", random_images(1))
    with pytest.raises(SampleError, match="mixes arrays and images"):
        load_samples(str(tmp_path), [IMAGE])


# --- preprocessing --------------------------------------------------------------------------------------------------


def test_hugging_face_config_is_understood():
    """The expected values are what transformers 5's CLIPImageProcessor computes, to 1e-5, on the same image."""
    record = {
        "do_resize": True,
        "size": {"shortest_edge": 40},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    }
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    resized = np.asarray(image.resize((56, 40), Image.Resampling.BICUBIC), np.float64)  # shorter side 40
    cropped = resized[4:36, 12:44] / 255
    expected = ((cropped - record["image_mean"]) / record["image_std"]).transpose(2, 0, 1)[None]
    np.testing.assert_allclose(Preprocessing.from_dict(record).apply(image), expected, atol=1e-5)


@given(
    st.builds(
        Preprocessing,
        resize=st.none() | st.integers(1, 300) | st.tuples(st.integers(1, 300), st.integers(1, 300)),
        crop=st.none() | st.tuples(st.integers(1, 300), st.integers(1, 300)),
        interpolation=st.sampled_from(["nearest", "bilinear", "bicubic"]),
        scale=st.floats(0.001, 1.0),
        layout=st.sampled_from(["NCHW", "NHWC"]),
        channels=st.sampled_from(["RGB", "BGR", "L"]),
    )
)
def test_preprocessing_survives_json(how):
    assert Preprocessing.from_dict(json.loads(json.dumps(how.to_dict()))) == how


@settings(max_examples=25)
@given(st.integers(4, 60), st.integers(4, 60), st.integers(4, 40), st.integers(4, 40))
def test_resize_and_crop_give_the_promised_shape(height, width, short, crop):
    image = Image.new("RGB", (width, height), (255, 255, 255))
    assert Preprocessing(resize=short, crop=(crop, crop + 1)).apply(image).shape == (1, 3, crop, crop + 1)
    resized = Preprocessing(resize=short).apply(image).shape
    assert min(resized[2:]) == short


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"men": [0.5]}, r"unknown preprocessing key 'men'\n.*'mean'"),
        ({"interpolation": "bilinar"}, r"'interpolation' is 'bilinar'\n.*'bilinear'"),
        ({"layout": "NHCW"}, "key 'layout' is 'NHCW'"),
        ({"std": [0.0, 1.0, 1.0]}, "'std' holds 0"),
    ],
)
def test_bad_preprocessing_is_named(record, message):
    with pytest.raises(SampleError, match=message):
        Preprocessing.from_dict(record)


def test_preprocessing_files_that_are_not_records(tmp_path):
    (tmp_path / "p.json").write_text("[1]")
    with pytest.raises(SampleError, match="holds list, expected an object"):
        Preprocessing.from_file(tmp_path / "p.json")
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(SampleError, match="can't read preprocessing"):
        Preprocessing.from_file(tmp_path / "p.json")


# --- text -----------------------------------------------------------------------------------------------------------


def save_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "the", "cat", "sat"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=128)  # as many published files have it: must not reach a dynamic model
    tokenizer.save(str(path))


def test_text_lines_have_their_own_length_and_a_fixed_input_pads(tmp_path):
    save_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "lines.txt").write_text("the cat sat\n\nthe dog\n")
    samples = load_samples(str(tmp_path / "lines.txt"), IDS)
    assert [feed["input_ids"].tolist() for feed in samples] == [[[2, 3, 4]], [[2, 1]]]
    fixed = [TensorSpec(spec.name, I64, (1, 5)) for spec in IDS]
    feed = load_samples(str(tmp_path / "lines.txt"), fixed).read(1)
    assert feed["input_ids"].tolist() == [[2, 1, 0, 0, 0]] and feed["attention_mask"].tolist() == [[1, 1, 0, 0, 0]]
    short = [TensorSpec("input_ids", I64, (1, 2))]
    assert load_samples(str(tmp_path / "lines.txt"), short).read(0)["input_ids"].tolist() == [[2, 3]]


def test_text_folder_takes_a_given_tokenizer_and_sub_folders_as_labels(tmp_path):
    save_tokenizer(tmp_path / "words.json")
    for name, text in [("bad", "the cat"), ("good", "the sat")]:
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "1.txt").write_text(text)
    with pytest.raises(SampleError, match=r"text needs a tokenizer.*\n.*tokenizer.json"):
        load_samples(str(tmp_path / "texts"), IDS)
    samples = load_samples(str(tmp_path / "texts"), IDS, tokenizer=tmp_path / "words.json")
    assert samples.labels == (0, 1) and samples.read(1)["input_ids"].tolist() == [[2, 4]]
    with pytest.raises(SampleError, match="a tokenizer can't make the input 'image'"):
        load_samples(str(tmp_path / "texts"), [IMAGE], tokenizer=tmp_path / "words.json")


# --- callables, synthetic, and mistakes in the word itself ----------------------------------------------------------

MODULE = """
import numpy as np

def good():
    for index in range(5):
        yield {"image": np.full((3, 8, 8), index, np.float64), "label": index}

def endless():
    while True:
        yield {"image": np.zeros((1, 3, 8, 8), np.float32)}

def empty():
    return []

def rows():
    return [[1, 2]]

def number():
    return 3

CONSTANT = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_samples.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield "own_samples"
    sys.modules.pop("own_samples", None)


def test_a_callable_in_the_current_folder(module):
    samples = load_samples(f"{module}:good", [IMAGE])
    assert samples.labels == (0, 1, 2, 3, 4)
    for _ in range(2):
        assert [float(feed["image"].mean()) for feed in samples] == [0, 1, 2, 3, 4]
    assert samples.digest == load_samples(f"{module}:good", [IMAGE]).digest
    assert len(load_samples(f"{module}:endless", [IMAGE], limit=3)) == 3


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("own_samples:empty", SampleError, "yields no samples"),
        ("own_samples:rows", SampleError, "sample 0 is list, expected a dict"),
        ("own_samples:number", SampleError, "returned int, expected an iterable"),
        ("own_samples:god", UsageError, r"has no 'god'\n.*'good'"),
        ("own_samples:CONSTANT", SampleError, "is int, expected a callable"),
        ("own_sample:good", UsageError, "no module 'own_sample'"),
    ],
)
def test_callables_that_give_no_samples(module, name, error, message):
    with pytest.raises(error, match=message):
        load_samples(name, [IMAGE])


def test_synthetic_is_marked_and_repeats():
    samples = load_samples("synthetic:3:7", [IMAGE])
    assert samples.synthetic and len(samples) == 3
    np.testing.assert_array_equal(samples.read(2)["image"], load_samples("synthetic:3:7", [IMAGE]).read(2)["image"])
    assert not np.array_equal(samples.read(0)["image"], samples.read(1)["image"])
    for bad in ("synthetic:", "synthetic:x", "synthetic:0", "synthetic:1:2:3"):
        with pytest.raises(SampleError, match="use synthetic:N"):
            load_samples(bad, [IMAGE])


def test_a_missing_path_suggests_its_neighbour(tmp_path):
    np.savez(tmp_path / "photos.npz", image=random_images(1))
    with pytest.raises(SampleError, match=r"no samples at '.*photo.npz'.*\n.*did you mean 'photos.npz'"):
        load_samples(str(tmp_path / "photo.npz"), [IMAGE])
    (tmp_path / "photos.rar").write_bytes(b"")
    with pytest.raises(SampleError, match=r"can't use '.*photos.rar' as samples: .rar"):
        load_samples(str(tmp_path / "photos.rar"), [IMAGE])


# --- parts of samples -----------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(2, 40), st.floats(0, 1), st.integers(0, 3))
def test_split_is_a_partition_that_repeats(count, fraction, seed):
    samples = load_samples(f"synthetic:{count}", [TensorSpec("x", F32, (1, 2))])
    parts = split(samples, fraction=fraction, seed=seed)
    again = split(samples, fraction=fraction, seed=seed)
    assert [part.digest for part in parts] == [part.digest for part in again]
    assert min(map(len, parts)) >= 1
    seen = sorted(float(feed["x"][0, 0]) for part in parts for feed in part)
    assert seen == sorted(float(feed["x"][0, 0]) for feed in samples)


def test_split_of_one_sample_says_what_to_do():
    with pytest.raises(SampleError, match=r"1 sample can't be split.*\n.*-e"):
        split(load_samples("synthetic:1", [IMAGE]))


def test_take_spreads_and_changes_the_digest(tmp_path):
    np.savez(tmp_path / "s.npz", image=random_images(6), label=np.arange(6))
    samples = load_samples(str(tmp_path / "s.npz"), [IMAGE])
    assert take(samples, 3).labels == (0, 2, 4) and take(samples, 9) is samples
    assert take(samples, 3).digest != samples.digest
    assert load_samples(str(tmp_path / "s.npz"), [IMAGE], limit=3).digest == take(samples, 3).digest
    with pytest.raises(SampleError, match="at least 1"):
        take(samples, 0)


def test_the_digest_is_of_the_contents(tmp_path):
    np.savez(tmp_path / "a.npz", image=random_images(2))
    np.savez(tmp_path / "b.npz", image=random_images(2))
    np.savez(tmp_path / "c.npz", image=random_images(2, seed=1))
    a, b, c = (load_samples(str(tmp_path / name), [IMAGE]).digest for name in ("a.npz", "b.npz", "c.npz"))
    assert a == b != c
