"""load.py: pictures in, answers out, the variant that suits the machine, a result remembered while it holds."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from edgeq.errors import PackageError, UsageError
from edgeq.packaging import Package, combined, loader, postprocessing_of, read_directory, write_directory
from edgeq.packaging.record import Golden
from edgeq.run.preprocess import INTERPOLATIONS, Preprocessing
from tests.packaged import classifier, files, picture, reseal
from tests.tabled import needs_library, packaged, ran


@settings(max_examples=150)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    resize=st.one_of(st.none(), st.integers(1, 40), st.tuples(st.integers(1, 60), st.integers(1, 60))),
    crop=st.one_of(st.none(), st.tuples(st.integers(1, 70), st.integers(1, 70))),
    interpolation=st.sampled_from(sorted(INTERPOLATIONS)),
    channels=st.sampled_from(["RGB", "BGR", "L"]),
    layout=st.sampled_from(["NCHW", "NHWC"]),
)
def test_pictures_become_the_bits_that_pillow_makes(size: tuple[int, int], **how: Any) -> None:
    mean, std = ((0.4,), (0.2,)) if how["channels"] == "L" else ((0.4, 0.5, 0.6), (0.2, 0.3, 0.1))
    record = Preprocessing(mean=mean, std=std, **how)
    image = Image.fromarray(picture(*size))
    expected = image.convert("L" if record.channels == "L" else "RGB")
    if record.resize is not None:
        short = record.resize
        sides = short if isinstance(short, tuple) else [int(short * side / min(size)) for side in size]
        edges = [(2 * i + 1) * old % (2 * new) for old, new in zip(size, sides, strict=True) for i in range(new)]
        assume(record.interpolation != "nearest" or 0 not in edges)  # Pillow adds up steps, and misses whole numbers
        filters: Any = INTERPOLATIONS[record.interpolation]
        expected = expected.resize((sides[1], size[0]), filters).resize((sides[1], sides[0]), filters)
    if record.crop is not None:
        top, left = (round((side - cut) / 2) for side, cut in zip(expected.size[::-1], record.crop, strict=True))
        expected = expected.crop((left, top, left + record.crop[1], top + record.crop[0]))
    pixels = np.asarray(expected, np.float32).reshape(*expected.size[::-1], -1)
    pixels = pixels[:, :, ::-1] if record.channels == "BGR" else pixels
    values = (pixels * np.float32(1 / 255) - np.array(mean, np.float32)) / np.array(std, np.float32)
    values = values if record.layout == "NHWC" else values.transpose(2, 0, 1)
    np.testing.assert_array_equal(record.apply(image), values[None])
    np.testing.assert_array_equal(loader.preprocess(picture(*size), record.to_dict()), values[None])


def test_a_picture_becomes_an_answer(tmp_path: Path) -> None:
    out = write_directory(classifier(tmp_path / "made"), tmp_path / "net.edgeq")
    pixels = picture()
    (answer,) = loader.pipeline(out)(pixels)
    scores = loader.load(out).run(None, {"image": read_preprocessing(out).apply(Image.fromarray(pixels))})[0][0]
    probabilities = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    best = np.argsort(-probabilities)[:2]
    assert [row["index"] for row in answer] == best.tolist()
    assert [row["label"] for row in answer] == [f"class {index}" for index in best]
    np.testing.assert_allclose([row["score"] for row in answer], probabilities[best], rtol=1e-6)
    np.testing.assert_array_equal(
        scores,
        loader.pipeline(write_directory(replace(read_directory(out), postprocessing={}), tmp_path / "raw"))(pixels)[
            "logits"
        ][0],
    )


def read_preprocessing(out: Path) -> Preprocessing:
    return Preprocessing.from_dict(read_directory(out).preprocessing)


@pytest.mark.parametrize("broken", ["values", "preprocessing"])
def test_other_preprocessing_is_noticed(tmp_path: Path, broken: str) -> None:
    out = write_directory(classifier(tmp_path / "made"), tmp_path / "net.edgeq")

    def change(manifest: dict[str, Any]) -> None:
        if broken == "values":
            manifest["canary"]["values"][7] += 0.1
        else:
            manifest["preprocessing"]["interpolation"] = "bilinear"

    reseal(out, change)
    with pytest.raises(ValueError, match="of the canary picture at"):
        loader.pipeline(out)


def test_scores_become_answers() -> None:
    scores = np.array([[2.0, 2.0, -1.0], [0.0, 3.0, 1.0]], np.float32)
    how = {"activation": "sigmoid", "top": 2, "threshold": 0.6}
    first, second = loader.postprocess(scores, how, ["a", "b"])
    assert [(row["label"], row["index"]) for row in first] == [
        ("a", 0),
        ("b", 1),
    ]  # the first of equals
    assert [(row["label"], row["index"]) for row in second] == [("b", 1), ("2", 2)]
    assert second[0]["score"] == pytest.approx(1 / (1 + np.exp(-3.0)))
    (low, _) = loader.postprocess(scores, {"activation": "none", "top": 0, "threshold": 2.5}, [])
    assert low == []


def test_labels_ask_for_softmax_unless_outputs_are_probabilities(tmp_path: Path) -> None:
    logits = np.array([[3.0, -1.0, 0.5]], np.float32)
    shares = np.exp(logits) / np.exp(logits).sum()
    labels = ["a", "b", "c"]
    golden = Golden(({},), ({"boxes": np.zeros((1, 4), np.float32), "y": logits},), {})
    assert postprocessing_of(None, labels, golden)["activation"] == "softmax"
    golden = Golden(({},), ({"y": shares},), {})
    assert postprocessing_of(None, labels, golden) == {"output": "y", "activation": "none", "top": 5, "threshold": 0.0}
    assert postprocessing_of(None, [], golden) == {}
    (tmp_path / "post.json").write_text('{"output": "y", "activation": "sigmoid", "top": 1}')
    assert postprocessing_of(tmp_path / "post.json", [], golden)["activation"] == "sigmoid"
    for text, message in (
        ('{"output": "z"}', "reads output 'z'"),
        ('{"activation": "softmax"}', "no key 'output'"),
        ('{"output": "y", "activation": "softmx"}', "'softmx'"),
        ('{"output": "y", "topk": 3}', "unknown postprocessing key 'topk'"),
        ('{"output": "y", "top": -1}', "expected a whole number"),
        ("{", "can't read postprocessing"),
    ):
        (tmp_path / "post.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            postprocessing_of(tmp_path / "post.json", [], golden)
    with pytest.raises(UsageError, match="2 labels, but no output has as many classes"):
        postprocessing_of(None, ["a", "b"], golden)


@pytest.fixture
def fat(tmp_path: Path) -> Path:
    """A package of three variants: for a CPU of the future, for any, and one with wrong results."""
    package = classifier(tmp_path / "made")
    rows = []
    for name, isa in (("future", ["no_such_flag"]), ("any", []), ("wrong", [])):
        report = replace(package.report, target={**package.report.target, "name": name, "isa": isa})
        rows.append(replace(package, report=report))
    wrong = rows[2].golden
    outputs = tuple({"logits": one["logits"] + np.float32(1)} for one in wrong.outputs)
    rows[2] = replace(rows[2], golden=replace(wrong, outputs=outputs))
    return write_directory(combined(rows), tmp_path / "fat.edgeq")


def test_the_best_variant_that_runs_is_used_and_the_others_named(fat: Path) -> None:
    with pytest.warns(UserWarning, match="isn't used") as told:
        found = loader.choose(fat)
    assert ["lacks no_such_flag; running 'any'" in str(one.message) for one in told] == [True, False]
    assert found.variant == "any"
    assert len(found.passed_over) == 2
    assert "'logits' differs from golden sample 0" in found.passed_over[1]
    manifest = json.loads((fat / "manifest.json").read_text())
    assert [row["model"] for row in manifest["variants"]] == ["model.onnx", "any.onnx", "wrong.onnx"]
    reseal(fat, lambda manifest: manifest["variants"].pop(1))
    with pytest.raises(RuntimeError, match=r"has no variant that runs: .*no_such_flag.*golden sample"):
        loader.choose(fat)


def test_variants_share_their_weights(fat: Path, tmp_path: Path) -> None:
    one = write_directory(classifier(tmp_path / "made"), tmp_path / "one")
    weights = [fat / name for name in ("model.onnx", "any.onnx", "wrong.onnx", "tensors.bin")]
    alone = (one / "model.onnx").stat().st_size
    assert sum(path.stat().st_size for path in weights) < 1.5 * alone
    assert (fat / "tensors.bin").stat().st_size > 0.6 * alone
    back = read_directory(fat)
    assert [variant.name for variant in back.variants] == ["future", "any", "wrong"]
    again = write_directory(back, tmp_path / "again")
    assert files(again) == files(fat)


def test_the_faster_variant_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = classifier(tmp_path / "made")
    slow, fast = (
        replace(package, report=replace(package.report, target={**package.report.target, "name": name}))
        for name in ("slow", "fast")
    )
    out = write_directory(combined([slow, fast]), tmp_path / "fat.edgeq")
    laps: Iterator[float] = iter([2.0, 1.0, 2.0, 1.95])
    monkeypatch.setattr(loader, "_milliseconds", lambda run: next(laps))
    with pytest.warns(UserWarning, match="variant 'slow' isn't used: 2 ms a run, 'fast' 1"):
        assert loader.choose(out).variant == "fast"
    assert loader.choose(out, fresh=True).variant == "slow"  # 1.95 is no clear win over the preferred one


def test_packages_of_other_models_do_not_mix(tmp_path: Path) -> None:
    package = classifier(tmp_path / "made")
    (feed, *_) = package.golden.inputs
    other = replace(package, golden=Golden(({"picture": feed["image"]},), package.golden.outputs[:1], {}))
    with pytest.raises(PackageError, match="has the inputs"):
        combined([package, other])


def _runs_golden(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    check = loader._check_golden
    monkeypatch.setattr(loader, "_check_golden", lambda *rest: (seen.append(1), check(*rest))[1])
    return seen


def test_a_good_first_start_is_remembered_until_anything_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package: Package = classifier(tmp_path / "made")
    out = write_directory(package, tmp_path / "net.edgeq")
    seen, settled = _runs_golden(monkeypatch), loader.SETTLED_SECONDS
    monkeypatch.setattr(loader, "SETTLED_SECONDS", 600.0)
    loader.load(out)
    loader.load(out)
    assert len(seen) == 2  # files so new that a change could leave no trace: nothing is remembered yet
    monkeypatch.setattr(loader, "SETTLED_SECONDS", settled)
    time.sleep(2 * settled)
    for _ in range(3):
        session = loader.load(out, threads=1)
    assert len(seen) == 3
    assert session.get_session_options().intra_op_num_threads == 1
    loader.load(out, fresh=True)
    assert len(seen) == 4
    whole = (out / "model.onnx").read_bytes()
    (out / "model.onnx").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="altered"):
        loader.load(out)
    (out / "model.onnx").write_bytes(whole)
    loader.load(out)
    assert len(seen) == 5
    out.rename(tmp_path / "moved")
    time.sleep(2 * loader.SETTLED_SECONDS)
    loader.load(tmp_path / "moved")
    assert len(seen) == 6


def test_without_a_place_to_remember_everything_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_directory(classifier(tmp_path / "made"), tmp_path / "net.edgeq")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEQ_STATE", str(tmp_path / "file"))
    seen = _runs_golden(monkeypatch)
    time.sleep(2 * loader.SETTLED_SECONDS)
    loader.load(out)
    loader.load(out)
    assert len(seen) == 2


CODES = np.arange(256, dtype=np.uint8)[None]


def test_kernels_of_the_package_run(tmp_path: Path) -> None:
    out = write_directory(packaged(tmp_path / "made", needs_library()), tmp_path / "net.edgeq")
    (library,) = out.glob("kernels-*.so")
    session = loader.load(out)
    assert ran(CODES, session.run(None, {"c": CODES})[0]) == "kernel"
    again = write_directory(read_directory(out), tmp_path / "again.edgeq")
    assert (again / library.name).read_bytes() == library.read_bytes()
    (again / library.name).write_bytes(library.read_bytes()[:-1] + b"x")  # not the one that is loaded
    with pytest.raises(ValueError, match=r"kernels-.*\.so is altered"):
        loader.load(again)


def test_without_its_library_a_package_runs_its_functions(tmp_path: Path) -> None:
    """Left out, or for another system; one that can't be loaded is told."""
    out = write_directory(packaged(tmp_path / "made", needs_library(), golden=False), tmp_path / "net.edgeq")
    (library,) = out.glob("kernels-*.so")
    library.write_bytes(b"no library")
    digest = hashlib.sha256(b"no library").hexdigest()
    reseal(out, lambda manifest: manifest["files"][library.name].update(sha256=digest))
    with pytest.warns(UserWarning, match=r"kernels-.*\.so isn't used, which only takes longer"):
        session = loader.load(out)
    assert ran(CODES, session.run(None, {"c": CODES})[0]) == "function"
    library.unlink()
    assert ran(CODES, loader.load(out).run(None, {"c": CODES})[0]) == "function"
