"""Steered models inside other projects' evaluations; each file needs the package that it serves."""
