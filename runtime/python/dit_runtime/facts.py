"""Read the facts that Python and C++ share: `runtime/facts.json`, in a wheel beside this file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_NAME = "facts.json"
_PACKAGED = Path(__file__).with_name(_NAME)
_SOURCE = Path(__file__).parents[2] / _NAME

FACTS: dict[str, Any] = json.loads((_PACKAGED if _PACKAGED.is_file() else _SOURCE).read_text(encoding="utf-8"))
VERSION: str = FACTS["version"]
DEFAULT_STEPS: int = FACTS["defaults"]["steps"]
DEFAULT_GUIDANCE: float = FACTS["defaults"]["guidance"]
DEFAULT_STRENGTH: float = FACTS["defaults"]["strength"]
LIMITS: dict[str, int] = FACTS["limits"]  # of a manifest: a size, the numbers and the rank of a row, training steps
PRESET_FIELDS: dict[str, str] = FACTS["preset_fields"]  # of a request -> kind of its value in a preset
CONSTANTS: dict[str, Any] = FACTS["constants"]
