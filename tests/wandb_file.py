"""What an offline W&B run file holds: all that a dashboard would get."""

import json
import struct
import time
from pathlib import Path


def records(path):
    """The records of a ``.wandb`` file: blocks of 32 KiB, in which a record may be cut into pieces."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, part = Path(path).read_bytes(), 7, b""
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        piece = data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind == 0:
            continue
        part = piece if kind in (1, 2) else part + piece
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(part)
            yield record


def finished(path, seconds=30):
    """All records, the last of which says that the run is over: W&B may write it after `finish` has returned."""
    for _ in range(10 * seconds):
        found = list(records(path))
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} is not finished after {seconds} s; call finish() first")


def _found(folder, seconds=30):
    """Another process writes it, when it comes to it."""
    for _ in range(10 * seconds):
        if found := list(Path(folder).rglob("offline-run-*/*.wandb")):
            return found
        time.sleep(0.1)
    raise AssertionError(f"there is no offline run below {folder} after {seconds} s")


class WandbFile:
    """The one offline run below a folder, read once it is finished."""

    def __init__(self, folder):
        (self.path,) = _found(folder)
        self.rows, self.config, self.summary, self.alerts, self.metrics, self.artifacts = [], {}, {}, [], {}, []
        self.tags = []
        for record in finished(self.path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row = {}
                for item in record.history.item:
                    row.setdefault((item.nested_key or [item.key])[0], json.loads(item.value_json))
                self.rows.append({key: value for key, value in row.items() if key[0] != "_"})
            elif kind == "config":
                self.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
            elif kind == "summary":
                for item in record.summary.update:
                    self.summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
            elif kind == "alert":
                self.alerts.append((record.alert.title, record.alert.text))
            elif kind == "metric":
                self.metrics[record.metric.name or record.metric.glob_name] = record.metric
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "run":
                self.tags = list(record.run.tags) or self.tags

    @property
    def keys(self):
        return {key for row in self.rows for key in row}

    def twice(self):
        """Keys that came more than once for a step."""
        seen, twice = set(), set()
        for row in self.rows:
            for key in set(row) - {"trainer/global_step", "epoch"}:
                place = (key, row.get("trainer/global_step"))
                twice |= {place} & seen
                seen.add(place)
        return twice
