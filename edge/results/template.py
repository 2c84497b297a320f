"""Reports of one kind share their tree: it is built once, and each report fills in what is its own.

Building a TID 1500 tree through highdicom takes most of a report's time and gives the same tree for every answer of
one head, class and package. The bytes are those of a report built without a template; a test holds that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

_KEPT = 64  # kinds of report that are remembered

Texts = Mapping[str, str]  # what differs between two reports of one kind, by name; no two texts of a report are equal


class _Template:
    def __init__(self, report: Dataset, marks: Texts) -> None:
        self.report = report
        names = {text: name for name, text in marks.items()}
        self._places: list[tuple[DataElement, str]] = [
            (element, names[str(element.value)]) for element in _leaves(report) if str(element.value) in names
        ]

    def fill(self, texts: Texts) -> Dataset:
        for element, name in self._places:
            element.value = texts[name]
        return self.report


class Templates:
    """One thread uses it; a report that was given is valid until the next one is asked for."""

    def __init__(self) -> None:
        self._held: OrderedDict[Any, _Template] = OrderedDict()

    def report(self, kind: object, texts: Texts, build: Callable[[], tuple[Dataset, Texts]]) -> Dataset:
        """Returns the report of a kind with these texts.

        Args:
            kind: equal for reports that differ in nothing but `texts`; hashable.
            texts: this report's.
            build: makes a report of the kind whose texts are as different from each other as they can be, and names
                them.
        """
        template = self._held.get(kind)
        if template is None:
            template = self._held[kind] = _Template(*build())
            if len(self._held) > _KEPT:
                self._held.popitem(last=False)
        return template.fill(texts)


def _leaves(dataset: Dataset) -> Iterator[DataElement]:
    for element in [*getattr(dataset, "file_meta", ()), *dataset]:
        if element.VR == "SQ":
            for item in element.value:
                yield from _leaves(item)
        else:
            yield element
