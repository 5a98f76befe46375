"""Decisions: which mode, which program, which nodes."""
