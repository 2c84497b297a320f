"""Which head reads an image: the package's table, or the reason why none does."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from edge.imaging.read import ImageHead
from shared.package.manifest import Head

_GREY = ("MONOCHROME1", "MONOCHROME2", "")  # what does not say is left to the decoder


class NotAssessed(Struct, frozen=True):
    """No head reads this image; `reason` is shown to the radiologist as it stands."""

    reason: str


def route(heads: Sequence[Head], image: ImageHead) -> Head | NotAssessed:
    """Returns the first head that takes the image, or why it is not assessed: never a guess."""
    for_modality = [head for head in heads if image.modality in head.modalities]
    for_part = [head for head in for_modality if _takes_part(head, image.body_part)]
    for_view = [head for head in for_part if not head.views or not image.view or image.view in head.views]
    able = [head for head in for_view if head.series or image.frames == 1]
    colour = image.samples != 1 or image.photometric not in _GREY
    if able and not colour and "LOCALIZER" not in image.kind:
        return able[0]
    if not for_modality:
        reason = f"no model reads modality {image.modality or '(empty)'}"
    elif not for_part:
        reason = f"no model reads {image.modality} of {image.body_part or 'an unnamed body part'}"
    elif not for_view:
        reason = f"no model reads view {image.view} of {image.modality} {image.body_part}".rstrip()
    elif not able:
        reason = f"{image.frames} frames in one projection image are not assessed"
    else:
        reason = "a colour image is not assessed" if colour else "a localizer is not assessed"
    return NotAssessed(reason)


def _takes_part(head: Head, body_part: str) -> bool:
    return head.body_part_optional if not body_part else body_part in head.body_parts
