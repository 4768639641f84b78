"""Suites: what is asked of every arm. Texts that the project wrote, and how they are scored."""
