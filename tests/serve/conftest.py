"""Hand-made bundles that are open, or to be damaged."""

from tests.runtime.conftest import bundle, copied, opened

__all__ = ["bundle", "copied", "opened"]
