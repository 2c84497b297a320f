"""Our codec against pynetdicom's, both ways, and against bytes that no sender would send."""

from __future__ import annotations

from contextlib import suppress
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom import pdu as theirs
from pynetdicom.dimse_messages import C_ECHO_RQ, C_STORE_RSP
from pynetdicom.dimse_primitives import C_ECHO, C_STORE
from pynetdicom.dsutils import decode
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    AsynchronousOperationsWindowNegotiation,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
    SOPClassExtendedNegotiation,
)
from pynetdicom.presentation import PresentationContext

from edge.intake import pdu
from edge.intake.meta import IMPLEMENTATION_NAME, IMPLEMENTATION_UID
from edge.intake.pdu import Accepted, PduError

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"


def request_bytes() -> bytes:
    """An A-ASSOCIATE-RQ with everything in it, encoded by pynetdicom."""
    primitive = A_ASSOCIATE()
    primitive.application_context_name = "1.2.840.10008.3.1.1.1"
    primitive.calling_ae_title, primitive.called_ae_title = "CT 1", "RADFLEET"
    contexts = []
    for number, uid in ((1, CT), (255, MR)):
        context = PresentationContext()
        context.context_id, context.abstract_syntax, context.transfer_syntax = number, uid, [EXPLICIT, IMPLICIT]
        contexts.append(context)
    primitive.presentation_context_definition_list = contexts
    longest, uid, version = MaximumLengthNotification(), ImplementationClassUIDNotification(), None
    longest.maximum_length_received, uid.implementation_class_uid = 16382, "1.2.3.4"
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = "SCANNER_7"
    window, role, extended = (
        AsynchronousOperationsWindowNegotiation(),
        SCP_SCU_RoleSelectionNegotiation(),
        SOPClassExtendedNegotiation(),
    )
    window.maximum_number_operations_invoked, window.maximum_number_operations_performed = 5, 7
    role.sop_class_uid, role.scu_role, role.scp_role = CT, True, True
    extended.sop_class_uid, extended.service_class_application_information = CT, b"\2\0\3\0\1\0"
    primitive.user_information = [longest, uid, version, window, role, extended]
    message = theirs.A_ASSOCIATE_RQ()
    message.from_primitive(primitive)
    return bytes(message.encode())


def test_a_request_of_pynetdicom_is_read() -> None:
    request = pdu.parse_request(memoryview(request_bytes())[6:])
    assert (request.called_ae, request.calling_ae) == ("RADFLEET", "CT 1")
    assert [(one.context_id, one.abstract_syntax, one.transfer_syntaxes) for one in request.contexts] == [
        (1, CT, (EXPLICIT, IMPLICIT)),
        (255, MR, (EXPLICIT, IMPLICIT)),
    ]
    assert (request.max_pdu_bytes, request.operations) == (16382, (5, 7))
    assert request.roles == ((CT, True, True),)
    assert request.extended == (CT,)
    assert request.implementation == "SCANNER_7"


def test_our_acceptance_is_read_by_pynetdicom() -> None:
    encoded = pdu.associate_accept(
        memoryview(request_bytes())[6:],
        (Accepted(1, CT, EXPLICIT, 0), Accepted(255, MR, IMPLICIT, 4)),
        max_pdu_bytes=131072,
        class_uid=IMPLEMENTATION_UID,
        version=IMPLEMENTATION_NAME,
        operations=True,
        roles=((CT, True, False),),
        extended={CT: b"\2\0\3\0\0\0"},
    )
    message = theirs.A_ASSOCIATE_AC()
    message.decode(encoded)
    primitive = message.to_primitive()
    assert bytes(message.encode()) == encoded
    assert (primitive.calling_ae_title, primitive.called_ae_title) == ("CT 1", "RADFLEET")
    results = primitive.presentation_context_definition_results_list
    assert [(one.context_id, one.result) for one in results] == [(1, 0), (255, 4)]
    assert results[0].transfer_syntax == [EXPLICIT]
    said = {type(one): one for one in primitive.user_information}
    assert said[MaximumLengthNotification].maximum_length_received == 131072
    assert said[ImplementationClassUIDNotification].implementation_class_uid == IMPLEMENTATION_UID
    assert said[ImplementationVersionNameNotification].implementation_version_name == IMPLEMENTATION_NAME
    window = said[AsynchronousOperationsWindowNegotiation]
    assert (window.maximum_number_operations_invoked, window.maximum_number_operations_performed) == (1, 1)
    role = said[SCP_SCU_RoleSelectionNegotiation]
    assert (role.sop_class_uid, role.scu_role, role.scp_role) == (CT, True, False)
    assert said[SOPClassExtendedNegotiation].service_class_application_information == b"\2\0\3\0\0\0"


