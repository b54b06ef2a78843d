"""Plugins through which other tools use infoprune."""
