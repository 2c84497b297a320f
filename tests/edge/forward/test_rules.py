"""Which rule decides, and what it looks at."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from edge.config import load_config
from edge.forward.facts import facts_of, read_facts_head
from edge.forward.rules import Decision, Facts, Rule, decide, failing, matches, without_sender
from edge.imaging.read import MANUFACTURER
from shared.errors import ConfigError
from tests.simulators.modality import EXPLICIT, encoded, phantom_study

CT = "1.2.840.10008.5.1.4.1.1.2"
CHEST = Facts(modality="CR", calling_ae="CR_ROOM1", called_ae="RADFLEET", sop_class=CT, body_part="CHEST",
              study_description="Thorax p.a.", series_description="pa")  # fmt: skip


@pytest.mark.parametrize(
    ("conditions", "holds"),
    [
        ({}, True),
        ({"modality": ("CR",)}, True),
        ({"modality": ("cr",)}, True),
        ({"modality": ("CT", "C?")}, True),
        ({"modality": ("CT",)}, False),
        ({"modality": ("C",)}, False),
        ({"calling_ae": ("CR_*",)}, True),
        ({"called_ae": ("TEACHING",)}, False),
        ({"sop_class": (CT,)}, True),
        ({"sop_class": ("CTImage*",)}, True),
        ({"sop_class": ("1.2.840.10008.5.1.4.1.1.2.*",)}, False),
        ({"study_description": ("*THORAX*",)}, True),
        ({"study_description": ("thorax p.a.",)}, True),
        ({"series_description": ("[pl]a",)}, True),
        ({"modality": ("CR",), "body_part": ("KNEE",)}, False),
        ({"modality": ("CR",), "body_part": ("KNEE", "CH*")}, True),
    ],
)
def test_a_rule_holds_when_all_its_conditions_do(conditions: dict[str, tuple[str, ...]], holds: bool) -> None:
    rule = Rule(name="r", action="keep", **conditions)
    assert (not failing(rule, CHEST)) == holds
    assert (decide([rule], CHEST).action == "keep") == holds


def test_the_first_rule_that_matches_decides_and_without_one_an_object_is_analysed() -> None:
    rules = [
        Rule(name="one", action="ignore", modality=("CT",)),
        Rule(name="two", action="both", destinations=("a", "b"), priority="high", modality=("CR",)),
        Rule(name="three", action="keep"),
    ]
    assert decide(rules, CHEST) == Decision("both", ("a", "b"), "high", "two: modality match")
    assert decide(rules[:1], CHEST) == Decision("analyse", (), "normal", "no rule matches")
    assert decide([], CHEST).read
    assert failing(rules[0], CHEST) == "modality"


@pytest.mark.parametrize("fact", ["ours", "prior"])
def test_no_rule_sends_on_what_this_node_made_or_fetched(fact: str) -> None:
    rule = Rule(name="all", action="both", destinations=("a",))
    decision = decide([rule], Facts(modality="CR", **{fact: True}))
    assert not decision.read
    assert decision.destinations == ()


def test_an_object_does_not_go_back_to_whom_it_came_from() -> None:
    decision = Decision("both", ("a", "b"), "normal", "r")
    left = without_sender(decision, "ARCHIVE", {"a": "ARCHIVE", "b": "OTHER"})
    assert left.destinations == ("b",)
    assert "not back to a" in left.why
    assert without_sender(decision, "CT1", {"a": "ARCHIVE", "b": "OTHER"}) == decision


def test_a_pattern_of_stars_takes_no_time() -> None:
    assert not matches(["*a" * 60 + "b"], "a" * 256)


def test_facts_come_from_the_data_set_and_from_the_head_of_its_file_alike(tmp_path: Path) -> None:
    item = phantom_study("chest-xray", 1, seed=7)[0]
    item.StudyDescription, item.SeriesDescription = "Röntgen Thorax", "p.a."
    item.SpecificCharacterSet = "ISO_IR 100"
    path = tmp_path / "x.dcm"
    path.write_bytes(b"?" * 77 + encoded(item))
    found = read_facts_head(path, 77, EXPLICIT)
    head = found.dataset
    assert not found.fault
    assert "PixelData" not in head
    one, other = (facts_of(d, calling_ae="CT1", called_ae="RADFLEET") for d in (item, head))
    assert one == other
    assert one.study_description == "Röntgen Thorax"
    assert (one.modality, one.body_part) == (item.Modality, "CHEST")
    assert not one.ours


def test_what_this_software_made_is_known_by_its_maker() -> None:
    made = Dataset()
    made.Manufacturer = MANUFACTURER
    assert facts_of(made, calling_ae="PACS").ours


def test_a_value_that_lies_about_its_length_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.dcm"
    path.write_bytes(b"\x08\x00\x16\x00UN\x00\x00\xf0\xff\xff\xff" + b"1" * 100)
    facts = facts_of(read_facts_head(path, 0, EXPLICIT).dataset, calling_ae="X")
    assert len(facts.sop_class) <= 64


DESTINATION = '[[destination]]\nname = "archive"\nae_title = "A"\nhost = "h"\nport = 104\n'


def faults(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return "\n".join(caught.value.faults)


def test_the_configuration_gives_rules_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "edge.toml"
    path.write_text(
        DESTINATION + 'ca = "ca.pem"\n'
        '[[rule]]\nname = "mammo"\naction = "both"\ndestinations = ["archive"]\nmodality = ["MG"]\npriority = "high"\n'
        '[[rule]]\naction = "ignore"\nsop_class = ["*PresentationState*"]\n'
        '[[fetch]]\nsource = "archive"\nwhat = "series"\n'
    )
    config = load_config(path)
    assert config.rules == [
        Rule("rule 1 (mammo)", "both", ("archive",), "high", modality=("MG",)),
        Rule("rule 2", "ignore", sop_class=("*PresentationState*",)),
    ]
    assert config.destination[0].ca == tmp_path / "ca.pem"


def test_all_faults_of_rules_are_told_at_once(tmp_path: Path) -> None:
    found = faults(
        tmp_path / "edge.toml",
        DESTINATION
        + '[[rule]]\naction = "forward"\ndestinations = ["archive", "nowhere"]\n'
        + '[[rule]]\naction = "both"\ndestinations = ["elsewhere"]\n'
        + '[[fetch]]\nsource = "gone"\nwhat = "priors"\n[series]\nquiet_s = -1\n',
    )
    for word in ("'nowhere'", "'elsewhere'", "'gone'", "series.quiet_s", "there are: archive"):
        assert word in found


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('[[rule]]\naction = "forward"\n', "need destinations"),
        (DESTINATION + '[[rule]]\naction = "keep"\ndestinations = ["archive"]\n', "have none"),
        (DESTINATION + DESTINATION, "stand twice: archive"),
        (DESTINATION + 'certificate = "c.pem"\n', "go together"),
        (f'[[rule]]\naction = "keep"\nmodality = ["{"x" * 129}"]\n', "128"),
        (f'[[rule]]\naction = "keep"\nmodality = {["C?"] * 33}\n', "32"),
        ('[[rule]]\naction = "keep"\n' * 201, "200"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(tmp_path: Path, text: str, what: str) -> None:
    assert what in faults(tmp_path / "edge.toml", text)
