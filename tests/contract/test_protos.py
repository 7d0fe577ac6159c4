"""The protos are well formed, and the committed stubs are made from them."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from tests.contract.golden import FILES

_ROOT = Path(__file__).resolve().parents[2]
_PROTOS = sorted((_ROOT / "protos").rglob("*.proto"))


def _without_json_names(file: FileDescriptorProto) -> FileDescriptorProto:
    """Compilers differ in whether they write the JSON names that follow from the field names."""
    for message in file.message_type:
        for field in [*message.field, *(f for nested in message.nested_type for f in nested.field)]:
            field.ClearField("json_name")
    return file


def test_every_proto_has_a_stub() -> None:
    assert {file.DESCRIPTOR.name for file in FILES} == {str(p.relative_to(_ROOT / "protos")) for p in _PROTOS}


def test_the_committed_stubs_are_up_to_date(tmp_path: Path) -> None:
    protoc: Any = pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools is not installed")
    compiled = tmp_path / "all.binpb"
    arguments = ["protoc", f"-I{_ROOT / 'protos'}", f"--descriptor_set_out={compiled}", *map(str, _PROTOS)]
    assert protoc.main(arguments) == 0
    wanted = {file.name: _without_json_names(file) for file in FileDescriptorSet.FromString(compiled.read_bytes()).file}
    for stub in FILES:
        committed = FileDescriptorProto()
        stub.DESCRIPTOR.CopyToProto(committed)
        assert _without_json_names(committed) == wanted[stub.DESCRIPTOR.name], "run `make protos`"


def test_the_service_stubs_have_every_method() -> None:
    for stub in FILES:
        services = importlib.import_module(f"{stub.__name__}_grpc")
        for service in stub.DESCRIPTOR.services_by_name.values():
            servicer = getattr(services, f"{service.name}Servicer")
            declared = {name for name in vars(servicer) if not name.startswith("_")}
            assert declared == set(service.methods_by_name), "run `make protos`"


def test_every_method_of_the_protos_is_explained() -> None:
    """Each method has a comment above it."""
    for path in _PROTOS:
        lines = path.read_text(encoding="utf-8").splitlines()
        for before, line in itertools.pairwise(lines):
            if line.strip().startswith("rpc "):
                assert before.strip().startswith("//"), f"{path.name}: {line.strip()}"
