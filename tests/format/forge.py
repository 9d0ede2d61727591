"""Take a `.billm` file apart, change anything, and put it together again with checksums that match the change.

Imports nothing of the project: what is tested cannot mend what is forged.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECORDS = ("config", "quantization", "tokenizer", "conversion", "checksums")


class Forge:
    """The parts of a file: `entries` of the header, `metadata` with its records parsed, `data` of every tensor."""

    def __init__(self, content: bytes) -> None:
        length = int.from_bytes(content[:8], "little")
        self.entries: dict[str, Any] = json.loads(content[8 : 8 + length])
        self.metadata: dict[str, Any] = self.entries.pop("__metadata__")
        for key in RECORDS:
            self.metadata[key] = json.loads(self.metadata[key])
        data = content[8 + length :]
        self.data = {name: data[slice(*entry["data_offsets"])] for name, entry in self.entries.items()}

    @classmethod
    def of(cls, path: Path) -> "Forge":
        """Take apart the file at `path`."""
        return cls(path.read_bytes())

    def place(self) -> None:
        """Give every tensor the place that the lengths of `data` ask for, in order, and its true checksum."""
        begin = 0
        for name, data in self.data.items():
            self.entries[name]["data_offsets"] = [begin, begin + len(data)]
            self.metadata["checksums"][name] = hashlib.sha256(data).hexdigest()
            begin += len(data)

    def header(self) -> bytes:
        """Return the header's JSON text; records that are not text yet are written as JSON."""
        metadata = {
            key: value if isinstance(value, str) or key not in RECORDS else json.dumps(value, separators=(",", ":"))
            for key, value in self.metadata.items()
        }
        return json.dumps({"__metadata__": metadata, **self.entries}, separators=(",", ":")).encode()

    def build(self, edit: Callable[[bytes], bytes] = lambda raw: raw) -> bytes:
        """Return the file, with the header's text passed through `edit` before its checksum is made to match."""
        return assemble(edit(self.header()), b"".join(self.data.values()))


def assemble(raw: bytes, data: bytes) -> bytes:
    """Return a file with the header text `raw`, padded and with a matching header_sha256."""
    raw = fix_hash(raw + b" " * (-(8 + len(raw)) % 64))
    return len(raw).to_bytes(8, "little") + raw + data


def fix_hash(raw: bytes) -> bytes:
    """Return the header with its own checksum made to match, if it has one."""
    before, mark, after = raw.partition(b'"header_sha256":"')
    if not mark:
        return raw
    digits = hashlib.sha256(before + mark + b"0" * 64 + after[64:]).hexdigest()
    return before + mark + digits.encode() + after[64:]


def swap_fields(field: str, first: str, second: str) -> Callable[[Forge], None]:
    def change(forge: Forge) -> None:
        a, b = forge.entries[first], forge.entries[second]
        a[field], b[field] = b[field], a[field]

    return change