@pytest.mark.parametrize("numbers", [(1, 1, 7), (1, 1, 3), (2, 3, 1), (2, 3, 2)])
def test_our_rejection_is_read_by_pynetdicom(numbers: tuple[int, int, int]) -> None:
    message = theirs.A_ASSOCIATE_RJ()
    message.decode(pdu.associate_reject(*numbers))
    assert (message.result, message.source, message.reason_diagnostic) == numbers
    assert message.reason_str


def test_our_release_and_abort_are_read_by_pynetdicom() -> None:
    release, abort = theirs.A_RELEASE_RP(), theirs.A_ABORT_RQ()
    release.decode(pdu.release_response())
    abort.decode(pdu.abort(6))
    assert (abort.source, abort.reason_diagnostic) == (2, 6)


@given(st.binary(max_size=3000), st.integers(min_value=7, max_value=400), st.booleans())
def test_data_of_any_length_survives_both_codecs(data: bytes, max_pdu: int, command: bool) -> None:
    encoded = pdu.data_pdus(3, data, command=command, max_pdu_bytes=max_pdu)
    stream, pieces, controls = BytesIO(encoded), [], []
    while head := stream.read(6):
        length = int.from_bytes(head[2:], "big")
        assert length <= max_pdu
        body = stream.read(length)
        message = theirs.P_DATA_TF()
        message.decode(head + body)
        (item,) = message.presentation_data_value_items
        ((context, control, fragment),) = pdu.values(memoryview(body))
        assert (item.presentation_context_id, item.presentation_data_value) == (context, bytes([control, *fragment]))
        assert context == 3
        pieces.append(bytes(fragment))
        controls.append(control)
    assert b"".join(pieces) == data
    assert controls == [int(command)] * (len(controls) - 1) + [int(command) | 2]


def test_a_maximum_length_without_room_for_data_is_refused() -> None:
    for longest in range(1, 7):
        with pytest.raises(PduError):
            pdu.data_pdus(1, b"x", command=True, max_pdu_bytes=longest)


def test_commands_survive_both_codecs() -> None:
    echo, message = C_ECHO(), C_ECHO_RQ()
    echo.MessageID, echo.AffectedSOPClassUID = 7, "1.2.840.10008.1.1"
    message.primitive_to_message(echo)
    (data,) = [value[1:] for one in message.encode_msg(1, 16384) for _, value in one.presentation_data_value_list]
    command = pdu.parse_command(data)
    assert command.number(pdu.FIELD) == pdu.C_ECHO_RQ
    assert command.number(pdu.MESSAGE_ID) == 7
    assert command.number(pdu.DATA_SET_TYPE) == pdu.NO_DATA_SET
    assert command.uid(pdu.AFFECTED_CLASS) == "1.2.840.10008.1.1"
    assert command.number(pdu.STATUS) == -1

    ours = pdu.command_set(
        {
            pdu.AFFECTED_CLASS: CT,
            pdu.FIELD: pdu.C_STORE_RQ | pdu.RESPONSE,
            pdu.RESPONDED_ID: 9,
            pdu.DATA_SET_TYPE: pdu.NO_DATA_SET,
            pdu.STATUS: 0xA700,
            pdu.ERROR_COMMENT: "No room left!",
            pdu.AFFECTED_INSTANCE: "1.2.3",
        }
    )
    response = C_STORE_RSP()
    response.command_set = decode(BytesIO(ours), True, True)
    primitive = response.message_to_primitive()
    assert isinstance(primitive, C_STORE)
    assert (primitive.MessageIDBeingRespondedTo, primitive.Status) == (9, 0xA700)
    assert (primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID) == (CT, "1.2.3")
    assert response.command_set.ErrorComment == "No room left!"
    assert response.command_set.CommandGroupLength == len(ours) - 12


@given(st.binary(max_size=600))
def test_attack_garbage_is_a_request_or_no_pdu_and_nothing_else(data: bytes) -> None:
    for body in (data, bytes(68) + data):
        with suppress(PduError):
            pdu.parse_request(memoryview(body))
        with suppress(PduError):
            pdu.parse_command(body).uid(pdu.AFFECTED_INSTANCE)
        with suppress(PduError):
            assert sum(len(fragment) + 6 for _, _, fragment in pdu.values(memoryview(body))) == len(body)


@given(st.data())
def test_attack_a_request_with_changed_bytes_is_a_request_or_no_pdu(data: st.DataObject) -> None:
    body = bytearray(request_bytes()[6:])
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    del body[data.draw(st.integers(0, len(body))) :]
    try:
        request = pdu.parse_request(memoryview(body))
    except PduError:
        return
    assert all(one.context_id % 2 for one in request.contexts)
    assert request.called_ae.isascii() or "\ufffd" in request.called_ae
