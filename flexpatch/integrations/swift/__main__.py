"""Prints the path of the plugin, for ms-swift's command line: ``$(python -m flexpatch.integrations.swift)``."""

from pathlib import Path

print(Path(__file__).with_name("flexpatch_plugin.py"))
