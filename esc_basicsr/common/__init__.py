"""Errors, files, log, memory, tables: for any room."""
