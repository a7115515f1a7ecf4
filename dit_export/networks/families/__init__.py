"""Transformers of diffusers as Networks: a small file a class, found by the `_class_name` of its config."""

from dit_export.networks.families.family import Family
from dit_export.networks.families.pixart import PIXART
from dit_export.networks.families.sd3 import SD3_5

FAMILIES = {family.name: family for family in (PIXART, SD3_5)}

__all__ = ["FAMILIES", "Family"]
