"""The OpenAPI document describes what the server does: Schemathesis asks it what the document allows, and what not."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from served import MODEL, running, tiny_tokenizer

pytestmark = pytest.mark.slow
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    negative_data_rejection, unsupported_method,
]  # fmt: skip


HEALTH = list(HealthCheck)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))) as started:
        yield started


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "not-allowed"])
def test_the_document_and_the_server_agree(server, mode):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 9
    asked = 0
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and operation.method == "get":
            continue  # without a body nothing could be wrong

        @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=HEALTH)
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            nonlocal asked
            asked += 1
            body = case.body
            if mode is GenerationMode.POSITIVE and isinstance(body, dict) and "model" in body:
                body["model"] = MODEL  # else nearly all would end at an unknown name
            case.call_and_validate(checks=CHECKS)

        check()
    assert asked > 100


def test_requests_that_were_made_up_leave_nothing_behind(server):
    server.until_idle()
    assert server.complete().status == 200
