"""Measurements of this machine, each to be run as a module."""

import malora  # noqa: F401  for what it sets, before anything imports torch; see there
