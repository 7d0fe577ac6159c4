"""Golden bytes: one filled message of each kind as it was first released.

``golden.json`` only grows: `python -m tests.contract.golden` adds the messages that it lacks and never touches the
others, because peers of earlier versions go on sending those bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from rollmesh.v1 import (
    coordinator_pb2,
    environment_pb2,
    error_pb2,
    learner_pb2,
    reference_pb2,
    reward_pb2,
    rollout_pb2,
    trajectory_pb2,
)

GOLDEN_FILE = Path(__file__).with_name("golden.json")
FILES: list[Any] = [
    coordinator_pb2,
    environment_pb2,
    error_pb2,
    learner_pb2,
    reference_pb2,
    reward_pb2,
    rollout_pb2,
    trajectory_pb2,
]

_FLOATS = (FieldDescriptor.TYPE_FLOAT, FieldDescriptor.TYPE_DOUBLE)


def message_types() -> dict[str, type[Message]]:
    """The contract's messages that have fields, by full name."""
    descriptors = [d for file in FILES for d in file.DESCRIPTOR.message_types_by_name.values() if d.fields]
    return {descriptor.full_name: descriptor._concrete_class for descriptor in descriptors}


def fill(message: Any) -> Any:
    """Sets every field, recursively, to a value made from its number; of a oneof the last field stays."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value_field = field.message_type.fields_by_name["value"]
            getattr(message, field.name)[f"{field.name}/a"] = _scalar(value_field, field.number)
        elif field.message_type is not None:
            child = getattr(message, field.name)
            fill(child.add() if field.is_repeated else child)
            if not field.is_repeated:
                child.SetInParent()
        elif field.is_repeated:
            getattr(message, field.name).extend([_scalar(field, field.number), _scalar(field, field.number + 1)])
        else:
            setattr(message, field.name, _scalar(field, field.number))
    return message


def _scalar(field: FieldDescriptor, number: int) -> Any:
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    if field.type == FieldDescriptor.TYPE_STRING:
        return f"{field.name} {number} é"
    if field.type == FieldDescriptor.TYPE_BYTES:
        return bytes([0, 255, number, 128])
    if field.type == FieldDescriptor.TYPE_BOOL:
        return True
    if field.type in _FLOATS:
        return number + 0.25
    large = 2**40 if field.type == FieldDescriptor.TYPE_UINT64 else 2**20
    return large + number


def as_fields(message: Message) -> dict[str, Any]:
    """The message's fields by their names in the protos."""
    fields: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return fields


def load() -> dict[str, dict[str, Any]]:
    """``{full name: {"bytes": hex, "fields": {...}}}``"""
    golden: dict[str, dict[str, Any]] = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))
    return golden


def main() -> None:
    golden = load() if GOLDEN_FILE.exists() else {}
    for name, kind in message_types().items():
        if name not in golden:
            message = fill(kind())
            golden[name] = {"bytes": message.SerializeToString(deterministic=True).hex(), "fields": as_fields(message)}
    GOLDEN_FILE.write_text(json.dumps(golden, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
