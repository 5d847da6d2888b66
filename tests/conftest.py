"""Set before anything imports torch; see malora/__init__.py for why."""

import malora  # noqa: F401
