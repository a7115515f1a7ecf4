"""All hostile bundles."""

from __future__ import annotations

from tests.hostile import Damage
from tests.hostile.files import FILES
from tests.hostile.manifests import MANIFESTS
from tests.hostile.references import REFERENCES

BUNDLES: tuple[Damage, ...] = (*MANIFESTS, *FILES, *REFERENCES)
