"""Merge a LoRA adapter into its base model, streaming (being written)."""

import hashlib
import json
from pathlib import Path


def fingerprint(folder: Path) -> str:
    """Name a model's weights without reading gigabytes: the sha256 of config.json and, for every
    *.safetensors in name order, its name, its header, and both ends (1,024 bytes) of each tensor."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            digest.update(path.name.encode() + header)
            tensors = json.loads(header)
            tensors.pop("__metadata__", None)
            for begin, end in sorted(t["data_offsets"] for t in tensors.values()):
                for start in (begin, max(begin, end - 1024)):
                    file.seek(8 + len(header) + start)
                    digest.update(file.read(min(1024, end - begin)))
    return digest.hexdigest()
