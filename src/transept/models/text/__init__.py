"""Families whose input is text."""
