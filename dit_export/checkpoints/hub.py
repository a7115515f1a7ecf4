"""Resolution of a user's name to a local path: a file, a folder, or a repository id on the Hugging Face hub."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub

from dit_export.checkpoints.files import first_line
from dit_runtime.errors import UsageError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHT_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
TIMEOUT = 5.0  # seconds until a hub that does not answer counts as unreachable
NAMES = ("model_index.json", "scheduler/scheduler_config.json")
STEM = "diffusion_pytorch_model"


def locate(name: str, parts: tuple[str, ...], instead: str) -> Path:
    """`parts`: the folders of the repository that are needed; `instead`: what to pass when it cannot be fetched."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(name) or name.endswith(WEIGHT_FILES):
        raise UsageError(f"{name}: no such file or folder")
    try:
        return Path(fetch(name, parts))
    except Exception as error:  # whatever the network, the hub or its cache raised, the way on is the same
        reason = first_line(error.__cause__ or error)
        raise UsageError(f"{name} could not be fetched ({reason}): {instead}") from None


def fetch(hub_id: str, parts: tuple[str, ...]) -> str:
    """The repository's folder in the user's hub cache, holding one format of the weights and no duplicates."""
    configs = [*NAMES, *(f"{part}{'*' if part.startswith('tokenizer') else 'config.json'}" for part in parts)]
    stems = {part: "model" if part.startswith("text_encoder") else STEM for part in parts}
    weights = [f"{part}{stem}{end}" for part, stem in stems.items() for end in (".safetensors*", "-*-of-*.safetensors")]
    try:
        listing = huggingface_hub.HfApi().model_info(hub_id, timeout=TIMEOUT).siblings or []
    except Exception:
        try:  # what an earlier build fetched does
            return huggingface_hub.snapshot_download(hub_id, allow_patterns=configs + weights, local_files_only=True)
        except huggingface_hub.errors.LocalEntryNotFoundError:
            pass
        raise
    for part, stem in stems.items():
        safe = (f"{part}{stem}.safetensors", f"{part}{stem}-*-of-*.safetensors")  # not .fp16.safetensors
        if not any(fnmatch(file.rfilename, pattern) for file in listing for pattern in safe):
            stem = f"pytorch_{stem}" if stem == "model" else stem
            weights += [f"{part}{stem}{end}" for end in (".bin*", "-*-of-*.bin")]
    return huggingface_hub.snapshot_download(hub_id, allow_patterns=configs + weights, etag_timeout=TIMEOUT)
