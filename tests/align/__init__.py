"""Tests of the alignment mathematics."""
