"""Processes and the `relay` command line."""
