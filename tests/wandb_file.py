"""Reads a .wandb file: protobuf records in the log format of LevelDB."""

import json
import struct
import time
import zlib
from pathlib import Path

BLOCK = 32768


def records(path):
    """All records of a finished run's file. W&B's service writes the last ones milliseconds after `finish`."""
    deadline = time.monotonic() + 20
    while not (found := list(_records(path))) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < deadline, f"{path} does not end"
        time.sleep(0.02)
    return found


def _records(path):
    """Those that are in the file, checksums verified."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = Path(path).read_bytes()
    magic, number, version = struct.unpack("<4sHB", data[:7])
    assert (magic, number, version) == (b":W&B", 0xBEE1, 0)
    position, whole = 7, b""
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            break
        piece = data[position + 7 : position + 7 + length]
        assert checksum == zlib.crc32(bytes([kind]) + piece)
        position += 7 + length
        whole = piece if kind in (1, 2) else whole + piece
        if kind in (1, 4):  # full, or the last piece
            record = Record()
            record.ParseFromString(whole)
            yield record


def read(folder):
    """-> run id, config, rows of the history, of the files under RUN/wandb in the order that they were written."""
    ids, config, rows, summary = [], {}, [], {}
    for path in sorted(Path(folder).glob("*run-*/*.wandb")):
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                ids.append(record.run.run_id)
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item})
            elif kind == "summary":
                summary |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update}
    return ids, config, rows, summary
