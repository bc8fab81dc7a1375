"""The tests; cases.py is their data."""
