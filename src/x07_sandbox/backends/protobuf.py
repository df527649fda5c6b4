"""Messages in the format of Protocol Buffers, read and written field by field, without a schema.

https://protobuf.dev/programming-guides/encoding describes the format. Groups, which no longer have a use, are refused.
"""

from typing import Any, Final, TypeVar

_Value = TypeVar("_Value", int, bytes)

FIELDS_MAX: Final = 1 << 17  # of one message; each takes about 100 bytes of memory
_VARINT, _BYTES = 0, 2  # wire types; the two others have a fixed size
_FIXED: Final = {1: 8, 5: 4}
_VARINT_BITS: Final = 64
_NUMBER_BITS: Final = 29


class Message:
    """One message: a list of [field number, wire type, value]. Unknown fields are kept.

    Raises ValueError if *data* is no message, or has more than FIELDS_MAX fields.
    """

    def __init__(self, data: bytes) -> None:
        self.fields: list[list[Any]] = []
        at = 0
        while at < len(data):
            key, at = _read_varint(data, at)
            number, kind = key >> 3, key & 7
            if not 0 < number < 1 << _NUMBER_BITS or len(self.fields) == FIELDS_MAX:
                raise ValueError("a bad field number, or too many fields")
            if kind == _VARINT:
                value: int | bytes
                value, at = _read_varint(data, at)
            else:
                if kind != _BYTES and kind not in _FIXED:
                    raise ValueError("an unknown wire type")
                size, at = _read_varint(data, at) if kind == _BYTES else (_FIXED[kind], at)
                value, at = data[at : at + size], at + size
            self.fields.append([number, kind, value])
        if at != len(data):
            raise ValueError("the last field is cut off")

    def __getitem__(self, number: int) -> Any:  # noqa: ANN401 - an int or bytes, by the field
        return next((value for field, _, value in self.fields if field == number), None)

    def __setitem__(self, number: int, value: int | bytes) -> None:
        for field in self.fields:
            if field[0] == number:
                field[2] = value
                return
        self.fields.append([number, _kind(value), value])

    def single(self, number: int, default: _Value) -> _Value:
        """Return a field, or *default* if it is absent. Raises ValueError if it is repeated or of another type."""
        found = [(kind, value) for field, kind, value in self.fields if field == number]
        if len(found) > 1 or any(kind != _kind(default) for kind, _ in found):
            raise ValueError(f"field {number} is repeated or of another type")
        return found[0][1] if found else default

    def encode(self) -> bytes:
        """Return the message as bytes."""
        parts = []
        for number, kind, value in self.fields:
            parts.append(_varint(number << 3 | kind))
            if kind == _VARINT:
                parts.append(_varint(value))
            else:
                parts += [_varint(len(value)), value] if kind == _BYTES else [value]
        return b"".join(parts)


def encode(*fields: tuple[int, int | str | bytes]) -> bytes:
    """Return a message with these fields, each a number and a value. An integer must not be negative."""
    message = Message(b"")
    for number, value in fields:
        message.fields.append([number, _kind(value), value.encode() if isinstance(value, str) else value])
    return message.encode()


def _kind(value: int | str | bytes) -> int:
    return _VARINT if isinstance(value, int) else _BYTES


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, _VARINT_BITS, 7):
        if at == len(data):
            raise ValueError("the last field is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 - the bit that says that another byte follows
            if value >> _VARINT_BITS:
                break
            return value, at
    raise ValueError("an integer has more than 64 bits")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits in each byte
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
