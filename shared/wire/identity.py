"""Who a node is: site and node, the same in its certificate, its topics and its sealed headers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cryptography import x509
from cryptography.x509.oid import NameOID

from shared.errors import PeerError, TrustError

NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
_URI = "spiffe://radfleet/"


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's name. Both parts are 1 to 32 characters of a-z, 0-9 and inner hyphens.

    Raises:
        PeerError: a part is not such a name.
    """

    site: str
    node: str

    def __post_init__(self) -> None:
        for part in (self.site, self.node):
            if NAME.fullmatch(part) is None:
                raise PeerError(f"{part[:40]!r} is not a site or node name.", cure="Use a-z, 0-9 and hyphens.")

    @property
    def common_name(self) -> str:
        """The certificate's CN, so the MQTT user and client id: `<site>/<node>`, two levels of a topic."""
        return f"{self.site}/{self.node}"

    @property
    def uri(self) -> str:
        """The certificate's SAN: `spiffe://radfleet/<site>/<node>`."""
        return f"{_URI}{self.site}/{self.node}"


def parse_common_name(text: str) -> Identity:
    """Returns the identity that a common name `<site>/<node>` stands for.

    Raises:
        PeerError: it does not have exactly two good names.
    """
    site, slash, node = text.partition("/")
    if not slash:
        raise PeerError(f"The name {text[:80]!r} is not <site>/<node>.")
    return Identity(site, node)


def identity_of(certificate: x509.Certificate) -> Identity:
    """Returns the node that a certificate names; its CN and its SPIFFE URI must say the same.

    Raises:
        TrustError: no name, several names, or two that differ.
    """
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    try:
        alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = alternatives.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound as exc:
        raise TrustError("The certificate has no subject alternative name.") from exc
    if len(names) != 1 or len(uris) != 1:
        raise TrustError("The certificate must have one common name and one URI.")
    try:
        identity = parse_common_name(str(names[0].value))
    except PeerError as exc:
        raise TrustError("The certificate names no node.") from exc
    if uris[0] != identity.uri:
        raise TrustError("The certificate's common name and URI name different nodes.")
    return identity


def agree(*, certificate: Identity, topic: Identity, header: Identity) -> None:
    """The one comparison: the enrolled certificate, the topic and the sealed header name the same node.

    Raises:
        TrustError: they do not.
    """
    if not certificate == topic == header:
        raise TrustError(
            f"Names differ: certificate {certificate.common_name}, topic {topic.common_name}, "
            f"header {header.common_name}."
        )
