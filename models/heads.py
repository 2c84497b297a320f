"""The three readers of the baseline: which studies each takes, what it answers, how it wants to see an image.

Codes are SNOMED CT or DCM where pydicom's dictionary has the concept; a finding that it does not have gets a code of
our own scheme 99RADFLEET, never a guessed number.
"""

from __future__ import annotations

from shared.package.input_spec import InputSpec, Percentile, Window
from shared.package.manifest import Code, Head, ModelClass

SIDE = 224  # pixels, both sides, every head
LUNG = Window(center=-500.0, width=1500.0)  # HU

NORMAL = Code("17621005", "SCT", "Normal")
BENIGN = Code("30807003", "SCT", "Benign")
MALIGNANT = Code("21594007", "SCT", "Malignant")


def _own(value: str, meaning: str) -> Code:
    return Code(value, "99RADFLEET", meaning)


HEADS: tuple[Head, ...] = (
    Head(
        name="chest-xray",
        title="Chest X-ray",
        modalities=["CR", "DX"],
        body_parts=["CHEST", "THORAX", "LUNG"],
        body_part_optional=False,
        views=["AP", "PA"],
        series=False,
        offset=0,
        classes=[
            ModelClass("normal", NORMAL),
            ModelClass("pneumonia", _own("PNEUMONIA", "Pneumonia")),
            ModelClass("other", _own("OTHER-CHEST", "Other abnormal finding of the chest")),
        ],
        normal=0,
        input=InputSpec(SIDE, SIDE, Percentile(1.0, 99.0)),
        temperature=1.0,
        scope=None,
    ),
    Head(
        name="chest-ct",
        title="Chest CT",
        modalities=["CT"],
        body_parts=["CHEST", "THORAX", "LUNG"],
        body_part_optional=False,
        views=[],
        series=True,
        offset=3,
        classes=[
            ModelClass("normal", NORMAL),
            ModelClass("benign", BENIGN),
            ModelClass("malignant", MALIGNANT),
        ],
        normal=0,
        input=InputSpec(SIDE, SIDE, LUNG),
        temperature=1.0,
        scope=None,
    ),
    Head(
        name="brain-mri",
        title="Brain MRI",
        modalities=["MR"],
        body_parts=["BRAIN", "HEAD"],
        body_part_optional=False,
        views=[],
        series=True,
        offset=6,
        classes=[
            ModelClass("notumor", NORMAL),
            ModelClass("glioma", _own("GLIOMA", "Glioma")),
            ModelClass("meningioma", _own("MENINGIOMA", "Meningioma")),
            ModelClass("pituitary", _own("PITUITARY-TUMOR", "Tumor of pituitary gland")),
        ],
        normal=0,
        input=InputSpec(SIDE, SIDE, Percentile(1.0, 99.0)),
        temperature=1.0,
        scope=None,
    ),
)
CLASSES = sum(len(head.classes) for head in HEADS)  # K, the columns of the logits
BY_NAME = {head.name: head for head in HEADS}
