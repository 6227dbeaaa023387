"""Bytes from outside: fetched, read strictly, never executed."""
