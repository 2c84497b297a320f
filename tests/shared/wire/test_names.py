"""Names: site and node mean the same in certificate, topic and header."""

from __future__ import annotations

from pathlib import Path

import pytest

from shared.errors import PeerError, TrustError
from shared.wire import topics
from shared.wire.identity import Identity, agree, identity_of, parse_common_name
from tests.simulators.pki import TestAuthority

A, B = Identity("hosp-a", "n1"), Identity("hosp-b", "n1")


@pytest.mark.parametrize("name", ["a", "hosp-a", "0", "a" * 32, "a-1-b"])
def test_good_names(name: str) -> None:
    assert Identity(name, name).common_name == f"{name}/{name}"


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", "a" * 33, "a/b", "a+", "#", "a b", "ä", "a\n", "a.b"])
def test_bad_names(name: str) -> None:
    with pytest.raises(PeerError):
        Identity(name, "n1")
    with pytest.raises(PeerError):
        Identity("hosp-a", name)


@pytest.mark.parametrize("text", ["hosp-a", "hosp-a/", "/n1", "hosp-a/n1/x", "cloud"])
def test_bad_common_names(text: str) -> None:
    with pytest.raises(PeerError):
        parse_common_name(text)


def test_topics_are_read_as_they_are_built() -> None:
    assert topics.parse(topics.up(A, "update")) == topics.Topic(A, "up", "update")
    assert topics.parse(topics.down(A, "desired")) == topics.Topic(A, "down", "desired")
    assert topics.all_down(A) == "radfleet/1/hosp-a/n1/down/+"


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "radfleet/1/hosp-a/n1/up",
        "radfleet/2/hosp-a/n1/up/update",
        "radfleet/1/hosp-a/n1/up/receipt",  # a stage of the other direction
        "radfleet/1/hosp-a/n1/down/update",
        "radfleet/1/hosp-a/n1/sideways/update",
        "radfleet/1/hosp-a/n1/up/update/",
        "/radfleet/1/hosp-a/n1/up/update",
        "radfleet/1/+/n1/up/update",
        "radfleet/1/hosp-a/n1/up/" + "u" * 200,
    ],
)
def test_bad_topics(topic: str) -> None:
    with pytest.raises(PeerError):
        topics.parse(topic)


def test_a_certificate_names_its_node(tmp_path: Path) -> None:
    authority = TestAuthority(tmp_path)
    assert identity_of(authority.node("hosp-a", "n1").x509) == A


@pytest.mark.parametrize(
    ("common_name", "uri"),
    [
        ("hosp-a/n1", "spiffe://radfleet/hosp-b/n1"),
        ("hosp-a/n1", None),
        ("cloud", "spiffe://radfleet/cloud"),
        ("hosp-a/n1", "spiffe://other/hosp-a/n1"),
    ],
)
def test_a_certificate_with_two_names_is_refused(tmp_path: Path, common_name: str, uri: str | None) -> None:
    leaf = TestAuthority(tmp_path).issue(common_name, uri=uri, file="x")
    with pytest.raises(TrustError):
        identity_of(leaf.x509)


def test_one_comparison_for_all_three() -> None:
    agree(certificate=A, topic=A, header=A)
    for names in [(B, A, A), (A, B, A), (A, A, B)]:
        with pytest.raises(TrustError):
            agree(certificate=names[0], topic=names[1], header=names[2])
