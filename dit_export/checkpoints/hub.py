"""Resolution of a user's name to a local path: a file, a folder, or a repository id on the Hugging Face hub."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import huggingface_hub

from dit_export.checkpoints.files import first_line
from dit_runtime.errors import UsageError

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")  # with a revision
WEIGHT_FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
TIMEOUT = 5.0  # seconds until a hub that does not answer counts as unreachable
NAMES = ("model_index.json", "scheduler/scheduler_config.json")
STEM = "diffusion_pytorch_model"


def resolve_path(name: str, parts: tuple[str, ...], instead: str) -> Path:
    """Return a path that exists, or the folder of a repository on the hub, of which `parts` are the folders needed.

    `instead` says what to pass where it cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    known = HUB_ID.fullmatch(name)
    if known is None or name.endswith(WEIGHT_FILES):
        raise UsageError(f"{name}: no such file or folder")
    try:
        return Path(fetch(known[1], parts, known[2]))
    except Exception as error:  # whatever the network, the hub or its cache raised, the way on is the same
        reason = first_line(error.__cause__ or error)
        raise UsageError(f"{name} could not be fetched ({reason}): {instead}") from None


def fetch(hub_id: str, parts: tuple[str, ...], revision: str | None = None) -> str:
    """Return the repository's folder in the user's hub cache, holding one format of the weights and no duplicates.

    The files are those of the commit that was listed, even where somebody pushes another meanwhile.
    """
    configs = [*NAMES, *(f"{part}{'*' if part.startswith('tokenizer') else 'config.json'}" for part in parts)]

    def weights(part: str, end: str) -> list[str]:
        stem = "model" if part.startswith("text_encoder") else STEM
        stem = f"pytorch_{stem}" if (stem, end) == ("model", ".bin") else stem
        return [f"{part}{stem}{end}*", f"{part}{stem}-*-of-*{end}"]

    try:
        info = huggingface_hub.HfApi().model_info(hub_id, revision=revision, timeout=TIMEOUT)
    except Exception:
        try:  # what an earlier build fetched does
            patterns = configs + [pattern for part in parts for pattern in weights(part, ".safetensors")]
            return huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=patterns, local_files_only=True
            )
        except huggingface_hub.errors.LocalEntryNotFoundError:
            pass
        raise
    names = [file.rfilename for file in info.siblings or []]
    patterns = configs.copy()
    for part in parts:
        folders = {name[: name.rfind("/") + 1] for name in names}
        for folder in fnmatch.filter(sorted(folders), part):
            safe = weights(folder, ".safetensors")
            whole = [safe[0].removesuffix("*"), safe[1]]  # not .fp16.safetensors, nor an index alone
            there = any(fnmatch.filter(names, pattern) for pattern in whole)
            patterns += safe if there else weights(folder, ".bin")
    return huggingface_hub.snapshot_download(hub_id, revision=info.sha, allow_patterns=patterns, etag_timeout=TIMEOUT)
