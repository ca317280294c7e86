"""Graphs: which step runs on which one (plan), and what runs it (runners)."""
